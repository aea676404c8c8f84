"""The knapsack: exact against every possible choice, within its budget, honest where it fails."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from flashlite.compress import allocate as module
from flashlite.compress.allocate import (
    Choice,
    Item,
    allocate,
    curve,
    hull,
    least_cost,
    smallest_within,
)
from flashlite.errors import CompressError


def items(seed: int, n: int = 6, formats: int = 3, step: int = 64) -> list[Item]:
    """Units whose finer formats cost more and lose less, mostly."""
    rng = np.random.default_rng(seed)
    return [
        Item(
            f"unit{i}",
            tuple(
                Choice(f"f{k}", float(step * (k + 1) * rng.integers(1, 20)), float(loss))
                for k, loss in enumerate(sorted(rng.exponential(size=formats), reverse=True))
            ),
        )
        for i in range(n)
    ]


def every(found: list[Item]) -> list[tuple[float, float]]:
    """Cost and loss of every possible allocation."""
    return [
        (sum(c.cost for c in chosen), sum(c.kl for c in chosen))
        for chosen in itertools.product(*(item.choices for item in found))
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("step", [64, 1])
def test_no_other_choice_within_the_budget_loses_less(seed: int, step: int) -> None:
    found = items(seed, step=step)
    known = every(found)
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        least, most = min(known)[0], max(known)[0]
        budget = least + share * (most - least)
        point = allocate(found, budget)
        assert point.cost <= budget
        assert point.kl == pytest.approx(min(kl for cost, kl in known if cost <= budget))
        chosen = [
            next(c for c in item.choices if c.format == point.formats[item.name]) for item in found
        ]
        assert point.cost == sum(c.cost for c in chosen)
        assert point.kl == pytest.approx(sum(c.kl for c in chosen))


def test_costs_in_seconds_keep_the_budget_and_come_near_to_the_best() -> None:
    rng = np.random.default_rng(3)
    found = [
        Item(item.name, tuple(Choice(c.format, c.cost * rng.uniform(1e-6, 2e-6), c.kl)
                              for c in item.choices))
        for item in items(1)
    ]  # fmt: skip
    known = every(found)
    budget = (min(known)[0] + max(known)[0]) / 2
    point = allocate(found, budget)
    best = min(kl for cost, kl in known if cost <= budget)
    assert point.cost <= budget
    assert point.kl <= 1.02 * best


def test_a_budget_out_of_reach_names_the_smallest() -> None:
    found = items(0)
    least = least_cost(found)
    with pytest.raises(CompressError, match=rf"the smallest that can be reached is {least:.0f} b"):
        allocate(found, least - 1)
    assert allocate(found, least).cost == least


def test_the_smallest_within_a_loss_is_the_smallest() -> None:
    found = items(2)
    known = every(found)
    wanted = float(np.median([kl for _, kl in known]))
    point = smallest_within(found, wanted)
    assert point.kl <= wanted
    assert point.cost == min(cost for cost, kl in known if kl <= wanted)
    with pytest.raises(CompressError, match="the least that is expected is"):
        smallest_within(found, min(kl for _, kl in known) * 0.9)


def test_the_curve_falls() -> None:
    points = curve(items(4, n=8))
    assert len(points) > 5
    assert all(a.cost < b.cost and a.kl >= b.kl for a, b in itertools.pairwise(points))
    assert points[0].cost == least_cost(items(4, n=8))


def test_what_costs_more_and_loses_more_is_never_taken() -> None:
    item = Item("u", (Choice("a", 10, 1.0), Choice("b", 20, 2.0), Choice("c", 30, 0.5)))
    assert [choice.format for choice in hull(item)] == ["a", "c"]
    assert allocate([item], 25).formats == {"u": "a"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_costs_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(CompressError, match="unit u, format a"):
        allocate([Item("u", (Choice("a", bad, 0.0),))], 1.0)
    with pytest.raises(CompressError, match="names no unit"):
        allocate([], 1.0)
    with pytest.raises(CompressError, match="offers no format"):
        allocate([Item("u", ())], 1.0)


def test_costs_between_two_steps_count_as_the_higher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STATES", 16)
    rng = np.random.default_rng(0)
    for seed in range(8):
        found = [
            Item(item.name, tuple(Choice(c.format, c.cost * rng.uniform(1, 2), c.kl)
                                  for c in item.choices))
            for item in items(seed)
        ]  # fmt: skip
        known = every(found)
        for share in (0.1, 0.3, 0.6):
            budget = min(known)[0] + share * (max(known)[0] - min(known)[0])
            assert allocate(found, budget).cost <= budget
