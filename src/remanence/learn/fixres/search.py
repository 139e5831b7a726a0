"""The joint search over train size, test size, crop and scope under a cost budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from remanence.learn.fixres.cost import Cost


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to serve a classifier.

    Attributes:
        network: Which of the networks given (they may differ in train size).
        train_size: Side that network was trained at, pixels.
        size: Side it is tested at, pixels.
        crop_pct: Side of the test crop over the side that images are resized to.
        scope: What was adapted: `none`, `bn_stats`, `classifier+last_bn`, ...
        cost: What one prediction costs.
        correct: Whether each selection image is predicted right, (N,) bool.
    """

    network: int
    train_size: int
    size: int
    crop_pct: float
    scope: str
    cost: Cost
    correct: npt.NDArray[np.bool_]

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy on the selection images."""
        return float(self.correct.mean())


def choose(
    candidates: Sequence[Candidate],
    *,
    budget_gmacs: float | None = None,
    budget_ms: float | None = None,
) -> Candidate:
    """Choose the most accurate candidate that the budget allows.

    Ties go to the cheaper one. The accuracy of the chosen candidate on the very images that chose
    it is biased upwards: report it on other images.

    Args:
        candidates: What to choose from, all judged on the same images.
        budget_gmacs: Most multiply-adds a prediction may cost, in units of 1e9.
        budget_ms: Longest latency of a prediction, milliseconds.

    Returns:
        The chosen candidate.

    Raises:
        InputError: No candidate fits the budget.
    """
    fitting = [
        c
        for c in candidates
        if (budget_gmacs is None or c.cost.gmacs <= budget_gmacs)
        and (budget_ms is None or c.cost.latency_ms <= budget_ms)
    ]
    if not fitting:
        cheapest = min(candidates, key=lambda c: c.cost.gmacs)
        raise InputError(
            f"no candidate fits the budget; the cheapest, {cheapest.size} pixels, costs "
            f"{cheapest.cost.gmacs:.3g} GMACs and {cheapest.cost.latency_ms:.3g} ms an image"
        )
    return max(fitting, key=lambda c: (c.accuracy, -c.cost.gmacs))


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that none other beats in accuracy at equal or lower cost.

    Args:
        candidates: What to compare.

    Returns:
        The Pareto set by ascending multiply-adds.
    """
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.cost.gmacs, -c.accuracy)):
        if not front or candidate.accuracy > front[-1].accuracy:
            front.append(candidate)
    return front
