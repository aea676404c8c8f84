"""What a suite is made of: passages to read, questions to choose in, prompts to answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Item", "Passage", "Prompt", "Question"]


@dataclass(frozen=True)
class Passage:
    """Running text; every token of it is scored."""

    language: str  # ISO 639-1
    text: str


@dataclass(frozen=True)
class Question:
    """A prompt with continuations, of which one is right."""

    language: str
    prompt: str
    options: tuple[str, ...]  # as they follow the prompt, their first space included
    answer: int  # index into options


@dataclass(frozen=True)
class Prompt:
    """Something to answer freely; `json`: the answer has to be a JSON value."""

    language: str
    text: str
    kind: Literal["text", "json"] = "text"


Item = Passage | Question | Prompt
