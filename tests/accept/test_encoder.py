"""all-MiniLM-L6-v2 itself: the oracle against torch, and INT8 against the FP32 source on STS-B."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import flashlite as fl
from flashlite.checkpoint.open import open_checkpoint
from flashlite.checkpoint.pull import pull
from flashlite.model.encoder_reference import EncoderReference
from flashlite.model.families import describe_any
from flashlite.model.ranks import spearman
from flashlite.model.source import EncoderSource

pytestmark = pytest.mark.accept

MODEL = "all-minilm-l6-v2"
MOST_LOST = 0.5  # points of Spearman's correlation


@pytest.fixture(scope="module")
def source() -> EncoderSource:
    found = describe_any(open_checkpoint(pull(MODEL).path))
    assert isinstance(found, EncoderSource)
    return found


@pytest.fixture(scope="module")
def reference(source: EncoderSource) -> EncoderReference:
    weights = {name: source.tensor(name) for name, _ in source.spec.shapes()}
    return EncoderReference(source.spec, weights)


@pytest.fixture(scope="module")
def encoder() -> Iterator[fl.Encoder]:
    with fl.load_encoder(MODEL) as opened:
        yield opened


def test_the_oracle_equals_torch(source: EncoderSource, reference: EncoderReference) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(source.checkpoint.path).eval()
    rng = np.random.default_rng(0)
    for length in (2, 16, 100, 256):
        ids = np.array([101, *rng.integers(1000, 30000, length - 2), 102])
        with torch.no_grad():
            expected = model(torch.from_numpy(ids)[None]).last_hidden_state[0].numpy()
        worst = float(np.abs(reference.states(ids) - expected).max())
        print(f"{length} tokens: {worst:.1e} from torch")
        assert worst <= 1e-4


def test_int8_ranks_sentences_as_the_source_does(
    encoder: fl.Encoder, reference: EncoderReference
) -> None:
    path = Path(os.environ.get("FLASHLITE_DATA", ""), "glue/STS-B/sts-dev.tsv")
    if not path.is_file():
        pytest.skip("FLASHLITE_DATA has no STS-B")
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    scores = np.array([float(row[4]) for row in rows])
    ids = encoder.tokenize([row[5] for row in rows] + [row[6] for row in rows]).ids

    def score(vectors: NDArray[np.float32]) -> float:
        first, second = np.split(vectors, 2)
        return 100 * spearman((first * second).sum(axis=1), scores)

    exact = np.stack([reference.embed(np.array(text)) for text in ids])
    found = encoder.embed_ids(ids)
    cosines = (exact * found).sum(axis=1)
    print(
        f"STS-B dev: {score(found):.2f} in INT8, {score(exact):.2f} in FP32; cosine to FP32 "
        f"{cosines.mean():.5f}, at worst {cosines.min():.5f}"
    )
    assert score(found) >= score(exact) - MOST_LOST
    assert cosines.min() >= 0.99


def test_ordinary_and_odd_texts(encoder: fl.Encoder) -> None:
    texts = [
        "A man is eating food.",
        "A man is eating food.",
        "",
        "\N{GRINNING FACE} ok",
        "word " * 9,
    ]
    vectors = encoder.embed(texts)
    assert vectors[0] @ vectors[1] == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    composed = "El ni\u00f1o com\u00eda pl\u00e1tanos"
    both = encoder.embed([composed, unicodedata.normalize("NFD", composed)])
    assert np.array_equal(both[0], both[1])
    with pytest.raises(fl.ContextOverflow):
        encoder.embed(["x" * 9 + " ten chars" * 1000])
    with pytest.warns(UserWarning, match="1 of 1 texts were cut to 256 tokens"):
        encoder.embed([" ten chars" * 1000], truncate=True)
