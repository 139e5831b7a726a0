"""The KoLeo loss: each vector is pushed away from its nearest neighbour (arXiv 1806.03198, eq. 3).

The Kozachenko-Leonenko estimator of the entropy of a sample grows with the mean logarithm of the
distance rho_i to the nearest neighbour. The loss is -mean_i log rho_i. It is often below 0, and its
size depends on the number of vectors: `koleo_of_uniform` tells what a perfect spread would give.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.special import betaincinv
from torch import Tensor, nn
from torch.nn.functional import pad

from remanence.errors import InputError

TABLE = 2**22  # distances held at a time


class KoLeoLoss(nn.Module):
    """`koleo_loss` as a module; the arguments are the same."""

    def __init__(
        self,
        *,
        topk: int = 1,
        normalize: bool = True,
        eps: float = 1e-8,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check(topk, eps)
        self.topk, self.normalize, self.eps, self.group = topk, normalize, eps, group

    def forward(self, z: Tensor, exclude: Tensor | None = None) -> Tensor:
        """Return the loss of vectors (n, d)."""
        return koleo_loss(
            z,
            exclude=exclude,
            topk=self.topk,
            normalize=self.normalize,
            eps=self.eps,
            group=self.group,
        )


def koleo_loss(
    z: Tensor,
    *,
    exclude: Tensor | None = None,
    topk: int = 1,
    normalize: bool = True,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return -mean log of the distance to the nearest neighbour.

    The neighbours are found without gradient; the gradient then reaches both ends of each pair. A
    pair closer than `eps`, such as exact duplicates, counts as `eps` apart and has no gradient. NaN
    in gives NaN out, so that no device has to wait for a check.

    Args:
        z: Vectors (n, d) of any floating type. All work is done in float32, or float64 where z is,
            inside autocast too.
        exclude: Integer ids (n,): vectors of one id, such as crops of one image, are never each
            other's neighbours. A vector without any neighbour left counts for nothing.
        topk: Neighbours of each vector, over which the logarithm is averaged (DINOv3).
        normalize: Put vectors on the unit sphere first; a zero vector stays and has no gradient.
        eps: Least distance.
        group: Processes whose vectors are neighbours too. Each process returns the part of its own
            vectors, such that the mean over processes, which DistributedDataParallel takes of the
            gradients, is that of one process holding all vectors. Batches may differ in size.

    Returns:
        Scalar, float32 or float64; 0 with a warning where there is a single vector.

    Raises:
        InputError: A shape or a type is wrong, or an option out of range.
    """
    _check(topk, eps)
    if z.ndim != 2 or not z.numel() or not z.is_floating_point():
        raise InputError(f"KoLeo of {z.dtype} {tuple(z.shape)}: give floats, a vector each row")
    if exclude is not None and (exclude.shape != z.shape[:1] or exclude.is_floating_point()):
        raise InputError(f"exclude {tuple(exclude.shape)}: give {len(z)} integers, one a vector")
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        z = _unit(z) if normalize else z
        everyone, ids, first, world = z, exclude, 0, 1
        if group is not None:
            world = dist.get_world_size(group)
            everyone, first = _gather(z, group)
            if exclude is not None:
                ids, _ = _gather(exclude.long().unsqueeze(1), group)
                ids = ids.squeeze(1)
        if len(everyone) == 1:
            warnings.warn("KoLeo of one vector is 0: it has no neighbour", stacklevel=2)
            return everyone[:0].sum()
        index, found = _neighbours(z.detach(), everyone.detach(), first, topk, ids)  # (n, k)
        # From the difference: 2 - 2 z.z' would lose every digit of a distance below 3e-4.
        squared = (z.unsqueeze(1) - everyone[index]).square().sum(2)
        logs = 0.5 * squared.clamp(min=eps**2).log()
        count = found.sum()
        if group is not None:
            dist.all_reduce(count, group=group)
        # A copy of everyone's nothing keeps each process in the backward pass of the others.
        return -world * torch.where(found, logs, 0).sum() / count.clamp(min=1) + everyone[:0].sum()


def koleo_of_uniform(n: int, dim: int) -> float:
    """Return the loss to expect of n uniformly random vectors on the unit sphere of R^dim.

    The share of the sphere within distance rho of a point is the Beta((dim-1)/2, (dim-1)/2)
    distribution at rho^2 / 4, and the smallest of n - 1 such shares is Beta(1, n-1).

    Args:
        n: Vectors, at least 2.
        dim: Dimension, at least 2.

    Returns:
        Expected value of `koleo_loss` with one neighbour, to about 1e-4.

    Raises:
        InputError: n or dim is below 2.
    """
    if n < 2 or dim < 2:
        raise InputError(f"{n} vectors of dimension {dim}: give at least 2 of each")
    steps = 20_000
    quantiles = (np.arange(steps) + 0.5) / steps
    shares = -np.expm1(np.log1p(-quantiles) / (n - 1))
    half = (dim - 1) / 2
    return float(-np.log(2 * np.sqrt(betaincinv(half, half, shares))).mean())


def _check(topk: int, eps: float) -> None:
    if topk < 1:
        raise InputError(f"topk {topk}: give at least 1 neighbour")
    if not 1e-15 <= eps < 1:
        raise InputError(f"eps {eps}: give a distance from 1e-15 to below 1, such as 1e-8")


def _unit(z: Tensor) -> Tensor:
    """Normalise rows; scaled by their largest entry first, they neither overflow nor vanish."""
    largest = z.detach().abs().amax(1, keepdim=True)
    scaled = z / torch.where(largest == 0, math.inf, largest)
    # Then the norm is at least 1, or 0.
    norm: Tensor = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / norm.clamp(min=1)


class _AllGather(torch.autograd.Function):
    """Stack the equally many rows of all processes; backward sums what all did with them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, rows.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None


def _gather(rows: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, int]:
    """Return the rows of all processes, with gradient, and where one's own begin."""
    mine = torch.tensor([len(rows)], device=rows.device)
    each = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(each, mine, group=group)
    sizes = [int(size) for size in each]
    apply: Any = _AllGather.apply  # torch gives it no types
    parts = apply(pad(rows, (0, 0, 0, max(sizes) - len(rows))), group)
    everyone = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return everyone, sum(sizes[: dist.get_rank(group)])


@torch.no_grad()
def _neighbours(
    z: Tensor, everyone: Tensor, first: int, topk: int, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the nearest others (n, k) of z = everyone[first:first + n], and which exist."""
    topk = min(topk, len(everyone) - 1)
    rows = max(TABLE // len(everyone), 1)
    indices, found = [], []
    for start in range(0, len(z), rows):
        part = z[start : start + rows]
        own = torch.arange(first + start, first + start + len(part), device=z.device)
        gaps = torch.cdist(part, everyone, compute_mode="donot_use_mm_for_euclid_dist")
        gaps.nan_to_num_(nan=-1, posinf=math.inf)  # the nearest, for NaN to be passed on
        gaps.scatter_(1, own.unsqueeze(1), math.inf)
        if ids is not None:
            gaps.masked_fill_(ids[own].unsqueeze(1) == ids, math.inf)
        best = gaps.topk(topk, largest=False)
        indices.append(best.indices)
        found.append(best.values != math.inf)
    return torch.cat(indices), torch.cat(found)
