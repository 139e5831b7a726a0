"""The per-sample losses of a module as a function of its parameters, with their derivatives.

What the white-box attacks share.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

from remanence.errors import InputError

Batches = Iterable[tuple[Tensor, Tensor]]
State = Mapping[str, Tensor]
PerSampleLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LossVector:
    """The per-sample losses of a module as a function of one flat vector of parameters.

    Attributes:
        model: The module.
        loss: Outputs (B, ...) and targets (B, ...) to losses (B,).
        shapes: Names and shapes of the P free parameters, in the order of the flat vector.
        fixed: The other parameters and the buffers, by name.
    """

    model: nn.Module
    loss: PerSampleLoss
    shapes: dict[str, torch.Size]
    fixed: dict[str, Tensor]

    def __call__(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Losses (B,) at `theta` (P,) of inputs (B, ...) and targets (B, ...)."""
        pieces = torch.split(theta, [shape.numel() for shape in self.shapes.values()])
        free = {
            name: piece.view(shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }
        outputs = functional_call(self.model, {**self.fixed, **free}, (x,))
        losses: Tensor = self.loss(outputs, y)
        if losses.shape != x.shape[:1]:
            raise InputError(
                f"loss gives shape {tuple(losses.shape)} for {len(x)} samples: "
                "give a loss per sample, without reduction"
            )
        return losses

    def hessian_products(self, theta: Tensor, vectors: Tensor, batches: Batches) -> Tensor:
        """Hessian of the loss summed over batches, times every row of `vectors` (R, P)."""
        total = torch.zeros_like(vectors)
        for x, y in moved(batches, theta.device):
            gradient = grad(lambda t, x=x, y=y: self(t, x, y).sum())
            along = vmap(lambda v, g=gradient: jvp(g, (theta,), (v,))[1], chunk_size=128)
            total += along(vectors.to(theta)).detach()
        return total

    def hessian(self, theta: Tensor, batches: Batches) -> Tensor:
        """Hessian (P, P) of the loss summed over batches, in float64."""
        identity = torch.eye(len(theta), dtype=torch.float64, device=theta.device)
        total = self.hessian_products(theta, identity, batches)
        return (total + total.T) / 2

    def gradients(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Gradients (B, P) of the loss of every sample, in float64."""
        jacobian: Tensor = jacrev(lambda t: self(t, x, y))(theta)
        return jacobian.double()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses (B,) of logits (B, C), or of binary logits (B,) or (B, 1), and labels (B,)."""
    if logits.ndim == 1 or logits.shape[1] == 1:
        logits = logits.reshape(len(labels))
        return nn.functional.binary_cross_entropy_with_logits(
            logits, labels.to(logits), reduction="none"
        )
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def loss_vector(
    model: nn.Module,
    loss: PerSampleLoss,
    parameters: Callable[[str], bool] | None = None,
    *,
    state: State | None = None,
) -> tuple[Tensor, LossVector]:
    """Split a module, or a state of it, into a flat vector (P,) and its loss function.

    Raises:
        InputError: no parameter is chosen, they are of several types, or the model is in training
            mode.
    """
    if model.training:
        raise InputError("the model is in training mode: call model.eval()")
    values = {
        name: (state or {}).get(name, value).detach().to(value)
        for name, value in (*model.named_parameters(), *model.named_buffers())
    }
    chosen = [
        name for name, _ in model.named_parameters() if parameters is None or parameters(name)
    ]
    if not chosen:
        raise InputError("no parameter is chosen: let `parameters` accept at least one name")
    if len({values[name].dtype for name in chosen}) > 1:
        raise InputError("the parameters are of several types: convert the model with .float()")
    shapes = {name: values[name].shape for name in chosen}
    fixed = {name: value for name, value in values.items() if name not in shapes}
    theta = torch.cat([values[name].flatten() for name in chosen])
    return theta, LossVector(model, loss, shapes, fixed)


def positive_factor(hessian: Tensor) -> Tensor:
    """Cholesky factor (P, P) of a damped Hessian.

    Raises:
        InputError: it is not positive definite.
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if failed.item() or not bool(factor.isfinite().all()):
        least = torch.linalg.eigvalsh(hessian.nan_to_num())[0].item()
        raise InputError(
            f"the damped Hessian is not positive definite (least eigenvalue {least:.2g}): "
            f"raise damping by more than {max(-least, 1e-6):.2g}"
        )
    return factor


def moved(batches: Batches, device: torch.device) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield the batches on a device."""
    for x, y in batches:
        yield x.to(device), y.to(device)


def finite_scores(scores: Sequence[Tensor]) -> NDArray[np.float64]:
    """Join scores of batches (B,) to (N,).

    Raises:
        InputError: there are none, or some are not finite.
    """
    if not scores:
        raise InputError("there is no sample to score: give at least one batch")
    joined = torch.cat(list(scores)).double().cpu().numpy()
    if not np.isfinite(joined).all():
        where = int(np.flatnonzero(~np.isfinite(joined))[0])
        raise InputError(f"the score of sample {where} is not finite: check the model's output")
    return np.asarray(joined, dtype=np.float64)
