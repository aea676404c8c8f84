from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashlite.artifact import staging
from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_weights, open_artifact
from flashlite.artifact.write import quantize, write_artifact
from flashlite.checkpoint.tokenizer import SpecialTokens, TokenizerFiles
from flashlite.errors import ArtifactError, CompressError
from flashlite.model.source import SourceModel

PROVENANCE = {"source": "tiny.gguf", "sha256": "ab" * 32, "licence": "Apache-2.0"}

# Quantizes argv[1] into argv[2] in a process of its own; `act(done, total)` is put in before.
WORKER = """
import os, resource, signal, sys
from pathlib import Path
from flashlite.artifact.write import quantize
from flashlite.checkpoint.open import open_checkpoint
from flashlite.checkpoint.tokenizer import SpecialTokens, TokenizerFiles
from flashlite.errors import FlashliteError
from flashlite.model.families import describe
texts = TokenizerFiles(b"{}", None, SpecialTokens(None, (2,), False, (0,)))
source = describe(open_checkpoint(Path(sys.argv[1])))
try:
    quantize(source, texts, Path(sys.argv[2]), sys.argv[3], name="w", progress=act,
             provenance={"source": "", "sha256": "", "licence": ""})
except FlashliteError as error:
    print(type(error).__name__, error)
    sys.exit(1)
"""


def work(
    act: str, gguf: Path, target: Path, preset: str = "q8"
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", act + WORKER, str(gguf), str(target), preset]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def make(
    source: SourceModel, texts: TokenizerFiles, target: Path, preset: str = "import", **more: Any
) -> Artifact:
    return quantize(source, texts, target, preset, name="t", provenance=PROVENANCE, **more)


def alone(target: Path) -> bool:
    """Whether nothing but the artifact lies in its parent."""
    return [entry.name for entry in target.parent.iterdir()] == [target.name]


def test_the_same_source_makes_the_same_artifact(
    tiny_source: SourceModel, tiny_texts: TokenizerFiles, tmp_path: Path
) -> None:
    one, two = (make(tiny_source, tiny_texts, tmp_path / f"{i}.fl") for i in (1, 2))
    assert one.digest == two.digest


def test_progress_rises_to_the_size(
    tiny_source: SourceModel, tiny_texts: TokenizerFiles, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    made = make(
        tiny_source, tiny_texts, tmp_path / "x.fl", progress=lambda *step: seen.append(step)
    )
    assert seen == sorted(seen)
    assert seen[-1] == (made.weights_size, made.weights_size)
    assert len(seen) > 50


@pytest.mark.parametrize("swaps", [True, False])
def test_an_artifact_is_replaced_whole(
    tiny_source: SourceModel,
    tiny_texts: TokenizerFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    swaps: bool,
) -> None:
    """Also on a file system that cannot swap two folders in one step."""
    if not swaps:
        monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    target = tmp_path / "x.fl"
    old = make(tiny_source, tiny_texts, target)
    (target / "card.json").unlink()  # a damaged one may be replaced too
    new = make(tiny_source, tiny_texts, target, "q8")
    assert new.digest != old.digest
    assert open_artifact(target).plan.preset == "q8"
    assert alone(target)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [True, False])
def test_a_failure_leaves_what_was_there(
    tiny_source: SourceModel,
    tiny_texts: TokenizerFiles,
    tmp_path: Path,
    error: BaseException,
    there: bool,
) -> None:
    target = tmp_path / "parent/x.fl"
    digest = make(tiny_source, tiny_texts, target).digest if there else None

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise error

    with pytest.raises(type(error)):
        make(tiny_source, tiny_texts, target, "q8", progress=stop)
    if there:
        assert open_artifact(target).digest == digest
        assert alone(target)
    else:
        assert not any(target.parent.iterdir())


def test_a_bad_preset_touches_nothing(
    tiny_source: SourceModel, tiny_texts: TokenizerFiles, tmp_path: Path
) -> None:
    with pytest.raises(CompressError, match="no preset"):
        make(tiny_source, tiny_texts, tmp_path / "new/x.fl", "q2")
    assert not (tmp_path / "new").exists()


def test_a_bad_name_or_token_touches_nothing(
    tiny_source: SourceModel, tiny_texts: TokenizerFiles, tmp_path: Path
) -> None:
    target = tmp_path / "new/x.fl"
    with pytest.raises(ArtifactError, match="is not allowed"):
        quantize(tiny_source, tiny_texts, target, name="A B", provenance=PROVENANCE)
    texts = TokenizerFiles(b"{}", None, SpecialTokens(None, (99999,), False, ()))
    with pytest.raises(ArtifactError, match="99999"):
        make(tiny_source, texts, target)
    assert not target.parent.exists()


def test_other_peoples_files_are_not_replaced(
    tiny_source: SourceModel, tiny_texts: TokenizerFiles, tmp_path: Path
) -> None:
    target = tmp_path / "home"
    target.mkdir()
    (target / "manifest.json").write_text("{}")  # as other programs have too
    (target / "thesis.tex").write_text("five years")
    with pytest.raises(ArtifactError, match=r"'thesis\.tex', which is no part"):
        make(tiny_source, tiny_texts, target)
    assert (target / "thesis.tex").read_text() == "five years"
    with pytest.raises(ArtifactError, match="is not a folder"):
        make(tiny_source, tiny_texts, target / "thesis.tex")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ArtifactError, match="is not a folder"):
        make(tiny_source, tiny_texts, tmp_path / "link")


def test_a_parent_that_is_a_file(
    tiny_source: SourceModel, tiny_texts: TokenizerFiles, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        make(tiny_source, tiny_texts, tmp_path / "file/x.fl")


def test_arrays_must_come_as_planned(
    tiny_artifact: Artifact, tiny_texts: TokenizerFiles, tmp_path: Path
) -> None:
    weights = load_weights(tiny_artifact)
    entry = tiny_artifact.tensors["embed.codes"]
    codes = weights[entry.offset : entry.offset + entry.nbytes].view(np.int8).reshape(entry.shape)

    def write(pairs: list[tuple[str, NDArray[Any]]]) -> None:
        write_artifact(
            tmp_path / "x.fl", tiny_artifact.spec, tiny_artifact.plan, tiny_texts, pairs,
            name="x", provenance=PROVENANCE,
        )  # fmt: skip

    wrong: list[list[tuple[str, NDArray[Any]]]] = [
        [],
        [("embed.codes", codes)],
        [("head.codes", codes)],
        [("embed.codes", codes.view(np.uint8))],
        [("embed.codes", codes[..., :-1])],
    ]
    for pairs in wrong:
        with pytest.raises(ArtifactError, match="came where the plan has embed"):
            write(pairs)
        assert not any(tmp_path.iterdir())


# ---- full disks and killed processes -------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_too_little_space_is_said_beforehand(
    tiny_source: SourceModel, tiny_texts: TokenizerFiles, small_disk: Path
) -> None:
    (small_disk / "ballast").write_bytes(bytes(900_000))
    started: list[int] = []
    with pytest.raises(ArtifactError, match=r"not enough space: \d+ bytes .* \d+ are available; "):
        make(tiny_source, tiny_texts, small_disk / "x.fl", progress=lambda *at: started.extend(at))
    assert not started
    assert [entry.name for entry in small_disk.iterdir()] == ["ballast"]


def test_a_disk_that_fills_up_meanwhile(
    tiny_source: SourceModel, tiny_texts: TokenizerFiles, small_disk: Path
) -> None:
    target = small_disk / "x.fl"
    old = make(tiny_source, tiny_texts, target)

    def fill(done: int, total: int) -> None:
        if done > total // 2 and not (small_disk / "ballast").exists():
            with (small_disk / "ballast").open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass

    with pytest.raises(ArtifactError, match="not enough space"):
        make(tiny_source, tiny_texts, target, "q8", progress=fill)
    assert sorted(entry.name for entry in small_disk.iterdir()) == ["ballast", "x.fl"]
    assert open_artifact(target).digest == old.digest
    load_weights(old)


def test_a_file_size_limit_is_a_full_disk(tiny_gguf: Path, tmp_path: Path) -> None:
    act = (
        "import resource\n"
        "def act(done, total):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    )
    ran = work(act, tiny_gguf, tmp_path / "new/x.fl")
    assert ran.returncode == 1
    assert ran.stdout.startswith("ArtifactError ")
    assert "not enough space" in ran.stdout
    assert ran.stdout.count("\n") == 1
    assert not any((tmp_path / "new").iterdir())


def test_a_killed_process_leaves_the_old_one_and_the_next_cleans_up(
    tiny_gguf: Path, tiny_source: SourceModel, tiny_texts: TokenizerFiles, tmp_path: Path
) -> None:
    target = tmp_path / "x.fl"
    old = make(tiny_source, tiny_texts, target)
    act = (
        "import os, signal\n"
        "def act(done, total):\n"
        "    if done > total // 2: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert work(act, tiny_gguf, target).returncode == -9
    assert open_artifact(target).digest == old.digest
    load_weights(old)
    assert not alone(target)  # what was half written lies beside it, hidden
    make(tiny_source, tiny_texts, target, "q8")
    assert alone(target)


def test_two_writers_do_not_disturb_each_other(
    tiny_source: SourceModel, tiny_texts: TokenizerFiles, tmp_path: Path
) -> None:
    """Each waits for the other in the middle, so both folders exist at once."""
    target = tmp_path / "x.fl"
    meet = threading.Barrier(2, timeout=60)
    failures: list[BaseException] = []

    def write(preset: str) -> None:
        met = False

        def wait(done: int, total: int) -> None:
            nonlocal met
            if done > total // 2 and not met:
                met = True
                meet.wait()

        try:
            make(tiny_source, tiny_texts, target, preset, progress=wait)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(preset,)) for preset in ("q8", "q4")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    load_weights(open_artifact(target))
    assert alone(target)


def test_a_reader_sees_the_old_one_or_the_new_one(
    tiny_source: SourceModel, tiny_texts: TokenizerFiles, tmp_path: Path
) -> None:
    """Opened again and again while it is replaced again and again."""
    target = tmp_path / "x.fl"
    make(tiny_source, tiny_texts, target)
    stop = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                assert open_artifact(target).plan.preset in ("import", "q8")
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(16):
        make(tiny_source, tiny_texts, target, ("q8", "import")[i % 2])
    stop.set()
    reader.join()
    assert not failures
