"""What steps take, learned from noisy ones."""

from __future__ import annotations

import random

import pytest

from flashlite.compress.latency import predict_latency
from flashlite.compress.machine_profile import MachineProfile, Rates
from flashlite.compress.plan import Plan
from flashlite.model.spec import ModelSpec
from flashlite.server.pace import Pace, Quantile, Shape, seed_of

COST = (2e-3, 0.1e-3, 5e-8, 0.3e-3, 2e-7)


def seconds(shape: Shape, factor: float = 1.0) -> float:
    return factor * sum(c * x for c, x in zip(COST, (1, *shape), strict=True))


def draw_shape(draw: random.Random) -> Shape:
    decoding = draw.randrange(0, 9)
    depth = decoding * draw.uniform(10, 2000)
    if draw.random() < 0.3 or not decoding:
        first, tokens = draw.randrange(2000), draw.randrange(1, 257)
        piece = Shape.chunk(first, tokens)
        return Shape(piece.prompt, piece.reach, decoding, depth)
    return Shape(0, 0.0, decoding, depth)


def teach(
    pace: Pace, draw: random.Random, steps: int, noise: float = 0.1, factor: float = 1.0
) -> None:
    for _ in range(steps):
        shape = draw_shape(draw)
        pace.note(shape, seconds(shape, factor) * draw.lognormvariate(0, noise))


def worst_error(pace: Pace, factor: float = 1.0) -> float:
    draw = random.Random(99)
    shapes = [draw_shape(draw) for _ in range(200)]
    return max(abs(pace.step(s) / seconds(s, factor) - 1) for s in shapes)


def test_nothing_is_known_before_the_first_step() -> None:
    pace = Pace()
    assert not pace.known
    assert pace.at_most(Shape(64, 0, 4, 100)) == 0


def test_costs_are_found_in_noise() -> None:
    pace = Pace()
    teach(pace, random.Random(1), 400)
    assert worst_error(pace) < 0.1


def test_one_step_in_fifty_is_above_the_most() -> None:
    pace, draw = Pace(), random.Random(2)
    teach(pace, draw, 600)
    above = 0
    for _ in range(2000):
        shape = draw_shape(draw)
        above += seconds(shape) * draw.lognormvariate(0, 0.1) > pace.at_most(shape)
    assert 10 <= above <= 80


def test_stalls_do_not_change_what_is_expected() -> None:
    pace, draw = Pace(), random.Random(3)
    teach(pace, draw, 300)
    for _ in range(300):
        shape = draw_shape(draw)
        stall = 3.0 if draw.random() < 0.01 else 0.0
        pace.note(shape, seconds(shape) + stall)
    assert worst_error(pace) < 0.15


@pytest.mark.parametrize("factor", [0.3, 6.0])
def test_a_machine_that_changes_its_speed_is_followed(factor: float) -> None:
    pace, draw = Pace(), random.Random(4)
    teach(pace, draw, 300)
    teach(pace, draw, 20, factor=factor)
    if factor > 1:  # the next step's worst case is known at once
        shape = Shape(0, 0, 4, 400)
        assert pace.at_most(shape) > seconds(shape, factor) / 2
    teach(pace, draw, 600, factor=factor)
    assert worst_error(pace, factor) < 0.15


def test_what_no_step_speaks_of_stays_known() -> None:
    pace, draw = Pace(), random.Random(5)
    teach(pace, draw, 300)
    before = pace.step(Shape.chunk(0, 256))
    for _ in range(20_000):
        pace.note(Shape(0, 0, 1, 100), seconds(Shape(0, 0, 1, 100)) * draw.lognormvariate(0, 0.1))
    assert pace.step(Shape.chunk(0, 256)) == pytest.approx(before, rel=0.3)


def test_no_cost_is_below_zero() -> None:
    pace, draw = Pace(), random.Random(6)
    for _ in range(200):
        pace.note(draw_shape(draw), draw.uniform(1e-3, 5e-3))  # unrelated to the shapes
        assert min(pace._cost) >= 0


def test_a_clock_that_jumped_teaches_nothing() -> None:
    pace = Pace()
    teach(pace, random.Random(7), 100)
    known = pace._cost
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        pace.note(Shape(0, 0, 1, 10), bad)
    assert pace._cost == known


def test_a_quantile_is_of_the_last_values() -> None:
    quantile = Quantile(0.9, 5.0)
    assert quantile.value == 5.0
    for value in range(1000):
        quantile.note(float(value))
    assert 970 <= quantile.value <= 976


def test_a_measured_machine_is_a_seed() -> None:
    spec = ModelSpec(
        family="llama", n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=96,
        vocab_size=100, max_context=512, norm_eps=1e-5, rope_theta=1e4, tied_head=True,
        activation="silu",
    )  # fmt: skip
    plan = Plan("test", {name: "f32" if len(shape) == 1 else "q8" for name, shape in spec.shapes()})
    rates = Rates(
        threads=2, read_gb_s=20.0, dot_gmac_s=200.0, gather_gb_s=3.0, kv_gb_s=4.0,
        gemv_gb_s={"q8": 10.0}, gemm_gmac_s={"q8": {2: 10.0, 8: 40.0, 32: 160.0}},
        fixed_us={"qkv": 2.0, "call": 5.0}, element_ns={"embed": (1.0, 0.5)},
        attend_ns=((1.0, 0.5), (0.2, 0.1)),
    )  # fmt: skip
    machine = MachineProfile("cpu", "avx2", "abc", (rates,))
    pace = Pace(seed_of(spec, plan, machine))
    predicted = predict_latency(spec, plan, machine, depth=512, prompt_tokens=256)
    assert pace.step(Shape(0, 0, 1, 512)) == pytest.approx(predicted.decode_seconds, rel=0.25)
    prefill = 256 / predicted.prefill_tokens_s
    assert pace.step(Shape.chunk(0, 256)) == pytest.approx(prefill, rel=0.25)
