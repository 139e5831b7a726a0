"""Kernel local descriptors of grey patches (Mukundan et al., arXiv 1811.11147).

Two patches are compared by a sum over all pairs of their pixels: a product of kernels on gradient
direction and on position, weighted by the roots of both gradient magnitudes. Kernels that are inner
products make the sum one, of a vector a patch. The polar part measures direction from the position
angle and forgives an error of the patch's orientation; the Cartesian part forgives one of place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.modes import exact_products
from remanence.search.kernel_descriptor.embedding import (
    Embedding,
    cartesian_embedding,
    polar_embedding,
)
from remanence.search.kernel_descriptor.gradients import gradient_fields, smooth
from remanence.search.kernel_descriptor.von_mises import von_mises_coefficients

SMALLEST = 8  # pixels of the side
FLAT = 1e-3  # mean weight of a pixel below which a patch shows nothing
CPU_PIXELS = 2**17  # pixels at a time, whose gradient fields take 4 MB in float32
GPU_PIXELS = 2**24


class Descriptors(NamedTuple):
    """Descriptors of N patches.

    Attributes:
        vectors: (N, D), float32, or float64 where the patches were. A flat patch's is 0.
        valid: (N,), bool: False for a flat patch.
    """

    vectors: Tensor
    valid: Tensor


@dataclass(frozen=True)
class KernelDescriptor:
    """The descriptor of patches of any size; call it with patches.

    Components stand in the order theta, phi, rho, then theta, x, y, the last fastest; harmonics in
    the order constant, cosines, sines. The gradient is I(x-1) - I(x+1), as in the published Python
    codes; the published Matlab code has the other sign.

    Attributes:
        kind: The polar part, the Cartesian part, or both side by side.
        theta: Kappa and number of frequencies of the kernel on the gradient's direction.
        polar: The same of the kernels on the position angle phi and on pi rho.
        cartesian: The same of the kernels on pi x / 2 and on pi y / 2.
        centrality: Sigma of a pixel's weight exp(-rho^2 / sigma^2), for rho = 1 at a corner; None
            weighs all alike.
        normalise: Scale both parts to the same length and the whole to 1. Without it inner products
            are the sums over pairs of pixels themselves, and flat patches are left as they are.

    Raises:
        InputError: A setting is out of range.
    """

    kind: Literal["concat", "polar", "cartesian"] = "concat"
    theta: tuple[float, int] = (8.0, 3)
    polar: tuple[float, int] = (8.0, 2)
    cartesian: tuple[float, int] = (1.0, 1)
    centrality: float | None = 1.0
    normalise: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("concat", "polar", "cartesian"):
            raise InputError(f"kind {self.kind!r}: give concat, polar or cartesian")
        for kappa, order in (self.theta, self.polar, self.cartesian):
            von_mises_coefficients(kappa, order)
        sigma = self.centrality
        if sigma is not None and not (math.isfinite(sigma) and sigma > 0):
            raise InputError(f"centrality {sigma}: give a sigma above 0, or None for no weight")

    @property
    def dim(self) -> int:
        """Length D of a descriptor; 238, 175 or 63 by default."""
        theta, polar, cartesian = (
            2 * order + 1 for _, order in (self.theta, self.polar, self.cartesian)
        )
        lengths = {"polar": theta * polar**2, "cartesian": theta * cartesian**2}
        return sum(lengths[name] for name in self.parts)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts in their order."""
        return ("polar", "cartesian") if self.kind == "concat" else (self.kind,)

    @property
    def convention(self) -> str:
        """One line that tells descriptors apart which must not be mixed, for a whitening's file."""
        kernels = [("theta", self.theta), *((p, getattr(self, p)) for p in self.parts)]
        settings = [f"{name}={float(kappa):g},{order}" for name, (kappa, order) in kernels]
        weight = "none" if self.centrality is None else f"{float(self.centrality):g}"
        length = "unit" if self.normalise else "sums"
        return " ".join(["mkd", self.kind, *settings, f"centrality={weight}", length])

    def __call__(self, patches: Tensor) -> Descriptors:
        """Describe patches.

        All sums over pixels are one product of the gradients' harmonics (2n + 1 a patch) with a
        constant matrix, 64 columns by default; it is kept for each size, type and device met.

        Args:
            patches: Grey patches (N, s, s) or (N, 1, s, s), s at least 8: uint8, or floating values
                in [0, 1]; float16 and bfloat16 are computed in float32.

        Returns:
            The descriptors, on the patches' device, differentiable in the pixels.

        Raises:
            InputError: The patches are not square, grey and large enough, or a value is NaN or out
                of range.
        """
        patches = _checked(patches)
        count, size = len(patches), patches.shape[-1]
        if count == 0:
            return Descriptors(
                patches.new_zeros(0, self.dim),
                torch.zeros(0, dtype=torch.bool, device=patches.device),
            )
        positions = position_matrix(self, patches, size)
        pixels = GPU_PIXELS if patches.is_cuda else CPU_PIXELS
        with exact_products():
            sums = [
                gradient_fields(smooth(chunk), self.theta[1]).flatten(2) @ positions
                for chunk in torch.split(patches, max(1, pixels // size**2))
            ]
            return describe_sums(self, torch.cat(sums, dim=1), size)


def position_matrix(descriptor: KernelDescriptor, like: Tensor, size: int) -> Tensor:
    """Return what turns the gradient fields of a patch into all its sums over pixels.

    Args:
        descriptor: The kernels.
        like: A tensor of the wanted type and device.
        size: Side s of the patch.

    Returns:
        Functions of the position (s^2, C), those of the polar part first.
    """
    return _embeddings(descriptor, size, like.dtype, like.device)[0]


def describe_sums(descriptor: KernelDescriptor, sums: Tensor, size: int) -> Descriptors:
    """Make descriptors of the sums over pixels.

    Args:
        descriptor: The kernels.
        sums: Gradient fields times the `position_matrix` (T, N, C), for T = 2n + 1 fields.
        size: Side s of the patches.

    Returns:
        Descriptors of N patches.
    """
    _, parts = _embeddings(descriptor, size, sums.dtype, sums.device)
    weight = sums[0, :, 0] / (parts[0].unit * size**2)  # mean of w g
    valid = weight.detach() >= FLAT
    vectors = []
    widths = [part.positions.shape[1] for part in parts]
    for part, columns in zip(parts, torch.split(sums, widths, dim=2), strict=True):
        shape = (*columns.shape[:2], part.mixing.shape[3], -1)  # (T, N, J, R)
        vector = torch.einsum("tauj,unjr->ntar", part.mixing, columns.reshape(shape)).flatten(1)
        if descriptor.normalise:
            length = torch.where(valid, vector.norm(dim=1), 1) * len(parts) ** 0.5
            vector = torch.where(valid[:, None], vector / length[:, None], 0)
        vectors.append(vector)
    return Descriptors(torch.cat(vectors, dim=1), valid)


@lru_cache(maxsize=32)
def _embeddings(
    descriptor: KernelDescriptor, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, tuple[Embedding, ...]]:
    """The position matrices of all parts side by side, and the parts."""
    theta = von_mises_coefficients(*descriptor.theta)
    sigma = descriptor.centrality
    # Made under a caller's inference mode, they would be of no use to a later backward pass.
    with torch.inference_mode(mode=False):
        parts = []
        for name in descriptor.parts:
            if name == "polar":
                polar = von_mises_coefficients(*descriptor.polar)
                part = polar_embedding(size, theta, polar, sigma)
            else:
                cartesian = von_mises_coefficients(*descriptor.cartesian)
                part = cartesian_embedding(size, theta, cartesian, sigma)
            parts.append(
                Embedding(
                    part.positions.to(device, dtype), part.mixing.to(device, dtype), part.unit
                )
            )
        return torch.cat([part.positions for part in parts], dim=1), tuple(parts)


def _checked(patches: Tensor) -> Tensor:
    """Patches as (N, s, s), float32 or float64."""
    shape = tuple(patches.shape)
    if patches.ndim == 4:
        if shape[1] != 1:
            raise InputError(
                f"patches of shape {shape} have {shape[1]} channels: make them grey, (N, 1, s, s)"
            )
        patches = patches.squeeze(1)
    if patches.ndim != 3:
        raise InputError(f"patches of shape {shape}: give (N, s, s) or (N, 1, s, s)")
    if shape[-1] != shape[-2]:
        raise InputError(f"patches of shape {shape} are not square: resize or crop them to s x s")
    if shape[-1] < SMALLEST:
        raise InputError(f"patches of {shape[-1]} pixels a side: give at least {SMALLEST}")
    if patches.dtype == torch.uint8:
        return patches.float() / 255
    if not patches.is_floating_point():
        raise InputError(f"patches of {patches.dtype}: give uint8, or floating values in [0, 1]")
    if patches.dtype != torch.float64:
        patches = patches.float()
    if patches.numel():
        low, high = (float(v) for v in patches.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError("a patch holds NaN or infinity: leave out what lies outside its image")
        if low < -0.01 or high > 1.01:
            raise InputError(
                f"patches run from {low:g} to {high:g}: give values in [0, 1] (divide by 255), "
                "or uint8"
            )
    return patches
