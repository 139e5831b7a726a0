"""k-means in which every block position has its own metric.

The paper's metric (arXiv 1907.05686, section 3.2) is one d x d matrix for all blocks. Here a block
at position b is measured by its own diagonal block H_bb of the input's second moment; a codeword is
then no longer the mean of its blocks, but the solution of a d x d system.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remanence.compress.quantizer.float16 import round_to_float16

if TYPE_CHECKING:
    from collections.abc import Iterator

SCORES = 2**18  # scores held at a time on a processor, so that they stay in its cache
TOLERANCE = 1e-4  # stop when three iterations gain less than this share


@dataclass(frozen=True)
class Blocks:
    """A layer's blocks by position, and what it costs to change them.

    Attributes:
        points: Blocks (p, n, d) of p positions, over all groups, and n rows, in the float type to
            search in.
        metrics: H_bb of each position (p, d, d), float64, positive definite.
        weights: Weight of each block (p, n), float64; None for 1 each.
    """

    points: Tensor
    metrics: Tensor
    weights: Tensor | None = None

    def chunks(self, codewords: int) -> Iterator[slice]:
        """Yield runs of positions whose scores fit in memory together."""
        room = SCORES if self.points.device.type == "cpu" else 256 * SCORES
        step = max(1, room // (self.points.shape[1] * codewords))
        yield from (slice(s, s + step) for s in range(0, len(self.points), step))


@dataclass(frozen=True)
class Found:
    """Where a search stands.

    Attributes:
        codebook: Codewords (K, d), float32, of values that float16 holds at `exponent`.
        exponent: See `Quantised`.
        codes: Code of each block (p, n), int64.
        objective: Value after each half step; never rises.
    """

    codebook: Tensor
    exponent: int
    codes: Tensor
    objective: tuple[float, ...]


def block_kmeans(blocks: Blocks, codebook: Tensor, iterations: int) -> Found:
    """Alternate assignment and least squares in the positions' own metrics.

    The codebook is rounded to float16 after every update, so that the codes are always those of
    what is stored; an update that gains less than the rounding loses is not made.

    Args:
        blocks: The blocks and their metrics.
        codebook: Codewords to start from (K, d).
        iterations: Most updates of the codebook.

    Returns:
        The codebook, the nearest codes and the objective: sum of (w - c)^T H_bb (w - c).
    """
    codebook, exponent = round_to_float16(codebook)
    codes = _assign(blocks, codebook)
    errors = _errors(blocks, codebook, codes)
    objective = [errors.sum().item()]
    for _ in range(iterations):
        moved = _fill_empty(codes, errors, len(codebook))
        better, scale = round_to_float16(_update(blocks, codebook, moved))
        value = _errors(blocks, better, moved).sum().item()
        if value >= objective[-1]:
            break
        codebook, exponent, codes = better, scale, moved
        objective.append(value)
        chosen = _assign(blocks, codebook)
        errors = _errors(blocks, codebook, chosen)
        value = errors.sum().item()
        if value > objective[-1]:
            break  # nothing is left but rounding
        codes = chosen
        objective.append(value)
        before = objective[max(len(objective) - 7, 0)]
        if len(objective) > 6 and before - value < TOLERANCE * before:
            break
    return Found(codebook, exponent, codes, tuple(objective))


def first_largest(scores: Tensor) -> Tensor:
    """Return the place of the largest score along the last axis, the first of equals."""
    if scores.device.type == "cpu":  # numpy's search is vectorised, torch's is not
        return torch.from_numpy(scores.numpy().argmax(-1))
    return scores.argmax(-1)


def norms(codewords: Tensor, metrics: Tensor) -> Tensor:
    """Return c^T H c for codewords (K, d) and metrics (..., d, d): (..., K), all in one type."""
    pairs = (codewords.unsqueeze(2) * codewords.unsqueeze(1)).flatten(1)
    return metrics.flatten(-2) @ pairs.T


def solve(matrices: Tensor, right: Tensor) -> Tensor:
    """Solve positive definite systems (K, d, d) for right sides (K, d); 0 where a matrix is 0."""
    unused = matrices.diagonal(dim1=1, dim2=2).sum(1) == 0
    eye = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
    matrices = torch.where(unused[:, None, None], eye, matrices)
    factor, failed = torch.linalg.cholesky_ex(matrices)
    if bool(failed.any()):  # inputs that hardly vary: what is left of their metric is rounding
        values, vectors = torch.linalg.eigh(matrices[failed > 0])
        values = values.clamp_min(1e-6 * values[:, -1:])
        factor[failed > 0] = torch.linalg.cholesky((vectors * values.unsqueeze(1)) @ vectors.mT)
    return torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2)


def code_metrics(blocks: Blocks, codes: Tensor, codewords: int) -> Tensor:
    """Return the sum of the metrics of each codeword's blocks (K, d, d), float64."""
    p, d = len(blocks.points), blocks.points.shape[2]
    places = torch.arange(p, device=codes.device).unsqueeze(1) * codewords + codes
    weights = None if blocks.weights is None else blocks.weights.flatten()
    counts = torch.bincount(places.flatten(), weights, minlength=p * codewords).double()
    return (counts.reshape(p, codewords).T @ blocks.metrics.flatten(1)).reshape(-1, d, d)


def _assign(blocks: Blocks, codebook: Tensor) -> Tensor:
    """Nearest codeword of each block: the largest c^T H w - c^T H c / 2.

    Both sides are centred: differences between codewords far from 0 would drown in rounding.
    """
    dtype = blocks.points.dtype
    centre = codebook.double().mean(0)
    words = codebook.double() - centre
    halves = (norms(words, blocks.metrics) / 2).to(dtype)  # (p, K)
    turned, metrics = words.T.to(dtype).contiguous(), blocks.metrics.to(dtype)
    codes = torch.empty(blocks.points.shape[:2], dtype=torch.int64, device=turned.device)
    for run in blocks.chunks(len(codebook)):
        pulls = (blocks.points[run] - centre.to(dtype)) @ metrics[run]  # (b, n, d)
        codes[run] = first_largest((pulls @ turned).sub_(halves[run].unsqueeze(1)))
    return codes


def _errors(blocks: Blocks, codebook: Tensor, codes: Tensor) -> Tensor:
    """Weighted error of each block (p, n), float64, without cancellation."""
    errors = torch.empty(codes.shape, dtype=torch.float64, device=codes.device)
    words = codebook.double()
    for run in blocks.chunks(len(codebook)):
        off = blocks.points[run].double() - words[codes[run]]
        errors[run] = (off @ blocks.metrics[run]).mul_(off).sum(2)
    return errors if blocks.weights is None else errors * blocks.weights


def _update(blocks: Blocks, codebook: Tensor, codes: Tensor) -> Tensor:
    """Best codebook for given codes, float64; an unused codeword stays.

    Solved for the change, whose right side is the sum of H_bb (w - c): what rounding costs is then
    in proportion to the change.
    """
    words = codebook.double()
    right = torch.zeros_like(words)
    for run in blocks.chunks(len(codebook)):
        off = blocks.points[run].double() - words[codes[run]]
        pull = off @ blocks.metrics[run]
        if blocks.weights is not None:
            pull *= blocks.weights[run].unsqueeze(2)
        right.index_add_(0, codes[run].flatten(), pull.flatten(0, 1))
    return words + solve(code_metrics(blocks, codes, len(words)), right)


def _fill_empty(codes: Tensor, errors: Tensor, codewords: int) -> Tensor:
    """Hand the blocks with the largest errors to codewords that have none (section 3.2)."""
    empty = (torch.bincount(codes.flatten(), minlength=codewords) == 0).nonzero().flatten()
    if not len(empty):
        return codes
    order = errors.flatten().argsort(descending=True, stable=True)[: len(empty)]
    order = order[errors.flatten()[order] > 0]
    moved = codes.flatten().clone()
    moved[order] = empty[: len(order)]
    return moved.reshape(codes.shape)
