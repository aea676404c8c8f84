"""Heads taken out: what is left of the source, and what compensation gives back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashlite.checkpoint.open import open_checkpoint
from flashlite.compress.heads import (
    HeadStatistics,
    StreamWatch,
    choose_removed,
    choose_streams,
    largest_prefix,
    rank_heads,
    stream_heads,
    trim_heads,
)
from flashlite.errors import CompressError
from flashlite.model.families import describe
from flashlite.model.metrics import kl_divergence
from flashlite.model.reference import Reference
from flashlite.model.source import SourceModel
from flashlite.model.spec import ModelSpec

FIXTURES = Path(__file__).parent.parent / "fixtures/families"


@pytest.fixture(scope="module")
def source() -> SourceModel:
    return describe(open_checkpoint(FIXTURES / "llama"))


@pytest.fixture(scope="module")
def texts(source: SourceModel) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, source.spec.vocab_size, 60) for _ in range(4)]


@pytest.fixture(scope="module")
def statistics(source: SourceModel, texts: list[np.ndarray]) -> HeadStatistics:
    return HeadStatistics.collect(source, texts)


def loss(source: SourceModel, other: SourceModel, texts: list[np.ndarray]) -> float:
    pairs = ((Reference(m.spec, m.tensor).logits(ids) for m in (source, other)) for ids in texts)
    return float(np.mean([kl_divergence(a, b).mean() for a, b in pairs]))


def test_without_a_removal_the_source_is_the_same_object(
    source: SourceModel, statistics: HeadStatistics
) -> None:
    assert trim_heads(source, statistics, []) is source


def test_shapes_follow_the_heads(source: SourceModel, statistics: HeadStatistics) -> None:
    spec = source.spec
    group = spec.n_heads // spec.n_kv_heads
    gone = [(0, h) for h in range(group)] + [(1, spec.n_heads - 1)]  # a whole KV head, and one
    trimmed = trim_heads(source, statistics, gone)
    assert trimmed.spec.heads_of(0) == (group,) * (spec.n_kv_heads - 1)
    assert sum(trimmed.spec.heads_of(1)) == spec.n_heads - 1
    for name, shape in trimmed.spec.shapes():
        assert trimmed.tensor(name).shape == shape, name
        assert trimmed.info(name).shape == shape, name
        if len(shape) == 2:
            dtype, raw = trimmed.blocks(name)
            assert (dtype, len(raw)) == (trimmed.info(name).dtype, shape[0])
    q = source.tensor("layers.0.q")
    np.testing.assert_array_equal(trimmed.tensor("layers.0.q"), q[group * spec.head_dim :])
    assert ModelSpec.from_json(trimmed.spec.to_json()) == trimmed.spec


def test_compensation_gives_back_what_others_can_stand_in_for(
    source: SourceModel, statistics: HeadStatistics, texts: list[np.ndarray]
) -> None:
    """Against the same removal with o cut and nothing refitted."""
    head = rank_heads(source, statistics)[0][1]
    trimmed = trim_heads(source, statistics, [head])
    layer, kept = f"layers.{head[0]}.", np.ones(source.spec.q_rows, bool)
    dim = source.spec.head_dim
    kept[head[1] * dim : (head[1] + 1) * dim] = False

    def cut(name: str) -> np.ndarray:
        if name == layer + "o":
            whole: np.ndarray = source.tensor(name)
            return whole[:, kept]
        values: np.ndarray = trimmed.tensor(name)
        return np.zeros_like(values) if name.endswith("o_bias") else values

    bare = np.mean(
        [
            kl_divergence(
                Reference(source.spec, source.tensor).logits(ids),
                Reference(trimmed.spec, cut).logits(ids),
            ).mean()
            for ids in texts
        ]
    )
    assert loss(source, trimmed, texts) < 0.7 * bare


def test_a_head_that_says_nothing_goes_without_loss(
    source: SourceModel, texts: list[np.ndarray]
) -> None:
    spec, dim = source.spec, source.spec.head_dim

    class Flat(SourceModel):
        def tensor(self, canonical: str) -> np.ndarray:
            values = super().tensor(canonical)
            if canonical == "layers.1.v":  # of KV head 0: its values say nothing
                values = values.copy()
                values[:dim] = 0
            return values

    flat = Flat(spec, source.checkpoint, source.sources)
    statistics = HeadStatistics.collect(flat, texts)
    group = spec.n_heads // spec.n_kv_heads
    error, head = rank_heads(flat, statistics)[0]
    assert head[0] == 1
    assert head[1] < group
    assert error < 1e-9
    trimmed = trim_heads(flat, statistics, [(1, h) for h in range(group)])
    assert loss(flat, trimmed, texts) < 1e-9


def test_choices_stay_within_their_limit(
    source: SourceModel, statistics: HeadStatistics, texts: list[np.ndarray]
) -> None:
    def measure(other: SourceModel) -> float:
        return loss(source, other, texts[:2])

    loose = choose_removed(source, statistics, 0.05, measure, share=0.5)
    assert loose.heads
    assert loose.kl <= 0.05
    assert measure(trim_heads(source, statistics, loose.heads)) == loose.kl
    none = choose_removed(source, statistics, 0.0, measure, share=0.5)
    assert not none.heads
    assert none.ranked  # the table is the result


def test_streams_are_taken_in_the_order_of_what_they_change() -> None:
    spec = describe(open_checkpoint(FIXTURES / "llama")).spec
    group = spec.n_heads // spec.n_kv_heads
    changed = {
        (i, h): 0.01 * (i * spec.n_kv_heads + h // group)
        for i in range(spec.n_layers)
        for h in range(spec.n_heads)
    }
    chosen = choose_streams(
        spec, changed, 0.25, lambda other: 0.1 * sum(sum(row) for row in other.streams)
    )
    assert list(chosen.heads) == [(0, 0), (0, 1)]
    assert chosen.kl == pytest.approx(0.2)


def test_what_a_stream_changes_is_seen_where_there_is_a_far_past(source: SourceModel) -> None:
    spec = replace(source.spec, max_context=600)
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, 600)
    watch, plain = StreamWatch(spec, source.tensor), Reference(spec, source.tensor)
    np.testing.assert_array_equal(watch.hidden(ids), plain.hidden(ids))
    assert set(watch.changed) == {(i, h) for i in range(2) for h in range(spec.n_heads)}
    assert all(0 < change < 1 for change in watch.changed.values())
    near = StreamWatch(spec, source.tensor)
    near.hidden(ids[:280])
    assert all(change == 0 for change in near.changed.values())


@pytest.mark.parametrize("longest", range(6))
def test_bisection_finds_the_longest_prefix(longest: int) -> None:
    asked: list[int] = []

    def lost(n: int) -> float:
        asked.append(n)
        return float(n)

    assert largest_prefix(5, longest, lost) == (longest, float(longest))
    assert len(asked) <= 3


def test_heads_that_cannot_go_are_refused(source: SourceModel, statistics: HeadStatistics) -> None:
    spec = source.spec
    with pytest.raises(CompressError, match=r"head 99 of layer 0 does not exist"):
        trim_heads(source, statistics, [(0, 99)])
    with pytest.raises(CompressError, match=r"layer 1 would have no head left"):
        trim_heads(source, statistics, [(1, h) for h in range(spec.n_heads)])
    with pytest.raises(CompressError, match=r"KV head 9 of layer 0 does not exist"):
        stream_heads(spec, [(0, 9)])
    sliding = describe(open_checkpoint(FIXTURES / "gemma3")).spec
    layer = sliding.sliding_layers.index(True)
    with pytest.raises(CompressError, match=rf"layer {layer} slides"):
        stream_heads(sliding, [(layer, 0)])
