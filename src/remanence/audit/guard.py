"""Exchangeability guard: could candidates and references be told apart without any model?

An audit compares candidates (or members) with references (or non-members). Where the two sets
differ by themselves, the comparison says nothing about the audited model (arXiv 2406.16201). The
guard looks at labels, file-level fingerprints, pixels and duplicates, and never at the model.

False alarms: the tests of labels, of each fingerprint and of pixels share the level equally
(Bonferroni), so that two halves of one source fail any of them with probability at most `level`.
Duplicates are counted, not tested. Items that belong together (duplicates, or groups given by the
caller) enter each test once, because copies are not independent evidence.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import scale
from torch import Tensor
from torch.nn import functional

from remanence.audit.duplicates import (
    MIN_PIXELS,
    Hashes,
    Ints,
    check_thumbnails,
    clusters,
    duplicates,
    item_column,
    perceptual_hash,
)
from remanence.audit.evidence import Check
from remanence.audit.membership.roc import auc_estimate, delong
from remanence.errors import InputError

MIN_SIDE = 30  # items a side, after duplicates were set aside
TELLING_AUC = 0.55  # of a classifier of pixels
TELLING_DISTANCE = 0.05  # total variation of labels or fingerprints
SHARED = 0.01  # share of a set with a near duplicate in the other
RIDGE_C = 1e-2  # inverse ridge of that classifier, for standardised features
MAX_CLASSIFIED = 5_000  # a side: a larger sample would only take longer
DRAWS = 9_999  # random tables
CELLS = 1 << 22  # of these tables, held at once


@dataclass(frozen=True, eq=False)
class ImageSet:
    """What is known of one set of N items; leave out what is not known.

    Attributes:
        images: (N, 3, h, w) uint8, thumbnails of 32 to 64 pixels, made alike for all sets.
        features: (N, F) float, in place of the features of `images`; from an encoder that saw
            neither set.
        labels: (N,) classes.
        fingerprints: Categorical file-level properties, each (N,): format, size, JPEG table.
        digests: (N,) hashes of the files' bytes, such as hexadecimal sha256.
        groups: (N,) labels of what belongs together (a person, a film), unique over all sets.
    """

    images: Tensor | None = None
    features: NDArray[Any] | None = None
    labels: ArrayLike | None = None
    fingerprints: Mapping[str, ArrayLike] = field(default_factory=dict)
    digests: ArrayLike | None = None
    groups: ArrayLike | None = None


def image_features(images: Tensor) -> NDArray[np.float64]:
    """Features of a blind baseline: no network, only what pixels show at a glance.

    Per image an 8 x 8 thumbnail, 16-bin histograms and spreads of the three colours, and the log
    energy of grey differences at 1, 2 and 4 pixels (which blur and compression change).

    Args:
        images: (N, 3, h, w) uint8, at least 8 pixels a side, any device.

    Returns:
        (N, 249) float64.

    Raises:
        InputError: `images` has another shape or dtype.
    """
    check_thumbnails(images)
    rows = []
    for batch in torch.split(images, 1024):
        x = batch.float() / 255
        small = functional.adaptive_avg_pool2d(x, 8).flatten(1)
        level = (batch // 16).flatten(2).long()
        bins = x.new_zeros(len(x), 3, 16).scatter_add_(2, level, torch.ones_like(x).flatten(2))
        grey, spread = x.mean(1), x.flatten(2).std(2, correction=0)
        differences = [grey[:, d:] - grey[:, :-d] for d in (1, 2, 4)]
        differences += [grey[:, :, d:] - grey[:, :, :-d] for d in (1, 2, 4)]
        energies = torch.stack([(d**2).mean((1, 2)) for d in differences], 1)
        shares = (bins.flatten(1) / level.shape[2]).sqrt()
        rows.append(torch.cat([small, shares, spread, (energies + 1e-6).log()], 1).cpu())
    return torch.cat(rows).double().numpy()


def guard(
    candidate: ImageSet,
    reference: ImageSet,
    known: ImageSet | None = None,
    *,
    level: float = 0.05,
    seed: int = 0,
) -> tuple[Check, ...]:
    """Check that candidates and references (or members and non-members) are exchangeable.

    - Labels and each fingerprint: chi-squared test (by 9,999 random tables of the same margins
      where an expected count is below 5). Fails when significant and the total variation exceeds
      0.05, below which it can hardly move an AUC.
    - Pixels: logistic regression on `image_features` (or the features given), 5-fold cross-fitted.
      Fails when the AUC exceeds 0.55 and its interval lies above 0.5.
    - Exact duplicates by digests (by pixels where there are none): fail at the first one between
      candidates and references, or between references and known training items.
    - Near duplicates by perceptual hash: fail when more than 1 % of either set has one in the
      other; a few leave the check open and are to be permuted as `clusters`.
    - Candidates among the known training items leave their check open: these did leak, whatever
      the model says, and the rest is to be tested without them.

    Args:
        candidate: The set in question.
        reference: The held-out set of the same source.
        known: Items known to be in the training set; only for duplicates.
        level: Chance that two halves of one source fail, shared equally among the tests.
        seed: Of folds, random tables and samples.

    Returns:
        One check for everything that both sets give.

    Raises:
        InputError: Fewer than 30 items a side, sets without anything in common to compare, or
            arrays of unequal length.
    """
    if not 0 < level < 1:
        raise InputError(f"level {level} is out of range: give a number between 0 and 1")
    sets = [_prepared(s, name) for s, name in ((candidate, "candidate"), (reference, "reference"))]
    rng = np.random.default_rng(seed)
    keep = [_representatives(s, rng) for s in sets]
    if min(map(len, keep)) < MIN_SIDE:
        raise InputError(
            f"give at least {MIN_SIDE} distinct items a side; there are {min(map(len, keep))}"
        )
    a, b = sets
    shared = [name for name in a.categories if name in b.categories]
    pixels = [s.features for s in sets if s.features is not None]
    share = level / max(1, len(shared) + (len(pixels) == 2))
    checks = []
    for name in shared:
        columns = a.categories[name][keep[0]], b.categories[name][keep[1]]
        checks.append(_same_distribution(name, *columns, share, rng))
    if len(pixels) == 2:
        picks = [rng.permutation(kept)[:MAX_CLASSIFIED] for kept in keep]
        checks.append(_same_pixels(pixels[0][picks[0]], pixels[1][picks[1]], share, seed))
    checks.extend(_distinct(a, b, "candidates", "references"))
    if known is not None:
        third = _prepared(known, "known")
        checks.extend(_distinct(b, third, "references", "known training items"))
        checks.extend(
            Check(check.assumption, check.holds or None, check.finding)
            for check in _distinct(a, third, "candidates", "known training items")
        )
    if not checks:
        raise InputError("nothing to compare: give both sets images, labels or fingerprints")
    return tuple(checks)


@dataclass(frozen=True, eq=False)
class _Prepared:
    n: int
    categories: dict[str, NDArray[Any]]
    features: NDArray[Any] | None
    digests: NDArray[Any] | None
    hashes: Hashes | None
    groups: NDArray[Any] | None


def _prepared(given: ImageSet, name: str) -> _Prepared:
    columns = dict(given.fingerprints)
    if given.labels is not None:
        columns = {"label": given.labels, **columns}
    features, digests, hashes = given.features, given.digests, None
    if given.images is not None:
        hashes = perceptual_hash(given.images)
        features = image_features(given.images) if features is None else features
        digests = _pixel_digests(given.images) if digests is None else digests
    lengths = [len(x) for x in (hashes, features) if x is not None]
    lengths += [
        len(np.asarray(x)) for x in (digests, given.groups, *columns.values()) if x is not None
    ]
    if not lengths:
        raise InputError(f"the {name} set is empty: give images, features, labels or fingerprints")
    n = lengths[0]
    if features is not None:
        features = np.asarray(features, dtype=np.float64)
        if features.ndim != 2 or len(features) != n or not np.isfinite(features).all():
            raise InputError(f"{name} features {features.shape}: give finite numbers ({n}, F)")
    return _Prepared(
        n=n,
        categories={key: item_column(column, n, key) for key, column in columns.items()},
        features=features,
        digests=None if digests is None else item_column(digests, n, "digests"),
        hashes=hashes,
        groups=None if given.groups is None else item_column(given.groups, n, "groups"),
    )


def _pixel_digests(images: Tensor) -> NDArray[Any]:
    shape = str(tuple(images.shape[1:])).encode()
    rows = images.cpu().numpy()
    return np.array([hashlib.sha256(shape + row.tobytes()).hexdigest() for row in rows])


def _representatives(s: _Prepared, rng: np.random.Generator) -> Ints:
    """One random item of every cluster, in order."""
    bound = [labels for labels in (s.digests, s.groups) if labels is not None]
    hashes = np.zeros(s.n, dtype=np.uint64) if s.hashes is None else s.hashes
    order = rng.permutation(s.n)
    first = np.unique(clusters(hashes, same=bound)[order], return_index=True)[1]
    return np.sort(order[first]).astype(np.int64)


def _same_distribution(
    name: str, a: NDArray[Any], b: NDArray[Any], level: float, rng: np.random.Generator
) -> Check:
    assumption = f"Candidates and references have the same distribution of {name}."
    values, ids = np.unique(np.concatenate([a, b]), return_inverse=True)
    if len(values) == 1:
        return Check(assumption, holds=True, finding=f"{name} is the same everywhere")
    if len(values) > len(ids) / 2:
        finding = f"{name} has {len(values)} values among {len(ids)} items: give coarser ones"
        return Check(assumption, holds=None, finding=finding)
    table = np.stack([np.bincount(side, minlength=len(values)) for side in np.split(ids, [len(a)])])
    distance = float(np.abs(table[0] / len(a) - table[1] / len(b)).sum() / 2)
    rows, columns = table.sum(1), table.sum(0)
    expected = np.outer(rows, columns) / table.sum()
    statistic = float(((table - expected) ** 2 / expected).sum())
    if expected.min() >= 5:
        p, method = float(stats.chi2.sf(statistic, len(values) - 1)), "chi-squared"
    else:
        law, above = stats.random_table(rows, columns), 0
        chunk = max(1, CELLS // table.size)
        for start in range(0, DRAWS, chunk):
            drawn = law.rvs(size=min(chunk, DRAWS - start), random_state=rng)
            drawn = ((drawn - expected) ** 2 / expected).sum((1, 2))
            above += int((drawn >= statistic * (1 - 1e-12)).sum())
        p, method = (1 + above) / (1 + DRAWS), f"{DRAWS:,} random tables"
    return Check(
        assumption,
        holds=not (p <= level and distance > TELLING_DISTANCE),
        finding=f"{name}: total variation {distance:.3f}, p {p:.2g} ({method}, level {level:.2g})",
    )


def _same_pixels(a: NDArray[Any], b: NDArray[Any], level: float, seed: int) -> Check:
    if a.shape[1] != b.shape[1]:
        raise InputError(f"features of width {a.shape[1]} and {b.shape[1]}: use one encoder")
    # Scaled once over both sets: that looks at no membership and favours neither.
    x, y = scale(np.concatenate([a, b])), np.arange(len(a) + len(b)) < len(a)
    aucs, variances = [], []
    for train, test in StratifiedKFold(5, shuffle=True, random_state=seed).split(x, y):
        model = LogisticRegression(C=RIDGE_C, tol=1e-3, max_iter=200).fit(x[train], y[train])
        auc, variance = delong(model.decision_function(x[test]), y[test])
        aucs.append(auc)
        variances.append(variance)
    # Scores of different models do not compare: AUCs of folds are averaged. Every pair of folds
    # enters twice, as training and as test set, which doubles the variance when nothing differs.
    mean, variance = float(np.mean(aucs)), 2 * float(np.sum(variances)) / len(aucs) ** 2
    estimate = auc_estimate(mean, variance, min(len(a), len(b)), 1 - level)
    return Check(
        "Candidates and references look alike to a classifier that never saw the model.",
        holds=not (estimate.value > TELLING_AUC and estimate.low > 0.5),
        finding=f"a blind classifier tells candidates from references: {estimate}",
    )


def _distinct(a: _Prepared, b: _Prepared, name_a: str, name_b: str) -> list[Check]:
    """Checks of exact and near duplicates between two sets."""
    checks = []
    if a.digests is not None and b.digests is not None:
        shared = np.flatnonzero(np.isin(a.digests, b.digests))
        finding = f"{len(shared)} of {a.n} {name_a} are identical to {name_b}"
        if len(shared):
            finding += f": items {', '.join(map(str, shared[:5]))}" + ", ..." * (len(shared) > 5)
        checks.append(
            Check(f"No file is among both {name_a} and {name_b}.", not len(shared), finding)
        )
    if a.hashes is not None and b.hashes is not None:
        assumption = f"No picture among {name_a} nearly repeats one among {name_b}."
        if not a.hashes.any() or not b.hashes.any():
            finding = f"images under {MIN_PIXELS} pixels or blank have no perceptual hash"
            return [*checks, Check(assumption, holds=None, finding=finding)]
        values_a, values_b = np.unique(a.hashes), np.unique(b.hashes)
        i, j = duplicates(values_a, values_b).T
        near_a = float(np.isin(a.hashes, values_a[i]).mean())
        near_b = float(np.isin(b.hashes, values_b[j]).mean())
        holds = None if 0 < max(near_a, near_b) <= SHARED else not near_a
        finding = f"{near_a:.2%} of {name_a} nearly repeat {near_b:.2%} of {name_b}"
        checks.append(Check(assumption, holds, finding))
    return checks
