"""The C whose sizes the compiler does not know computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashlite.artifact.read import load_weights
from flashlite.codegen.emit import emit_model
from flashlite.codegen.target import host_target
from flashlite.codegen.toolchain import build_library
from flashlite.runtime.engine import Engine, Work
from flashlite.runtime.library import load_library
from flashlite.runtime.prepare import find_artifact
from runtime_shapes import with_runtime_shapes

GOLDEN = Path(__file__).parent.parent / "codegen/golden/tiny_model.c"


def test_no_size_is_left_for_the_compiler() -> None:
    text = with_runtime_shapes(GOLDEN.read_text())
    assert "static const" not in text
    assert "static volatile struct {\n    int32_t VOCAB;" in text
    assert ".VOCAB = 512, .D_MODEL = 64" in text
    assert "i < SIZES.N_LAYERS" in text
    body = text[text.index("static void layer(") : text.index("fl_packed HEAD")]
    assert "D_MODEL" not in body
    # What C wants to be constant still is.
    assert "layer_weights LAYERS[N_LAYERS] = {" in text
    assert ".q = {FL_Q4M, Q_ROWS, D_MODEL, 35072" in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("enum {", "enum sizes {", "no enum"),
        ("static const", "const static", "no constant tables"),
        ("static void", "void", "no functions"),
    ],
)
def test_another_form_of_c_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_runtime_shapes(GOLDEN.read_text().replace(old, new))


def test_it_compiles_and_gives_the_same_bits(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHLITE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FLASHLITE_CACHE", str(tmp_path / "cache"))
    artifact = find_artifact(str(tiny_gguf))
    target = host_target("plain")
    text = emit_model(artifact, "plain")
    logits = []
    for model_c in (text, with_runtime_shapes(text)):
        library = load_library(build_library(model_c, target))
        with Engine(library, load_weights(artifact), max_tokens=64, threads=2) as engine:
            sequence = engine.new_sequence(64)
            logits.append(engine.step([Work(sequence, range(60, 90), "all")]).copy())
    assert np.array_equal(*logits)
    assert np.isfinite(logits[0]).all()
