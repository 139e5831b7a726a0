"""Dynamic time warping, the total divided by the length of the path.

C(i, j) = d(i, j) + min(C(i-1, j-1), C(i, j-1), C(i-1, j)), in float32. Of equal predecessors the
path takes the diagonal, else the left one (i, j-1), else the one above. Instead of going back along
the path, its length so far is carried beside C: nothing but the last two diagonals is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from remanence.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def dtw(distance: Tensor, n: Tensor, m: Tensor) -> Tensor:
    """Return the mean distance along the best path, for each pair of sequences.

    Args:
        distance: Distances between frames (P, N, M), any floating type, taken as float32; what lies
            beyond n and m does not matter.
        n: Lengths of the first sequences (P,), integers from 1 to N.
        m: Lengths of the second sequences (P,), integers from 1 to M.

    Returns:
        Distances (P,), float32, on the device of `distance`; equal on every device, bit for bit.

    Raises:
        InputError: A shape or a length is wrong.
    """
    if distance.ndim != 3 or n.shape != distance.shape[:1] or m.shape != distance.shape[:1]:
        raise InputError(
            f"dtw of {tuple(distance.shape)}, {tuple(n.shape)}, {tuple(m.shape)}: "
            "give (P, N, M), (P,) and (P,)"
        )
    if not len(distance):
        return distance.new_zeros(0, dtype=torch.float32)
    for lengths, most in ((n, distance.shape[1]), (m, distance.shape[2])):
        if lengths.is_floating_point() or int(lengths.min()) < 1 or int(lengths.max()) > most:
            raise InputError(f"lengths of sequences: give integers from 1 to {most}")
    distance = distance.detach().float()
    n, m = n.to(distance.device).long(), m.to(distance.device).long()
    if distance.device.type == "cpu":
        from remanence.speech.abx import compiled  # numba takes time to import

        return compiled.dtw(distance, n, m)
    return wavefront(distance, n, m)[0]


def dtw_both_ways(distance: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Return the DTW of matrices and of their transposes; for `wavefront`'s devices."""
    forward, tied = wavefront(distance, n, m)
    backward = forward.clone()
    # Left and above change places: that makes a difference only where they were equal.
    again = tied.nonzero().squeeze(1)
    if len(again):
        backward[again], _ = wavefront(distance[again].mT, m[again], n[again])
    return forward, backward


def wavefront(distance: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Go over the anti-diagonals of all matrices together, in torch.

    Args:
        distance: As in `dtw`, float32.
        n: int64.
        m: int64.

    Returns:
        Distances (P,), and whether left and above were equal, and best, anywhere (P,).
    """
    P, N, M = distance.shape
    pairs = torch.arange(P, device=distance.device)
    result = distance.new_zeros(P)
    tied = torch.zeros(P, dtype=torch.bool, device=distance.device)
    ends = n + m - 2
    flat = distance.reshape(P, N * M)
    # Diagonal k holds the cells (i, k - i). Position i + 1 of a diagonal is row i; position 0 is
    # the border. Before (0, 0) lies a path of no length and no cost.
    border = distance.new_full((P, N + 1), torch.inf)
    cost, length = border, torch.zeros_like(border)
    cost_before, length_before = border.clone(), torch.zeros_like(border)
    cost_before[:, 0] = 0
    for k in range(int(ends.max()) + 1):
        first, last = max(0, k - M + 1), min(N - 1, k)
        rows = torch.arange(first, last + 1, device=distance.device)
        here = flat[:, rows * M + (k - rows)]
        this, above = slice(first + 1, last + 2), slice(first, last + 1)
        left, up, diagonal = cost[:, this], cost[:, above], cost_before[:, above]
        best = torch.minimum(left, up)
        straight = diagonal <= best
        tied |= ((left == up) & ~straight).any(1)
        steps = torch.where(left <= up, length[:, this], length[:, above])
        steps = torch.where(straight, length_before[:, above], steps) + 1
        total = torch.where(straight, diagonal, best) + here
        ending = ends == k
        own = pairs[ending], n[ending] - 1 - first
        result[ending] = total[own] / steps[own]
        around = (first + 1, N - 1 - last)
        cost_before, length_before = cost, length
        cost, length = pad(total, around, value=torch.inf), pad(steps, around)
    return result, tied
