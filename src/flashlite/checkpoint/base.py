"""What every reader of a pretrained model returns: one frozen `Checkpoint`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flashlite.checkpoint import blocks

__all__ = ["Checkpoint", "TensorInfo"]


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies; nothing of its data is read yet."""

    name: str
    shape: tuple[int, ...]  # row-major: (rows, columns), the last one contiguous
    dtype: str  # a key of `blocks.LAYOUTS`: F32, F16, BF16, Q4_0, ... Q6_K
    file: Path
    offset: int  # bytes from the start of `file`
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained model on disk, its directory of tensors checked, its data unread."""

    path: Path
    format: Literal["gguf", "safetensors"]
    architecture: str  # "llama", "gemma3", "qwen2", "qwen3", "bert"
    metadata: Mapping[str, object]  # GGUF: its keys. safetensors: config.json
    tensors: Mapping[str, TensorInfo]

    def raw(self, name: str) -> NDArray[np.uint8]:
        """Read the bytes of one tensor.

        Raises:
            CheckpointError: there is no such tensor, or the file has become shorter.
        """
        return blocks.read_bytes(self.info(name))

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Read one tensor as float32, in its own shape.

        Raises:
            CheckpointError: as `raw`, or a value is not finite.
        """
        return blocks.dequantize(self.info(name), self.raw(name))

    def info(self, name: str) -> TensorInfo:
        """The directory entry of one tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return blocks.lookup(self.path, self.tensors, name)
