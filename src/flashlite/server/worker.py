"""The engine's thread: takes requests, steps the scheduler, hands pieces to asyncio.

Stream.add (event loop) -> inbox -> dispatch.step in this thread -> call_soon_threadsafe -> Stream
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import TypeAlias

from flashlite.errors import EngineError, FlashliteError, MemoryCeiling
from flashlite.runtime.generation import Generation, Piece
from flashlite.runtime.grammar import Grammar
from flashlite.runtime.model import Model
from flashlite.runtime.sampling import SamplingParams
from flashlite.server.dispatch import Dispatch, Ticket

__all__ = ["Stream", "Worker"]

_Item: TypeAlias = Piece | FlashliteError


class _Job:
    """One generation, and where its pieces go."""

    def __init__(self, stream: Stream, choice: int, ticket: Ticket) -> None:
        self.stream = stream
        self.choice = choice
        self.ticket = ticket

    def take(self) -> list[_Item]:
        """What is there and was not sent."""
        if self.ticket.refused is not None:
            return [self.ticket.refused]
        generation, items = self.ticket.generation, list[_Item]()
        while generation.pieces:
            items.append(generation.pieces.popleft())
        if generation.error is not None:
            items.append(generation.error)
        return items


class Stream:
    """The choices of one request; leaving it cancels what is unfinished within one step.

    Example:
        with worker.open() as stream:
            stream.add(ids, params)
            async for choice, piece in stream:
                print(choice, piece.text)
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, _Item]] = asyncio.Queue()
        self._jobs: list[_Job] = []
        self._open = 0

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        grammar: Grammar | None = None,
        *,
        client: str = "",
        arrived: float | None = None,
        deadline: float | None = None,
    ) -> Generation:
        """Queue one more choice. The arguments are those of `Dispatch.prepare`.

        Raises:
            ContextOverflow, UsageError: the request cannot be run.
            EngineError: the worker is closing.
        """
        ticket = self._worker.dispatch.prepare(
            prompt, params, grammar, client=client, arrived=arrived, deadline=deadline
        )
        job = _Job(self, len(self._jobs), ticket)
        self._jobs.append(job)
        self._open += 1
        self._worker.take(job)
        return ticket.generation

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all choices as they come, until each has its last.

        Raises:
            Overloaded: a choice would come too late; nothing of it was generated.
            FlashliteError: the engine failed, or a grammar led nowhere.
        """
        while self._open:
            choice, item = await self._queue.get()
            if isinstance(item, FlashliteError):
                raise item
            if item.finish_reason == "error":  # what went wrong follows
                continue
            self._open -= item.finish_reason is not None
            yield choice, item

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        for job in self._jobs:
            self._worker.cancel(job.ticket)

    def _push(self, items: Sequence[tuple[Stream, int, _Item]]) -> None:
        """From the engine's thread; a loop that is closed no longer listens."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_put, items)


def _put(items: Sequence[tuple[Stream, int, _Item]]) -> None:
    for stream, choice, item in items:
        stream._queue.put_nowait((choice, item))


class Worker:
    """Runs one model's scheduler in a thread of its own until `close`.

    Only that thread touches the engine. The event loop never waits for a step: it appends to the
    queues below, and wakes the thread. All of a step's pieces go to the loop in one call.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.dispatch = Dispatch(model.scheduler)
        self._jobs: list[_Job] = []
        self._submitted: deque[_Job] = deque()
        self._cancelled: deque[Ticket] = deque()
        self._written: deque[float] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="flashlite-engine", daemon=True)
        self._thread.start()

    def open(self) -> Stream:
        """For one request, in the event loop that reads it."""
        return Stream(self)

    def take(self, job: _Job) -> None:
        """Queue a stream's choice.

        Raises:
            EngineError: the worker is closing.
        """
        if self._closing:
            raise EngineError("the server is shutting down")
        self._submitted.append(job)
        self._wake.set()

    def cancel(self, ticket: Ticket) -> None:
        """End it before the next step; one that has ended stays as it is."""
        if not ticket.ended:
            self._cancelled.append(ticket)
            self._wake.set()

    def note_written(self, seconds: float) -> None:
        """What passed from the end of an answer to its last byte."""
        self._written.append(seconds)

    def close(self) -> None:
        """Stop after the step in progress; unfinished answers end with an error."""
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        dispatch = self.dispatch
        while not self._closing:
            self._wake.clear()
            while self._written:
                dispatch.deadlines.writing.note(self._written.popleft())
            while self._submitted:
                self._jobs.append(self._submitted.popleft())
                dispatch.take(self._jobs[-1].ticket)
            while self._cancelled:
                dispatch.cancel(self._cancelled.popleft())
            if dispatch.idle:
                self._deliver()
                self._wake.wait()
                continue
            try:
                dispatch.step()
            except FlashliteError as error:
                self._end_all(error)
            except MemoryError:
                self._end_all(MemoryCeiling("max_mem is reached; ask again when less is running"))
            self._deliver()
        self._end_all(EngineError("the server is shutting down"))

    def _end_all(self, error: FlashliteError) -> None:
        """An engine that fails, or closes, ends every job with the reason."""
        for job in [*self._jobs, *self._submitted]:
            self.dispatch.cancel(job.ticket)
            job.stream._push([(job.stream, job.choice, error)])
        self._jobs.clear()
        self._submitted.clear()

    def _deliver(self) -> None:
        """Send what the step made; forget the jobs that ended."""
        ended = [job for job in self._jobs if job.ticket.ended]
        items = [(job.stream, job.choice, item) for job in self._jobs for item in job.take()]
        if items:
            items[0][0]._push(items)
        self._jobs = [job for job in self._jobs if job not in ended] if ended else self._jobs
