"""`Fields`: metadata of a model file, every value checked for type and range before use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flashlite.errors import CheckpointError

__all__ = ["Fields"]

T = TypeVar("T")


@dataclass(frozen=True)
class Fields:
    """Typed access to metadata that may be hostile.

    Each getter raises CheckpointError with the key, the value and the limit when the value has
    the wrong type or range, or when it is absent (or null) and no default is given.
    """

    path: Path
    values: Mapping[str, object]
    prefix: str = ""  # put before every key: GGUF's "llama."

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number from low to high."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._refuse(key, value, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number from low to high."""
        value = self._value(key, default)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high:  # type: ignore[operator]
            raise self._refuse(key, value, f"a number from {low} to {high}")
        return float(value)  # type: ignore[arg-type]

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._refuse(key, value, "true or false")
        return value

    def choice(self, key: str, choices: Mapping[str, T], default: str | None = None) -> T:
        """What `choices` holds for the string found."""
        value = self._value(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self._refuse(key, value, " or ".join(choices))
        return choices[value]

    def strings(self, key: str) -> list[str] | None:
        """A list of strings, None where it is absent."""
        if not self.has(key):
            return None
        value = self.values[self.prefix + key]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._refuse(key, value, "a list of strings")
        return value

    def group(self, key: str) -> Fields:
        """A nested object; an empty one where it is absent."""
        value = self.values.get(self.prefix + key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self._refuse(key, value, "an object")
        return Fields(self.path, value)

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(self.prefix + key) is not None

    def _value(self, key: str, default: object) -> object:
        value = self.values.get(self.prefix + key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"metadata has no {self.prefix}{key}", path=self.path)
        return value

    def _refuse(self, key: str, value: object, limit: str) -> CheckpointError:
        scalar = isinstance(value, (bool, int, float, str))
        shown = repr(value) if scalar else f"a value of type {type(value).__name__}"
        return CheckpointError(
            f"metadata {self.prefix}{key}", path=self.path, value=shown, limit=limit
        )
