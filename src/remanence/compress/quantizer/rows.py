"""Product quantisation of one layer (arXiv 1907.05686, section 3).

Every metric writes the same thing, codes and a codebook; they differ in what they hold dear:

- `plain`: the weights, sum ||w - c||^2;
- `shared`: the paper's metric, sum (w - c)^T G (w - c), one G for all blocks;
- `block`: the same with each position's own diagonal block of the input's second moment H;
- `full`: the layer's output, tr(E H E^T).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from remanence.compress.quantised import Quantised
from remanence.compress.quantizer.block_metric import Blocks, block_kmeans
from remanence.compress.quantizer.float16 import round_to_float16
from remanence.compress.quantizer.full_metric import Rows, full_descent
from remanence.compress.quantizer.kmeans import (
    kmeans,
    nearest,
)
from remanence.compress.quantizer.moments import Moments
from remanence.compress.quantizer.target import mean_diagonal
from remanence.errors import InputError
from remanence.modes import exact_products

if TYPE_CHECKING:
    from torch import Tensor

    from remanence.compress.layout import Layout

Metric = Literal["plain", "shared", "block", "full"]

INITIAL = 8  # iterations that start `full`: its descent undoes what more of them would settle
SHARED_DAMPING = 1e-4  # a d x d matrix summed over all positions needs no more


@dataclass(frozen=True)
class QuantisedRows:
    """A quantised layer and how far it is from the float one.

    Attributes:
        quantised: Codes and codebook.
        objective: What the search minimised, after each of its half steps; it never rises. In the
            damped metric; `plain` and `shared` count codewords before they are rounded to float16,
            `block` and `full` those that are stored, and `full` only its descent.
        output_error: tr(E H E^T) / tr(W H W^T), undamped; the weight error without moments.
        weight_error: ||E||^2 / ||W||^2.
        no_signal: No input ever reached the layer: its weights were quantised as if inputs were
            white.
    """

    quantised: Quantised
    objective: tuple[float, ...]
    output_error: float
    weight_error: float
    no_signal: bool = False


def quantize_rows(
    rows: Tensor,
    block: int,
    codewords: int,
    *,
    moments: Moments | None,
    metric: Metric,
    layout: Layout,
    rounds: int = 4,
    iterations: int = 25,
    restarts: int = 1,
    anneal: bool = False,
    damping: float = 1e-2,
    row_weights: Tensor | None = None,
    init: Literal["kmeans++", "random"] | Tensor = "kmeans++",
    seed: int = 0,
) -> QuantisedRows:
    """Quantise the rows of a layer.

    Where no more than K blocks are distinct they become the codebook, and what is left is the
    rounding to float16: nothing for a layer that was quantised before.

    Args:
        rows: W (Co, R), or the teacher target; searched in float64 where it is float64, else in
            float32.
        block: Weights in a block d, a divisor of R.
        codewords: Codewords K, at least 1.
        moments: Moments of the layer's inputs; may be None for `plain`.
        metric: See the module.
        layout: How the weight is cut into rows.
        rounds: Most rounds of descent of `full`.
        iterations: Most iterations of k-means, and of `block`; at most 8 of each start `full`.
        restarts: Runs of k-means, of which the best goes on.
        anneal: Noise on the blocks during k-means.
        damping: Added to the diagonal of H for `block` and `full`, as a share of its mean; in
            (0, 1].
        row_weights: Weight of each row (Co,), not negative; token frequencies of an embedding.
        init: Start of k-means.
        seed: For that start.

    Returns:
        The quantised layer.

    Raises:
        InputError: The shapes do not fit, a value is not finite, or an argument is out of range.
    """
    _check(rows, block, codewords, moments, metric, layout, damping, row_weights)
    work = rows.detach()
    work = work if work.dtype == torch.float64 else work.float()
    weights = None
    if row_weights is not None:
        weights = row_weights.detach().to(work.device, torch.float64)
    no_signal = moments is not None and not bool(moments.blocks(block).any())
    seen = Moments.identity(layout, block) if no_signal else moments
    iterations = min(iterations, INITIAL) if metric == "full" else iterations
    shared = None
    if metric != "plain":
        assert seen is not None
        shared = seen.shared(block).to(work.device)
        shared.diagonal().add_(SHARED_DAMPING * shared.diagonal().mean())

    with torch.no_grad(), exact_products():
        points = work.reshape(-1, block)
        start = kmeans(
            points,
            codewords,
            metric=shared,
            weights=None if weights is None else weights.repeat_interleave(work.shape[1] // block),
            init=init,
            iterations=iterations,
            restarts=restarts,
            anneal=anneal,
            seed=seed,
        )
        objective = start.objective
        if metric in ("plain", "shared") or objective[-1] == 0:
            codebook, exponent = round_to_float16(start.centroids)
            codes = start.codes
            if objective[-1] > 0:
                codes = nearest(points, codebook, metric=shared)
        else:
            assert seen is not None
            problem, blocks = _damped(work, seen, block, damping, weights)
            found = block_kmeans(blocks, start.centroids, iterations)
            if metric == "full" and len(blocks.points) > layout.groups:
                found = full_descent(problem, blocks, found, rounds)
            codebook, exponent, objective = found.codebook, found.exponent, found.objective
            codes = found.codes.reshape(layout.groups, -1, found.codes.shape[1]).mT
        codes = codes.reshape(layout.rows, -1).contiguous()
        quantised = Quantised(layout, codes, codebook.float(), exponent)
        decoded = quantised.rows()
        weight_error = _share(
            (work.double() - decoded.double()).square().sum(), work.double().square().sum()
        )
        error = weight_error if moments is None else output_error(work, decoded, moments)
    return QuantisedRows(quantised, objective, error, weight_error, no_signal)


def output_error(
    rows: Tensor, decoded: Tensor, moments: Moments, *, centred: bool = False
) -> float:
    """Return how much of the layer's output is lost, tr(E H E^T) / tr(W H W^T).

    Args:
        rows: W (Co, R); products are float64 where it is float64, else float32.
        decoded: W_hat (Co, R).
        moments: Moments of the layer's inputs; where they are in pieces, products between two
            pieces are left out.
        centred: Take the mean input out of H: what is left after the bias was corrected.

    Returns:
        Relative error, 0 or more; that of the weights where no signal arrives.

    Raises:
        InputError: The shapes differ.
    """
    layout = moments.layout
    wanted = (layout.rows, layout.row_length)
    if tuple(rows.shape) != wanted or tuple(decoded.shape) != wanted:
        raise InputError(
            f"rows {tuple(rows.shape)} and decoded rows {tuple(decoded.shape)} for a layer of "
            f"{wanted}"
        )
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    original = rows.detach().double().reshape(layout.groups, -1, layout.row_length)
    off = original - decoded.detach().double().reshape(original.shape)
    lost, whole = original.new_zeros(()), original.new_zeros(())
    with torch.no_grad(), exact_products():
        for piece, given in zip(moments.pieces, moments.seconds, strict=True):
            second = given.to(rows.device)
            if centred:
                mean = moments.mean[:, piece].to(rows.device)
                second = second - mean.unsqueeze(2) * mean.unsqueeze(1)
            second = second.to(dtype)
            lost += _energy(off[..., piece], second)
            whole += _energy(original[..., piece], second)
    if not whole > 0:
        return _share(off.square().sum(), original.square().sum())
    return _share(lost, whole)


def _energy(rows: Tensor, second: Tensor) -> Tensor:
    return ((rows.to(second.dtype) @ second).double() * rows).sum().clamp(min=0)


def _share(part: Tensor, whole: Tensor) -> float:
    return (part / whole).item() if part > 0 else 0.0


def _damped(
    work: Tensor, moments: Moments, block: int, damping: float, weights: Tensor | None
) -> tuple[Rows, Blocks]:
    """Cut the rows by group and by position, beside the damped H."""
    layout = moments.layout
    seconds = [second.to(work.device) for second in moments.seconds]
    strength = damping * mean_diagonal(seconds)  # one for all groups: dead ones stay harmless
    for second in seconds:
        second.diagonal(dim1=1, dim2=2).add_(strength)
    grouped = work.reshape(layout.groups, -1, layout.row_length)  # (G, n, R)
    by_block = grouped.reshape(*grouped.shape[:2], -1, block)
    points = by_block.transpose(1, 2).flatten(0, 1).contiguous()  # (G m, n, d)
    metrics = moments.blocks(block).to(work.device)  # (G, m, d, d)
    metrics.diagonal(dim1=2, dim2=3).add_(strength)
    by_row = None if weights is None else weights.reshape(layout.groups, -1)
    by_position = None if by_row is None else by_row.repeat_interleave(by_block.shape[2], dim=0)
    problem = Rows(grouped, moments.pieces, tuple(seconds), by_row)
    return problem, Blocks(points, metrics.flatten(0, 1), by_position)


def _check(
    rows: Tensor,
    block: int,
    codewords: int,
    moments: Moments | None,
    metric: str,
    layout: Layout,
    damping: float,
    row_weights: Tensor | None,
) -> None:
    if metric not in get_args(Metric):
        raise InputError(f"metric {metric!r} is unknown: give one of {', '.join(get_args(Metric))}")
    if tuple(rows.shape) != (layout.rows, layout.row_length):
        raise InputError(
            f"rows of shape {tuple(rows.shape)} for a layer of {(layout.rows, layout.row_length)}"
        )
    if not bool(rows.isfinite().all()):
        raise InputError("the weight holds NaN or infinity: check the network")
    layout.check_block(block, "rows")
    if codewords < 1:
        raise InputError(f"{codewords} codewords: give at least 1")
    if not 0 < damping <= 1:
        raise InputError(f"damping {damping}: give a share above 0, at most 1, for instance 0.01")
    if row_weights is not None and row_weights.shape != rows.shape[:1]:
        raise InputError(f"{tuple(row_weights.shape)} row weights for {len(rows)} rows")
    if moments is None:
        if metric != "plain":
            raise InputError(
                f"metric {metric!r} needs moments of the inputs: give them, or 'plain'"
            )
        return
    if moments.layout != layout:
        raise InputError("the moments are those of a layer with another layout")
    if not bool(moments.blocks(block).isfinite().all()):  # the diagonal bounds the rest
        raise InputError("the input moments are not finite: inputs are too large, scale them")
