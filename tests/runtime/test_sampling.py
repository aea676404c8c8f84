"""`SamplingParams` refuse what cannot be honoured; `StopStrings` equal a search of the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlite.errors import UsageError
from flashlite.runtime.sampling import SamplingParams, StopStrings

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 1, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "seed": 2**64 - 1},
        {"stop": ("x" * 256,) * 16, "logprobs": 20, "max_tokens": 1},
        {"logit_bias": {0: -100, 7: 100.0, 9: -INF}},
        {"logprobs": 0, "seed": 0, "top_p": 0.0},
    ],
)
def test_sound_parameters_pass(values: Mapping[str, object]) -> None:
    SamplingParams(**values).check(vocab_size=10)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *[("temperature", v) for v in (-0.1, NAN, INF, 101, "1", None, True)],
        *[("top_p", v) for v in (-0.1, 1.1, NAN)],
        *[("min_p", v) for v in (-0.1, 1.1, NAN)],
        *[("top_k", v) for v in (-1, 1.5, 2**31, None, True)],
        *[("repetition_penalty", v) for v in (0, -1, NAN, INF)],
        *[("presence_penalty", v) for v in (NAN, INF, -101)],
        *[("frequency_penalty", v) for v in (NAN, INF, 101)],
        *[("seed", v) for v in (-1, 2**64, 1.0, "1")],
        *[("max_tokens", v) for v in (0, -1, 1.5, 2**31)],
        *[("logprobs", v) for v in (-1, 21, True)],
        *[("stop", v) for v in ("text", ("",), ("x" * 257,), ("a",) * 17, (1,), None)],
        *[("logit_bias", v) for v in ({-1: 1}, {10: 1}, {1: NAN}, {1: INF}, {1: 101}, {1: "x"})],
        *[("logit_bias", v) for v in ({"1": 1}, {True: 1}, [1], dict.fromkeys(range(4097), 0.5))],
    ],
)
def test_a_bad_parameter_is_named_in_one_line(name: str, bad: object) -> None:
    params = SamplingParams(**{name: bad})  # type: ignore[arg-type]
    with pytest.raises(UsageError) as caught:
        params.check(vocab_size=10)
    message = str(caught.value)
    assert "allowed" in message
    assert name.split("_")[0] in message
    assert "\n" not in message
    assert len(message) < 200


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Cut by looking at the whole: the match that ends first, the longest of those."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


letters = st.text(alphabet="ab\u00e9", max_size=40)
stop_lists = st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=5), max_size=4)


@given(st.lists(letters, max_size=12), stop_lists)
def test_any_pieces_give_what_a_search_of_the_whole_gives(
    pieces: list[str], stops: list[str]
) -> None:
    matcher = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
    shown += matcher.finish()
    assert (shown, matcher.matched) == naive("".join(pieces), stops)


@given(letters, stop_lists)
def test_nothing_is_held_back_without_need(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown = ""
    for i, char in enumerate(text):
        shown += matcher.push(char)
        if matcher.stopped:
            break
        held = text[len(shown) : i + 1]
        assert text[: i + 1] == shown + held
        assert not held or any(stop.startswith(held) for stop in stops)


def test_text_after_a_match_is_dropped() -> None:
    stops = StopStrings(("</s>", "stop"))
    assert stops.push("one <") == "one "
    assert stops.push("/s> two") == ""
    assert stops.stopped
    assert stops.matched == "</s>"
    assert stops.push("three") == ""
    assert stops.finish() == ""


def test_what_was_held_back_comes_out_at_the_end() -> None:
    stops = StopStrings(("</s>",))
    assert stops.push("a </") == "a "
    assert stops.finish() == "</"
    assert stops.matched is None


@pytest.mark.parametrize(
    ("settings", "need"),
    [
        ({}, "largest"),
        ({"temperature": 0.7}, "likely"),
        ({"repetition_penalty": 1.1}, "likely"),  # may let another than the largest win
        ({"presence_penalty": 0.5}, "likely"),
        ({"frequency_penalty": 0.5}, "likely"),
        ({"repetition_penalty": 0.9}, "all"),  # may raise a token from anywhere
        ({"presence_penalty": -0.5}, "all"),
        ({"frequency_penalty": -0.5}, "all"),
        ({"logprobs": 0}, "all"),
        ({"logit_bias": {3: 1.0}}, "all"),
    ],
)
def test_what_a_draw_can_reach_is_not_estimated(settings: dict[str, Any], need: str) -> None:
    assert SamplingParams(**settings).need == need
