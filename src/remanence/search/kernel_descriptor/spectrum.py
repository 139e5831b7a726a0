"""The spectrum of a second moment, and the level that its eigenvalues are shrunk towards."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence.errors import InputError

RANK = 1e-12  # eigenvalues below this share of the largest are rounding


def spectrum(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose a second moment.

    Args:
        symmetric: Symmetric positive semidefinite (E, E), float64.

    Returns:
        Eigenvalues over the largest, descending (E,), and eigenvectors as columns (E, E).

    Raises:
        InputError: All eigenvalues are 0.
    """
    values, vectors = torch.linalg.eigh(symmetric)
    if not bool(values[-1] > RANK):
        raise InputError("the vectors are all alike: give different ones to learn a whitening from")
    return values.flip(0) / values[-1], vectors.flip(1)


def shrinkage(values: Tensor, keval: int) -> float:
    """Return the eigenvalue that a shrunk spectrum tends to: (1 - a) l + a for a = l[keval].

    Args:
        values: Eigenvalues over the largest, descending (E,).
        keval: Zero-based index.

    Returns:
        a, above 0 and at most 1.

    Raises:
        InputError: That eigenvalue is 0.
    """
    level = float(values[keval])
    if level <= RANK:
        raise InputError(
            f"eigenvalue {keval} is 0, there is nothing to shrink towards: give more vectors or "
            f"pairs, or a keval below {int((values > RANK).sum())}"
        )
    return level


def effective_rank(values: Tensor) -> float:
    """Return the exponential of a spectrum's entropy (Roy and Vetterli, EUSIPCO 2007).

    Args:
        values: Eigenvalues (E,), at least 0 but for rounding, one above.

    Returns:
        1 (one direction has all variance) to E (all have the same).
    """
    share = values.clamp_min(0) / values.clamp_min(0).sum()
    return float(torch.special.entr(share).sum().exp())
