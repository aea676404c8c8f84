"""`ModelSpec`: everything the rest of flashlite knows about one transformer.

The spec is the same for every source format. Families (`llama.py`, `gemma3.py`, ...) fill it from
GGUF metadata or an HF `config.json` and say which checkpoint tensor holds which canonical one.

Canonical tensors, row-major, `y = W x` with `W` of shape (outputs, inputs):

    embed                       (vocab, d_model)
    layers.{i}.attn_norm        (d_model,)
    layers.{i}.q / k / v        (heads * head_dim, d_model); rope pairs are (j, j + head_dim/2)
    layers.{i}.q_bias / k_bias / v_bias     present when `qkv_bias`
    layers.{i}.q_norm / k_norm  (head_dim,)             present when `qk_norm`
    layers.{i}.o                (d_model, n_heads * head_dim)
    layers.{i}.o_bias           (d_model,)              present where heads were removed: their mean
    layers.{i}.post_attn_norm   (d_model,)              present when `post_norms`
    layers.{i}.ffn_norm         (d_model,)
    layers.{i}.gate / up        (d_ff, d_model)
    layers.{i}.down             (d_model, d_ff)
    layers.{i}.post_ffn_norm    (d_model,)              present when `post_norms`
    final_norm                  (d_model,)
    head                        (vocab, d_model)        absent when `tied_head`

Norm weights are stored as they multiply: Gemma's `1 + w` is already added. A layer that lost heads
(`heads`) has fewer rows in q, k, v and fewer columns in o.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from flashlite.errors import ArtifactError

__all__ = ["STREAM_PAGE", "STREAM_TOKENS", "Llama3Rope", "ModelSpec"]

STREAM_TOKENS = 256  # a streaming head sees the pages of the last so many, and the first page
STREAM_PAGE = 32  # tokens of one page

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Llama3Rope:
    """Frequency scaling of Llama 3.1 and later (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class ModelSpec:
    """The shape and the arithmetic of one decoder-only transformer."""

    family: str  # "llama", "gemma3", "qwen2", "qwen3"
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int  # divides n_heads
    head_dim: int  # even
    d_ff: int
    vocab_size: int
    max_context: int  # positions the model was trained for
    norm_eps: float
    activation: Activation
    tied_head: bool
    rope_theta: float
    rope_theta_local: float | None = None  # sliding layers use their own base (gemma3)
    rope_llama3: Llama3Rope | None = None
    rope_linear: float = 1.0  # positions of global layers are divided by this (gemma3 4B and up)
    rope_factors: tuple[float, ...] | None = None  # frequencies divided per pair (GGUF rope_freqs)
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False  # norms after attention and after the MLP, before the residual
    embed_scale: float = 1.0  # embeddings are multiplied by this (gemma3: sqrt(d_model))
    attn_scale: float | None = None  # None: head_dim ** -0.5
    sliding_window: int | None = None  # positions a sliding layer sees, itself included
    sliding_layers: tuple[bool, ...] = ()  # per layer; empty: none slides
    heads: tuple[
        tuple[int, ...], ...
    ] = ()  # per layer, query heads of each KV head; empty: as above
    streams: tuple[tuple[bool, ...], ...] = ()  # per layer and KV head; empty: none streams

    @property
    def q_rows(self) -> int:
        """Rows of `q` and columns of `o` of a layer that has all its heads."""
        return self.n_heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Rows of `k` and of `v` of a layer that has all its heads."""
        return self.n_kv_heads * self.head_dim

    def heads_of(self, layer: int) -> tuple[int, ...]:
        """How many query heads share each KV head of this layer."""
        if self.heads:
            return self.heads[layer]
        return (self.n_heads // self.n_kv_heads,) * self.n_kv_heads

    def lost_heads(self, layer: int) -> bool:
        """Whether heads of this layer were removed."""
        return sum(self.heads_of(layer)) < self.n_heads

    def streams_of(self, layer: int) -> tuple[bool, ...]:
        """Whether each KV head of this layer sees the first 32 tokens and the last 256 only.

        Whole pages of 32 tokens are seen, so 256 to 287 of the last ones (StreamingLLM, Xiao et al.
        2023; heads of their own as in DuoAttention, Xiao et al. 2024).
        """
        if self.streams:
            return self.streams[layer]
        return (False,) * len(self.heads_of(layer))

    @property
    def softmax_scale(self) -> float:
        """What scores are multiplied by before the softmax."""
        return self.head_dim**-0.5 if self.attn_scale is None else self.attn_scale

    def slides(self, layer: int) -> bool:
        """Whether this layer attends to the last `sliding_window` positions only."""
        return bool(self.sliding_layers) and self.sliding_layers[layer]

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every canonical tensor this model must have, with its shape, in forward order."""
        d = self.d_model
        yield "embed", (self.vocab_size, d)
        for i in range(self.n_layers):
            p, heads = f"layers.{i}.", self.heads_of(i)
            q_rows, kv_rows = sum(heads) * self.head_dim, len(heads) * self.head_dim
            yield p + "attn_norm", (d,)
            yield p + "q", (q_rows, d)
            yield p + "k", (kv_rows, d)
            yield p + "v", (kv_rows, d)
            if self.qkv_bias:
                yield p + "q_bias", (q_rows,)
                yield p + "k_bias", (kv_rows,)
                yield p + "v_bias", (kv_rows,)
            if self.qk_norm:
                yield p + "q_norm", (self.head_dim,)
                yield p + "k_norm", (self.head_dim,)
            yield p + "o", (d, q_rows)
            if self.lost_heads(i):
                yield p + "o_bias", (d,)
            if self.post_norms:
                yield p + "post_attn_norm", (d,)
            yield p + "ffn_norm", (d,)
            yield p + "gate", (self.d_ff, d)
            yield p + "up", (self.d_ff, d)
            yield p + "down", (d, self.d_ff)
            if self.post_norms:
                yield p + "post_ffn_norm", (d,)
        yield "final_norm", (d,)
        if not self.tied_head:
            yield "head", (self.vocab_size, d)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal spec."""
        data = asdict(self)
        for name in ("heads", "streams"):
            if not data[name]:
                del data[name]  # so that artifacts of whole models are those of earlier versions
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: a key is unknown or missing, or a value has the wrong type.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ArtifactError(f"config.json: unknown model keys {unknown}")
        values = dict(data)
        try:
            if values.get("rope_llama3") is not None:
                values["rope_llama3"] = Llama3Rope(**values["rope_llama3"])
            if values.get("rope_factors") is not None:
                values["rope_factors"] = tuple(float(f) for f in values["rope_factors"])
            values["sliding_layers"] = tuple(bool(s) for s in values.get("sliding_layers", ()))
            for name, kind in (("heads", int), ("streams", bool)):
                values[name] = tuple(tuple(kind(v) for v in row) for row in values.get(name, ()))
            spec = cls(**values)
        except (TypeError, ValueError) as error:
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
            "n_kv_heads": (1, 1024),
            "head_dim": (4, 512),
            "d_ff": (4, 262144),
            "vocab_size": (1, 4194304),
            "max_context": (1, 16777216),
            "norm_eps": (1e-12, 1e-1),
            "rope_theta": (1.0, 1e12),
            "rope_linear": (1.0, 1e6),
            "embed_scale": (1e-6, 1e6),
        }
        optional = {
            "rope_theta_local": (1.0, 1e12),
            "attn_scale": (1e-6, 1e6),
            "sliding_window": (1, 16777216),
        }
        for name, (low, high) in (limits | optional).items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            whole = isinstance(low, int) and name not in {"attn_scale"}
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ArtifactError(f"model {name} is {value!r}, not a number")
            if not low <= value <= high:
                raise ArtifactError(f"model {name} is {value}, allowed {low} to {high}")
        if self.n_heads % self.n_kv_heads:
            raise ArtifactError(
                f"model has {self.n_heads} heads for {self.n_kv_heads} KV heads, not a multiple"
            )
        if self.head_dim % 4:
            raise ArtifactError(f"model head_dim is {self.head_dim}, not a multiple of 4")
        if not isinstance(self.family, str):
            raise ArtifactError(f"model family is {self.family!r}, not a name")
        for name in ("tied_head", "qkv_bias", "qk_norm", "post_norms"):
            if not isinstance(getattr(self, name), bool):
                raise ArtifactError(f"model {name} is {getattr(self, name)!r}, not true or false")
        if self.activation not in ("silu", "gelu_tanh"):
            raise ArtifactError(f"model activation {self.activation!r} is not known")
        if self.sliding_layers and len(self.sliding_layers) != self.n_layers:
            raise ArtifactError(
                f"model lists {len(self.sliding_layers)} sliding layers for {self.n_layers}"
            )
        if any(self.sliding_layers) and self.sliding_window is None:
            raise ArtifactError("model has sliding layers and no sliding_window")
        self._check_heads()
        if self.rope_factors is not None and len(self.rope_factors) != self.head_dim // 2:
            raise ArtifactError(
                f"model has {len(self.rope_factors)} rope factors, needs {self.head_dim // 2}"
            )
        if not all(1e-6 <= factor <= 1e6 for factor in self.rope_factors or ()):
            raise ArtifactError("model has a rope factor outside 1e-6 to 1e6")
        if self.rope_llama3 is not None:
            for name, value in asdict(self.rope_llama3).items():
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise ArtifactError(f"model rope_llama3 {name} is {value!r}, not a number")
                if not 1e-6 <= value <= 1e9:
                    raise ArtifactError(f"model rope_llama3 {name} is {value}, allowed 1e-6 to 1e9")
            if self.rope_llama3.low_freq_factor >= self.rope_llama3.high_freq_factor:
                raise ArtifactError(
                    "model rope_llama3 low_freq_factor is not below high_freq_factor"
                )

    def _check_heads(self) -> None:
        most = self.n_heads // self.n_kv_heads
        for name in ("heads", "streams"):
            table = getattr(self, name)
            if table and len(table) != self.n_layers:
                raise ArtifactError(
                    f"model {name} has {len(table)} rows for {self.n_layers} layers"
                )
        for i, row in enumerate(self.heads):
            if not 1 <= len(row) <= self.n_kv_heads or not all(1 <= n <= most for n in row):
                raise ArtifactError(
                    f"model heads of layer {i} are {row}, allowed 1 to {self.n_kv_heads} KV heads "
                    f"of 1 to {most} query heads"
                )
        for i, streaming in enumerate(self.streams):
            if len(streaming) != len(self.heads_of(i)):
                raise ArtifactError(
                    f"model streams of layer {i} are {len(streaming)} for "
                    f"{len(self.heads_of(i))} KV heads"
                )
            if any(streaming) and self.slides(i):
                raise ArtifactError(
                    f"model layer {i} slides and streams, allowed is one of the two"
                )
