"""What every reader of a pretrained model returns: one frozen `Checkpoint`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flashlite.checkpoint import blocks
from flashlite.checkpoint.blocks import Grid, TensorInfo
from flashlite.errors import CheckpointError

__all__ = ["MAX_TENSORS", "Checkpoint", "TensorInfo", "check_name"]

MAX_TENSORS = 65536
"""Tensors one checkpoint may hold, whatever its format."""

_MAX_NAME = 256  # characters


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained model on disk, its directory of tensors checked, its data unread."""

    path: Path
    format: Literal["gguf", "safetensors", "hdf5"]
    architecture: str  # "llama", "gemma3", "qwen2", "qwen3", "bert"
    metadata: Mapping[str, object]  # GGUF: its keys. safetensors: config.json. HDF5: see hdf5.py
    tensors: Mapping[str, TensorInfo]
    read: Callable[[TensorInfo], NDArray[np.uint8]] = field(
        default=blocks.read_bytes, repr=False, compare=False
    )  # the bytes of one of `tensors`; HDF5 may store them in compressed chunks
    like: Checkpoint | None = None  # HDF5: a model of the same shape, which describes this one

    def raw(self, name: str) -> NDArray[np.uint8]:
        """Read the bytes of one tensor.

        Raises:
            CheckpointError: there is no such tensor, or the file has become shorter.
        """
        return self.read(self.info(name))

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Read one tensor as float32, in its own shape.

        Raises:
            CheckpointError: as `raw`, or a value is not finite.
        """
        info = self.info(name)
        return blocks.dequantize(info, self.read(info))

    def chunks(self, name: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Read one tensor some rows at a time: `(first row, float32 (rows, cols))`, in order.

        Raises:
            CheckpointError: as `tensor`.
        """
        info = self.info(name)
        return blocks.chunks(info, self.read(info))

    def grid(self, name: str) -> Grid:
        """Read the integer grid of a Q4_0, Q4_1 or Q8_0 tensor, bit for bit.

        Raises:
            CheckpointError: as `raw`, or a scale is not finite.
            UnsupportedModel: the tensor has another format.
        """
        info = self.info(name)
        return blocks.grid(info, self.read(info))

    def info(self, name: str) -> TensorInfo:
        """The directory entry of one tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"there is no tensor {name!r}", path=self.path)
        return info


def check_name(what: str, name: str, path: Path, offset: int | None = None) -> None:
    """Refuse a name that could be mistaken for anything but a name.

    Raises:
        CheckpointError: it is empty, longer than 256 characters, holds a space or an unprintable
            character, or could be read as a path.
    """
    if not 0 < len(name) <= _MAX_NAME:
        raise CheckpointError(
            f"{what} has a name of the wrong length",
            path=path,
            offset=offset,
            value=len(name),
            limit=f"1 to {_MAX_NAME} characters",
        )
    if not name.isprintable() or " " in name or "/" in name or "\\" in name or ".." in name:
        raise CheckpointError(
            f"{what} has a name with a space, a path or an unprintable character",
            path=path,
            offset=offset,
            value=ascii(name),
        )
