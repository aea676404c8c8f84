"""The tokenizer and the chat template inside an HDF5 file that `export-h5` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping

from flashlite.checkpoint.base import Checkpoint, TensorInfo
from flashlite.checkpoint.hdf5 import TEXTS
from flashlite.checkpoint.tokenizer import SpecialTokens, TokenizerFiles, compact_json
from flashlite.errors import TokenizerError

__all__ = ["hdf5_texts", "texts_of", "tokenizer_from_texts"]

_TOKENIZER, _TEMPLATE, _TOKENS = TEXTS


def texts_of(files: TokenizerFiles) -> dict[str, bytes]:
    """What is stored of a tokenizer: a name of `TEXTS` and its bytes each."""
    texts = {
        _TOKENIZER: files.tokenizer_json,
        _TOKENS: json.dumps(files.tokens.to_json()).encode(),
    }
    if files.chat_template is not None:
        texts[_TEMPLATE] = files.chat_template.encode()
    return {name: text for name, text in texts.items() if text}


def hdf5_texts(checkpoint: Checkpoint) -> dict[str, str]:
    """The texts of an HDF5 file, unchecked.

    Raises:
        TokenizerError: the file holds no tokenizer, or a text is not UTF-8.
        CheckpointError: the file cannot be read.
    """
    texts = {}
    for name in TEXTS:
        info = checkpoint.metadata.get(name)
        if isinstance(info, TensorInfo):
            try:
                texts[name] = checkpoint.read(info).tobytes().decode()
            except UnicodeDecodeError as error:
                raise TokenizerError(
                    f"{checkpoint.path}: {name} is not UTF-8 at byte {error.start}"
                ) from None
    if not {_TOKENIZER, _TOKENS} <= texts.keys():
        raise TokenizerError(
            f"{checkpoint.path} holds no tokenizer: give --like MODEL, a model that has the same"
        )
    return texts


def tokenizer_from_texts(texts: Mapping[str, str]) -> TokenizerFiles:
    """The tokenizer of stored texts.

    Raises:
        TokenizerError: one is no JSON, or names special tokens that cannot be.
    """
    parsed = {}
    for name in (_TOKENIZER, _TOKENS):
        try:
            parsed[name] = json.loads(texts[name])
        except (ValueError, RecursionError) as error:
            raise TokenizerError(f"{name} is not JSON: {error}") from None
    return TokenizerFiles(
        tokenizer_json=compact_json(parsed[_TOKENIZER]),
        chat_template=texts.get(_TEMPLATE),
        tokens=SpecialTokens.from_json(parsed[_TOKENS]),
    )
