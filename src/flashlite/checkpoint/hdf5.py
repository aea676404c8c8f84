"""HDF5 files (.h5), read as if an enemy had written them.

    signature, sizes        looked at here, byte by byte
    groups and datasets     walked by the HDF5 library in a limited child process (hdf5_child.py)
    its answer              checked here: every count, shape, size and offset
    numbers                 read here (hdf5_read.py); the library never touches them

Files of `flashlite export-h5` say in the attribute `model_config` which model they hold; all others
are read with the description of a model of the same shape (`--like`).

Source: HDF5 File Format Specification 3.0, "Level 0A - Format Signature and Superblock".
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.checkpoint.base import Checkpoint, TensorInfo
from flashlite.checkpoint.hdf5_directory import check_directory
from flashlite.checkpoint.hdf5_read import Stored, read_dataset
from flashlite.errors import CheckpointError, MissingExtra

__all__ = ["CLASS_NAME", "HDF5_SUFFIXES", "SIGNATURE", "TEXTS", "VERSION", "read_hdf5"]

SIGNATURE = b"\x89HDF\r\n\x1a\n"
HDF5_SUFFIXES = frozenset({".h5", ".hdf5"})

CLASS_NAME, VERSION = "flashlite", 1
"""What `model_config` of a file of ours says."""

TEXTS = ("tokenizer.json", "tokenizer.chat_template", "tokenizer.special_tokens")
"""Datasets of bytes in a file of ours, and the keys of its metadata that say where they lie."""

_MAX_TEXT = 1 << 26  # bytes

_CHILD = ("-m", "flashlite.checkpoint.hdf5_child")
_MAX_REPLY = 1 << 25  # bytes
_SECONDS = 18.0  # for the child, which has 12 of processor time


def read_hdf5(path: Path) -> Checkpoint:
    """Read the directory of an HDF5 file; its numbers stay on disk.

    The architecture is empty where the file does not say which model it holds.

    Raises:
        MissingExtra: h5py is not installed.
        CheckpointError: the file is not HDF5 or is cut short; it holds a soft or external link, a
            virtual or external dataset, an object with two names, a filter besides gzip and
            shuffle, values that are no plain numbers, or too many objects; a shape, a chunk or a
            name cannot be; numbers overlap, are missing, lie outside the file, or would inflate
            too far; its `model_config` is broken; or the library failed or took too long.
    """
    size = _check_superblock(path)
    if importlib.util.find_spec("h5py") is None:
        raise MissingExtra("reading HDF5 files", "h5")
    reply = _parse_reply(path, *_run_child(path))
    stored = check_directory(path, reply["datasets"], size)
    metadata = _description(path, reply["model_config"], stored)
    infos = {name: item.info() for name, item in stored.items() if name not in metadata}

    def read(info: TensorInfo) -> NDArray[np.uint8]:
        return read_dataset(stored[info.name])

    return Checkpoint(
        path,
        "hdf5",
        str(metadata.get("architecture", "")),
        MappingProxyType(metadata),
        MappingProxyType(infos),
        read=read,
    )


# ---- before the library -------------------------------------------------------------------------


def _check_superblock(path: Path) -> int:
    """The size of the file, which must be all there and begin with a superblock."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from None
    if not head.startswith(SIGNATURE) or len(head) < 64:
        raise CheckpointError("is not an HDF5 file", path=path, offset=0, value=head[:8])
    version = head[8]
    if version > 3:
        raise CheckpointError(
            "has an unknown version of HDF5", path=path, offset=8, value=version, limit="0 to 3"
        )
    # Bytes per offset, where the base address stands and where the end of the file.
    width, base, end = (13, (24, 28)[version], (40, 44)[version]) if version < 2 else (9, 12, 28)
    if head[width] != 8:
        raise CheckpointError(
            "has file offsets of another width", path=path, offset=width, value=head[width], limit=8
        )
    if any(head[base : base + 8]):
        raise CheckpointError("does not begin at its first byte", path=path, offset=base)
    needed = int.from_bytes(head[end : end + 8], "little")
    if not 64 <= needed <= size:
        raise CheckpointError(
            "is cut short", path=path, offset=end, value=f"{size} bytes", limit=f"{needed} bytes"
        )
    return size


# ---- the library, in a process of its own -------------------------------------------------------


def _run_child(path: Path) -> tuple[int, bytes]:
    """The status and the answer of a child process that examines `path`."""
    package_root = Path(__file__).resolve().parents[2]
    python_path = os.pathsep.join(filter(None, [str(package_root), os.environ.get("PYTHONPATH")]))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HDF5_")}
    environment |= {
        "PYTHONPATH": python_path,
        "OPENBLAS_NUM_THREADS": "1",  # each further thread counts against the address space
        "HDF5_PLUGIN_PRELOAD": "::",  # no filters from shared libraries
        "HDF5_USE_FILE_LOCKING": "FALSE",
    }
    output = b""
    late = threading.Event()
    try:
        with subprocess.Popen(
            [sys.executable, *_CHILD, str(path.absolute())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        ) as child:

            def give_up() -> None:
                late.set()
                child.kill()

            timer = threading.Timer(_SECONDS, give_up)
            timer.start()
            try:
                output = b"" if child.stdout is None else child.stdout.read(_MAX_REPLY + 1)
                if len(output) > _MAX_REPLY:
                    child.kill()
                child.wait()
            finally:
                child.kill()  # an interrupt leaves none behind
                timer.cancel()
    except OSError as error:
        raise CheckpointError(f"cannot be examined: {error.strerror}", path=path) from None
    if late.is_set():
        raise CheckpointError(
            f"was not examined after {_SECONDS:g} s and was given up; it may be damaged or hostile",
            path=path,
        )
    return child.returncode, output


def _parse_reply(path: Path, status: int, output: bytes) -> dict[str, Any]:
    if status or len(output) > _MAX_REPLY:
        raise CheckpointError(
            "made the HDF5 library crash or break its limits of time and memory; the file may be "
            "damaged or hostile",
            path=path,
            value=f"status {status}",
        )
    try:
        reply = json.loads(output)
    except (ValueError, RecursionError):
        raise _unbelievable(path, "no JSON") from None
    if isinstance(reply, dict) and isinstance(reply.get("error"), str):
        text = "".join(c if c.isprintable() else "?" for c in reply["error"][:300])
        raise CheckpointError(text, path=path)
    if not isinstance(reply, dict) or reply.keys() != {"model_config", "datasets"}:
        raise _unbelievable(path, "no directory")
    if not isinstance(reply["datasets"], list):
        raise _unbelievable(path, "no list of datasets")
    if not isinstance(reply["model_config"], str | None):
        raise _unbelievable(path, "a model_config that is no text")
    return reply


def _unbelievable(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"the HDF5 library made {what} of it", path=path)


# ---- what a file of ours says -------------------------------------------------------------------


def _description(path: Path, text: str | None, stored: Mapping[str, Stored]) -> dict[str, Any]:
    """The metadata of a file of ours, nothing of another's.

    `architecture`, `spec` (JSON of the model's description), `general.license`, and under the names
    of `TEXTS` a `TensorInfo` each.
    """
    if text is None:
        return {}
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        raise CheckpointError("model_config is not JSON", path=path) from None
    if not isinstance(config, dict) or config.get("class_name") != CLASS_NAME:
        return {}  # a model of Keras: its code, which is not run here
    config = config.get("config")
    if not isinstance(config, dict):
        raise CheckpointError("model_config is malformed", path=path, limit="an object config")
    if (version := config.get("version")) != VERSION:
        raise CheckpointError(
            "model_config has an unknown version; a later flashlite wrote it",
            path=path,
            value=ascii(version),
            limit=VERSION,
        )
    name, spec, licence = (config.get(key) for key in ("architecture", "spec", "licence"))
    if not isinstance(name, str) or not 0 < len(name) <= 64 or not name.isprintable():
        raise CheckpointError("model_config names no architecture", path=path, value=ascii(name))
    if not isinstance(spec, dict) or not isinstance(licence, str):
        raise CheckpointError("model_config is malformed", path=path, limit="spec and licence")
    metadata = {"architecture": name, "spec": spec, "general.license": licence}
    return metadata | {key: _text(path, stored[key]) for key in TEXTS if key in stored}


def _text(path: Path, item: Stored) -> TensorInfo:
    info = item.info()
    if info.dtype != "U8" or len(info.shape) != 1 or info.nbytes > _MAX_TEXT:
        raise CheckpointError(
            f"{item.name} is no text",
            path=path,
            value=f"{info.dtype} of shape {info.shape}",
            limit=f"U8 of up to {_MAX_TEXT}",
        )
    return info
