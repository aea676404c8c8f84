"""Open a model, whatever it is: the content decides, not the name."""

from __future__ import annotations

from pathlib import Path

from flashlite.checkpoint.base import Checkpoint
from flashlite.checkpoint.gguf import MAGIC, read_gguf
from flashlite.checkpoint.safetensors import read_safetensors
from flashlite.errors import CheckpointError

__all__ = ["open_checkpoint"]

_PICKLE_NAMES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
_READABLE = "a GGUF file, or safetensors beside a config.json"


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model file, or a folder that holds exactly one model.

    Raises:
        CheckpointError: there is nothing there; it is not a regular file, but a device or a pipe;
            it is a pickle (what `torch.save` writes), which would run code when opened; it is
            nothing flashlite reads; a folder holds no model or more than one; or as `read_gguf`
            and `read_safetensors`.
        UnsupportedModel: a tensor type that flashlite does not know.
    """
    path = Path(path)
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
        return open_checkpoint(folder / ggufs[0])
    if tensors:
        return read_safetensors(folder)
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
