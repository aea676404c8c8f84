"""safetensors files and Hugging Face folders, read as if an enemy had written them.

    u64 N | N bytes of JSON: {name: {dtype, shape, data_offsets: [begin, end)}} | data

A folder holds `config.json` and either `model.safetensors` or the shards that
`model.safetensors.index.json` lists. The official parser accepts duplicate keys, names that are
paths and headers that take a gigabyte to parse; this one does not.

Source: the format section of github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from flashlite.checkpoint.base import MAX_TENSORS, Checkpoint, TensorInfo, check_name
from flashlite.checkpoint.blocks import LAYOUTS
from flashlite.errors import CheckpointError, UnsupportedModel

__all__ = ["INDEX", "read_safetensors"]

INDEX = "model.safetensors.index.json"

_MAX_HEADER = 100_000_000  # bytes, the limit of the official parser
_MAX_JSON = 1 << 24  # bytes of config.json or of the index
_MAX_MARKS = 1 << 21  # opening brackets, commas: what a parsed document costs in memory
_MAX_DIMS = 8
_MAX_DIM = 1 << 40
_MAX_SHARDS = 4096

# Bytes per value. Only those in `LAYOUTS` can be decoded; the rest appear in buffers that no
# forward pass needs (position ids), so they may lie in a file, and fail when read.
_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}

# Names of `model_type` for the same architecture.
_ALIASES = {"gemma3_text": "gemma3"}


def read_safetensors(path: Path) -> Checkpoint:
    """Read the headers of a Hugging Face folder, or of one file beside its `config.json`.

    Raises:
        UnsupportedModel: a number format that is not known.
        CheckpointError: a file is missing, not a regular file, unreadable, or a link out of the
            folder; JSON is too long, malformed, too deep, costs too much, holds a key twice or a
            number that is none; `config.json` names no `model_type`; the header is longer than
            the file; a tensor has a malformed name or entry, a wrong dimension, the wrong number
            of bytes; tensors overlap, leave a hole, trail bytes, or reach beyond the end; there
            are too many; or shards and index contradict each other.
    """
    folder = path if path.is_dir() else path.parent
    config = _json(_inside(folder, "config.json"))
    name = config.get("model_type")
    if not isinstance(name, str) or not 0 < len(name) <= 64 or not name.isprintable():
        raise CheckpointError(
            "model_type does not name an architecture",
            path=folder / "config.json",
            value=ascii(name),
            limit="1 to 64 printable characters",
        )
    tensors = _folder_tensors(folder) if path == folder else _file_tensors(path)
    return Checkpoint(
        path,
        "safetensors",
        _ALIASES.get(name, name),
        MappingProxyType(config),
        MappingProxyType(tensors),
    )


def _folder_tensors(folder: Path) -> dict[str, TensorInfo]:
    if (folder / "model.safetensors").exists():
        return _file_tensors(_inside(folder, "model.safetensors"))
    if (folder / INDEX).exists():
        return _sharded_tensors(folder)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise CheckpointError(
            f"holds {len(found)} .safetensors files and no {INDEX}; name the one to open",
            path=folder,
        )
    return _file_tensors(_inside(folder, found[0].name))


def _sharded_tensors(folder: Path) -> dict[str, TensorInfo]:
    index = _inside(folder, INDEX)
    listed = _json(index).get("weight_map")
    if not isinstance(listed, dict) or len(listed) > MAX_TENSORS:
        raise CheckpointError(
            "weight_map is no object of tensor names",
            path=index,
            value=len(listed) if isinstance(listed, dict) else type(listed).__name__,
            limit=f"{MAX_TENSORS} names",
        )
    shards: dict[str, set[str]] = {}
    for name, shard in listed.items():
        _check_shard(index, shard)
        shards.setdefault(shard, set()).add(name)
    if len(shards) > _MAX_SHARDS:
        raise CheckpointError(
            "lists too many shards", path=index, value=len(shards), limit=_MAX_SHARDS
        )
    tensors: dict[str, TensorInfo] = {}
    for shard, names in sorted(shards.items()):
        held = _file_tensors(_inside(folder, shard))
        if wrong := sorted(names ^ held.keys()):
            fault = "lacks a tensor of" if wrong[0] in names else "holds a tensor not in"
            raise CheckpointError(f"{fault} {INDEX}", path=folder / shard, value=ascii(wrong[0]))
        tensors |= held
    return tensors


def _check_shard(index: Path, shard: object) -> None:
    if (
        not isinstance(shard, str)
        or not shard.endswith(".safetensors")
        or not shard.isprintable()
        or shard.startswith(".")
        or "/" in shard
        or "\\" in shard
        or len(shard) > 255
    ):
        raise CheckpointError(
            "a shard is no plain file name",
            path=index,
            value=ascii(shard),
            limit="NAME.safetensors in the same folder",
        )


def _inside(folder: Path, name: str) -> Path:
    """A regular file of this folder that does not lead out of it.

    huggingface_hub keeps files in `blobs/` and links to them from `snapshots/REVISION/`; such
    links stay within one repository and are followed.
    """
    file = folder / name
    try:
        real, roots = file.resolve(strict=True), [folder.resolve()]
        regular = stat.S_ISREG(real.stat().st_mode)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "a loop of links"
        raise CheckpointError(f"cannot be read: {reason}", path=file) from None
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parent.parent / "blobs")
    if not regular:
        raise CheckpointError("is not a regular file", path=file)
    if not any(real.is_relative_to(root) for root in roots):
        raise CheckpointError("is a link that leads out of its folder", path=file, value=real)
    return file


def _file_tensors(path: Path) -> dict[str, TensorInfo]:
    """The directory of one safetensors file."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            limit = min(_MAX_HEADER, size - 8)
            if size < 8 or not 2 <= length <= limit:
                raise CheckpointError(
                    "has a header of impossible length",
                    path=path,
                    offset=0,
                    value=length,
                    limit=f"2 to {max(2, limit)} bytes",
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from None
    if len(raw) != length:
        raise CheckpointError("has become shorter while it was read", path=path, offset=8)
    entries = _parse(raw, path, 8)
    extra = entries.pop("__metadata__", {})
    if not isinstance(extra, dict) or not all(isinstance(v, str) for v in extra.values()):
        raise CheckpointError("__metadata__ is no object of strings", path=path, offset=8)
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(
            "holds too many tensors", path=path, offset=8, value=len(entries), limit=MAX_TENSORS
        )
    data = 8 + length
    infos = [_entry(path, name, entry, data) for name, entry in entries.items()]
    _check_cover(path, infos, data, size)
    return {info.name: info for info in infos}


def _entry(path: Path, name: str, entry: object, data: int) -> TensorInfo:
    check_name("a tensor", name, path, 8)
    what = f"tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{what} is malformed", path=path, offset=8, limit="dtype, shape and data_offsets"
        )
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise UnsupportedModel(
            f"{what} has an unknown number format",
            path=path,
            offset=8,
            value=ascii(dtype),
            limit=", ".join(name for name in _SIZES if name in LAYOUTS),
        )
    shape = entry["shape"]
    if not _whole(shape) or len(shape) > _MAX_DIMS or not all(1 <= n <= _MAX_DIM for n in shape):
        raise CheckpointError(
            f"{what} has a wrong shape",
            path=path,
            offset=8,
            value=shape,
            limit=f"up to {_MAX_DIMS} dimensions of 1 to {_MAX_DIM}",
        )
    nbytes = _SIZES[dtype]
    for size in shape:
        nbytes *= size
    span = entry["data_offsets"]
    if not _whole(span) or len(span) != 2 or span[0] < 0 or span[1] - span[0] != nbytes:
        raise CheckpointError(
            f"{what} of type {dtype} and shape {shape} has wrong data_offsets",
            path=path,
            offset=8,
            value=span,
            limit=f"begin, begin + {nbytes}",
        )
    return TensorInfo(name, tuple(shape), dtype, path, data + span[0], nbytes)


def _whole(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _check_cover(path: Path, infos: list[TensorInfo], data: int, size: int) -> None:
    """The tensors must cover the data exactly, each byte once."""
    expected = data
    for info in sorted(infos, key=lambda info: info.offset):
        if info.offset != expected:
            fault = "overlaps another tensor" if info.offset < expected else "follows a hole"
            raise CheckpointError(
                f"tensor {info.name!r} {fault}", path=path, value=info.offset, limit=expected
            )
        expected += info.nbytes
        if expected > size:
            raise CheckpointError(
                f"tensor {info.name!r} reaches beyond the end of the file",
                path=path,
                offset=info.offset,
                value=f"{info.nbytes} bytes",
                limit=f"{size - info.offset} bytes left",
            )
    if expected != size:
        raise CheckpointError(
            "has bytes after its last tensor", path=path, offset=expected, value=size - expected
        )


# ---- JSON within bounds -------------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from None
    if len(raw) > _MAX_JSON:
        raise CheckpointError("is too long", path=path, limit=f"{_MAX_JSON} bytes")
    return _parse(raw, path, 0)


def _parse(raw: bytes, path: Path, start: int) -> dict[str, Any]:
    """One JSON object of bounded cost, no key twice, no NaN; `start` is where `raw` begins."""
    marks = sum(raw.count(mark) for mark in (b"{", b"[", b","))
    if marks > _MAX_MARKS:
        raise CheckpointError(
            "holds too much JSON", path=path, offset=start, value=marks, limit=_MAX_MARKS
        )

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, item in items:
            if key in out:
                raise CheckpointError(
                    "a key appears twice", path=path, offset=start, value=ascii(key)
                )
            out[key] = item
        return out

    def constant(text: str) -> NoReturn:
        raise CheckpointError("a number is none", path=path, offset=start, value=text)

    try:
        value = json.loads(raw.decode(), object_pairs_hook=pairs, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise CheckpointError("is not UTF-8", path=path, offset=start + error.start) from None
    except json.JSONDecodeError as error:
        at = start + len(error.doc[: error.pos].encode())
        raise CheckpointError(f"is not JSON: {error.msg}", path=path, offset=at) from None
    except RecursionError:
        raise CheckpointError("is nested too deeply", path=path, offset=start) from None
    except ValueError:  # an integer of thousands of digits
        raise CheckpointError("a number is too long", path=path, offset=start) from None
    if not isinstance(value, dict):
        raise CheckpointError("is no JSON object", path=path, offset=start)
    return value
