"""Pairs of descriptors that may show the same thing: mutual neighbours and Lowe's ratio.

The ratio of the distances to the nearest and to the second nearest is small where one candidate
stands out (Lowe, "Distinctive image features from scale-invariant keypoints", 2004, Section 7.1).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from remanence.errors import InputError
from remanence.modes import exact_products

Method = Literal["mutual", "ratio", "mutual+ratio"]
METHODS: tuple[Method, ...] = get_args(Method)
PAIRS = 2**22  # similarities at a time, 16 MB in float32


class Matches(NamedTuple):
    """K matches, in the order of the first vectors.

    Attributes:
        indices: Of the first and of the second vector (K, 2), int64.
        similarity: Cosines (K,).
        ratio: Distance to the nearest over distance to the second nearest (K,), 0 to 1; small is
            sure. The larger one of both directions where the match is mutual. 0 where there is but
            one candidate, 1 where two are equal.
    """

    indices: Tensor
    similarity: Tensor
    ratio: Tensor


class Neighbours(NamedTuple):
    """The nearest and the second nearest of each vector.

    Attributes:
        indices: (N, 2), int64.
        distances: Euclidean (N, 2); the second is infinite where there is but one candidate.
    """

    indices: Tensor
    distances: Tensor

    @property
    def ratio(self) -> Tensor:
        """First distance over second (N,); 1 where both are 0."""
        return (self.distances[:, 0] / self.distances[:, 1]).nan_to_num(1.0)


def match(
    first: Tensor,
    second: Tensor,
    method: Method = "mutual+ratio",
    ratio: float = 0.9,
    threshold: float | None = None,
) -> Matches:
    """Match descriptors of two images.

    The defaults ask for both tests. Being mutual makes matches one to one, as a homography needs
    them. Whitened descriptors of different things lie near a distance of sqrt(2), so that ratios
    are larger than those of SIFT, for which 0.8 is usual.

    Args:
        first: (N, D), any floating type and length; computed in float32, or float64 where given.
        second: (M, D).
        method: `mutual` takes pairs that are each other's nearest; `ratio` those whose ratio is at
            most `ratio`, by the first vectors' neighbours; `mutual+ratio` both, with the larger
            ratio of both directions, so that exchanging the sides gives the same pairs.
        ratio: Largest ratio, above 0 and at most 1.
        threshold: Smallest cosine; None takes any.

    Returns:
        The matches. Zero vectors, which flat patches have, take no part. Of two equal neighbours
        the one that stands first is the nearest.

    Raises:
        InputError: The shapes do not fit, a value is not finite, or a setting is out of range.
    """
    if method not in METHODS:
        raise InputError(f"method {method!r}: give one of {', '.join(METHODS)}")
    if not 0 < ratio <= 1:
        raise InputError(f"ratio {ratio}: give a number above 0 and at most 1")
    if threshold is not None and not -1 <= threshold <= 1:
        raise InputError(f"threshold {threshold}: give a cosine, -1 to 1")
    _check(first, second)
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    ours, theirs = (v.detach().any(dim=1).nonzero().squeeze(1) for v in (first, second))
    a = normalize(first.detach()[ours].to(dtype), dim=1)
    b = normalize(second.detach()[theirs].to(dtype), dim=1)
    if len(a) == 0 or len(b) == 0:
        nothing = first.new_zeros(0, dtype=dtype)
        return Matches(torch.zeros(0, 2, dtype=torch.int64, device=first.device), nothing, nothing)
    forward = nearest_two(a, b)
    nearest, distance = forward.indices[:, 0], forward.distances[:, 0]
    ratios = forward.ratio
    kept = torch.ones_like(ours, dtype=torch.bool)
    if method != "ratio":
        backward = nearest_two(b, a)
        kept &= backward.indices[nearest, 0] == torch.arange(len(a), device=a.device)
        ratios = torch.maximum(ratios, backward.ratio[nearest])
    if method != "mutual":
        kept &= ratios <= ratio
    similarity = 1 - distance.square() / 2  # exact near 1, unlike an inner product
    if threshold is not None:
        kept &= similarity >= threshold
    indices = torch.stack([ours, theirs[nearest]], dim=1)
    return Matches(indices[kept], similarity[kept], ratios[kept])


def nearest_two(first: Tensor, second: Tensor) -> Neighbours:
    """Find the two nearest of the second vectors for each of the first, exactly.

    A matrix product chooses the two; their distances are then sums of squared differences, which
    equal vectors share to the last digit.

    Args:
        first: (N, D), float32 or float64.
        second: (M, D), M at least 1.

    Returns:
        The neighbours; where one distance is shared by both, the lower index is the nearest.
    """
    rows = max(1, PAIRS // max(len(second), first.shape[1]))
    squares = second.square().sum(dim=1)
    found, distances = [], []
    with exact_products():
        for chunk in torch.split(first, rows):
            nearness = (2 * chunk) @ second.mT - squares
            best = nearness.argmax(dim=1, keepdim=True)
            nearness.scatter_(1, best, -math.inf)
            indices = torch.cat([best, nearness.argmax(dim=1, keepdim=True)], dim=1).sort().values
            distance = (chunk[:, None] - second[indices]).norm(dim=2)
            order = distance.argsort(dim=1, stable=True)
            found.append(indices.gather(1, order))
            distances.append(distance.gather(1, order))
    neighbours = Neighbours(torch.cat(found), torch.cat(distances))
    if len(second) == 1:
        neighbours.distances[:, 1] = math.inf
    return neighbours


def _check(first: Tensor, second: Tensor) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise InputError(
            f"descriptors of shapes {tuple(first.shape)} and {tuple(second.shape)}: give (N, D) "
            "and (M, D)"
        )
    for vectors in (first, second):
        if not vectors.is_floating_point():
            raise InputError(f"descriptors of {vectors.dtype}: give floating values")
        if not bool(vectors.isfinite().all()):
            raise InputError("a descriptor holds NaN or infinity: leave it out")
