"""Open a model, whatever it is: the content decides, not the name."""

from __future__ import annotations

import stat
from pathlib import Path

from flashlite.checkpoint.base import Checkpoint
from flashlite.checkpoint.gguf import MAGIC, read_gguf
from flashlite.errors import CheckpointError

__all__ = ["open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file, or a folder that holds exactly one."""
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if len(found) != 1:
            raise CheckpointError("must hold one .gguf file", path=path, value=len(found), limit=1)
        path = found[0]
    return read_gguf(path)
