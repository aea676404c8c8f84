"""A small GGUF writer, and two small models: random weights, and the real stories260K."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Field", "Tensor", "encode", "gguf_bytes", "stories260k", "tiny_model", "write_gguf"]

TYPE_IDS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8,
    "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "BF16": 30,
}  # fmt: skip

_VALUE_IDS = {
    "uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5, "float32": 6,
    "bool": 7, "uint64": 10, "int64": 11, "float64": 12,
}  # fmt: skip

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Merges of the tiny vocabulary are learned from this text.
_TEXT = """
The small boat left the harbour early in the morning, when the water was still dark and the gulls
were asleep on the roofs. A girl stood at the front and counted the lamps along the shore, one by
one, until the last of them was gone behind the hill. Her father steered without a word. He knew
every rock and every current of this coast, because his own father had shown them to him when he
was as young as she was now. They would fish until noon, sell what they caught in the next village,
and come home before the evening wind could rise. What is the name of that light over there, she
asked, and why does it turn? It turns, he answered, so that sailors can tell it from a star.
Later the sun broke through, the nets grew heavy, and for a long time nobody spoke at all. When
they finally pulled everything aboard there were herring, mackerel, a few crabs and one enormous
cod that looked at them as if they were to blame. Between the boxes an old kettle was boiling; it
had made tea for three generations of people who never trusted a weather forecast. Write down what
we have, said the man, and she opened her notebook, drew a line under yesterday, and began again:
question, answer, weight, price, capital, country, model, machine, language, problem, number.
"""


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]  # row-major
    data: bytes


@dataclass(frozen=True)
class Field:
    """An integer of the header: what it is, where it stands, its bytes."""

    name: str
    offset: int
    width: int


def encode(values: NDArray[np.floating[Any]], dtype: str) -> Tensor:
    """Store `values` in one of the simple formats, by plain rounding."""
    x = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "F32":
        return Tensor(dtype, x.shape, x.tobytes())
    if dtype == "F16":
        return Tensor(dtype, x.shape, x.astype("<f2").tobytes())
    if dtype == "BF16":
        return Tensor(dtype, x.shape, (x.view("<u4") >> 16).astype("<u2").tobytes())
    groups = x.reshape(-1, 32)
    low, high = groups.min(axis=1), groups.max(axis=1)
    biggest = np.where(-low > high, low, high)
    if dtype == "Q8_0":
        head = [np.abs(biggest) / 127]
        codes = _round(groups, head[0], 0, -127, 127).astype(np.int8).view(np.uint8)
    elif dtype == "Q4_0":
        head = [biggest / -8]
        codes = _nibbles(_round(groups, head[0], 0, -8, 7) + 8)
    elif dtype == "Q4_1":
        head = [(high - low) / 15, low]
        codes = _nibbles(_round(groups, head[0], low[:, None], 0, 15))
    else:
        raise ValueError(dtype)
    halves = np.stack([h.astype("<f2") for h in head], axis=1).view(np.uint8)
    return Tensor(dtype, x.shape, np.concatenate([halves, codes], axis=1).tobytes())


def _round(
    groups: NDArray[np.float32], scale: NDArray[np.float32], least: Any, low: int, high: int
) -> NDArray[np.float32]:
    step = np.where(scale == 0, 1, scale.astype(np.float16).astype(np.float32))
    out: NDArray[np.float32] = np.clip(np.rint((groups - least) / step[:, None]), low, high)
    return out


def _nibbles(codes: NDArray[np.float32]) -> NDArray[np.uint8]:
    q = codes.astype(np.uint8)
    packed: NDArray[np.uint8] = q[:, :16] | (q[:, 16:] << np.uint8(4))
    return packed


class _Writer:
    def __init__(self) -> None:
        self.out = bytearray()
        self.fields: list[Field] = []

    def integer(self, name: str, value: int, width: int) -> None:
        self.fields.append(Field(name, len(self.out), width))
        self.out += value.to_bytes(width, "little")

    def string(self, name: str, text: str | bytes) -> None:
        raw = text.encode() if isinstance(text, str) else text
        self.integer(f"length of {name}", len(raw), 8)
        self.out += raw

    def value(self, key: str, value: object) -> None:
        if isinstance(value, (str, bytes)):
            self.integer(f"type of {key}", 8, 4)
            self.string(f"value of {key}", value)
        elif isinstance(value, list):
            self.integer(f"type of {key}", 9, 4)
            self.integer(f"element type of {key}", 8, 4)
            self.integer(f"count of {key}", len(value), 8)
            for i, text in enumerate(value):
                self.string(f"{key}[{i}]", text)
        elif isinstance(value, np.ndarray):
            self.integer(f"type of {key}", 9, 4)
            self.integer(f"element type of {key}", _VALUE_IDS[value.dtype.name], 4)
            self.integer(f"count of {key}", value.size, 8)
            self.out += value.tobytes()
        else:
            number: np.generic = _number(value)
            self.integer(f"type of {key}", _VALUE_IDS[number.dtype.name], 4)
            self.fields.append(Field(f"value of {key}", len(self.out), number.dtype.itemsize))
            self.out += number.tobytes()


def _number(value: object) -> Any:  # a NumPy scalar
    if isinstance(value, np.generic):
        return value
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int):
        return np.uint32(value)
    if isinstance(value, float):
        return np.float32(value)
    raise TypeError(type(value))


def gguf_bytes(
    metadata: Mapping[str, object],
    tensors: Mapping[str, Tensor] | list[tuple[str, Tensor]],
    *,
    version: int = 3,
    alignment: int = 32,
    keys: list[tuple[str, object]] | None = None,
) -> tuple[bytes, list[Field], int]:
    """A GGUF file: its bytes, the integers of its header, where its data starts.

    `keys` are added after `metadata`, so that a key can be written twice.
    """
    w = _Writer()
    w.out += b"GGUF"
    pairs = list(metadata.items()) + (keys or [])
    entries = list(tensors.items()) if isinstance(tensors, Mapping) else tensors
    w.integer("version", version, 4)
    w.integer("number of tensors", len(entries), 8)
    w.integer("number of keys", len(pairs), 8)
    for key, value in pairs:
        w.string("a key", key)
        w.value(key, value)
    offset = 0
    for name, tensor in entries:
        w.string("a tensor name", name)
        w.integer(f"dimensions of {name}", len(tensor.shape), 4)
        for i, size in enumerate(reversed(tensor.shape)):
            w.integer(f"dimension {i} of {name}", size, 8)
        w.integer(f"type of {name}", TYPE_IDS[tensor.dtype], 4)
        w.integer(f"offset of {name}", offset, 8)
        offset += -(-len(tensor.data) // alignment) * alignment
    w.out += bytes(-len(w.out) % alignment)
    data = len(w.out)
    for _, tensor in entries:
        w.out += tensor.data + bytes(-len(tensor.data) % alignment)
    return bytes(w.out), w.fields, data


def write_gguf(path: Path, metadata: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Path:
    path.write_bytes(gguf_bytes(metadata, tensors)[0])
    return path


# ---- two small models of one shape --------------------------------------------------------------

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT = 64, 172, 5, 8, 4, 512, 512


def _shape_metadata() -> dict[str, object]:
    return {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.block_count": LAYERS,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": DIM,
        "llama.feed_forward_length": HIDDEN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": DIM // HEADS,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": VOCAB,
    }


def tiny_model(
    seed: int = 0, *, dtypes: Mapping[str, str] | None = None, tied: bool = True
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Metadata and tensors of a llama with random weights and a byte-level BPE vocabulary.

    `dtypes` overrides the number format by the last word but one of a tensor's name
    (`{"attn_q": "F32"}`). `ffn_down` has 172 columns, so no block format fits it.
    """
    rng = np.random.default_rng(seed)
    kv = DIM // HEADS * KV_HEADS
    formats = {
        "token_embd": "Q8_0", "output": "Q8_0", "attn_q": "Q4_1", "attn_k": "Q4_1",
        "attn_v": "Q4_0", "attn_output": "Q4_0", "ffn_gate": "Q4_1", "ffn_up": "Q8_0",
        "ffn_down": "F16",
    } | dict(dtypes or {})  # fmt: skip

    def matrix(name: str, rows: int, cols: int, std: float | None = None) -> Tensor:
        values = rng.normal(0, cols**-0.5 if std is None else std, (rows, cols))
        return encode(values, formats[name])

    def norm() -> Tensor:
        return encode(rng.normal(1, 0.1, DIM), "F32")

    tensors = {"token_embd.weight": matrix("token_embd", VOCAB, DIM, 0.5)}
    for i in range(LAYERS):
        p = f"blk.{i}."
        tensors |= {
            p + "attn_norm.weight": norm(),
            p + "attn_q.weight": matrix("attn_q", DIM, DIM),
            p + "attn_k.weight": matrix("attn_k", kv, DIM),
            p + "attn_v.weight": matrix("attn_v", kv, DIM),
            p + "attn_output.weight": matrix("attn_output", DIM, DIM),
            p + "ffn_norm.weight": norm(),
            p + "ffn_gate.weight": matrix("ffn_gate", HIDDEN, DIM),
            p + "ffn_up.weight": matrix("ffn_up", HIDDEN, DIM),
            p + "ffn_down.weight": matrix("ffn_down", DIM, HIDDEN),
        }
    tensors["output_norm.weight"] = norm()
    if not tied:
        tensors["output.weight"] = matrix("output", VOCAB, DIM)
    return _shape_metadata() | _bpe_vocabulary(), tensors


@cache
def _bpe_vocabulary() -> dict[str, object]:
    """512 tokens: three control tokens, the 256 bytes, and merges learned from `_TEXT`."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = _byte_letters()
    words = Counter(
        tuple(letters[b] for b in word.encode())
        for word in re.findall(r" ?[A-Za-z]+", _TEXT.replace("\n", " "))
    )
    tokens = control + list(dict.fromkeys(letters.values()))
    merges: list[str] = []
    while len(tokens) < VOCAB:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(" ".join(best))
        if "".join(best) not in tokens:
            tokens.append("".join(best))
        words = Counter({_merge(word, best): count for word, count in words.items()})
    kinds = np.array([3] * len(control) + [1] * (VOCAB - len(control)), dtype=np.int32)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": CHATML,
    }


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte, in GPT-2's order."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(moved)}


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return tuple(out)


def stories260k(folder: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The real stories260K of llama2.c, from `stories260K.bin` and `tok512.bin`, as F32.

    llama2.c rotates neighbouring pairs, as GGUF's llama does, so the weights go over unchanged.
    """
    raw = (folder / "stories260K.bin").read_bytes()
    header = struct.unpack_from("<7i", raw)
    if header != (DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT):
        raise ValueError(header)
    values = np.frombuffer(raw, "<f4", offset=28)
    kv = DIM // HEADS * KV_HEADS
    position = 0

    def take(*shape: int) -> NDArray[np.float32]:
        nonlocal position
        size = int(np.prod(shape))
        position += size
        return values[position - size : position].reshape(shape)

    embed = take(VOCAB, DIM)
    layers = {
        "attn_norm": take(LAYERS, DIM),
        "attn_q": take(LAYERS, DIM, DIM),
        "attn_k": take(LAYERS, kv, DIM),
        "attn_v": take(LAYERS, kv, DIM),
        "attn_output": take(LAYERS, DIM, DIM),
        "ffn_norm": take(LAYERS, DIM),
        "ffn_gate": take(LAYERS, HIDDEN, DIM),
        "ffn_down": take(LAYERS, DIM, HIDDEN),
        "ffn_up": take(LAYERS, HIDDEN, DIM),
    }
    tensors = {"token_embd.weight": encode(embed, "F32")}
    for i in range(LAYERS):
        for name, stacked in layers.items():
            tensors[f"blk.{i}.{name}.weight"] = encode(stacked[i], "F32")
    tensors["output_norm.weight"] = encode(take(DIM), "F32")
    return _shape_metadata() | _sentencepiece_vocabulary(folder / "tok512.bin"), tensors


def _sentencepiece_vocabulary(path: Path) -> dict[str, object]:
    raw = path.read_bytes()
    tokens, scores, position = [], [], 4
    while position < len(raw):
        score, length = struct.unpack_from("<fi", raw, position)
        tokens.append(raw[position + 8 : position + 8 + length].decode().replace(" ", "▁"))
        scores.append(score)
        position += 8 + length
    tokens[:3] = ["<unk>", "<s>", "</s>"]
    kinds = [6 if re.fullmatch("<0x[0-9A-F]{2}>", token) else 1 for token in tokens]
    kinds[:3] = [2, 3, 3]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, dtype=np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
    }
