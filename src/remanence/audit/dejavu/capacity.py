"""Capacity: the largest arbitrary set that an architecture tells from the rest of a pool."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from remanence.audit.dejavu.memorization_report import MemorizationReport
from remanence.audit.dejavu.memorize import MakeModel, fit_memorizer
from remanence.audit.dejavu.sampling import MembershipTask
from remanence.errors import InputError


@dataclass(frozen=True)
class CapacityPoint:
    """Sets of one size.

    Attributes:
        n: images in the set.
        balanced_accuracies: on set and unseen images, one per seed.
        balanced_accuracy: their mean.
        stored_bits: mean over seeds.
        bits_per_parameter: mean over seeds.
        held: whether the mean reached the target.
    """

    n: int
    balanced_accuracies: tuple[float, ...]
    balanced_accuracy: float
    stored_bits: float
    bits_per_parameter: float
    held: bool


@dataclass(frozen=True)
class CapacityCurve:
    """What was tried, and where the target was lost.

    Attributes:
        target: balanced accuracy to reach.
        points: one per size tried, from small to large.
        largest_held: largest size that reached the target below the first that did not; 0 where
            the smallest tried did not.
        smallest_lost: size at which the target was lost; None where no size lost it, and the
            capacity is only known to be `largest_held` or more.
    """

    target: float
    points: tuple[CapacityPoint, ...]
    largest_held: int
    smallest_lost: int | None


def capacity(
    make_model: MakeModel,
    images: Tensor,
    *,
    sizes: Sequence[int] | None = None,
    n_unseen: int | None = None,
    target: float = 0.95,
    seeds: int = 3,
    ratio: float = 1.1,
    progress: Callable[[int, int, MemorizationReport], None] | None = None,
    **options: Any,  # fit_memorizer's own, checked there
) -> CapacityCurve:
    """Search the largest set whose balanced accuracy on set and unseen images reaches `target`.

    Sizes grow until one misses the target; then the bracket is halved on the logarithm of n until
    its ends are within `ratio`. Each seed draws another set and another initialisation.

    Args:
        make_model: makes the network, as for `fit_memorizer`.
        images: (P, C, H, W) pool, every image once, on the device to train on.
        sizes: to try first, growing; by default 64, 128, ... below half the seen pool.
        n_unseen: images kept out of training; a quarter of the pool by default.
        target: mean balanced accuracy over the seeds, in (0.5, 1].
        seeds: runs a size.
        ratio: precision of the answer, above 1.
        progress: called after each run with its size, its seed and its report.
        options: of `fit_memorizer`: transform, steps, until, optimizer, ...

    Returns:
        The curve.

    Raises:
        InputError: an argument is out of range.
    """
    n_unseen = len(images) // 4 if n_unseen is None else n_unseen
    limit = (len(images) - n_unseen - 1) // 2  # a set is smaller than half the seen pool
    if sizes is None:
        sizes = [64 << doubling for doubling in range(64) if 64 << doubling <= limit]
    if not sizes or list(sizes) != sorted(set(sizes)) or not 1 <= sizes[0] <= sizes[-1] <= limit:
        raise InputError(
            f"set sizes {list(sizes)}: give growing sizes from 1 to {limit}, or a larger pool"
        )
    if not 0.5 < target <= 1 or seeds < 1 or ratio <= 1:
        raise InputError(
            f"target {target}, {seeds} seeds, ratio {ratio}: give a target in (0.5, 1], at least "
            "1 seed and a ratio above 1"
        )

    def measure(n: int) -> CapacityPoint:
        reports = []
        for seed in range(seeds):
            task = MembershipTask.draw(images, n, n_unseen, seed)
            fitted = fit_memorizer(make_model, images, task, views={}, seed=seed, **options)
            reports.append(fitted.report)
            if progress is not None:
                progress(n, seed, fitted.report)
        accuracies = tuple(report.clean.balanced_accuracy.value for report in reports)
        mean = sum(accuracies) / seeds
        return CapacityPoint(
            n,
            accuracies,
            mean,
            sum(report.stored_bits for report in reports) / seeds,
            sum(report.bits_per_parameter for report in reports) / seeds,
            mean >= target,
        )

    return search(measure, sizes, target, ratio)


def search(
    measure: Callable[[int], CapacityPoint], sizes: Sequence[int], target: float, ratio: float
) -> CapacityCurve:
    """Walk up `sizes` to the first that is lost, then bisect on log n down to `ratio`."""
    points: list[CapacityPoint] = []
    held, lost = 0, None
    for n in sizes:
        points.append(measure(n))
        if not points[-1].held:
            lost = n
            break
        held = n
    while held and lost is not None and lost > held * ratio and lost - held > 1:
        middle = min(max(round(math.sqrt(held * lost)), held + 1), lost - 1)
        points.append(measure(middle))
        if points[-1].held:
            held = middle
        else:
            lost = middle
    return CapacityCurve(target, tuple(sorted(points, key=lambda point: point.n)), held, lost)
