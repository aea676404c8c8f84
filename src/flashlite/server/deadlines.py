"""Who is answered, in which order, and when an answer must end: deadlines kept by prediction.

    admit    at arrival: can it have what it is promised in time, and do the others keep theirs?
    next_batch   before a step: which requests start, the earliest deadline first
    expired  before a step: answers that must end now, so that they are written in time
    stepped  after a step: what it took, and how far everyone is

Promised is the whole answer (of expected length) where an idle server could give it, else a part
worth having. A request that cannot be served is refused at arrival, with the time after which it
would have been; one that was admitted ends complete, as a marked partial, or, when the machine
stalled before its first token, refused. No step is begun that may end after a deadline.

Fairness lies in admission: while there is too much work, a request may take the place of a waiting
one, and time of a running one, whose client has more in the system. So a client that floods the
server displaces itself.
Requests without deadline are best effort: they start when nobody with a deadline waits, or when
they have waited `patience` for each one that their client already had, whichever is first (L.
Zhang, VirtualClock, 1990), and leave slots to the others while there are any.

Pure: every call gets the time; it never goes back, whatever the clock does.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flashlite.server.foresight import Ahead, Job, Request, Rules
from flashlite.server.pace import Pace, Quantile, Shape

__all__ = ["Admit", "Deadlines", "End", "Progress", "Reject"]

_LENGTH = 0.8  # the quantile of answers' lengths that is expected of the next
_FIRST_LENGTH = 128.0  # tokens, before any answer has ended
_WRITE = 0.98  # the quantile of times to encode and write an answer
_FIRST_WRITE = 0.01  # seconds, before any was written
_MOST_DISPLACED = 8  # by one request
_TOLERANCE = 1e-3  # seconds later than before: no harm


class Progress(NamedTuple):
    """How far a running request is."""

    prefilled: int  # prompt tokens
    generated: int


@dataclass(frozen=True)
class Admit:
    """It is in; `next_batch` says when it starts."""


@dataclass(frozen=True)
class Reject:
    """It is refused: 503."""

    retry_after: float | None  # seconds; None: this server is too slow for it, however idle
    reason: str


@dataclass(frozen=True)
class End:
    """An admitted request ends now: with what it has, or refused while it has nothing."""

    key: int
    refused: Reject | None = None


class Deadlines:
    """The schedule of one engine.

    Attributes:
        pace: what steps take; `stepped` teaches it.
        rules: what runs together.
        writing: seconds from the end of an answer to its last byte, for the caller to note.
    """

    def __init__(self, pace: Pace, rules: Rules) -> None:
        self.pace = pace
        self.rules = rules
        self.writing = Quantile(_WRITE, _FIRST_WRITE)
        self._lengths = Quantile(_LENGTH, _FIRST_LENGTH)
        self._waiting: list[Job] = []  # in the order of starting
        self._running: dict[int, Job] = {}  # in the order of prefill
        self._displaced: dict[int, End] = {}  # for `expired` to tell
        self._now = -math.inf
        self._last_timed = -math.inf  # when a request with a deadline was here

    @property
    def load(self) -> tuple[int, int]:
        """Requests (running, waiting)."""
        return len(self._running), len(self._waiting)

    def admit(self, now: float, request: Request) -> Admit | Reject:
        """Take a request or refuse it; `expired` tells whom it displaced."""
        now = self._tick(now)
        if request.deadline is None:
            job = Job(request, self._virtual_start(now, request.client), 0)
        else:
            self._last_timed = now
            promised = self._promise(now, request)
            if isinstance(promised, Reject):
                return promised
            job = Job(request, request.deadline, promised)
            job.least = self._least(job, min(promised, self.rules.useful))
        waiting = list(self._waiting)
        displaced: list[Job] = []
        while harm := self._harm(now, job, waiting):
            richer = self._richer(job, waiting)
            victim = self._victim(job, harm, waiting, richer)
            if victim is not None and len(displaced) < _MOST_DISPLACED:
                waiting.remove(victim)
                displaced.append(victim)
                continue
            running = [self._running.get(key) for key in harm]
            if all(one is not None and one.request.client in richer for one in running):
                break  # theirs may end as parts
            return Reject(max(harm.values()), "the requests before it leave no time for it")
        self._waiting = waiting
        insort(self._waiting, job)
        for victim in displaced:
            forecast = self._forecast(now, [*waiting, victim])
            late = max(0.0, forecast.get(victim.request.key, self._backlog()))
            refused = Reject(late, "a client with fewer requests took its place")
            self._displaced[victim.request.key] = End(victim.request.key, refused)
        return Admit()

    def next_batch(self, now: float, free: int) -> list[Request]:
        """Requests that start now; at most `free`, the engine's unused slots."""
        now = self._tick(now)
        started: list[Job] = []
        pages = self.rules.pages - sum(job.request.pages for job in self._running.values())
        unbound = sum(job.request.deadline is None for job in self._running.values())
        for job in self._waiting:
            if len(started) >= free:
                break
            if job.request.deadline is None:
                if unbound >= self._slots_for_best_effort(now):
                    continue
                unbound += 1
            pages -= job.request.pages
            if pages < 0:  # smaller ones behind it would overtake it for ever
                break
            started.append(job)
        for job in started:
            self._waiting.remove(job)
            self._running[job.request.key] = job
        return [job.request for job in started]

    def expired(self, now: float) -> list[End]:
        """Requests that end before the next step is begun; they are forgotten here."""
        now = self._tick(now)
        ends = list(self._displaced.values())
        next_step = self.pace.at_most(self._next_shape())
        for job in [*self._running.values(), *self._waiting]:
            if job.request.deadline is None:
                continue
            left = job.request.deadline - now - self.writing.value
            if left >= next_step and (job.generated or self._has_hope(job, left)):
                continue
            refused = None
            if not job.generated:
                refused = Reject(self._backlog(), "the machine was slower than predicted")
            ends.append(End(job.request.key, refused))
        for end in ends:
            self._forget(end.key)
        return ends

    def stepped(self, shape: Shape, seconds: float, progress: Mapping[int, Progress]) -> None:
        """Learn what a step computed, what it took, and how far the running requests are."""
        self.pace.note(shape, seconds)
        for key, (prefilled, generated) in progress.items():
            if (job := self._running.get(key)) is not None:
                job.prefilled, job.generated = prefilled, generated

    def finish(self, key: int, *, tokens: int | None = None) -> None:
        """A request ended by itself after so many tokens; None: it was cancelled."""
        if tokens is not None:
            self._lengths.note(tokens)
        self._forget(key)

    def _tick(self, now: float) -> float:
        self._now = max(self._now, now)
        return self._now

    def _forget(self, key: int) -> None:
        self._displaced.pop(key, None)
        if self._running.pop(key, None) is None:
            self._waiting = [job for job in self._waiting if job.request.key != key]

    # What a request is promised, and what it is worth

    def _promise(self, now: float, request: Request) -> int | Reject:
        """Tokens that it will have in time unless the machine becomes slower."""
        if request.deadline is None or not self.pace.known:
            return min(request.room, self.rules.useful)
        useful = min(request.room, self.rules.useful)
        whole = min(request.room, math.ceil(self._lengths.value))
        alone = self._alone(request, request.deadline - now)
        if alone < useful:
            budget = request.deadline - request.arrived
            if self._alone(request, budget) >= useful:
                return Reject(self._backlog(), "its time was over before it could be scheduled")
            needed = self._seconds(request, useful) + self.writing.value
            reason = (
                f"its prompt and {useful} tokens take {needed:.2f} s here when nothing else runs"
            )
            return Reject(None, f"{reason}, and its deadline is {budget:.2f} s")
        return whole if alone >= whole else max(useful, int(alone) // 2)

    def _alone(self, request: Request, budget: float) -> float:
        """Tokens that an idle server generates for it in so many seconds."""
        each = self.rules.margin * self.pace.step(Shape(0, 0, 1, request.prompt))
        left = budget - self.writing.value - self._seconds(request, 0)
        return left / each if each > 0 else math.inf

    def _seconds(self, request: Request, tokens: int) -> float:
        """What an idle server takes for its prompt and so many tokens."""
        each = self.pace.step(Shape(0, 0, 1, request.prompt + tokens / 2))
        return self.rules.margin * (self._prefill(0, request.prompt) + tokens * each)

    def _prefill(self, first: int, tokens: int) -> float:
        """What an idle server takes for prompt tokens from a position on."""
        steps = max(1, -(-tokens // self.rules.chunk_alone))
        return self.pace.step(Shape.chunk(first, tokens)) + (steps - 1) * self.pace.step(Shape())

    def _has_hope(self, job: Job, left: float) -> bool:
        """It can have its first token in time, or a useful part if it still waits."""
        if left > 4 * job.least:  # spares the prediction
            return True
        tokens = 1 if job.request.key in self._running else min(job.promised, self.rules.useful)
        return left >= self._least(job, tokens)

    def _least(self, job: Job, tokens: int) -> float:
        """Seconds that it needs at best to have so many tokens."""
        each = self.pace.step(Shape(0, 0, 1, job.request.prompt))
        return self._prefill(job.prefilled, job.prompt_left) + (tokens - 1) * each

    def _expected(self, job: Job) -> int:
        """Tokens that it will still generate; one longer than most is thought half done."""
        most = self._lengths.value
        total = most if job.generated < most else 2 * job.generated
        return max(1, math.ceil(min(job.request.room, total)) - job.generated)

    # Best effort

    def _virtual_start(self, now: float, client: str) -> float:
        jobs = [*self._running.values(), *self._waiting]
        mine = sum(job.request.deadline is None and job.request.client == client for job in jobs)
        return now + self.rules.patience * (1 + mine)

    def _slots_for_best_effort(self, now: float) -> int:
        """All but a quarter, as long as somebody asks for deadlines."""
        slots = self.rules.slots
        if now - self._last_timed > self.rules.memory:
            return slots
        return max(1, slots - -(-slots // 4))

    # Admission

    def _harm(self, now: float, job: Job, waiting: Sequence[Job]) -> dict[int, float]:
        """Who would miss what was promised if it came in, and by how many seconds."""
        if len(waiting) >= self.rules.queue:
            return {job.request.key: self._backlog()}
        if job.request.deadline is None:
            return {}
        after = self._forecast(now, [*waiting, job])
        late = {key: seconds for key, seconds in after.items() if seconds > 0}
        if not late.keys() - {job.request.key}:
            return late
        before = self._forecast(now, waiting)
        return {
            key: seconds
            for key, seconds in late.items()
            if seconds > before.get(key, -math.inf) + _TOLERANCE
        }

    def _richer(self, job: Job, waiting: Sequence[Job]) -> Mapping[str, float]:
        """Clients that have more work here than its own would have with it, and how much."""
        load: dict[str, float] = {}
        for one in [*self._running.values(), *waiting]:
            client = one.request.client
            load[client] = load.get(client, 0.0) + self._work(one)
        mine = load.get(job.request.client, 0.0) + self._work(job)
        return {client: work for client, work in load.items() if work > mine}

    def _victim(
        self,
        job: Job,
        harm: Mapping[int, float],
        waiting: Sequence[Job],
        richer: Mapping[str, float],
    ) -> Job | None:
        """A waiting request in whose place it would harm less, of the richest client: one before
        it that makes it late, or one after it that it makes late.
        """
        late = job.request.key in harm
        found = [one for one in waiting if one.request.client in richer]
        if len(waiting) < self.rules.queue:  # what lacks is time, not room
            found = [
                one
                for one in found
                if one.request.deadline is not None
                and (one < job if late else one.request.key in harm)
            ]
        return max(found, key=lambda one: (richer[one.request.client], one.due), default=None)

    def _work(self, job: Job) -> float:
        """Seconds of the engine that it still asks for; 1 before any is known."""
        if not self.pace.known:
            return 1.0
        each = self.pace.step(Shape(0, 0, 1, job.request.prompt))
        return self._prefill(job.prefilled, job.prompt_left) + self._expected(job) * each

    def _backlog(self) -> float:
        """Seconds until those who are here are served, when no slot is left empty."""
        jobs = [*self._running.values(), *self._waiting]
        return sum(self._work(job) for job in jobs) / self.rules.slots

    # Foresight

    def _next_shape(self) -> Shape:
        """The largest step that may come next."""
        decoding = [job for job in self._running.values() if not job.prompt_left]
        waiting = self._waiting[: max(0, self.rules.slots - len(self._running))]
        jobs = [job for job in self._running.values() if job.prompt_left] + waiting
        size = self.rules.chunk if decoding else self.rules.chunk_alone
        tokens = min(size, sum(job.prompt_left for job in jobs))
        deepest = max((job.prefilled for job in jobs), default=0)
        depth = sum(job.depth for job in decoding)
        return Shape(tokens, tokens * (deepest + tokens / 2), len(decoding), depth)

    def _forecast(self, now: float, waiting: Sequence[Job]) -> dict[int, float]:
        ahead = Ahead(self.pace, self.rules, self.writing.value, self._expected, now)
        return ahead.late(list(self._running.values()), waiting)
