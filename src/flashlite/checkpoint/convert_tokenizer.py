"""A model's vocabulary to the files that `Tokenizer` loads.

    GGUF metadata ──┐
    HF folder ──────┼──> build_tokenizer ──> TokenizerFiles
    HDF5 texts ─────┘

Vocabularies and templates come from strangers, and the `tokenizers` library may panic, hang or eat
memory on them. `build_tokenizer_checked` therefore builds and tries them out in a child process
with limits (`tokenizer_check`), once, when a model is converted; afterwards the artifact's own,
verified files are loaded in process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashlite.checkpoint.base import Checkpoint
from flashlite.checkpoint.chat import ChatTemplate, harmless
from flashlite.checkpoint.folder_tokenizer import folder_tokenizer
from flashlite.checkpoint.gguf_tokenizer import gguf_tokenizer
from flashlite.checkpoint.hdf5_texts import hdf5_texts, tokenizer_from_texts
from flashlite.checkpoint.tokenizer import (
    SpecialTokens,
    Tokenizer,
    TokenizerFiles,
    compact_json,
)
from flashlite.errors import TemplateError, TokenizerError

__all__ = ["build_tokenizer", "build_tokenizer_checked", "check_round_trip", "check_template"]

_MAX_REPLY = 1 << 28  # bytes of the child's answer

_SAMPLE = "The quick brown fox, 1,234.56 naïve cafés: 你好 нет 😀\n\n  x = [1, 2]\t# ok"
_WORDS = "quick brown fox"


def build_tokenizer(checkpoint: Checkpoint) -> TokenizerFiles:
    """Build the tokenizer of a model in this process: for checkpoints that are trusted.

    Raises:
        TokenizerError: the vocabulary is missing, malformed, of an unknown kind or too large.
        TemplateError: the chat template is refused, or fails on a plain conversation.
    """
    if checkpoint.like is not None:
        return build_tokenizer(checkpoint.like)
    if checkpoint.format == "hdf5":
        return check_template(tokenizer_from_texts(hdf5_texts(checkpoint)))
    build = gguf_tokenizer if checkpoint.format == "gguf" else folder_tokenizer
    return check_template(build(checkpoint))


def build_tokenizer_checked(checkpoint: Checkpoint, *, timeout: float = 120.0) -> TokenizerFiles:
    """Build and try out the tokenizer of a model in a limited child process.

    Args:
        checkpoint: an opened model.
        timeout: seconds after which the child is killed.

    Raises:
        TokenizerError: as `build_tokenizer`; or the child took too long, too much memory, or died.
        TemplateError: as `build_tokenizer`.
    """
    if checkpoint.like is not None:
        checkpoint = checkpoint.like
    texts = hdf5_texts(checkpoint) if checkpoint.format == "hdf5" else None
    job = {
        "path": str(checkpoint.path),
        "texts": texts,
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


def check_round_trip(files: TokenizerFiles, *, exact: bool) -> None:
    """Try a tokenizer on a fixed text: it comes back, in ids that exist, none of them control.

    Args:
        files: what was built.
        exact: every character must come back; otherwise, where a tokenizer may normalize the text,
            its words must.

    Raises:
        TokenizerError: it does not.
    """
    tokenizer = Tokenizer(files)
    ids = tokenizer.encode(_SAMPLE)
    if not all(0 <= id_ < tokenizer.vocab_size for id_ in ids):
        raise TokenizerError(f"vocabulary gives ids outside 0 to {tokenizer.vocab_size - 1}")
    text = tokenizer.decode(ids)
    came_back = text.removeprefix(" ") == _SAMPLE if exact else _WORDS in text.lower()
    if not came_back:
        raise TokenizerError(f"vocabulary turns {_SAMPLE!r} into {text[:80]!r}")
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
            tokenizer_json=reply["tokenizer_json"].encode(),
            chat_template=reply["chat_template"],
            tokens=SpecialTokens.from_json(reply["tokens"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise TokenizerError(f"{checkpoint.path}: its tokenizer check failed: {error}") from None


def _plain(value: object) -> Any:
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else value


def check_template(files: TokenizerFiles) -> TokenizerFiles:
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
        tokenizer_json=compact_json(document),
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
