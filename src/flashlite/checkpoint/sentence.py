"""What sentence-transformers writes beside an encoder: how long a text may be, how it is pooled.

    modules.json                 Transformer, Pooling, Normalize: anything more is refused
    sentence_bert_config.json    max_seq_length
    1_Pooling/config.json        the mean of all tokens, or the first one

A folder without these files is a plain encoder: its mean is taken, as sentence-transformers does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flashlite.checkpoint.base import Checkpoint
from flashlite.errors import CheckpointError, UnsupportedModel

__all__ = ["SentenceSettings", "sentence_settings"]

_MAX_FILE = 1 << 20  # bytes
_MODULES = ("Transformer", "Pooling", "Normalize")
_MODES: Mapping[str, Literal["mean", "first"]] = {
    "mean": "mean",
    "cls": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
}


@dataclass(frozen=True)
class SentenceSettings:
    """How sentence-transformers uses one encoder."""

    max_length: (
        int | None
    )  # tokens, [CLS] and [SEP] among them; None: as many as there are positions
    pooling: Literal["mean", "first"]


def sentence_settings(checkpoint: Checkpoint) -> SentenceSettings:
    """Read the settings beside a checkpoint.

    Raises:
        CheckpointError: a file is too long, unreadable, no JSON, or holds a value of another type.
        UnsupportedModel: the model pools in another way, or has modules beyond those named above.
    """
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    modules = _read(folder / "modules.json")
    pooling = folder / "1_Pooling"
    if modules is not None:
        if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
            raise CheckpointError("is not a list of modules", path=folder / "modules.json")
        for module in modules:
            kind = str(module.get("type")).rpartition(".")[2]
            if kind not in _MODULES:
                raise UnsupportedModel(
                    "has a module that flashlite does not run",
                    path=folder / "modules.json",
                    value=kind,
                    limit=", ".join(_MODULES),
                )
    return SentenceSettings(
        _max_length(folder / "sentence_bert_config.json"), _pooling(pooling / "config.json")
    )


def _max_length(path: Path) -> int | None:
    settings = _read(path)
    value = settings.get("max_seq_length") if isinstance(settings, dict) else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 2:
        raise CheckpointError(
            "max_seq_length", path=path, value=value, limit="a whole number from 2 on"
        )
    return value


def _pooling(path: Path) -> Literal["mean", "first"]:
    settings = _read(path)
    if not isinstance(settings, dict):
        return "mean"
    chosen = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on]
    if isinstance(mode := settings.get("pooling_mode"), str):
        chosen = [mode]
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise UnsupportedModel(
            "pools in a way that flashlite does not",
            path=path,
            value=", ".join(chosen) or "none",
            limit="the mean of all tokens, or the first",
        )
    return _MODES[chosen[0]]


def _read(path: Path) -> object:
    """The JSON of a small file, None where there is none."""
    try:
        if not path.is_file():
            return None
        if (size := path.stat().st_size) > _MAX_FILE:
            raise CheckpointError("is too long", path=path, value=size, limit=_MAX_FILE)
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON: {error}", path=path) from None
    return value
