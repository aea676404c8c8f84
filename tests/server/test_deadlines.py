"""Deadlines on a simulated engine: what must hold for every load and machine, by seed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from simulated import Client, World, run

from flashlite.server.deadlines import Deadlines, End
from flashlite.server.foresight import Request
from flashlite.server.pace import Pace, Shape

SLACK = 0.05  # seconds that an answer may be later than its deadline and one step


# What must hold of every world


def check(world: World) -> None:
    """One end for each; no answer after its deadline but by the step that was in progress then."""
    for client in world.clients:
        request = client.request
        assert client.outcome is not None
        if client.outcome == "complete":
            assert client.generated == min(client.length, request.room)
        if client.outcome == "partial":
            assert 0 < client.generated < min(client.length, request.room)
        if client.outcome == "refused":
            assert client.generated == 0
        if request.deadline is None:
            assert client.outcome != "partial"
            assert client.outcome != "refused" or not client.admitted or client.started is None
        elif not (world.jump < 0 and client.ended >= world.jump_at):  # time that goes back is lost
            over = [ended for begun, ended in world.steps if begun <= request.deadline < ended]
            late = client.written - max([request.deadline, *over]) - SLACK
            assert late <= 0, f"{client.outcome} {late:.3f} s later than one step allows"


# What must hold of many worlds together, when nothing stalls


@dataclass
class Tally:
    """Sums over calm worlds of one load."""

    timed: int = 0
    late: int = 0  # answers after their deadline at all
    refused: int = 0
    refused_at_arrival: int = 0
    could: int = 0  # requests that an idle server would complete in four fifths of their time
    completed: int = 0  # of these
    useful_seconds: float = 0.0  # of the engine, at its best, for what was answered
    seconds: float = 0.0

    def add(self, world: World) -> None:
        for client in world.clients:
            request = client.request
            self.timed += 1
            assert request.deadline is not None
            answered = client.outcome in ("complete", "partial")
            self.late += answered and client.written > request.deadline
            self.refused += client.outcome == "refused"
            self.refused_at_arrival += not client.admitted
            if feasible(world, client):
                self.could += 1
                self.completed += client.outcome == "complete"
            if answered:
                self.useful_seconds += world.work(request.prompt, client.generated)
        last = max(client.written for client in world.clients)
        self.seconds += last - world.clients[0].request.arrived


def tally(worlds: int, load: float, schedule: type[Deadlines]) -> Tally:
    total = Tally()
    for seed in range(worlds):
        total.add(run(World(seed, load=load, calm=True), schedule))
    return total


def feasible(world: World, client: Client) -> bool:
    """An idle server would complete it in four fifths of its time."""
    request = client.request
    assert request.deadline is not None
    tokens = min(client.length, request.room)
    steps = -(-request.prompt // world.rules.chunk_alone)
    alone = world.seconds(Shape.chunk(0, request.prompt)) + steps * world.cost[0]
    alone += tokens * world.seconds(Shape(0, 0, 1, request.prompt + tokens / 2))
    return alone < 0.8 * (request.deadline - request.arrived)


def polite_share(schedule: type[Deadlines]) -> float:
    """Of what a client asks for that wants two fifths of a server which another one floods."""
    answered = asked = 0
    for seed in range(12):
        world = run(World(seed, load=4.0, calm=True, names="f" * 19 + "p", count=160), schedule)
        polite = [c for c in world.clients if c.request.client == "p" and feasible(world, c)]
        asked += len(polite)
        answered += sum(client.outcome in ("complete", "partial") for client in polite)
    return answered / asked


def longest_wait(schedule: type[Deadlines]) -> float:
    """Seconds for which a request without deadline waits while others overload the server."""
    worst = 0.0
    for seed in range(5):
        world = World(seed, load=4.0, calm=True, count=200)
        for client in world.clients[20:24]:
            client.request = replace(client.request, deadline=None)
        world.rules = replace(world.rules, patience=0.5)
        run(world, schedule)
        for client in world.clients[20:24]:
            started = math.inf if client.started is None else client.started
            worst = max(worst, started - client.request.arrived)
    return worst


def keeps_invariants(schedule: type[Deadlines], worlds: int) -> bool:
    for seed in range(worlds):
        try:
            check(run(World(seed), schedule))
        except AssertionError as error:
            print(f"seed {seed}: {error}")
            return False
    return True


def is_in_time(schedule: type[Deadlines], worlds: int) -> bool:
    """Without stalls no answer is late at all, but for one in a thousand."""
    sums = [tally(worlds // 6, load, schedule) for load in (0.3, 4.0)]
    return sum(one.late for one in sums) <= sum(one.timed for one in sums) / 1000


def refuses_early(schedule: type[Deadlines], worlds: int) -> bool:
    heavy = tally(worlds // 6, 4.0, schedule)
    return heavy.refused_at_arrival >= 0.9 * heavy.refused


def is_busy(schedule: type[Deadlines], worlds: int) -> bool:
    """Four fifths of an oracle's goodput, whose slots are all in use all the time."""
    heavy = tally(worlds // 6, 4.0, schedule)
    return heavy.useful_seconds >= 0.8 * heavy.seconds


def serves_what_it_can(schedule: type[Deadlines], worlds: int) -> bool:
    light = tally(worlds // 6, 0.3, schedule)
    return light.completed >= 0.95 * light.could


def is_fair(schedule: type[Deadlines], worlds: int) -> bool:
    """A client that wants a fifth of a server which another one floods gets most of that."""
    answered = asked = 0
    for seed in range(worlds // 8):
        world = run(World(seed, load=4.0, calm=True, names="f" * 19 + "p", count=160), schedule)
        polite = [c for c in world.clients if c.request.client == "p" and feasible(world, c)]
        asked += len(polite)
        answered += sum(client.outcome in ("complete", "partial") for client in polite)
    return answered >= 0.75 * asked


def starves_nobody(schedule: type[Deadlines], worlds: int) -> bool:
    """Those without deadline start while others overload the server."""
    waits = []
    for seed in range(worlds // 16):
        world = World(seed, load=4.0, calm=True, count=200)
        world.rules = replace(world.rules, patience=0.5)
        unbound = world.clients[20:24]
        for client in unbound:
            client.request = replace(client.request, deadline=None)
        run(world, schedule)
        waits += [(client.started or math.inf) - client.request.arrived for client in unbound]
    return max(waits) < 3


PROMISES = (
    keeps_invariants,
    is_in_time,
    refuses_early,
    is_busy,
    serves_what_it_can,
    is_fair,
    starves_nobody,
)
Promise = Callable[[type[Deadlines], int], bool]


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_is_kept_in_300_worlds(promise: Promise) -> None:
    assert promise(Deadlines, 300)


@pytest.mark.accept
def test_no_invariant_breaks_in_10000_worlds() -> None:
    ends: Counter[str] = Counter()
    for seed in range(10_000):
        world = run(World(seed))
        check(world)
        ends.update(str(client.outcome) for client in world.clients)
    print(json.dumps({"worlds": 10_000, "broken": 0, **ends}))


# The simulation sees a schedule that is broken


class NeverStops(Deadlines):
    def expired(self, now: float) -> list[End]:
        ends = list(self._displaced.values())
        self._displaced.clear()
        return ends


class ForgetsTheStep(Deadlines):
    """It stops at the deadline itself, whatever the next step takes."""

    def expired(self, now: float) -> list[End]:
        learned, self.pace = self.pace, Pace()
        ends = super().expired(now)
        self.pace = learned
        return ends


class AdmitsAll(Deadlines):
    def _harm(self, *_: Any) -> dict[int, float]:
        return {}


class AdmitsOne(Deadlines):
    def _harm(self, now: float, job: Any, waiting: Any) -> dict[int, float]:
        return {job.request.key: 1.0} if any(self.load) else {}


class FirstComeFirstServed(Deadlines):
    def _richer(self, *_: Any) -> dict[str, float]:
        return {}


class BestEffortLast(Deadlines):
    def _virtual_start(self, *_: Any) -> float:
        return math.inf


class LastFirst(Deadlines):
    def next_batch(self, now: float, free: int) -> list[Request]:
        self._waiting.reverse()
        started = super().next_batch(now, free)
        self._waiting.sort()
        return started


class AnswersTwice(Deadlines):
    def finish(self, key: int, *, tokens: int | None = None) -> None:
        job = self._running.get(key)
        super().finish(key, tokens=tokens)
        if job is not None and tokens == 7:
            self._displaced[key] = End(key)


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (NeverStops, keeps_invariants),
        (ForgetsTheStep, is_in_time),
        (AdmitsAll, refuses_early),
        (AdmitsOne, is_busy),
        (AdmitsOne, serves_what_it_can),
        (FirstComeFirstServed, is_fair),
        (BestEffortLast, starves_nobody),
        (LastFirst, refuses_early),
        (AnswersTwice, keeps_invariants),
    ],
)
def test_a_broken_schedule_is_seen(broken: type[Deadlines], promise: Promise) -> None:
    assert not promise(broken, 80)
