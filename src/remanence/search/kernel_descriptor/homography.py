"""Whether two images show the same flat scene, or edits of one picture, from matched points.

A homography is fitted by MAGSAC++ (Barath et al., arXiv 1912.05909; OpenCV's), and judged a
contrario (Moisan and Stival, "A probabilistic criterion to detect rigid point matches between two
images and estimate the fundamental matrix", 2004): could as many matches have agreed by chance?
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from scipy.spatial import KDTree
from scipy.special import gammaln, logsumexp

from remanence.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAMPLE = 4  # matches that fix a homography
ITERATIONS = 20_000  # find 14 % of right matches with a confidence of 0.999
LARGEST_SCALE = 16.0
SMALLEST_SHARE = 0.01  # of an image's area that the inliers' hull covers


@dataclass(frozen=True, eq=False)
class Verified:
    """What was found between two images.

    Attributes:
        homography: H (3, 3), float64, from pixels of the first to pixels of the second image, with
            H[2, 2] = 1; None where no model was found at all.
        inliers: Matches within the tolerance (K,), bool.
        score: Minus the decimal logarithm of the number of false alarms: of unrelated pairs of
            images with as many matches, one in 10^score would be expected to do as well.
        matched: The score is above that of `alarms`, and the homography is a possible view.
        reason: Why not matched, in one line; empty if matched.
    """

    homography: NDArray[np.float64] | None
    inliers: NDArray[np.bool_]
    score: float
    matched: bool
    reason: str


def verify(
    xy_first: NDArray[Any],
    xy_second: NDArray[Any],
    size_first: tuple[int, int],
    size_second: tuple[int, int],
    *,
    tolerance: float = 3.0,
    confidence: float = 0.999,
    alarms: float = 1e-3,
    mirrored: bool = False,
    seed: int = 0,
) -> Verified:
    """Decide whether matched points agree on one homography better than chance.

    Matches that lie within a tolerance of another one at both ends say the same and count once. For
    n of them and k inliers the number of false alarms is

        2 C(n, 4) P(B(n - 4, p) >= k - 4)

    over all samples of 4 matches, in both directions. p is the chance of a wrong match to fall
    within the tolerance: the circle's share of the image, or, where points crowd, the share of all
    *other* pairs of a first and a second point that the homography brings together.

    Args:
        xy_first: Points in the first image (K, 2), pixels.
        xy_second: The matched points in the second image (K, 2).
        size_first: Height and width of the first image.
        size_second: Height and width of the second image.
        tolerance: Largest distance of an inlier, pixels of the coarser of both images.
        confidence: Of having tried a sample without a wrong match, unless 20,000 samples are too
            few for it.
        alarms: Unrelated pairs of images that may be called matched, of one pair looked at.
        mirrored: Look for a mirror image instead: match descriptors of the mirrored first image,
            and give the points where they are in the image as it is. det H is then negative.
        seed: Of the samples.

    Returns:
        The homography, its inliers and the decision; the same for the same seed.

    Raises:
        InputError: The shapes do not fit, a point is not finite, or a setting is out of range.
    """
    x, y = _checked(xy_first, xy_second)
    areas = [_area(size) for size in (size_first, size_second)]
    if not (tolerance > 0 and 0 < confidence < 1 and alarms > 0):
        raise InputError(
            f"tolerance {tolerance}, confidence {confidence}, alarms {alarms}: give a tolerance "
            "and alarms above 0 and a confidence below 1"
        )
    mirror = np.eye(3)
    if mirrored:  # OpenCV tries no sample that turns the image over
        mirror[0] = -1, 0, size_first[1] - 1
        x = transform(mirror, x)
    # One match for each place of both ends.
    cells = np.floor(np.hstack([x, y]) / tolerance)
    once = np.unique(cells, axis=0, return_index=True)[1]
    nothing = np.zeros(len(x), dtype=bool)
    if len(once) <= SAMPLE:
        return Verified(None, nothing, -math.inf, matched=False, reason="too few matches")
    models = []
    for a, b, forward in ((x, y, True), (y, x, False)):
        H = _fit(a[once], b[once], tolerance, confidence, seed)
        inverse = None if H is None else _inverse(H)
        if H is not None and inverse is not None:
            models.append((H, inverse) if forward else (inverse, H))
    judged = [_judge(*model, x, y, once, areas, tolerance) for model in models]
    if not judged:
        return Verified(None, nothing, -math.inf, matched=False, reason="no homography fits")
    H, inliers, score = max(judged, key=lambda found: found[2])
    reason = ""
    if score <= -math.log10(alarms):
        reason = "no more matches agree than by chance"
    else:
        reason = _degenerate(H, x[inliers], y[inliers], areas, tolerance)
    H = H @ mirror
    return Verified(H / H[2, 2], inliers, score, matched=not reason, reason=reason)


def log10_false_alarms(inliers: int, matches: int, chance: float) -> float:
    """Return the decimal logarithm of 2 C(n, 4) P(B(n - 4, p) >= k - 4).

    Args:
        inliers: k.
        matches: n, at least 4 and at least k.
        chance: p, 0 to 1.

    Returns:
        The logarithm, exact where the number itself would underflow.
    """
    n, k = matches - SAMPLE, inliers - SAMPLE
    tests = math.log(2) + math.log(math.comb(matches, SAMPLE))
    if k <= 0 or chance >= 1:
        return tests / math.log(10)
    if chance <= 0:
        return -math.inf
    i = np.arange(k, n + 1)
    terms = gammaln(n + 1) - gammaln(i + 1) - gammaln(n - i + 1)
    terms += i * math.log(chance) + (n - i) * math.log1p(-chance)
    return float(min(logsumexp(terms), 0.0) + tests) / math.log(10)


def transform(homography: NDArray[Any], xy: NDArray[Any]) -> NDArray[np.float64]:
    """Map points by a homography.

    Args:
        homography: (3, 3).
        xy: Points (K, 2).

    Returns:
        Points (K, 2); NaN behind the horizon, where the third coordinate is not positive for
        H[2, 2] = 1.
    """
    mapped = np.asarray(xy, dtype=float) @ homography[:, :2].T + homography[:, 2]
    w = np.where(mapped[:, 2:] > 0, mapped[:, 2:], np.nan)
    found: NDArray[np.float64] = mapped[:, :2] / w
    return found


def jacobian(homography: NDArray[Any], xy: NDArray[Any]) -> NDArray[np.float64]:
    """Return the derivative of a homography's map.

    Args:
        homography: (3, 3).
        xy: Points (K, 2).

    Returns:
        (K, 2, 2), rows by the coordinate that is mapped to.
    """
    mapped = np.asarray(xy, dtype=float) @ homography[:, :2].T + homography[:, 2]
    w = mapped[:, 2, None, None]
    found: NDArray[np.float64] = (
        homography[:2, :2] - (mapped[:, :2] / mapped[:, 2:])[:, :, None] * homography[2, :2]
    ) / w
    return found


def _fit(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    tolerance: float,
    confidence: float,
    seed: int,
) -> NDArray[np.float64] | None:
    """MAGSAC++ from x to y; None where it finds nothing."""
    params = cv2.UsacParams()
    params.threshold = tolerance
    params.confidence = confidence
    params.maxIterations = ITERATIONS
    params.randomGeneratorState = seed
    params.isParallel = False
    params.sampler = cv2.SAMPLING_UNIFORM
    params.score = cv2.SCORE_METHOD_MAGSAC
    params.loMethod = cv2.LOCAL_OPTIM_INNER_LO
    params.final_polisher = cv2.MAGSAC
    try:
        H, _ = cv2.findHomography(x.astype(np.float32), y.astype(np.float32), params)
    except cv2.error:  # points that fix no homography, such as four equal ones
        return None
    return None if H is None or not np.isfinite(H).all() else np.asarray(H, dtype=np.float64)


def _inverse(H: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """The inverse with 1 in its last place, or None."""
    if abs(np.linalg.det(H)) < 1e-12:
        return None
    found = np.asarray(np.linalg.inv(H), dtype=np.float64)
    return None if abs(found[2, 2]) < 1e-12 else found / found[2, 2]


def _judge(
    H: NDArray[np.float64],
    inverse: NDArray[np.float64],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    once: NDArray[np.int64],
    areas: list[float],
    tolerance: float,
) -> tuple[NDArray[np.float64], NDArray[np.bool_], float]:
    """H, its inliers and their score, measured in the coarser image."""
    near = _distance(transform(H, x), y) <= tolerance
    near |= _distance(transform(inverse, y), x) <= tolerance
    enlarges = bool(near.any()) and _scale(H, x[near]) > 1
    mapped, target, area = (
        (transform(inverse, y), x, areas[0]) if enlarges else (transform(H, x), y, areas[1])
    )
    inliers = _distance(mapped, target) <= tolerance
    n, k = len(once), int(inliers[once].sum())
    points = mapped[once]
    points = points[np.isfinite(points).all(axis=1)]
    together = KDTree(points).count_neighbors(KDTree(target[once]), tolerance) if len(points) else 0
    crowded = max(0, int(together) - k) / (n * (n - 1))
    chance = min(1.0, max(math.pi * tolerance**2 / area, crowded))
    return H, inliers, -log10_false_alarms(k, n, chance)


def _degenerate(
    H: NDArray[np.float64],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    areas: list[float],
    tolerance: float,
) -> str:
    """What makes inliers no view of a scene, or nothing."""
    if np.linalg.det(H) <= 0:
        return "the matches that agree turn the image over"
    scale = _scale(H, x)
    if not 1 / LARGEST_SCALE <= scale <= LARGEST_SCALE:
        return f"a change of scale by {scale:.3g} is no view of the same scene"
    for points in (x, y):
        spread = np.linalg.svd(points - points.mean(axis=0), compute_uv=False)
        if spread[1] / math.sqrt(len(points)) < tolerance:
            return "the matches that agree lie on a line or in one place"
    hulls = [cv2.contourArea(cv2.convexHull(p.astype(np.float32))) for p in (x, y)]
    if max(hull / area for hull, area in zip(hulls, areas, strict=True)) < SMALLEST_SHARE:
        return "the matches that agree cover too little of the images"
    return ""


def _scale(H: NDArray[np.float64], xy: NDArray[np.float64]) -> float:
    """Median factor of lengths."""
    return float(np.median(np.sqrt(np.abs(np.linalg.det(jacobian(H, xy))))))


def _distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances of points; infinite for NaN."""
    found: NDArray[np.float64] = np.nan_to_num(np.hypot(*(a - b).T), nan=np.inf)
    return found


def _area(size: tuple[int, int]) -> float:
    height, width = size
    if height < 1 or width < 1:
        raise InputError(f"an image of {height} x {width} pixels: give height and width above 0")
    return float(height * width)


def _checked(first: NDArray[Any], second: NDArray[Any]) -> tuple[NDArray[np.float64], ...]:
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] != 2 or x.shape != y.shape:
        raise InputError(f"points of shapes {x.shape} and {y.shape}: give (K, 2) twice")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError("a point is NaN or infinite: leave that match out")
    return x, y
