"""Steps of an engine with their marks: prompts and decoding, by several libraries in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flashlite.evaluate.marks import CALL, MarkReader, Span, spans_of
from flashlite.runtime.engine import Engine, Sequence, Work
from flashlite.runtime.library import MAX_BATCH
from flashlite.runtime.sampler import Sampler
from flashlite.runtime.sampling import SamplingParams

__all__ = ["TURNS", "Runner", "Step", "decode_in_turns"]

TURNS = 4  # decoding changes between the libraries so many times


@dataclass(frozen=True)
class Step:
    """One call of the engine with what came of it, on the monotonic clock, in nanoseconds."""

    tokens: int
    position: int  # of the first of them
    start: int
    returned: int  # the logits were there
    end: int  # and a token was drawn, where one was
    marks: Seq[NDArray[np.void]] = field(repr=False)  # by thread; none by the normal library

    def spans(self) -> list[Span]:
        """The calling thread's whole step without a gap: call, parts, call, sampling."""
        spans = spans_of(self.marks[0])
        if not spans:
            return [Span(CALL, None, self.start, self.returned)]
        found = [Span(CALL, None, self.start, spans[0].start), *spans]
        found.append(Span(CALL, None, spans[-1].end, self.returned))
        if self.end > self.returned:
            found.append(Span("sampling", None, self.returned, self.end))
        return found


class Runner:
    """One engine on the way through prompts and steps; keeps the marks where it has some."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.reader = MarkReader(engine) if engine.library.profiles else None
        self._scratch = np.empty(engine.vocab_size, np.uint64)

    def prefill(self, ids: NDArray[np.int32]) -> list[Step]:
        """A prompt on an empty sequence, to the token after it."""
        timeline = self.engine.new_sequence(len(ids))
        steps, _ = self.append(timeline, ids, self.sampler())
        timeline.release()
        return steps

    def append(
        self, timeline: Sequence, ids: NDArray[np.int32], sampler: Sampler | None
    ) -> tuple[list[Step], int]:
        """A prompt behind what the sequence holds; the sampler draws the token after it."""
        last = (len(ids) - 1) // MAX_BATCH * MAX_BATCH
        steps = [
            self._step(timeline, ids[at : at + MAX_BATCH], None)[0]
            for at in range(0, last, MAX_BATCH)
        ]
        step, token = self._step(timeline, ids[last:], sampler)
        return [*steps, step], token

    def decode(self, timeline: Sequence, ids: NDArray[np.int32], sampler: Sampler) -> list[Step]:
        """One step per id; what is drawn is thrown away, so that all engines do the same."""
        return [self._step(timeline, ids[i : i + 1], sampler)[0] for i in range(len(ids))]

    def write(self, timeline: Sequence, token: int, n: int, sampler: Sampler) -> list[int]:
        """`n` tokens that the model writes after one."""
        found = [token]
        for _ in range(n):
            found.append(self._step(timeline, np.array(found[-1:], np.int32), sampler)[1])
        return found

    def sampler(self) -> Sampler:
        """One that takes the likeliest token."""
        params, none = SamplingParams(temperature=0.0), np.zeros(0, np.int32)
        return Sampler(self.engine.library, params, none, 0, self._scratch)

    def _step(
        self, timeline: Sequence, ids: NDArray[np.int32], sampler: Sampler | None
    ) -> tuple[Step, int]:
        position, token = timeline.length, 0
        work = [Work(timeline, ids, "none" if sampler is None else "last", "largest")]
        start = time.perf_counter_ns()
        logits = self.engine.step(work)
        returned = end = time.perf_counter_ns()
        if sampler is not None:
            token = sampler.draw(logits[0]).token
            end = time.perf_counter_ns()
        marks = self.reader.take() if self.reader is not None else ()
        return Step(len(ids), position, start, returned, end, marks), token


def decode_in_turns(
    runners: Seq[Runner],
    prompt: NDArray[np.int32],
    n: int,
    report: Callable[[int], None],
) -> list[list[Step]]:
    """`n` steps of each runner after the prompt, all on the tokens that the first one writes."""
    normal = runners[0]
    timeline = normal.engine.new_sequence(len(prompt) + n)
    sampler = normal.sampler()
    _, token = normal.append(timeline, prompt, sampler)
    written = np.array(normal.write(timeline, token, n - 1, sampler), np.int32)
    timeline.truncate(len(prompt))
    timelines = [timeline]
    for runner in runners[1:]:
        timelines.append(runner.engine.new_sequence(len(prompt) + n))
        runner.append(timelines[-1], prompt, None)
    found: list[list[Step]] = [[] for _ in runners]
    samplers = [runner.sampler() for runner in runners]
    for block in range(TURNS):
        report(block)
        part = written[n * block // TURNS : n * (block + 1) // TURNS]
        for runner, line, draws, kept in zip(runners, timelines, samplers, found, strict=True):
            kept += runner.decode(line, part, draws)
    for line in timelines:
        line.release()
    return found
