"""The samples of `remanence audit membership`: members first, then non-members."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from remanence.audit.evidence import Check
from remanence.audit.guard import ImageSet, guard
from remanence.audit.membership import MIN_SIDE, Signals, signals_from_logits
from remanence.errors import InputError
from remanence.jobs.audit.image_sets import image_sets
from remanence.jobs.audit.outputs import (
    Outputs,
    apply,
    network_outputs,
    pixels,
    read_array,
    read_outputs,
    refuse_overlap,
    refuse_shared,
)
from remanence.kit.images import Images, open_images
from remanence.kit.models import Network

SIDES = ("members", "non-members")
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Samples:
    """What is audited: N samples and what the audited model says of each.

    Attributes:
        sides: What the user gave, members and non-members.
        signals: Signals of the audited model, N samples.
        member: (N,) True for members.
        groups: (N,) names of persons, patients or documents, or None.
        looks: What the guard compares, for each side.
        network: The audited network; None where arrays were given.
        classes: Number of logits.
    """

    sides: tuple[Outputs, Outputs]
    signals: Signals
    member: Bools
    groups: NDArray[np.str_] | None
    looks: tuple[ImageSet, ImageSet]
    network: Network | None
    classes: int

    def __len__(self) -> int:
        return len(self.member)

    @property
    def ids(self) -> tuple[str, ...]:
        """A name for each sample (N)."""
        return self.sides[0].ids + self.sides[1].ids

    @property
    def labelled(self) -> bool:
        """Whether the labels are true ones and not predicted."""
        return not self.signals.predicted

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every sample's id, pixels and label, in order."""
        digest = hashlib.sha256()
        columns = [np.asarray(look.digests) for look in self.looks]
        rows = zip(self.ids, np.concatenate(columns), self.signals.labels, strict=True)
        for row in rows:
            digest.update(repr(tuple(map(str, row))).encode())
        return digest.hexdigest()

    def class_name(self, label: int) -> str:
        """Name of a class where it has one, else its number."""
        names = self.network.classes if self.network is not None else ()
        images = self.sides[0].images
        names = names or (images.classes if images is not None else ())
        return names[label] if label < len(names) else str(label)

    def pixels(self) -> Tensor:
        """Every image as the network sees it in evaluation, uint8 (N, 3, K, K)."""
        assert self.network is not None
        views = [
            pixels(self.network, side.images, f"read {name}")
            for name, side in zip(SIDES, self.sides, strict=True)
            if side.images is not None
        ]
        return torch.cat(views)


@contextmanager
def noted(notes: list[str]) -> Iterator[None]:
    """Keep the warnings of our methods as notes for the report; pass others on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if "remanence" not in warning.filename:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
        elif str(warning.message) not in notes:
            notes.append(str(warning.message))


def open_image_samples(
    fabric: Fabric,
    network: Network,
    members: str,
    nonmembers: str,
    groups: NDArray[np.str_] | None,
    notes: list[str],
    *,
    unlabelled: bool,
    limit: int | None,
    skip_broken: bool,
    workers: int,
) -> Samples:
    """Open both image sources, refuse what is in both, and evaluate the network.

    Raises:
        InputError: A source is broken or too small, classes differ, or images are on both sides.
    """
    show = fabric.is_global_zero
    options: dict[str, Any] = {"skip_broken": skip_broken, "limit": limit, "show": show}
    opened = [open_images(source, **options) for source in (members, nonmembers)]
    _check_sizes([len(images) for images in opened])
    if not unlabelled:
        opened = _one_class_list(*opened)
    looks = image_sets(opened, show=show and sum(map(len, opened)) > 5000)
    refuse_shared(np.asarray(looks[0].digests), np.asarray(looks[1].digests), opened[1].ids, SIDES)
    sides = []
    for name, images in zip(SIDES, opened, strict=True):
        if unlabelled:
            logits = apply(fabric, network, images, network.model, name, workers=workers)
            sides.append(Outputs(images.source, images.ids, logits.numpy(), None, images))
        else:
            sides.append(network_outputs(fabric, network, images, name, workers=workers))
    if unlabelled:
        looks = [replace(look, labels=None) for look in looks]
    copies = [
        len(images) - len(np.unique(np.asarray(look.digests)))
        for images, look in zip(opened, looks, strict=True)
    ]
    if any(copies):
        notes.append(
            f"{copies[0]} members and {copies[1]} non-members are exact copies of another image on "
            "their side. Intervals count them as independent; give --member-groups and "
            "--nonmember-groups to count copies once."
        )
    return _samples(sides, looks, groups, network, notes, probabilities=False)


def open_array_samples(
    members: str,
    nonmembers: str,
    labels: tuple[Path | None, Path | None],
    groups: NDArray[np.str_] | None,
    notes: list[str],
    *,
    probabilities: bool,
) -> Samples:
    """Read logits, and labels where they are given, of both sides.

    Raises:
        InputError: A file is broken or too small, shapes differ, or rows are on both sides.
    """
    sides = [
        read_outputs(source, file)
        for source, file in zip((members, nonmembers), labels, strict=True)
    ]
    _check_sizes([len(side) for side in sides])
    widths = [side.logits.shape[1] for side in sides]
    if widths[0] != widths[1]:
        raise InputError(
            f"{nonmembers}: {widths[1]} logits a sample, {members} has {widths[0]}; give outputs "
            "of one model"
        )
    # One number a sample, or a coarse one, repeats by chance.
    if widths[0] > 1 and not _coarse(np.concatenate([side.logits for side in sides])):
        refuse_overlap(sides[0], sides[1], SIDES)
    looks = [ImageSet(labels=side.labels) for side in sides]
    return _samples(sides, looks, groups, None, notes, probabilities=probabilities)


def read_groups(files: tuple[Path | None, Path | None]) -> NDArray[np.str_] | None:
    """Read the groups of members and of non-members, joined to (N,) names.

    Raises:
        InputError: Only one side has groups, a file is broken, or a group is on both sides.
    """
    given = [file for file in files if file is not None]
    if not given:
        return None
    if len(given) < 2:
        raise InputError("--member-groups and --nonmember-groups: give both or none")
    columns = []
    for file in given:
        values = read_array(file)
        if values.ndim != 1 or values.dtype.kind not in "iuUS":
            raise InputError(f"{file}: {values.dtype} {values.shape}; give one name a sample, (N,)")
        columns.append(values.astype(str))
    shared = np.intersect1d(columns[0], columns[1])
    if len(shared):
        raise InputError(
            f"{given[1]}: {len(shared)} groups are also among the members (such as {shared[0]}); "
            "a group is in or out as a whole"
        )
    for name, column in zip(SIDES, columns, strict=True):
        distinct = len(np.unique(column))
        if distinct < MIN_SIDE:
            raise InputError(f"{distinct} groups of {name}: give at least {MIN_SIDE} groups a side")
    return np.concatenate(columns)


def exchangeable(samples: Samples, level: float, seed: int) -> tuple[Check, ...]:
    """Check that members and non-members could not be told apart without any model."""
    given = samples.looks
    if given[0].labels is None and given[0].images is None:
        finding = "only outputs without labels were given, so nothing could be compared"
        return (Check("Members and non-members come from one source.", None, finding),)
    if samples.groups is not None:
        halves = np.split(samples.groups, [int(samples.member.sum())])
        given = (replace(given[0], groups=halves[0]), replace(given[1], groups=halves[1]))
    checks = guard(*given, level=level, seed=seed)
    return tuple(
        Check(_in_our_words(check.assumption), check.holds, _in_our_words(check.finding))
        for check in checks
    )


def _in_our_words(sentence: str) -> str:
    """The guard says candidates and references, which here are models."""
    words = {"candidates": "members", "references": "non-members"}
    words |= {"Candidates": "Members", "References": "Non-members"}
    return re.sub("|".join(words), lambda found: words[found[0]], sentence)


def _check_sizes(counts: list[int]) -> None:
    for name, count in zip(SIDES, counts, strict=True):
        if count < MIN_SIDE:
            raise InputError(f"{count} {name}: give at least {MIN_SIDE} samples a side")


def _one_class_list(members: Images, nonmembers: Images) -> list[Images]:
    a, b = members.classes, nonmembers.classes
    numbered = all(names == tuple(map(str, range(len(names)))) for names in (a, b))
    if a == b:
        return [members, nonmembers]
    if not numbered:
        odd = sorted(set(a) ^ set(b)) or list(b)
        raise InputError(
            f"{nonmembers.source}: its classes are not those of {members.source} "
            f"({', '.join(odd[:5])}); give both the same class folders or label names"
        )
    # Without class names a side knows only the labels that it happens to hold.
    longest = max(a, b, key=len)
    return [replace(images, classes=longest) for images in (members, nonmembers)]


def _samples(
    sides: list[Outputs],
    looks: list[ImageSet],
    groups: NDArray[np.str_] | None,
    network: Network | None,
    notes: list[str],
    *,
    probabilities: bool,
) -> Samples:
    logits = np.concatenate([side.logits for side in sides])
    n = len(sides[0])
    if groups is not None and len(groups) != len(logits):
        raise InputError(
            f"--member-groups, --nonmember-groups: {len(groups)} names for {len(logits)} samples"
        )
    given = [side.labels for side in sides if side.labels is not None]
    labels = np.concatenate(given) if given else None
    with noted(notes):
        signals = signals_from_logits(logits, labels, probabilities=probabilities)
    samples = Samples(
        (sides[0], sides[1]),
        signals,
        np.arange(len(logits)) < n,
        groups,
        (looks[0], looks[1]),
        network,
        logits.shape[1],
    )
    if labels is None:
        notes.append(
            "No labels were given: the predicted class takes the label's place, and attacks that "
            "ask whether the model is right have nothing to go by."
        )
    elif len(np.unique(labels)) == 1:
        notes.append(
            f"All samples are of one class ({samples.class_name(int(labels[0]))}): the audit says "
            "nothing of other classes."
        )
    if not probabilities and _coarse(logits):
        notes.append(
            "Every logit is a 16-bit or a rounded number: samples tie, which hides members. "
            "Compute the logits in 32 bits (--precision 32-true)."
        )
    return samples


def _coarse(logits: NDArray[np.float32]) -> bool:
    """Whether no logit needs more than the 10 bits of mantissa that a float16 has."""
    return not bool((logits.view(np.uint32) & 0x1FFF).any())
