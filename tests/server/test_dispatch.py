"""A real scheduler run by deadlines, on a clock of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flashlite.errors import Overloaded
from flashlite.runtime.model import Model, load
from flashlite.runtime.sampling import SamplingParams
from flashlite.server.dispatch import Dispatch, Ticket
from flashlite.server.pace import Shape

TICK = 0.0025  # seconds between two looks at the clock
STEP = 2 * TICK  # what every step takes, with what is done before it
PROMPT = list(range(3, 43))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += TICK
        return self.now


@pytest.fixture(scope="module")
def model(stories260k: Path) -> Iterator[Model]:
    with load(stories260k, max_sequences=2, threads=1, isa="plain") as model:
        yield model


@pytest.fixture
def dispatch(model: Model) -> Dispatch:
    return Dispatch(model.scheduler, clock=Clock())


def ask(dispatch: Dispatch, tokens: int, within: float | None = None, client: str = "") -> Ticket:
    params = SamplingParams(temperature=0, max_tokens=tokens, stop=())
    now = dispatch._clock()
    deadline = None if within is None else now + within
    ticket = dispatch.prepare(PROMPT, params, client=client, arrived=now, deadline=deadline)
    dispatch.take(ticket)
    return ticket


def run(dispatch: Dispatch, until: Callable[[], bool] = lambda: False) -> None:
    while not dispatch.idle and not until():
        dispatch.step()


def text(ticket: Ticket) -> str:
    return "".join(piece.text for piece in ticket.generation.pieces)


def test_an_answer_in_time_is_the_one_without_deadline(dispatch: Dispatch) -> None:
    free, bound = ask(dispatch, 30), ask(dispatch, 30, within=60)
    run(dispatch)
    assert bound.generation.finish_reason == free.generation.finish_reason == "length"
    assert text(bound) == text(free)
    assert len(text(bound)) > 20


def test_a_partial_answer_is_marked_whole_up_to_its_end_and_in_time(dispatch: Dispatch) -> None:
    whole = ask(dispatch, 120)
    run(dispatch)
    part = ask(dispatch, 120, within=0.3)
    run(dispatch)
    assert part.generation.finish_reason == "deadline"
    assert 20 <= len(part.generation.generated) < 120
    assert text(whole).startswith(text(part).rstrip("\N{REPLACEMENT CHARACTER}"))
    assert dispatch._clock() <= part.request.deadline  # type: ignore[operator]


def test_what_cannot_be_had_in_time_is_refused_at_once_and_for_good(dispatch: Dispatch) -> None:
    ticket = ask(dispatch, 100, within=3 * TICK)
    assert ticket.ended
    assert isinstance(ticket.refused, Overloaded)
    assert ticket.refused.retry_after is None
    assert dispatch.idle


def test_beyond_what_fits_requests_are_refused_with_a_time_to_come_back(dispatch: Dispatch) -> None:
    tickets = [ask(dispatch, 60, within=1.0) for _ in range(20)]
    refused = [ticket.refused for ticket in tickets if ticket.refused]
    assert 0 < len(refused) < 20
    assert all(one.retry_after is not None and 0 <= one.retry_after < 20 for one in refused)
    run(dispatch)
    answered = [ticket for ticket in tickets if not ticket.refused]
    reasons = {ticket.generation.finish_reason for ticket in answered}
    assert reasons <= {"length", "stop", "deadline"}
    assert len(answered) >= 4


def test_waiting_and_running_requests_can_be_cancelled(dispatch: Dispatch, model: Model) -> None:
    free = model.scheduler.engine.pool.free
    tickets = [ask(dispatch, 100) for _ in range(4)]
    run(dispatch, until=lambda: len(tickets[0].generation.generated) > 3)
    assert dispatch.load == (2, 2)
    for ticket in tickets:
        dispatch.cancel(ticket)
        dispatch.cancel(ticket)  # a second time changes nothing
    assert dispatch.idle
    assert dispatch.load == (0, 0)
    assert {ticket.generation.finish_reason for ticket in tickets} == {"cancelled"}
    assert model.scheduler.idle
    assert model.scheduler.engine.pool.free == free


def test_a_request_that_is_displaced_is_refused(dispatch: Dispatch) -> None:
    flood = [ask(dispatch, 60, within=1.0, client="flood") for _ in range(12)]
    admitted = [ticket for ticket in flood if not ticket.refused]
    polite = ask(dispatch, 60, within=1.0, client="polite")
    assert polite.refused is None
    run(dispatch)
    assert polite.generation.finish_reason in ("length", "stop")
    assert any(ticket.refused for ticket in admitted)


def test_what_a_step_computed_is_seen(
    dispatch: Dispatch, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.scheduler, "store", None)  # earlier runs may have saved the prompt
    steps: list[Shape] = []
    monkeypatch.setattr(dispatch.deadlines.pace, "note", lambda shape, _: steps.append(shape))
    prompt = list(range(50, 150))
    params = SamplingParams(temperature=0, max_tokens=3)
    dispatch.take(dispatch.prepare(prompt, params))
    run(dispatch)
    assert steps == [Shape(100, 5000, 0, 0), Shape(0, 0, 1, 100), Shape(0, 0, 1, 101)]
    steps.clear()
    dispatch.take(dispatch.prepare(prompt, params))  # 96 tokens of it are stored
    run(dispatch)
    assert steps[0] == Shape(4, 4 * 98, 0, 0)


def test_the_pace_is_known_from_the_start(dispatch: Dispatch) -> None:
    pace = dispatch.deadlines.pace
    assert pace.step(Shape(0, 0, 1, 50)) == pytest.approx(STEP, rel=0.3)
    assert TICK < pace.step(Shape.chunk(0, 64)) < 1.3 * STEP  # the first after idle is TICK long
