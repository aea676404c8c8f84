"""Sizes as people write them, and the plan that keeps within one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlite.errors import MemoryCeiling, UsageError
from flashlite.runtime.memory import Ledger, parse_size, plan_memory

MIB = 1 << 20


def ledger(sequences: int = 1, **reserved: int) -> Ledger:
    return Ledger(
        weights=100 * MIB,
        scratch=4 * MIB,
        logits=sequences * MIB,
        sampling=2 * MIB,
        runtime=50 * MIB,
        page_bytes=400_000,
        page_tokens=32,
        sequences=sequences,
        reserved=reserved,
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("2 GiB", 2**31),
        ("1.5MiB", 3 * 2**19),
        ("500mb", 500 * 10**6),
        ("64K", 64_000),
        ("4096", 4096),
        (4096, 4096),
    ],
)
def test_sizes_are_read_in_decimal_and_binary_units(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2XB", "0", "1e9", "2GB2", "nan", "²GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


@given(st.integers(MIB, 9000 * MIB), st.integers(1, 8192) | st.none(), st.integers(1, 20))
def test_the_plan_keeps_within_the_ceiling_and_uses_it(
    ceiling: int, wanted: int | None, sequences: int
) -> None:
    books = ledger(sequences, server=MIB)
    least = 64 if wanted is None else wanted
    try:
        plan = plan_memory(books, context=8192, wanted=wanted, ceiling=ceiling)
    except MemoryCeiling:
        assert books.total(least, least) > ceiling
        return
    assert plan.total <= ceiling
    assert plan.context <= plan.arena <= books.pages(plan.context) * 32 * sequences
    assert wanted is None or plan.context == wanted
    assert (plan.note is None) == (wanted is not None or plan.context == 8192)
    # One page more, or one position more, would not fit, or nobody would need it.
    if plan.arena < books.pages(plan.context) * 32 * sequences:
        assert books.total(plan.context, plan.arena + 32) > ceiling
    if wanted is None and plan.context < 8192:
        assert books.total(plan.context + 1, plan.context + 1) > ceiling


def test_a_ceiling_that_is_too_low_names_every_term_and_what_would_do() -> None:
    books = ledger(4, server=MIB)
    with pytest.raises(MemoryCeiling) as caught:
        plan_memory(books, context=8192, wanted=8192, ceiling=200 * MIB)
    said = str(caught.value)
    for name in books.terms(8192, 8192):
        assert f"{name} " in said
    for figure in ("weights 104.9 MB", "logits 4.2 MB", "server 1.0 MB", "max_mem is 209.7 MB"):
        assert figure in said
    enough = parse_size(said.partition("raise max_mem to ")[2].split()[0])
    assert plan_memory(books, context=8192, wanted=8192, ceiling=enough).context == 8192


def test_the_total_is_the_sum_of_the_terms() -> None:
    books = ledger(3, server=5)
    terms = books.terms(100, 200)
    assert books.total(100, 200) == sum(terms.values())
    assert terms["KV cache"] >= 7 * 400_000
    assert {"weights", "logits", "requests", "tokenizing", "server", "runtime"} <= set(terms)


@given(st.integers(0, 30_000 * MIB), st.integers(1, 20))
def test_without_a_ceiling_the_cache_takes_a_quarter_of_free_memory(
    free: int, sequences: int
) -> None:
    books = ledger(sequences)
    plan = plan_memory(books, context=8192, free=free)
    assert plan.context <= plan.arena <= 8192 * sequences
    assert plan.context == 64 or books.arena_bytes(plan.arena) <= free // 4
    if plan.context < 8192:
        assert plan.note is not None
        assert plan.note.startswith(f"context shortened to {plan.context} tokens: ")
    else:
        assert plan.note is None


def test_a_length_the_user_names_is_honoured_without_a_ceiling() -> None:
    plan = plan_memory(ledger(2), context=8192, wanted=4096, free=MIB)
    assert (plan.context, plan.arena, plan.note) == (4096, 4096, None)


def test_unknown_free_memory_is_taken_as_enough() -> None:
    plan = plan_memory(ledger(2), context=8192, free=None)
    assert (plan.context, plan.arena) == (8192, 2 * 8192)


@pytest.mark.parametrize("wanted", [0, -5, 8193])
def test_a_length_outside_the_context_is_refused(wanted: int) -> None:
    with pytest.raises(UsageError, match=f"{wanted}, this model allows 1 to 8192"):
        plan_memory(ledger(), context=8192, wanted=wanted)
