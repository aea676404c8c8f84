"""Open a model, whatever it is: the content decides, not the name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from flashlite.checkpoint.base import Checkpoint
from flashlite.checkpoint.gguf import MAGIC, read_gguf
from flashlite.checkpoint.hdf5 import HDF5_SUFFIXES, SIGNATURE, read_hdf5
from flashlite.checkpoint.pull import resolve_model
from flashlite.checkpoint.safetensors import read_safetensors
from flashlite.errors import CheckpointError, UsageError

__all__ = ["open_checkpoint"]

_PICKLE_NAMES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
_READABLE = "a GGUF file, safetensors beside a config.json, or an HDF5 file"


def open_checkpoint(path: Path, *, like: str | None = None) -> Checkpoint:
    """Open a model file, or a folder that holds exactly one model.

    Args:
        path: the file or folder.
        like: for an HDF5 file that holds nothing but weights: the name or path of a model of the
            same shape, which says how they are run and brings its tokenizer and chat template.

    Raises:
        UsageError: `like` is given, and the file describes itself.
        PullError: the model that `like` names is not on this machine.
        MissingExtra: an HDF5 file, and h5py is not installed.
        CheckpointError: there is nothing there; it is not a regular file, but a device or a pipe;
            it is a pickle (what `torch.save` writes), which would run code when opened; it is
            nothing flashlite reads; a folder holds no model or more than one; or as `read_gguf`,
            `read_safetensors` and `read_hdf5`.
        UnsupportedModel: a tensor type that flashlite does not know.
    """
    checkpoint = _open(Path(path))
    if like is None:
        return checkpoint
    if checkpoint.format != "hdf5" or checkpoint.architecture:
        raise UsageError(
            f"{path} says itself which model it holds: leave out --like {like}, it is for HDF5 "
            "files that hold nothing but weights"
        )
    described = _open(resolve_model(like).path)
    if not described.architecture:
        raise UsageError(
            f"--like {like} does not say which model it holds either: name a GGUF file, a "
            "safetensors folder or a known model"
        )
    return replace(checkpoint, architecture=described.architecture, like=described)


def _open(path: Path) -> Checkpoint:
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.exists() and not path.is_file():
            raise CheckpointError("is not a regular file", path=path, limit=_READABLE)
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from None
    except ValueError:  # a NUL in the name
        raise CheckpointError("there is no such file", path=ascii(str(path))) from None
    return _open_file(path, head)


def _open_file(path: Path, head: bytes) -> Checkpoint:
    suffix = path.suffix.lower()
    if head.startswith(MAGIC):
        return read_gguf(path)
    if head.startswith(SIGNATURE) or suffix in HDF5_SUFFIXES:
        return read_hdf5(path)
    if head[4:] == b"\0\0\0\0{" or suffix == ".safetensors":
        return read_safetensors(path)
    if head.startswith((b"PK\x03\x04", b"\x80")) or suffix in _PICKLE_NAMES:
        raise _pickle(path)
    if suffix == ".gguf":
        return read_gguf(path)  # which says what is wrong
    raise CheckpointError(
        "is not a model flashlite can read", path=path, offset=0, value=head, limit=_READABLE
    )


def _open_folder(folder: Path) -> Checkpoint:
    names = sorted(entry.name for entry in folder.iterdir())
    ggufs = [name for name in names if name.endswith(".gguf")]
    tensors = [name for name in names if name.endswith(".safetensors")]
    if len(ggufs) > 1 or (ggufs and tensors):
        raise CheckpointError(
            "holds more than one model; name the file to open",
            path=folder,
            value=", ".join(ggufs + tensors),
        )
    if ggufs:
        return _open(folder / ggufs[0])
    if tensors:
        return read_safetensors(folder)
    hdf5 = [name for name in names if Path(name).suffix.lower() in HDF5_SUFFIXES]
    if len(hdf5) == 1:
        return _open(folder / hdf5[0])
    for name in names:
        if Path(name).suffix.lower() in _PICKLE_NAMES:
            raise _pickle(folder / name)
    raise CheckpointError("holds no model", path=folder, limit=_READABLE)


def _pickle(path: Path) -> CheckpointError:
    return CheckpointError(
        "is a pickle, which runs code when it is opened; convert it to safetensors first "
        "(transformers: from_pretrained, then save_pretrained) where that can do no harm",
        path=path,
        limit=_READABLE,
    )
