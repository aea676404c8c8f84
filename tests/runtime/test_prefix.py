"""Prompts that begin equally share pages, and nothing else changes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small import FAMILIES, Small, all_logits

from flashlite.errors import ContextOverflow, EngineError, MemoryCeiling
from flashlite.runtime.engine import Engine, Sequence, Work
from flashlite.runtime.kvpages import PagePool, PageTable, pages_for
from flashlite.runtime.library import PAGE_TOKENS
from flashlite.runtime.model import Model, load
from flashlite.runtime.prefixtree import PAGE_KEY
from flashlite.runtime.sampling import SamplingParams
from flashlite.runtime.scheduler import Generation

HERE = Path(__file__).parent.parent
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 96, 97)


def begin(engine: Engine, ids: NDArray[np.int32], room: int = 0) -> Sequence:
    sequence = engine.new_sequence(len(ids) + room, ids)
    sequence.share()
    return sequence


def fresh(engine: Engine, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """All logits of a text that shares nothing."""
    sequence = engine.new_sequence(len(ids))
    logits = all_logits(engine, sequence, ids)
    sequence.release()
    return logits


def finish(engine: Engine, sequence: Sequence, ids: NDArray[np.int32], chunk: int) -> object:
    """The logits of what is not stored yet; the pages go to the tree."""
    logits = all_logits(engine, sequence, ids[sequence.length :], chunk)
    sequence.share()
    sequence.release()
    return logits


def assert_all_given_back(pool: PagePool) -> None:
    pool.check_integrity()
    assert pool.free == pool.n_pages
    assert all(node.users == 0 for node in pool.tree.nodes())


# Bits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_after_a_shared_prefix_are_those_without_it(
    make_small: Callable[[Path, str], Small], family: str
) -> None:
    small = make_small(HERE / "fixtures/families" / family, "import")
    n = min(120, small.artifact.spec.max_context)
    trunk, other = small.ids(n), small.ids(n, 7)
    with small.open("plain") as engine:
        for length in (n, *LENGTHS, n):
            ids = np.concatenate([trunk[:length], other])[:n]
            expected = fresh(engine, ids)
            sequence = begin(engine, ids)
            cached = sequence.length
            assert cached == min(length, n - 1) // PAGE_TOKENS * PAGE_TOKENS or not cached
            got = finish(engine, sequence, ids, 33)
            np.testing.assert_array_equal(got, expected[cached:], str(length))
        assert cached == (n - 1) // PAGE_TOKENS * PAGE_TOKENS
        assert_all_given_back(engine.pool)


@pytest.mark.parametrize("length", LENGTHS)
def test_only_whole_pages_are_shared_and_the_last_token_is_computed(
    small: Small, length: int
) -> None:
    ids = small.ids(length)
    with small.open("plain") as engine:
        finish(engine, begin(engine, ids), ids, 256)
        sequence = begin(engine, ids)
        assert sequence.length == (length - 1) // PAGE_TOKENS * PAGE_TOKENS
        longer = begin(engine, np.concatenate([ids, small.ids(40, 3)]))
        assert longer.length == length // PAGE_TOKENS * PAGE_TOKENS


def test_a_page_belongs_to_everything_before_it(small: Small) -> None:
    """The same 32 tokens after another beginning are another page."""
    a, b, same = small.ids(32, 1), small.ids(32, 2), small.ids(33, 3)
    with small.open("plain") as engine:
        finish(engine, begin(engine, np.concatenate([a, same])), np.concatenate([a, same]), 256)
        other = np.concatenate([b, same])
        expected = fresh(engine, other)
        sequence = begin(engine, other)
        assert sequence.length == 0
        np.testing.assert_array_equal(finish(engine, sequence, other, 256), expected)


def test_running_prompts_share_what_they_store(small: Small) -> None:
    """The second takes up the first one's pages while both run, and gives back its own."""
    ids = small.ids(100)
    with small.open("plain", max_sequences=2, max_tokens=256) as engine:
        expected = fresh(engine, ids)[-1]
        one, two = begin(engine, ids), begin(engine, ids)
        assert engine.pool.free == 0
        engine.step([Work(one, ids[:64], "none")])
        assert (one.share(), two.share()) == (0, 64)
        assert engine.pool.free == 2
        logits = engine.step([Work(one, ids[64:]), Work(two, ids[64:])])
        np.testing.assert_array_equal(logits[0], expected)
        np.testing.assert_array_equal(logits[1], expected)
        one.share()
        two.share()  # both computed page 2: one of them is kept
        assert engine.pool.free == 3
        one.release()
        two.release()
        assert_all_given_back(engine.pool)


def test_a_sequence_without_its_prompt_shares_nothing(small: Small) -> None:
    ids = small.ids(64)
    with small.open("plain") as engine:
        sequence = engine.new_sequence(64)
        all_logits(engine, sequence, ids)
        assert sequence.share() == 0
        sequence.release()
        assert list(engine.pool.tree.nodes()) == []


def test_going_back_never_reaches_a_shared_page(small: Small) -> None:
    ids = small.ids(70)
    with small.open("plain") as engine:
        sequence = begin(engine, ids)
        engine.step([Work(sequence, ids[:68], "none")])
        sequence.truncate(66)
        sequence.share()
        sequence.truncate(64)
        with pytest.raises(EngineError, match="64 tokens cannot go back to 63"):
            sequence.truncate(63)
        with pytest.raises(EngineError, match="cannot go back to 65"):
            sequence.truncate(65)


def test_a_prompt_beyond_what_was_asked_for_is_fl_405(small: Small) -> None:
    with small.open("plain") as engine, pytest.raises(ContextOverflow):
        engine.new_sequence(10, small.ids(11))


# Pages of the arena


def test_a_page_is_read_and_written_whole_or_not_at_all(small: Small) -> None:
    with small.open("plain", max_tokens=64) as engine:
        page = np.random.default_rng(0).integers(0, 256, engine.page_bytes).astype(np.uint8)
        out = np.zeros_like(page)
        engine.write_page(1, page)
        engine.read_page(1, out)
        np.testing.assert_array_equal(page, out)
        engine.read_page(0, out)
        assert not np.array_equal(page, out)
        for number in (2, 2**31, 2**32 - 1):
            with pytest.raises(EngineError, match="outside its range"):
                engine.read_page(number, out)
            with pytest.raises(EngineError, match="outside its range"):
                engine.write_page(number, page)
        for wrong in (out[:-1], np.zeros(len(out) + 1, np.uint8), out[:0]):
            with pytest.raises(EngineError, match="outside its range"):
                engine.read_page(0, wrong)
            with pytest.raises(EngineError, match="outside its range"):
                engine.write_page(0, wrong)
    with pytest.raises(EngineError, match="closed"):
        engine.read_page(0, out)


# The pool


def key(*tokens: int) -> bytes:
    """A text of pages that hold one token each, over and over."""
    return b"".join(np.full(PAGE_TOKENS, token, np.int32).tobytes() for token in tokens)


def store_text(pool: PagePool, *tokens: int) -> None:
    table = PageTable(pool, len(tokens) * PAGE_TOKENS)
    table.reserve(table.max_tokens, key(*tokens))
    text = key(*tokens)
    while table.shared < len(tokens):
        table.publish(text[table.shared * PAGE_KEY :][:PAGE_KEY], prompt=True)
    table.release()


def test_the_longest_idle_leaf_makes_room() -> None:
    pool = PagePool(4)
    store_text(pool, 1, 2)
    store_text(pool, 1, 3)
    store_text(pool, 9)
    store_text(pool, 1, 2)  # used again
    table = PageTable(pool, PAGE_TOKENS)
    table.reserve(PAGE_TOKENS)
    assert len(pool.tree.find(key(1, 2))) == 2
    assert len(pool.tree.find(key(1, 3))) == 1
    assert len(pool.tree.find(key(9))) == 1
    PageTable(pool, 3 * PAGE_TOKENS).reserve(3 * PAGE_TOKENS)
    assert list(pool.tree.nodes()) == []


def test_pages_that_a_prompt_needs_are_not_counted_as_room() -> None:
    """Of two idle pages one is the prompt's own beginning: one page is free, not two."""
    pool = PagePool(2)
    store_text(pool, 1, 2)
    table = PageTable(pool, 3 * PAGE_TOKENS)
    with pytest.raises(MemoryCeiling, match="2 more KV pages are needed and 1 of 2 are free"):
        table.reserve(3 * PAGE_TOKENS, key(1))
    assert pool.free == 2
    table.reserve(2 * PAGE_TOKENS, key(1))
    assert len(set(table.ids[:2].tolist())) == 2
    table.release()
    assert_all_given_back(pool)


def test_pages_without_users_are_never_forgotten_and_users_never_lose_one() -> None:
    pool = PagePool(3)
    store_text(pool, 1, 2, 3)
    nodes = pool.tree.find(key(1, 2, 3))
    table = PageTable(pool, 64)
    table.reserve(64, key(1, 2))
    with pytest.raises(MemoryCeiling):
        PageTable(pool, 64).reserve(64)
    PageTable(pool, 32).reserve(32)  # takes page 3, the only idle one
    assert pool.tree.find(key(1, 2, 3)) == nodes[:2]
    table.release()
    with pytest.raises(EngineError, match="twice"):
        pool.tree.leave(nodes[:1])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 130), st.booleans()), max_size=60))
@settings(deadline=None, max_examples=60)
def test_no_page_is_lost_or_given_twice(moves: list[tuple[int, int, bool]]) -> None:
    """Texts over an alphabet of two pages, begun, stored in part, and left, in any order."""
    pool, running = PagePool(7), list[tuple[PageTable, bytes]]()
    for kind, length, flag in moves:
        text = b"".join(key(1 + (length >> i & 1)) for i in range(pages_for(length)))
        if kind <= 1:
            table = PageTable(pool, length)
            try:
                table.reserve(length, text[: (length - 1) // PAGE_TOKENS * PAGE_KEY])
                running.append((table, text))
            except MemoryCeiling:
                pass
        elif running and kind == 2:
            table, text = running[length % len(running)]
            page = text[table.shared * PAGE_KEY :][:PAGE_KEY]
            if (table.shared + 1) * PAGE_TOKENS <= table.max_tokens and not table.adopt(page):
                table.publish(page, prompt=flag)
        elif running:
            running.pop(length % len(running))[0].release()
        pool.check_integrity()
        held = [set(table.ids[table.ids >= 0].tolist()) for table, _ in running]
        assert len(set().union(*held)) + pool.free == 7
        for table, text in running:  # what a sequence reads is what the tree says
            path = pool.tree.find(text[: table.shared * PAGE_KEY])
            assert [node.page for node in path] == table.ids[: table.shared].tolist()
    for table, _ in running:
        table.release()
    assert_all_given_back(pool)


# Requests


def tiny(tiny_gguf: Path, **given: object) -> Model:
    fixed = {"threads": 2, "isa": "plain", "speculate": False}
    return load(tiny_gguf, **fixed | given)  # type: ignore[arg-type]


def drawn(model: Model, generation: Generation) -> list[object]:
    return [piece.drawn for piece in model.follow(generation)]


def texts(vocab: int, seed: int) -> Iterator[list[int]]:
    """Prompts of awkward lengths that begin with each other."""
    rng = random.Random(seed)
    trunk = [rng.randrange(1, vocab) for _ in range(100)]
    while True:
        own = [rng.randrange(1, vocab) for _ in range(rng.choice((1, 31, 32, 33)))]
        yield (trunk[: rng.choice(LENGTHS)] + own)[: rng.choice((20, 64, 65, 100))]


@pytest.mark.usefixtures("own_prefixes")
@pytest.mark.parametrize("seed", range(4))
def test_answers_are_the_same_with_and_without_the_cache(tiny_gguf: Path, seed: int) -> None:
    """Random schedules in a tiny arena: evictions, cancellations, prompts that share."""
    rng = random.Random(seed)
    settings = {"max_sequence_length": 128, "max_sequences": 3}
    with (
        tiny(tiny_gguf, prefix_cache=False, **settings) as plain,
        tiny(tiny_gguf, **settings) as cached,
    ):
        prompts = texts(plain.artifact.spec.vocab_size, seed)
        jobs: list[tuple[Generation, list[int], SamplingParams, list[object]]] = []
        scheduler, pool = cached.scheduler, cached.scheduler.engine.pool
        done = reused = 0
        while done < 40:
            if len(jobs) < 5 and rng.random() < 0.4:
                prompt = next(prompts)
                params = SamplingParams(
                    temperature=rng.choice((0.0, 1.0)), seed=done, logprobs=3,
                    max_tokens=rng.choice((1, 5, 28)),
                )  # fmt: skip
                jobs.append((scheduler.submit(prompt, params), prompt, params, []))
            scheduler.step()
            pool.check_integrity()
            for job in list(jobs):
                generation, prompt, params, seen = job
                while generation.pieces:
                    seen.append(generation.pieces.popleft().drawn)
                if generation.finish_reason is None:
                    if rng.random() < 0.02:
                        scheduler.cancel(generation)
                    continue
                jobs.remove(job)
                done += 1
                reused += generation.cached_tokens
                assert generation.cached_tokens % PAGE_TOKENS == 0
                assert generation.cached_tokens < len(prompt)
                if generation.finish_reason != "cancelled":
                    assert seen == drawn(plain, plain.submit(prompt, params))
        for generation, *_ in jobs:
            scheduler.cancel(generation)
        assert reused > 500
        assert_all_given_back(pool)


@pytest.mark.usefixtures("own_prefixes")
def test_an_answer_is_part_of_the_next_questions_prefix(tiny_gguf: Path) -> None:
    with tiny(tiny_gguf) as model:
        prompt = list(range(1, 31))
        params = SamplingParams(max_tokens=40, logit_bias=dict.fromkeys(range(3), -100.0))
        first = model.submit(prompt, params)
        drawn(model, first)
        again = model.submit([*prompt, *first.generated, 5], params)
        drawn(model, again)
        # The last token drawn was never stored.
        assert again.cached_tokens == (len(prompt) + len(first.generated) - 1) // 32 * 32 >= 32


@pytest.mark.usefixtures("own_prefixes")
def test_a_cancelled_prompt_leaves_only_pages_that_are_full(tiny_gguf: Path) -> None:
    with tiny(tiny_gguf, max_sequence_length=512) as model:
        prompt = [1 + i % 90 for i in range(400)]
        generation = model.submit(prompt, SamplingParams(max_tokens=4))
        model.scheduler.step()  # 256 of 400 tokens
        model.scheduler.cancel(generation)
        assert len(list(model.scheduler.engine.pool.tree.nodes())) == 8
        assert_all_given_back(model.scheduler.engine.pool)
        waiting = model.submit(prompt, SamplingParams(max_tokens=4))
        model.scheduler.cancel(waiting)
        again = model.submit(prompt, SamplingParams(max_tokens=4))
        drawn(model, again)
        assert (waiting.cached_tokens, again.cached_tokens) == (0, 256)


@pytest.mark.usefixtures("own_prefixes")
def test_a_step_that_fails_leaves_nothing_to_share(tiny_gguf: Path) -> None:
    with tiny(tiny_gguf) as model:
        prompt = [1] * 64 + [10**6]
        generation = model.submit(prompt, SamplingParams(max_tokens=4))
        with pytest.raises(EngineError, match="outside its range"):
            model.scheduler.step()
        model.scheduler.cancel(generation)
        assert list(model.scheduler.engine.pool.tree.nodes()) == []
        assert_all_given_back(model.scheduler.engine.pool)


@pytest.mark.usefixtures("own_prefixes")
def test_without_the_cache_nothing_is_kept(tiny_gguf: Path) -> None:
    with tiny(tiny_gguf, prefix_cache=False) as model:
        for _ in range(2):
            generation = model.submit([1] * 65, SamplingParams(max_tokens=4))
            drawn(model, generation)
            assert generation.cached_tokens == 0
        assert list(model.scheduler.engine.pool.tree.nodes()) == []


# What is worth keeping


def test_beginnings_of_several_prompts_and_the_last_single_ones_are_kept() -> None:
    pool = PagePool(40)
    for tail in range(10, 14):
        store_text(pool, 1, 2, tail)
    store_text(pool, 7)  # too short
    store_text(pool, 8, 9)
    kept = pool.tree.frequent(64, once=2)
    assert [prefix.ids for prefix in kept] == [key(8, 9), key(1, 2)]
    assert [prefix.ids for prefix in pool.tree.frequent(64, once=3)] == [key(8, 9), key(1, 2, 13)]
    assert kept[1].pages == [node.page for node in pool.tree.find(key(1, 2))]


def test_what_was_only_generated_is_not_kept() -> None:
    pool = PagePool(4)
    table = PageTable(pool, 96)
    table.reserve(96)
    for token in (1, 2, 3):
        table.publish(key(token), prompt=token < 3)
    table.release()
    assert [prefix.ids for prefix in pool.tree.frequent(32, once=4)] == [key(1, 2)]
