"""The steps to come: when each request will have what it was promised, if predictions hold.

    running and waiting requests -> prefill one after the other, beside all that decode -> seconds
    before or after its deadline, for each

All sequences decode one token in a step, so what happens to them is ordered by the number of the
step: a forecast takes microseconds for each request, not for each token.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashlite.server.pace import Pace, Shape

__all__ = ["Ahead", "Job", "Request", "Rules"]


@dataclass(frozen=True)
class Rules:
    """What the engine can do together, and what is worth starting.

    Attributes:
        slots: sequences that run at the same time.
        pages: of the KV cache, shared by those that run.
        queue: requests that may wait.
        chunk: prompt tokens of a step in which others decode.
        chunk_alone: prompt tokens of a step in which nobody does.
        useful: tokens that a partial answer is worth having with.
        margin: by how much the machine may be slower than predicted before promises break.
        patience: seconds that a request without deadline waits at most behind others.
        memory: seconds after the last request with a deadline during which slots are left to them.
    """

    slots: int
    pages: int = 1 << 40
    queue: int = 64
    chunk: int = 64
    chunk_alone: int = 256
    useful: int = 16
    margin: float = 1.1
    patience: float = 30.0
    memory: float = 60.0


@dataclass(frozen=True)
class Request:
    """What a schedule needs to know of a request; times are those of the one clock."""

    key: int
    client: str  # whoever shares: a key's id or an address
    prompt: int  # tokens to compute
    room: int  # tokens it may generate
    arrived: float  # when its head was read
    deadline: float | None = None  # when its last byte must be written; None: best effort
    pages: int = 0  # of the KV cache, reserved while it runs


@dataclass(eq=False, slots=True)
class Job:
    """A request that was admitted, and how far it is."""

    request: Request
    due: float  # the order of starting
    promised: int  # tokens
    least: float = 0.0  # seconds that it needed at best when it came
    prefilled: int = 0
    generated: int = 0

    def __lt__(self, other: Job) -> bool:
        return (self.due, self.request.key) < (other.due, other.request.key)

    @property
    def prompt_left(self) -> int:
        """Prompt tokens that are still to be computed."""
        return max(self.request.prompt - self.prefilled, 0)

    @property
    def depth(self) -> int:
        """Positions that it has stored."""
        return self.prefilled + self.generated


class Ahead:
    """One forecast, from the present on."""

    def __init__(
        self,
        pace: Pace,
        rules: Rules,
        writing: float,
        expected: Callable[[Job], int],
        now: float,
    ) -> None:
        """Look ahead from now.

        Args:
            pace: what steps take.
            rules: what runs together.
            writing: seconds from the end of an answer to its last byte.
            expected: tokens that a request will still generate.
            now: seconds of the clock of the deadlines.
        """
        fixed = pace.step(Shape())
        self._fixed, self._prompt, self._reach, self._sequence, self._position = (
            rules.margin * seconds
            for seconds in (
                fixed,
                pace.step(Shape(1)) - fixed,
                pace.step(Shape(0, 1)) - fixed,
                pace.step(Shape(0, 0, 1)) - fixed,
                pace.step(Shape(0, 0, 0, 1)) - fixed,
            )
        )
        self._rules = rules
        self._writing = writing
        self._expected = expected
        self._now = now
        self._step = 0
        self._free = rules.slots
        self._pages = rules.pages  # free ones
        self._decoding = 0
        self._depth = 0.0
        self._events: list[tuple[int, int, bool, Job]] = []  # step, key, leaves, job
        self._late: dict[int, float] = {}

    def late(self, running: Sequence[Job], waiting: Sequence[Job]) -> dict[int, float]:
        """By key, the seconds after its deadline at which a request has what it was promised."""
        self._free -= len(running)
        self._pages -= sum(job.request.pages for job in running)
        for job in running:
            if not job.prompt_left:
                self._decode(job)
        for job in running:
            if job.prompt_left:
                self._prefill(job)
        for job in sorted(waiting):
            while self._events and (self._free < 1 or self._pages < job.request.pages):
                self._run(self._events[0][0], 0.0)
            self._free -= 1
            self._pages -= job.request.pages
            self._prefill(job)
        while self._events:
            self._run(self._events[0][0], 0.0)
        return self._late

    def _decode(self, job: Job) -> None:
        """From now on it generates."""
        left = self._expected(job)
        self._decoding += 1
        self._depth += job.request.prompt + job.generated
        if (deadline := job.request.deadline) is not None:
            promised = job.promised - job.generated
            if promised > 0:
                self._push(promised, False, job)
            each = self._each()
            if each > 0:  # it stops in time
                until = (deadline - self._writing - self._now) / each
                left = min(left, max(1, math.ceil(until)))
        self._push(left, True, job)

    def _prefill(self, job: Job) -> None:
        """Compute its prompt beside what decodes; then it decodes."""
        tokens = job.prompt_left
        size = self._rules.chunk if self._decoding else self._rules.chunk_alone
        steps = max(1, -(-tokens // size))
        piece = Shape.chunk(job.prefilled, tokens)
        extra = self._prompt * piece.prompt + self._reach * piece.reach
        self._run(self._step + steps, extra / steps)
        self._decode(job)

    def _push(self, steps: int, leaves: bool, job: Job) -> None:
        heapq.heappush(self._events, (self._step + steps, job.request.key, leaves, job))

    def _each(self) -> float:
        return self._fixed + self._sequence * self._decoding + self._position * self._depth

    def _run(self, end: int, extra: float) -> None:
        """Steps up to number `end`, each with so many seconds of prefill."""
        while self._events and self._events[0][0] <= end:
            at, key, leaves, job = heapq.heappop(self._events)
            self._advance(at, extra)
            if leaves:
                self._decoding -= 1
                self._depth -= job.request.prompt + job.generated
                self._free += 1
                self._pages += job.request.pages
            elif job.request.deadline is not None:
                self._late[key] = self._now + self._writing - job.request.deadline
        self._advance(end, extra)

    def _advance(self, step: int, extra: float) -> None:
        self._now += (step - self._step) * (self._each() + extra)
        self._step = step
