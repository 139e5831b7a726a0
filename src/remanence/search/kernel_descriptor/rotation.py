"""The best rotation between patches, from their descriptors alone (arXiv 1811.11147).

Turning a patch by alpha leaves theta - phi and rho as they are and adds alpha to phi, so that each
pair of harmonics (cos m phi, sin m phi) turns by m alpha. The similarity of two polar parts is then
a short trigonometric series in alpha, whose coefficients are inner products.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import normalize

from remanence.errors import InputError
from remanence.modes import exact_products

if TYPE_CHECKING:
    from torch import Tensor

    from remanence.search.kernel_descriptor.descriptor import KernelDescriptor


class Rotations(NamedTuple):
    """The best rotation of each pair.

    Attributes:
        similarity: Cosine of the polar parts at that rotation (N, M); 0 with a flat patch.
        angle: By how much the second patch is to be turned (N, M), radians from 0 to 2 pi,
            clockwise as displayed.
    """

    similarity: Tensor
    angle: Tensor


def rotation_search(
    descriptor: KernelDescriptor, first: Tensor, second: Tensor, angles: int = 36
) -> Rotations:
    """Compare each patch with all rotations of each other one.

    Args:
        descriptor: What made the vectors, with a polar part.
        first: Raw descriptors (N, D), not whitened.
        second: The same (M, D).
        angles: Equally spaced rotations that are tried, from 0.

    Returns:
        The best of them for each pair. Turned descriptors are exact for quarter turns of patches
        with an even side, whose grid turns into itself; an odd side has a pixel without a phi.

    Raises:
        InputError: The descriptor has no polar part, the vectors are not its own, or there are no
            angles.
    """
    if descriptor.kind == "cartesian":
        raise InputError("Cartesian descriptors cannot be turned: give the kind polar or concat")
    if angles < 1:
        raise InputError(f"{angles} angles to try: give at least 1, 36 say")
    for vectors in (first, second):
        if vectors.ndim != 2 or vectors.shape[1] != descriptor.dim:
            raise InputError(
                f"vectors of shape {tuple(vectors.shape)} for descriptors of length "
                f"{descriptor.dim}: give raw ones, (N, {descriptor.dim})"
            )
    frequencies = descriptor.polar[1]
    terms = 2 * frequencies + 1
    shape = (2 * descriptor.theta[1] + 1, terms, terms)  # theta, phi, rho
    length = shape[0] * terms**2
    ours, theirs = (
        normalize(v[:, :length], dim=1).reshape(-1, *shape).movedim(2, 0).flatten(2)
        for v in (first, second)
    )  # phi first: (2k + 1, N, T R)
    with exact_products():
        constant = ours[0] @ theirs[0].mT
        cosines = [
            ours[m] @ theirs[m].mT + ours[frequencies + m] @ theirs[frequencies + m].mT
            for m in range(1, frequencies + 1)
        ]
        sines = [
            ours[frequencies + m] @ theirs[m].mT - ours[m] @ theirs[frequencies + m].mT
            for m in range(1, frequencies + 1)
        ]
    best = torch.full_like(constant, -torch.inf)
    angle = torch.zeros_like(constant)
    for step in range(angles):
        alpha = 2 * math.pi * step / angles
        similarity = constant.clone()
        for m, (cosine, sine) in enumerate(zip(cosines, sines, strict=True), start=1):
            similarity += math.cos(m * alpha) * cosine + math.sin(m * alpha) * sine
        better = similarity > best
        best = torch.where(better, similarity, best)
        angle = torch.where(better, alpha, angle)
    return Rotations(best, angle)
