"""IHA, the Inverse Hessian Attack (arXiv 2406.11544), for an auditor who knows the training set.

How the score comes about. Let L0 be the mean loss of the N training samples other than z, and
L1 = L0 + l(., z) / N. Near a minimum of Hessian H, SGD of learning rate eta and momentum mu, whose
gradient noise has covariance proportional to H, is stationary with precision proportional to
2 I - eta H / (1 + mu) around the minimum (Liu, Ziyin and Ueda, arXiv 2012.03636). The displacement
of the audited theta from the minimum of Li is H^-1 grad Li(theta), so with g = grad l(theta, z),
G0 = grad L0(theta), u = H^-1 g and d = H^-1 G0 it is d without z, and d + u / N with it. The log
ratio of the two Gaussians at theta is then, up to a positive factor,

    l(theta, z) / (1 + mu) - (I2 + I3) / eta - N (min L1 - min L0) / (1 + mu),
    I2 = |u|^2 / N,  I3 = 2 d . u,

and the attack drops the last term, which needs a retrained model. Weight decay w makes the Hessian
of the objective K = H + w I, with which u and d are computed, and the score, to first order in w,

    l / (1 + mu) - (1 - eta w / (1 + mu)) (I2 + I3) / eta - w (I4 + I5) / eta,
    I4 = u . K^-1 u / N,  I5 = 2 d . K^-1 u.

Damping is added to the diagonal of K.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.func import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from remanence.audit.membership.loss_vector import (
    Batches,
    PerSampleLoss,
    cross_entropy,
    finite_scores,
    loss_vector,
    moved,
    positive_factor,
)
from remanence.errors import InputError


def inverse_hessian_attack(
    model: nn.Module,
    training_batches: Batches,
    batches: Batches,
    in_training: ArrayLike,
    *,
    learning_rate: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    damping: float = 0.2,
    loss: PerSampleLoss = cross_entropy,
    parameters: Callable[[str], bool] | None = None,
    max_exact: int = 10_000,
    tolerance: float = 1e-5,
    max_iterations: int = 1_000,
) -> NDArray[np.float64]:
    """Score samples by the log ratio of two stationary laws of SGD.

    The question asked of each sample is a leave-one-out one: all the other training samples are
    known, was this one there too? G0 must therefore leave the sample out where `training_batches`
    holds it, which `in_training` says. The answer does enter the score by that: the attack bounds
    what an auditor can see, and is no attack for an outsider.

    Args:
        model: the audited module, in evaluation mode.
        training_batches: all training samples, inputs (B, ...) and targets (B, ...); read many
            times.
        batches: the M samples to score, in order.
        in_training: (M,) bool, whether `training_batches` holds the sample.
        learning_rate: of the training, at its end.
        momentum: of the training.
        weight_decay: of the training.
        damping: added to the diagonal of the Hessian of the mean loss; 0.2 in the paper.
        loss: outputs and targets to losses (B,).
        parameters: names of the parameters that take part; by default all.
        max_exact: up to so many parameters the Hessian is formed and factored; above, systems are
            solved by conjugate gradients, of which every iteration is a pass over the training set
            for each sample of a batch. Memory is a few float64 vectors of parameters a sample of
            a batch, so keep `batches` small for large models.
        tolerance: relative residual of conjugate gradients.
        max_iterations: of conjugate gradients.

    Returns:
        Scores (M,); higher is more member-like.

    Raises:
        InputError: shapes or options do not fit, the training batches can be read only once, the
            damped Hessian is not positive definite, conjugate gradients do not converge, or a
            score is not finite.
    """
    if not learning_rate > 0:
        raise InputError(f"learning_rate {learning_rate} is not positive: give that of training")
    if iter(training_batches) is training_batches:
        raise InputError("training_batches can be read only once: give a list or a DataLoader")
    held = torch.from_numpy(np.asarray(in_training))
    if held.ndim != 1 or held.dtype != torch.bool:
        raise InputError(
            f"in_training is {held.dtype} of shape {tuple(held.shape)}: give (M,) bool"
        )
    theta, losses = loss_vector(model, loss, parameters)
    diagonal = weight_decay + damping

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivatives
        count, total = 0, torch.zeros(len(theta), dtype=torch.float64, device=theta.device)
        for x, y in moved(training_batches, theta.device):
            count += len(x)
            total += grad(lambda t, x=x, y=y: losses(t, x, y).sum())(theta).double()
        if count < 2:
            raise InputError(f"{count} training samples are too few: give at least 2")

        solve: Callable[[Tensor], Tensor]
        if len(theta) <= max_exact:
            hessian = losses.hessian(theta, training_batches) / count
            factor = positive_factor(hessian + diagonal * torch.eye(len(theta)).to(hessian))

            def solve(rows: Tensor) -> Tensor:
                return torch.cholesky_solve(rows.T, factor).T
        else:

            def product(rows: Tensor) -> Tensor:
                curved = losses.hessian_products(theta, rows, training_batches) / count
                return curved + diagonal * rows

            def solve(rows: Tensor) -> Tensor:
                return conjugate_gradients(product, rows, tolerance, max_iterations)

        mean = solve((total / count)[None])[0]  # (P,): K^-1 of the gradient of all N samples
        scores, seen = [], 0
        for x, y in moved(batches, theta.device):
            member = held[seen : seen + len(x)].to(theta.device)
            seen += len(x)
            if len(member) < len(x):
                break
            values = losses(theta, x, y).detach().double()
            u = solve(losses.gradients(theta, x, y))  # (B, P)
            d = torch.where(member[:, None], (count * mean - u) / (count - 1), mean)
            score = values / (1 + momentum)
            scale = 1 - learning_rate * weight_decay / (1 + momentum)
            score -= scale * _i2_and_i3(u, d, u, count) / learning_rate
            if weight_decay:
                score -= weight_decay * _i2_and_i3(u, d, solve(u), count) / learning_rate
            scores.append(score)
    if seen != len(held):
        raise InputError(f"in_training has {len(held)} entries for other samples: give one each")
    return finite_scores(scores)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, tolerance: float, max_iterations: int
) -> Tensor:
    """Solve A x = b for every row b of `right` (R, P) at once, A symmetric positive definite.

    Args:
        product: rows (R, P) to A times each row.
        right: right-hand sides.
        tolerance: largest |b - A x| / |b|.
        max_iterations: bound on the iterations.

    Returns:
        Solutions (R, P).

    Raises:
        InputError: A is not positive definite, or the bound is reached.
    """
    x = torch.zeros_like(right)
    residual = right.clone()
    direction = residual
    squared = residual.square().sum(dim=1)
    goal = tolerance**2 * squared
    for _ in range(max_iterations):
        active = squared > goal
        if not active.any():
            return x
        along = product(direction)
        curvature = (direction * along).sum(dim=1)
        if not (curvature[active] > 0).all():
            raise InputError("the damped Hessian is not positive definite: raise damping")
        step = torch.where(active, squared / curvature, 0)[:, None]
        x = x + step * direction
        residual = residual - step * along
        now = residual.square().sum(dim=1)
        direction = residual + torch.where(active, now / squared, 0)[:, None] * direction
        squared = now
    if (squared > goal).any():
        raise InputError(
            f"conjugate gradients have not converged in {max_iterations} iterations: "
            "raise max_iterations or damping"
        )
    return x


def _i2_and_i3(u: Tensor, d: Tensor, v: Tensor, count: int) -> Tensor:
    """Rows' u . v / N + 2 d . v, (B,)."""
    return (u * v).sum(dim=1) / count + 2 * (d * v).sum(dim=1)
