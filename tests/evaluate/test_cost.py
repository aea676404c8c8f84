"""CPU-seconds as a measuring process takes them."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import pytest

from flashlite.evaluate.worker import answer_lines


class Busy:
    """Burns CPU time it is told of: a millisecond per token of a prompt, five per step."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        pass

    def prefill(self, ids: list[int]) -> float:
        return self._burn(1e-3 * len(ids))

    def decode(self, ids: list[int], n: int) -> float:
        self._burn(1e-3 * len(ids))
        return self._burn(5e-3 * n)

    def _burn(self, seconds: float) -> float:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return seconds


def ask(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    answers = io.StringIO()
    answer_lines(Busy, io.StringIO("".join(json.dumps(r) + "\n" for r in requests)), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_steps_are_counted_without_their_prompt() -> None:
    opened = {"cmd": "open", "model": "m", "threads": 1, "context": 64}
    _, cost = ask(opened, {"cmd": "cost", "ids": [1] * 40, "n": 20})
    assert cost["prefill"] == pytest.approx(0.04, abs=0.01)
    assert cost["decode"] == pytest.approx(0.1, abs=0.02)


def test_nothing_is_measured_before_a_model_is_open() -> None:
    (answer,) = ask({"cmd": "cost", "ids": [1], "n": 1})
    assert "no model is open" in answer["error"]
