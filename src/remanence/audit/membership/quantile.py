"""Quantile regression attack (arXiv 2307.03694): a threshold per sample without reference models.

On samples that the audited model is known not to have seen, regress its signal t (the hinge) on
the sample x. What the regression says of the signal of x as a non-member is the threshold of x: t
above the quantile of level 1 - alpha is taken for membership, at a false positive rate of alpha.

Two heads:

    gaussian  (mu(x), log sigma(x)), fitted by log sigma + exp(-2 log sigma) (t - mu)^2 / 2
    pinball   41 quantiles q_j(x) of the levels 1 - 10^-u_j with u_j from 0 to 4, fitted by the sum
              over j of max(level (t - q), (level - 1) (t - q))
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from torch import Tensor, nn

from remanence.errors import InputError

Head = Literal["gaussian", "pinball"]

EXPONENTS = torch.linspace(0, 4, 41, dtype=torch.float64)  # u: a level is 1 - 10^-u
OUTPUTS: dict[Head, int] = {"gaussian": 2, "pinball": 41}


class QuantileNetwork(nn.Module):
    """A perceptron of two hidden layers on standardised inputs, for features or small images.

    Args:
        x: inputs (M, ...) whose mean and spread standardise each value.
        outputs: number of outputs.
        width: of the hidden layers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, x: Tensor, outputs: int, width: int = 64) -> None:
        super().__init__()
        flat = x.flatten(1).float()
        self.register_buffer("mean", flat.mean(dim=0))
        std = flat.std(dim=0)
        # A constant column tells nothing, and must not explode where it is not constant.
        self.register_buffer("std", torch.where(std > 1e-6, std, torch.inf))
        self.layers = nn.Sequential(
            nn.Linear(flat.shape[1], width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (B, ...) to outputs (B, outputs)."""
        output: Tensor = self.layers((x.flatten(1).float() - self.mean) / self.std)
        return output


@dataclass(frozen=True)
class QuantileModel:
    """A fitted law of non-members' signals given the sample.

    Attributes:
        network: From inputs (B, ...) to 2 or 41 outputs for the standardised signal.
        head: `gaussian` or `pinball`.
        centre: Mean of the signals it was fitted on; predictions are in units of the signal.
        spread: Their standard deviation.
    """

    network: nn.Module
    head: Head
    centre: float
    spread: float

    def predict(self, x: Tensor, batch: int = 4096) -> NDArray[np.float64]:
        """Columns (mu, sigma) of shape (N, 2), or ascending quantiles of shape (N, 41)."""
        device = next(self.network.parameters()).device
        self.network.eval()
        with torch.no_grad():
            parts = [self.network(part.to(device)).double().cpu() for part in torch.split(x, batch)]
        output = torch.cat(parts).numpy()
        if self.head == "gaussian":
            mu = self.centre + self.spread * output[:, 0]
            return np.stack([mu, self.spread * np.exp(output[:, 1])], axis=1)
        # Quantiles that cross are sorted, which never makes them worse (arXiv 0704.3649).
        return self.centre + self.spread * np.sort(output, axis=1)

    def score(self, x: Tensor, t: ArrayLike) -> NDArray[np.float64]:
        """Membership scores of samples x (N, ...) with signals t (N,).

        Gaussian: (t - mu) / sigma. Pinball: the exponent u for which t is the quantile of level
        1 - 10^-u, interpolated between the 41 and continued beyond them in units of their
        distance from first to last.

        Returns:
            Scores (N,); higher is more member-like.

        Raises:
            InputError: t does not fit x or is not finite.
        """
        signals = _check(x, t)
        predicted = self.predict(x)
        if self.head == "gaussian":
            return np.asarray((signals - predicted[:, 0]) / predicted[:, 1])
        u, rows, gap = EXPONENTS.numpy(), np.arange(len(signals)), 1e-12 * self.spread
        upper = (predicted <= signals[:, None]).sum(axis=1).clip(1, len(u) - 1)
        low, high = predicted[rows, upper - 1], predicted[rows, upper]
        share = ((signals - low) / np.maximum(high - low, gap)).clip(0, 1)
        inside = u[upper - 1] + share * (u[upper] - u[upper - 1])
        first, last = predicted[:, 0], predicted[:, -1]
        beyond = np.maximum(signals - last, 0) + np.minimum(signals - first, 0)
        return np.asarray(inside + u[-1] * beyond / np.maximum(last - first, gap))

    def threshold(self, false_positive_rate: float) -> float:
        """The score at which a non-member is taken for a member at this rate.

        Raises:
            InputError: the rate is not in (0, 1), or below 1e-4 for the pinball head.
        """
        least = 0.0 if self.head == "gaussian" else 1e-4
        if not max(least, 1e-300) <= false_positive_rate < 1:
            raise InputError(f"rate {false_positive_rate} cannot be set: give {least:g} to 1")
        if self.head == "gaussian":
            return float(norm.isf(false_positive_rate))
        return float(-np.log10(false_positive_rate))


def fit_quantiles(
    x: Tensor,
    t: ArrayLike,
    *,
    head: Head = "gaussian",
    network: nn.Module | None = None,
    epochs: int = 60,
    batch_size: int = 256,
    lr: float = 2e-3,
    weight_decay: float = 1e-4,
    validation: float = 0.15,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> QuantileModel:
    """Fit the law of the signal of samples that the audited model has not seen.

    AdamW with a cosine schedule; the epoch with the least loss on a held-out part is kept, since
    an overfitted regression gives thresholds that are too tight.

    Args:
        x: non-members (M, ...): images, or features. Where the law should know the class, append
            it one-hot to features.
        t: their signals (M,), by default of the paper the hinge: the label's logit less the
            largest other.
        head: `gaussian` or `pinball`.
        network: from inputs (B, ...) to (B, 2) or (B, 41); by default a small perceptron. It is
            copied, not changed.
        epochs: number of passes.
        batch_size: samples a step.
        lr: learning rate at the start.
        weight_decay: of AdamW.
        validation: held-out part, in (0, 1).
        seed: of the split, the order and the default network's weights.
        device: by default that of `x`.
        progress: called as (epochs done, held-out loss).

    Raises:
        InputError: fewer than 30 samples on either side of the split, signals that do not fit x,
            are not finite or all equal, or a network with a wrong number of outputs.
    """
    if head not in get_args(Head):
        raise InputError(f"head {head!r} is unknown: give one of {get_args(Head)}")
    signals = torch.from_numpy(_check(x, t)).float()
    n_held = int(len(x) * validation)
    if min(n_held, len(x) - n_held) < 30:
        raise InputError(
            f"{len(x)} non-members are too few to fit and hold out {validation:.0%}: "
            "give at least 30 to each part"
        )
    centre, spread = signals.mean().item(), signals.std().item()
    if not spread > 0:
        raise InputError("all the signals are equal: check the model's output")
    target = x.device if device is None else torch.device(device)
    x, standard = x.to(target), ((signals - centre) / spread).to(target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator).to(target)
    held, own = order[:n_held], order[n_held:]

    with torch.random.fork_rng([target] if target.type == "cuda" else []):
        torch.manual_seed(seed)
        net = QuantileNetwork(x[own], OUTPUTS[head]) if network is None else copy.deepcopy(network)
        net = net.to(target)
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay)
        steps = epochs * -(-len(own) // batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        best, kept = float("inf"), copy.deepcopy(net.state_dict())
        for epoch in range(epochs):
            net.train()
            shuffled = own[torch.randperm(len(own), generator=generator).to(target)]
            for index in torch.split(shuffled, batch_size):
                loss = quantile_loss(net(x[index]), standard[index], head).mean()
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
            net.eval()
            with torch.no_grad():
                losses = [
                    quantile_loss(net(x[index]), standard[index], head)
                    for index in torch.split(held, batch_size)
                ]
            held_loss = torch.cat(losses).mean().item()
            if held_loss < best:
                best, kept = held_loss, copy.deepcopy(net.state_dict())
            if progress is not None:
                progress(epoch + 1, held_loss)
    if best == float("inf"):
        raise InputError("the held-out loss is not finite: lower lr or check the inputs")
    net.load_state_dict(kept)
    return QuantileModel(net.eval(), head, centre, spread)


def quantile_loss(output: Tensor, t: Tensor, head: Head) -> Tensor:
    """Loss (B,) of outputs (B, 2) or (B, 41) for signals t (B,).

    Raises:
        InputError: the number of outputs is not the head's.
    """
    if output.shape != (len(t), OUTPUTS[head]):
        raise InputError(
            f"the network gives shape {tuple(output.shape)} for {len(t)} samples: "
            f"give it {OUTPUTS[head]} outputs"
        )
    if head == "gaussian":
        mu, log_sigma = output.T
        nll: Tensor = log_sigma + (-2 * log_sigma).exp() * (t - mu).square() / 2
        return nll
    level = (1 - 10**-EXPONENTS).to(output)
    gap = t[:, None] - output
    return torch.maximum(level * gap, (level - 1) * gap).sum(dim=1)


def _check(x: Tensor, t: ArrayLike) -> NDArray[np.float64]:
    signals = np.asarray(t, dtype=np.float64)
    if signals.shape != (len(x),):
        raise InputError(f"signals of shape {signals.shape} for {len(x)} samples: give one each")
    if not np.isfinite(signals).all():
        where = int(np.flatnonzero(~np.isfinite(signals))[0])
        raise InputError(f"the signal of sample {where} is not finite: check the model's output")
    return signals
