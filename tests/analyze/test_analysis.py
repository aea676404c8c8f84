"""The file: it reads back equal, and damage of any field is one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashlite.analyze import schema
from flashlite.analyze.analysis import (
    AnalysedModel,
    Analysis,
    Calibration,
    EmbeddingLoss,
    HeadScore,
    KvGroupScore,
    LayerScore,
    NeuronScores,
    Proxy,
    TensorFormat,
    TensorLoss,
    Unit,
    UnitFormat,
    read_analysis,
    write_analysis,
)
from flashlite.analyze.schema import json_schema
from flashlite.errors import UsageError

ANALYSIS = Analysis(
    AnalysedModel("tiny", "/models/tiny.gguf", "blake3:00ff", "gemma3", 1234),
    Calibration("model", 7, ("en", "ru"), ((1, 2, 3), (4, 5)), ((6, 7),)),
    (
        Unit("embed", None, ("embed",), 100, {"q4": UnitFormat(50, 0.1, 0.2, 0.2)}),
        Unit(
            "layers.0.qkv",
            0,
            ("layers.0.q", "layers.0.k"),
            20,
            {"q4": UnitFormat(10, 0.01, None, 0.012), "q8": UnitFormat(20, 1e-5, None, 1.1e-5)},
        ),
    ),
    (TensorLoss("layers.0.q", {"q4": TensorFormat(5, 0.005)}),),
    Proxy(-0.5, 1.2, True, {"q4": 0.9, "q8": None}, {"q4": 1.05}),
    {"q4": EmbeddingLoss(0.2, 0.1, None, 0.19)},
    (HeadScore(0, 1, 0.3, None, 0.97), HeadScore(0, 2, 0.0, 0.4, None)),
    (KvGroupScore(0, 0, 0.3, 0.2),),
    (NeuronScores(0, (0.1, 0.2)),),
    (LayerScore(0, 0.25),),
    "tiny.fl",
)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in list(items):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def plain() -> Any:
    return json.loads(json.dumps(ANALYSIS.to_json()))


def damaged() -> Iterator[tuple[str, Any]]:
    wrong: list[Any] = [{"x": 1}, ["x", []], "\x1b[31m", "", -3.5, 1e300, 2**70, True]
    for path in places(plain()):
        for value in [*wrong, ..., None]:
            data = plain()
            inside = data
            for key in path[:-1]:
                inside = inside[key]
            if value is ...:
                del inside[path[-1]]
            else:
                inside[path[-1]] = value
            yield f"{path} = {value!r}", data
        data = plain()
        inside = data
        for key in path[:-1]:
            inside = inside[key]
        if isinstance(inside, dict) and isinstance(path[-1], str):
            inside["\x07strange"] = inside.pop(path[-1])
            yield f"{path} renamed", data


def test_it_reads_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "sensitive_layers.json"
    write_analysis(ANALYSIS, path)
    assert read_analysis(path) == ANALYSIS
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["version"] == 1
    assert data["calibration"]["sequences"] == [[1, 2, 3], [4, 5]]
    assert "[1, 2, 3]" in path.read_text(encoding="utf-8")


def test_a_config_of_units_alone_is_enough() -> None:
    data = {key: plain()[key] for key in ("version", "model", "calibration", "units")}
    del data["calibration"]["held_back"]
    assert Analysis.from_json(data).units == ANALYSIS.units


def test_every_damaged_field_is_one_line() -> None:
    refused = 0
    for what, data in damaged():
        try:
            found = Analysis.from_json(copy.deepcopy(data))
        except UsageError as error:
            line = str(error)
            assert line.isprintable(), what
            assert len(line) < 400, what
            refused += 1
        else:  # a value that is as good, such as another name: it must read back as it is
            again = Analysis.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
            assert again == found, what
    assert refused > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"units": []}, "no unit"),
        ({"units": [plain()["units"][0]] * 2}, "twice"),
        ({"model": None}, "model is None"),
        ({"extra": 1}, "extra is not a known field"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Analysis.from_json({**plain(), **change})


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"[" * 100000, b"NaN"])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.json"):
        read_analysis(path)


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(plain()).replace("0.012", "NaN"), encoding="utf-8")
    with pytest.raises(UsageError, match="units.*kl is nan"):
        read_analysis(path)


def test_the_schema_beside_the_code_is_that_of_the_code() -> None:
    path = Path(schema.__file__).with_name("analysis.schema.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found == json_schema()
    assert set(found["properties"]) == set(plain())
    units = found["properties"]["units"]["items"]["properties"]
    assert set(units) == set(plain()["units"][0])
    assert "calibration" in found["required"]
    assert "heads" not in found["required"]
