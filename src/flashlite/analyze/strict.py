"""Read a frozen dataclass from JSON that may be damaged: every type, range and name is checked.

The types are those that the dataclass declares: str, int, float, bool, None, tuples, mappings by
name, and other dataclasses.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from flashlite.errors import UsageError

__all__ = ["load_json", "read"]

T = TypeVar("T")

_MAX_BYTES = 1 << 28
_MAX_ITEMS = 1 << 22
_MAX_TEXT = 4096
_LARGEST = 2**53
_SIGNED = frozenset({"seed"})


def load_json(path: Path) -> object:
    """Parse a JSON file of at most 256 MB.

    Raises:
        UsageError: it is too large, not UTF-8 or not JSON.
        OSError: it cannot be read.
    """
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise UsageError(f"{path} has {size} bytes, allowed {_MAX_BYTES}")
    try:
        data: object = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {str(error)[:100]}") from None
    return data


def read(cls: type[T], data: object, where: str) -> T:
    """A `cls` from a JSON object.

    Args:
        cls: a dataclass.
        data: what JSON gave.
        where: the path of keys so far, for messages.

    Raises:
        UsageError: naming the field and what is wrong with it.
    """
    if not isinstance(data, dict):
        raise _wrong(where, data, "an object")
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    if unknown := [key for key in data if key not in known]:
        raise UsageError(f"{_at(where, unknown[0])} is not a known field")
    values = {}
    for name, field in known.items():
        if name in data:
            values[name] = _value(hints[name], data[name], _at(where, name))
        elif field.default is MISSING:
            raise UsageError(f"{_at(where, name)} is missing")
    return cls(**values)


def _value(kind: Any, data: object, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if data is None:
            return None
        return _value(next(a for a in arguments if a is not type(None)), data, where)
    if origin is tuple:
        if not isinstance(data, list) or len(data) > _MAX_ITEMS:
            raise _wrong(where, data, f"a list of at most {_MAX_ITEMS}")
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin in (Mapping, dict):
        if not isinstance(data, dict) or len(data) > _MAX_ITEMS:
            raise _wrong(where, data, "an object")
        return {
            _value(str, key, where): _value(arguments[1], item, _at(where, key))
            for key, item in data.items()
        }
    if is_dataclass(kind):
        return read(kind, data, where)  # type: ignore[arg-type]
    return _plain(kind, data, where)


def _plain(kind: Any, data: object, where: str) -> Any:
    if kind is bool:
        if not isinstance(data, bool):
            raise _wrong(where, data, "true or false")
    elif kind is str:
        if not isinstance(data, str) or not data.isprintable() or not 0 < len(data) <= _MAX_TEXT:
            raise _wrong(where, data, f"printable text of 1 to {_MAX_TEXT} characters")
    elif kind is int:
        least = -_LARGEST if where.rpartition(".")[2] in _SIGNED else 0
        if isinstance(data, bool) or not isinstance(data, int) or not least <= data <= _LARGEST:
            raise _wrong(where, data, f"a whole number from {least} to 2^53")
    elif kind is float:
        number = isinstance(data, (int, float)) and not isinstance(data, bool)
        if not number or not math.isfinite(float(data)) or abs(float(data)) > 1e30:  # type: ignore[arg-type]
            raise _wrong(where, data, "a finite number")
        lowest = -1.0 if "spearman" in where or "by_format" in where else 0.0
        if float(data) < lowest:  # type: ignore[arg-type]
            raise _wrong(where, data, f"{lowest:g} or more")
        return float(data)  # type: ignore[arg-type]
    else:
        raise TypeError(f"no rule for {kind}")
    return data


def _at(where: str, key: object) -> str:
    name = str(key)[:60]
    name = name if name.isprintable() else ascii(name)
    return f"{where}.{name}" if where else name


def _wrong(where: str, data: object, needed: str) -> UsageError:
    shown = ascii(data)
    shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
    return UsageError(f"{where or 'the file'} is {shown}, needs {needed}")
