"""The build cache: found again, mended when damaged, safe against others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from blake3 import blake3

from flashlite.artifact.read import open_artifact
from flashlite.codegen import toolchain
from flashlite.codegen.emit import emit_model
from flashlite.codegen.target import host_target, parse_target
from flashlite.codegen.toolchain import build_library, find_compiler
from flashlite.errors import CompileError, UnsupportedTarget, UsageError

RELEASE = Path(__file__).parent.parent / "fixtures/artifacts/v1/tiny.fl"
PLAIN = host_target("plain")


@pytest.fixture(scope="module")
def model_c() -> str:
    return emit_model(open_artifact(RELEASE), "plain")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and home."""
    monkeypatch.setenv("FLASHLITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FLASHLITE_HOME", str(tmp_path / "home"))
    return tmp_path / "cache"


def test_a_library_is_built_once(cache: Path, model_c: str) -> None:
    first = build_library(model_c, PLAIN)
    built = first.stat().st_mtime_ns
    assert build_library(model_c, PLAIN) == first
    assert first.stat().st_mtime_ns == built


def test_another_model_takes_the_kernels_that_are_there(cache: Path, model_c: str) -> None:
    build_library(model_c, PLAIN)
    kernels = next((cache / "builds").glob("kernels-*"))
    built = (kernels / "fl_ops.o").stat().st_mtime_ns
    other = build_library(model_c + "/* another */\n", PLAIN)
    assert other.is_file()
    assert (kernels / "fl_ops.o").stat().st_mtime_ns == built


@pytest.mark.parametrize(
    "victim", ["model-*/model.so", "kernels-*/fl_ops.o", "model-*/digests.json"]
)
def test_a_damaged_file_is_built_again(cache: Path, model_c: str, victim: str) -> None:
    good = build_library(model_c, PLAIN).read_bytes()
    path = next((cache / "builds").glob(victim))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if victim.startswith("kernels"):
        shutil.rmtree(next((cache / "builds").glob("model-*")))
    assert build_library(model_c, PLAIN).read_bytes() == good


def test_digests_copied_from_another_installation_do_not_count(cache: Path, model_c: str) -> None:
    library = build_library(model_c, PLAIN)
    library.write_bytes(b"somebody else's code")
    digest = blake3(library.read_bytes(), key=bytes(32)).hexdigest()
    record = library.parent / "digests.json"
    record.write_text(json.dumps({"model.so": digest}))
    assert build_library(model_c, PLAIN).read_bytes()[:4] == b"\x7fELF"


def test_the_cache_is_private(cache: Path, model_c: str) -> None:
    build_library(model_c, PLAIN)
    assert (cache / "builds").stat().st_mode & 0o777 == 0o700
    key = Path(os.environ["FLASHLITE_HOME"]) / "installation.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(key.read_bytes()) == 32


def start_build(model_c: str, tmp_path: Path) -> subprocess.Popen[bytes]:
    source = tmp_path / "model.c"
    source.write_text(model_c)
    code = f"""
        from pathlib import Path
        from flashlite.codegen.target import host_target
        from flashlite.codegen.toolchain import build_library
        print(build_library(Path({str(source)!r}).read_text(), host_target("plain")))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)


def test_concurrent_builds_end_with_one_library(cache: Path, model_c: str, tmp_path: Path) -> None:
    racers = [start_build(model_c, tmp_path) for _ in range(3)]
    paths = {racer.communicate(timeout=120)[0] for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert len(paths) == 1
    assert not list((cache / "builds").glob("building-*"))


def test_a_killed_build_leaves_nothing_that_is_used(
    cache: Path, model_c: str, tmp_path: Path
) -> None:
    victim = start_build(model_c, tmp_path)
    deadline = time.monotonic() + 60
    while not list(cache.glob("builds/building-*/*.c")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.communicate()
    assert not list(cache.glob("builds/model-*"))
    library = build_library(model_c, PLAIN)
    assert library.read_bytes()[:4] == b"\x7fELF"


def test_a_compiler_that_fails_is_one_line_and_leaves_nothing(cache: Path) -> None:
    with pytest.raises(CompileError, match=r"failed with status 1: .*error") as caught:
        build_library("this is not C\n", PLAIN)
    assert "\n" not in str(caught.value)
    assert not list((cache / "builds").glob("model-*"))
    assert not list((cache / "builds").glob("building-*"))


def test_warnings_are_errors(cache: Path, model_c: str) -> None:
    with pytest.raises(CompileError, match="unused"):
        build_library(model_c + "static int unused_thing;\n", PLAIN)


def test_without_any_compiler_the_way_out_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain, "_has_ziglang", lambda: False)
    with pytest.raises(CompileError, match=r"flashlite\[compiler\]"):
        find_compiler(PLAIN)
    with pytest.raises(CompileError, match=r"aarch64-linux-gnu needs zig"):
        find_compiler(parse_target("aarch64-linux-gnu"))


@pytest.mark.parametrize("text", ["sparc-linux", "x86_64", "aarch64-plan9", "--help", ""])
def test_an_unknown_target_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="native"):
        parse_target(text)


def test_an_instruction_set_that_does_not_exist_there_is_refused() -> None:
    with pytest.raises(UsageError, match="avx2.*aarch64"):
        parse_target("aarch64-linux-gnu", "avx2")


def test_an_instruction_set_this_cpu_lacks_is_fl_612(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashlite.codegen.target._cpu_features", set)
    with pytest.raises(UnsupportedTarget, match=r"FL-612: .*avx2.*lacks avx2, f16c, fma.*plain"):
        host_target("avx2")
    assert host_target().isa == "plain"
