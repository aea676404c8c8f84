"""Between requests and one model's scheduler: who runs follows from deadlines and what steps took.

    take -> admitted or refused -> next_batch -> Scheduler.step -> learned

All of it runs in the engine's thread, but for `prepare`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from flashlite.errors import Overloaded
from flashlite.runtime.grammar import Grammar
from flashlite.runtime.kvpages import pages_for
from flashlite.runtime.sampling import SamplingParams
from flashlite.runtime.scheduler import CHUNK_BESIDE_DECODE, Generation, Scheduler
from flashlite.server.deadlines import Deadlines, Progress, Reject
from flashlite.server.foresight import Request, Rules
from flashlite.server.pace import Pace, Shape

__all__ = ["Dispatch", "Ticket"]

_WARM_UP = ((32,), (320, 100, 20))  # tokens of prompts that are answered together
_WARM_UP_ANSWER = 6  # tokens


class Ticket:
    """One generation on its way through a `Dispatch`."""

    def __init__(self, generation: Generation, request: Request) -> None:
        self.generation = generation
        self.request = request
        self.refused: Overloaded | None = None

    @property
    def ended(self) -> bool:
        """Nothing more will come of it."""
        return self.refused is not None or self.generation.finish_reason is not None


class _Seen(NamedTuple):
    """A running generation before a step."""

    ticket: Ticket
    prefilled: int
    cached: int
    generated: int
    depth: int


class Dispatch:
    """Runs one scheduler by the deadlines of its requests; call `step` until `idle`."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        rules: Rules | None = None,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`pace`: what is known of the engine's steps; None: a few are made and measured now."""
        self._scheduler = scheduler
        self._clock = clock
        slots = scheduler.engine.max_sequences
        pages = scheduler.engine.pool.n_pages
        rules = rules or Rules(slots, pages, chunk=CHUNK_BESIDE_DECODE)
        self.deadlines = Deadlines(pace or Pace(), rules)
        self._tickets: dict[int, Ticket] = {}  # admitted
        self._running: dict[int, Ticket] = {}  # given to the scheduler
        self._keys = itertools.count()
        self._ended: float | None = None  # when the last step was over; None: then all was idle
        if pace is None:
            self._warm_up()

    @property
    def idle(self) -> bool:
        """Nobody waits and nobody runs."""
        return not self._tickets

    @property
    def load(self) -> tuple[int, int]:
        """Requests (running, waiting)."""
        return self.deadlines.load

    def prepare(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        grammar: Grammar | None = None,
        *,
        client: str = "",
        arrived: float | None = None,
        deadline: float | None = None,
    ) -> Ticket:
        """Check a request; any thread may. `take` it next.

        Args:
            prompt: token ids.
            params: how to draw.
            grammar: what the answer must be, of this model's vocabulary.
            client: who shares the server: the id of a key, or an address.
            arrived: when its head was read, in seconds of the clock; None: now.
            deadline: when its last byte must be written; None: best effort.

        Raises:
            ContextOverflow, MemoryCeiling, UsageError: the request cannot be run.
        """
        generation = self._scheduler.prepare(prompt, params, grammar, client=client)
        at = self._clock() if arrived is None else arrived
        key, n = next(self._keys), len(prompt)
        pages = pages_for(n + generation.room)
        return Ticket(generation, Request(key, client, n, generation.room, at, deadline, pages))

    def take(self, ticket: Ticket) -> None:
        """Admit or refuse it."""
        answer = self.deadlines.admit(self._clock(), ticket.request)
        if isinstance(answer, Reject):
            ticket.refused = Overloaded(answer.reason, answer.retry_after)
        else:
            self._tickets[ticket.request.key] = ticket

    def cancel(self, ticket: Ticket) -> None:
        """End it before the next step; one that has ended stays as it is."""
        if self._tickets.pop(ticket.request.key, None) is not None:
            self._running.pop(ticket.request.key, None)
            self.deadlines.finish(ticket.request.key)
            self._scheduler.cancel(ticket.generation)

    def step(self) -> None:
        """End what must end, start what may start, run one engine step."""
        begun = self._clock()
        for end in self.deadlines.expired(begun):
            ticket = self._tickets.pop(end.key)
            self._running.pop(end.key, None)
            if end.refused is not None:
                ticket.refused = Overloaded(end.refused.reason, end.refused.retry_after)
            self._scheduler.cancel(ticket.generation, "deadline")
        free = self.deadlines.rules.slots - len(self._running)
        for request in self.deadlines.next_batch(begun, free):
            ticket = self._running[request.key] = self._tickets[request.key]
            self._scheduler.enqueue(ticket.generation)
        seen = [_seen(ticket) for ticket in self._running.values()]
        self._scheduler.step()
        ended = self._clock()
        # What is done between steps is part of their pace.
        self._learn(seen, ended - (begun if self._ended is None else self._ended))
        self._ended = ended if self._running else None

    def _learn(self, seen: Sequence[_Seen], seconds: float) -> None:
        """What the step computed, from what it changed."""
        shape = np.zeros(4)
        progress = {}
        for before in seen:
            generation = before.ticket.generation
            if before.generated:
                shape += (0, 0, 1, before.depth)
                done = before.prefilled
            else:
                done = len(generation.prompt) if generation.generated else generation.prefilled
                computed = done - before.prefilled - (generation.cached_tokens - before.cached)
                shape += (*Shape.chunk(done - computed, max(computed, 0))[:2], 0, 0)
            progress[before.ticket.request.key] = Progress(done, len(generation.generated))
        if shape.any():
            self.deadlines.stepped(Shape(*shape.tolist()), seconds, progress)
        for before in seen:
            key, generation = before.ticket.request.key, before.ticket.generation
            if generation.finish_reason is not None:
                del self._running[key], self._tickets[key]
                self.deadlines.finish(key, tokens=len(generation.generated))

    def _warm_up(self) -> None:
        """Answer a few prompts of no meaning; nothing of them is kept."""
        cached, self._scheduler.prefix_cache = self._scheduler.prefix_cache, False
        most = self._scheduler.max_tokens - _WARM_UP_ANSWER
        params = SamplingParams(temperature=0, max_tokens=_WARM_UP_ANSWER)
        draw = np.random.default_rng(0)
        for together in _WARM_UP:
            for tokens in together:
                size = max(1, min(tokens, most))
                ids = draw.integers(0, self._scheduler.engine.vocab_size, size)
                self.take(self.prepare(ids.tolist(), params))
            while not self.idle:
                self.step()
        self._scheduler.prefix_cache = cached
        self.deadlines = Deadlines(
            self.deadlines.pace, self.deadlines.rules
        )  # answers meant nothing


def _seen(ticket: Ticket) -> _Seen:
    generation = ticket.generation
    depth = 0 if generation.sequence is None else generation.sequence.length
    return _Seen(
        ticket,
        generation.prefilled,
        generation.cached_tokens,
        len(generation.generated),
        depth,
    )
