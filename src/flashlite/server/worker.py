"""The engine's thread: takes requests, steps the scheduler, hands pieces to asyncio.

submit (event loop) -> inbox -> dispatch.step in this thread -> call_soon_threadsafe -> queue
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence

from flashlite.errors import EngineError, FlashliteError, MemoryCeiling
from flashlite.runtime.model import Model
from flashlite.runtime.sampling import SamplingParams
from flashlite.runtime.scheduler import Generation, Piece
from flashlite.server.dispatch import Dispatch, Ticket

__all__ = ["Worker"]


class _Job:
    """One generation and the queue that its pieces go to."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Piece | FlashliteError] = asyncio.Queue()

    @property
    def generation(self) -> Generation:
        """What it generates."""
        return self.ticket.generation

    def send(self, item: Piece | FlashliteError) -> None:
        """From the engine's thread; a loop that is closed no longer listens."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)


class Worker:
    """Runs one model's scheduler in a thread of its own until `close`.

    Only that thread touches the engine. The event loop never waits for a step: it appends to the
    queues below, and wakes the thread.
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

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        client: str = "",
        arrived: float | None = None,
        deadline: float | None = None,
    ) -> _Job:
        """Queue a request; read it with `follow`. The arguments are those of `Dispatch.prepare`.

        Raises:
            ContextOverflow, UsageError: the request cannot be run.
            EngineError: the worker is closing.
        """
        if self._closing:
            raise EngineError("the server is shutting down")
        ticket = self.dispatch.prepare(
            prompt, params, client=client, arrived=arrived, deadline=deadline
        )
        job = _Job(ticket)
        self._submitted.append(job)
        self._wake.set()
        return job

    async def follow(self, job: _Job) -> AsyncIterator[Piece]:
        """The pieces of a job; leaving the iteration early cancels it within one step.

        Raises:
            Overloaded: the answer would come too late; nothing was generated.
            FlashliteError: the engine failed.
        """
        try:
            while True:
                item = await job.queue.get()
                if isinstance(item, FlashliteError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._cancelled.append(job.ticket)
            self._wake.set()

    def note_written(self, seconds: float) -> None:
        """What passed from the end of an answer to its last byte."""
        self._written.append(seconds)

    def close(self) -> None:
        """Stop after the step in progress; unfinished jobs end as cancelled."""
        self._closing = True
        self._wake.set()
        self._thread.join()
        self.model.close()

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
            job.send(error)
        self._jobs.clear()
        self._submitted.clear()

    def _deliver(self) -> None:
        """Send what the step made; forget the jobs that ended."""
        for job in list(self._jobs):
            if job.ticket.refused is not None:
                job.send(job.ticket.refused)
            else:
                while job.generation.pieces:
                    job.send(job.generation.pieces.popleft())
            if job.ticket.ended:
                self._jobs.remove(job)
