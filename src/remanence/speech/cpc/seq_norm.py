"""Features of one recording brought to mean 0 and deviation 1 over time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-8  # of the variance


def standardise(frames: Tensor) -> Tensor:
    """Subtract the mean over time and divide by the unbiased standard deviation.

    Args:
        frames: (..., S, D); a single frame becomes 0.
    """
    mean = frames.mean(-2, keepdim=True)
    variance = frames.var(-2, keepdim=True, correction=min(frames.shape[-2] - 1, 1))
    return (frames - mean) / (variance + EPS).sqrt()
