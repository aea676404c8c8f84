"""An encoder in an artifact: written, read, and kept apart from language models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import NO_TEXT, quantize_small

from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_weights, open_artifact, tensor
from flashlite.artifact.write import write_artifact
from flashlite.checkpoint.open import open_checkpoint
from flashlite.compress.plan import Plan, plan_preset
from flashlite.compress.screen import Cut, Screen
from flashlite.errors import ArtifactError, CompressError, UnsupportedModel
from flashlite.model.families import describe_any

BERT = Path(__file__).parents[1] / "fixtures/encoders/bert"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return quantize_small(BERT, "import", tmp_path_factory.mktemp("encoder") / "a.fl").artifact


def test_it_is_read_as_it_was_written(encoder: Artifact) -> None:
    found = open_artifact(encoder.path)
    source = describe_any(open_checkpoint(BERT))
    assert found.encoder == source.spec
    assert found.format_version == 3
    weights = load_weights(found)
    for name, shape in source.spec.shapes():
        values = tensor(found, weights, name)
        assert values.shape == shape
        original = source.tensor(name)
        allowed = {"f32": 0.0, "f16": 5e-4, "q8": 5e-3}[found.plan.formats[name]]
        assert np.abs(values - original).max() <= allowed * np.abs(original).max()


def test_a_language_model_is_not_to_be_had_of_it(encoder: Artifact) -> None:
    with pytest.raises(UnsupportedModel, match=r"small is an encoder.*use flashlite embed"):
        _ = encoder.spec


@pytest.mark.parametrize("preset", ["import", "hybrid", "q8", "q4"])
def test_tables_that_are_looked_up_stay_in_half_precision(preset: str) -> None:
    formats = plan_preset(preset, describe_any(open_checkpoint(BERT))).formats
    assert (formats["positions"], formats["types"]) == ("f16", "f16")
    assert formats["embed"] == {"hybrid": "f16", "q4": "q4m"}.get(preset, "q8")
    assert formats["layers.0.up"] == ("q4m" if preset == "q4" else "q8")
    assert formats["layers.0.up_bias"] == "f32"


def test_an_older_format_has_no_encoders(encoder: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "old.fl"
    folder.mkdir()
    for file in encoder.path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "format_version": 2}))
    with pytest.raises(ArtifactError, match="says format 2 and holds what came with 3"):
        open_artifact(folder, enable_integrity_check=False)


def test_it_has_no_split_head(encoder: Artifact) -> None:
    cut = Cut(0.2, 16)
    screen = Screen(rank=32, coarse=cut, fine=cut, measured={})
    with pytest.raises(CompressError, match="bert is an encoder"):
        replace(encoder.plan, screen=screen).check(encoder.encoder)
    data = {**encoder.plan.to_json(), "screen": screen.to_json()}
    with pytest.raises(CompressError, match="bert is an encoder"):
        Plan.from_json(data, encoder.encoder)


def test_tokens_beyond_the_vocabulary_are_refused(encoder: Artifact, tmp_path: Path) -> None:
    tokens = replace(NO_TEXT.tokens, bos=encoder.encoder.vocab_size)
    with pytest.raises(ArtifactError, match="not in the model's vocabulary"):
        write_artifact(
            tmp_path / "b.fl",
            encoder.model,
            encoder.plan,
            replace(NO_TEXT, tokens=tokens),
            [],
            name="b",
            provenance=encoder.provenance,
        )
