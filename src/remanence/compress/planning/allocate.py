"""Which way to store each layer, within a number of bytes.

A multiple-choice knapsack: one choice a layer, least harm in sum. It is solved by dynamic
programming over bytes, which is exact where a greedy walk along each layer's convex hull is not.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from remanence.compress.planning.plan import Kept, LayerPlan, Plan
from remanence.compress.planning.size import size
from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

STEPS = 2**16  # of the knapsack: up to 64 KiB it is exact to the byte


@dataclass(frozen=True)
class Choice:
    """One way to store a layer.

    Attributes:
        how: Its plan, or that it stays in float.
        bytes: What it adds to the file, its names and shapes included.
        error: Squared error of the layer's output relative to the output, on the float network's
            inputs; 0 for a layer that stays.
    """

    how: LayerPlan | Kept
    bytes: int
    error: float


@dataclass(frozen=True)
class LayerChoices:
    """All ways to store a layer.

    Attributes:
        choices: At least two; the last keeps it in float16.
        sensitivity: KL(float network || network) in nats for each unit of the layer's relative
            error, while all other layers are float.
    """

    choices: tuple[Choice, ...]
    sensitivity: float


def allocate(
    model: nn.Module,
    measured: Mapping[str, LayerChoices],
    budget: int | str,
    *,
    kept: tuple[Kept, ...] = (),
    architecture: Mapping[str, Any] | None = None,
    reserve: int = 256,
) -> Plan:
    """Choose for each layer within a budget; measuring once serves any number of budgets.

    Args:
        model: The float network.
        measured: What `measure_choices` returned for it.
        budget: As for `plan_budget`.
        kept: The layers that stay in float in any case.
        architecture: As for `plan_budget`.
        reserve: As for `plan_budget`.

    Returns:
        The plan; the file it leads to is no larger than the budget.

    Raises:
        InputError: As for `plan_budget`.
    """
    most = parse_bytes(budget)
    names = list(measured)
    costs = [np.array([c.bytes for c in measured[name].choices]) for name in names]
    harms = [
        np.array([c.error for c in measured[name].choices]) * measured[name].sensitivity
        for name in names
    ]

    def planned(picks: Sequence[int]) -> Plan:
        hows = [measured[name].choices[pick].how for name, pick in zip(names, picks, strict=True)]
        layers = tuple(how for how in hows if isinstance(how, LayerPlan))
        return Plan(layers, (*kept, *(how for how in hows if isinstance(how, Kept))))

    def total(picks: Sequence[int]) -> int:
        return size(model, planned(picks), architecture=architecture).total + reserve

    smallest = [int(cost.argmin()) for cost in costs]
    least = total(smallest)
    if least > most:
        raise InputError(
            f"a budget of {most} bytes is too small: this network needs at least {least} bytes"
        )
    fixed = least - sum(int(cost[pick]) for cost, pick in zip(costs, smallest, strict=True))
    room = most - fixed
    picks = smallest
    # A choice's bytes are exact but for the digits of offsets in the header and its padding.
    while room > least - fixed:
        picks = knapsack(costs, harms, room)
        over = total(picks) - most
        if over <= 0:
            return planned(_spend_rest(picks, costs, harms, most, total))
        picks = smallest
        room -= over
    return planned(_spend_rest(picks, costs, harms, most, total))


def knapsack(costs: Sequence[np.ndarray], harms: Sequence[np.ndarray], room: int) -> list[int]:
    """Choose one item of each group: least harm in sum, for a cost in sum within the room.

    Args:
        costs: Costs of each group's items, whole numbers.
        harms: Harms of each group's items, 0 or more.
        room: Most cost in sum, at least that of the cheapest items; above 65,536 costs are rounded
            up to 65,536ths of it.

    Returns:
        An item of each group.
    """
    base = sum(int(cost.min()) for cost in costs)
    step = max(1, math.ceil((room - base) / STEPS))
    width = (room - base) // step + 1
    best = np.zeros(width)  # least harm within 0, 1, ... steps above the cheapest items
    taken = np.zeros((len(costs), width), np.int16)
    for group, (cost, harm) in enumerate(zip(costs, harms, strict=True)):
        steps = -(-(cost - cost.min()) // step)
        after = np.full(width, np.inf)
        for item in np.lexsort((harm, cost)):
            extra = int(steps[item])
            if extra >= width:
                continue
            candidate = best[: width - extra] + harm[item]
            better = candidate < after[extra:]
            after[extra:][better] = candidate[better]
            taken[group, extra:][better] = item
        best = after
    picks = []
    at = width - 1
    for group in reversed(range(len(costs))):
        pick = int(taken[group, at])
        at -= int(-(-(costs[group][pick] - costs[group].min()) // step))
        picks.append(pick)
    return picks[::-1]


def _spend_rest(
    picks: Sequence[int],
    costs: Sequence[np.ndarray],
    harms: Sequence[np.ndarray],
    most: int,
    total: Callable[[Sequence[int]], int],
) -> list[int]:
    """Spend what rounding left, one layer's better choice at a time, the greatest gain first."""
    picks = list(picks)
    left = most - total(picks)
    moves = sorted(
        (
            (harms[group][pick] - harm, group, item)
            for group, pick in enumerate(picks)
            for item, harm in enumerate(harms[group])
            if harm < harms[group][pick] and costs[group][item] - costs[group][pick] <= left
        ),
        reverse=True,
    )
    for _, group, item in moves:
        if harms[group][item] >= harms[group][picks[group]]:
            continue
        moved = [*picks[:group], item, *picks[group + 1 :]]
        if total(moved) <= most:
            picks = moved
    return picks


def parse_bytes(text: int | str) -> int:
    """Return a number of bytes: a whole number, or text such as `2MiB`, `1.5 MB` or `800kB`.

    Raises:
        InputError: It is neither, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kKMG]?)(i?)B)?\s*", str(text))
    if match is None or (match[3] and not match[2]):
        raise InputError(f"{text!r} is no number of bytes: give for example 2MiB or 2097152")
    unit = (1024 if match[3] else 1000) ** " KMG".index((match[2] or " ").upper())
    count = int(float(match[1]) * unit)
    if count < 1:
        raise InputError(f"{text!r}: give at least one byte")
    return count
