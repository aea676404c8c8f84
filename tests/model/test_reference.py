"""The NumPy reference against transformers, against itself, and on a real model."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashlite.checkpoint.convert_tokenizer import build_tokenizer
from flashlite.checkpoint.open import open_checkpoint
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.errors import ContextOverflow, UsageError
from flashlite.model.families import describe
from flashlite.model.metrics import perplexity
from flashlite.model.reference import Reference, _attend, streamed_past
from flashlite.model.source import SourceModel


def in_memory(source: SourceModel) -> dict[str, NDArray[np.float32]]:
    return {name: source.tensor(name) for name, _ in source.spec.shapes()}


def test_logits_equal_those_of_transformers(case: Any) -> None:
    assert np.abs(case.logits).max() > 3  # so that the tolerance means something
    found = Reference(case.source.spec, case.source.tensor).logits(case.ids)
    np.testing.assert_allclose(found, case.logits, rtol=0, atol=1e-4)


def test_fixtures_cover_what_families_differ_in(cases: Mapping[str, Any]) -> None:
    specs = {name: case.source.spec for name, case in cases.items()}
    assert not specs["llama"].tied_head
    assert specs["llama-scaled"].tied_head
    assert specs["llama-scaled"].rope_llama3 is not None
    assert specs["llama-scaled"].q_rows != specs["llama-scaled"].d_model
    assert set(specs["gemma3"].sliding_layers) == {True, False}
    assert specs["gemma3"].sliding_window < len(cases["gemma3"].ids)
    assert specs["qwen2"].qkv_bias
    assert set(specs["qwen2"].sliding_layers) == {True, False}
    assert specs["qwen3"].qk_norm
    assert all(len(list(c.folder.glob("*.safetensors"))) > 1 for c in cases.values())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"rope_theta": 10100.0}),
        ("llama", {"norm_eps": 1e-3}),
        ("llama", {"activation": "gelu_tanh"}),
        ("llama", {"attn_scale": 0.36}),
        ("llama-scaled", {"rope_llama3": None}),
        ("llama-scaled", {"qkv_bias": False}),
        ("gemma3", {"rope_linear": 1.0}),
        ("gemma3", {"rope_theta_local": None}),
        ("gemma3", {"attn_scale": None}),
        ("gemma3", {"embed_scale": 1.0}),
        ("gemma3", {"activation": "silu"}),
        ("gemma3", {"post_norms": False}),
        ("gemma3", {"qk_norm": False}),
        ("gemma3", {"sliding_window": 11}),
        ("gemma3", {"sliding_window": 9}),
        ("gemma3", {"sliding_layers": (True, True, True, False)}),
        ("qwen2", {"qkv_bias": False}),
        ("qwen2", {"sliding_layers": ()}),
        ("qwen3", {"qk_norm": False}),
    ],
)
def test_logits_notice_a_wrong_spec(
    cases: Mapping[str, Any], name: str, change: dict[str, Any]
) -> None:
    case = cases[name]
    wrong = Reference(replace(case.source.spec, **change), case.source.tensor).logits(case.ids)
    assert np.abs(wrong - case.logits).max() > 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [100, pytest.param(101, marks=pytest.mark.accept)])
def test_logits_equal_those_of_transformers_live(tmp_path: Path, seed: int) -> None:
    pytest.importorskip("torch", reason="torch is not installed: stored logits are compared only")
    pytest.importorskip("transformers", reason="transformers is not installed")
    fixtures = _fixture_script()
    for name, (model, stored) in fixtures.cases().items():
        fixtures.randomize(model, stored, seed)
        ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, 60)
        expected = fixtures.logits(model, ids)
        model.to(stored).save_pretrained(tmp_path / name, max_shard_size=fixtures.SHARD)
        source = describe(open_checkpoint(tmp_path / name))
        found = Reference(source.spec, source.tensor).logits(ids)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=name)


def test_a_prefix_does_not_see_what_follows(case: Any) -> None:
    reference = Reference(case.source.spec, in_memory(case.source))
    whole, prefix = reference.logits(case.ids), reference.logits(case.ids[:20])
    np.testing.assert_allclose(whole[:20], prefix, rtol=0, atol=1e-4)


def test_blocks_of_queries_change_nothing(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Reference(case.source.spec, in_memory(case.source))
    whole = reference.logits(case.ids)
    monkeypatch.setattr("flashlite.model.reference._QUERY_ROWS", 7)
    np.testing.assert_allclose(reference.logits(case.ids), whole, rtol=0, atol=1e-4)


def test_rows_limit_the_head(cases: Mapping[str, Any]) -> None:
    case = cases["llama"]
    reference = Reference(case.source.spec, case.source.tensor)
    last = reference.logits(case.ids, slice(-3, None))
    assert last.shape == (3, case.source.spec.vocab_size)
    np.testing.assert_allclose(last, case.logits[-3:], rtol=0, atol=1e-4)
    assert reference.hidden(case.ids).shape == (len(case.ids), case.source.spec.d_model)


def test_large_values_stay_finite(cases: Mapping[str, Any]) -> None:
    for name in ("llama", "gemma3"):
        case = cases[name]
        huge = {n: w * np.float32(300) for n, w in in_memory(case.source).items()}
        assert np.isfinite(Reference(case.source.spec, huge).logits(case.ids)).all()


@pytest.mark.parametrize(
    "ids",
    [np.zeros(0, dtype=int), np.array([[1]]), np.array([1.0]), np.array([-1]), np.array([80])],
)
def test_bad_ids_are_refused(cases: Mapping[str, Any], ids: Any) -> None:
    source = cases["llama"].source
    with pytest.raises(UsageError, match="id"):
        Reference(source.spec, source.tensor).logits(ids)


def test_more_ids_than_positions_are_refused(cases: Mapping[str, Any]) -> None:
    source = cases["llama"].source
    with pytest.raises(ContextOverflow, match=r"65 tokens.* 64"):
        Reference(source.spec, source.tensor).logits(np.zeros(65, dtype=int))


def test_smollm2_knows_a_capital(smollm2_gguf: Path) -> None:
    source = describe(open_checkpoint(smollm2_gguf))
    ids = np.array([504, 3575, 282, 4649, 314])  # "The capital of France is"
    logits = Reference(source.spec, source.tensor).logits(ids, slice(-1, None))
    assert int(logits.argmax()) == 7042  # " Paris"


def test_smollm2_perplexity_is_that_of_llama_cpp(smollm2_gguf: Path, flashlite_data: Path) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    text = (flashlite_data / "wikitext-2" / "valid.txt").read_text(encoding="utf-8")[:4000]
    ids = np.array(Tokenizer(build_tokenizer(checkpoint)).encode(text)[:512])
    source = describe(checkpoint)
    logits = Reference(source.spec, source.tensor).logits(ids)
    # llama-cpp-python 0.3.36 on the same weights unpacked to F32, with KV in F32: 15.65963.
    assert perplexity(logits[:-1], ids[1:]) == pytest.approx(15.6596, abs=2e-3)


def test_stories260k_tells_its_story(stories260k: Path) -> None:
    source = describe(open_checkpoint(stories260k))
    reference = Reference(source.spec, in_memory(source))
    ids = [1]
    while len(ids) < 24:
        ids.append(int(reference.logits(np.array(ids), slice(-1, None)).argmax()))
    vocabulary: Any = source.checkpoint.metadata["tokenizer.ggml.tokens"]
    text = "".join(vocabulary[i] for i in ids[1:]).replace("\u2581", " ")
    assert text.startswith(
        " Once upon a time, there was a little girl named Lily. She loved to play"
    )


def _fixture_script() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "fixtures" / "make_family_fixtures.py"
    spec = importlib.util.spec_from_file_location("make_family_fixtures", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_layers_one_by_one_are_the_whole(case: Any) -> None:
    weights = in_memory(case.source)
    seen: dict[str, tuple[int, ...]] = {}
    spec = case.source.spec
    reference = Reference(spec, weights, lambda name, x: seen.update({name: x.shape}))
    x = reference.embed(case.ids)
    for i in range(spec.n_layers):
        x = reference.layer(i, x)
    found = reference.head(reference.final_norm(x))
    np.testing.assert_array_equal(found, Reference(spec, weights).logits(case.ids))
    matrices = {n: s for n, s in spec.shapes() if len(s) == 2 and n.startswith("layers.")}
    assert seen == {name: (len(case.ids), shape[1]) for name, shape in matrices.items()}


@pytest.mark.parametrize("window", [None, 1, 60, 128, 200])
@pytest.mark.parametrize("streams", [False, True])
def test_attention_in_blocks_is_that_of_all_queries_at_once(
    window: int | None, streams: bool
) -> None:
    if streams and window is not None:
        return  # a layer does one of the two
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((420, 8), dtype=np.float32) for _ in range(3))
    scores = (q @ k.T) * np.float32(0.3)
    age = np.arange(420)[:, None] - np.arange(420)
    hidden = (age < 0) | (age >= (window or 420))
    if streams:
        hidden |= streamed_past(0, 420)
    scores[hidden] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected = (weights @ v) / weights.sum(axis=1, keepdims=True)
    found = _attend(q, k, v, 0.3, window, streams)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
