"""Encoders on the engine: against the oracle, the same bits everywhere, and what is refused."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from small import Small, runs

import flashlite as fl
from flashlite.artifact.read import tensor
from flashlite.codegen.target import ISAS, host_target
from flashlite.model.encoder_reference import EncoderReference
from flashlite.runtime import encoder_engine
from flashlite.runtime.encoder import Encoder, load_encoder
from flashlite.runtime.encoder_engine import EncoderEngine
from flashlite.runtime.library import CBatch, load_library
from flashlite.runtime.prepare import compile_artifact

ENCODERS = Path(__file__).parents[1] / "fixtures/encoders"
NAMES = sorted(path.name for path in ENCODERS.iterdir())
LENGTHS = [1, 2, 3, 31, 32, 33, 40, 64, 5, 64, 63, 2, 7]
VECTOR_ISAS = [
    pytest.param(isa, marks=pytest.mark.skipif(not runs(isa), reason=f"this CPU lacks {isa}"))
    for isa in ISAS
    if isa not in ("fp32", "plain")
]
MakeSmall = Callable[[Path, str], Small]


def open_engine(small: Small, isa: str, threads: int = 1) -> EncoderEngine:
    library = load_library(compile_artifact(small.artifact, host_target(isa)))
    return EncoderEngine(library, small.weights, threads=threads)


def texts_of(small: Small, lengths: list[int] = LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(len(lengths))
    return [rng.integers(0, small.artifact.encoder.vocab_size, n).tolist() for n in lengths]


def oracle(small: Small) -> EncoderReference:
    return EncoderReference(
        small.artifact.encoder, lambda name: tensor(small.artifact, small.weights, name)
    )


# ---- arithmetic ----


@pytest.mark.parametrize("preset", ["import", "hybrid", "q4"])
@pytest.mark.parametrize("name", NAMES)
def test_in_fp32_it_equals_the_oracle(make_small: MakeSmall, name: str, preset: str) -> None:
    small = make_small(ENCODERS / name, preset)
    texts, reference = texts_of(small), oracle(small)
    with open_engine(small, "fp32", 2) as engine:
        found = engine.embed(texts)
    for text, vector in zip(texts, found, strict=True):
        assert np.abs(reference.embed(np.array(text)) - vector).max() <= 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_in_int8_it_stays_near_the_oracle(make_small: MakeSmall, name: str) -> None:
    small = make_small(ENCODERS / name, "import")
    texts, reference = texts_of(small), oracle(small)
    with open_engine(small, "plain") as engine:
        found = engine.embed(texts)
    for text, vector in zip(texts, found, strict=True):
        assert reference.embed(np.array(text)) @ vector >= 0.995
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("preset", ["import", "q4"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("isa", VECTOR_ISAS)
def test_every_table_gives_the_same_bits(
    make_small: MakeSmall, isa: str, name: str, preset: str
) -> None:
    small = make_small(ENCODERS / name, preset)
    texts = texts_of(small)
    with open_engine(small, "plain") as plain, open_engine(small, isa, 2) as engine:
        assert np.array_equal(engine.embed(texts), plain.embed(texts))


def test_a_text_gives_the_same_bits_alone_and_beside_others(
    make_small: MakeSmall, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = make_small(ENCODERS / "bert", "import")
    texts = texts_of(small)
    with open_engine(small, "plain", 2) as engine, open_engine(small, "plain", 1) as alone:
        together = engine.embed(texts)
        each = np.concatenate([alone.embed([text]) for text in texts])
        monkeypatch.setattr(encoder_engine, "STEP_TOKENS", 64)
        narrow = engine.embed(texts)
        monkeypatch.setattr(encoder_engine, "MAX_TEXTS", 1)
        single = engine.embed(texts)
    for other in (each, narrow, single):
        assert np.array_equal(together, other)


def test_steps_hold_as_many_texts_as_fit() -> None:
    steps = encoder_engine._steps
    assert list(steps([])) == []
    assert list(steps([512, 1, 511, 2])) == [(0, 1), (1, 3), (3, 4)]
    assert list(steps([2] * 130)) == [(0, 64), (64, 128), (128, 130)]


def test_more_texts_than_a_step_holds(make_small: MakeSmall) -> None:
    small = make_small(ENCODERS / "bert", "import")
    texts = texts_of(small, [2] * 70 + [64] * 9)
    with open_engine(small, "plain") as engine:
        found = engine.embed(texts)
        assert np.array_equal(found[69:71], engine.embed(texts[69:71]))


# ---- what the library refuses ----


def step(engine: EncoderEngine, **changes: object) -> None:
    """Two texts of two tokens, with one thing changed."""
    arrays: dict[str, NDArray[np.int32]] = {
        "tokens": np.array([2, 3, 2, 3], np.int32),
        "positions": np.array([0, 1, 0, 1], np.int32),
        "sequences": np.array([0, 0, 1, 1], np.int32),
        "pages": np.array([[0, 0], [1, 1]], np.int32),
    }
    for name in list(arrays):
        if name in changes:
            arrays[name] = np.array(changes.pop(name), np.int32)
    out = np.empty((2, engine.d_model), np.float32)
    fields: dict[str, object] = {
        "n_tokens": 4,
        "n_sequences": 2,
        "page_stride": 2,
        "n_logits": 0,
        "hidden": out.ctypes.data,
        **{name: array.ctypes.data for name, array in arrays.items()},
        **changes,
    }
    engine.library.step(engine._handle, CBatch(**fields))


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": [1, 2, 0, 1]},  # not from the beginning
        {"positions": [0, 1, 0, 2]},
        {"sequences": [1, 1, 0, 0]},  # not in order
        {"sequences": [0, 0, 0, 0], "positions": [0, 1, 2, 3]},  # text 1 is missing
        {"sequences": [0, 1, 0, 1], "positions": [0, 0, 0, 0]},  # texts in pieces
        {"n_sequences": 1},
        {"hidden": None},
        {"n_tokens": 0},
        {"n_tokens": 513},
        {"tokens": [2, 3, 2, 10**6]},
        {"tokens": [-1, 3, 2, 3]},
        {"pages": [[0, 0], [10**6, 1]]},
    ],
)
def test_a_step_that_is_no_row_of_whole_texts_is_refused(
    make_small: MakeSmall, changes: dict[str, object]
) -> None:
    with open_engine(make_small(ENCODERS / "bert", "import"), "plain") as engine:
        step(engine)
        with pytest.raises(fl.EngineError, match="outside its range"):
            step(engine, **changes)


def test_ids_that_are_no_text_are_refused(make_small: MakeSmall) -> None:
    with open_engine(make_small(ENCODERS / "bert", "import"), "plain") as engine:
        with pytest.raises(fl.EngineError, match="no tokens"):
            engine.embed([[2, 3], []])
        with pytest.raises(fl.ContextOverflow, match="65 tokens, the context holds 64"):
            engine.embed([[2] * 65])
        assert engine.embed([]).shape == (0, 64)
    with pytest.raises(fl.EngineError, match="closed"):
        engine.embed([[2, 3]])


# ---- texts ----


@pytest.fixture(scope="module")
def encoder() -> Iterator[Encoder]:
    with load_encoder(ENCODERS / "bert", threads=2, isa="plain") as opened:
        yield opened


def test_texts_become_vectors(encoder: Encoder) -> None:
    texts = ["A man is eating.", "the cat runs", "", "A man is eating.", "\N{GRINNING FACE} and"]
    vectors = encoder.embed(texts)
    assert vectors.shape == (5, encoder.dimension)
    assert vectors.dtype == np.float32
    assert vectors[0] @ vectors[3] == pytest.approx(1, abs=1e-6)
    assert np.array_equal(vectors[0], vectors[3])
    for text, vector in zip(texts, vectors, strict=True):
        assert np.array_equal(encoder.embed([text])[0], vector)
    assert encoder.embed([]).shape == (0, encoder.dimension)


def test_a_text_stands_between_its_two_tokens(encoder: Encoder) -> None:
    cls, sep = (encoder.tokenizer.find(name) for name in ("[CLS]", "[SEP]"))
    found = encoder.tokenize(["", "the cat"])
    assert found.ids[0] == [cls, sep]
    assert found.ids[1][0] == cls
    assert found.ids[1][-1] == sep
    assert found.lengths == (2, 4)


def test_no_text_becomes_a_control_token(encoder: Encoder) -> None:
    plain = encoder.tokenize(["[CLS] a [SEP] [PAD][MASK]"]).ids[0][1:-1]
    assert set(plain).isdisjoint(encoder.artifact.tokens.control)


def test_composed_and_decomposed_letters_are_one(encoder: Encoder) -> None:
    composed = "a m\u00e1n is e\u00e1ting"
    both = [composed, unicodedata.normalize("NFD", composed)]
    vectors = encoder.embed(both)
    assert np.array_equal(vectors[0], vectors[1])


def test_long_texts_are_refused_or_cut_and_told(encoder: Encoder) -> None:
    long = "the cat runs " * 800
    with pytest.raises(fl.ContextOverflow, match=r"FL-405.*2402 tokens.*64; text 1 is too long"):
        encoder.embed(["a", long])
    with pytest.warns(UserWarning, match="1 of 2 texts were cut to 64 tokens, the longest from"):
        vectors = encoder.embed(["a", long], truncate=True)
    found = encoder.tokenize(["a", long], truncate=True)
    assert found.truncated == (1,)
    assert found.lengths[1] == 2402
    assert len(found.ids[1]) == 64
    assert found.ids[1][-1] == encoder.tokenizer.find("[SEP]")
    assert np.array_equal(vectors[1], encoder.embed(["the cat runs " * 20 + "the cat"])[0])


@pytest.mark.parametrize("texts", ["one text", ["a", 1], [None]])
def test_what_are_no_texts_is_refused(encoder: Encoder, texts: list[str]) -> None:
    with pytest.raises(fl.UsageError):
        encoder.embed(texts)


@pytest.mark.parametrize("threads", [1, 2])
def test_half_of_a_surrogate_pair_is_refused(threads: int) -> None:
    with load_encoder(ENCODERS / "bert", threads=threads, isa="plain") as opened:  # noqa: SIM117
        with pytest.raises(fl.TokenizerError, match="lone surrogate"):
            opened.embed(["a", "b\ud800"])


def test_a_ceiling_is_kept_or_refused(encoder: Encoder) -> None:
    texts = ["the cat", "a man, eating"]
    with pytest.raises(
        fl.MemoryCeiling, match=r"the encoder needs .* \(weights .*raise max_mem to"
    ):
        load_encoder(encoder.artifact.path, max_mem="10MB", isa="plain")
    with load_encoder(encoder.artifact.path, max_mem="2GB", isa="plain", threads=1) as opened:
        assert np.array_equal(opened.embed(texts), encoder.embed(texts))
        with pytest.raises(fl.MemoryCeiling, match="room to tokenize"):
            opened.embed(["cat " * 10_000], truncate=True)
        assert opened.memory["total"] == sum(opened.memory["terms"].values())


def test_closed_is_closed(encoder: Encoder) -> None:
    opened = load_encoder(encoder.artifact.path, isa="plain")
    opened.close()
    opened.close()
    with pytest.raises(fl.EngineError, match="closed"):
        opened.embed(["a"])


def test_neither_kind_is_taken_for_the_other(encoder: Encoder, small: Small) -> None:
    with pytest.raises(fl.UnsupportedModel, match="is an encoder"):
        fl.load(encoder.artifact.path, isa="plain")
    with pytest.raises(fl.UnsupportedModel, match="language model, not an encoder"):
        load_encoder(small.artifact.path, isa="plain")
