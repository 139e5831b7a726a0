"""Directions learned from matching pairs, as of a linear discriminant (arXiv 1811.11147)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.search.kernel_descriptor.spectrum import shrinkage, spectrum

if TYPE_CHECKING:
    from remanence.search.kernel_descriptor.moments import Moments


def supervised_projection(
    moments: Moments, kind: Literal["lw", "lws"], keval: int
) -> tuple[Tensor, Tensor]:
    """Learn directions along which matching pairs agree and all vectors differ.

    For S = E[(q - p)(q - p)^T] = L L^T and A = L^-1 they are A^T U, for U the eigenvectors of the
    scatter of A (d - m). By lws, S is (1 - b) S / s_1 + b I, for b = s[keval] / s_1.

    Args:
        moments: With pairs. Mean and scatter are those of the single vectors where there are any,
            and otherwise the mean of the pairs' first vectors and the scatter of all of them.
        kind: With or without shrinkage.
        keval: Zero-based index of the eigenvalue of S that sets the shrinkage.

    Returns:
        m (E,) and the directions as columns, the most telling first (E, E), float64.

    Raises:
        InputError: There are no pairs, or too few.
    """
    if moments.pairs == 0:
        raise InputError(f"{kind} learns from matching pairs: give some, or take the kind pcaws")
    within = moments.differences / moments.pairs
    if kind == "lws":
        values = spectrum(within)[0]
        level = shrinkage(values, keval)
        within = (1 - level) * within / torch.linalg.matrix_norm(within, 2)  # its norm is s_1
        within.diagonal().add_(level)
    elif moments.pairs < moments.dim:
        raise InputError(
            f"lw learns from at least {moments.dim} matching pairs; there are {moments.pairs}: "
            "give more, or take the kind lws"
        )
    if moments.count:
        mean = moments.total / moments.count
        scatter = moments.scatter(mean)
    else:
        mean = moments.first_total / moments.pairs
        scatter = moments.pair_scatter(mean)
    factor = _cholesky(within)
    half = torch.linalg.solve_triangular(factor, scatter, upper=False)  # A C
    whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)  # A C A^T
    vectors = spectrum((whitened + whitened.mT) / 2)[1]
    return mean, torch.linalg.solve_triangular(factor.mT, vectors, upper=True)  # A^T U


def _cholesky(within: Tensor) -> Tensor:
    """Factor S, with the least of 1e-10, 1e-9, .. added to the diagonal that makes it definite."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(within)
    added = 0.0
    while int(failed):
        added = added * 10 or 1e-10
        damped = within + added * torch.eye(len(within), dtype=within.dtype, device=within.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
    if added:
        warnings.warn(
            f"the pairs differ in too few directions: {added:g} was added to their scatter; the "
            "kind lws is the safer choice",
            UserWarning,
            stacklevel=4,
        )
    return factor
