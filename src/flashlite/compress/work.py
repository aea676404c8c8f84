"""What the parts of a step read and compute: bytes of weights and of KV cache, and products.

It follows from model and plan alone, so that a plan can be judged before it is carried out
(`latency.py`), and a measured time be compared with what had to be done (`evaluate/profile.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from flashlite.compress.pack import BLOCK_ROWS, CODE_BYTES, GROUP, blocks_of, groups_of
from flashlite.compress.plan import Plan, stored_shapes
from flashlite.compress.screen import REST, SCREEN
from flashlite.model.spec import STREAM_PAGE, STREAM_TOKENS, ModelSpec

__all__ = ["PARTS", "Matrix", "Part", "packed_bytes", "step_parts"]

PARTS = (
    "embed",
    "attn_norm",
    "qkv",
    "rope_store",
    "attention",
    "o",
    "ffn_norm",
    "gate_up",
    "activation",
    "down",
    "head",
    "sampling",
)
"""In the order of a step; the norms behind `o` and `down` that some models have count as theirs."""

_MATRICES: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
_HALF = 2  # bytes of a half-precision number
_FLOAT = 4
_LINE = 64  # bytes of a cache line


def packed_bytes(fmt: str, rows: int, cols: int) -> int:
    """Bytes that a pass over a stored matrix reads: codes, scales and mins, or half floats."""
    if fmt not in CODE_BYTES:
        return rows * cols * (_HALF if fmt == "f16" else _FLOAT)
    halves = 2 if fmt == "q4m" else 1
    cell = CODE_BYTES[fmt] + BLOCK_ROWS * _HALF * halves
    return blocks_of(rows) * groups_of(cols) * cell


@dataclass(frozen=True)
class Matrix:
    """One matrix of a part, or those rows of it that a step reads."""

    name: str
    format: str
    rows: int
    cols: int
    access: Literal["stream", "blocks", "rows"] = "stream"  # one after another, or lying apart

    @property
    def nbytes(self) -> int:
        """Bytes of one pass over it."""
        return packed_bytes(self.format, self.rows, self.cols)

    @property
    def lines_bytes(self) -> int:
        """Bytes of whole cache lines where each row lies apart, its codes and its scales."""
        groups = groups_of(self.cols)
        codes = groups * CODE_BYTES[self.format] // BLOCK_ROWS
        # A piece that begins anywhere touches a line more than it fills, save for luck.
        lines = (codes + _LINE - 1) // _LINE + (groups * _HALF + _LINE - 1) // _LINE + 1
        return self.rows * lines * _LINE

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token."""
        return self.rows * self.cols


@dataclass(frozen=True)
class Part:
    """One part of a step.

    Attributes:
        name: one of `PARTS`.
        layer: of the model; None for `embed`, `head` and `sampling`.
        matrices: that its tokens are multiplied by.
        elements: numbers per token that it goes over one by one.
        heads, kv_heads, head_dim, window: of `attention`, else 0; window 0 sees every position.
        streams: query heads, and KV heads, that see the beginning and the end of the text alone.
        row_bytes: of weights per token, beside the matrices: the row that `embed` looks up.
        common_bytes: of weights per step, beside the matrices: norms, what a screen needs.
    """

    name: str
    layer: int | None = None
    matrices: tuple[Matrix, ...] = ()
    elements: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    window: int = 0
    streams: tuple[int, int] = (0, 0)
    row_bytes: int = 0
    common_bytes: int = 0

    @property
    def matrix_bytes(self) -> int:
        """Of all its matrices."""
        return sum(matrix.nbytes for matrix in self.matrices)

    def weight_bytes(self, tokens: int) -> int:
        """Bytes of weights that a step of so many tokens reads at least."""
        return self.matrix_bytes + self.common_bytes + self.row_bytes * tokens

    def head_positions(self, first: int, tokens: int) -> int:
        """Positions that the queries of `tokens` tokens from position `first` on see, added up
        over their heads.
        """
        streaming = self.streams[0]
        return sum(
            (self.heads - streaming) * self._seen(position) + streaming * _streamed(position)
            for position in range(first, first + tokens if self.heads else first)
        )

    def macs(self, tokens: int, first: int = 0) -> int:
        """Multiply-accumulates of a step of so many tokens, the first of them at `first`."""
        attended = 2 * self.head_dim * self.head_positions(first, tokens)
        return sum(matrix.macs for matrix in self.matrices) * tokens + attended

    def kv_bytes(self, position: int) -> int:
        """Bytes of KV cache that one query at a position reads, in all heads."""
        streaming = self.streams[1]
        per_head = 2 * self.head_dim + 2 * _HALF * groups_of(self.head_dim)
        seen = (self.kv_heads - streaming) * self._seen(position) + streaming * _streamed(position)
        return per_head * seen

    def _seen(self, position: int) -> int:
        return min(position + 1, self.window or position + 1)


def _streamed(position: int) -> int:
    """Positions that a streaming head sees: the first page, and whole pages of the last ones."""
    page = (position - STREAM_TOKENS + 1) // STREAM_PAGE
    if position < STREAM_TOKENS or page < 2:
        return position + 1
    return position + 1 - (page - 1) * STREAM_PAGE


def step_parts(
    spec: ModelSpec,
    plan: Plan,
    *,
    exact_head: bool = False,
    screened: tuple[float, float] | None = None,
) -> tuple[Part, ...]:
    """Every part of one step, in order.

    Args:
        spec: the model.
        plan: how its tensors are stored.
        exact_head: the whole head, also where the plan has a screen.
        screened: how many rows a split head estimates with all columns and how many blocks of 16
            it computes, per row of logits; None: as measured when it was made.
    """
    shapes = stored_shapes(spec, plan)
    d = spec.d_model

    def matrix(name: str) -> Matrix:
        rows, cols = shapes[name]
        return Matrix(name, plan.formats[name], rows, cols)

    parts = [Part("embed", elements=d, row_bytes=_row_bytes(plan.formats["embed"], d))]
    for i in range(spec.n_layers):
        prefix = f"layers.{i}."
        of = {
            part: tuple(matrix(prefix + name) for name in names)
            for part, names in _MATRICES.items()
        }
        q, k, _ = of["qkv"]
        heads = spec.heads_of(i)
        streaming = [n for n, yes in zip(heads, spec.streams_of(i), strict=True) if yes]
        post = d if spec.post_norms else 0
        hidden = of["gate_up"][0].rows
        parts += [
            Part("attn_norm", i, elements=d, common_bytes=d * _FLOAT),
            Part("qkv", i, of["qkv"]),
            Part("rope_store", i, elements=q.rows + k.rows),
            Part(
                "attention",
                i,
                heads=sum(heads),
                kv_heads=len(heads),
                head_dim=spec.head_dim,
                window=(spec.sliding_window or 0) if spec.slides(i) else 0,
                streams=(sum(streaming), len(streaming)),
            ),
            Part("o", i, of["o"], elements=q.rows + d + post, common_bytes=post * _FLOAT),
            Part("ffn_norm", i, elements=d, common_bytes=d * _FLOAT),
            Part("gate_up", i, of["gate_up"]),
            Part("activation", i, elements=hidden),
            Part("down", i, of["down"], elements=d + post, common_bytes=post * _FLOAT),
        ]
    full = matrix("head" if "head" in shapes else "embed")
    parts.append(_head(spec, plan, full, exact_head, screened))
    parts.append(Part("sampling", elements=spec.vocab_size))
    return tuple(parts)


def _head(
    spec: ModelSpec,
    plan: Plan,
    full: Matrix,
    exact: bool,
    screened: tuple[float, float] | None,
) -> Part:
    d, vocab, screen = spec.d_model, spec.vocab_size, plan.screen
    if screen is None or exact:
        return Part("head", matrices=(full,), elements=d, common_bytes=d * _FLOAT)
    rows, blocks = screened or (
        screen.measured.get("rows_estimated", screen.coarse.limit),
        screen.measured.get("blocks_exact", screen.fine.limit),
    )
    fmt = plan.formats[SCREEN]
    first = Matrix(SCREEN, fmt, vocab, screen.rank)
    rest = Matrix(REST, fmt, round(rows), d - screen.rank, "rows")
    sure = Matrix(full.name, full.format, round(blocks) * BLOCK_ROWS, d, "blocks")
    floats = d * d + 2 * d + vocab + 2 * blocks_of(vocab)
    # Estimates are gone over one by one.
    return Part(
        "head",
        matrices=(first, rest, sure),
        elements=d + vocab,
        common_bytes=floats * _FLOAT,
    )


def _row_bytes(fmt: str, cols: int) -> int:
    """Of one row of the look-up table, its share of a block."""
    if fmt == "f16":
        return cols * _HALF
    return packed_bytes(fmt, BLOCK_ROWS, -(-cols // GROUP) * GROUP) // BLOCK_ROWS
