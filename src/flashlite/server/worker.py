"""The engine's thread: takes requests, steps the scheduler, hands pieces to asyncio.

submit (event loop) -> inbox -> scheduler.step in this thread -> call_soon_threadsafe -> queue
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

__all__ = ["Worker"]


class _Job:
    """One generation and the queue that its pieces go to."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Piece | FlashliteError] = asyncio.Queue()

    def send(self, item: Piece | FlashliteError) -> None:
        """From the engine's thread; a loop that is closed no longer listens."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)


class Worker:
    """Runs one model's scheduler in a thread of its own until `close`.

    Only that thread touches the engine. The event loop never waits for a step: it appends to the
    scheduler's queue and to `_cancelled`, and wakes the thread.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._jobs: list[_Job] = []
        self._cancelled: deque[Generation] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="flashlite-engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> _Job:
        """Queue a request; read it with `follow`.

        Raises:
            ContextOverflow, UsageError: the request cannot be run.
            EngineError: the worker is closing.
        """
        if self._closing:
            raise EngineError("the server is shutting down")
        job = _Job(self.model.scheduler.submit(prompt, params))
        self._jobs.append(job)
        self._wake.set()
        return job

    async def follow(self, job: _Job) -> AsyncIterator[Piece]:
        """The pieces of a job; leaving the iteration early cancels it within one step.

        Raises:
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
            self._cancelled.append(job.generation)
            self._wake.set()

    def close(self) -> None:
        """Stop after the step in progress; unfinished jobs end as cancelled."""
        self._closing = True
        self._wake.set()
        self._thread.join()
        self.model.close()

    def _run(self) -> None:
        scheduler = self.model.scheduler
        while not self._closing:
            self._wake.clear()
            while self._cancelled:
                scheduler.cancel(self._cancelled.popleft())
            if scheduler.idle:
                self._deliver()
                self._wake.wait()
                continue
            try:
                scheduler.step()
            except FlashliteError as error:
                self._end_all(error)
            except MemoryError:
                self._end_all(MemoryCeiling("max_mem is reached; ask again when less is running"))
            self._deliver()
        self._end_all(EngineError("the server is shutting down"))

    def _end_all(self, error: FlashliteError) -> None:
        """An engine that fails, or closes, ends every job with the reason."""
        for job in self._jobs:
            self.model.scheduler.cancel(job.generation)
            job.send(error)
        self._jobs.clear()

    def _deliver(self) -> None:
        """Send what the step made; forget the jobs that ended."""
        for job in list(self._jobs):
            while job.generation.pieces:
                job.send(job.generation.pieces.popleft())
            if job.generation.finish_reason is not None:
                self._jobs.remove(job)
