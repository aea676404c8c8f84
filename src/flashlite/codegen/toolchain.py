"""Find a C compiler, and build a library in a cache that survives concurrency and interruption.

    csrc      ->  key = digest(sources, compiler, flags)   ->  builds/kernels-KEY/*.o     once
    model.c   ->  key = digest(model.c, the key above)     ->  builds/model-KEY/model.so  per model
        there and its digests hold: use it
        else: build in a fresh folder beside it -> record keyed digests -> rename

A profiled library (`FL_PROFILE`) has another key throughout; fl_limits.c is a library by itself.

The folder is private to the user (0700) and what it holds is checked against keyed digests before
it is linked or loaded, since loading runs its code.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from flashlite import paths
from flashlite.codegen.target import Target
from flashlite.errors import CompileError, IntegrityError

__all__ = ["CSRC", "Compiler", "build_library", "build_limits", "find_compiler", "kernels_digest"]

CSRC = Path(__file__).resolve().parent.parent / "csrc"
_COMMON = (
    "fl_attention.c",
    "fl_encoder.c",
    "fl_engine.c",
    "fl_head.c",
    "fl_ops.c",
    "fl_os.c",
    "fl_sample.c",
)
_VECTORISED = (
    "fl_attention.c",
    "fl_encoder.c",
    "fl_head.c",
    "fl_ops.c",
)  # float loops that the compiler turns into vectors
# Names outside C11 (pthreads, mmap) come from _GNU_SOURCE in the one file that uses them.
_INCLUDED = {"amx": ("fl_kernels_avx512.c",)}  # by a table of kernels: not compiled by themselves
_FLAGS = (
    "-std=c11",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-g0",
)
_PROFILE = ("-DFL_PROFILE",)  # every part of a step leaves a mark: fl_mark.h
_LIMITS = "fl_limits.c"
_DIGESTS = "digests.json"
_BUILD_SECONDS = 300
_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Compiler:
    """A C compiler: the words that start its command line, and what it says it is."""

    command: tuple[str, ...]
    version: str


def find_compiler(target: Target) -> Compiler:
    """The system's compiler for the machine at hand, else zig (and zig for every other target).

    FLASHLITE_CC names another one.

    Raises:
        CompileError: there is none; says how to get one.
    """
    if target.triple is None:
        forced = os.environ.get("FLASHLITE_CC")
        for name in (forced,) if forced else ("cc", "gcc", "clang"):
            if (path := shutil.which(name)) is not None:
                return Compiler((path,), _version((path,)))
        if forced:
            raise CompileError(f"FLASHLITE_CC is {forced!r}, which is not on PATH")
    zig = (sys.executable, "-m", "ziglang")
    if _has_ziglang():
        return Compiler((*zig, "cc"), _version(zig))
    raise CompileError(
        "no C compiler was found (cc, gcc, clang or zig); install one with "
        "pip install 'flashlite[compiler]', or your system's gcc"
        if target.triple is None
        else f"target {target.triple} needs zig; pip install 'flashlite[compiler]'"
    )


def build_library(model_c: str, target: Target, *, profile: bool = False) -> Path:
    """Compile `model.c` with the hand-written C into a shared library, or find it built.

    Args:
        model_c: from `emit_model`.
        target: what for.
        profile: a library that says where the time of a step goes.

    Returns:
        Path of the library in the user's cache, its bytes checked.

    Raises:
        CompileError: no compiler, or it failed (its first message is kept).
        IntegrityError: the cache was written by somebody else.
    """
    compiler = find_compiler(target)
    sources = _hand_written(target)
    flags = (*_FLAGS, *(_PROFILE if profile else ()))
    setting = (*compiler.command, compiler.version, target.label, *flags, *target.kernel_flags)
    kernels_key = _key([*setting, *(part for item in sources.items() for part in item)])
    folder = _build(
        f"model-{target.label}-{_key([kernels_key, model_c])}",
        lambda fresh: _compile_model(fresh, model_c, kernels_key, sources, compiler, target, flags),
    )
    return folder / target.library_name


def build_limits(target: Target) -> Path:
    """The library of what a machine can do at most (`csrc/fl_limits.c`), compiled or found.

    Raises:
        CompileError, IntegrityError: as `build_library`.
    """
    compiler = find_compiler(target)
    sources = {name: (CSRC / name).read_text(encoding="utf-8") for name in (_LIMITS, "fl.h")}
    flags = (*_FLAGS, *_pic(target), *target.kernel_flags)
    setting = (*compiler.command, compiler.version, target.label, *flags, *sources.values())

    def compile_limits(fresh: Path) -> None:
        for name, text in sources.items():
            (fresh / name).write_text(text, encoding="utf-8")
        command = (*compiler.command, *_cross(target), *flags, "-shared", _LIMITS)
        _run((*command, "-o", target.library_name), fresh)

    return _build(f"limits-{target.label}-{_key(setting)}", compile_limits) / target.library_name


def kernels_digest(target: Target) -> str:
    """Names the hand-written C of a target and how it is compiled: equal kernels, equal speed.

    Raises:
        CompileError: there is no compiler.
    """
    compiler = find_compiler(target)
    setting = (compiler.version, target.label, *_FLAGS, *target.kernel_flags)
    return _key([*setting, *(part for item in _hand_written(target).items() for part in item)])


def _compile_model(
    fresh: Path,
    model_c: str,
    kernels_key: str,
    sources: dict[str, str],
    compiler: Compiler,
    target: Target,
    flags: tuple[str, ...],
) -> None:
    kernels = _build(
        f"kernels-{target.label}-{kernels_key}",
        lambda folder: _compile_kernels(folder, sources, compiler, target, flags),
    )
    (fresh / "model.c").write_text(model_c, encoding="utf-8")
    command = (*compiler.command, *_cross(target))
    include = f"-I{kernels}"
    _run((*command, *flags, *_pic(target), include, "-c", "model.c", "-o", "model.o"), fresh)
    objects = sorted(str(path) for path in kernels.glob("*.o"))
    threads = () if target.system == "macos" else ("-lpthread",)
    link = ("-shared", *_pic(target), "-o", target.library_name, "model.o", *objects)
    _run((*command, *link, *threads), fresh)
    (fresh / "model.o").unlink()


def _compile_kernels(
    fresh: Path,
    sources: dict[str, str],
    compiler: Compiler,
    target: Target,
    flags: tuple[str, ...],
) -> None:
    """One object per file, each with its own instruction set, as many at a time as cores."""
    for name, text in sources.items():
        (fresh / name).write_text(text, encoding="utf-8")

    def compile_unit(name: str) -> None:
        own = (*_VECTORISED, f"fl_kernels_{target.isa}.c")
        isa = target.kernel_flags if name in own else ()
        command = (*compiler.command, *_cross(target), *flags, *_pic(target), *isa, "-c", name)
        _run((*command, "-o", name.removesuffix(".c") + ".o"), fresh)

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        included = _INCLUDED.get(target.isa, ())
        units = [name for name in sources if name.endswith(".c") and name not in included]
        for _ in pool.map(compile_unit, units):
            pass


def _hand_written(target: Target) -> dict[str, str]:
    """The C files and headers that every model of this target shares, by name."""
    # The plain kernels are always there: other tables borrow what they do not speed up.
    kernels = dict.fromkeys(("fl_kernels_plain.c", f"fl_kernels_{target.isa}.c"))
    headers = sorted(path.name for path in CSRC.glob("*.h"))
    names = (*_COMMON, *kernels, *_INCLUDED.get(target.isa, ()), *headers)
    return {name: (CSRC / name).read_text(encoding="utf-8") for name in names}


def _cross(target: Target) -> tuple[str, ...]:
    return ("-target", target.triple) if target.triple else ()


def _pic(target: Target) -> tuple[str, ...]:
    return () if target.system == "windows" else ("-fPIC",)


def _key(parts: Sequence[str]) -> str:
    digest = blake3()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part.encode())
    return digest.hexdigest()[:32]


def _build(name: str, fill: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, filled now if it is not there or not as it was built."""
    root = _private(paths.cache_dir() / "builds")
    folder = root / name
    if _is_intact(folder):
        return folder
    with _fresh_folder(root) as fresh:
        fill(fresh)
        _record(fresh)
        _publish(fresh, folder)
    return folder


def _run(command: Sequence[str], folder: Path) -> None:
    environment = dict(os.environ)
    if "ziglang" in command:
        cache = str(_private(paths.cache_dir() / "zig"))
        environment |= {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_BUILD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CompileError(f"{command[0]} did not end in {_BUILD_SECONDS} s") from None
    except OSError as error:
        raise CompileError(f"{command[0]} could not be started: {error.strerror}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        first = next((line for line in said if "error" in line.lower()), (said or ["nothing"])[0])
        raise CompileError(f"{command[0]} failed with status {done.returncode}: {first}")


@contextlib.contextmanager
def _fresh_folder(root: Path) -> Iterator[Path]:
    """A new folder that is gone afterwards, unless it was renamed; sweeps what a kill left."""
    for old in root.glob("building-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(old)
    try:
        fresh = Path(tempfile.mkdtemp(prefix="building-", dir=root))
    except OSError as error:
        raise CompileError(f"{root}: {error.strerror}; set FLASHLITE_CACHE elsewhere") from None
    try:
        yield fresh
    except OSError as error:
        raise CompileError(
            f"{fresh}: {error.strerror}; free space or set FLASHLITE_CACHE"
        ) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _publish(fresh: Path, folder: Path) -> None:
    """Rename into place; a concurrent build of the same key may have been first."""
    try:
        fresh.rename(folder)
    except OSError:
        if _is_intact(folder):
            return
        broken = fresh.parent / f"{fresh.name}-replaced"
        with contextlib.suppress(FileNotFoundError):
            folder.rename(broken)
        fresh.rename(folder)
        shutil.rmtree(broken, ignore_errors=True)


def _record(folder: Path) -> None:
    digests = {path.name: _keyed_digest(path) for path in sorted(folder.iterdir())}
    (folder / _DIGESTS).write_text(json.dumps(digests), encoding="utf-8")


def _is_intact(folder: Path) -> bool:
    """Whether the folder is there, ours, and holds what was built.

    Raises:
        IntegrityError: it belongs to another user.
    """
    try:
        owner = folder.stat().st_uid
        recorded = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
        if hasattr(os, "getuid") and owner != os.getuid():
            raise IntegrityError(f"{folder} belongs to user {owner}; remove it")
        return bool(recorded) and all(
            str(digest) == _keyed_digest(folder / name) for name, digest in recorded.items()
        )
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _keyed_digest(path: Path) -> str:
    return blake3(path.read_bytes(), key=_installation_key()).hexdigest()


def _installation_key() -> bytes:
    try:
        return paths.installation_key()
    except OSError as error:
        raise CompileError(
            f"{paths.data_dir()}: {error.strerror}; set FLASHLITE_HOME elsewhere"
        ) from None


def _private(folder: Path) -> Path:
    try:
        return paths.private_dir(folder)
    except OSError as error:
        raise CompileError(
            f"{folder}: {error.strerror}; set FLASHLITE_CACHE and FLASHLITE_HOME elsewhere"
        ) from None


def _has_ziglang() -> bool:
    import importlib.util

    return importlib.util.find_spec("ziglang") is not None


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    """First line of `--version` (zig: `version`), remembered: asking costs some milliseconds."""
    word = "version" if "ziglang" in command else "--version"
    try:
        done = subprocess.run(
            (*command, word), capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout or done.stderr).split("\n", 1)[0].strip()
