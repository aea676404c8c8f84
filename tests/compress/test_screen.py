"""What a plan says of a split head: written, read back, and refused where it is hostile."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashlite.checkpoint.open import open_checkpoint
from flashlite.compress.pack import Packed, pack
from flashlite.compress.plan import Plan, plan_preset, stored_shapes
from flashlite.compress.quantize import quantize_matrix
from flashlite.compress.screen import Cut, Screen
from flashlite.compress.split_head import Gates, fit_screen, head_bytes, is_worth_trying
from flashlite.errors import CompressError
from flashlite.model.families import describe
from flashlite.model.source import SourceModel


@pytest.fixture(scope="module")
def tiny_source(tiny_gguf: Path) -> SourceModel:
    return describe(open_checkpoint(tiny_gguf))


SCREEN = Screen(32, Cut(2.0, 20), Cut(1.0, 8), {"kl": 0.001})


def plan_of(source: SourceModel) -> Plan:
    return plan_preset("q8", source).with_screen(SCREEN, source.spec)


def test_a_plan_with_a_screen_is_read_back(tiny_source: SourceModel) -> None:
    plan = plan_of(tiny_source)
    assert Plan.from_json(plan.to_json(), tiny_source.spec) == plan
    assert plan.formats["screen"] == plan.formats["screen.rest"] == "q4"
    shapes = stored_shapes(tiny_source.spec, plan)
    assert shapes["screen"] == (512, 32)
    assert list(shapes)[-8:] == [
        "screen", "screen.rest", "screen.project", "screen.shift", "screen.mean", "screen.bias",
        "screen.spread", "screen.rest_spread",
    ]  # fmt: skip


def test_a_second_screen_takes_the_place_of_the_first(tiny_source: SourceModel) -> None:
    again = plan_of(tiny_source).with_screen(SCREEN, tiny_source.spec)
    assert again == plan_of(tiny_source)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rank": 0}, "rank 0, allowed multiples of 32 below 64"),
        ({"rank": 33}, "rank 33"),
        ({"rank": 64}, "rank 64"),
        ({"rank": -32}, "rank -32"),
        ({"rank": True}, "rank is not"),
        ({"rank": "32"}, "rank is not"),
        ({"rank": 2**70}, "rank"),
        ({"coarse": {"reach": -1, "limit": 4}}, "reach is -1"),
        ({"coarse": {"reach": math.nan, "limit": 4}}, "not a number"),
        ({"coarse": {"reach": math.inf, "limit": 4}}, "not a number"),
        ({"coarse": {"reach": 10**400, "limit": 4}}, "not a number"),
        ({"coarse": {"reach": 1e4, "limit": 4}}, "reach is 10000"),
        ({"fine": {"reach": 1, "limit": 0}}, "limit is 0, allowed 1 to 32"),
        ({"fine": {"reach": 1, "limit": 33}}, "limit is 33"),
        ({"fine": {"reach": 1, "limit": 1.5}}, "not a number"),
        ({"fine": {"reach": 1}}, "not an object of limit and reach"),
        ({"fine": None}, "not an object"),
        ({"measured": {"kl": "low"}}, "measured"),
        ({"measured": {"kl": math.nan}}, "measured"),
        ({"measured": {str(i): 0 for i in range(33)}}, "measured"),
        ({"more": 1}, "not an object of coarse"),
    ],
)
def test_hostile_screens_are_refused(
    tiny_source: SourceModel, change: dict[str, Any], match: str
) -> None:
    data = plan_of(tiny_source).to_json()
    data["screen"] = {**data["screen"], **change}
    with pytest.raises(CompressError, match=match):
        Plan.from_json(data, tiny_source.spec)


@pytest.mark.parametrize(
    ("name", "fmt"),
    [("screen", "f32"), ("screen.bias", "q4"), ("screen.rest", "f16"), ("screen.bias", None)],
)
def test_formats_that_a_screen_cannot_have(
    tiny_source: SourceModel, name: str, fmt: str | None
) -> None:
    data = plan_of(tiny_source).to_json()
    data["formats"] = {k: v for k, v in data["formats"].items() if k != name}
    if fmt is not None:
        data["formats"][name] = fmt
    with pytest.raises(CompressError, match=r"screen"):
        Plan.from_json(data, tiny_source.spec)


def test_its_tensors_need_a_screen(tiny_source: SourceModel) -> None:
    data = plan_of(tiny_source).to_json()
    del data["screen"]
    with pytest.raises(CompressError, match="does not have"):
        Plan.from_json(data, tiny_source.spec)


def low_rank_head(rows: int, cols: int) -> tuple[Packed, np.ndarray, np.ndarray]:
    """A head whose rows and states lie near 16 directions, and two sets of states."""
    rng = np.random.default_rng(3)
    weak = 0.05 * rng.normal(size=(rows, cols))
    rows_in, states_in = rng.normal(size=(rows, 16)), rng.normal(size=(1200, 16))
    directions = rng.normal(size=(16, cols)) / 4
    head = (0.3 * (rows_in @ directions + weak)).astype(np.float32)
    states = states_in @ directions + 0.05 * rng.normal(size=(1200, cols)) + 1
    return pack(quantize_matrix(head, "q8")), states[:800], states[800:]


def test_a_head_of_few_directions_is_split_well() -> None:
    head, fitting, checking = low_rank_head(16384, 128)
    fitted = fit_screen(
        head, (16384, 128), fitting.astype(np.float32), checking.astype(np.float32),
        body_bytes=0, ranks=[32, 64],
    )  # fmt: skip
    assert fitted is not None
    assert fitted.screen.rank == 32
    measured = fitted.screen.measured
    assert measured["argmax_contained"] >= Gates().argmax
    assert measured["kl"] <= Gates().kl
    assert measured["bytes"] < head_bytes(head)
    # The choice is the cheapest of those that pass.
    passing = [trial for trial in fitted.trials if trial.passes(Gates())]
    assert min(passing, key=lambda trial: trial.cost).rank == fitted.screen.rank


def test_a_head_without_directions_is_not_split() -> None:
    rng = np.random.default_rng(4)
    head = pack(quantize_matrix(rng.normal(size=(2048, 64)).astype(np.float32), "q8"))
    states = rng.normal(size=(600, 64)).astype(np.float32)
    assert fit_screen(head, (2048, 64), states[:400], states[400:], body_bytes=0) is None


def test_small_heads_and_small_shares_are_not_tried() -> None:
    rng = np.random.default_rng(5)
    small = pack(quantize_matrix(rng.normal(size=(512, 64)).astype(np.float32), "q8"))
    assert not is_worth_trying(small, 0)
    large = pack(quantize_matrix(rng.normal(size=(16384, 320)).astype(np.float32), "q8"))
    assert is_worth_trying(large, 0)
    assert not is_worth_trying(large, 100 * head_bytes(large))
