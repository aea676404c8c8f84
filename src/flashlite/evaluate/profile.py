"""Where the time of a model goes: each part of each layer, for prefill and for decoding.

    profiled library -> marks of every step -> spans -> `Phase`: seconds, bytes and products by part

The same steps are taken by the normal library in turns, on the same weights, so that what the
marks cost is known (`Phase.overhead`). Nothing is estimated: the parts of the calling thread leave
no gap, so that they add up to the time of the step (`Phase.covered`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.artifact.format import Artifact
from flashlite.codegen.target import Target
from flashlite.compress.work import PARTS, Part, step_parts
from flashlite.errors import EvaluateError, UsageError
from flashlite.evaluate.marks import CALL
from flashlite.evaluate.steps import TURNS, Runner, Step, decode_in_turns
from flashlite.runtime.engine import Engine
from flashlite.runtime.library import MAX_BATCH, load_library
from flashlite.runtime.prepare import compile_artifact

__all__ = ["ORDER", "Line", "Phase", "Profile", "profile_steps"]

ORDER = (*PARTS, CALL)

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Line:
    """One part of one layer, per token of a prefill, or per step of decoding."""

    part: str  # of ORDER
    layer: int | None
    seconds: float
    waited: float  # of these, for other threads
    weight_bytes: float
    kv_bytes: float
    macs: float

    @property
    def gb_s(self) -> float:
        """Weights and KV cache read per second."""
        return (self.weight_bytes + self.kv_bytes) / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def gmac_s(self) -> float:
        """Multiply-accumulates per second."""
        return self.macs / self.seconds / 1e9 if self.seconds else 0.0


@dataclass(frozen=True)
class Phase:
    """Prefill or decoding, measured."""

    name: str
    tokens: int  # of the prompt; of decoding: steps
    depth: int  # tokens that are stored when it begins
    seconds: float  # per token, with marks
    normal: float  # per token, without
    lines: tuple[Line, ...]
    steps: tuple[Step, ...] = field(repr=False)  # for a trace

    @property
    def overhead(self) -> float:
        """What the marks cost: the time with them over the time without."""
        return self.seconds / self.normal

    @property
    def covered(self) -> float:
        """The share of the time that the parts add up to."""
        return sum(line.seconds for line in self.lines) / self.seconds

    def to_json(self) -> dict[str, Any]:
        """For `flashlite profile --json`."""
        return {
            "tokens": self.tokens,
            "depth": self.depth,
            "us_per_token": _us(self.seconds),
            "us_per_token_without_marks": _us(self.normal),
            "tokens_per_s": round(1 / self.normal, 2),
            "overhead": round(self.overhead, 4),
            "covered": round(self.covered, 4),
            "parts": [_line_json(line, self.seconds) for line in self.by_part()],
            "layers": [_line_json(line, self.seconds) for line in self.by_layer()],
            "lines": [_line_json(line, self.seconds) for line in self.lines],
        }

    def by_part(self) -> list[Line]:
        """All layers added up, in order of a step."""
        return [
            _add([line for line in self.lines if line.part == part], part, None)
            for part in ORDER
            if any(line.part == part for line in self.lines)
        ]

    def by_layer(self) -> list[Line]:
        """All parts of each layer added up."""
        layers = sorted({line.layer for line in self.lines if line.layer is not None})
        return [_add([one for one in self.lines if one.layer == i], "layer", i) for i in layers]


@dataclass(frozen=True)
class Profile:
    """What was measured of one model on this machine."""

    model: str
    artifact: str  # its digest
    isa: str
    threads: int
    read_gb_s: float  # the machine's
    dot_gmac_s: float | None
    lost: int  # marks that found no room
    prefill: Phase
    decode: Phase
    redundancy: tuple[float, ...] | None = None  # per layer, see `redundancy.py`

    def to_json(self) -> dict[str, Any]:
        """For `flashlite profile --json`; times in microseconds per token."""
        redundancy = None
        if self.redundancy is not None:
            redundancy = [round(value, 6) for value in self.redundancy]
        return {
            "model": self.model,
            "artifact": self.artifact,
            "isa": self.isa,
            "threads": self.threads,
            "limits": {"read_gb_s": _three(self.read_gb_s), "dot_gmac_s": _three(self.dot_gmac_s)},
            "lost_marks": self.lost,
            "prefill": self.prefill.to_json(),
            "decode": self.decode.to_json(),
            "redundancy": redundancy,
        }


def profile_steps(
    artifact: Artifact,
    weights: NDArray[np.uint8],
    target: Target,
    ids: NDArray[np.int32],
    *,
    prompt_tokens: int,
    decode: int,
    depth: int,
    threads: int,
    rounds: int = 3,
    exact_head: bool = False,
    report: Report = lambda done, total: None,
) -> tuple[Phase, Phase, int]:
    """Measure prefill and decoding of a compiled artifact, with marks and without in turns.

    Args:
        artifact: what to measure.
        weights: of `load_weights`.
        target: what it is compiled for.
        ids: the prompt, repeated as often as is needed.
        prompt_tokens: length of the prompt whose prefill is measured.
        decode: steps of decoding.
        depth: tokens stored before the first of them.
        threads: of the engine.
        rounds: prompts of each library, the median counts.
        exact_head: compute every logit, also where the model has a split head.
        report: told (rounds done, rounds in all).

    Returns:
        Prefill, decoding, and how many marks were lost.

    Raises:
        UsageError: a number is outside its range.
        FlashliteError: compiling or opening failed.
    """
    _check(artifact, len(ids), prompt_tokens, decode, depth)
    room = max(prompt_tokens, depth + decode)
    prompt = np.resize(ids, room).astype(np.int32)

    def open_engine(profile: bool) -> Engine:
        library = load_library(compile_artifact(artifact, target, profile=profile))
        return Engine(library, weights, max_tokens=room, threads=threads, exact_head=exact_head)

    total = rounds + TURNS + 1
    with open_engine(True) as profiled, open_engine(False) as normal:
        runners = [Runner(normal), Runner(profiled)]
        for runner in runners:  # warm up
            runner.prefill(prompt[: min(len(prompt), MAX_BATCH)])
        prefills: list[list[list[Step]]] = [[], []]
        for lap in range(rounds):
            report(lap, total)
            for runner, kept in zip(runners, prefills, strict=True):
                kept.append(runner.prefill(prompt[:prompt_tokens]))
        before = profiled.head_counts
        decoded = decode_in_turns(
            runners, prompt[:depth], decode, lambda done: report(rounds + 1 + done, total)
        )
        after = profiled.head_counts
        report(total, total)
        reader = runners[1].reader
        lost = 0 if reader is None else reader.lost
    screened = None
    if after.rows > before.rows:
        rows = after.rows - before.rows
        screened = (
            (after.estimated - before.estimated) / rows,
            (after.exact - before.exact) / rows,
        )
    parts = step_parts(artifact.spec, artifact.plan, exact_head=exact_head, screened=screened)
    return _prefill_phase(parts, prefills), _decode_phase(parts, decoded, depth), lost


def _check(artifact: Artifact, n_ids: int, prompt: int, decode: int, depth: int) -> None:
    most = artifact.spec.max_context
    for name, value in (("prompt", prompt), ("decode", decode), ("depth", depth)):
        if not 1 <= value <= most:
            raise UsageError(f"{name} is {value}, allowed 1 to {most}, the model's context")
    if depth + decode > most:
        raise UsageError(f"depth + decode is {depth + decode}, the model's context is {most}")
    if not n_ids:
        raise EvaluateError("the prompt to profile with is empty")


def _prefill_phase(parts: Sequence[Part], runs: Sequence[Sequence[list[Step]]]) -> Phase:
    def seconds(steps: Sequence[Step]) -> float:
        return (steps[-1].end - steps[0].start) / 1e9

    normal, profiled = runs
    by_time = sorted(profiled, key=seconds)
    chosen = by_time[len(by_time) // 2]
    tokens = sum(step.tokens for step in chosen)
    return Phase(
        "prefill",
        tokens,
        0,
        seconds(chosen) / tokens,
        statistics.median(map(seconds, normal)) / tokens,
        _lines(parts, chosen, tokens),
        tuple(chosen),
    )


def _decode_phase(parts: Sequence[Part], runs: Sequence[list[Step]], depth: int) -> Phase:
    """Means over the middle half of the steps by time, so that they add up."""

    def seconds(step: Step) -> float:
        return (step.end - step.start) / 1e9

    def middle(steps: Sequence[Step]) -> list[Step]:
        by_time = sorted(steps, key=seconds)
        return by_time[len(steps) // 4 : len(steps) - len(steps) // 4]

    normal, profiled = runs
    kept = middle(profiled)
    return Phase(
        "decode",
        len(profiled),
        depth,
        statistics.fmean(map(seconds, kept)),
        statistics.fmean(map(seconds, middle(normal))),
        _lines(parts, kept, len(kept)),
        tuple(profiled),
    )


def _lines(parts: Sequence[Part], steps: Sequence[Step], share: int) -> tuple[Line, ...]:
    """Every part of every layer, added up over the steps and divided by `share`."""
    taken: dict[tuple[str, int | None], list[float]] = {}
    for step in steps:
        for span in step.spans():
            sums = taken.setdefault((span.part, span.layer), [0.0, 0.0])
            sums[0] += (span.end - span.start) / 1e9
            sums[1] += span.waited / 1e9
    known = {(part.name, part.layer): part for part in parts}
    order = {key: i for i, key in enumerate(known)}
    lines = []
    for key in sorted(taken, key=lambda key: order.get(key, len(order))):
        time_, waited = taken[key]
        work = _work(known.get(key), steps)
        lines.append(Line(*key, time_ / share, waited / share, *(n / share for n in work)))
    return tuple(lines)


def _work(part: Part | None, steps: Sequence[Step]) -> tuple[float, float, float]:
    """Bytes of weights, bytes of KV cache and products of one part in all the steps."""
    if part is None:
        return 0.0, 0.0, 0.0
    weights = kv = macs = 0
    for step in steps:
        # The head takes the last token of a prompt alone, and no other step of it.
        tokens = step.tokens
        if part.name in ("head", "sampling"):
            tokens = int(step.end > step.returned)
        if not tokens:
            continue
        weights += part.weight_bytes(tokens)
        if part.heads:
            # Each run of queries reads what it sees once; the last query of a step sees most.
            kv += part.kv_bytes(step.position + step.tokens - 1)
        macs += part.macs(tokens, step.position)
    return float(weights), float(kv), float(macs)


def _add(lines: Sequence[Line], part: str, layer: int | None) -> Line:
    sums: Mapping[str, float] = {
        name: sum(getattr(line, name) for line in lines)
        for name in ("seconds", "waited", "weight_bytes", "kv_bytes", "macs")
    }
    return Line(part, layer, **sums)


def _line_json(line: Line, total: float) -> dict[str, Any]:
    return {
        "part": line.part,
        "layer": line.layer,
        "us": _us(line.seconds),
        "waited_us": _us(line.waited),
        "share": round(line.seconds / total, 5),
        "weight_bytes": round(line.weight_bytes),
        "kv_bytes": round(line.kv_bytes),
        "macs": round(line.macs),
        "gb_s": _three(line.gb_s),
        "gmac_s": _three(line.gmac_s),
    }


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _three(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
