"""The artifact: one directory that holds everything needed to run a model.

    NAME.fl/
      config.json           format_version, name, model, plan, tokens, provenance
      weights.safetensors   the packed tensors
      tokenizer.json        as the `tokenizers` library writes it
      chat_template.jinja   when the model has one
      card.json             what is known of its size and quality
      deltas/               what was applied to it, and what that replaced: see `deltas.py`
      manifest.json         size and BLAKE3 of every file, BLAKE3 of every tensor

What lies where in the weights follows from model and plan alone: `layout` computes it, the writer
obeys it, and the reader refuses a file that differs. Every tensor starts on 64 bytes, in the data
section and in the file; safetensors allows no holes, so `_pad.N` tensors fill the gaps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flashlite.checkpoint.tokenizer import SpecialTokens
from flashlite.compress.pack import BLOCK_ROWS, CODE_BYTES, blocks_of, groups_of
from flashlite.compress.plan import Plan, stored_shapes
from flashlite.compress.screen import SCREEN
from flashlite.errors import ArtifactError, UnsupportedModel
from flashlite.model.encoder import EncoderSpec, Spec
from flashlite.model.spec import ModelSpec

__all__ = [
    "ALIGN",
    "CARD",
    "CONFIG",
    "DELTAS",
    "DTYPES",
    "FORMAT_VERSION",
    "LIMITS",
    "MANIFEST",
    "TEMPLATE",
    "TOKENIZER",
    "WEIGHTS",
    "Artifact",
    "FileDigest",
    "Layout",
    "Manifest",
    "PackedTensor",
    "check_name",
    "check_provenance",
    "check_tokens",
    "layout",
]

FORMAT_VERSION = 3  # each artifact is written as the oldest that can say what it says:
# 2 a split head, `plan.screen`; 3 encoders, formats q5 and q6, heads that are gone or stream
_NEW_IN_3 = frozenset({"q5", "q6"})
ALIGN = 64

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
CARD = "card.json"
MANIFEST = "manifest.json"
DELTAS = "deltas"  # a folder: what was applied, and what it replaced

# The most bytes a reader accepts, before it reads any. The header of the weights counts as a file.
LIMITS: Mapping[str, int] = {
    CONFIG: 16 << 20,
    WEIGHTS: 16 << 20,
    TOKENIZER: 256 << 20,
    TEMPLATE: 1 << 20,
    CARD: 16 << 20,
    MANIFEST: 16 << 20,
}
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
DTYPES: Mapping[str, np.dtype[Any]] = {
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}


@dataclass(frozen=True)
class PackedTensor:
    """Where one stored array lies."""

    name: str
    dtype: str  # "I8", "U8", "F16", "F32", as safetensors spells them
    shape: tuple[int, ...]
    offset: int  # bytes into the data section; a multiple of 64
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """Every stored array in file order, padding included."""

    entries: tuple[PackedTensor, ...]
    size: int  # bytes of the data section; a multiple of 64

    @property
    def tensors(self) -> dict[str, PackedTensor]:
        """The entries that hold weights, by name."""
        return {e.name: e for e in self.entries if not e.name.startswith("_pad.")}

    def header(self) -> bytes:
        """What stands before the data section: its length and its JSON, padded with spaces."""
        entries = {
            e.name: {
                "dtype": e.dtype,
                "shape": list(e.shape),
                "data_offsets": [e.offset, e.offset + e.nbytes],
            }
            for e in self.entries
        }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGN)
        return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class FileDigest:
    """One line of the manifest."""

    size: int
    blake3: str  # hex


@dataclass(frozen=True)
class Manifest:
    """What the files of an artifact must hold."""

    files: Mapping[str, FileDigest]  # every file but the manifest and its signature
    tensors: Mapping[str, str]  # BLAKE3 of each stored array, padding left out
    digest: str  # BLAKE3 of the manifest's own bytes: it names the artifact


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk: its description checked, its weights unread."""

    path: Path
    name: str
    model: Spec
    plan: Plan
    tokens: SpecialTokens
    provenance: Mapping[str, str]  # source, sha256, licence of the weights
    tensors: Mapping[str, PackedTensor] = field(repr=False)  # by stored name
    weights_size: int  # bytes of the data section
    manifest: Manifest = field(repr=False)

    @property
    def digest(self) -> str:
        """BLAKE3 of the manifest, hex: equal digests mean equal artifacts."""
        return self.manifest.digest

    @property
    def spec(self) -> ModelSpec:
        """The language model.

        Raises:
            UnsupportedModel: it is an encoder.
        """
        if not isinstance(self.model, ModelSpec):
            raise UnsupportedModel(
                f"{self.name} is an encoder: it makes vectors of texts, not text; "
                "use flashlite embed"
            )
        return self.model

    @property
    def encoder(self) -> EncoderSpec:
        """The text encoder.

        Raises:
            UnsupportedModel: it is a language model.
        """
        if not isinstance(self.model, EncoderSpec):
            raise UnsupportedModel(
                f"{self.name} is a language model, not an encoder; use flashlite run or chat, or "
                "embed with all-minilm-l6-v2"
            )
        return self.model

    @property
    def format_version(self) -> int:
        """The oldest that can say what this artifact says."""
        if isinstance(self.model, EncoderSpec) or self.model.heads or self.model.streams:
            return 3
        if _NEW_IN_3 & set(self.plan.formats.values()):
            return 3
        return 1 if self.plan.screen is None else 2

    @property
    def screen_bytes(self) -> int:
        """Of the weights: what the split head holds beside the full one."""
        return sum(t.nbytes for name, t in self.tensors.items() if name.startswith(f"{SCREEN}."))

    def stored_name(self, canonical: str) -> str:
        """The stored tensor behind a canonical one: a tied head may be `embed`."""
        return "embed" if canonical == "head" and "head" not in self.plan.formats else canonical

    def config(self) -> dict[str, Any]:
        """What stands in `config.json`."""
        return {
            "format_version": self.format_version,
            "name": self.name,
            "model": self.model.to_json(),
            "plan": self.plan.to_json(),
            "tokens": self.tokens.to_json(),
            "provenance": dict(self.provenance),
        }


def check_name(name: object) -> str:
    """Refuse a name that could be anything but one plain folder.

    Raises:
        ArtifactError: it is not 1 to 64 of a-z, 0-9, dot, dash and underscore.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ArtifactError(
            f"model name {str(name)[:80]!r} is not allowed: use 1 to 64 of a-z, 0-9, '.', '_' and "
            "'-', starting with a letter or digit"
        )
    return name


def check_provenance(data: object) -> dict[str, str]:
    """Where the weights come from: source (file or hub name), its sha256, its licence.

    Raises:
        ArtifactError: a key is missing or unknown, or a value is not text.
    """
    if not isinstance(data, Mapping) or set(data) != {"source", "sha256", "licence"}:
        raise ArtifactError(f"{CONFIG}: provenance is not an object of source, sha256, licence")
    if not all(isinstance(value, str) for value in data.values()):
        raise ArtifactError(f"{CONFIG}: provenance holds a value that is not text")
    return dict(data)


def check_tokens(tokens: SpecialTokens, spec: Spec) -> None:
    """Refuse special tokens the model has no row for.

    Raises:
        ArtifactError: an id is not below the vocabulary size.
    """
    ids = (*tokens.eos, *tokens.control, *(() if tokens.bos is None else (tokens.bos,)))
    if ids and max(ids) >= spec.vocab_size:
        raise ArtifactError(
            f"special token {max(ids)} is not in the model's vocabulary of {spec.vocab_size}"
        )


def layout(spec: Spec, plan: Plan) -> Layout:
    """Where every array of this model under this plan lies; the one truth for writer and reader."""
    entries: list[PackedTensor] = []
    offset = 0
    for name, dtype, shape in _arrays(spec, plan):
        nbytes = DTYPES[dtype].itemsize
        for size in shape:
            nbytes *= size
        entries.append(PackedTensor(name, dtype, shape, offset, nbytes))
        offset += nbytes
        if gap := -offset % ALIGN:
            entries.append(PackedTensor(f"_pad.{len(entries)}", "U8", (gap,), offset, gap))
            offset += gap
    return Layout(tuple(entries), offset)


def _arrays(spec: Spec, plan: Plan) -> list[tuple[str, str, tuple[int, ...]]]:
    arrays: list[tuple[str, str, tuple[int, ...]]] = []
    for name, shape in stored_shapes(spec, plan).items():
        fmt = plan.formats[name]
        if fmt in ("f16", "f32"):
            arrays.append((name, fmt.upper(), shape))
            continue
        cells = (blocks_of(shape[0]), groups_of(shape[1]))
        codes = "I8" if fmt == "q8" else "U8"
        arrays.append((f"{name}.codes", codes, (*cells, CODE_BYTES[fmt])))
        arrays.append((f"{name}.scales", "F16", (*cells, BLOCK_ROWS)))
        if fmt == "q4m":
            arrays.append((f"{name}.mins", "F16", (*cells, BLOCK_ROWS)))
    return arrays
