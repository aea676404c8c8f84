"""Text encoders: what is read of a folder, the oracle against transformers, what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashlite.checkpoint.base import Checkpoint
from flashlite.checkpoint.open import open_checkpoint
from flashlite.errors import (
    ArtifactError,
    CheckpointError,
    ContextOverflow,
    UnsupportedModel,
    UsageError,
)
from flashlite.model.encoder import EncoderSpec, spec_from_json
from flashlite.model.encoder_reference import EncoderReference
from flashlite.model.families import describe, describe_any
from flashlite.model.ranks import spearman
from flashlite.model.source import EncoderSource

ENCODERS = Path(__file__).parents[1] / "fixtures/encoders"
NAMES = sorted(path.name for path in ENCODERS.iterdir())


def source_of(path: Path) -> EncoderSource:
    source = describe_any(open_checkpoint(path))
    assert isinstance(source, EncoderSource)
    return source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(ENCODERS / "bert", tmp_path / "bert"))


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_computes_what_transformers_does(name: str) -> None:
    source, stored = source_of(ENCODERS / name), np.load(ENCODERS / name / "expected.npz")
    reference = EncoderReference(source.spec, source.tensor)
    assert np.abs(reference.states(stored["ids"]) - stored["states"]).max() <= 1e-4
    assert np.abs(reference.embed(stored["ids"]) - stored["vector"]).max() <= 1e-4


def test_the_folder_says_how_texts_are_pooled_and_how_long_they_may_be() -> None:
    mean, first = (source_of(ENCODERS / name).spec for name in ("bert", "bert-first"))
    assert (mean.pooling, mean.max_context, mean.n_positions) == ("mean", 64, 96)
    assert (first.pooling, first.max_context, first.head_dim) == ("first", 80, 20)


def test_a_folder_without_settings_is_a_plain_encoder(folder: Path) -> None:
    for name in ("modules.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "1_Pooling")
    spec = source_of(folder).spec
    assert (spec.pooling, spec.max_context) == ("mean", 96)


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "Dense"),
        ("modules.json", {}, "not a list of modules"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "lasttoken"),
        ("sentence_bert_config.json", {"max_seq_length": "long"}, "max_seq_length"),
        ("sentence_bert_config.json", {"max_seq_length": 1}, "max_seq_length"),
    ],
)
def test_settings_that_flashlite_does_not_run_are_refused(
    folder: Path, file: str, value: object, message: str
) -> None:
    (folder / file).write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=message):
        source_of(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "relu"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("num_attention_heads", 3),
        ("num_hidden_layers", 0),
        ("layer_norm_eps", -1.0),
    ],
)
def test_arithmetic_that_flashlite_lacks_is_refused(key: str, value: object) -> None:
    checkpoint = open_checkpoint(ENCODERS / "bert")
    changed: Checkpoint = replace(checkpoint, metadata={**checkpoint.metadata, key: value})
    with pytest.raises(CheckpointError):
        describe_any(changed)


def test_a_tensor_nobody_reads_is_refused() -> None:
    checkpoint = open_checkpoint(ENCODERS / "bert")
    extra = replace(checkpoint.info("embeddings.LayerNorm.weight"), name="encoder.gate")
    changed = replace(checkpoint, tensors={**checkpoint.tensors, "encoder.gate": extra})
    with pytest.raises(UnsupportedModel, match="encoder.gate"):
        describe_any(changed)


def test_language_model_commands_say_that_it_is_an_encoder() -> None:
    with pytest.raises(UnsupportedModel, match="makes vectors, not text"):
        describe(open_checkpoint(ENCODERS / "bert"))


def test_a_spec_survives_json() -> None:
    spec = source_of(ENCODERS / "bert").spec
    assert spec_from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_layers", 0),
        ("d_model", 65.0),
        ("head_dim", 34),
        ("max_context", 97),
        ("max_context", 513),
        ("max_context", 1),
        ("norm_eps", 0.0),
        ("norm_eps", float("nan")),
        ("vocab_size", True),
        ("pooling", "max"),
        ("pooling", None),
        ("family", "llama"),
        ("more", 1),
    ],
)
def test_a_hostile_spec_is_refused(key: str, value: object) -> None:
    data: dict[str, Any] = source_of(ENCODERS / "bert").spec.to_json()
    with pytest.raises(ArtifactError):
        EncoderSpec.from_json({**data, key: value})


@pytest.mark.parametrize("ids", [[], [[2, 3]], [-1], [10**6], [0.5]])
def test_the_oracle_refuses_what_are_no_ids(ids: Any) -> None:
    source = source_of(ENCODERS / "bert")
    with pytest.raises(UsageError):
        EncoderReference(source.spec, source.tensor).embed(np.array(ids))


def test_the_oracle_refuses_texts_that_are_too_long() -> None:
    source = source_of(ENCODERS / "bert")
    with pytest.raises(ContextOverflow, match="65 tokens, the context holds 64"):
        EncoderReference(source.spec, source.tensor).embed(np.ones(65, np.int32))


def test_spearman_by_hand() -> None:
    x = np.array([1.0, 2.0, 2.0, 9.0])
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    # Ranks 1, 2, 3, 4 and 2, 1, 4, 3: 1 - 6 (1 + 1 + 1 + 1) / (4 (16 - 1))
    assert spearman(np.arange(4.0), np.array([1.0, 0.0, 3.0, 2.0])) == pytest.approx(0.6)
    with pytest.raises(UsageError, match="no order"):
        spearman(np.ones(3), np.arange(3.0))
    with pytest.raises(UsageError, match="two equal rows"):
        spearman(np.arange(3.0), np.arange(4.0))
