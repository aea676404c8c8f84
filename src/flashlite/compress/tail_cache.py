"""What the last layers are tuned on, computed once: their inputs and the source's opinion.

    texts ── quantized layers 0 .. L-N-1 ──> inputs of layer L-N            FP16, per row scaled
          └─ the source in FP32 ───────────> its 64 likeliest next tokens, the mass of the rest,
                                             its last hidden state

Both models are walked layer by layer over many texts, so that one layer of weights is in memory at
a time. The arrays lie in files; a row of residuals is divided by its largest value, since Gemma's
exceed what half precision holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.compress.tuning_texts import Text, batches
from flashlite.model.differentiable import Differentiable, Tensor, require_torch
from flashlite.model.spec import ModelSpec

__all__ = ["TOP", "Cache", "Half", "Model", "build_cache", "head_rows"]

TOP = 64  # of the source's likeliest tokens kept per row
_TOGETHER = 1 << 15  # positions walked through the layers together
_BATCH = 2048  # positions computed at once
_HEAD_VALUES = 1 << 25  # logits computed at once

Floats = NDArray[np.float32]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Model:
    """A decoder whose tensors are read when they are needed.

    `weights` knows every canonical name, and `head` also of a tied model.
    """

    spec: ModelSpec
    weights: Callable[[str], Floats]


class Half:
    """Rows of floats in half precision, each with a scale: a file of [rows, columns]."""

    def __init__(self, values: NDArray[np.float16], scales: Floats) -> None:
        self._values, self._scales = values, scales

    @classmethod
    def at(cls, path: Path, rows: int, columns: int, *, new: bool) -> Half:
        """Open the rows at `path`, or make room for them."""
        mode: Any = "w+" if new else "r"
        values = np.memmap(
            path.with_suffix(".f16"), np.float16, mode, shape=(max(rows, 1), columns)
        )
        scales = np.memmap(path.with_suffix(".f32"), np.float32, mode, shape=(max(rows, 1),))
        return cls(values, scales)

    def put(self, at: slice, rows: Floats) -> None:
        """Store some rows."""
        scales = np.maximum(np.abs(rows).max(axis=1), np.float32(1e-30))
        self._scales[at] = scales
        self._values[at] = rows / scales[:, None]

    def get(self, at: NDArray[np.integer] | slice) -> Floats:
        """Some rows as float32."""
        return self._values[at].astype(np.float32) * self._scales[at][:, None]


@dataclass(frozen=True)
class Cache:
    """One set of texts, ready for the last layers. Rows are those of `Text.learn`, text by text.

    Attributes:
        texts: the texts.
        inputs: what layer L-N reads, by position.
        top_ids: int32 [rows, 64], the source's likeliest next tokens.
        top_logs: float32 [rows, 64], their natural log-probabilities.
        rest_logs: float32 [rows], the log of what all other tokens have together.
        hidden: the source's state after its final norm, by row.
    """

    texts: tuple[Text, ...]
    inputs: Half
    top_ids: NDArray[np.int32]
    top_logs: Floats
    rest_logs: Floats
    hidden: Half

    def __post_init__(self) -> None:
        lengths = [len(text) for text in self.texts]
        counts = [int(text.learn.sum()) for text in self.texts]
        object.__setattr__(self, "_starts", np.concatenate([[0], np.cumsum(lengths)]))
        object.__setattr__(self, "_rows", np.concatenate([[0], np.cumsum(counts)]))

    def padded(self, group: Sequence[int]) -> Floats:
        """Inputs of these texts, float32 [texts, longest, d_model], zeros behind the short ones."""
        starts: Any = self._starts  # type: ignore[attr-defined]
        parts = [self.inputs.get(slice(starts[i], starts[i + 1])) for i in group]
        out = np.zeros((len(parts), max(map(len, parts)), parts[0].shape[1]), np.float32)
        for row, part in zip(out, parts, strict=True):
            row[: len(part)] = part
        return out

    def learned(self, group: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of padded texts: where the rows that count lie, flat, and what token follows each."""
        longest = max(len(self.texts[i]) for i in group)
        where, following = [], []
        for row, i in enumerate(group):
            at = np.flatnonzero(self.texts[i].learn)
            where.append(row * longest + at)
            following.append(self.texts[i].ids[at + 1])
        return np.concatenate(where), np.concatenate(following).astype(np.int64)

    def rows(self, group: Sequence[int]) -> NDArray[np.int64]:
        """The rows of these texts in the arrays of the source's opinion."""
        rows: Any = self._rows  # type: ignore[attr-defined]
        return np.concatenate([np.arange(rows[i], rows[i + 1]) for i in group])


def build_cache(
    folder: Path,
    texts: Sequence[Text],
    teacher: Model | None,
    student: Model,
    layers: int,
    progress: Progress,
) -> Cache:
    """Compute a cache, or open the one that is there.

    Args:
        folder: where its files lie; written whole or computed again.
        texts: what to compute it for.
        teacher: the source; None where its opinion is not asked.
        student: the quantized model.
        layers: how many at the end are tuned.
        progress: called with (work done, work in all).
    """
    spec = student.spec
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done.json"
    new = not done.exists()
    positions = sum(map(len, texts))
    rows = sum(int(text.learn.sum()) for text in texts) if teacher is not None else 0
    mode: Any = "w+" if new else "r"

    def array(name: str, dtype: Any, *shape: int) -> Any:
        return np.memmap(folder / name, dtype, mode, shape=(max(rows, 1), *shape))

    cache = Cache(
        tuple(texts),
        Half.at(folder / "inputs", positions, spec.d_model, new=new),
        array("top_ids", np.int32, min(TOP, spec.vocab_size)),
        array("top_logs", np.float32, min(TOP, spec.vocab_size)),
        array("rest_logs", np.float32),
        Half.at(folder / "hidden", rows, spec.d_model, new=new),
    )
    if new:
        first = spec.n_layers - layers
        total = positions * (first + (spec.n_layers + _HEAD_LAYERS if teacher else 0))
        count = _Count(progress, total)
        _walk(student, first, cache.texts, count, cache.inputs.put)
        if teacher is not None:
            _ask(teacher, cache, count)
        done.with_suffix(".tmp").write_text(json.dumps({"positions": positions, "rows": rows}))
        done.with_suffix(".tmp").replace(done)
    return cache


_HEAD_LAYERS = 16  # the head's share of the work, for the bar


class _Count:
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, max(total, 1), 0

    def add(self, work: int) -> None:
        self._done += work
        self._progress(min(self._done, self._total), self._total)


def _walk(
    model: Model,
    layers: int,
    texts: Sequence[Text],
    count: _Count,
    put: Callable[[slice, Floats], None],
) -> None:
    """Run the first `layers` layers over the texts and hand over the residuals, part by part."""
    torch = require_torch("fine-tuning")
    held: dict[str, Tensor] = {}
    forward = Differentiable(model.spec, held)
    at = 0
    for part in _parts(texts):
        groups = batches([len(text) for text in part], _BATCH)
        starts = np.concatenate([[0], np.cumsum([len(text) for text in part])])
        residual = np.empty((int(starts[-1]), model.spec.d_model), np.float32)
        embed = model.weights("embed")
        for text, start in zip(part, starts, strict=False):
            scale = np.float32(model.spec.embed_scale)
            residual[start : start + len(text)] = embed[text.ids] * scale
        del embed
        for i in range(layers):
            names = [n for n, _ in model.spec.shapes() if n.startswith(f"layers.{i}.")]
            held.clear()
            held.update({name: torch.from_numpy(model.weights(name).copy()) for name in names})
            for group in groups:
                x = np.zeros((len(group), max(len(part[j]) for j in group), residual.shape[1]))
                batch = x.astype(np.float32)
                for row, j in zip(batch, group, strict=True):
                    row[: len(part[j])] = residual[starts[j] : starts[j + 1]]
                with torch.no_grad():
                    out = forward.layer(i, torch.from_numpy(batch)).numpy()
                for row, j in zip(out, group, strict=True):
                    residual[starts[j] : starts[j + 1]] = row[: len(part[j])]
            count.add(len(residual))
        put(slice(at, at + len(residual)), residual)
        at += len(residual)


def _ask(teacher: Model, cache: Cache, count: _Count) -> None:
    """Fill in what the source thinks of the rows that count."""
    torch = require_torch("fine-tuning")
    norm = torch.from_numpy(teacher.weights("final_norm").copy())
    forward = Differentiable(teacher.spec, {"final_norm": norm})
    learn = np.concatenate([text.learn for text in cache.texts])
    filled = 0

    def keep(at: slice, residual: Floats) -> None:
        nonlocal filled
        chosen = residual[learn[at]]
        with torch.no_grad():
            state = forward.final_norm(torch.from_numpy(chosen)).numpy()
        cache.hidden.put(slice(filled, filled + len(state)), state)
        filled += len(state)

    _walk(teacher, teacher.spec.n_layers, cache.texts, count, keep)
    table = torch.from_numpy(np.ascontiguousarray(teacher.weights("head")))
    step = head_rows(teacher.spec)
    work = _HEAD_LAYERS * len(learn) / max(filled, 1)
    for start in range(0, filled, step):
        rows = slice(start, min(start + step, filled))
        with torch.no_grad():
            logits = torch.from_numpy(cache.hidden.get(rows)) @ table.T
            logits -= torch.logsumexp(logits, -1, keepdim=True)
            top = logits.topk(cache.top_ids.shape[1], dim=-1)
            logits.scatter_(1, top.indices, float("-inf"))
            rest = torch.logsumexp(logits, -1).clamp_min(-40.0)
        cache.top_ids[rows] = top.indices.numpy()
        cache.top_logs[rows] = top.values.numpy()
        cache.rest_logs[rows] = rest.numpy()
        count.add(int(work * (rows.stop - rows.start)))


def head_rows(spec: ModelSpec) -> int:
    """How many rows of logits are computed at once."""
    return max(16, _HEAD_VALUES // spec.vocab_size)


def _parts(texts: Sequence[Text]) -> list[list[Text]]:
    parts: list[list[Text]] = [[]]
    room = _TOGETHER
    for text in texts:
        if parts[-1] and room < len(text):
            parts.append([])
            room = _TOGETHER
        parts[-1].append(text)
        room -= len(text)
    return parts
