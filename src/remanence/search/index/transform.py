"""What an index asks of the map in front of its code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from remanence.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


class Transform(Protocol):
    """A fixed map of vectors to the unit sphere: a trained network, or a rotation."""

    @property
    def in_dim(self) -> int:
        """Dimension of the vectors."""

    @property
    def out_dim(self) -> int:
        """Dimension of the sphere's space."""

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, hexadecimal: what tells two maps apart."""

    def embed(self, x: Tensor) -> Tensor:
        """Return unit vectors (n, out_dim), float32, of vectors (n, in_dim), without gradient."""


def check_vectors(transform: Transform, x: Tensor) -> None:
    """Refuse what is no (n, in_dim) tensor of real numbers."""
    if x.ndim != 2 or x.shape[1] != transform.in_dim:
        raise InputError(
            f"vectors {tuple(x.shape)} for a transform of dimension {transform.in_dim}: give "
            f"(n, {transform.in_dim})"
        )
    if x.dtype == torch.bool or x.is_complex():
        raise InputError(f"vectors of {x.dtype}: give real numbers")


def embed(transform: Transform, x: Tensor, start: int = 0) -> Tensor:
    """Embed vectors, on whatever device the transform answers.

    Args:
        transform: The map.
        x: Vectors (n, in_dim), which `check_vectors` let pass.
        start: Number of the first row, for messages.

    Returns:
        Vectors (n, out_dim), float32, all finite.

    Raises:
        InputError: A value is NaN or infinite, or what the transform returns is not what it says.
    """
    x = x if x.is_floating_point() else x.float()
    _check_finite(x, start, "")
    with torch.no_grad():
        y = transform.embed(x)
    if y.shape != (len(x), transform.out_dim) or y.dtype != torch.float32:
        raise InputError(
            f"the transform returned {y.dtype} {tuple(y.shape)} for {len(x)} vectors: it must be "
            f"float32 ({len(x)}, {transform.out_dim})"
        )
    _check_finite(y, start, " after the transform")
    return y


def _check_finite(x: Tensor, start: int, where: str) -> None:
    finite = x.isfinite().all(1)
    if not bool(finite.all()):
        row = start + int((~finite).int().argmax())
        raise InputError(f"row {row} holds NaN or infinity{where}: leave it out")
