"""Weighted k-means in a metric: the EM of arXiv 1907.05686, section 3.2.

The paper clusters blocks w by the output error ||x (w - c)||^2 on inputs x. That is the quadratic
form (w - c)^T G (w - c) of the Gram matrix G = x^T x = L L^T, hence plain k-means on the points
L^T w: only the assignment needs them. The best centroid is the mean of its blocks whatever G is, so
that centroids are means of the points as given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from remanence.compress.quantizer.assignment import (
    WhitePoints,
    as_float,
    check_points,
    metric_factor,
    nearest,
    ordered_sum,
    squared_distances,
)
from remanence.errors import InputError
from remanence.modes import exact_products

__all__ = ["KMeans", "exact_products", "kmeans", "metric_factor", "nearest"]

SAMPLE = 32  # points a codeword that k-means++ draws from


@dataclass(frozen=True)
class KMeans:
    """Clusters of points.

    Attributes:
        centroids: Means of the clusters (k, d), float32 (float64 where the points were).
        codes: The nearest centroid of each point (n,), int64, by these very centroids.
        objective: Sum of weighted squared distances in the metric after each assignment; it never
            rises, and the last entry is that of `centroids` and `codes`.
        iterations: Updates of the centroids.
    """

    centroids: Tensor
    codes: Tensor
    objective: tuple[float, ...]
    iterations: int


def kmeans(
    points: Tensor,
    k: int,
    *,
    metric: Tensor | None = None,
    weights: Tensor | None = None,
    init: Literal["kmeans++", "random"] | Tensor = "kmeans++",
    iterations: int = 25,
    restarts: int = 1,
    tolerance: float = 1e-4,
    anneal: bool = False,
    seed: int = 0,
) -> KMeans:
    """Cluster points by k-means in a metric.

    Where at most k points are distinct they become the centroids and the objective is 0. A centroid
    that no point chose moves to one of the points with the largest errors.

    Args:
        points: (n, d), finite.
        k: Number of centroids, at least 1. Those that cannot be used are copies of the first.
        metric: (d, d), positive semidefinite; plain distances without.
        weights: (n,), not negative; 1 each without.
        init: `kmeans++`, `random` (distinct points), or centroids (k, d).
        iterations: Most updates of the centroids.
        restarts: Runs, of which the best is kept; those after the first start elsewhere.
        tolerance: Stop when the objective fell by less than this share over three iterations.
        anneal: Noise on the points before each update, falling to none (arXiv 2010.15703,
            section 3.3); a plain run follows.
        seed: For the start and the noise.

    Returns:
        The clusters; the same for a seed whatever the number of threads.

    Raises:
        InputError: An argument is out of range, or a value is NaN or infinite.
    """
    check_points(points, k, metric, weights)
    if iterations < 1 or restarts < 1:
        raise InputError("iterations and restarts count runs: give at least 1 of each")
    if not tolerance >= 0:
        raise InputError(f"tolerance {tolerance}: give 0 or more")
    if not (isinstance(init, Tensor) or init in {"kmeans++", "random"}):
        raise InputError(f"init {init!r} is unknown: give 'kmeans++', 'random' or centroids")
    if isinstance(init, Tensor) and (
        init.shape != (k, points.shape[1]) or not bool(init.isfinite().all())
    ):
        raise InputError(f"init {tuple(init.shape)}: give finite {(k, points.shape[1])}")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), exact_products():
        points = as_float(points)
        if (few := _distinct(points, k)) is not None:
            return few
        run = _Run(points, metric, weights, generator)
        best: KMeans | None = None
        for _ in range(restarts):
            if isinstance(init, Tensor):
                start = init.to(points)
            else:
                start = run.plus_plus(k) if init == "kmeans++" else run.random(k)
            if anneal:
                start = run.anneal(start, iterations)
            found = run.descend(start, iterations, tolerance)
            if best is None or found.objective[-1] < best.objective[-1]:
                best = found
    assert best is not None
    return best


class _Run:
    """What the runs on one set of points share."""

    def __init__(
        self,
        points: Tensor,
        metric: Tensor | None,
        weights: Tensor | None,
        generator: torch.Generator,
    ) -> None:
        self.points, self.white, self.generator = points, WhitePoints(points, metric), generator
        self.weights = None if weights is None else weights.to(points.device, torch.float64)

    def descend(self, centroids: Tensor, iterations: int, tolerance: float) -> KMeans:
        """Alternate assignment and update until nothing is gained."""
        white = self.white.whiten(centroids)
        codes = self.white.nearest(white)
        errors = self.white.errors(white, codes)
        objective = [self._total(errors)]
        done = 0
        for _ in range(iterations):
            moved = self._fill(codes, errors, len(centroids))
            next_centroids = self._means(moved, centroids)
            white = self.white.whiten(next_centroids)
            next_codes = self.white.nearest(white)
            errors = self.white.errors(white, next_codes)
            total = self._total(errors)
            if not total < objective[-1]:
                break  # nothing is left but rounding
            settled = torch.equal(next_codes, moved)
            centroids, codes = next_centroids, next_codes
            objective.append(total)
            done += 1
            before = objective[max(len(objective) - 4, 0)]
            if settled or (len(objective) > 3 and before - total < tolerance * before):
                break
        return KMeans(centroids, codes, tuple(objective), done)

    def anneal(self, centroids: Tensor, iterations: int) -> Tensor:
        """Return centroids after updates from noisy points, the noise falling to none.

        Noise on the points, of standard deviation s in a dimension, is noise of s / sqrt(members)
        on their mean.
        """
        centred = (self.points - self.white.centre).square_()
        spread = (ordered_sum(centred) / len(centred)).sqrt()
        for step in range(1, iterations + 1):
            white = self.white.whiten(centroids)
            codes = self.white.nearest(white)
            errors = self.white.errors(white, codes)
            codes = self._fill(codes, errors, len(centroids))
            centroids = self._means(codes, centroids)
            counts = torch.bincount(codes, minlength=len(centroids)).clamp(min=1)
            noise = torch.randn(centroids.shape, generator=self.generator).to(centroids)
            level = math.sqrt(1 - step / iterations)
            centroids = centroids + level * spread * noise / counts.sqrt().unsqueeze(1)
        return centroids.to(self.points.dtype)

    def random(self, k: int) -> Tensor:
        """Return k points at random, none of them twice."""
        order = torch.randperm(len(self.points), generator=self.generator)[:k]
        return self.points[order.to(self.points.device)]

    def plus_plus(self, k: int) -> Tensor:
        """Draw centroids with probability proportional to the squared distance to those drawn.

        k-means++ on a sample of at most 32 k points. Where the sample holds too few distinct points
        the rest repeat the first, and the update moves them.
        """
        n = min(len(self.points), SAMPLE * k)
        chosen = torch.randperm(len(self.points), generator=self.generator)[:n].sort().values
        chosen = chosen.to(self.points.device)
        columns = self.white.columns[:, chosen]  # (d, n)
        weights = 1.0 if self.weights is None else self.weights[chosen]
        draws = torch.rand(k, generator=self.generator, dtype=torch.float64).to(chosen.device)
        gap = torch.full((n,), math.inf, dtype=columns.dtype, device=chosen.device)
        mass = (torch.ones_like(gap).double() * weights).cumsum(0)
        picks = torch.zeros(k, dtype=torch.int64, device=chosen.device)
        for i in range(k):
            if i:
                mass = (gap.double() * weights).cumsum(0)
            if not mass[-1] > 0:
                picks[i:] = picks[0]
                break
            # At 0 exactly a point of no mass could be drawn: search to the right of equals.
            pick = torch.searchsorted(mass, draws[i : i + 1] * mass[-1], right=True).clamp(
                max=n - 1
            )
            picks[i] = pick[0]
            gap = torch.minimum(gap, squared_distances(columns, columns[:, pick]))
        return self.points[chosen[picks]]

    def _total(self, errors: Tensor) -> float:
        exact = errors.double()
        total = ordered_sum(exact if self.weights is None else exact * self.weights)
        return total.item() * self.white.unit

    def _means(self, codes: Tensor, centroids: Tensor) -> Tensor:
        """Return the weighted mean of each cluster; a cluster without weight keeps its centroid."""
        k = len(centroids)
        mass = _sums(codes, self.weights, k)
        columns = []
        for column in self.points.T:
            exact = column.double()
            columns.append(_sums(codes, exact if self.weights is None else exact * self.weights, k))
        means = torch.stack(columns, 1) / mass.clamp(min=torch.finfo(mass.dtype).tiny).unsqueeze(1)
        means = means.to(centroids.dtype)
        kept = torch.where((mass > 0).unsqueeze(1), means, centroids)
        alive = torch.bincount(codes, minlength=k) > 0
        return torch.where(alive.unsqueeze(1), kept, kept[alive.int().argmax()])

    def _fill(self, codes: Tensor, errors: Tensor, k: int) -> Tensor:
        """Give each empty cluster one of the points with the largest errors.

        No cluster loses its last point. Where no error is left there is nothing to gain, and
        clusters stay empty.
        """
        counts = torch.bincount(codes, minlength=k)
        empty = (counts == 0).nonzero().flatten()
        if not len(empty):
            return codes
        loss = errors if self.weights is None else errors * self.weights
        order = loss.argsort(descending=True, stable=True)
        grouped = codes[order].argsort(stable=True)  # clusters in turn, each by falling error
        firsts = counts.cumsum(0) - counts
        rank = torch.empty_like(codes)
        rank[grouped] = (
            torch.arange(len(codes), device=codes.device) - firsts[codes[order][grouped]]
        )
        free = (rank < counts[codes[order]] - 1) & (loss[order] > 0)
        givers = order[free][: len(empty)]
        moved = codes.clone()
        moved[givers] = empty[: len(givers)]
        return moved


def _sums(codes: Tensor, values: Tensor | None, k: int) -> Tensor:
    """Sum float64 values by code, in the points' order: the same for any number of threads."""
    if codes.device.type == "cpu" or values is None:
        return torch.bincount(codes, values, minlength=k).double()
    order = codes.argsort(stable=True)
    ends = torch.bincount(codes, minlength=k).cumsum(0)
    running = torch.cat([values.new_zeros(1), values[order].cumsum(0)])
    return running[ends].diff(prepend=values.new_zeros(1))


def _distinct(points: Tensor, k: int) -> KMeans | None:
    """Return the distinct points as clusters where there are at most k."""
    head = points[: 4 * k]
    if len(torch.unique(head, dim=0)) > k:
        return None
    values, codes = torch.unique(points, dim=0, return_inverse=True)
    if len(values) > k:
        return None
    centroids = torch.cat([values, values[:1].expand(k - len(values), -1)])
    return KMeans(centroids, codes, (0.0,), 0)
