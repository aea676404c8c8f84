"""`within`: work that must keep within a memory ceiling, and one line where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flashlite.errors import MemoryCeiling
from flashlite.runtime.memory import format_size
from flashlite.runtime.process import limit_data

__all__ = ["within"]


@contextmanager
def within(ceiling: int | None, what: str, threads: int) -> Iterator[None]:
    """`limit_data`, and an error of ours where it strikes before `ceiling` has refused."""
    with limit_data(ceiling, threads):
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "new thread" not in str(error):
                raise
            limit = "what is free" if ceiling is None else f"max_mem, {format_size(ceiling)}"
            raise MemoryCeiling(
                f"the model cannot be {what} within {limit}; raise it, or quantize and compile "
                "the model beforehand"
            ) from None
