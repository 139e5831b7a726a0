"""Codes and codebook that least change the layer's output.

The error of a layer's output is tr(E H E^T), E = W - W_hat, with all of the input's second moment
H: blocks of a row then depend on each other, and an error in one is made good in the next. Both
halves of the search descend on it: coordinate descent over the codes, and least squares over the
codebook.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from remanence.compress.quantizer.block_metric import (
    Blocks,
    Found,
    code_metrics,
    first_largest,
    norms,
    solve,
)
from remanence.compress.quantizer.float16 import round_to_float16

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PANEL = 256  # columns whose residual is refreshed by one product, then kept up to date
ROWS = 1024  # rows searched at a time on a processor
SWEEPS = 3  # of coordinate descent to a round
STEPS = 3  # conjugate gradient steps of an update of the codebook: more of them gain little
RESIDUAL = 1e-2  # share of the gradient at which they stop
TOLERANCE = 1e-3  # stop when a round gains less than this share


@dataclass(frozen=True)
class Rows:
    """A layer's rows and the damped second moments of its input.

    Attributes:
        rows: W (G, n, R) in the float type to search in.
        pieces: Parts of a row, each a whole number of blocks, that H connects.
        seconds: H of each piece (G, r, r), float64, positive definite.
        weights: Weight of each row (G, n), float64; None for 1 each.
    """

    rows: Tensor
    pieces: tuple[slice, ...]
    seconds: tuple[Tensor, ...]
    weights: Tensor | None = None


def full_descent(problem: Rows, blocks: Blocks, start: Found, rounds: int) -> Found:
    """Descend on tr(E H E^T) from codes and a codebook.

    A round is coordinate descent over the codes, then least squares over the codebook, rounded to
    float16; coordinate descent also comes last, so that codes are those of the stored codewords. A
    half step that rounding would turn uphill is not made.

    Args:
        problem: Rows and moments.
        blocks: The same rows as blocks by position, with the diagonal blocks of H.
        start: Where to start.
        rounds: Most rounds.

    Returns:
        The codebook, the codes and the objective tr(E H E^T), evaluated in float64 for each choice
        of codes.
    """
    codebook, exponent = start.codebook, start.exponent
    groups = len(problem.rows)
    codes = start.codes.reshape(groups, -1, start.codes.shape[1]).mT.contiguous()  # (G, n, m)
    fast = [second.to(problem.rows.dtype) for second in problem.seconds]
    value, pull = _objective(problem, codebook, codes)
    objective = [value]
    for done in range(rounds + 1):
        before, swept = objective[-1], codes
        for _ in range(SWEEPS):
            swept = _sweep(problem, fast, codebook, swept)
        value, swept_pull = _objective(problem, codebook, swept)
        if value < before:
            codes, pull = swept, swept_pull
            objective.append(value)
        elif done:
            break  # settled
        if done == rounds or objective[-1] == 0:
            break
        better, scale, gain = _least_squares(problem, fast, blocks, codebook, codes, pull)
        if gain > 0:
            codebook, exponent = better, scale
            objective.append(objective[-1] - gain)
        if before - objective[-1] < TOLERANCE * before:
            rounds = min(rounds, done + 1)  # only the last sweeps
    by_position = codes.mT.reshape(start.codes.shape)
    return Found(codebook, exponent, by_position, tuple(objective))


def _decode(codebook: Tensor, codes: Tensor) -> Tensor:
    return codebook[codes].flatten(2)  # (G, n, R)


def _objective(problem: Rows, codebook: Tensor, codes: Tensor) -> tuple[float, Tensor]:
    """Return tr(E H E^T) and, in the search's type, E H (G, n, R)."""
    pull = torch.empty_like(problem.rows)
    total = 0.0
    weights = None if problem.weights is None else problem.weights.unsqueeze(2)
    off = problem.rows.double() - _decode(codebook.double(), codes)
    for piece, second in zip(problem.pieces, problem.seconds, strict=True):
        exact = off[..., piece] @ second
        pull[..., piece] = exact
        exact *= off[..., piece]
        total += (exact if weights is None else exact * weights).sum().item()
    return total, pull


def _sweep(problem: Rows, fast: list[Tensor], codebook: Tensor, codes: Tensor) -> Tensor:
    """Choose each block's code anew, position after position, all rows at once.

    With r = E H at a block, the best codeword there minimises (c - c_now)^T H_bb (c - c_now)
    - 2 r (c - c_now): the largest c^T (r + H_bb c_now) - c^T H_bb c / 2.
    """
    dtype, d = problem.rows.dtype, codebook.shape[1]
    # Centred: differences between codewords far from 0 would drown in rounding.
    words = codebook.double() - codebook.double().mean(0)
    turned = words.T.to(dtype).contiguous()
    words = words.to(dtype)
    room = ROWS if codes.device.type == "cpu" else 64 * ROWS
    swept = codes.clone()
    for piece, second in zip(problem.pieces, fast, strict=True):
        first, columns = piece.start // d, second.shape[1]
        width = max(PANEL // d, 1) * d
        for top in range(0, codes.shape[1], room):
            part = swept[:, top : top + room]
            off = problem.rows[:, top : top + room, piece] - _decode(
                codebook.to(dtype), part[..., first : first + columns // d]
            )  # E (G, n, r)
            for left in range(0, columns, width):
                panel = slice(left, min(left + width, columns))
                pull = off @ second[..., panel]
                local = second[:, panel, panel]
                cut = local.unfold(1, d, d).unfold(2, d, d).diagonal(dim1=1, dim2=2)
                halves = norms(words, cut.movedim(-1, 1)) / 2  # (G, blocks, K)
                for at in range(0, panel.stop - left, d):
                    block, here = slice(at, at + d), first + (left + at) // d
                    now = words[part[..., here]]  # (G, n, d)
                    aim = torch.baddbmm(pull[..., block], now, local[:, block, block])
                    chosen = first_largest((aim @ turned).sub_(halves[:, at // d].unsqueeze(1)))
                    step = words[chosen] - now
                    pull.baddbmm_(step, local[:, block], alpha=-1)
                    off[..., left + at : left + at + d] -= step
                    part[..., here] = chosen
    return swept


def _least_squares(
    problem: Rows,
    fast: list[Tensor],
    blocks: Blocks,
    codebook: Tensor,
    codes: Tensor,
    pull: Tensor,
) -> tuple[Tensor, int, float]:
    """Return the codebook that is best for given codes, its exponent, and what it gains.

    With S the matrix that decodes, the change D solves S^T (decode(D) H) = S^T (E H); conjugate
    gradients, preconditioned with the codewords' own d x d blocks. The gain is that of the rounded
    codebook, from the same quadratic.
    """
    k, d = codebook.shape
    by_position = codes.mT.reshape(blocks.points.shape[:2])
    own = code_metrics(blocks, by_position, k)
    dtype = problem.rows.dtype

    def gather(image: Tensor) -> Tensor:
        """S^T: sum the blocks of (G, n, R) by code."""
        if problem.weights is not None:
            image = image * problem.weights.unsqueeze(2)
        sums = torch.zeros(k, d, dtype=torch.float64, device=image.device)
        return sums.index_add_(0, codes.flatten(), image.double().reshape(-1, d))

    def normal(change: Tensor) -> Tensor:
        decoded = _decode(change.to(dtype), codes)
        images = [
            decoded[..., piece] @ second for piece, second in zip(problem.pieces, fast, strict=True)
        ]
        return gather(torch.cat(images, dim=2))

    right = gather(pull)
    change = conjugate_gradients(normal, right, lambda residual: solve(own, residual))
    better, exponent = round_to_float16(codebook.double() + change)
    change = better.double() - codebook.double()
    return better, exponent, (change * (2 * right - normal(change))).sum().item()


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    right: Tensor,
    precondition: Callable[[Tensor], Tensor],
) -> Tensor:
    """Solve a positive semidefinite system from 0, by a few steps.

    Args:
        operator: The matrix, as a function of tensors shaped like `right`.
        right: Right side, any shape.
        precondition: An approximate inverse of the operator.

    Returns:
        The solution; it lowers the quadratic however early it stops.
    """
    solution, residual = torch.zeros_like(right), right.clone()
    better = precondition(residual)
    direction, size = better, (residual * better).sum()
    enough = RESIDUAL**2 * size
    for _ in range(STEPS):
        if not size > enough:
            break
        image = operator(direction)
        curvature = (direction * image).sum()
        if not curvature > 0:
            break
        length = size / curvature
        solution += length * direction
        residual -= length * image
        better = precondition(residual)
        last, size = size, (residual * better).sum()
        direction = better + size / last * direction
    return solution
