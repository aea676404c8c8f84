"""A model's vocabulary to the files that `Tokenizer` loads.

    GGUF metadata ──┐
                    ├──> build_tokenizer ──> TokenizerFiles
    HF folder ──────┘

Vocabularies and templates come from strangers, and the `tokenizers` library may panic, hang or eat
memory on them. `build_tokenizer_checked` therefore builds and tries them out in a child process
with limits (`tokenizer_check`), once, when a model is converted; afterwards the artifact's own,
verified files are loaded in process.

For GGUF files llama.cpp (src/llama-vocab.cpp) is the reference: same text, same ids.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashlite.checkpoint.base import Checkpoint
from flashlite.checkpoint.chat import ChatTemplate, harmless
from flashlite.checkpoint.pretokenizers import PreTokenizer, pre_tokenizer
from flashlite.checkpoint.tokenizer import (
    BYTE_LETTERS,
    MAX_VOCABULARY,
    SpecialTokens,
    Tokenizer,
    TokenizerFiles,
    guarded,
    load_library,
)
from flashlite.errors import TemplateError, TokenizerError

__all__ = ["build_tokenizer", "build_tokenizer_checked", "check_round_trip"]

_MAX_TOKEN = 1 << 12  # characters
_MAX_FILE = 1 << 26  # bytes of one tokenizer file
_MAX_REPLY = 1 << 28  # characters of the child's answer

# Token types of GGUF.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_SPACE = "\u2581"  # how SentencePiece writes a space

# Spellings that end an answer, whatever type the file gives them; as in llama.cpp.
_END_SPELLINGS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>"),
        *("<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
        *("<end_of_utterance>", "<eos>", "<｜end▁of▁sentence｜>"),
        *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    )
)
# A control token too, but an end only where the file says so: Gemma has it as the end of <s>.
_CONTROL_SPELLINGS = _END_SPELLINGS | {"</s>"}
_SAMPLE = "The quick brown fox, 1,234.56 naïve cafés: 你好 нет 😀\n\n  x = [1, 2]\t# ok"


def build_tokenizer(checkpoint: Checkpoint) -> TokenizerFiles:
    """Build the tokenizer of a model in this process: for checkpoints that are trusted.

    Raises:
        TokenizerError: the vocabulary is missing, malformed, of an unknown kind or too large.
        TemplateError: the chat template is refused, or fails on a plain conversation.
    """
    build = _from_gguf if checkpoint.format == "gguf" else _from_folder
    return _check_template(build(checkpoint))


def build_tokenizer_checked(checkpoint: Checkpoint, *, timeout: float = 120.0) -> TokenizerFiles:
    """Build and try out the tokenizer of a model in a limited child process.

    Args:
        checkpoint: an opened model.
        timeout: seconds after which the child is killed.

    Raises:
        TokenizerError: as `build_tokenizer`; or the child took too long, too much memory, or died.
        TemplateError: as `build_tokenizer`.
    """
    job = {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "architecture": checkpoint.architecture,
        "metadata": {
            key: _plain(value)
            for key, value in checkpoint.metadata.items()
            if checkpoint.format == "gguf" and key.startswith("tokenizer.")
        },
    }
    package_root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "flashlite.checkpoint.tokenizer_check"]
    python_path = os.pathsep.join(filter(None, [str(package_root), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": python_path, "TOKENIZERS_PARALLELISM": "false"}
    try:
        child = subprocess.run(
            command,
            input=json.dumps(job).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TokenizerError(
            f"{checkpoint.path}: its tokenizer was not built after {timeout:g} s and was given up"
        ) from None
    except (OSError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{checkpoint.path}: its tokenizer cannot be checked: {error}"
        ) from None
    return _read_reply(checkpoint, child.returncode, child.stdout)


def check_round_trip(files: TokenizerFiles) -> None:
    """Try a tokenizer on a fixed text: it comes back, in ids that exist, none of them control.

    Raises:
        TokenizerError: it does not.
    """
    tokenizer = Tokenizer(files)
    ids = tokenizer.encode(_SAMPLE)
    if not ids or not all(0 <= id_ < tokenizer.vocab_size for id_ in ids):
        raise TokenizerError(f"vocabulary gives ids outside 0 to {tokenizer.vocab_size - 1}")
    for control in files.tokens.control:
        tokenizer.encode(tokenizer.spelling(control))


def _read_reply(checkpoint: Checkpoint, status: int, output: bytes) -> TokenizerFiles:
    if status != 0 or len(output) > _MAX_REPLY:
        raise TokenizerError(
            f"{checkpoint.path}: its tokenizer could not be built within the limits of time and "
            f"memory (status {status}); the file may be damaged or hostile"
        )
    try:
        reply = json.loads(output)
        if "error" in reply:
            kind = TemplateError if reply["kind"] == "TemplateError" else TokenizerError
            raise kind(f"{checkpoint.path}: {reply['error']}")
        return TokenizerFiles(
            tokenizer_json=reply["tokenizer_json"],
            chat_template=reply["chat_template"],
            tokens=SpecialTokens.from_json(reply["tokens"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise TokenizerError(f"{checkpoint.path}: its tokenizer check failed: {error}") from None


def _plain(value: object) -> Any:
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else value


# GGUF


def _from_gguf(checkpoint: Checkpoint) -> TokenizerFiles:
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
            f"tokenizer model {kind[:40]!r} is not known, known are gpt2 (byte-level BPE) and llama "
            "(SentencePiece BPE); use the safetensors form of the model"
        )
    bos = metadata.token_id("bos", len(tokens))
    ends = [metadata.token_id(name, len(tokens)) for name in ("eos", "eot", "eom")]
    ends += [id_ for id_, token in enumerate(tokens) if token in _END_SPELLINGS]
    return TokenizerFiles(
        tokenizer_json=json.dumps(document, ensure_ascii=False, separators=(",", ":")),
        chat_template=metadata.optional_text("tokenizer.chat_template"),
        tokens=SpecialTokens(
            bos=bos,
            eos=_distinct(ends),
            add_bos=metadata.flag("tokenizer.ggml.add_bos_token", add_bos) and bos is not None,
            control=tuple(i for i, type_ in enumerate(types) if type_ in (_CONTROL, _UNKNOWN)),
        ),
    )


def _vocabulary(metadata: _Metadata) -> tuple[list[str], list[int]]:
    """Tokens and their types; spellings that end an answer are control tokens."""
    tokens = metadata.texts("tokenizer.ggml.tokens", MAX_VOCABULARY)
    if not tokens:
        raise TokenizerError("vocabulary is empty")
    last = {token: id_ for id_, token in enumerate(tokens)}
    for id_, token in enumerate(tokens):
        if last[token] != id_:
            raise TokenizerError(f"tokens {id_} and {last[token]} are both {token[:40]!r}")
    types = [int(t) for t in metadata.numbers("tokenizer.ggml.token_type", len(tokens), _NORMAL)]
    for id_, (token, type_) in enumerate(zip(tokens, types, strict=True)):
        if not 1 <= len(token) <= _MAX_TOKEN:
            raise TokenizerError(
                f"token {id_} has {len(token)} characters, allowed 1 to {_MAX_TOKEN}"
            )
        if not 0 <= type_ <= _BYTE:
            raise TokenizerError(f"token {id_} has type {type_}, allowed 0 to {_BYTE}")
        if type_ == _BYTE and not re.fullmatch("<0x[0-9A-F]{2}>", token):
            raise TokenizerError(f"byte token {id_} is spelled {token[:40]!r}, expected <0xNN>")
        if token in _CONTROL_SPELLINGS:
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
        if type_ not in (_CONTROL, _UNKNOWN, _BYTE) and " " not in token  # spaces are U+2581 by then
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
    unions = [scores.get(a + b, -math.inf) for a, b in zip(parts, parts[1:], strict=False)]
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
        value = _plain(self._values.get(key))
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


# Hugging Face folder


def _from_folder(checkpoint: Checkpoint) -> TokenizerFiles:
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    document = _object(folder, "tokenizer.json")
    if document is None:
        raise TokenizerError(f"{folder} has no tokenizer.json; save the tokenizer beside the model")
    document = {**document, "truncation": None, "padding": None}  # nothing is cut silently
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    library = load_library(text)
    config = _object(folder, "tokenizer_config.json") or {}
    added = library.get_added_tokens_decoder()
    names = [
        (token.content, _CONTROL if token.special else _USER_DEFINED) for token in added.values()
    ]
    ids = {token.content: id_ for id_, token in added.items()}
    unknown = guarded(lambda: getattr(library.model, "unk_token", None), "tokenizer.json")
    bos = _named(config.get("bos_token"), library)
    generation = _object(folder, "generation_config.json") or {}
    ends = {_named(config.get("eos_token"), library)}
    listed = generation.get("eos_token_id", checkpoint.metadata.get("eos_token_id"))
    for id_ in listed if isinstance(listed, list) else [listed]:
        if isinstance(id_, int) and not isinstance(id_, bool) and library.id_to_token(id_):
            ends.add(id_)
    marked = [(content, type_) for content, type_ in names if content != unknown]
    starts = guarded(lambda: library.encode("a", add_special_tokens=True).ids, "tokenizer.json")
    add_bos = config.get("add_bos_token", bos is not None and starts[:1] == [bos])
    spelled_ends = {ids[name] for name, _ in marked if name in _END_SPELLINGS}
    return TokenizerFiles(
        tokenizer_json=text,
        chat_template=_folder_template(folder, config),
        tokens=SpecialTokens(
            bos=bos,
            eos=tuple(sorted({id_ for id_ in ends if id_ is not None} | spelled_ends)),
            add_bos=add_bos is True and bos is not None,
            control=tuple(
                sorted(
                    ids[name]
                    for name, type_ in marked
                    if type_ == _CONTROL or name in _END_SPELLINGS
                )
            ),
        ),
    )


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (text := _text(folder, "chat_template.jinja")) is not None:
        return text
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"chat_template is {_kind(template)}, expected text")
    return template


def _named(token: object, library: Any) -> int | None:
    """The id of a token that a configuration names: by its text, or in an object's `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return library.token_to_id(text) if isinstance(text, str) else None


def _object(folder: Path, name: str) -> dict[str, Any] | None:
    text = _text(folder, name)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{folder / name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{folder / name} holds {_kind(value)}, expected an object")
    return value


def _text(folder: Path, name: str) -> str | None:
    path = folder / name
    try:
        if not path.is_file():
            return None
        size = path.stat().st_size
        if size > _MAX_FILE:
            raise TokenizerError(f"{path} has {size} bytes, allowed {_MAX_FILE}")
        return path.read_bytes()[: _MAX_FILE + 1].decode()
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 at byte {error.start}") from None


# Both


def _distinct(ids: Iterable[int | None]) -> tuple[int, ...]:
    """The ids without repetition; the first, which the file names, stays first."""
    return tuple(dict.fromkeys(id_ for id_ in ids if id_ is not None))


def _check_template(files: TokenizerFiles) -> TokenizerFiles:
    """Try the chat template; tokens it spells in its own text become control tokens."""
    if files.chat_template is None:
        return files
    tokenizer = Tokenizer(replace(files, chat_template=None))
    bos, eos = files.tokens.bos, files.tokens.eos
    template = ChatTemplate(
        files.chat_template,
        bos_token="" if bos is None else tokenizer.spelling(bos),
        eos_token=tokenizer.spelling(eos[0]) if eos else "",
    )
    scaffolding = [*template.literals, *_sample_renders(template)]
    document = json.loads(files.tokenizer_json)
    control = set(files.tokens.control)
    for token in document["added_tokens"]:
        spelling, id_ = token["content"], token["id"]
        # White space is layout, in scaffolding and in text alike.
        if spelling.strip() and any(spelling in text for text in scaffolding):
            token["special"] = True
            control.add(id_)
    return replace(
        files,
        tokenizer_json=json.dumps(document, ensure_ascii=False, separators=(",", ":")),
        tokens=replace(files.tokens, control=tuple(sorted(control))),
    )


def _sample_renders(template: ChatTemplate) -> list[str]:
    """Plain conversations; only the first must be accepted by every template."""
    user, assistant = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    chats = [[user], [user, assistant, user], [{"role": "system", "content": "x"}, user]]
    texts = [template.render(harmless(chats[0], template.source))]
    for chat in chats[1:]:
        for prompt in (False, True):
            try:
                texts.append(template.render(harmless(chat, template.source), prompt))
            except TemplateError:
                continue
    return texts
