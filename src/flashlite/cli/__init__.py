"""The command line: one file per verb, each with one `command`."""

from __future__ import annotations

__all__: list[str] = []
