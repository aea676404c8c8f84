"""What the compressed model writes freely: whether it ends, runs in circles, and keeps to JSON.

Agreement on given text does not show how a model goes on after its own words, so every validation
looks at them, greedy and drawn at temperature 0.7.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.evaluate.items import Prompt

__all__ = ["Answered", "Generate", "answer_prompts", "is_json", "loops", "repetition"]

Generate = Callable[[str, float, int], tuple[Sequence[int], str, bool]]
"""(prompt, temperature, most tokens) -> (ids, text, whether the model ended by itself)."""

_TOKENS = 64
_TEMPERATURES = (0.0, 0.7)
_REPEATS = 4  # a stretch of 8 tokens seen so often is a loop
_STRETCH = 8
_GRAM = 4


@dataclass(frozen=True)
class Answered:
    """A generation task at one temperature, of the compressed model alone."""

    prompts: int
    temperature: float
    ended: float  # share that came to an end by itself
    looping: float  # share in which 8 tokens in a row came 4 times or more
    repetition: float  # share of stretches of 4 tokens that had come before, mean over answers
    json_valid: float | None  # of those that asked for JSON; None: none did

    def to_json(self) -> dict[str, Any]:
        """Shares."""
        return asdict(self) | {"repetition": round(self.repetition, 6)}


def answer_prompts(
    tasks: Mapping[str, Sequence[Prompt]],
    generate: Generate,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Answered]]:
    """Let the model answer; for each task, a result per temperature."""
    total, done = sum(map(len, tasks.values())) * len(_TEMPERATURES), 0
    results: dict[str, list[Answered]] = {}
    for task, prompts in tasks.items():
        for temperature in _TEMPERATURES:
            ended, looping, valid, again = 0, 0, [], []
            for prompt in prompts:
                ids, text, over = generate(prompt.text, temperature, _TOKENS)
                ended += over
                looping += loops(ids)
                again.append(repetition(ids))
                if prompt.kind == "json":
                    valid.append(is_json(text))
                done += 1
                report(done, total)
            n = len(prompts)
            share = sum(valid) / len(valid) if valid else None
            results.setdefault(task, []).append(
                Answered(n, temperature, ended / n, looping / n, float(np.mean(again)), share)
            )
    return results


def loops(ids: Sequence[int] | NDArray[np.int32]) -> bool:
    """Whether 8 tokens in a row come 4 times or more."""
    seen: dict[tuple[int, ...], int] = {}
    for i in range(len(ids) - _STRETCH + 1):
        stretch = tuple(ids[i : i + _STRETCH])
        seen[stretch] = seen.get(stretch, 0) + 1
        if seen[stretch] >= _REPEATS:
            return True
    return False


def repetition(ids: Sequence[int] | NDArray[np.int32]) -> float:
    """Share of the stretches of 4 tokens that came before; 0 of an answer that has none."""
    grams = [tuple(ids[i : i + _GRAM]) for i in range(len(ids) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_json(text: str) -> bool:
    """Whether the answer is a JSON value, a fence of Markdown around it allowed."""
    text = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
