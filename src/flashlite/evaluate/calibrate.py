"""Measure a machine: probe models of random weights run in a profiled library, part by part.

Probes of no real model's shape tell apart what a part's time is made of:

    wide    layers of every format in turns, more than caches hold: bytes and products per second,
            and what reading the KV cache adds to attention
    narrow  attention on what caches hold, with heads of 64 channels
    broad   and of 256: together, what it computes per position and per channel of it
    tiny    hardly any work: what calls, barriers and waking threads take
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flashlite.codegen.target import Target
from flashlite.codegen.toolchain import kernels_digest
from flashlite.compress.latency import CALL, attend_share
from flashlite.compress.machine_profile import BATCHES, MachineProfile, Rates
from flashlite.compress.plan import PACKED
from flashlite.compress.work import Part, step_parts
from flashlite.evaluate.limits import dot_rate, gather_rate, read_rate
from flashlite.evaluate.machine import describe_machine
from flashlite.evaluate.probe_model import Probe, make_probe
from flashlite.evaluate.steps import Runner, Step
from flashlite.model.spec import ModelSpec
from flashlite.runtime.engine import Engine
from flashlite.runtime.library import load_library
from flashlite.runtime.prepare import compile_artifact
from flashlite.runtime.sampler import Sampler
from flashlite.runtime.sampling import SamplingParams

__all__ = ["measure_machine"]

_DEPTH = 512
_STEPS = 32  # of one token
_REPEATS = {size: 9 if size < 64 else 5 for size in BATCHES}
_LAYERS_EACH = 5  # of every format: far more bytes than a cache holds

_Times = Mapping[tuple[str, int | None], float]  # seconds, by part and layer


@dataclass(frozen=True)
class _Taken:
    """The times of one probe: steps of one token, and of several by their number."""

    parts: Mapping[tuple[str, int | None], Part]
    one: _Times
    position: int  # of the one token, in the middle of its steps
    many: Mapping[int, _Times]

    def of(self, name: str) -> Iterable[Part]:
        return (part for part in self.parts.values() if part.name == name)


def measure_machine(
    target: Target,
    threads: Sequence[int],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> MachineProfile:
    """Measure the machine at hand.

    Args:
        target: with the instruction set to use.
        threads: the numbers of threads to measure.
        report: told (probes done, probes in all).

    Raises:
        FlashliteError: a probe cannot be compiled or opened here.
    """
    shapes = _probe_shapes()
    probes = {name: make_probe(name, spec, formats) for name, (spec, formats) in shapes.items()}
    rates, done, total = [], 0, len(threads) * len(probes)
    for n in threads:
        taken = {}
        for name, probe in probes.items():
            report(done, total)
            sizes = BATCHES if name == "wide" else (BATCHES[-1],)
            taken[name] = _run(probe, target, n, sizes)
            done += 1
        rates.append(_rates(taken, target, n, _draw_seconds(probes["tiny"], target)))
    report(total, total)
    cpu = str(describe_machine()["cpu"])
    return MachineProfile(cpu, target.isa, kernels_digest(target), tuple(rates))


def _probe_shapes() -> dict[str, tuple[ModelSpec, Sequence[str]]]:
    def spec(**sizes: int) -> ModelSpec:
        return ModelSpec(
            family="llama",
            max_context=1024,
            norm_eps=1e-5,
            rope_theta=10000.0,
            tied_head=True,
            activation="silu",
            **sizes,  # type: ignore[arg-type]
        )

    wide = spec(
        n_layers=_LAYERS_EACH * len(PACKED),
        d_model=768,
        n_heads=12,
        n_kv_heads=4,
        head_dim=64,
        d_ff=2048,
        vocab_size=32768,
    )
    small = {"n_layers": 4, "d_model": 256, "d_ff": 256, "vocab_size": 512}
    narrow = spec(**small, n_heads=6, n_kv_heads=2, head_dim=64)
    broad = spec(**small, n_heads=4, n_kv_heads=1, head_dim=256)
    tiny = spec(
        n_layers=8, d_model=64, n_heads=2, n_kv_heads=2, head_dim=32, d_ff=64, vocab_size=64
    )
    return {
        "wide": (wide, PACKED),
        "narrow": (narrow, PACKED[:1]),
        "broad": (broad, PACKED[:1]),
        "tiny": (tiny, PACKED[:1]),
    }


def _run(probe: Probe, target: Target, threads: int, sizes: Sequence[int]) -> _Taken:
    ids = np.random.default_rng(0).integers(0, probe.artifact.spec.vocab_size, 1024)
    prompt = ids.astype(np.int32)
    deep = _DEPTH if probe.artifact.spec.vocab_size > 64 else 1
    library = load_library(compile_artifact(probe.artifact, target, profile=True))
    with Engine(library, probe.weights, max_tokens=1024, threads=threads) as engine:
        runner = Runner(engine)
        many = {}
        for size in sizes:
            runs = [runner.prefill(prompt[:size]) for _ in range(1 + _REPEATS[size])]
            many[size] = _typical([run[-1] for run in runs[1:]])
        timeline = engine.new_sequence(deep + _STEPS)
        runner.append(timeline, prompt[:deep], None)
        steps = runner.decode(timeline, prompt[:_STEPS], runner.sampler())
        timeline.release()
    parts = {(part.name, part.layer): part for part in step_parts(probe.artifact.spec, probe.plan)}
    return _Taken(parts, _typical(steps), deep + _STEPS // 2, many)


def _typical(steps: Sequence[Step]) -> _Times:
    """The lower quartile of each: another program that takes the core for a while only adds."""
    samples: dict[tuple[str, int | None], list[float]] = {}
    for step in steps:
        sums: dict[tuple[str, int | None], float] = {}
        for span in step.spans():
            key = (span.part, span.layer)
            sums[key] = sums.get(key, 0.0) + (span.end - span.start) / 1e9
        for key, seconds in sums.items():
            samples.setdefault(key, []).append(seconds)
    return {key: float(np.quantile(values, 0.25)) for key, values in samples.items()}


def _rates(taken: Mapping[str, _Taken], target: Target, threads: int, drawn: float) -> Rates:
    """`drawn`: seconds per logit of drawing the likeliest."""
    wide, tiny = taken["wide"], taken["tiny"]
    fixed = _fixed(tiny)
    # The interpreter's part of a step is slower where weights have passed through the caches.
    fixed[CALL] = wide.one[CALL, None]
    fixed["sampling"] = max(
        wide.one["sampling", None] - drawn * wide.parts["sampling", None].elements, 0.0
    )
    formats = {part.layer: part.matrices[0].format for part in wide.of("qkv")}

    def rate(fmt: str, times: _Times, work: Callable[[Part], float]) -> float:
        """Of the parts that are products alone."""
        done = seconds = 0.0
        for name in ("qkv", "gate_up"):
            for part in wide.of(name):
                if formats[part.layer] == fmt:
                    done += work(part)
                    seconds += max(times[name, part.layer] - fixed[name], 1e-9)
        return done / seconds / 1e9

    gemv: dict[str, float] = {
        fmt: rate(fmt, wide.one, lambda part: part.matrix_bytes) for fmt in PACKED
    }
    gemm: dict[str, dict[int, float]] = {
        fmt: {
            size: rate(fmt, times, lambda part, size=size: part.macs(size))  # type: ignore[misc]
            for size, times in wide.many.items()
        }
        for fmt in PACKED
    }
    read, largest = read_rate(target, threads), BATCHES[-1]
    elements = {}
    for name in ("embed", "attn_norm", "rope_store", "o", "ffn_norm", "activation", "down"):
        pair = []
        for size, times in ((1, wide.one), (largest, wide.many[largest])):
            rest = numbers = 0.0
            for part in wide.of(name):
                seconds = times[name, part.layer] - fixed[name]
                for matrix in part.matrices:
                    if size == 1:
                        seconds -= matrix.nbytes / gemv[matrix.format] / 1e9
                    else:
                        seconds -= matrix.macs * size / gemm[matrix.format][size] / 1e9
                rest += seconds
                numbers += part.elements * size
            pair.append(max(rest / numbers * 1e9, 0.0))
        elements[name] = (pair[0], pair[1])
    elements["sampling"] = elements["head"] = (drawn * 1e9, drawn * 1e9)
    attend = (
        _attention(taken, fixed["attention"], threads, 1),
        _attention(taken, fixed["attention"], threads, largest),
    )
    return Rates(
        threads,
        read,
        dot_rate(target, threads),
        gather_rate(target, threads),
        _kv_rate(wide, fixed["attention"], attend[0], threads),
        gemv,
        gemm,
        {name: seconds * 1e6 for name, seconds in fixed.items()},
        elements,
        attend,
    )


def _draw_seconds(probe: Probe, target: Target) -> float:
    """Seconds per logit of drawing the likeliest: of a large vocabulary less those of a small."""
    library = load_library(compile_artifact(probe.artifact, target, profile=True))
    rng, times = np.random.default_rng(0), []
    sizes = (1 << 15, 1 << 18)
    for size in sizes:
        logits = rng.normal(0, 1, size).astype(np.float32)
        params, none = SamplingParams(temperature=0.0), np.zeros(0, np.int32)
        sampler = Sampler(library, params, none, 0, np.empty(size, np.uint64))
        samples = []
        for _ in range(16):
            start = time.perf_counter()
            sampler.draw(logits)
            samples.append(time.perf_counter() - start)
        times.append(float(np.quantile(samples, 0.25)))
    return max(times[1] - times[0], 0.0) / (sizes[1] - sizes[0])


def _fixed(tiny: _Taken) -> dict[str, float]:
    by_name: dict[str, list[float]] = {}
    for (name, _), seconds in tiny.one.items():
        by_name.setdefault(name, []).append(seconds)
    found = {name: statistics.median(values) for name, values in by_name.items()}
    found.setdefault(CALL, 0.0)
    return found


def _attention(
    taken: Mapping[str, _Taken], fixed: float, threads: int, tokens: int
) -> tuple[float, float]:
    """Nanoseconds per position and query head, and what each channel adds: two probes, two
    unknowns. Where they make no sense together, all of it counts by channel.
    """
    times = []
    for name in ("narrow", "broad"):
        probe = taken[name]
        part, seconds = _attended(probe, tokens)
        first = probe.position if tokens == 1 else 0
        work = part.head_positions(first, tokens) * attend_share(part, threads, tokens)
        times.append((part.head_dim, max(seconds - fixed, 0.0) / work * 1e9))
    (narrow, short), (broad, long) = times
    channel = (long - short) / (broad - narrow)
    position = short - channel * narrow
    if channel < 0 or position < 0:
        return 0.0, (short / narrow + long / broad) / 2
    return position, channel


def _kv_rate(wide: _Taken, fixed: float, attend: tuple[float, float], threads: int) -> float:
    """GB/s of what attention on cold pages takes beyond its computing."""
    part, seconds = _attended(wide, 1)
    share = attend_share(part, threads, 1)
    position, channel = attend
    seen = part.head_positions(wide.position, 1)
    work = seen * (position + channel * part.head_dim) * share / 1e9
    rest = max(seconds - fixed - work, 0.05 * seconds)
    return part.kv_bytes(wide.position) * share / rest / 1e9


def _attended(probe: _Taken, tokens: int) -> tuple[Part, float]:
    """A layer's attention, and its seconds."""
    times = probe.one if tokens == 1 else probe.many[tokens]
    parts = list(probe.of("attention"))
    return parts[0], statistics.median(times["attention", part.layer] for part in parts)
