"""`EncoderSpec`: everything the rest of flashlite knows about one text encoder (BERT and its kin).

An encoder makes one vector of a text. Every token sees every other, positions are learned, and
norms follow the residual sums. It stands beside `ModelSpec` and shares no field by force: what
both have, they name alike.

Canonical tensors, row-major, `y = W x + b` with `W` of shape (outputs, inputs):

    embed                       (vocab, d_model)
    positions                   (n_positions, d_model)
    types                       (n_types, d_model)      a single text is type 0 throughout
    embed_norm, embed_norm_bias (d_model,)
    layers.{i}.q / k / v        (d_model, d_model)      and q_bias / k_bias / v_bias
    layers.{i}.o                (d_model, d_model)      and o_bias
    layers.{i}.attn_norm        (d_model,)              and attn_norm_bias
    layers.{i}.up               (d_ff, d_model)         and up_bias
    layers.{i}.down             (d_model, d_ff)         and down_bias
    layers.{i}.ffn_norm         (d_model,)              and ffn_norm_bias
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from flashlite.errors import ArtifactError
from flashlite.model.spec import ModelSpec

__all__ = ["MAX_TEXT", "EncoderSpec", "Pooling", "Spec", "spec_from_json"]

MAX_TEXT = 512  # tokens of one text: what a step of the engine holds, FL_MAX_TEXT
Pooling = Literal["mean", "first"]


@dataclass(frozen=True)
class EncoderSpec:
    """The shape and the arithmetic of one text encoder."""

    family: str  # "bert"
    n_layers: int
    d_model: int
    n_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    n_positions: int  # rows of the table of positions
    n_types: int  # rows of the table of token types
    max_context: int  # tokens of one text, [CLS] and [SEP] among them
    norm_eps: float
    pooling: Pooling  # the vector is the mean of all tokens, or the first one, scaled to length 1

    @property
    def softmax_scale(self) -> float:
        """What scores are multiplied by before the softmax."""
        return float(self.head_dim**-0.5)

    @property
    def tied_head(self) -> bool:
        """An encoder has no head."""
        return False

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every canonical tensor this model must have, with its shape, in forward order."""
        d = self.d_model
        yield "embed", (self.vocab_size, d)
        yield "positions", (self.n_positions, d)
        yield "types", (self.n_types, d)
        yield "embed_norm", (d,)
        yield "embed_norm_bias", (d,)
        for i in range(self.n_layers):
            for name, shape in (
                ("q", (d, d)),
                ("k", (d, d)),
                ("v", (d, d)),
                ("o", (d, d)),
                ("attn_norm", (d,)),
                ("up", (self.d_ff, d)),
                ("down", (d, self.d_ff)),
                ("ffn_norm", (d,)),
            ):
                yield f"layers.{i}.{name}", shape
                yield f"layers.{i}.{name}_bias", shape[:1]

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal spec."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EncoderSpec:
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: a key is unknown or missing, or a value is of the wrong type or range.
        """
        try:
            spec = cls(**data)
        except TypeError as error:
            raise ArtifactError(f"config.json: model description: {error}") from None
        spec.check()
        return spec

    def check(self) -> None:
        """Refuse a spec no engine could run; every value may come from a hostile file.

        Raises:
            ArtifactError: naming the field, its value and the limit.
        """
        limits: dict[str, tuple[float, float]] = {
            "n_layers": (1, 512),
            "d_model": (4, 65536),
            "n_heads": (1, 1024),
            "head_dim": (4, 512),
            "d_ff": (4, 262144),
            "vocab_size": (1, 4194304),
            "n_positions": (1, 65536),
            "n_types": (1, 1024),
            "max_context": (2, MAX_TEXT),
            "norm_eps": (1e-15, 1e-1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            kinds = (int,) if isinstance(low, int) else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ArtifactError(f"encoder {name} is {value!r}, not a number")
            if not low <= value <= high:
                raise ArtifactError(f"encoder {name} is {value}, allowed {low} to {high}")
        if self.n_heads * self.head_dim != self.d_model:
            raise ArtifactError(
                f"encoder has {self.n_heads} heads of {self.head_dim} for {self.d_model} channels"
            )
        if self.head_dim % 4:
            raise ArtifactError(f"encoder head_dim is {self.head_dim}, not a multiple of 4")
        if self.max_context > self.n_positions:
            raise ArtifactError(
                f"encoder max_context is {self.max_context}, it has {self.n_positions} positions"
            )
        if self.family != "bert":
            raise ArtifactError(f"encoder family {self.family!r} is not known")
        if self.pooling not in get_args(Pooling):
            raise ArtifactError(f"encoder pooling {self.pooling!r} is not known")
        if not math.isfinite(self.norm_eps):
            raise ArtifactError(f"encoder norm_eps is {self.norm_eps}")


Spec = ModelSpec | EncoderSpec


def spec_from_json(data: Mapping[str, Any]) -> Spec:
    """The spec of either kind; the one of an encoder has a `pooling`.

    Raises:
        ArtifactError: as `ModelSpec.from_json` and `EncoderSpec.from_json`.
    """
    return EncoderSpec.from_json(data) if "pooling" in data else ModelSpec.from_json(data)
