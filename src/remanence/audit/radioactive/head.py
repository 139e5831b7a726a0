"""A suspect's head made ready for the test: classes matched, references projected out.

Nothing here looks at the carriers; that is what keeps the test exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from remanence.audit.evidence import Check
from remanence.audit.radioactive.alignment import Alignment, class_centred
from remanence.errors import InputError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Provenance:
    """What the caller knows of where things come from; None for not known.

    Attributes:
        committed: whether the carriers match a commitment published before the suspect existed.
        images_unmarked: whether the images of the alignment (and of the class map) are free of
            marks. Marked ones make an innocent model look guilty.
        reference_clean: whether the reference heads come from models that never saw the marked
            images, and were chosen before any p-value was looked at.
    """

    committed: bool | None = None
    images_unmarked: bool | None = None
    reference_clean: bool | None = None


@dataclass(frozen=True)
class PreparedHead:
    """A suspect's head, ready for any number of carrier sets.

    Attributes:
        classes: (K,) the owner's classes that the suspect has.
        rows: (K, d) unit rows, orthogonal to `basis`.
        basis: (r, d) orthonormal rows spanning the reference heads; r = 0 without references.
        num_carriers: rows that a carrier set must have.
        checks: what is known of the head's making.
    """

    classes: NDArray[np.int64]
    rows: Floats
    basis: Floats
    num_carriers: int
    checks: tuple[Check, ...]

    @property
    def d_eff(self) -> int:
        """Dimension of the null, d - r."""
        return int(self.rows.shape[1]) - len(self.basis)

    def cosines(self, carriers: ArrayLike) -> Floats:
        """Cosines in the complement of `basis` with (num_carriers, d) carriers of any length."""
        u = np.asarray(carriers, dtype=np.float64)
        if u.shape != (self.num_carriers, self.rows.shape[1]):
            raise InputError(
                f"carriers {u.shape} do not fit {self.num_carriers} classes and features of "
                f"{self.rows.shape[1]}: give the marking network's, and a class_map where the "
                "suspect's classes differ"
            )
        u = u[self.classes]
        squared = np.einsum("kd,kd->k", u, u) - np.sum((u @ self.basis.T) ** 2, axis=1)
        # Rows are orthogonal to the basis: the dot product needs no projected carriers.
        return np.asarray(np.einsum("kd,kd->k", self.rows, u) / np.sqrt(squared))


def prepare_head(
    head: Tensor,
    *,
    alignment: Alignment | None = None,
    reference: Sequence[Tensor] = (),
    class_map: ArrayLike | None = None,
    center: bool = False,
    provenance: Provenance | None = None,
) -> PreparedHead:
    """Do once what does not depend on the carriers: centre, choose classes, project, normalise.

    Args:
        head: (C, d) aligned head; the other arguments are those of `detect_whitebox`.
        alignment: how it was aligned, for the checks.
        reference: aligned heads of clean models.
        class_map: the suspect's class for each of the owner's.
        center: subtract the mean row.
        provenance: what is known of images and references.

    Returns:
        The head to give to `detect` or `calibrate`.

    Raises:
        InputError: as in `detect_whitebox`.
    """
    known = provenance or Provenance()
    all_rows = (class_centred(head) if center else head).detach().double().cpu().numpy()
    if all_rows.ndim != 2 or not bool(np.isfinite(all_rows).all()):
        raise InputError("the head is no finite matrix (classes, features): check the weights")
    chosen = np.arange(len(all_rows)) if class_map is None else np.asarray(class_map, np.int64)
    if chosen.ndim != 1 or not bool(((chosen >= -1) & (chosen < len(all_rows))).all()):
        raise InputError(
            f"class_map names classes outside the suspect's {len(all_rows)}: give -1 for none"
        )
    classes = np.flatnonzero(chosen >= 0)
    if len(classes) == 0:
        raise InputError("class_map leaves no class to test: map at least one")
    rows = all_rows[chosen[classes]]
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    basis = _span(reference, rows.shape[1])
    rows = rows - (rows @ basis.T) @ basis
    left = np.linalg.norm(rows, axis=1, keepdims=True)
    if not bool((left > 1e-9 * size).all()):
        worst = int(classes[np.argmax(left[:, 0] <= 1e-9 * size[:, 0])])
        raise InputError(
            f"nothing is left of the head's row for class {worst}: leave it out with class_map -1, "
            "or leave the suspect out of the references"
        )
    return PreparedHead(
        classes, rows / left, basis, len(chosen), _checks(known, alignment, len(basis))
    )


def _span(reference: Sequence[Tensor], d: int) -> Floats:
    """Orthonormal rows (r, d) spanning the reference heads."""
    heads = [r.detach().double().cpu().numpy() for r in reference]
    if any(r.ndim != 2 or r.shape[1] != d for r in heads):
        raise InputError(f"a reference head is not (classes, {d}): align it to the same features")
    rows = np.concatenate([np.empty((0, d)), *heads])
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = (rows / np.where(size > 0, size, 1)) if len(rows) else rows
    _, strength, directions = np.linalg.svd(rows, full_matrices=False)
    basis = directions[strength > 1e-8 * strength.max(initial=0)]
    if len(basis) > d // 2:
        raise InputError(
            f"the reference heads span {len(basis)} of {d} dimensions: give fewer, up to {d // 2}"
        )
    return np.asarray(basis)


def _checks(known: Provenance, alignment: Alignment | None, rank: int) -> tuple[Check, ...]:
    def told(assumption: str, holds: bool | None, yes: str, no: str, unknown: str) -> Check:
        finding = unknown if holds is None else yes if holds else no
        return Check(assumption=assumption, holds=holds, finding=finding)

    checks = [
        told(
            "The carriers were fixed before the suspect model existed.",
            known.committed,
            "the key and the manifest match the published commitment",
            "the key or the manifest does not match the published commitment",
            "no commitment was given: carriers could have been chosen after seeing the model",
        )
    ]
    if alignment is not None:
        checks += [
            alignment.check_images(),
            told(
                "The images that align the two networks are unmarked.",
                known.images_unmarked,
                "none of them is a marked image",
                "some are marked, and these lean even an innocent model towards the carriers",
                "not compared with the marked images",
            ),
        ]
    if rank:
        checks.append(
            told(
                "The reference models never saw the marked images and were fixed beforehand.",
                known.reference_clean,
                f"vouched for; {rank} dimensions are taken out",
                "a reference model saw the marked images or was picked by its p-value",
                f"not known; {rank} dimensions are taken out",
            )
        )
    return tuple(checks)


def match_classes(outputs: Tensor, labels: Tensor, num_classes: int) -> NDArray[np.int64]:
    """Match a suspect's classes to the owner's by its answers on clean images.

    The Hungarian assignment with the most probability in all; it does not look at the carriers,
    so the test stays exact.

    Args:
        outputs: (N, C) the suspect's logits or log-probabilities.
        labels: (N,) the owner's labels, 0 .. K - 1.
        num_classes: K.

    Returns:
        (K,) the suspect's class for each of the owner's, -1 where none is left or no image has
        the label.

    Raises:
        InputError: shapes do not match, or a label is out of range.
    """
    if outputs.ndim != 2 or labels.shape != outputs.shape[:1]:
        raise InputError(
            f"outputs {tuple(outputs.shape)} and labels {tuple(labels.shape)} do not match: give "
            "(N, C) and (N,)"
        )
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise InputError(f"labels are missing or outside 0..{num_classes - 1}: check num_classes")
    probabilities = outputs.detach().double().softmax(dim=1)
    one_hot = torch.nn.functional.one_hot(labels.long(), num_classes).to(probabilities)
    counts = one_hot.sum(0)
    table = (one_hot.T @ probabilities) / counts.clamp(min=1)[:, None]  # (K, C)
    owners = np.flatnonzero(counts.cpu().numpy() > 0)
    rows, columns = linear_sum_assignment(table.cpu().numpy()[owners], maximize=True)
    matched = np.full(num_classes, -1, dtype=np.int64)
    matched[owners[rows]] = columns
    return matched
