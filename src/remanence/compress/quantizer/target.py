"""What a layer should compute once the layers below it are quantised.

The paper clusters a layer's own weight on inputs that the quantised layers below have damaged. The
rows here aim at the output of the float network instead: a least-squares problem whose moments are
those of both networks' inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from remanence.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from remanence.compress.quantizer.moments import Moments


def teacher_target(rows: Tensor, moments: Moments, damping: float = 0.01) -> Tensor:
    """Return the rows that map the student's inputs to the teacher's outputs best.

    W' = W + W (H_ts - H)(H + lambda I)^-1 minimises E||W x_t - W' x_s||^2 + lambda ||W' - W||^2,
    for H = E[x_s x_s^T] and H_ts = E[x_t x_s^T].

    Args:
        rows: The float network's rows W (Co, R).
        moments: Moments with teacher rows.
        damping: lambda as a share of the mean diagonal of H, 0 or more; at 0 a singular H fails.

    Returns:
        Rows W' (Co, R), in the type of `rows`; `rows` themselves where no signal arrives.

    Raises:
        InputError: The moments lack a teacher, the shapes differ, or H is singular.
    """
    _check(rows, moments)
    if not moments.crosses:
        raise InputError("the moments hold no teacher rows: give them to Moments.add")
    if damping < 0:
        raise InputError(f"damping {damping} is negative: give 0.01 or so")
    target = rows.detach().double().reshape(moments.layout.groups, -1, rows.shape[1]).clone()
    seconds = [second.to(rows.device) for second in moments.seconds]
    strength = damping * mean_diagonal(seconds)
    if strength == 0 and not any(bool(second.any()) for second in seconds):
        return rows
    for piece, second, cross in zip(moments.pieces, seconds, moments.crosses, strict=True):
        pull = target[..., piece] @ (cross.to(rows.device) - second)
        second.diagonal(dim1=1, dim2=2).add_(strength)
        factor, failed = torch.linalg.cholesky_ex(second)
        if bool(failed.any()):
            raise InputError("the input moments are singular: raise the damping, 0.01 for instance")
        target[..., piece] += torch.cholesky_solve(pull.mT, factor).mT
    return target.reshape(rows.shape).to(rows.dtype)


def bias_correction(rows: Tensor, decoded: Tensor, moments: Moments) -> Tensor:
    """Return what to add to the bias so that the mean output is the float network's.

    W mu_teacher - W_hat mu_student; without teacher rows (W - W_hat) mu.

    Args:
        rows: The float network's rows W (Co, R), not the teacher target.
        decoded: The quantised rows W_hat (Co, R).
        moments: Moments of the layer's inputs.

    Returns:
        One number a row (Co,), in the type of `rows`. The rows of a transposed convolution are
        output channels times kernel positions, of which each meets every input pixel: sum a
        channel's and multiply by input pixels over output pixels.

    Raises:
        InputError: The shapes differ.
    """
    _check(rows, moments)
    _check(decoded, moments)
    groups = moments.layout.groups
    student = moments.mean.to(rows.device)
    teacher = moments.teacher_mean
    teacher = student if teacher is None else teacher.to(rows.device)
    shape = (groups, -1, rows.shape[1])
    wanted = rows.detach().double().reshape(shape) @ teacher.unsqueeze(2)
    given = decoded.detach().double().reshape(shape) @ student.unsqueeze(2)
    return (wanted - given).flatten().to(rows.dtype)


def mean_diagonal(seconds: list[Tensor]) -> float:
    """Return the mean of the diagonals of second moments (G, r, r) of one layer."""
    diagonals = torch.cat([second.diagonal(dim1=1, dim2=2).flatten() for second in seconds])
    return diagonals.mean().item()


def _check(rows: Tensor, moments: Moments) -> None:
    wanted = (moments.layout.rows, moments.layout.row_length)
    if tuple(rows.shape) != wanted:
        raise InputError(f"rows of shape {tuple(rows.shape)} for a layer of {wanted}")
