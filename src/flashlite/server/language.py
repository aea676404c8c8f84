"""Messages in the language that a request asks for: English, or Spanish by `Accept-Language`.

`es.json` maps English to Spanish. `{}` in a key stands for any text, and `{0}`, `{1}` in the
Spanish for what the first, the second stood for. What the file lacks stays English.
"""

from __future__ import annotations

import functools
import json
import re
from contextvars import ContextVar
from pathlib import Path

__all__ = ["LANGUAGES", "asked_language", "language", "translate"]

LANGUAGES = ("en", "es")
language: ContextVar[str] = ContextVar("language", default="en")
"""Of the request that is being answered; the outermost middleware sets it."""

_CODE = re.compile(r"(FL-\d+: |)(.*)", re.DOTALL)
_QUALITY = re.compile(r"\s*q=([0-9.]{1,6})\s*")
_LONGEST = 256  # characters of the header that are read


def asked_language(header: str) -> str:
    """The best of `LANGUAGES` for an `Accept-Language` header; English where none is asked for."""
    best, found = 0.0, LANGUAGES[0]
    for part in header[:_LONGEST].split(","):
        tag, _, rest = part.partition(";")
        name = tag.strip().lower().split("-")[0]
        match = _QUALITY.fullmatch(rest)
        try:
            quality = float(match[1]) if match else 1.0
        except ValueError:
            continue
        if name in LANGUAGES and quality > best:
            best, found = quality, name
    return found


def translate(message: str) -> str:
    """A message in the request's language, or as it is; an error code in front stays."""
    if language.get() != "es":
        return message
    code, rest = _CODE.fullmatch(message).groups()  # type: ignore[union-attr]
    return code + _look_up(rest)


def _look_up(text: str) -> str:
    for pattern, target in _patterns():
        if match := pattern.fullmatch(text):
            return target.format(*match.groups())
    return text


@functools.cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    catalogue = json.loads(Path(__file__).with_name("es.json").read_text(encoding="utf-8"))
    return [
        (re.compile("(.*?)".join(map(re.escape, key.split("{}"))), re.DOTALL), value)
        for key, value in catalogue.items()
    ]
