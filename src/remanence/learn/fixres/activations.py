"""Statistics of pooled activations (arXiv 1906.06423, Section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from remanence.errors import InputError

# A standard deviation below this is that of a constant.
MIN_STD = 1e-6


@dataclass(frozen=True)
class ActivationStatistics:
    """What a larger test crop moves: fewer zeros, a smaller spread.

    Attributes:
        zero_fraction: share of exact zeros over all values, in [0, 1].
        std: standard deviation of a channel over images, averaged over channels.
        mean: mean of all values.
    """

    zero_fraction: float
    std: float
    mean: float


def activation_statistics(z: Tensor) -> ActivationStatistics:
    """Zeros, spread and mean of pooled activations.

    Args:
        z: floats (N, C), N images.

    Returns:
        The three figures.

    Raises:
        InputError: `z` is empty, not (N, C), or holds NaN or infinity.
    """
    summed = moments(z)
    return ActivationStatistics(
        zero_fraction=(z == 0).sum().item() / z.numel(),
        std=summed.var.sqrt().mean().item(),
        mean=summed.mean.mean().item(),
    )


@dataclass(frozen=True)
class Moments:
    """Population moments of each channel, float64 (C,).

    Attributes:
        n: number of images.
        mean: first moment.
        var: second central moment.
        fourth: fourth central moment.
    """

    n: int
    mean: Tensor
    var: Tensor
    fourth: Tensor

    @property
    def pooled_var(self) -> Tensor:
        """Variance of all values of all channels, a scalar."""
        return self.var.mean() + self.mean.var(correction=0)


def moments(z: Tensor) -> Moments:
    """Moments of each channel, in two passes over blocks of images so that memory stays bounded.

    Args:
        z: floats (N, C).

    Returns:
        Float64 moments on the device of `z`.

    Raises:
        InputError: `z` is empty, not (N, C), or holds NaN or infinity.
    """
    if z.ndim != 2 or not z.numel():
        raise InputError(f"activations have shape {tuple(z.shape)}: give (N, C), none of them 0")
    n, C = z.shape
    blocks = torch.split(z.detach(), max(1, 2**22 // C))
    mean = z.new_zeros(C, dtype=torch.float64)
    for block in blocks:
        mean += block.double().sum(dim=0) / n
    if not bool(mean.isfinite().all()):
        raise InputError("activations hold NaN or infinity: check the model's output")
    var, fourth = torch.zeros_like(mean), torch.zeros_like(mean)
    for block in blocks:
        squares = (block.double() - mean) ** 2
        var += squares.sum(dim=0) / n
        fourth += (squares**2).sum(dim=0) / n
    return Moments(n, mean, var, fourth)
