"""`flashlite run`: the figures of one answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashlite.cli.main import main


@pytest.fixture
def run(tiny_gguf: Path, own_prefixes: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    def ask(*words: str) -> dict[str, Any]:
        fixed = ["run", str(tiny_gguf), "--isa", "plain", "--threads", "2", "--json"]
        assert main([*fixed, "-p", "once upon a time " * 12, *words]) == 0
        answer: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
        return answer

    return ask


def test_a_second_run_finds_the_prompt_of_the_first(run: Any, own_prefixes: Path) -> None:
    first, second = run("--max-tokens", "8"), run("--max-tokens", "8")
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] == (second["prompt_tokens"] - 1) // 32 * 32 >= 64
    assert second["text"] == first["text"]
    assert run("--max-tokens", "8", "--no-prefix-cache")["cached_tokens"] == 0
    assert len(list(own_prefixes.glob("*/*.kv"))) == 1


def test_drafts_are_counted_and_can_be_turned_off(run: Any) -> None:
    fast, slow = run("--max-tokens", "200"), run("--max-tokens", "200", "--no-speculate")
    assert fast["text"] == slow["text"]
    assert fast["drafted_tokens"] >= fast["accepted_tokens"] >= 0
    assert (slow["drafted_tokens"], slow["accepted_tokens"]) == (0, 0)
