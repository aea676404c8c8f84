"""What the source model's head reads, in FP32: walked layer by layer, and kept for the next time.

Sequences are walked in blocks, all of a block through one layer before the next, so that each
tensor is read once per block and no more than a block's residuals stay in memory. What comes out
does not depend on the compressed model, so it is kept in the user's cache: hidden states instead of
logits. They take about the bytes of the 256 likeliest tokens with their log-probabilities, and the
head makes every logit from them again, so that KL is exact and needs no bucket for the tail.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from flashlite import paths
from flashlite.model import reference, rope
from flashlite.model.reference import Floats, Reference, Weights
from flashlite.model.spec import ModelSpec

__all__ = ["Excerpt", "Kept", "walk_blocks"]

_BLOCK_VALUES = 1 << 26  # residuals held at once: 256 MB
_KEPT_BYTES = 2 << 30  # of the folder; beyond it the files used longest ago go
_CONTEXT = "flashlite 2026 hidden states of a source model"


@dataclass(frozen=True)
class Excerpt:
    """Token ids, of which those from `first` on are predicted and compared (1 or more).

    `rivals` are further candidates for the token at `first`, whose losses are wanted as well.
    """

    ids: NDArray[np.int32]
    first: int = 1
    rivals: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Predicted tokens."""
        return len(self.ids) - self.first


class Kept:
    """Hidden states on disk, by source and tokens; a file that is not ours or damaged is none."""

    def __init__(self, digest: str, folder: Path | None = None) -> None:
        """`digest` names the source's weights; `folder` is made when something is kept.

        Raises:
            OSError: the key of this installation can be neither read nor made.
        """
        self._folder = paths.cache_dir() / "teachers" if folder is None else folder
        self._key = blake3(paths.installation_key(), derive_key_context=_CONTEXT).digest()
        # Another arithmetic gives other bits: the oracle's own text is part of the name.
        parts = [Path(str(m.__file__)).read_bytes() for m in (reference, rope)]
        self._name = blake3(digest.encode() + b"\0".join(parts)).digest()

    def load(self, spec: ModelSpec, block: Sequence[Excerpt]) -> list[Floats] | None:
        """What `save` was given for the same block, or None."""
        path = self._path(spec, block)
        rows = sum(excerpt.rows for excerpt in block)
        try:
            if path.stat().st_size != 32 + 4 * rows * spec.d_model:
                return None
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        if not secrets.compare_digest(data[:32], self._mac(memoryview(data)[32:])):
            return None
        values = np.frombuffer(data, np.float32, offset=32).reshape(rows, spec.d_model)
        ends = np.cumsum([excerpt.rows for excerpt in block])[:-1]
        return list(np.split(values, ends))

    def save(self, spec: ModelSpec, block: Sequence[Excerpt], states: Sequence[Floats]) -> None:
        """Keep a block; a full disk keeps nothing, which is no error."""
        path = self._path(spec, block)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        data = np.concatenate(states).tobytes()
        try:
            paths.private_dir(self._folder)
            self._make_room(len(data))
            with partial.open("xb") as file:
                file.write(self._mac(data) + data)
            partial.replace(path)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _path(self, spec: ModelSpec, block: Sequence[Excerpt]) -> Path:
        name = blake3(self._name + repr(spec).encode())
        for excerpt in block:
            name.update(f"\0{excerpt.first} {len(excerpt.ids)}\0".encode())
            name.update(np.asarray(excerpt.ids, np.int32).tobytes())
        return self._folder / f"{name.hexdigest()[:32]}.states"

    def _mac(self, data: bytes | memoryview) -> bytes:
        return blake3(data, key=self._key).digest()

    def _make_room(self, size: int) -> None:
        files = [(p.stat().st_mtime, p.stat().st_size, p) for p in self._folder.iterdir()]
        total = size + sum(entry[1] for entry in files)
        for _, freed, path in sorted(files):
            if total <= _KEPT_BYTES:
                break
            path.unlink(missing_ok=True)
            total -= freed


def walk_blocks(
    spec: ModelSpec,
    weights: Weights,
    excerpts: Sequence[Excerpt],
    kept: Kept | None = None,
    report: Callable[[int], object] = lambda tokens: None,
) -> Iterator[tuple[Excerpt, Floats]]:
    """Every excerpt with what the head reads before each of its predicted tokens, (rows, d_model).

    Args:
        spec: of the source.
        weights: of the source, float32 by canonical name; each is asked for once per block.
        excerpts: each at most as long as the model's context.
        kept: where states are looked up and kept; None: nowhere.
        report: called with the tokens that went through all layers so far.
    """
    done = 0
    for block in _blocks(excerpts, spec.d_model):
        tokens = sum(len(excerpt.ids) for excerpt in block)
        states = None if kept is None else kept.load(spec, block)
        if states is None:
            states = _walk(
                spec,
                weights,
                block,
                lambda share: report(done + int(tokens * share)),  # noqa: B023
            )
            if kept is not None:
                kept.save(spec, block, states)
        done += tokens
        report(done)
        yield from zip(block, states, strict=True)


def _blocks(excerpts: Sequence[Excerpt], d_model: int) -> Iterator[list[Excerpt]]:
    block: list[Excerpt] = []
    values = 0
    for excerpt in excerpts:
        size = len(excerpt.ids) * d_model
        if block and values + size > _BLOCK_VALUES:
            yield block
            block, values = [], 0
        block.append(excerpt)
        values += size
    if block:
        yield block


def _walk(
    spec: ModelSpec,
    weights: Weights,
    block: Sequence[Excerpt],
    report: Callable[[float], object],
) -> list[Floats]:
    read = weights if callable(weights) else weights.__getitem__
    held: dict[str, Floats] = {}

    def once(name: str) -> Floats:
        if name not in held:
            held[name] = read(name)
        return held[name]

    model = Reference(spec, once)
    states = [model.embed(excerpt.ids) for excerpt in block]
    held.clear()
    for i in range(spec.n_layers):
        for j, x in enumerate(states):  # in place: the old residual goes when the new one is there
            states[j] = model.layer(i, x)
        held.clear()
        report((i + 1) / spec.n_layers)
    return [
        model.final_norm(x[excerpt.first - 1 : -1])
        for x, excerpt in zip(states, block, strict=True)
    ]
