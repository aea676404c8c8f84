"""Whether low rank wins a place among the formats: KL at equal bytes, all matrices of the layers.

    python benchmarks/lowrank.py                                 # analyzes Gemma-3-270M first
    python benchmarks/lowrank.py --config sensitive_layers.json  # whatever model that is of

Two forms, both fitted to what the matrix reads (H = S S^T, so that |D S| is the outputs' error):

    layers       W ~ A B of rank r, the truncated SVD of W S, in INT8, at the bytes of q4
    correction   q4 by GPTQ, and the rank-8 part of what it misses in INT8 beside it

against quantization of the same bytes: q4, and q4 with as many layers in q4m as the correction's
bytes pay for, spread evenly. KL on wikitext-2 valid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import common
from common import GEMMA, Gate, Row
from curve import Body, Measured, alike, analyzed, body_of, uniform, windows
from flashlite.checkpoint.open import open_checkpoint
from flashlite.checkpoint.pull import pull
from flashlite.cli.budget import read_config
from flashlite.compress.differential import split_sequences
from flashlite.compress.gptq import curvature, descend, gptq, search, weights_of
from flashlite.compress.quantize import quantize_matrix
from flashlite.compress.roundings import stored_bytes
from flashlite.model.families import describe
from flashlite.model.reference import Reference

__all__ = ["corrected", "factors", "low_rank_bytes", "rank_for"]

_F32 = NDArray[np.float32]

RANK = 8
_WINS = Gate(1.0, less=True)


def factors(weights: _F32, second: _F32, rank: int) -> tuple[_F32, _F32]:
    """A [rows, rank] and B [rank, cols] whose product changes the outputs least.

    The truncation of W S, S S^T = H (Wang et al., SVD-LLM, 2403.07378), back through S.
    """
    damped = second.astype(np.float64)
    damped[np.diag_indices_from(damped)] += 0.01 * np.diag(damped).mean()
    root = np.linalg.cholesky(damped)
    u, sigma, v = np.linalg.svd(weights @ root, full_matrices=False)
    back = np.linalg.solve(root.T, v[:rank].T).T
    size = np.sqrt(sigma[:rank])
    return (u[:, :rank] * size).astype(np.float32), (size[:, None] * back).astype(np.float32)


def low_rank_bytes(shape: tuple[int, int], rank: int) -> int:
    """Of both factors in INT8, the second one transposed: rank is a multiple of 8 at least."""
    values = rank * (shape[0] + shape[1])
    return values + values // 16  # a half-precision scale for 32


def rank_for(shape: tuple[int, int], size: int) -> int:
    """The largest rank that takes at most so many bytes."""
    return max(1, int(size / (1.0625 * (shape[0] + shape[1]))))


def corrected(weights: _F32, stored: _F32, second: _F32, rank: int = RANK) -> _F32:
    """The stored weights with the low-rank part of what they miss beside them."""
    a, b = factors(weights - stored, second, rank)
    out: _F32 = stored + int8(a.T).T @ int8(b)
    return out


def int8(values: _F32) -> _F32:
    """What INT8 with groups of 32 makes of a factor [rank, n]."""
    return weights_of(quantize_matrix(values, "q8"), values.shape[1])


def main() -> None:
    parser = common.make_parser(__doc__, rounds=1, isa=False)
    parser.add_argument("--config", type=Path, help="what analyze wrote [default: made once]")
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens [default: 4]")
    parser.add_argument("--positions", type=int, default=1024, help="scored [default: 1024]")
    options = common.arguments(parser)
    analysis = read_config(options.config or analyzed(GEMMA))
    path = pull(analysis.model.name, accept_license=True).path
    source = describe(open_checkpoint(path))
    body = body_of(source)
    text = windows(analysis.model.name, source, options.windows, 512)
    measured = Measured(source, text, options.positions)
    fit, _ = split_sequences(analysis.calibration)
    found: dict[str, dict[str, NDArray[np.float16]]] = {}
    seconds = _seconds(body, fit)
    for name, second in seconds:
        for arm, weights in _arms(measured.original(name), second).items():
            found.setdefault(arm, {})[name] = weights.astype(np.float16)  # by half the memory
    size = body.bytes(alike(body, "q4"))
    more = size + sum(low_rank_bytes(shape, RANK) for shape in body.shapes.values())
    mixed = uniform(body, more)
    found["mixed"] = {name: found[mixed[name]][name] for name in body.shapes}
    kl = {arm: _kl(measured, weights) for arm, weights in found.items()}
    rows = [
        Row(
            f"low-rank layers, {body.bits(size):.2f} bits", "nats", kl["layers"],
            {"q4": kl["q4"]}, "q4", kl["layers"] / kl["q4"], _WINS,
        ),
        Row(
            f"q4 + rank {RANK}, {body.bits(more):.2f} bits", "nats", kl["correction"],
            {"q4 and q4m": kl["mixed"]}, "q4 and q4m", kl["correction"] / kl["mixed"], _WINS,
        ),
    ]  # fmt: skip
    common.finish("lowrank", options, rows, model=analysis.model.name, kl=kl)


def _arms(weights: _F32, second: _F32) -> dict[str, _F32]:
    shape, curve = (weights.shape[0], weights.shape[1]), curvature(second)
    found = {}
    for fmt in ("q4", "q4m"):
        start = gptq(weights, curve, search(weights, fmt, second))
        found[fmt] = weights_of(descend(weights, curve, start), shape[1])
    a, b = factors(weights, second, rank_for(shape, stored_bytes(shape, "q4")))
    found["layers"] = int8(a.T).T @ int8(b)
    found["correction"] = corrected(weights, found["q4"], second)
    return found


def _seconds(body: Body, fit: list[NDArray[np.int32]]) -> Iterator[tuple[str, _F32]]:
    """Of every matrix: the mean of x x^T over what it reads in the source, layer by layer."""
    spec = body.source.spec
    sums: dict[str, _F32] = {}
    counted = 0
    like = {"k": "q", "v": "q", "up": "gate"}

    def observe(name: str, inputs: _F32) -> None:
        if name.split(".")[-1] not in like:
            rows = inputs[1:]
            sums[name] = sums.get(name, np.float32(0)) + rows.T @ rows

    reference = Reference(spec, body.source.tensor, observe)
    table = {"embed": body.source.tensor("embed")}
    states = [Reference(spec, table).embed(ids) for ids in fit]
    counted = sum(len(ids) - 1 for ids in fit)
    table.clear()
    for i in range(spec.n_layers):
        states = [reference.layer(i, x) for x in states]
        for name in body.shapes:
            prefix, _, kind = name.rpartition(".")
            if prefix == f"layers.{i}":
                yield name, sums[f"{prefix}.{like.get(kind, kind)}"] / np.float32(counted)
        sums.clear()
        common.progress(i + 1, spec.n_layers)


def _kl(measured: Measured, weights: Mapping[str, NDArray[np.float16]]) -> float:
    return measured.test(
        measured.replaced(lambda name: weights[name].astype(np.float32), list(weights))
    )


if __name__ == "__main__":
    main()
