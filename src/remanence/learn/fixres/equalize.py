"""Equalise the pooled activations of a new test size with those of training, without training.

arXiv 1906.06423, Section 4: a larger test crop averages over more cells, so the pooled activations
have fewer zeros and a smaller spread than the classifier has learnt from. The paper fits a
Frechet law of one fixed shape at both sizes and maps one onto the other, g = F_train^-1 o F_test.
Because the shape is shared, g is affine: it folds into the classifier and costs nothing at test.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from remanence.errors import InputError
from remanence.learn.fixres.activations import MIN_STD, Moments, moments
from remanence.learn.fixres.frechet import FitMethod, fit_frechet

EqualizerKind = Literal["frechet", "moments", "channel"]


@dataclass(frozen=True)
class Affine:
    """z -> scale * z + shift.

    Attributes:
        scale: float64 scalar, or (C,) for one factor per channel.
        shift: like `scale`.
        clamp: whether results below 0 become 0, as a rectifier would leave them.
    """

    scale: Tensor
    shift: Tensor
    clamp: bool = False

    def __call__(self, z: Tensor) -> Tensor:
        """Map embeddings (N, C, ...), in their own dtype and on their own device."""
        trailing = (-1,) + (1,) * (z.ndim - 2) if self.scale.ndim else ()
        out = z * self.scale.to(z).view(trailing) + self.shift.to(z).view(trailing)
        return out.clamp(min=0) if self.clamp else out


class Equalizer(nn.Module):
    """An `Affine` as a module between the pooling and the classifier, where it can't be folded."""

    scale: Tensor
    shift: Tensor

    def __init__(self, affine: Affine) -> None:
        super().__init__()
        self.register_buffer("scale", affine.scale.float())
        self.register_buffer("shift", affine.shift.float())
        self.clamp = affine.clamp

    def forward(self, z: Tensor) -> Tensor:
        """Embeddings (N, C, ...) -> the same shape."""
        return Affine(self.scale, self.shift, self.clamp)(z)


def fit_equalizer(
    z_train: Tensor,
    z_test: Tensor,
    kind: EqualizerKind = "frechet",
    *,
    xi: float = 0.3,
    method: FitMethod = "likelihood",
    clamp: bool = False,
) -> Affine:
    """The map that gives activations at the test size the statistics they had in training.

    `frechet` is the paper's (Section 4): F_train^-1 o F_test, an affine map because xi is shared.
    `moments` matches mean and standard deviation of all values. `channel` goes beyond the paper: it
    matches each channel's, shrunk toward `moments` by empirical Bayes. Two departures are shrunk,
    the log-ratio of standard deviations and the mean's offset in training standard deviations. Each
    is weighted by tau^2 / (tau^2 + v_c), where v_c is the channel's sampling variance and tau^2 the
    variance of the departures over channels beyond the average v_c. Both samples count as
    independent; for the same images at both sizes that shrinks a little too much.

    Args:
        z_train: pooled activations (N, C) as the classifier saw them in training.
        z_test: pooled activations (M, C) at the new test size.
        kind: `frechet`, `moments` or `channel`.
        xi: shape of the Frechet laws.
        method: how they are fitted; see `fit_frechet`.
        clamp: clamp the result at 0, where a rectifier came before; then it can't be folded.

    Returns:
        A map with scalars, or for `channel` with (C,) tensors.

    Raises:
        InputError: shapes disagree, a value is not finite, nothing varies, or an option is unknown.
    """
    for name, z in (("z_train", z_train), ("z_test", z_test)):
        if z.ndim != 2 or len(z) < 2:
            raise InputError(f"{name} has shape {tuple(z.shape)}: give (N, C) with N at least 2")
    if z_train.shape[1] != z_test.shape[1]:
        raise InputError(
            f"channels differ, {z_train.shape[1]} and {z_test.shape[1]}: use one model for both"
        )
    if kind == "frechet":
        train = fit_frechet(z_train, xi, method=method)
        test = fit_frechet(z_test, xi, method=method)
        scale = torch.tensor(train.sigma / test.sigma, dtype=torch.float64)
        return Affine(scale, train.mu - scale * test.mu, clamp)
    if kind not in get_args(EqualizerKind):
        raise InputError(f"kind {kind!r} is unknown: give one of {get_args(EqualizerKind)}")
    train_moments, test_moments = moments(z_train), moments(z_test)
    pooled = _match_pooled(train_moments, test_moments, clamp)
    return pooled if kind == "moments" else _match_channels(train_moments, test_moments, pooled)


def _match_pooled(train: Moments, test: Moments, clamp: bool) -> Affine:
    if not test.pooled_var.sqrt().item() > MIN_STD:
        raise InputError("activations at the test size do not vary: check the model's output")
    scale = (train.pooled_var / test.pooled_var).sqrt()
    return Affine(scale, train.mean.mean() - scale * test.mean.mean(), clamp)


def _match_channels(train: Moments, test: Moments, pooled: Affine) -> Affine:
    # Channels that are constant at either size say nothing of a ratio: they keep the pooled map.
    alive = (train.var > MIN_STD**2) & (test.var > MIN_STD**2)
    one = torch.ones_like(train.var)
    var_train, var_test = torch.where(alive, train.var, one), torch.where(alive, test.var, one)

    # Departure of the log-ratio of standard deviations; var(ln s) = (kurtosis - 1) / (4 N).
    log_ratio = (var_train / var_test).log() / 2 - pooled.scale.log()
    noise = (train.fourth / var_train**2 - 1) / (4 * train.n) + (test.fourth / var_test**2 - 1) / (
        4 * test.n
    )
    scale = pooled.scale * _shrunk(log_ratio, noise, alive).exp()

    # Departure of the mean from where the pooled map puts it, in training standard deviations.
    std_train = var_train.sqrt()
    offset = (train.mean - (pooled.scale * test.mean + pooled.shift)) / std_train
    noise = 1 / train.n + pooled.scale**2 * var_test / (var_train * test.n)
    target = pooled.scale * test.mean + pooled.shift + std_train * _shrunk(offset, noise, alive)
    return Affine(scale, target - scale * test.mean, pooled.clamp)


def _shrunk(departure: Tensor, noise: Tensor, alive: Tensor) -> Tensor:
    """Posterior mean of the departures (C,) under N(0, tau^2), tau^2 by the method of moments."""
    if not bool(alive.any()):
        return torch.zeros_like(departure)
    tau2 = (departure[alive] ** 2 - noise[alive]).mean().clamp(min=0)
    weight = (tau2 / (tau2 + noise).clamp(min=torch.finfo(noise.dtype).tiny)) * alive
    return weight * departure


def fold_into_head_(head: nn.Module, affine: Affine) -> None:
    """Put the map into the classifier's weights: W' = W a, b' = b + W c, at no cost at test.

    In place and exact up to the weights' rounding. A head without a bias gets one, unless the shift
    is 0.

    Args:
        head: `nn.Linear`, or `nn.Conv2d` with a 1 x 1 kernel, on C channels.
        affine: a map that is not clamped, with scalars or (C,) tensors.

    Raises:
        InputError: the head is something else, the channels differ, or the map is clamped.
    """
    if affine.clamp:
        raise InputError("a clamped map can't be folded: keep it before the head as an Equalizer")
    if isinstance(head, nn.Linear):
        channels = head.in_features
    elif (
        isinstance(head, nn.Conv2d)
        and head.kernel_size == (1, 1)
        and head.groups == 1
        and head.padding in {(0, 0), "valid", "same"}
    ):
        channels = head.in_channels
    else:
        raise InputError(f"head {type(head).__name__} can't be folded: give a Linear or 1x1 Conv2d")
    if affine.scale.ndim and len(affine.scale) != channels:
        raise InputError(
            f"the map has {len(affine.scale)} channels, the head {channels}: fit it on this model"
        )
    with torch.no_grad():
        W = head.weight.double().flatten(1)  # (classes, C)
        added = W @ affine.shift.to(W).expand(channels)
        head.weight.copy_((W * affine.scale.to(W)).view_as(head.weight))
        if head.bias is not None:
            head.bias.copy_(head.bias.double() + added)
        elif bool(affine.shift.any()):
            head.bias = nn.Parameter(added.to(head.weight.dtype))
