"""The constant matrices that pixels' positions give (arXiv 1811.11147).

The polar part sums psi_theta(theta - phi) (x) psi_phi(phi) (x) psi_rho(pi rho) over the pixels. A
harmonic of theta - phi is a sum of harmonics of theta times harmonics of phi, and a product of two
harmonics of phi is a sum of harmonics of phi. So all sums over pixels are inner products of the
harmonics of theta with one matrix of positions; a small matrix then makes the descriptor of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from remanence.search.kernel_descriptor.von_mises import feature_map


class Embedding(NamedTuple):
    """What turns gradient fields into one part of the descriptor.

    For P = `positions.shape[1]` columns, T = 2n + 1 harmonics of theta, and `fields` (T, N, s^2),

        part[:, t] = sum over u of fields[u] @ positions, contracted with mixing[t, :, u]

    Attributes:
        positions: Centrality times functions of the position (s^2, J R).
        mixing: Coefficients (T, A, T, J): harmonics u of theta and j of the position angle, to t
            and a; the R functions of the other coordinate are left alone.
        unit: `positions[:, 0]` over the centrality, a positive constant.
    """

    positions: Tensor
    mixing: Tensor
    unit: float


def polar_embedding(size: int, theta: Tensor, polar: Tensor, centrality: float | None) -> Embedding:
    """Return the embedding of phi and rho, by which theta is measured from phi.

    Args:
        size: Side s of the patch.
        theta: Coefficients of the kernel on theta (n + 1,), float64.
        polar: Coefficients of the kernels on phi and on pi rho (k + 1,), float64.
        centrality: Sigma of the weight exp(-rho^2 / sigma^2); None for no weight.

    Returns:
        The embedding, J = 2 (n + k) + 1 and A = R = 2k + 1, float64.
    """
    x, y = _grid(size)
    rho = torch.hypot(x, y) / math.sqrt(2)
    highest = len(theta) + len(polar) - 2
    angular = _harmonics(torch.atan2(y, x), highest) * _centrality(rho, centrality)  # (J, s^2)
    radial = feature_map(torch.pi * rho, polar)  # (R, s^2)
    positions = torch.einsum("jp,rp->pjr", angular, radial).flatten(1)
    return Embedding(positions, _relative_mixing(theta, polar), float(polar[0].sqrt()))


def cartesian_embedding(
    size: int, theta: Tensor, cartesian: Tensor, centrality: float | None
) -> Embedding:
    """Return the embedding of x and y, with theta as it is.

    Args:
        size: Side s of the patch.
        theta: Coefficients of the kernel on theta (n + 1,), float64.
        cartesian: Coefficients of the kernels on pi x / 2 and on pi y / 2 (k + 1,), float64.
        centrality: As for the polar embedding.

    Returns:
        The embedding, A = J = R = 2k + 1, float64.
    """
    x, y = _grid(size)
    weight = _centrality(torch.hypot(x, y) / math.sqrt(2), centrality)
    across = feature_map(torch.pi / 2 * x, cartesian) * weight
    down = feature_map(torch.pi / 2 * y, cartesian)
    positions = torch.einsum("ap,bp->pab", across, down).flatten(1)
    roots = _amplitudes(theta).diag()
    mixing = torch.einsum("tu,aj->tauj", roots, torch.eye(len(across), dtype=torch.float64))
    return Embedding(positions, mixing, float(cartesian[0]))


def pixel_grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the positions of pixels, from -1 to 1 along each axis.

    Args:
        height: Rows h; a single one is at 0.
        width: Columns w; a single one is at 0.

    Returns:
        x and y in row-major order, (h w,) each, float64.
    """
    down, across = (
        torch.arange(-(n - 1), n, 2, dtype=torch.float64) / max(n - 1, 1) for n in (height, width)
    )
    y, x = torch.meshgrid(down, across, indexing="ij")
    return x.flatten(), y.flatten()


def position_features(
    x: Tensor, y: Tensor, kind: str, coefficients: Tensor, centrality: float | None
) -> Tensor:
    """Return the weighted feature maps of positions, without their gradients.

    Args:
        x: Horizontal positions (P,), -1 to 1.
        y: Vertical positions (P,).
        kind: polar for psi(phi) (x) psi(pi rho), cartesian for psi(pi x / 2) (x) psi(pi y / 2).
        coefficients: Of both kernels (k + 1,), float64.
        centrality: As for the polar embedding.

    Returns:
        Vectors ((2k + 1)^2, P), the second factor fastest, float64.
    """
    rho = torch.hypot(x, y) / math.sqrt(2)
    if kind == "polar":
        angles = torch.atan2(y, x), torch.pi * rho
    else:
        angles = torch.pi / 2 * x, torch.pi / 2 * y
    slow, fast = (feature_map(angle, coefficients) for angle in angles)
    return torch.einsum("ap,bp->abp", slow * _centrality(rho, centrality), fast).flatten(0, 1)


def _grid(size: int) -> tuple[Tensor, Tensor]:
    return pixel_grid(size, size)


def _centrality(rho: Tensor, sigma: float | None) -> Tensor:
    return torch.ones_like(rho) if sigma is None else torch.exp(-((rho / sigma) ** 2))


def _harmonics(angle: Tensor, order: int) -> Tensor:
    return feature_map(angle, torch.ones(order + 1, dtype=torch.float64))


def _amplitudes(coefficients: Tensor) -> Tensor:
    """The factor of each harmonic in a feature map (2n + 1,)."""
    roots = coefficients.sqrt()
    return torch.cat([roots, roots[1:]])


def _relative_mixing(theta: Tensor, polar: Tensor) -> Tensor:
    """Harmonics of theta times harmonics of phi, to psi(theta - phi) (x) psi(phi): (T, A, T, J)."""
    n, k = len(theta) - 1, len(polar) - 1
    # h_a h_b = sum_j product[a, b, j] h_j: projections, exact on more equally spaced angles than
    # the highest frequency that meets there, 2 (n + k).
    count = 2 * (n + k) + 1
    angles = 2 * torch.pi * torch.arange(count, dtype=torch.float64) / count
    h = _harmonics(angles, n + k)
    product = torch.einsum("as,bs,js->abj", h[: 2 * (n + k) + 1], h, h) / h.square().sum(1)
    cosine = [product[i] for i in range(n + 1)]
    sine = [torch.zeros_like(product[0])] + [product[n + k + i] for i in range(1, n + 1)]
    phi = [*range(k + 1), *range(n + k + 1, n + 2 * k + 1)]  # where psi_phi's harmonics stand
    mixing = torch.zeros(2 * n + 1, 2 * k + 1, 2 * n + 1, count, dtype=torch.float64)
    for i in range(n + 1):
        # cos i (theta - phi) = cos i theta cos i phi + sin i theta sin i phi
        mixing[i, :, i] = cosine[i][phi]
        if i:
            # sin i (theta - phi) = sin i theta cos i phi - cos i theta sin i phi
            mixing[i, :, n + i] = sine[i][phi]
            mixing[n + i, :, n + i] = cosine[i][phi]
            mixing[n + i, :, i] = -sine[i][phi]
    return mixing * _amplitudes(theta)[:, None, None, None] * _amplitudes(polar)[:, None, None]
