"""Dataset-level leaks (arXiv 1809.06396): the signal, the mixture model and its power.

A candidate set of which a fraction f was trained on is a mixture

    F_c = (1 - f) F_out + f F_in,      hence      D(F_c, F_out) = f D_full,

with D_full = D(F_in, F_out) for known training images (in) and held-out ones (out).
"""

import math

import numpy as np
import torch
from scipy import special
from torch import Tensor

from remanence.audit.dejavu.kolmogorov_smirnov import Alternative
from remanence.audit.dejavu.scores import Floats
from remanence.errors import InputError

# Rows of logits that are held in float64 at once.
ROWS = 65_536


def top_margin(logits: Tensor) -> Floats:
    """The label-free signal: z_(1) - logsumexp of the other logits, in float64.

    It is log(p / (1 - p)) for the largest softmax confidence p, a strictly increasing function of
    it, so D is the same; but it does not saturate where float32 confidences are all 1.

    Args:
        logits: (N, K), K >= 2.

    Returns:
        Margins (N,) on the CPU.

    Raises:
        InputError: The shape is wrong, values are not finite, or the rows are probabilities.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise InputError(f"logits have shape {tuple(logits.shape)}: give (N, K) with K >= 2")
    if not bool(torch.isfinite(logits).all()):
        raise InputError("logits hold NaN or infinity: check the model's output")
    if len(logits) and bool((logits >= 0).all()):
        sums = logits.sum(1, dtype=torch.float64)
        if bool(((sums - 1).abs() < 1e-3).all()):
            raise InputError("logits are non-negative and sum to 1: give values before the softmax")
    margins = []
    for rows in torch.split(logits.detach(), ROWS):
        z = rows.double()
        best, index = z.max(1, keepdim=True)
        others = z.scatter(1, index, -math.inf).logsumexp(1)
        margins.append((best[:, 0] - others).cpu())
    return torch.cat(margins).numpy().astype(np.float64)


def critical_constant(alpha: float = 0.05, alternative: Alternative = "two-sided") -> float:
    """The constant c(alpha) with which D > c sqrt(1/m + 1/n) rejects, for large samples."""
    if not 0 < alpha < 1:
        raise InputError(f"alpha {alpha} is not a level: give a number between 0 and 1")
    if alternative == "two-sided":
        return float(special.kolmogi(alpha))
    return math.sqrt(-math.log(alpha) / 2)


def min_detectable_fraction(
    d_full: float,
    m: int,
    n: int,
    alpha: float = 0.05,
    alternative: Alternative = "two-sided",
) -> float:
    """The leaked fraction f* that the Kolmogorov-Smirnov test finds at least every second time.

    f* = c(alpha) sqrt(1/m + 1/n) / D_full. Above 1, not even a full leak would be found.

    Args:
        d_full: Distance between known training images and held-out ones, in (0, 1].
        m: Number of candidates.
        n: Number of references.
        alpha: Level of the test.
        alternative: "greater" for the one-sided test, which needs a smaller leak.

    Returns:
        f*, positive.

    Raises:
        InputError: `d_full` or `alpha` is out of range, or a set is empty.
    """
    _check_distance(d_full)
    if m < 1 or n < 1:
        raise InputError(f"{m} candidates and {n} references: give at least one image of each")
    return critical_constant(alpha, alternative) * math.sqrt(1 / m + 1 / n) / d_full


def images_needed(
    d_full: float,
    f: float,
    alpha: float = 0.05,
    power: float = 0.8,
    alternative: Alternative = "two-sided",
) -> int:
    """Images a side that find a leaked fraction f with the given power or more.

    At the place where the distributions differ most, the empirical distance is normal with mean
    f D_full and variance at most (1/m + 1/n) / 4; at power 1/2 this inverts
    `min_detectable_fraction`.

    Args:
        d_full: Distance between known training images and held-out ones, in (0, 1].
        f: Leaked fraction, in (0, 1].
        alpha: Level of the test.
        power: Probability of finding the leak, in [0.5, 1).
        alternative: "greater" for the one-sided test.

    Returns:
        m = n, the number of candidates and of references.

    Raises:
        InputError: An argument is out of range.
    """
    _check_distance(d_full)
    if not 0 < f <= 1:
        raise InputError(f"fraction {f} is out of range: give a number in (0, 1]")
    if not 0.5 <= power < 1:
        raise InputError(f"power {power} is out of range: give a number in [0.5, 1)")
    spread = f * d_full / (critical_constant(alpha, alternative) + float(special.ndtri(power)) / 2)
    return math.ceil(2 / spread**2)


def min_detectable_fraction_by_rank(auc_full: float, m: int, n: int, alpha: float = 0.05) -> float:
    """The leaked fraction that the one-sided rank test finds about every second time.

    AUC(candidate, out) - 1/2 = f (AUC_full - 1/2), and under the null the AUC has standard
    deviation sqrt((m + n + 1) / (12 m n)).

    Args:
        auc_full: AUC of known training images against held-out ones, in (0.5, 1].
        m: Number of candidates.
        n: Number of references.
        alpha: Level of the test.

    Raises:
        InputError: `auc_full` is not above one half, or a set is empty.
    """
    if not 0.5 < auc_full <= 1:
        raise InputError(f"AUC {auc_full} of known members tells no leak: use a stronger signal")
    if m < 1 or n < 1:
        raise InputError(f"{m} candidates and {n} references: give at least one image of each")
    critical = -float(special.ndtri(alpha)) * math.sqrt((m + n + 1) / (12 * m * n))
    return critical / (auc_full - 0.5)


def _check_distance(d_full: float) -> None:
    if not 0 < d_full <= 1:
        raise InputError(f"distance {d_full} of known members is out of range: it lies in (0, 1]")
