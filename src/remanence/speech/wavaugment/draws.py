"""Ranges of parameters, and draws from them: one tensor operation for the whole batch.

A range is a pair (low, high); a number fixes the parameter.
"""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING

import torch

from remanence.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Range = float | tuple[float, float]


def as_range(name: str, value: Range, least: float, most: float) -> tuple[float, float]:
    """(low, high), checked to lie within least..most."""
    low, high = value if isinstance(value, tuple) and len(value) == 2 else (value, value)
    if not (isinstance(low, Real) and isinstance(high, Real)):
        raise InputError(f"{name} {value!r} is no range: give a number, or (low, high)")
    if low > high:
        raise InputError(f"{name} {value} runs from high to low: give {(high, low)}")
    if not least <= low <= high <= most:
        raise InputError(f"{name} {value} lies outside {least:g}..{most:g}")
    return low, high


def as_whole_range(name: str, value: Range, least: float, most: float) -> tuple[int, int]:
    """As `as_range`, of whole numbers."""
    low, high = as_range(name, value, least, most)
    if low != int(low) or high != int(high):
        raise InputError(f"{name} {value} is not whole: give whole numbers")
    return int(low), int(high)


def uniform(bounds: tuple[float, float], n: int, generator: torch.Generator | None) -> Tensor:
    """(n,) float64, even over [low, high)."""
    low, high = bounds
    return low + (high - low) * torch.rand(n, dtype=torch.float64, generator=generator)


def whole(bounds: tuple[int, int], n: int, generator: torch.Generator | None) -> Tensor:
    """(n,) int64 in [low, high), as numpy's `randint` draws; `low` where both are equal."""
    low, high = bounds
    return low + below(torch.full((n,), max(1, high - low)), generator)


def below(limit: Tensor, generator: torch.Generator | None) -> Tensor:
    """Whole numbers 0..limit - 1, one for each of `limit`."""
    draws = torch.rand(limit.shape, dtype=torch.float64, generator=generator)
    return (draws * limit).long().minimum(limit - 1)


def seeds(n: int, generator: torch.Generator | None) -> Tensor:
    """(n,) int64 for `row_noise`."""
    return below(torch.full((n,), 2**32), generator)
