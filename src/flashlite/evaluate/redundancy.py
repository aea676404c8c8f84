"""How little a layer does: 1 - cosine of the residual stream before and after it.

Near 0 a layer hardly turns the stream, and may be one the model can do without ("block influence"
of ShortGPT, Men et al. 2024, section 3.2); near 1 it makes something new. Measured with the NumPy
forward on the artifact's own weights, one tensor in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from flashlite.artifact.format import Artifact
from flashlite.artifact.read import packed, tensor
from flashlite.compress.pack import BLOCK_ROWS, Packed, dequantize
from flashlite.model.reference import Reference

__all__ = ["layer_redundancy"]


def layer_redundancy(
    artifact: Artifact,
    weights: NDArray[np.uint8],
    ids: NDArray[np.int32],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, ...]:
    """Of every layer, the mean over the positions of `ids`.

    Args:
        artifact: what was measured.
        weights: of `load_weights`.
        ids: a text, at least two tokens: the first position is left out, since many models give
            it a state of its own that no text reaches.
        report: told (layers done, layers in all).
    """
    spec = replace(artifact.spec, tied_head="head" not in artifact.plan.formats)
    reference = Reference(spec, lambda name: tensor(artifact, weights, name))
    x = _embed(artifact, weights, ids)
    found = []
    for i in range(spec.n_layers):
        report(i, spec.n_layers)
        after = reference.layer(i, x)
        found.append(1.0 - float(np.mean(_cosines(x[1:], after[1:]))))
        x = after
    report(spec.n_layers, spec.n_layers)
    return tuple(found)


def _embed(
    artifact: Artifact, weights: NDArray[np.uint8], ids: NDArray[np.int32]
) -> NDArray[np.float32]:
    """The rows of these ids alone: a large vocabulary in floats takes more than the model."""
    scale = np.float32(artifact.spec.embed_scale)
    if artifact.plan.formats["embed"] == "f16":
        entry = artifact.tensors["embed"]
        table = weights[entry.offset : entry.offset + entry.nbytes].view("<f2")
        halves: NDArray[np.float32] = table.reshape(entry.shape)[ids].astype(np.float32)
        halves *= scale
        return halves
    table_ = packed(artifact, weights, "embed")
    rows = []
    for id_ in ids.tolist():
        block = slice(id_ // BLOCK_ROWS, id_ // BLOCK_ROWS + 1)
        mins = None if table_.mins is None else table_.mins[block]
        one = Packed(table_.format, table_.codes[block], table_.scales[block], mins)
        rows.append(dequantize(one, BLOCK_ROWS, artifact.spec.d_model)[id_ % BLOCK_ROWS])
    found = np.array(rows, np.float32)
    found *= scale
    return found


def _cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    x, y = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosines: NDArray[np.float64] = np.einsum("ij,ij->i", x, y) / np.maximum(lengths, 1e-30)
    return cosines
