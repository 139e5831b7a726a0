"""Exact tests for a suspect that gives nothing but scores or labels.

arXiv 2002.00937, Section 3.4, compares losses on marked and plain images. A t-test of that
difference is not valid, because marking changes an innocent model's loss too; these tests are,
because under their null the real thing is exchangeable with, or independent of, the rest.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats
from torch import Tensor

from remanence.audit.evidence import Check, Estimate, Evidence
from remanence.errors import InputError

Floats = NDArray[np.float64]

LN10 = math.log(10)


@dataclass(frozen=True)
class DecoyDetection:
    """The real carriers' loss among the decoys'.

    Attributes:
        real_loss: the suspect's mean loss on images marked with the real carriers.
        decoy_losses: (B,) the same with each decoy set.
        rank: decoy sets with a loss at or below the real one.
        log10_p: of (1 + rank) / (B + 1).
        evidence: the question, the answer and what it rests on.
    """

    real_loss: float
    decoy_losses: Floats
    rank: int
    log10_p: float
    evidence: Evidence


def detect_blackbox(
    real_loss: float,
    decoy_losses: ArrayLike,
    *,
    committed: bool | None = None,
    level: float = 0.05,
) -> DecoyDetection:
    """Compare the suspect's loss on images with the real mark and with marks nobody published.

    Mark the same held-out images with the real carriers and with each of B decoy sets, the same
    marking network, settings and seeds, and give the suspect's mean loss on each: any statistic
    that training on the mark makes smaller will do. For an innocent model the B + 1 sets are
    exchangeable, so p = (1 + #{decoy <= real}) / (B + 1) is exact for any black box.

    Args:
        real_loss: statistic of the real set.
        decoy_losses: (B,) statistics of the decoy sets, B at least 1 / level - 1.
        committed: whether carriers and decoys match a commitment published before the suspect.
        level: significance level, fixed beforehand.

    Returns:
        The detection.

    Raises:
        InputError: there are too few decoys to reach the level, or a value is NaN.
    """
    losses = np.asarray(decoy_losses, dtype=np.float64)
    needed = math.ceil(1 / level - 1e-9) - 1
    if losses.ndim != 1 or len(losses) < needed:
        raise InputError(
            f"{losses.size} decoy sets cannot reach level {level:g}: give {needed} losses or more"
        )
    if math.isnan(real_loss) or bool(np.isnan(losses).any()):
        raise InputError("a loss is NaN: check the suspect's answers")
    rank, total = int((losses <= real_loss).sum()), len(losses) + 1
    log10_p = math.log10((1 + rank) / total)
    spread = float(losses.std(ddof=1)) if len(losses) > 1 else 0.0
    evidence = Evidence(
        question="Was this model trained on the marked images?",
        statistic="decoy sets with at most the real set's loss",
        value=float(rank),
        null="The model is independent of the carriers: real and decoy sets are exchangeable.",
        log10_p=log10_p,
        method=f"exact, {len(losses)} decoy sets",
        would_change=(
            f"At most {math.floor(level * total + 1e-9) - 1} of the {len(losses)} decoy sets may "
            f"have a loss at or below the real one; more decoys allow p below {1 / total:.2g}. The "
            f"real loss is {real_loss:.4g}, the decoys' {losses.mean():.4g} +- {spread:.2g}."
        ),
        level=level,
        checks=(
            Check(
                "The real and the decoy carriers were fixed before the suspect model existed.",
                committed,
                {
                    True: "they match the published commitment",
                    False: "the key or the manifest does not match the published commitment",
                    None: "no commitment was given: the real set could have been picked afterwards",
                }[committed],
            ),
        ),
    )
    return DecoyDetection(real_loss, losses, rank, log10_p, evidence)


@dataclass(frozen=True)
class CountDetection:
    """Successes among independent trials with a known chance each.

    Attributes:
        successes: number of them.
        trials: number of trials.
        chance: of one success under the null.
        log10_p: of at least so many; never -inf.
        evidence: the question, the answer and what it rests on.
    """

    successes: int
    trials: int
    chance: float
    log10_p: float
    evidence: Evidence


def detect_keys(
    top_classes: Tensor,
    key_labels: Tensor,
    num_classes: int,
    *,
    committed: bool | None = None,
    level: float = 0.05,
) -> CountDetection:
    """Count secret key images for which the suspect answers with their random label.

    Key images are out of any distribution, with labels drawn uniformly and independently of
    everything: an innocent model's top k classes hold the label with chance k / C each (Data
    Taggants, arXiv 2410.09101).

    Args:
        top_classes: (n, k) the suspect's k best classes for each key image, all different.
        key_labels: (n,) the random labels.
        num_classes: C, the number of classes that labels were drawn from.
        committed: whether keys and labels match a commitment published before the suspect.
        level: significance level, fixed beforehand.

    Returns:
        The detection.

    Raises:
        InputError: shapes do not match, classes repeat within a row, or k is not below C.
    """
    if top_classes.ndim != 2 or key_labels.shape != top_classes.shape[:1] or not len(key_labels):
        raise InputError(
            f"top classes {tuple(top_classes.shape)} and labels {tuple(key_labels.shape)} do not "
            "match: give (n, k) and (n,)"
        )
    k = top_classes.shape[1]
    ordered = top_classes.sort(dim=1).values
    if not 0 < k < num_classes or bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise InputError(f"give 1 to {num_classes - 1} different classes for each key image")
    hits = int((top_classes == key_labels[:, None]).any(dim=1).sum().item())
    return _count(
        hits,
        len(key_labels),
        k / num_classes,
        question="Was this model trained on the images that carry the keys?",
        statistic="key images answered with their label",
        null="The model is independent of the keys' labels, which were drawn at random.",
        check=Check(
            "The keys and their random labels were fixed before the suspect model existed.",
            committed,
            {
                True: "they match the published commitment",
                False: "they do not match the published commitment",
                None: "no commitment was given: labels could be copied from the suspect's answers",
            }[committed],
        ),
        level=level,
    )


def detect_twins(
    published_scores: ArrayLike,
    withheld_scores: ArrayLike,
    *,
    coins_recorded: bool | None = None,
    level: float = 0.05,
) -> CountDetection:
    """Count pairs of twins of which the published one scores higher.

    Two marked versions of each image were made and a fair coin chose the one to publish: to an
    innocent model they are exchangeable, whatever the score (arXiv 2407.15100). Ties are left out.

    Args:
        published_scores: (n,) scores of the published versions; higher is more member-like.
        withheld_scores: (n,) scores of their twins.
        coins_recorded: whether the coins' outcomes were recorded before the suspect existed.
        level: significance level, fixed beforehand.

    Returns:
        The detection.

    Raises:
        InputError: shapes do not match, a score is NaN, or all pairs are tied.
    """
    a = np.asarray(published_scores, dtype=np.float64)
    b = np.asarray(withheld_scores, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise InputError(f"scores {a.shape} and {b.shape} do not match: give (n,) for both twins")
    if bool(np.isnan(a).any() or np.isnan(b).any()):
        raise InputError("a score is NaN: check the suspect's answers")
    wins, trials = int((a > b).sum()), int((a != b).sum())
    if trials == 0:
        raise InputError("all twins score alike: give a score that tells images apart")
    return _count(
        wins,
        trials,
        0.5,
        question="Was this model trained on the published twins?",
        statistic="pairs whose published twin scores higher",
        null="The model is independent of the coins that chose which twin to publish.",
        check=Check(
            "Fair coins chose the twins, and were recorded before the suspect model existed.",
            coins_recorded,
            {
                True: "the record is older than the suspect",
                False: "the record does not match",
                None: "no record was given",
            }[coins_recorded],
        ),
        level=level,
    )


def _count(
    successes: int,
    trials: int,
    chance: float,
    *,
    question: str,
    statistic: str,
    null: str,
    check: Check,
    level: float,
) -> CountDetection:
    law = stats.binom(trials, chance)
    # Summed in log space: the library's own tail underflows.
    tail = special.logsumexp(law.logpmf(np.arange(successes, trials + 1)))
    log10_p = min(float(tail) / LN10, 0.0)
    interval = stats.binomtest(successes, trials).proportion_ci(0.95)
    needed = int(law.isf(level)) + 1
    reachable = f"{needed} of {trials}" if needed <= trials else f"more than {trials} trials"
    evidence = Evidence(
        question=question,
        statistic=statistic,
        value=float(successes),
        null=null,
        log10_p=log10_p,
        method=f"exact binomial, {trials} trials of chance {chance:.3g}",
        would_change=f"Detection takes {reachable}; there are {successes}.",
        level=level,
        estimates=(
            Estimate("rate", successes / trials, float(interval.low), float(interval.high)),
        ),
        checks=(check,),
    )
    return CountDetection(successes, trials, chance, log10_p, evidence)
