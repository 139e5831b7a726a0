"""The training objective on two copies of the same windows (arXiv 2007.00991, Section 4).

c = LSTM(enc(past));  z = enc(future);  predictions from c;  positives and negatives from z
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from remanence.errors import InputError

if TYPE_CHECKING:
    from remanence.speech.cpc.loss import CPCLoss
    from remanence.speech.cpc.model import CPC


def cpc_losses(
    model: CPC,
    loss: CPCLoss,
    past: Tensor,
    future: Tensor,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the accuracy of each step ahead.

    Where both copies are one tensor it is encoded once, else both together.

    Args:
        model: The network.
        loss: Its loss.
        past: What is predicted from (B, T).
        future: What is predicted, and where negatives come from (B, T), aligned with `past`.
        generator: Draws negatives.

    Returns:
        Cross-entropies (K,), whose sum is minimised, and shares of positives that score highest
        (K,).

    Raises:
        InputError: The copies differ in shape, or are too short to predict in.
    """
    if past.shape != future.shape:
        raise InputError(
            f"past is {tuple(past.shape)} and future {tuple(future.shape)}: augment by effects "
            "that leave the length as it is"
        )
    if past is future:
        z_past = z = model.encode(past)
    else:
        z_past, z = model.encode(torch.cat((past, future))).chunk(2)
    frames = z.shape[1] - int(model.config["steps"])
    if frames < 1:
        raise InputError(
            f"windows of {z.shape[1]} frames leave nothing to predict {model.config['steps']} "
            "ahead from: give longer windows or fewer steps"
        )
    c, _ = model.context(z_past)
    losses, accuracies = loss(model.predict(c[:, :frames]), z, generator)
    return losses, accuracies


class Contrast(nn.Module):
    """Network and loss as one module, as distributed training wraps one.

    Args:
        model: The network.
        loss: Its loss.
    """

    def __init__(self, model: CPC, loss: CPCLoss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(
        self, past: Tensor, future: Tensor | None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `cpc_losses`; `future` is None where both copies are one."""
        # Wrappers may copy what they pass on, so that one tensor given twice would be two.
        return cpc_losses(
            self.model, self.loss, past, past if future is None else future, generator
        )


@dataclass(frozen=True)
class Schedule:
    """The learning rate by step: a linear rise, then constant, halved now and then.

    It rises at each step; the code released with arXiv 2007.00991 rises once an epoch.

    Attributes:
        peak: After the rise.
        ramp: Steps of the rise; 0 for none.
        halve: Epochs after which it is halved, again and again; None for never.
    """

    peak: float
    ramp: int = 0
    halve: int | None = None

    def rate(self, step: int, epoch: int = 0) -> float:
        """Return the learning rate of a step, both counted from 0."""
        rising = min(1.0, (step + 1) / self.ramp) if self.ramp else 1.0
        return self.peak * rising * 0.5 ** (epoch // self.halve if self.halve else 0)
