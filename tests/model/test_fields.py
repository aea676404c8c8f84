"""Values of metadata: the right type and range, or an error that says what and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashlite.errors import CheckpointError
from flashlite.model.fields import Fields


def fields(**values: object) -> Fields:
    return Fields(
        Path("model.gguf"), {f"llama.{key}": value for key, value in values.items()}, "llama."
    )


def test_values_of_the_right_kind_come_back() -> None:
    f = fields(n=3, x=0.5, whole=2, yes=True, kind="b", names=["a"], group={"inner": 7}, none=None)
    assert f.integer("n", 3, 3) == 3
    assert f.number("x", 0.0, 1.0) == 0.5
    assert isinstance(f.number("whole", 0, 9), float)
    assert f.flag("yes", False) is True
    assert f.choice("kind", {"a": 1, "b": 2}) == 2
    assert f.strings("names") == ["a"]
    assert f.group("group").integer("inner", 0, 9) == 7
    assert f.has("n")
    assert not f.has("none")


def test_absent_and_null_take_the_default() -> None:
    for f in (fields(), fields(key=None)):
        assert f.integer("key", 0, 9, 4) == 4
        assert f.number("key", 0, 9, 0.5) == 0.5
        assert f.flag("key", True) is True
        assert f.choice("key", {"a": 1}, "a") == 1
        assert f.strings("key") is None
        assert not f.group("key").has("anything")


def test_absent_without_default_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"model\.gguf: metadata has no llama\.key"):
        fields().integer("key", 0, 9)


@pytest.mark.parametrize(
    ("getter", "value", "args"),
    [
        ("integer", True, (0, 9)),
        ("integer", 1.0, (0, 9)),
        ("integer", "1", (0, 9)),
        ("integer", 10, (0, 9)),
        ("integer", -1, (0, 9)),
        ("integer", 2**64, (0, 9)),
        ("integer", np.arange(3), (0, 9)),
        ("number", True, (0, 9)),
        ("number", float("nan"), (0, 9)),
        ("number", float("inf"), (0, 9)),
        ("number", -0.1, (0, 9)),
        ("number", "1", (0, 9)),
        ("number", [1.0], (0, 9)),
        ("flag", 1, (False,)),
        ("flag", "true", (False,)),
        ("choice", "c", ({"a": 1, "b": 2},)),
        ("choice", 1, ({"a": 1, "b": 2},)),
        ("choice", ["a"], ({"a": 1, "b": 2},)),
        ("strings", "abc", ()),
        ("strings", ["a", 1], ()),
        ("group", [1], ()),
        ("group", "x", ()),
    ],
)
def test_values_of_the_wrong_kind_are_refused(getter: str, value: object, args: Any) -> None:
    with pytest.raises(CheckpointError, match=r"metadata llama\.key, found .*, allowed ") as caught:
        getattr(fields(key=value), getter)("key", *args)
    assert caught.value.value is not None


def test_a_huge_value_makes_a_short_message() -> None:
    with pytest.raises(CheckpointError) as caught:
        fields(key=["x" * 1000] * 1000).integer("key", 0, 9)
    assert len(str(caught.value)) < 200
