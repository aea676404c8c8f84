"""The child process of `read_hdf5`: the only place where the HDF5 library meets a stranger's file.

It walks the groups of one file and says, as JSON on standard output, where every dataset lies; it
reads no dataset, so no filter ever runs here. What is not on the list below is refused:

    links to objects of the same file, each under one name; groups and datasets
    datasets stored in one piece or in chunks, unfiltered, shuffled or deflated
    whole and floating-point numbers; fixed-length strings are passed over

The process may open no further file and write none, and has little memory and processor time:
what the checks of the library miss ends it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["describe", "examine", "main"]

MAX_OBJECTS = 1 << 17
MAX_CHUNKS = 1 << 18
_MAX_DEPTH = 32
_MAX_RANK = 8
_MAX_ATTRIBUTES = 256  # of one object; Keras writes a handful
_MAX_NAME = 256  # bytes
_MAX_CONFIG = 1 << 20  # bytes of model_config

_SECONDS = 12  # of processor time
_BYTES = 1 << 30  # of address space; Python, NumPy and h5py map 300 MB of it

_FILTERS = {1: "deflate", 2: "shuffle"}
# Bits of sign, exponent, its length, mantissa, its length, and the bias.
_FLOATS = {
    (15, 10, 5, 0, 10, 15): "f2",
    (15, 7, 8, 0, 7, 127): "b2",  # bfloat16
    (31, 23, 8, 0, 23, 127): "f4",
    (63, 52, 11, 0, 52, 1023): "f8",
}


class _Refused(Exception):
    """What is wrong with the file."""


def main() -> int:
    """Describe the file named on the command line; the status is not 0 if the limits struck."""
    path = os.fsencode(sys.argv[1])
    import h5py

    _limit()
    sys.stdout.write(json.dumps(examine(path, h5py, _open_nothing_more)))
    return 0


def examine(path: bytes, h5py: Any, opened: Callable[[], None]) -> dict[str, Any]:
    """What `describe` says of a file, or why it is refused, as `error`.

    Args:
        path: the file.
        h5py: the library.
        opened: called once the file is open.
    """
    try:
        file = h5py.h5f.open(path, h5py.h5f.ACC_RDONLY)
        opened()
        return describe(file, h5py)
    except _Refused as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "needs too much memory to be read"}
    except Exception as error:  # whatever the library raises, it is the file's fault
        return {"error": f"is refused by the HDF5 library: {error}"}


def describe(file: Any, h5py: Any) -> dict[str, Any]:
    """Where every dataset of an open file lies, and its `model_config`."""
    if file.get_create_plist().get_userblock():
        raise _Refused("begins with a user block")
    return _Walk(h5py).run(file)


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows: the deadline alone
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))


def _open_nothing_more() -> None:
    """Whatever a link or a layout asks for, no other file can be opened from here on."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))


class _Walk:
    """One pass over all objects, without recursion."""

    def __init__(self, h5py: Any) -> None:
        self.h5py = h5py
        self.seen: set[int] = set()
        self.datasets: list[dict[str, Any]] = []
        self.chunks = 0

    def run(self, file: Any) -> dict[str, Any]:
        root = self.h5py.h5o.open(file, b"/")
        self.seen.add(self.h5py.h5o.get_info(root).addr)
        self._check_attributes(root, "the file")
        stack: list[tuple[str, Any, int]] = [("", root, 0)]
        while stack:
            prefix, group, depth = stack.pop()
            for name in self._links(prefix, group):
                child = self._open(prefix, group, name)
                path = f"{prefix}/{name.decode()}"
                self._check_attributes(child, path)
                if isinstance(child, self.h5py.h5g.GroupID):
                    if depth >= _MAX_DEPTH:
                        raise _Refused(f"nests groups more than {_MAX_DEPTH} deep")
                    stack.append((path, child, depth + 1))
                else:
                    self._dataset(path, child)
        return {"model_config": self._config(root), "datasets": self.datasets}

    def _links(self, prefix: str, group: Any) -> list[bytes]:
        names: list[bytes] = []
        left = MAX_OBJECTS - len(self.seen)

        def take(name: bytes) -> bool | None:
            names.append(name)
            return True if len(names) > left else None  # ends the iteration

        group.links.iterate(take)
        if len(names) > left:
            raise _Refused(f"holds more than {MAX_OBJECTS} objects")
        for name in names:
            try:
                text = name.decode()
            except UnicodeDecodeError:
                text = ""
            if not text or len(name) > _MAX_NAME or not text.isprintable():
                raise _Refused(f"has an object with an impossible name in {_shown(prefix)}")
        return names

    def _open(self, prefix: str, group: Any, name: bytes) -> Any:
        h5py = self.h5py
        shown = _shown(f"{prefix}/{name.decode()}")
        kind = group.links.get_info(name).type
        if kind != h5py.h5l.TYPE_HARD:
            what = {h5py.h5l.TYPE_SOFT: "a soft link", h5py.h5l.TYPE_EXTERNAL: "an external link"}
            raise _Refused(f"{shown} is {what.get(kind, 'a link of an unknown kind')}")
        address = h5py.h5o.get_info(group, name).addr
        if address in self.seen:
            raise _Refused(f"{shown} is a second name of another object")
        self.seen.add(address)
        found = h5py.h5o.open(group, name)
        if not isinstance(found, (h5py.h5g.GroupID, h5py.h5d.DatasetID)):
            raise _Refused(f"{shown} is neither a group nor a dataset")
        return found

    def _check_attributes(self, found: Any, path: str) -> None:
        count = self.h5py.h5a.get_num_attrs(found)
        if count > _MAX_ATTRIBUTES:
            raise _Refused(f"{_shown(path)} has {count} attributes, allowed {_MAX_ATTRIBUTES}")

    def _dataset(self, path: str, dataset: Any) -> None:
        h5py, shown = self.h5py, _shown(path)
        plist, kind = dataset.get_create_plist(), dataset.get_type()
        layout = plist.get_layout()
        if plist.get_external_count():
            raise _Refused(f"{shown} keeps its numbers in another file")
        if layout == h5py.h5d.VIRTUAL:
            raise _Refused(f"{shown} is a virtual dataset, made of parts of others")
        if layout not in (h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED):
            raise _Refused(f"{shown} is stored neither in one piece nor in chunks")
        if kind.get_class() == h5py.h5t.STRING and not kind.is_variable_str():
            return  # text is no tensor: not read
        number = self._number(shown, kind)
        if dataset.get_space().get_simple_extent_type() == h5py.h5s.NULL:
            raise _Refused(f"{shown} holds nothing")
        shape = dataset.shape
        if len(shape) > _MAX_RANK:
            raise _Refused(f"{shown} has {len(shape)} axes, allowed {_MAX_RANK}")
        entry: dict[str, Any] = {"name": path, "shape": shape, "number": number}
        if layout == h5py.h5d.CONTIGUOUS:
            entry |= {"offset": dataset.get_offset(), "nbytes": dataset.get_storage_size()}
        else:
            entry |= {
                "chunk": plist.get_chunk(),
                "filters": self._filters(shown, plist),
                "pieces": self._pieces(dataset),
            }
        self.datasets.append(entry)

    def _number(self, shown: str, kind: Any) -> str:
        h5t = self.h5py.h5t
        size = kind.get_size()
        if kind.get_class() in (h5t.INTEGER, h5t.FLOAT):
            order = {h5t.ORDER_LE: "<", h5t.ORDER_BE: ">"}.get(kind.get_order())
            if kind.get_class() == h5t.FLOAT:
                code = _FLOATS.get((*kind.get_fields(), kind.get_ebias()))
            elif kind.get_precision() == 8 * size and size in (1, 2, 4, 8):
                code = ("i" if kind.get_sign() == h5t.SGN_2 else "u") + str(size)
            else:
                code = None
            if order and code and int(code[1]) == size:
                return order + code
        raise _Refused(f"{shown} holds something other than plain whole or floating-point numbers")

    def _filters(self, shown: str, plist: Any) -> list[str]:
        names = []
        for position in range(plist.get_nfilters()):
            number = plist.get_filter(position)[0]
            if number not in _FILTERS:
                raise _Refused(
                    f"{shown} is stored through filter {number}; write it without compression or "
                    "with gzip"
                )
            names.append(_FILTERS[number])
        return names

    def _pieces(self, dataset: Any) -> list[list[Any]]:
        pieces: list[list[Any]] = []
        left = MAX_CHUNKS - self.chunks

        def take(chunk: Any) -> bool | None:
            pieces.append([chunk.chunk_offset, chunk.filter_mask, chunk.byte_offset, chunk.size])
            return True if len(pieces) > left else None

        dataset.chunk_iter(take)
        if len(pieces) > left:
            raise _Refused(f"is cut into more than {MAX_CHUNKS} chunks; write larger ones")
        self.chunks += len(pieces)
        return pieces

    def _config(self, root: Any) -> str | None:
        """The text of `model_config`, None if there is none or it is no fixed-length string."""
        import numpy as np

        h5py = self.h5py
        if not h5py.h5a.exists(root, b"model_config"):
            return None
        attribute = h5py.h5a.open(root, b"model_config")
        kind = attribute.get_type()
        if kind.get_class() != h5py.h5t.STRING or kind.is_variable_str() or attribute.shape:
            return None
        if not 0 < kind.get_size() <= _MAX_CONFIG:
            raise _Refused(f"has a model_config of {kind.get_size()} bytes, allowed {_MAX_CONFIG}")
        text = np.empty((), dtype=f"S{kind.get_size()}")
        attribute.read(text)
        return bytes(text).rstrip(b"\0").decode("utf-8", "replace")


def _shown(path: str) -> str:
    return ascii(path if len(path) <= 80 else f"{path[:77]}...")


if __name__ == "__main__":
    sys.exit(main())
