"""Write an HDF5 file that says itself which model it holds.

The HDF5 library lays out an empty file; the numbers are then written where it put them, one tensor
at a time, so that a full disk is an ordinary error. The file takes its name when it is whole.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from flashlite.checkpoint.hdf5 import CLASS_NAME, VERSION
from flashlite.checkpoint.hdf5_texts import texts_of
from flashlite.checkpoint.tokenizer import TokenizerFiles
from flashlite.errors import MissingExtra

__all__ = ["write_hdf5"]

Shapes = Iterable[tuple[str, tuple[int, ...]]]


def write_hdf5(
    path: Path,
    shapes: Shapes,
    tensor: Callable[[str], NDArray[np.float32]],
    *,
    architecture: str,
    spec: Mapping[str, Any],
    tokenizer: TokenizerFiles,
    licence: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write `path` anew, whole or not at all, and return its size in bytes.

    Args:
        path: the file; one that is there is replaced.
        shapes: every tensor by its canonical name; dots become groups.
        tensor: reads one of them.
        architecture: the family of the model.
        spec: its description, as JSON.
        tokenizer: its tokenizer and chat template.
        licence: of the weights.
        progress: called with (bytes of tensors written, bytes of tensors in all).

    Raises:
        MissingExtra: h5py is not installed.
        OSError: the disk is full or the system refuses; nothing is left behind.
    """
    config = {"version": VERSION, "architecture": architecture, "spec": spec, "licence": licence}
    texts = texts_of(tokenizer)
    shapes = list(shapes)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.touch(exist_ok=False)
        places = _lay_out(
            partial,
            json.dumps({"class_name": CLASS_NAME, "config": config}),
            shapes,
            {name: len(text) for name, text in texts.items()},
        )
        with partial.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            _reserve(file, size)
            for name, text in texts.items():
                file.seek(places[name])
                file.write(text)
            done, total = 0, sum(4 * prod(shape) for _, shape in shapes)
            for name, shape in shapes:
                values = np.ascontiguousarray(tensor(name), dtype="<f4").reshape(shape)
                file.seek(places[name])
                file.write(values.data.cast("B"))
                done += values.nbytes
                if progress is not None:
                    progress(done, total)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        # The name that the user gave, not the hidden one; `write` alone names none.
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        partial.unlink(missing_ok=True)
    return size


def _lay_out(
    path: Path, config: str, shapes: Iterable[tuple[str, tuple[int, ...]]], texts: Mapping[str, int]
) -> dict[str, int]:
    """A file of zeros with its groups and attributes; where each dataset begins."""
    try:
        import h5py
    except ImportError:
        raise MissingExtra("writing HDF5 files", "h5") from None

    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # so that it has a place at once
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    wanted = [(name, shape, h5py.h5t.IEEE_F32LE) for name, shape in shapes]
    wanted += [(name, (size,), h5py.h5t.STD_U8LE) for name, size in texts.items()]
    places = {}
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = np.bytes_(config)
        for name, shape, kind in wanted:
            dataset = h5py.h5d.create(
                file.id,
                name.replace(".", "/").encode(),
                kind,
                h5py.h5s.create_simple(shape),
                layout,
                links,
            )
            places[name] = dataset.get_offset()
    return places


def _reserve(file: BinaryIO, size: int) -> None:
    """Fail now if the disk cannot hold the file."""
    reserve = getattr(os, "posix_fallocate", None)
    if reserve is not None:
        reserve(file.fileno(), 0, size)
