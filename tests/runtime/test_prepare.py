"""From an artifact to its library: what is chosen where the compiler is older than the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashlite.artifact.read import open_artifact
from flashlite.codegen.target import check_isa, host_target
from flashlite.errors import CompileError, UnsupportedTarget
from flashlite.runtime.prepare import compile_artifact

RELEASE = Path(__file__).parent.parent / "fixtures/artifacts/v1/tiny.fl"


@pytest.fixture
def old_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that does not know tiles, on a CPU that has them."""
    try:
        check_isa("amx")
    except UnsupportedTarget as error:
        pytest.skip(str(error))
    script = tmp_path / "old-cc"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *-mamx-tile*)\n'
        "  echo \"error: unrecognized command-line option '-mamx-tile'\" >&2; exit 1;;\nesac\n"
        'exec cc "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("FLASHLITE_CC", str(script))
    monkeypatch.setenv("FLASHLITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FLASHLITE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FLASHLITE_ISA", raising=False)


@pytest.mark.usefixtures("old_compiler")
def test_a_compiler_without_tiles_makes_the_library_before_them() -> None:
    library = compile_artifact(open_artifact(RELEASE))
    assert "avx512" in library.parent.name


@pytest.mark.usefixtures("old_compiler")
def test_tiles_that_somebody_asked_for_are_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = open_artifact(RELEASE)
    with pytest.raises(CompileError, match="mamx-tile"):
        compile_artifact(artifact, host_target("amx"))
    monkeypatch.setenv("FLASHLITE_ISA", "amx")
    with pytest.raises(CompileError, match="mamx-tile"):
        compile_artifact(artifact)
