"""Which format each unit gets: the least loss that a budget allows.

Each unit of the model offers a few choices, each with a cost (bytes, or seconds of a decode step)
and a loss (nats of KL divergence); exactly one is taken of each, so this is a multiple-choice
knapsack. Costs are whole multiples of a step, at most some 2^15 of them, and the table of the least
loss within each multiple is filled unit by unit: exact, in milliseconds for a hundred units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from flashlite.errors import CompressError

__all__ = ["Choice", "Item", "Point", "allocate", "curve", "hull", "least_cost", "smallest_within"]

_STATES = 1 << 15  # multiples of the step that a table spans, about


@dataclass(frozen=True)
class Choice:
    """One format of one unit."""

    format: str
    cost: float  # bytes or seconds
    kl: float  # nats


@dataclass(frozen=True)
class Item:
    """One unit and all it may be stored as."""

    name: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Point:
    """One allocation: the format of every unit, what it costs and what it loses."""

    cost: float
    kl: float
    formats: Mapping[str, str]


def least_cost(items: Sequence[Item]) -> float:
    """What everything costs at its cheapest."""
    return sum(min(choice.cost for choice in item.choices) for item in items)


def allocate(
    items: Sequence[Item],
    budget: float,
    *,
    what: Callable[[float], str] = lambda cost: f"{cost:.0f} bytes",
) -> Point:
    """The choices with the least total loss whose total cost keeps within the budget.

    Args:
        items: the units; a choice that costs more and loses more than another is never taken.
        budget: in the unit of the costs.
        what: writes a cost for a message.

    Raises:
        CompressError: the budget is below the least that can be reached, which is named.
    """
    _check(items)
    least = least_cost(items)
    if budget < least:
        raise CompressError(
            f"the budget leaves {what(budget)} for the weights, the smallest that can be reached "
            f"is {what(least)}; raise it, or choose a smaller model"
        )
    offers = [_frontier(item) for item in items]
    step = _step(offers)
    spare = budget - least
    widest = sum(offer[-1].cost - offer[0].cost for offer in offers)
    if spare >= widest or step == 0:
        return _point(items, [offer[-1] for offer in offers])
    # Costs that are no multiple of the step are rounded up: the budget is never exceeded.
    extra = [
        _multiples([choice.cost - offer[0].cost for choice in offer], step) for offer in offers
    ]
    states = min(math.floor(spare / step * (1 + 1e-12)), sum(int(e[-1]) for e in extra)) + 1
    table = np.zeros(states)
    taken = np.zeros((len(offers), states), np.int8)
    for i, offer in enumerate(offers):
        found = np.full(states, np.inf)
        for k, choice in enumerate(offer):
            shift = int(extra[i][k])
            if shift >= states:
                break
            loss = table[: states - shift] + choice.kl
            better = loss < found[shift:]
            found[shift:][better] = loss[better]
            taken[i, shift:][better] = k
        table = found
    at = states - 1
    chosen = []
    for i in range(len(offers) - 1, -1, -1):
        k = int(taken[i, at])
        chosen.append(offers[i][k])
        at -= int(extra[i][k])
    return _point(items, chosen[::-1])


def curve(items: Sequence[Item], points: int = 33) -> list[Point]:
    """The best allocation at evenly spaced budgets from the least cost to the most useful one."""
    least = least_cost(items)
    most = sum(_frontier(item)[-1].cost for item in items)
    found: list[Point] = []
    for budget in np.linspace(least, most, max(2, points)):
        point = allocate(items, float(budget))
        if not found or point.formats != found[-1].formats:
            found.append(point)
    return found


def smallest_within(items: Sequence[Item], most_kl: float) -> Point:
    """The cheapest allocation whose summed loss is at most `most_kl`.

    Raises:
        CompressError: even the best formats lose more; the least loss is named.
    """
    _check(items)
    best = [_frontier(item)[-1] for item in items]
    least_kl = sum(choice.kl for choice in best)
    if least_kl > most_kl:
        raise CompressError(
            f"a KL of at most {most_kl:g} nats cannot be reached: the least that is expected is "
            f"{least_kl:.4g}"
        )
    low, high = least_cost(items), sum(choice.cost for choice in best)
    found = allocate(items, high)
    for _ in range(40):
        if high - low <= 1e-5 * high:
            break
        middle = (low + high) / 2
        point = allocate(items, middle)
        if point.kl <= most_kl:
            found, high = point, middle
        else:
            low = middle
    return found


def hull(item: Item) -> list[Choice]:
    """The choices of a unit that no other beats in both cost and loss, cheapest first."""
    return _frontier(item)


def _check(items: Sequence[Item]) -> None:
    if not items:
        raise CompressError("there is nothing to allocate: the analysis names no unit")
    for item in items:
        if not item.choices:
            raise CompressError(f"unit {item.name} offers no format")
        for choice in item.choices:
            if not (math.isfinite(choice.cost) and choice.cost >= 0 and math.isfinite(choice.kl)):
                raise CompressError(
                    f"unit {item.name}, format {choice.format}: cost {choice.cost} or KL "
                    f"{choice.kl} is not a number from 0 on"
                )


def _frontier(item: Item) -> list[Choice]:
    """Cheapest first, each losing less than all before it."""
    found: list[Choice] = []
    for choice in sorted(item.choices, key=lambda c: (c.cost, c.kl)):
        if not found or choice.kl < found[-1].kl:
            found.append(choice)
    return found


def _step(offers: Sequence[Sequence[Choice]]) -> float:
    """What costs are counted in: their common divisor where that gives few enough states."""
    extra = [choice.cost - offer[0].cost for offer in offers for choice in offer[1:]]
    if not extra:
        return 0.0
    widest = sum(offer[-1].cost - offer[0].cost for offer in offers)
    if all(float(value).is_integer() for value in extra):
        divisor = reduce(math.gcd, (int(value) for value in extra))
        if widest / divisor <= 4 * _STATES:
            return float(divisor)
    return widest / _STATES


def _multiples(costs: Sequence[float], step: float) -> list[int]:
    return [math.ceil(cost / step - 1e-9) for cost in costs]


def _point(items: Sequence[Item], chosen: Sequence[Choice]) -> Point:
    return Point(
        sum(choice.cost for choice in chosen),
        sum(choice.kl for choice in chosen),
        {item.name: choice.format for item, choice in zip(items, chosen, strict=True)},
    )
