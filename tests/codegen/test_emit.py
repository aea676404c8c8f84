"""The generated C: what it says, and that nothing of a foreign file's text can reach it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from flashlite.artifact.format import Artifact
from flashlite.artifact.read import open_artifact
from flashlite.codegen.emit import emit_model
from flashlite.errors import UnsupportedTarget

RELEASE = Path(__file__).parent.parent / "fixtures/artifacts/v1/tiny.fl"
GOLDEN = Path(__file__).parent / "golden/tiny_model.c"


@pytest.fixture(scope="module")
def tiny() -> Artifact:
    return open_artifact(RELEASE)


def test_the_generated_text_is_the_known_one(
    tiny: Artifact, request: pytest.FixtureRequest
) -> None:
    text = emit_model(tiny, "avx2")
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("hostile", ['";system("x");//', "*/ int main", "a\nb", "\\", "%s"])
def test_names_of_the_artifact_do_not_reach_the_source(tiny: Artifact, hostile: str) -> None:
    named = replace(
        tiny,
        name=hostile,
        path=Path("/tmp") / "x",
        spec=replace(tiny.spec, family=hostile),
        provenance=MappingProxyType({"source": hostile, "sha256": hostile, "licence": hostile}),
    )
    assert emit_model(named, "plain") == emit_model(tiny, "plain")


def test_a_digest_that_is_no_number_is_refused(tiny: Artifact) -> None:
    broken = replace(tiny, manifest=replace(tiny.manifest, digest='00"; evil'))
    with pytest.raises(ValueError, match="invalid literal"):
        emit_model(broken, "plain")


def test_a_format_without_a_kernel_is_fl_612(tiny: Artifact) -> None:
    formats = dict(tiny.plan.formats) | {"layers.0.q": "f16"}
    changed = replace(tiny, plan=replace(tiny.plan, formats=formats))
    with pytest.raises(
        UnsupportedTarget, match=r"FL-612: layers.0.q is stored as f16.*q8, q6, q5, q4"
    ):
        emit_model(changed, "plain")
