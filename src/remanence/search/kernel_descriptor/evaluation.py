"""How good descriptors are, by the field's protocols: HPatches and Photo Tourism.

HPatches (Balntas et al., arXiv 1704.05939, Section 5) asks for verification, matching and
retrieval; Photo Tourism (Winder and Brown, 2007) for the false positive rate at 95 % recall, and
its revisited protocol for matching by the ratio of distances. Values are shares, 0 to 1.

Ties: everything of the same similarity is accepted at once, so that no measure depends on the order
of its input.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.modes import exact_products
from remanence.search.kernel_descriptor.matching import nearest_two

PAIRS = 2**22  # distances at a time, 32 MB in float64


def fpr95(similarity: Tensor, label: Tensor) -> float:
    """Return the false positive rate at 95 % recall.

    The threshold is the highest similarity at which at least 95 % of the matching pairs are
    accepted; a pair at the threshold is accepted.

    Args:
        similarity: Of pairs (N,), larger is more alike.
        label: Whether a pair matches (N,), bool.

    Returns:
        The share of the other pairs that is accepted.

    Raises:
        InputError: The shapes differ, a value is NaN, or one kind of pair is missing.
    """
    similarity, label = _checked_pairs(similarity, label)
    positives = similarity[label].sort(descending=True).values
    # ceil(.95 N) in integers: .95 * 20 is above 19 in floating point.
    threshold = positives[-(-19 * len(positives) // 20) - 1]
    return float((similarity[~label] >= threshold).double().mean())


def average_precision(similarity: Tensor, label: Tensor) -> Tensor:
    """Return the average precision of each row, ties accepted at once.

    Args:
        similarity: (R, P), larger is more alike.
        label: Which are right (R, P), bool.

    Returns:
        The sum of P_n (R_n - R_{n-1}) over distinct thresholds (R,), float64; 0 for a row where
        nothing is right.
    """
    order = similarity.argsort(dim=1, descending=True)
    ranked, hit = similarity.gather(1, order), label.gather(1, order)
    last = torch.ones_like(hit)  # of those that share a similarity
    last[:, :-1] = ranked[:, 1:] != ranked[:, :-1]
    rank = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
    end = torch.where(last, rank, ranked.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    hits = hit.cumsum(dim=1)
    precision = hits.gather(1, end - 1).double() / end
    return (precision * hit).sum(dim=1) / hits[:, -1].clamp_min(1)


def verification_ap(similarity: Tensor, label: Tensor) -> float:
    """Return the average precision of telling matching pairs from others (HPatches verification).

    The sum of P_n (R_n - R_{n-1}) over distinct thresholds, as scikit-learn defines it.

    Args:
        similarity: Of pairs (N,).
        label: Whether a pair matches (N,), bool.

    Returns:
        The average precision.

    Raises:
        InputError: The shapes differ, a value is NaN, or one kind of pair is missing.
    """
    similarity, label = _checked_pairs(similarity, label)
    return float(average_precision(similarity[None], label[None])[0])


def matching_map(first: Tensor, second: Tensor, by: str = "similarity") -> float:
    """Return the average precision of matching two images (HPatches matching).

    Each first vector takes its nearest second one and is right where that has its own index. The
    answers are ranked, and AP = (sum of the precision at each right answer) / N: what is never
    found counts as missed. The mean over pairs of images is HPatches' mAP. Its published script
    integrates the same curve by the trapezoid rule, which differs in the third digit.

    Args:
        first: (N, D), any floating type.
        second: (N, D): row i matches row i of the first.
        by: Rank by `similarity`, as HPatches does, or by the `ratio` of the nearest distance to the
            second nearest.

    Returns:
        The average precision by Euclidean distance; multiply by 100 for the usual figure. An answer
        that shares its distance with another one is wrong.

    Raises:
        InputError: The shapes differ, a value is not finite, there is nothing to match, or `by` is
            another word.
    """
    if by not in ("similarity", "ratio"):
        raise InputError(f"ranked by {by!r}: give similarity or ratio")
    if first.shape != second.shape or first.ndim != 2 or len(first) < 2:
        raise InputError(
            f"descriptors of shapes {tuple(first.shape)} and {tuple(second.shape)}: give two of "
            "(N, D), N at least 2, whose rows match"
        )
    first, second = _doubles(first), _doubles(second)
    nearest = nearest_two(first, second)
    distance = nearest.distances[:, 0]
    itself = torch.arange(len(first), device=first.device)
    right = (nearest.indices[:, 0] == itself) & (distance < nearest.distances[:, 1])
    score = -distance if by == "similarity" else -nearest.ratio
    found = float(right.double().mean())
    return float(average_precision(score[None], right[None])[0]) * found


def retrieval_map(queries: Tensor, pool: Tensor, relevant: Tensor) -> float:
    """Return the mean average precision of ranking a pool (HPatches retrieval).

    Args:
        queries: (Q, D), any floating type.
        pool: (P, D), ranked by Euclidean distance.
        relevant: Which of the pool each query should find (Q, P), bool.

    Returns:
        The mean over the queries.

    Raises:
        InputError: The shapes do not fit, a value is not finite, or a query has nothing to find.
    """
    wanted = (len(queries), len(pool))
    if queries.ndim != 2 or pool.ndim != 2 or queries.shape[1] != pool.shape[1] or 0 in wanted:
        raise InputError(
            f"queries {tuple(queries.shape)} and pool {tuple(pool.shape)}: give (Q, D) and (P, D)"
        )
    if tuple(relevant.shape) != wanted or relevant.dtype != torch.bool:
        raise InputError(
            f"relevant of shape {tuple(relevant.shape)} and {relevant.dtype}: give bool {wanted}"
        )
    if not bool(relevant.any(dim=1).all()):
        raise InputError("a query has nothing relevant in the pool: leave it out")
    queries, pool = _doubles(queries), _doubles(pool)
    rows = max(1, PAIRS // len(pool))
    precisions = [
        # Differences, not products: equal vectors are to tie.
        average_precision(-torch.cdist(q, pool, compute_mode="donot_use_mm_for_euclid_dist"), r)
        for q, r in zip(torch.split(queries, rows), torch.split(relevant, rows), strict=True)
    ]
    return float(torch.cat(precisions).mean())


def snn_map(vectors: Tensor, points: Tensor, images: Tensor) -> float:
    """Return the mean average precision of matching by Lowe's ratio (Photo Tourism, revisited).

    Within an image, each ordered pair of patches of one point is a trial: the distance of the pair
    against that to the first one's nearest patch of another point. It is right where the pair is
    not farther, and ranked by the smaller over the larger distance. The mean is over images. Here
    every patch is held against its nearest; the published script does not find it in all images.

    Args:
        vectors: (N, D), any floating type.
        points: Which point each shows (N,), integers.
        images: From which image each is (N,), integers.

    Returns:
        The mean over the images that have a trial; 0 for one where none is right.

    Raises:
        InputError: The shapes do not fit, a value is not finite, or no image has a trial.
    """
    if vectors.ndim != 2 or points.shape != vectors.shape[:1] or images.shape != points.shape:
        raise InputError(
            f"vectors {tuple(vectors.shape)}, points {tuple(points.shape)} and images "
            f"{tuple(images.shape)}: give (N, D), (N,) and (N,)"
        )
    vectors = _doubles(vectors)
    precisions = []
    for image in sorted(set(images.tolist())):
        here = images == image
        x, point = vectors[here], points[here]
        pairs = point[:, None] == point
        if bool(pairs.all()):
            continue
        other = _nearest_other(x, x, point)
        anchor, positive = pairs.fill_diagonal_(False).nonzero(as_tuple=True)
        if len(anchor) == 0:
            continue
        own = (x[anchor] - x[positive]).norm(dim=1)
        right = own <= other[anchor]
        low, high = torch.minimum(own, other[anchor]), torch.maximum(own, other[anchor])
        ratio = (low / high).nan_to_num(1.0)
        precisions.append(float(average_precision(-ratio[None], right[None])[0]))
    if not precisions:
        raise InputError("no image shows one point twice and another one: there is no trial")
    return math.fsum(precisions) / len(precisions)


def _nearest_other(first: Tensor, second: Tensor, owner: Tensor) -> Tensor:
    """Distance of each first vector to the nearest second one of another owner (N,)."""
    rows = max(1, PAIRS // len(second))
    squares = second.square().sum(1)
    distances = []
    with exact_products():
        for chunk, mine in zip(torch.split(first, rows), torch.split(owner, rows), strict=True):
            nearness = 2 * chunk @ second.mT - squares
            nearest = nearness.masked_fill_(mine[:, None] == owner, -math.inf).argmax(dim=1)
            distances.append((chunk - second[nearest]).norm(dim=1))
    return torch.cat(distances)


def _doubles(vectors: Tensor) -> Tensor:
    if not bool(vectors.isfinite().all()):
        raise InputError("a descriptor holds NaN or infinity: leave it out")
    return vectors.detach().double()


def _checked_pairs(similarity: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    if similarity.ndim != 1 or label.shape != similarity.shape:
        raise InputError(
            f"similarity {tuple(similarity.shape)} and label {tuple(label.shape)}: give (N,) twice"
        )
    if bool(similarity.isnan().any()):
        raise InputError("a similarity is NaN: leave that pair out")
    label = label.bool()
    if bool(label.all()) or not bool(label.any()):
        raise InputError("pairs of one kind only: give matching pairs and others")
    return similarity.detach().double(), label
