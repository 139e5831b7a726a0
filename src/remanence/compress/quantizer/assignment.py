"""Points and their nearest centroids in a metric: the E-step of arXiv 1907.05686, section 3.2."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.modes import exact_products

if TYPE_CHECKING:
    from collections.abc import Iterable

TILE = 2**17  # scores held at a time and thread: 512 KiB, which a second-level cache holds
STRIP = 32  # points; products of whole strips are the same bits however many lie side by side


def metric_factor(metric: Tensor) -> Tensor:
    """Factor a metric G into L L^T.

    Args:
        metric: Symmetric positive semidefinite (d, d).

    Returns:
        Cholesky factor (d, d), float64; where G is singular, the eigenvectors times the roots of
        the eigenvalues, those below 0 counted as 0.

    Raises:
        InputError: The metric is not square, not finite, or zero.
    """
    if metric.ndim != 2 or metric.shape[0] != metric.shape[1]:
        raise InputError(f"a metric of shape {tuple(metric.shape)}: give a square matrix")
    exact = metric.double()
    if not bool(exact.isfinite().all()):
        raise InputError("the metric holds NaN or infinity: check the calibration inputs")
    exact = (exact + exact.T) / 2
    if not exact.diagonal().sum() > 0:
        raise InputError("the metric is zero, no input ever varies: leave it out")
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(exact)
    if failed:
        values, vectors = torch.linalg.eigh(exact)
        factor = vectors * values.clamp(min=0).sqrt()
    return factor


class WhitePoints:
    """Points in the coordinates where the metric is plain, ready for the assignment.

    They are centred, since a common offset would drown differences in the rounding of a product,
    and scaled by a power of two to a size near 1, since squares must neither overflow nor vanish.
    """

    def __init__(self, points: Tensor, metric: Tensor | None) -> None:
        exact = points.double()
        self.factor = None if metric is None else metric_factor(metric).to(points.device)
        self.centre = ordered_sum(exact) / len(exact)
        self._scale = 1.0
        white = self._whiten(exact)
        self._scale = 2.0 ** -math.frexp(white.abs().max().item())[1]
        n, d = points.shape
        self._padded = points.new_zeros(d + 1, math.ceil(n / STRIP) * STRIP)
        self._padded[-1] = 1  # a score is one product
        self.columns = self._padded[:d, :n]  # (d, n)
        self.columns.copy_(white.mul_(self._scale).T)

    def __len__(self) -> int:
        return self.columns.shape[1]

    @property
    def unit(self) -> float:
        """Squared distance, in the metric, of one unit of `columns`."""
        return self._scale**-2

    def _whiten(self, exact: Tensor) -> Tensor:
        """Map float64 points (n, d) into the coordinates of `columns`."""
        centred = exact - self.centre
        return (centred if self.factor is None else centred @ self.factor).mul_(self._scale)

    def whiten(self, centroids: Tensor) -> Tensor:
        """Map centroids (k, d) into the coordinates of `columns`."""
        return self._whiten(centroids.double()).to(self.columns.dtype)

    def nearest(self, white: Tensor) -> Tensor:
        """Return for each point the first of the nearest whitened centroids (k, d): codes (n,).

        The maximum of p.q - |q|^2 / 2 over centroids q, a tile of points at a time. Searching a
        maximum's place is slow on a processor, so that the maximum is found first, then marked by
        1, and the marks' places, each plus 2k, summed by a product: a sum of 4k or more tells that
        marks are several, and they are looked up again.
        """
        k = len(white)
        norms = white.double().square().sum(1, keepdim=True).to(white.dtype)
        table = torch.cat([white, norms / -2], 1)  # (k, d + 1)
        places = torch.arange(2 * k, 3 * k, dtype=white.dtype, device=white.device)
        workers = torch.get_num_threads() if white.device.type == "cpu" else 512
        width = math.ceil(TILE * workers / k / STRIP) * STRIP
        codes = torch.empty(self._padded.shape[1], dtype=torch.int64, device=white.device)
        for start in range(0, len(codes), width):
            scores = table @ self._padded[:, start : start + width]  # (k, width)
            marks = scores.eq_(scores.amax(0))
            place = (places @ marks).sub_(2 * k)
            tied = (place < 0) | (place >= k)
            if bool(tied.any()):
                place[tied] = marks[:, tied].argmax(0).to(place.dtype)
            codes[start : start + width] = place
        return codes[: len(self)]

    def errors(self, white: Tensor, codes: Tensor) -> Tensor:
        """Return squared distances (n,) to the centroids that codes name, without cancellation."""
        return squared_distances(
            self.columns, (values.index_select(0, codes) for values in white.T.contiguous())
        )


def ordered_sum(values: Tensor) -> Tensor:
    """Sum over the first dimension in order: the same bits for any number of threads."""
    return values.cumsum(0)[-1]


def squared_distances(columns: Tensor, others: Iterable[Tensor]) -> Tensor:
    """Return squared distances (n,) of columns (d, n) to others, (n,) or a number a dimension.

    One operation at a time: products fused with sums would round by where a thread's part ends.
    """
    total = torch.zeros_like(columns[0])
    for column, other in zip(columns, others, strict=True):
        total += (column - other).square_()
    return total


def nearest(points: Tensor, centroids: Tensor, *, metric: Tensor | None = None) -> Tensor:
    """Assign points to their nearest centroids.

    Args:
        points: (n, d).
        centroids: (k, d).
        metric: (d, d), positive semidefinite; plain distances without.

    Returns:
        Codes (n,), int64; of centroids equally near, the first. Besides the points, 131,072 scores
        a thread are held at a time, or those of 32 points where that is more.

    Raises:
        InputError: Shapes do not match, or a value is NaN or infinite.
    """
    check_points(points, len(centroids), metric)
    if centroids.ndim != 2 or centroids.shape[1] != points.shape[1]:
        raise InputError(f"centroids {tuple(centroids.shape)} for points {tuple(points.shape)}")
    if not bool(centroids.isfinite().all()):
        raise InputError("the centroids hold NaN or infinity: check the codebook")
    with torch.no_grad(), exact_products():
        ready = WhitePoints(as_float(points), metric)
        return ready.nearest(ready.whiten(centroids.to(points.device)))


def as_float(points: Tensor) -> Tensor:
    """Return points as float32, or as float64 where they are."""
    points = points.detach()
    return points if points.dtype == torch.float64 else points.float()


def check_points(
    points: Tensor, k: int, metric: Tensor | None, weights: Tensor | None = None
) -> None:
    """Refuse what no clustering is made of: the message names the thing."""
    if points.ndim != 2 or not points.numel():
        raise InputError(f"points of shape {tuple(points.shape)}: give a matrix, a row each")
    if not bool(points.isfinite().all()):
        raise InputError("the points hold NaN or infinity: check the weights")
    if k < 1:
        raise InputError(f"{k} centroids: give at least 1")
    if metric is not None and metric.shape != (points.shape[1],) * 2:
        raise InputError(
            f"a metric of shape {tuple(metric.shape)} for points of length {points.shape[1]}"
        )
    if weights is None:
        return
    if weights.shape != points.shape[:1]:
        raise InputError(f"{tuple(weights.shape)} weights for {len(points)} points")
    if not (bool(weights.isfinite().all()) and bool((weights >= 0).all()) and weights.sum() > 0):
        raise InputError("weights must be finite, none below 0, and not all 0")
