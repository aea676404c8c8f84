"""Sizes as people write them, and the plan that keeps within one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlite.errors import MemoryCeiling, UsageError
from flashlite.runtime.memory import Ledger, parse_size, plan_tokens

LEDGER = Ledger(
    weights=100_000, scratch=10_000, logits=1_000, runtime=9_000, kv_page=1_000, page_tokens=32
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


@given(st.integers(1, 400_000), st.integers(1, 8192) | st.none())
def test_the_plan_never_exceeds_the_ceiling(ceiling: int, wanted: int | None) -> None:
    try:
        tokens = plan_tokens(LEDGER, context=8192, wanted=wanted, ceiling=ceiling)
    except MemoryCeiling:
        assert LEDGER.total(64 if wanted is None else wanted) > ceiling
    else:
        assert LEDGER.total(tokens) <= ceiling
        assert wanted is None or tokens == wanted


def test_a_ceiling_that_is_too_low_names_every_term() -> None:
    with pytest.raises(MemoryCeiling) as caught:
        plan_tokens(LEDGER, context=8192, wanted=8192, ceiling=200_000)
    for term in ("376.0 kB", "weights 100.0 kB", "256.0 kB", "11.0 kB", "9.0 kB", "200.0 kB"):
        assert term in str(caught.value)


@pytest.mark.parametrize("wanted", [0, -5, 8193])
def test_a_length_outside_the_context_is_refused(wanted: int) -> None:
    with pytest.raises(UsageError, match=f"{wanted}, this model allows 1 to 8192"):
        plan_tokens(LEDGER, context=8192, wanted=wanted, ceiling=None)
