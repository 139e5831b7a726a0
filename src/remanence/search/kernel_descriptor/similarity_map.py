"""Which displacements of a gradient a descriptor forgives (arXiv 1811.11147, section 4).

The similarity of two patches is a sum over pairs of pixels, psi(p)^T A psi(q) times both gradients'
weights, for A = I, or W W^T after a whitening W. Seen from one pixel p, that is a map over q.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from remanence.errors import InputError
from remanence.search.kernel_descriptor.embedding import pixel_grid, position_features
from remanence.search.kernel_descriptor.von_mises import feature_map, von_mises_coefficients

if TYPE_CHECKING:
    from torch import Tensor

    from remanence.search.kernel_descriptor.descriptor import KernelDescriptor
    from remanence.search.kernel_descriptor.whitening import Whitening


def similarity_map(
    descriptor: KernelDescriptor,
    size: int,
    pixel: tuple[int, int],
    offset: float = 0.0,
    *,
    direction: float = 0.0,
    whitening: Whitening | None = None,
) -> Tensor:
    """Map q to psi(p)^T A psi(q).

    The whitening's mean and all scaling to length 1 depend on whole patches, and are left out.

    Args:
        descriptor: The kernels.
        size: Side s of the patch, at least 2.
        pixel: Row and column of p.
        offset: Gradient direction at q minus that at p, radians.
        direction: Gradient direction at p, radians, as the descriptor measures it: towards the
            darker side, clockwise. Without a whitening nothing depends on it.
        whitening: Of this descriptor's vectors; None for A = I.

    Returns:
        The map (s, s), float64.

    Raises:
        InputError: The pixel is outside the patch, or the whitening is of other descriptors.
    """
    row, column = pixel
    if size < 2 or not (0 <= row < size and 0 <= column < size):
        raise InputError(f"pixel {pixel} of a patch of {size} x {size}: give one inside it")
    theirs = pixel_embedding(
        descriptor, torch.full((size, size), direction + offset, dtype=torch.float64)
    )
    ours = pixel_embedding(descriptor, torch.full((size, size), direction, dtype=torch.float64))
    ours = ours[:, row * size + column]
    if whitening is not None:
        if whitening.convention not in ("", descriptor.convention) or len(ours) != len(
            whitening.mean
        ):
            raise InputError(
                f"a whitening of descriptors [{whitening.convention}] of length "
                f"{len(whitening.mean)}, not of [{descriptor.convention}]: learn one with these"
            )
        ours = whitening.projection @ (whitening.projection.mT @ ours)
    return (ours @ theirs).reshape(size, size)


def pixel_embedding(descriptor: KernelDescriptor, theta: Tensor) -> Tensor:
    """Embed every pixel of a patch for itself.

    Summed over the pixels with the roots of the gradient magnitudes as weights, these vectors are
    the descriptor without scaling to length 1.

    Args:
        descriptor: The kernels.
        theta: Gradient directions (s, s), radians, floating.

    Returns:
        psi, with the centrality (D, s^2), float64.
    """
    x, y = pixel_grid(*theta.shape)
    angle = theta.double().flatten()
    kernel = von_mises_coefficients(*descriptor.theta)
    parts = []
    for kind in descriptor.parts:
        coefficients = von_mises_coefficients(*getattr(descriptor, kind))
        positions = position_features(x, y, kind, coefficients, descriptor.centrality)
        relative = angle - torch.atan2(y, x) if kind == "polar" else angle
        parts.append(
            torch.einsum("tp,ap->tap", feature_map(relative, kernel), positions).flatten(0, 1)
        )
    return torch.cat(parts)
