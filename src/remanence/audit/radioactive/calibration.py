"""Does the test keep its word on this head? Its p-values under carriers that nobody used."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from remanence.audit.evidence import Check
from remanence.audit.radioactive.head import PreparedHead
from remanence.audit.radioactive.null import cosine_logp, fisher_logp
from remanence.errors import InputError

Floats = NDArray[np.float64]

LEVELS = (0.1, 0.05, 0.01, 0.001)


@dataclass(frozen=True)
class Calibration:
    """P-values of one head under random carrier sets, which should be uniform.

    Attributes:
        log_p: (draws,) natural logarithms of Fisher's p, one for each set.
        ks_p: p-value of the Kolmogorov-Smirnov test of uniformity.
        rejection_rates: level -> share of the sets with p at or below it.
        check: the outcome as an assumption of the test; fails where `ks_p` is below 0.001.
    """

    log_p: Floats
    ks_p: float
    rejection_rates: dict[float, float]
    check: Check


def uniform_carriers(generator: np.random.Generator, num_classes: int, dim: int) -> Floats:
    """(K, d) independent directions, uniform on the sphere; not normalised, as cosines are."""
    return generator.standard_normal((num_classes, dim))


def calibrate(
    head: PreparedHead,
    *,
    draws: int = 1000,
    seed: int = 0,
    sampler: Callable[[np.random.Generator, int, int], Floats] = uniform_carriers,
) -> Calibration:
    """Test one head, which never saw any of them, against many random carrier sets.

    It holds for every head when carriers are drawn as they should be; with another `sampler` it
    shows what a wrong way of drawing them does (all-positive ones, one for all classes).

    Args:
        head: from `prepare_head`, with the references, class map and centring of the real test.
        draws: number of carrier sets, at least 20.
        seed: for the sets.
        sampler: (generator, K, d) -> (K, d) carriers.

    Returns:
        The calibration.

    Raises:
        InputError: there are fewer than 20 draws.
    """
    if draws < 20:
        raise InputError(f"{draws} draws cannot show a law: give at least 20, better 1000")
    generator = np.random.default_rng(seed)
    shape = (head.num_carriers, head.rows.shape[1])
    cosines = np.stack([head.cosines(sampler(generator, *shape)) for _ in range(draws)])
    log_p = np.asarray(fisher_logp(cosine_logp(cosines, head.d_eff)))
    p = np.exp(log_p)
    ks_p = float(stats.kstest(p, "uniform").pvalue)
    rates = {level: float((p <= level).mean()) for level in LEVELS}
    check = Check(
        assumption="On this head, carriers that nobody used give uniform p-values.",
        holds=ks_p >= 0.001,
        finding=(
            f"{draws} random carrier sets: Kolmogorov-Smirnov p {ks_p:.2g}, "
            f"{rates[0.05]:.1%} of the p-values at or below 0.05"
        ),
    )
    return Calibration(log_p, ks_p, rates, check)
