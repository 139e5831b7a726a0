"""The sets of `remanence audit dejavu`, checked, and freed of what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from remanence.audit.duplicates import clusters, perceptual_hash
from remanence.audit.evidence import Check
from remanence.audit.guard import ImageSet, guard
from remanence.errors import InputError
from remanence.jobs.audit.dejavu_scores import Samples, array_set
from remanence.jobs.audit.image_sets import image_sets, refuse_shared

FEWEST_IMAGES, FEWEST_ROWS = 30, 20
ARRAYS = Check(
    "Candidates and references look alike, as images and as files.",
    None,
    "only arrays were given: nothing about the images could be looked at",
)


@dataclass(frozen=True, eq=False)
class Compared:
    """Two sets that may be compared, and what was found out about them.

    Attributes:
        candidate: Without what is known to have been in training, or repeats a reference.
        reference: Without what repeats a candidate.
        known: Known training images, or None.
        checks: What was assumed and found.
        groups: Cluster of duplicates of each candidate and each reference; None where all differ.
        counts: How many were given, left out and repeated, by name.
        repeated: Set, name and cluster of every sample that has a duplicate.
    """

    candidate: Samples
    reference: Samples
    known: Samples | None
    checks: tuple[Check, ...]
    groups: tuple[NDArray[np.int64], NDArray[np.int64]] | None
    counts: dict[str, int]
    repeated: list[tuple[str, str, int]]

    def one_of_each(self) -> Compared:
        """Keep one sample of every cluster of duplicates, for tests that take no clusters."""
        if self.groups is None:
            return self
        rows = [np.sort(np.unique(group, return_index=True)[1]) for group in self.groups]
        return Compared(
            self.candidate.subset(rows[0]),
            self.reference.subset(rows[1]),
            self.known,
            self.checks,
            None,
            self.counts,
            self.repeated,
        )


def compare(
    candidate: Samples, reference: Samples, known: Samples | None, *, seed: int, show: bool
) -> Compared:
    """Look at the sets before any network does.

    Raises:
        InputError: A set is too small, or an image is in both.
    """
    given = [s for s in (candidate, reference, known) if s is not None]
    for samples in given:
        fewest = FEWEST_ROWS if samples.images is None else FEWEST_IMAGES
        if len(samples) < fewest:
            raise InputError(
                f"{samples.source}: give at least {fewest} {samples.role}s; there are "
                f"{len(samples)}"
            )
    images = [samples.images for samples in given if samples.images is not None]
    sets = image_sets(images, show=show) if images else [array_set(s) for s in given]
    a, b = candidate.values, reference.values
    if a is not None and b is not None and np.array_equal(a, b):
        raise InputError(
            f"{candidate.source} and {reference.source} hold the same values; give references "
            "that are not the candidates"
        )
    refuse_shared({"candidates": (candidate.ids, sets[0]), "references": (reference.ids, sets[1])})
    checks = _checks(sets, min(map(len, given)), arrays=not images, seed=seed)
    ids, sizes = _clusters(sets, [len(s) for s in given]), np.cumsum([len(s) for s in given])
    rows = np.split(np.arange(sizes[-1]), sizes[:-1])
    repeats = np.bincount(ids)[ids] > 1
    # A chain of near duplicates may lead from a candidate to a reference through a known one.
    pair = _clusters(sets[:2], [len(candidate), len(reference)])
    in_c, in_r = pair[rows[0]], pair[rows[1]]
    trained = np.zeros(len(candidate), dtype=bool)
    if known is not None and sets[0].digests is not None and sets[2].digests is not None:
        trained = np.isin(sets[0].digests, sets[2].digests)
    keep_c = ~np.isin(in_c, in_r) & ~trained
    keep_r = ~np.isin(in_r, in_c)
    both = np.concatenate([in_c[keep_c], in_r[keep_r]])
    alone = len(np.unique(both)) == len(both)
    return Compared(
        candidate.subset(np.flatnonzero(keep_c)),
        reference.subset(np.flatnonzero(keep_r)),
        known,
        checks,
        None if alone else (in_c[keep_c], in_r[keep_r]),
        {
            "candidates": len(candidate),
            "references": len(reference),
            "candidates_known_to_be_trained_on": int(trained.sum()),
            "candidates_near_a_reference": int((np.isin(in_c, in_r) & ~trained).sum()),
            "references_near_a_candidate": int((~keep_r).sum()),
            "with_duplicates_in_their_own_set": len(both) - len(np.unique(both)),
        },
        [
            (samples.role, samples.ids[i], int(ids[own[i]]))
            for samples, own in zip(given, rows, strict=True)
            for i in np.flatnonzero(repeats[own])
        ],
    )


def write_duplicates(repeated: Sequence[tuple[str, str, int]], path: Path) -> None:
    """Write the samples that have duplicates, one row each, those of a cluster together."""
    ordered = sorted(repeated, key=lambda row: (row[2], row[0], row[1]))
    columns: dict[str, Any] = {
        "cluster": pa.array([row[2] for row in ordered], pa.int64()),
        "set": pa.array([row[0] for row in ordered], pa.string()),
        "id": pa.array([row[1] for row in ordered], pa.string()),
    }
    pq.write_table(pa.table(columns), path)


def _checks(sets: Sequence[ImageSet], fewest: int, *, arrays: bool, seed: int) -> tuple[Check, ...]:
    if not arrays:
        return guard(*sets, seed=seed)
    told = sets[0].labels is not None and sets[1].labels is not None
    told = told or (sets[0].digests is not None and sets[1].digests is not None)
    if not told or fewest < FEWEST_IMAGES:
        return (ARRAYS,)
    known = sets[2:] if len(sets) > 2 and sets[2].digests is not None else []
    return (*guard(*sets[:2], *known, seed=seed), ARRAYS)


def _clusters(sets: Sequence[ImageSet], sizes: Sequence[int]) -> NDArray[np.int64]:
    hashes = [
        np.zeros(n, dtype=np.uint64) if s.images is None else perceptual_hash(s.images)
        for s, n in zip(sets, sizes, strict=True)
    ]
    digests = [np.asarray(s.digests) for s in sets if s.digests is not None]
    same = [np.concatenate(digests)] if len(digests) == len(sets) else []
    return clusters(np.concatenate(hashes), same=same)
