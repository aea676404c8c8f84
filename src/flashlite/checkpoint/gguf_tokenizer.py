"""The vocabulary in a GGUF file, in the format of the `tokenizers` library.

llama.cpp (src/llama-vocab.cpp) is the reference: same text, same ids.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from flashlite.checkpoint.base import Checkpoint
from flashlite.checkpoint.pretokenizers import PreTokenizer, pre_tokenizer
from flashlite.checkpoint.tokenizer import (
    BYTE_LETTERS,
    MAX_VOCABULARY,
    SpecialTokens,
    TokenizerFiles,
    compact_json,
)
from flashlite.errors import TokenizerError

__all__ = ["CONTROL_SPELLINGS", "END_SPELLINGS", "gguf_tokenizer", "merges_of_scores"]

_MAX_TOKEN = 1 << 12  # characters

# Token types of GGUF.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_SPACE = "\u2581"  # how SentencePiece writes a space

# Spellings that end an answer, whatever type the file gives them; as in llama.cpp.
END_SPELLINGS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>"),
        *("<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
        *("<end_of_utterance>", "<eos>", "<｜end▁of▁sentence｜>"),
        *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    )
)
# A control token too, but an end only where the file says so: Gemma has it as the end of <s>.
CONTROL_SPELLINGS = END_SPELLINGS | {"</s>"}


def gguf_tokenizer(checkpoint: Checkpoint) -> TokenizerFiles:
    """The tokenizer that the metadata of a GGUF file describes.

    Raises:
        TokenizerError: a key is missing or has the wrong type; the vocabulary is empty, too large,
            holds a token twice, or a token, type, score, merge or id that cannot be; the kind of
            vocabulary or its pre-tokenizer is not known.
    """
    metadata = _Metadata(checkpoint.metadata)
    kind = metadata.text("tokenizer.ggml.model")
    tokens, types = _vocabulary(metadata)
    if kind == "gpt2":
        rule = pre_tokenizer(metadata.text("tokenizer.ggml.pre", "default"))
        merges = metadata.texts("tokenizer.ggml.merges", 2 * MAX_VOCABULARY)
        document = _byte_level(tokens, types, merges, rule)
        add_bos = rule.add_bos
    elif kind == "llama":
        prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
        scores = metadata.numbers("tokenizer.ggml.scores", len(tokens))
        document = _sentence_piece(tokens, types, scores, prefix)
        add_bos = True
    else:
        raise TokenizerError(
            f"tokenizer model {kind[:40]!r} is not known, known are gpt2 (byte-level BPE) and "
            "llama (SentencePiece BPE); use the safetensors form of the model"
        )
    bos = metadata.token_id("bos", len(tokens))
    ends = [metadata.token_id(name, len(tokens)) for name in ("eos", "eot", "eom")]
    ends += [id_ for id_, token in enumerate(tokens) if token in END_SPELLINGS]
    return TokenizerFiles(
        tokenizer_json=compact_json(document),
        chat_template=metadata.optional_text("tokenizer.chat_template"),
        tokens=SpecialTokens(
            bos=bos,
            eos=tuple(dict.fromkeys(id_ for id_ in ends if id_ is not None)),
            add_bos=metadata.flag("tokenizer.ggml.add_bos_token", add_bos) and bos is not None,
            control=tuple(i for i, type_ in enumerate(types) if type_ in (_CONTROL, _UNKNOWN)),
        ),
    )


def _vocabulary(metadata: _Metadata) -> tuple[list[str], list[int]]:
    """Tokens and their types; spellings that end an answer are control tokens."""
    tokens = metadata.texts("tokenizer.ggml.tokens", MAX_VOCABULARY)
    tokens = [token or f"[EMPTY_{id_}]" for id_, token in enumerate(tokens)]
    if not tokens:
        raise TokenizerError("vocabulary is empty")
    last = {token: id_ for id_, token in enumerate(tokens)}
    for id_, token in enumerate(tokens):
        if last[token] != id_:
            raise TokenizerError(f"tokens {id_} and {last[token]} are both {token[:40]!r}")
    types = [int(t) for t in metadata.numbers("tokenizer.ggml.token_type", len(tokens), _NORMAL)]
    for id_, (token, type_) in enumerate(zip(tokens, types, strict=True)):
        if len(token) > _MAX_TOKEN:
            raise TokenizerError(f"token {id_} has {len(token)} characters, allowed {_MAX_TOKEN}")
        if not 0 <= type_ <= _BYTE:
            raise TokenizerError(f"token {id_} has type {type_}, allowed 0 to {_BYTE}")
        if type_ == _BYTE and not re.fullmatch("<0x[0-9A-F]{2}>", token):
            raise TokenizerError(f"byte token {id_} is spelled {token[:40]!r}, expected <0xNN>")
        if token in CONTROL_SPELLINGS:
            types[id_] = _CONTROL
    return tokens, types


def _byte_level(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], rule: PreTokenizer
) -> dict[str, Any]:
    """A byte-level BPE vocabulary (GPT-2) in the format of the `tokenizers` library."""
    ids = {token: id_ for id_, token in enumerate(tokens)}
    control = {t for t, type_ in zip(tokens, types, strict=True) if type_ == _CONTROL}
    kept = []
    for number, merge in enumerate(merges):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            raise TokenizerError(
                f"merge {number} is {merge[:40]!r}, expected two parts and a space"
            )
        # llama.cpp spells a merged word out in bytes where it is no token; here it must be one.
        if left in ids and right in ids and left + right in ids and left + right not in control:
            kept.append(merge)
    steps = [_split(pattern) for pattern in rule.patterns]
    steps.append(_BYTE_LEVEL)
    if missing := [letter for letter in BYTE_LETTERS if letter not in ids]:
        # llama.cpp drops bytes the vocabulary lacks, after merging; the library drops them before.
        steps.append(_split(f"[{''.join(map(_escaped, missing))}]", "Removed"))
    return _document(
        model={"ignore_merges": rule.whole_words, "byte_fallback": False, "merges": kept},
        ids=ids,
        types=types,
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder=_BYTE_LEVEL,
    )


def _sentence_piece(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], space_prefix: bool
) -> dict[str, Any]:
    """A SentencePiece BPE vocabulary with byte fallback in the format of the library."""
    ids = {token: id_ for id_, token in enumerate(tokens)}
    if absent := [f"<0x{b:02X}>" for b in range(256) if types[ids.get(f"<0x{b:02X}>", 0)] != _BYTE]:
        raise TokenizerError(
            f"vocabulary lacks {len(absent)} byte tokens, the first is {absent[0]}"
        )
    if bad := [i for i, score in enumerate(scores) if not math.isfinite(score)]:
        raise TokenizerError(f"score of token {bad[0]} is {scores[bad[0]]}, not finite")
    mergeable = {
        token: score
        for token, type_, score in zip(tokens, types, scores, strict=True)
        if type_ not in (_CONTROL, _UNKNOWN, _BYTE)
        and " " not in token  # spaces are U+2581 by then
    }
    normalizers: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    ]
    if space_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
    return _document(
        model={
            "ignore_merges": False,
            "byte_fallback": True,
            "merges": [" ".join(pair) for pair in merges_of_scores(mergeable)],
        },
        ids=ids,
        types=types,
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    )


def merges_of_scores(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges that give the same tokens as merging neighbours by score, in order.

    SentencePiece joins the two neighbours whose union scores highest, the leftmost first, until no
    union is a token. Whenever the last two parts of a token meet in a text, nothing around them has
    touched them yet, so they are the parts it falls into when it is segmented alone: one merge per
    token is enough, and ties between ways to make the same token cannot arise.

    Args:
        scores: score of each token that may arise by merging.
    """
    by_score = sorted(scores, key=scores.__getitem__, reverse=True)
    return [pair for token in by_score if (pair := _last_merge(token, scores))]


def _last_merge(token: str, scores: Mapping[str, float]) -> tuple[str, str] | None:
    """The two parts a token is made of last, None where merging never makes it."""
    parts = list(token)
    unions = [scores.get(a + b, -math.inf) for a, b in pairwise(parts)]
    while len(parts) > 2:
        best = max(unions)
        if best == -math.inf:
            return None
        at = unions.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del unions[at]
        if at > 0:
            unions[at - 1] = scores.get(parts[at - 1] + parts[at], -math.inf)
        if at < len(unions):
            unions[at] = scores.get(parts[at] + parts[at + 1], -math.inf)
    return (parts[0], parts[1]) if len(parts) == 2 else None


_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def _split(pattern: str, behavior: str = "Isolated") -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": behavior,
        "invert": False,
    }


def _escaped(letter: str) -> str:
    return f"\\x{{{ord(letter):x}}}"


def _document(
    *,
    model: Mapping[str, Any],
    ids: Mapping[str, int],
    types: Sequence[int],
    normalizer: Mapping[str, Any] | None,
    pre_tokenizer: Mapping[str, Any] | None,
    decoder: Mapping[str, Any],
) -> dict[str, Any]:
    added = [
        {
            "id": id_,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[id_] != _USER_DEFINED,
        }
        for token, id_ in ids.items()
        if types[id_] in (_CONTROL, _UNKNOWN, _USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            **model,
            "vocab": ids,
        },
    }


class _Metadata:
    """GGUF keys, each read with the type it must have."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values

    def text(self, key: str, default: str | None = None) -> str:
        value = self._values.get(key, default)
        if not isinstance(value, str):
            raise TokenizerError(f"{key} is {_kind(value)}, expected text")
        return value

    def optional_text(self, key: str) -> str | None:
        return self.text(key) if key in self._values else None

    def flag(self, key: str, default: bool) -> bool:
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise TokenizerError(f"{key} is {_kind(value)}, expected true or false")
        return value

    def texts(self, key: str, limit: int) -> list[str]:
        value = self._values.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise TokenizerError(f"{key} is {_kind(value)}, expected a list of texts")
        if len(value) > limit:
            raise TokenizerError(f"{key} has {len(value)} entries, allowed {limit}")
        return value

    def numbers(self, key: str, count: int, default: float | None = None) -> list[float]:
        if key not in self._values and default is not None:
            return [default] * count
        value = self._values.get(key)
        value = value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(value, list) or not all(type(item) in (int, float) for item in value):
            raise TokenizerError(f"{key} is {_kind(value)}, expected a list of numbers")
        if len(value) != count:
            raise TokenizerError(f"{key} has {len(value)} entries, the vocabulary {count}")
        return value

    def token_id(self, name: str, count: int) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
            raise TokenizerError(f"{key} is {str(value)[:40]}, allowed 0 to {count - 1}")
        return value


def _kind(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
