"""Messages and help in the user's language: English, or Spanish where the locale says so.

`es.json` maps English to Spanish. `{}` in a key stands for any text, and `{0}`, `{1}` in the
Spanish for what the first, the second stood for. What the file lacks stays English.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import click

__all__ = ["HelpFormatter", "spanish", "translate"]

_CODE = re.compile(r"(FL-\d+: |)(.*)", re.DOTALL)


def spanish() -> bool:
    """Whether the environment asks for Spanish; the first variable that is set decides."""
    for variable in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if value := os.environ.get(variable):
            return value.lower().startswith("es")
    return False


def translate(text: str) -> str:
    """`text` in the user's language, or as it is; an error code in front stays."""
    if not text or not spanish():
        return text
    code, rest = _CODE.fullmatch(text).groups()  # type: ignore[union-attr]
    return code + _look_up(rest)


class HelpFormatter(click.HelpFormatter):
    """Writes help in the user's language."""

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """Write the line of usage."""
        super().write_usage(prog, args, translate(prefix or "Usage: "))

    def write_heading(self, heading: str) -> None:
        """Write the heading of a section."""
        super().write_heading(translate(heading))

    def write_text(self, text: str) -> None:
        """Write paragraphs; one that begins with a \\b keeps its lines."""
        paragraphs = [
            part.replace("Examples:", translate("Examples:"))
            if part.startswith("\b")
            else translate(" ".join(part.split()))
            for part in text.split("\n\n")
        ]
        super().write_text("\n\n".join(paragraphs))

    def write_dl(
        self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2
    ) -> None:
        """Write names beside what they mean."""
        super().write_dl([(name, _option(text)) for name, text in rows], col_max, col_spacing)


click.Context.formatter_class = HelpFormatter


def _option(text: str) -> str:
    """The help of one option; what stands behind it in brackets is translated by itself."""
    words, bracket, rest = text.partition("  [")
    return translate(words) + (f"  {translate(bracket.strip() + rest)}" if bracket else "")


def _look_up(text: str) -> str:
    if exact := _catalogue().get(text):
        return exact
    for pattern, target in _patterns():
        if match := pattern.fullmatch(text):
            return target.format(*match.groups())
    return text


@functools.cache
def _catalogue() -> dict[str, str]:
    path = Path(__file__).with_name("es.json")
    catalogue: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return catalogue


@functools.cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    templates = {key: value for key, value in _catalogue().items() if "{}" in key}
    # The longest first: the most particular template wins.
    return [
        (re.compile("(.*?)".join(map(re.escape, key.split("{}"))), re.DOTALL), templates[key])
        for key in sorted(templates, key=len, reverse=True)
    ]
