"""Artifacts of every release stay readable, byte for byte what they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashlite.artifact.read import load_texts, load_weights, open_artifact, tensor
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.model.reference import Reference

RELEASES = Path(__file__).parents[1] / "fixtures/artifacts"
DIGESTS = {"v1": "4668a6d9c979cd1d9dac0b836f0ac42a5c9355f848962752c46cb35f8ea481e8"}


def test_every_kept_artifact_is_tested() -> None:
    assert {path.name for path in RELEASES.iterdir()} == set(DIGESTS)


@pytest.mark.parametrize("release", sorted(DIGESTS))
def test_an_artifact_of_an_old_release_is_read(release: str) -> None:
    artifact = open_artifact(RELEASES / release / "tiny.fl")
    assert artifact.digest == DIGESTS[release]
    weights = load_weights(artifact)
    assert set(artifact.plan.formats.values()) == {"q8", "q4", "q4m", "f32"}
    for name, shape in artifact.spec.shapes():
        assert tensor(artifact, weights, name).shape == shape


def test_v1_means_what_it_meant() -> None:
    """Values written down when it was made: the layout and every format are read as then."""
    artifact = open_artifact(RELEASES / "v1/tiny.fl")
    weights = load_weights(artifact)
    expected = {
        "embed": [0.0640869140625, 0.4684295654296875, -0.6251602172851562],
        "head": [0.0640869140625, 0.4684295654296875, -0.6251602172851562],
        "layers.0.q": [0.08160400390625, 0.052734375, -0.0352783203125],
        "layers.0.v": [-0.146026611328125, -0.060882568359375, 0.2036895751953125],
        "layers.1.up": [-0.08631134033203125, 0.1685657501220703, 0.11741065979003906],
        "layers.1.down": [-0.042267799377441406, -0.08301162719726562, -0.13592147827148438],
    }
    for name, values in expected.items():
        assert tensor(artifact, weights, name).ravel()[[0, 77, -1]].tolist() == values, name


def test_v1_still_runs() -> None:
    artifact = open_artifact(RELEASES / "v1/tiny.fl")
    weights = load_weights(artifact)
    tokenizer = Tokenizer(load_texts(artifact))
    ids = tokenizer.render_chat([{"role": "user", "content": "What is the capital?"}])
    assert tokenizer.decode(ids).startswith("user\nWhat is the capital?")
    reference = Reference(artifact.spec, lambda name: tensor(artifact, weights, name))
    logits = reference.logits(np.array(ids))
    assert logits.shape == (len(ids), 512)
    assert np.isfinite(logits).all()
