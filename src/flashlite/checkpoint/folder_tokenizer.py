"""The tokenizer of a Hugging Face folder: `tokenizer.json` and the files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashlite.checkpoint.base import Checkpoint
from flashlite.checkpoint.gguf_tokenizer import CONTROL_SPELLINGS, END_SPELLINGS
from flashlite.checkpoint.tokenizer import (
    SpecialTokens,
    TokenizerFiles,
    compact_json,
    guarded,
    load_library,
)
from flashlite.errors import TokenizerError

__all__ = ["folder_tokenizer"]

_MAX_FILE = 1 << 26  # bytes


def folder_tokenizer(checkpoint: Checkpoint) -> TokenizerFiles:
    """The tokenizer that lies beside a model.

    Raises:
        TokenizerError: there is none; a file is too long, unreadable or no JSON; the library
            refuses it.
    """
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    document = _object(folder, "tokenizer.json")
    if document is None:
        raise TokenizerError(f"{folder} has no tokenizer.json; save the tokenizer beside the model")
    document = {**document, "truncation": None, "padding": None}  # nothing is cut silently
    text = compact_json(document)
    library = load_library(text)
    config = _object(folder, "tokenizer_config.json") or {}
    generation = _object(folder, "generation_config.json") or {}
    # An encoder's texts stand between [CLS] and [SEP], where others have BOS and EOS.
    bos = _named(config.get("bos_token") or config.get("cls_token"), library)
    listed = generation.get("eos_token_id", checkpoint.metadata.get("eos_token_id"))
    ends = [_named(config.get("eos_token") or config.get("sep_token"), library)]
    ends += [id_ for id_ in (listed if isinstance(listed, list) else [listed]) if _is(id_, library)]
    # Text may become the unknown token: that is what it is for.
    unknown = getattr(library.model, "unk_token", None)
    control = set()
    for id_, token in library.get_added_tokens_decoder().items():
        if token.content in END_SPELLINGS:
            ends.append(id_)
        if (token.special or token.content in CONTROL_SPELLINGS) and token.content != unknown:
            control.add(id_)
    starts = guarded(lambda: library.encode("a", add_special_tokens=True).ids, "tokenizer.json")
    add_bos = config.get("add_bos_token", bos is not None and starts[:1] == [bos])
    return TokenizerFiles(
        tokenizer_json=text,
        chat_template=_template(folder, config),
        tokens=SpecialTokens(
            bos=bos,
            eos=tuple(dict.fromkeys(id_ for id_ in ends if id_ is not None)),
            add_bos=add_bos is True and bos is not None,
            control=tuple(sorted(control)),
        ),
    )


def _is(id_: object, library: Any) -> bool:
    return (
        isinstance(id_, int) and not isinstance(id_, bool) and 0 <= id_ < library.get_vocab_size()
    )


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (text := _text(folder, "chat_template.jinja")) is not None:
        return text
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"chat_template is of type {type(template).__name__}, expected text")
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
        raise TokenizerError(f"{folder / name} holds {type(value).__name__}, expected an object")
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
