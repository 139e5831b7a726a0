"""MATT, the Taylor attack on a model's parameters (arXiv 1908.11229, Section 4.3).

The posterior of the parameters without a sample z is taken as Gaussian around a reference theta0
that never saw z, with precision Lambda; adding z moves its centre by -u, u = H^-1 g, where
g = grad l(theta0, z) and H is the Hessian of the loss summed over the training set. With
delta = theta - theta0 the log ratio of the two Gaussians at the audited theta is

    s(z) = -(delta' Lambda u + u' Lambda u / 2),

which for Lambda = H / T is -(delta' g + g' H^-1 g / 2) / T. Its first term needs no Hessian, and
no gradient per sample either: delta' g is the derivative of the losses along delta.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from remanence.audit.membership.loss_vector import (
    Batches,
    LossVector,
    PerSampleLoss,
    State,
    cross_entropy,
    finite_scores,
    loss_vector,
    moved,
    positive_factor,
)
from remanence.errors import InputError

Posterior = Literal["boltzmann", "isotropic", "diag"]


class LineageWarning(UserWarning):
    """The reference does not descend from the same initialisation as the audited model."""


@dataclass(frozen=True)
class Lineage:
    """How far an audited model lies from its reference.

    Both figures are over the weights of two or more dimensions where there are any: biases and
    normalisation scales begin equal in every run and would hide the difference.

    Attributes:
        norm_ratio: |theta - theta0| / |theta|. For unrelated initialisations it is above 1.
        half_cosine: Cosine between theta less the mean of the first half of the references and
            theta less the mean of the second; None with one reference. Near 0, the difference is
            made by the references and not by the audited model.
    """

    norm_ratio: float
    half_cosine: float | None

    @property
    def shared(self) -> bool:
        """Whether the two look like descendants of one set of weights."""
        return self.norm_ratio <= 1 and (self.half_cosine is None or self.half_cosine > 0.1)


def matt(
    model: nn.Module,
    references: State | Sequence[State],
    batches: Batches,
    *,
    loss: PerSampleLoss = cross_entropy,
    parameters: Callable[[str], bool] | None = None,
    order: Literal[1, 2] = 1,
    posterior: Posterior = "boltzmann",
    temperature: float = 1.0,
    training_batches: Batches | None = None,
    damping: float | None = None,
    max_parameters: int = 10_000,
) -> NDArray[np.float64]:
    """Score samples by the log ratio of two Gaussian posteriors of the parameters.

    The first order of the Boltzmann posterior, -(theta - theta0)' grad l(theta0, z), is the
    published attack: one forward-mode pass, whatever the size of the model. Everything else needs
    the exact Hessian at theta0, and is for convex models and small heads.

    The attack is meant for convex models, linear heads, and fine-tuning from a common checkpoint
    (theta0 is then the checkpoint, or a sibling fine-tuned from it). Between independently
    initialised deep networks theta - theta0 means nothing: that raises a `LineageWarning`.

    Args:
        model: the audited module with parameters theta, in evaluation mode.
        references: state dict theta0 of a model that was trained without the samples, or several
            of the same lineage, which are averaged. Buffers are taken from them too.
        batches: inputs (B, ...) and targets (B, ...) to score, in order.
        loss: outputs and targets to losses (B,).
        parameters: names of the parameters that take part; by default all. The others stay at
            theta0.
        order: 1 drops u' Lambda u / 2, 2 keeps it.
        posterior: precision Lambda: `boltzmann` is H / T, `isotropic` is I / T (the stationary law
            of SGD near a minimum, arXiv 2406.11544), `diag` is the diagonal of H over T.
        temperature: T, positive.
        training_batches: the samples that theta0 was trained on, for H.
        damping: added to the diagonal of H wherever H stands; 0 must be asked for.
        max_parameters: bound on the number of parameters for which H is formed.

    Returns:
        Scores (N,); higher is more member-like.

    Raises:
        InputError: a reference's names or shapes differ from the model's, the model is in training
            mode, the scores are not finite, or the Hessian is needed and its samples or damping
            are missing, it is too large, or it is not positive definite.
    """
    if posterior not in get_args(Posterior):
        raise InputError(f"posterior {posterior!r} is unknown: give one of {get_args(Posterior)}")
    if order not in (1, 2):
        raise InputError(f"order {order} is unknown: give 1 or 2")
    if not temperature > 0:
        raise InputError(f"temperature {temperature} is not positive: give 1.0")
    states = _states(references)
    _check(model, states)
    lineage = _lineage(model, states, parameters)
    if not lineage.shared:
        warnings.warn(
            f"the reference lies {lineage.norm_ratio:.2f} times the model's norm away: unless the "
            "model is convex, give a reference with the same initialisation",
            LineageWarning,
            stacklevel=2,
        )
    theta, _ = loss_vector(model, loss, parameters)
    theta0, losses = loss_vector(model, loss, parameters, state=_mean(states))
    delta = theta - theta0

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
        direction, factor, precision = delta, None, None
        if order == 2 or posterior != "boltzmann":
            hessian = _damped_hessian(losses, theta0, training_batches, damping, max_parameters)
            factor = positive_factor(hessian)
            precision = {
                "boltzmann": hessian,
                "isotropic": torch.eye(len(hessian)).to(hessian),
                "diag": hessian.diagonal().diag(),
            }[posterior]
            if posterior != "boltzmann":
                direction = _solve(factor, precision @ delta.double()).to(delta)
        scores = []
        for x, y in moved(batches, theta0.device):
            score = -_directional(losses, theta0, direction, x, y)
            if order == 2:
                assert factor is not None
                assert precision is not None
                shift = _solve(factor, losses.gradients(theta0, x, y).T)  # (P, B)
                score -= (shift * (precision @ shift)).sum(dim=0) / 2
            scores.append(score / temperature)
    return finite_scores(scores)


def lineage(
    model: nn.Module,
    references: State | Sequence[State],
    *,
    parameters: Callable[[str], bool] | None = None,
) -> Lineage:
    """Compare an audited model with the references of `matt`; arguments as there."""
    states = _states(references)
    _check(model, states)
    return _lineage(model, states, parameters)


def _directional(
    losses: LossVector, theta: Tensor, direction: Tensor, x: Tensor, y: Tensor
) -> Tensor:
    derivative: Tensor = jvp(lambda t: losses(t, x, y), (theta,), (direction,))[1]
    return derivative.detach().double()


def _solve(factor: Tensor, right: Tensor) -> Tensor:
    columns = right.unsqueeze(1) if right.ndim == 1 else right
    return torch.cholesky_solve(columns, factor).reshape(right.shape)


def _damped_hessian(
    losses: LossVector,
    theta: Tensor,
    training_batches: Batches | None,
    damping: float | None,
    max_parameters: int,
) -> Tensor:
    if training_batches is None or damping is None:
        raise InputError("this score needs a Hessian: give training_batches and damping")
    if len(theta) > max_parameters:
        raise InputError(
            f"{len(theta):,} parameters are too many for an exact Hessian (bound "
            f"{max_parameters:,}): choose fewer with `parameters`, or use order=1"
        )
    hessian = losses.hessian(theta, training_batches)
    return hessian + damping * torch.eye(len(theta)).to(hessian)


def _states(references: State | Sequence[State]) -> list[State]:
    states = [references] if isinstance(references, Mapping) else list(references)
    if not states:
        raise InputError("there is no reference: give at least one state dict")
    return states


def _check(model: nn.Module, states: Sequence[State]) -> None:
    expected = {name: value.shape for name, value in model.state_dict().items()}
    for state in states:
        for name, shape in expected.items():
            if name not in state:
                raise InputError(f"the reference lacks {name}: give one of the same architecture")
            if state[name].shape != shape:
                raise InputError(
                    f"the reference's {name} is {tuple(state[name].shape)}, the model's "
                    f"{tuple(shape)}: give one of the same architecture"
                )
        extra = sorted(set(state) - set(expected))
        if extra:
            raise InputError(
                f"the model lacks the reference's {extra[0]}: give one of the same architecture"
            )


def _mean(states: Sequence[State]) -> dict[str, Tensor]:
    return {
        name: torch.stack([state[name] for state in states]).mean(dim=0)
        if value.is_floating_point()
        else value
        for name, value in states[0].items()
    }


def _lineage(
    model: nn.Module, states: Sequence[State], parameters: Callable[[str], bool] | None
) -> Lineage:
    chosen = [p for p in model.named_parameters() if parameters is None or parameters(p[0])]
    weights = [p for p in chosen if p[1].ndim > 1] or chosen

    def flat(state: State) -> Tensor:
        return torch.cat([state[name].detach().double().flatten().cpu() for name, _ in weights])

    theta = flat(dict(weights))
    ratio = ((theta - flat(_mean(states))).norm() / theta.norm()).item()
    if len(states) == 1:
        return Lineage(ratio, None)
    middle = len(states) // 2
    first, second = (theta - flat(_mean(half)) for half in (states[:middle], states[middle:]))
    return Lineage(ratio, nn.functional.cosine_similarity(first, second, dim=0).item())
