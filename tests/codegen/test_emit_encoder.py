"""The generated C of an encoder: a straight list of calls, and nothing of a file's text in it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from small import quantize_small

from flashlite.artifact.format import Artifact
from flashlite.artifact.read import open_artifact
from flashlite.codegen.emit_encoder import emit_encoder
from flashlite.codegen.generate import generate
from flashlite.errors import UnsupportedModel, UnsupportedTarget

HERE = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("encoder") / "encoder.fl"
    return quantize_small(HERE / "fixtures/encoders/bert-first", "q4", folder).artifact


def test_forward_is_a_straight_list_of_calls(encoder: Artifact) -> None:
    text = generate(encoder, "avx2")
    assert re.findall(r"\b(fl_[a-z_]+)\(t", text) == [
        "fl_qkv",
        "fl_store",
        "fl_attend_all",
        "fl_add_heads_norm",
        "fl_hidden",
        "fl_add_hidden_norm",
        "fl_embed_text",
        "fl_pool",
    ]
    assert "fl_pool(t, FL_FIRST)" in text
    assert text.count("FL_Q4M") == 1 + 6 * 3  # the words, and six matrices of three layers
    offset = encoder.tensors["layers.2.down_bias"].offset
    assert f", {offset}}}" in text


def test_names_of_the_artifact_do_not_reach_the_source(encoder: Artifact) -> None:
    hostile = '";system("x");//'
    named = replace(
        encoder,
        name=hostile,
        model=replace(encoder.encoder, family=hostile),
        provenance=MappingProxyType({"source": hostile, "sha256": hostile, "licence": hostile}),
    )
    assert emit_encoder(named, "plain") == emit_encoder(encoder, "plain")


def test_a_format_without_a_kernel_is_fl_612(encoder: Artifact) -> None:
    formats = dict(encoder.plan.formats) | {"layers.0.q": "f16"}
    changed = replace(encoder, plan=replace(encoder.plan, formats=formats))
    with pytest.raises(UnsupportedTarget, match=r"FL-612: layers.0.q is stored as f16"):
        emit_encoder(changed, "plain")


def test_a_language_model_is_refused() -> None:
    tiny = open_artifact(HERE / "fixtures/artifacts/v1/tiny.fl")
    with pytest.raises(UnsupportedModel, match="language model, not an encoder"):
        emit_encoder(tiny, "plain")
