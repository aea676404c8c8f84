"""The page pool and page tables."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashlite.errors import EngineError, MemoryCeiling
from flashlite.runtime.kvpages import PagePool, PageTable, pages_for


@given(st.lists(st.integers(1, 200), max_size=30), st.randoms())
@settings(deadline=None)
def test_pages_are_never_shared_and_never_lost(lengths: list[int], random: object) -> None:
    pool = PagePool(20)
    held: list[PageTable] = []
    for length in lengths:
        table = PageTable(pool, length)
        try:
            table.reserve(length)
        except MemoryCeiling:
            assert pages_for(length) > pool.free
            if held:
                held.pop(random.randrange(len(held))).release()  # type: ignore[attr-defined]
            continue
        held.append(table)
        ids = [int(i) for t in held for i in t.ids if i >= 0]
        assert len(ids) == len(set(ids))
        assert len(ids) + pool.free == 20
    for table in held:
        table.release()
    pool.check_integrity()
    assert pool.free == 20


def test_a_reservation_that_fails_takes_nothing() -> None:
    pool = PagePool(2)
    table = PageTable(pool, 200)
    with pytest.raises(MemoryCeiling, match="7 more KV pages.*2 of 2"):
        table.reserve(200)
    assert pool.free == 2


def test_a_page_given_back_twice_is_found() -> None:
    pool = PagePool(2)
    page = pool.take()
    pool.give_back([page])
    pool.give_back([page])
    with pytest.raises(EngineError, match="twice"):
        pool.check_integrity()
