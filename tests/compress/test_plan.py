from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import make_gguf
import pytest

from flashlite.checkpoint.open import open_checkpoint
from flashlite.compress.plan import PRESETS, Plan, plan_preset, stored_shapes
from flashlite.errors import CompressError
from flashlite.model.families import describe
from flashlite.model.source import SourceModel


@pytest.fixture
def source(tiny_gguf: Path) -> SourceModel:
    return describe(open_checkpoint(tiny_gguf))


@pytest.fixture
def untied(tmp_path: Path) -> SourceModel:
    model = make_gguf.tiny_model(tied=False, dtypes={"token_embd": "F16", "output": "Q4_0"})
    return describe(open_checkpoint(make_gguf.write_gguf(tmp_path / "untied.gguf", *model)))


def test_import_follows_the_source(source: SourceModel) -> None:
    formats = plan_preset("import", source).formats
    layer = {name.split(".")[2]: fmt for name, fmt in formats.items() if ".0." in name}
    assert layer == {
        "attn_norm": "f32",
        "q": "q4m",
        "k": "q4m",
        "v": "q4",
        "o": "q4",
        "ffn_norm": "f32",
        "gate": "q4m",
        "up": "q8",
        "down": "q8",  # F16 in the file
    }
    assert formats["embed"] == "q8"
    assert "head" not in formats  # one tensor for both uses


def test_hybrid_keeps_a_half_precision_table_and_a_head_of_its_own(source: SourceModel) -> None:
    plan = plan_preset("hybrid", source)
    assert plan.formats["embed"] == "f16"
    assert plan.formats["head"] == "q8"
    assert stored_shapes(source.spec, plan)["head"] == (512, 64)
    others = {f for n, f in plan.formats.items() if n != "embed" and "norm" not in n}
    assert others == {"q8"}


def test_a_preset_of_one_format_is_uniform(source: SourceModel) -> None:
    uniform = [(fmt, {fmt, "f32"}) for fmt in ("q8", "q6", "q5")]
    for preset, expected in (*uniform, ("q4", {"q4m", "q4", "f32"})):
        plan = plan_preset(preset, source)
        assert set(plan.formats.values()) == expected
        assert "head" not in plan.formats
    assert plan.formats["layers.0.v"] == "q4"  # Q4_0 in the file: nothing to gain by a minimum


def test_an_untied_head_has_its_own_format(untied: SourceModel) -> None:
    formats = plan_preset("import", untied).formats
    assert (formats["embed"], formats["head"]) == ("q8", "q4")
    assert plan_preset("hybrid", untied).formats["head"] == "q8"


def test_an_unknown_preset_lists_the_known_ones(source: SourceModel) -> None:
    with pytest.raises(CompressError, match=r"'q3'.*import, hybrid, lossless, q8, q6, q5, q4"):
        plan_preset("q3", source)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_plan_survives_json(source: SourceModel, preset: str) -> None:
    plan = plan_preset(preset, source)
    assert Plan.from_json(plan.to_json(), source.spec) == plan


@pytest.mark.parametrize(
    ("name", "fmt", "message"),
    [
        ("layers.0.q", "f16", r"layers\.0\.q as 'f16', allowed q8, q6, q5, q4, q4m"),
        ("layers.0.q", "q3", "'q3'"),
        ("layers.0.attn_norm", "q8", "allowed f32"),
        ("embed", "f32", "allowed q8, q6, q5, q4, q4m, f16"),
        ("layers.9.q", "q8", "which the model does not have"),
        ("head", "q8", "which the model does not have"),
        ("layers.0.q", None, r"no format for 'layers\.0\.q'"),
        ("layers.0.q", ["q8"], "stores"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    source: SourceModel, name: str, fmt: object, message: str
) -> None:
    data = plan_preset("import", source).to_json()
    if fmt is None:
        del data["formats"][name]
    else:
        data["formats"][name] = fmt
    with pytest.raises(CompressError, match=message):
        Plan.from_json(data, source.spec)


@pytest.mark.parametrize(
    "data", [None, [], {}, {"preset": 1, "formats": {}}, {"preset": "q8", "formats": []}]
)
def test_what_is_not_a_plan_is_refused(source: SourceModel, data: object) -> None:
    with pytest.raises(CompressError):
        Plan.from_json(data, source.spec)


def test_a_tied_half_precision_table_needs_a_head(source: SourceModel) -> None:
    plan = plan_preset("hybrid", source)
    without = {name: fmt for name, fmt in plan.formats.items() if name != "head"}
    with pytest.raises(CompressError, match="no format for 'head'"):
        replace(plan, formats=without).check(source.spec)
