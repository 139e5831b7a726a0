"""The classes of a shell: its points up to the order and the signs of coordinates."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

MOST = 2**20  # leaders that a search holds


def leaders(dim: int, r2: int) -> Tensor:
    """List the leaders of a shell, the points whose coordinates never rise nor fall below 0.

    Each point of the shell is a permutation, with signs, of exactly one leader: the atoms of the
    paper.

    Args:
        dim: Dimension.
        r2: Squared radius.

    Returns:
        Leaders (n, dim), int8, the largest first coordinates first.

    Raises:
        InputError: The shell is empty, or has more than 1,048,576 leaders.
    """
    count = leader_count(dim, r2)
    if not count:
        raise InputError(f"no integer vector of dimension {dim} has squared norm {r2}")
    if count > MOST:
        raise InputError(
            f"dimension {dim} and squared radius {r2} have {count} leaders, more than {MOST}: "
            "give fewer bits"
        )
    found = list(_descend(dim, r2, math.isqrt(r2)))
    return torch.tensor(found, dtype=torch.int8)


def leader_count(dim: int, r2: int) -> int:
    """Count the partitions of r2 into at most `dim` squares."""
    # counts[k, t]: partitions of t into exactly k squares of the values seen so far.
    counts: NDArray[np.object_] = np.zeros((dim + 1, r2 + 1), dtype=object)
    counts[0, 0] = 1
    for value in range(1, math.isqrt(r2) + 1):
        square = value * value
        for k in range(1, dim + 1):
            counts[k, square:] += counts[k - 1, : r2 + 1 - square]
    return int(counts[:, r2].sum())


def class_size(leader: Sequence[int]) -> int:
    """Count the points of a leader's class: its distinct permutations with all signs."""
    size = math.factorial(len(leader))
    for times in Counter(leader).values():
        size //= math.factorial(times)
    return size << sum(value != 0 for value in leader)


def _descend(length: int, rest: int, bound: int) -> Iterator[list[int]]:
    """Yield vectors of falling coordinates up to `bound` whose squares sum to `rest`."""
    if not rest:
        yield [0] * length
        return
    for value in range(min(bound, math.isqrt(rest)), 0, -1):
        if value * value * length < rest:
            return  # no smaller value could reach the rest
        for tail in _descend(length - 1, rest - value * value, value):
            yield [value, *tail]
