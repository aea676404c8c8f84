"""Speed and memory of engines that take turns on one machine.

A measure is `ppN`, prefill of N tokens, or `tgN@D`, N greedy steps after D tokens. In each round
every engine measures each measure once, all on the same ids; ids are random, drawn fresh for each
timing, so that no cache of prefixes helps anyone.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from flashlite.errors import UsageError
from flashlite.evaluate.process import Measurer

__all__ = ["Contender", "Figures", "Measure", "choose_measures", "compare", "ratios"]


@dataclass(frozen=True)
class Measure:
    """What is timed: a prefill when `steps` is 0, else decoding at a depth."""

    prompt: int  # tokens
    steps: int = 0

    @property
    def name(self) -> str:
        """`pp512` or `tg128@16`."""
        return f"tg{self.steps}@{self.prompt}" if self.steps else f"pp{self.prompt}"

    @property
    def tokens(self) -> int:
        """Positions of context it needs."""
        return self.prompt + self.steps

    def rate(self, measurer: Measurer, ids: Sequence[int]) -> float:
        """Tokens per second, once."""
        if self.steps:
            return self.steps / measurer.decode(ids, self.steps)
        return self.prompt / measurer.prefill(ids)


@dataclass(frozen=True)
class Contender:
    """An engine to measure: how its process starts and what it opens."""

    name: str
    command: Sequence[str]
    model: Path


@dataclass(frozen=True)
class Figures:
    """What was measured of one engine."""

    open_seconds: float
    peak_bytes: int
    samples: Mapping[str, list[float]] = field(default_factory=dict)  # tokens/s, by measure

    @property
    def medians(self) -> dict[str, float]:
        """Tokens per second, by measure."""
        return {name: statistics.median(values) for name, values in self.samples.items()}


def choose_measures(max_context: int, extra_prefill: int | None = None) -> list[Measure]:
    """The usual measures, and one more prefill, as far as the model's context reaches.

    Raises:
        UsageError: `extra_prefill` is outside 1 .. `max_context`.
    """
    usual = [Measure(512), Measure(2048), Measure(16, 128), Measure(1024, 128)]
    measures = [measure for measure in usual if measure.tokens <= max_context]
    if extra_prefill is not None:
        if not 1 <= extra_prefill <= max_context:
            raise UsageError(f"prefill is {extra_prefill}, allowed 1 to {max_context}")
        if Measure(extra_prefill) not in measures:
            measures.insert(sum(not m.steps for m in measures), Measure(extra_prefill))
    if not measures:
        raise UsageError(f"the context holds {max_context} tokens, too few to measure anything")
    return measures


def compare(
    contenders: Sequence[Contender],
    measures: Sequence[Measure],
    ids: Sequence[int],
    *,
    threads: int,
    rounds: int,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Figures]:
    """Measure the contenders in turns.

    Args:
        ids: the tokens that prompts are drawn from.
        threads: of each engine.
        rounds: timings of each measure, after one that warms up and is not kept.
        report: told (timings done, timings in all).

    Returns:
        Figures by name, in the order given.

    Raises:
        EvaluateError: an engine failed.
    """
    draw = random.Random(seed)  # noqa: S311 - prompts, not secrets
    # Engines allot their context in steps of 256.
    context = -(-max(measure.tokens for measure in measures) // 256) * 256
    samples: dict[str, dict[str, list[float]]] = {
        c.name: {m.name: [] for m in measures} for c in contenders
    }
    timings = [(lap, measure) for lap in range(rounds) for measure in measures]
    with ExitStack() as processes:
        running = [processes.enter_context(Measurer(c.name, c.command)) for c in contenders]
        opened = {
            measurer.name: measurer.open(contender.model, threads=threads, context=context)
            for measurer, contender in zip(running, contenders, strict=True)
        }
        for measurer in running:
            measurer.decode(draw.choices(ids, k=measures[0].prompt // 4 + 1), 4)
        for done, (lap, measure) in enumerate(timings):
            report(done, len(timings))
            prompt = draw.choices(ids, k=measure.prompt)
            first = lap % len(running)  # nobody always comes first
            for measurer in running[first:] + running[:first]:
                samples[measurer.name][measure.name].append(measure.rate(measurer, prompt))
        report(len(timings), len(timings))
        peaks = {measurer.name: measurer.peak_memory() for measurer in running}
    return {name: Figures(opened[name], peaks[name], taken) for name, taken in samples.items()}


def ratios(figures: Mapping[str, Figures], ours: str) -> dict[str, dict[str, float]]:
    """Our median speed over each peer's, by measure and peer: more is better."""
    mine = figures[ours].medians
    return {
        measure: {
            name: speed / peer.medians[measure] for name, peer in figures.items() if name != ours
        }
        for measure, speed in mine.items()
    }
