"""Designs: which samples each reference model is trained on.

A design is a boolean matrix (K, N) for K models and N samples. Balanced halves are those of arXiv
2112.03570 (Section IV); the public design is that of arXiv 1908.11229 (Section 5).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from remanence.errors import InputError


@dataclass(frozen=True)
class PublicDesign:
    """The split of arXiv 1908.11229: the target and its references share no sample.

    Attributes:
        private: Indices of the members, the target's training set.
        test: Indices of the non-members.
        validation: Indices for thresholds.
        public: Indices of the rest, ascending.
        design: Which samples each reference is trained on, (K, N) bool; public ones only.
    """

    private: NDArray[np.int64]
    test: NDArray[np.int64]
    validation: NDArray[np.int64]
    public: NDArray[np.int64]
    design: NDArray[np.bool_]


def balanced_design(
    K: int,
    N: int,
    seed: int,
    *,
    groups: ArrayLike | None = None,
    labels: ArrayLike | None = None,
) -> NDArray[np.bool_]:
    """Draw a design in which every sample is in exactly K / 2 of the training sets.

    Args:
        K: number of models, even.
        N: number of samples.
        seed: of the draw.
        groups: (N,) ids; all samples of a group (a person, a patient) are in or out together.
        labels: (N,) classes; every training set then holds half of each class, give or take one
            sample (with groups: half of its groups, and a group must be of one class). For that,
            random pairs within a class are drawn as opposites: one is in where the other is out.

    Returns:
        The design, (K, N) bool.

    Raises:
        InputError: K is odd or below 2, N is below 2, or ids do not fit.
    """
    if K < 2 or K % 2:
        raise InputError(f"{K} models cannot be halved for every sample: give an even number")
    if N < 2:
        raise InputError(f"{N} samples are too few: give at least 2")
    ids = np.arange(N) if groups is None else np.asarray(groups)
    if ids.shape != (N,):
        raise InputError(f"groups has shape {ids.shape}: give one id for each of {N} samples")
    _, first, column = np.unique(ids, return_index=True, return_inverse=True)
    rng = np.random.default_rng(seed)
    keep = rng.random((K, len(first))).argsort(axis=0).argsort(axis=0) < K // 2
    if labels is not None:
        classes = np.asarray(labels)
        if classes.shape != (N,):
            raise InputError(f"labels has shape {classes.shape}: give one for each of {N} samples")
        if (classes != classes[first][column]).any():
            raise InputError("a group holds several classes: leave out labels or split the group")
        order = np.lexsort((rng.random(len(first)), classes[first]))
        n_pairs = len(order) // 2
        keep[:, order[1 : 2 * n_pairs : 2]] = ~keep[:, order[0 : 2 * n_pairs : 2]]
    return np.asarray(keep[:, column])


def public_design(
    K: int = 30,
    *,
    n_private: int = 15_000,
    n_test: int = 15_000,
    n_validation: int = 1_000,
    n_public: int = 29_000,
    n_subset: int = 15_000,
    seed: int = 0,
) -> PublicDesign:
    """Draw the split of the authors' release; the defaults are its CIFAR-10 counts and seed.

    Samples 0 to N - 1 are the training and test images in one row, N the sum of the four counts.

    Args:
        K: number of references.
        n_private: size of the target's training set.
        n_test: number of non-members.
        n_validation: size of the validation set.
        n_public: number of samples left for references.
        n_subset: size of each reference's training set, drawn without replacement.
        seed: of NumPy's legacy generator, as in the release.

    Raises:
        InputError: a count is below 1 or a subset is larger than the public part.
    """
    if min(K, n_private, n_test, n_validation, n_subset) < 1 or n_subset > n_public:
        raise InputError(
            f"{K} subsets of {n_subset} from {n_public} public samples cannot be drawn: "
            "give counts of at least 1 and n_subset up to n_public"
        )
    N = n_private + n_test + n_validation + n_public
    rng = np.random.RandomState(seed)  # the release's generator, for its indices
    drawn = rng.choice(N, N - n_public, replace=False)
    private, test, validation = np.split(drawn, [n_private, n_private + n_test])
    public = np.setdiff1d(np.arange(N), drawn)
    design = np.zeros((K, N), dtype=np.bool_)
    for row in design:
        row[rng.choice(public, n_subset, replace=False)] = True
    return PublicDesign(private, test, validation, public, design)


def check_design(design: ArrayLike) -> NDArray[np.bool_]:
    """Return a design as an array (K, N) bool.

    Raises:
        InputError: it is not one, or a model would be trained on nothing.
    """
    mask = np.asarray(design)
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise InputError(f"the design is {mask.dtype} of shape {mask.shape}: give (K, N) bool")
    if not mask.any(axis=1).all():
        empty = int(np.flatnonzero(~mask.any(axis=1))[0])
        raise InputError(f"row {empty} of the design is empty: give every model a sample")
    return mask
