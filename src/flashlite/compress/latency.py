"""How fast a plan would run on a machine that was measured: prediction from bytes and products.

    part of one token     fixed + bytes / gemv(format) + numbers * ns
    part of n tokens      fixed + products / gemm(format, n) + numbers * ns
    attention             fixed + heads * positions * (a + b * head_dim) + KV bytes / rate

added up over `work.step_parts`. Rates are those of weights that come from memory, so a model that
fits a CPU's caches is faster than predicted.
"""

from __future__ import annotations

from typing import NamedTuple

from flashlite.compress.machine_profile import MachineProfile, Rates
from flashlite.compress.plan import Plan
from flashlite.compress.work import Part, step_parts
from flashlite.errors import CompressError
from flashlite.model.spec import ModelSpec

__all__ = ["CALL", "Latency", "attend_share", "part_seconds", "predict_latency"]

_MOST_TOKENS = 256  # of a step: FL_MAX_BATCH
CALL = "call"


class Latency(NamedTuple):
    """What is predicted."""

    decode_seconds: float  # of one token
    prefill_tokens_s: float


def predict_latency(
    spec: ModelSpec,
    plan: Plan,
    machine: MachineProfile,
    *,
    depth: int = 512,
    prompt_tokens: int = 512,
    threads: int | None = None,
    exact_head: bool = False,
) -> Latency:
    """Predict decoding and prefill of a plan.

    Args:
        spec: the model.
        plan: how its tensors are stored.
        machine: what the machine does per second.
        depth: tokens stored before the one that is decoded.
        prompt_tokens: length of the prompt, from an empty cache.
        threads: of the engine; None: the most that were measured.
        exact_head: compute every logit, also where the plan has a screen.

    Raises:
        CompressError: a format of the plan, or the number of threads, was not measured.
    """
    rates = machine.of(threads)
    parts = step_parts(spec, plan, exact_head=exact_head)
    call = rates.fixed_us.get(CALL, 0.0) / 1e6
    decode = call + sum(part_seconds(part, rates, 1, depth) for part in parts)
    prefill = 0.0
    for first in range(0, prompt_tokens, _MOST_TOKENS):
        tokens = min(_MOST_TOKENS, prompt_tokens - first)
        last = first + tokens == prompt_tokens
        prefill += call
        for part in parts:
            if part.name in ("head", "sampling"):
                prefill += part_seconds(part, rates, 1, first) if last else 0.0
            else:
                prefill += part_seconds(part, rates, tokens, first)
    return Latency(decode, prompt_tokens / prefill)


def part_seconds(part: Part, rates: Rates, tokens: int, first: int) -> float:
    """Seconds of one part in a step of `tokens` tokens, the first of them at position `first`.

    Raises:
        CompressError: a format was not measured.
    """
    many = int(tokens > 1)
    seconds = rates.fixed_us.get(part.name, 0.0) / 1e6
    for matrix in part.matrices:
        if matrix.format not in rates.gemv_gb_s:
            raise CompressError(
                f"the machine was not measured with {matrix.format}, the format of {matrix.name}; "
                "measure it again with flashlite profile --machine"
            )
        if many:
            seconds += matrix.macs * tokens / rates.gemm(matrix.format, tokens) / 1e9
        elif matrix.access == "rows":
            seconds += matrix.lines_bytes / rates.gather_gb_s / 1e9
        elif matrix.access == "blocks":  # pieces as long as pages of the cache
            seconds += matrix.nbytes / rates.kv_gb_s / 1e9
        else:
            seconds += matrix.nbytes / rates.gemv_gb_s[matrix.format] / 1e9
    seconds += part.common_bytes / rates.read_gb_s / 1e9
    seconds += part.elements * tokens * rates.element_ns.get(part.name, (0.0, 0.0))[many] / 1e9
    if part.heads:
        share = attend_share(part, rates.threads, tokens)
        per_position, per_channel = rates.attend_ns[many]
        seen = part.head_positions(first, tokens)
        work = seen * (per_position + per_channel * part.head_dim)
        seconds += share * work / 1e9
        if not many:
            seconds += share * part.kv_bytes(first) / rates.kv_gb_s / 1e9
    return seconds


def attend_share(part: Part, threads: int, tokens: int) -> float:
    """The largest share of attention that one thread has: with one token a KV head is not split.

    Of several tokens there are enough pieces, and their rate is that of all threads together.
    """
    if tokens > 1:
        return 1.0
    return -(-part.kv_heads // threads) / part.kv_heads
