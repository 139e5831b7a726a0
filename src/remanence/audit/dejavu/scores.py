"""What every test here asks of its input: finite float64 scores, and clusters of dependent images.

Images that depend on one another (duplicates, frames of one video, pictures of one person) form a
cluster, and a cluster counts as one observation: it is labelled, permuted, resampled and assigned
to a fold as a whole.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from remanence.errors import InputError

Floats = NDArray[np.float64]
Groups = tuple[ArrayLike, ArrayLike]

# Entries of a chunk of permuted labels: 8 MB as int64, which stays in a processor's cache.
CHUNK_CELLS = 2**20


def as_scores(values: ArrayLike, name: str) -> Floats:
    """Return the scores as a float64 vector (N,), after looking at them.

    Raises:
        InputError: They are not a vector, or are empty, or hold NaN or infinity.
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1:
        raise InputError(f"{name} scores have shape {scores.shape}: give one score an image, (N,)")
    if not len(scores):
        raise InputError(f"there are no {name} scores: give at least one image")
    if not np.isfinite(scores).all():
        raise InputError(f"{name} scores hold NaN or infinity: check the model's output")
    return scores


def cluster_ids(groups: ArrayLike | None, n: int, name: str) -> NDArray[np.intp]:
    """Return cluster numbers (N,) from 0 up; every image is its own cluster without groups."""
    if groups is None:
        return np.arange(n)
    ids = np.asarray(groups)
    if ids.shape != (n,):
        raise InputError(f"{name} groups have shape {ids.shape}: give one group an image, ({n},)")
    return np.unique(ids, return_inverse=True)[1].reshape(n).astype(np.intp)


def pooled_clusters(
    groups: Groups | None, n: int, m: int
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Number the clusters of n candidates followed by m references.

    Args:
        groups: Cluster names of the candidates (n,) and of the references (m,); None where every
            image stands alone.
        n: Number of candidate images.
        m: Number of reference images.

    Returns:
        Cluster number of every image (n + m,), and for every cluster whether it is a candidate's.

    Raises:
        InputError: The lengths differ, or a cluster has images on both sides.
    """
    if groups is None:
        ids = np.arange(n + m)
    else:
        names = [np.asarray(group) for group in groups]
        for ids_of, size, name in zip(names, (n, m), ("candidate", "reference"), strict=True):
            cluster_ids(ids_of, size, name)
        ids = np.unique(np.concatenate(names), return_inverse=True)[1].reshape(n + m)
    is_candidate = np.zeros(int(ids.max()) + 1, dtype=np.bool_)
    is_candidate[ids[:n]] = True
    shared = np.unique(ids[n:][is_candidate[ids[n:]]])
    if len(shared):
        raise InputError(
            f"{len(shared)} groups have images among both candidates and references: "
            "remove them from one side"
        )
    return ids.astype(np.intp), is_candidate


def permuted_labels(
    is_candidate: NDArray[np.bool_],
    permutations: int,
    width: int,
    generator: np.random.Generator,
) -> Iterator[NDArray[np.int8]]:
    """Yield random permutations of cluster labels in chunks of bounded size.

    Args:
        is_candidate: Label of every cluster (C,).
        permutations: How many to draw, at least 1.
        width: Entries that the caller will make of every permutation, at least C.
        generator: Source of randomness.

    Yields:
        Labels 0 or 1, shape (b, C).
    """
    if permutations < 1:
        raise InputError(f"{permutations} permutations give no p-value: give at least 100")
    rows = max(1, CHUNK_CELLS // width)
    for start in range(0, permutations, rows):
        b = min(rows, permutations - start)
        labels = np.broadcast_to(is_candidate.astype(np.int8), (b, len(is_candidate)))
        yield generator.permuted(labels, axis=1)


def permutation_log10_p(at_least_as_large: int, permutations: int) -> float:
    """The p-value (1 + #) / (1 + B), which counts the data themselves as one permutation."""
    return float(np.log10((1 + at_least_as_large) / (1 + permutations)))


def permutation_method(groups: Groups | None, permutations: int, clusters: int) -> str:
    """How the p-value came about, for a reader."""
    of_groups = "" if groups is None else f" of {clusters:,} groups"
    return f"{permutations:,} permutations{of_groups}"
