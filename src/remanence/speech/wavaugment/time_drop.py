"""Time dropping: stretches of a wave are silenced, or noise takes their place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.speech.wavaugment.graph import found
from remanence.speech.wavaugment.waves import as_waves


def time_drop(
    wave: Tensor,
    starts: Tensor | int,
    durations: Tensor | int,
    *,
    edge: int = 0,
    noise: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Silence stretches, in all channels together.

    Args:
        wave: floats (T,), (C, T) or (B, C, T).
        starts: first silent samples, integers 0 or more: a number, (B,), or (B, K) for K stretches.
        durations: samples that are silent, of the same shape; 0 drops nothing.
        edge: samples of a raised-cosine slope before and after each stretch.
        noise: (B, T) floats of variance 1 to put in, at the RMS of what each stretch loses, slopes
            included; silence where None.
        lengths: valid samples of each row, (B,).

    Returns:
        The wave's shape, dtype and device. Differentiable in the wave.

    Raises:
        InputError: starts or durations that are negative, fractional or of another shape.
    """
    waves = as_waves(wave, lengths)
    batch, _, time = waves.wave.shape
    first, count = (
        whole_samples(name, value, batch)
        for name, value in (("starts", starts), ("durations", durations))
    )
    if first.shape != count.shape:
        raise InputError(
            f"starts are {tuple(first.shape)} and durations {tuple(count.shape)}: give one of each"
        )
    if edge < 0:
        raise InputError(f"edge {edge} is negative: give samples, 0 for none")
    if noise is not None and noise.shape != (batch, time):
        raise InputError(f"noise has shape {tuple(noise.shape)}: give {(batch, time)}")
    clock = torch.arange(time, device=wave.device)
    valid = waves.valid()[:, 0]
    power = waves.wave.double().square().mean(1)  # (B, T)
    gain = torch.ones(batch, time, dtype=wave.dtype, device=wave.device)
    fill = torch.zeros(batch, time, dtype=torch.float64, device=wave.device)
    for begin, span in zip(first.to(wave.device).T, count.to(wave.device).T, strict=True):
        end = (begin + span)[:, None]
        away = torch.maximum(begin[:, None] - clock, clock - end + 1).clamp(0, edge + 1)
        slope = 0.5 - 0.5 * torch.cos(math.pi / (edge + 1) * away.double())
        slope = torch.where(span[:, None] > 0, slope, 1)
        gain = gain * slope.to(gain.dtype)
        if noise is not None:
            lost = (slope < 1) & valid
            level = (power * lost).sum(1, keepdim=True) / lost.sum(1, keepdim=True).clamp(min=1)
            fill = fill * slope + (1 - slope) * _root(level) * noise.to(fill)
    out = waves.wave * gain[:, None]
    return waves.restore(out if noise is None else out + fill[:, None].to(out.dtype))


def _root(power: Tensor) -> Tensor:
    """The square root, with a gradient at 0."""
    return torch.where(power > 0, power, 1).sqrt() * (power > 0)


def whole_samples(name: str, value: Tensor | int, batch: int) -> Tensor:
    """(B, K) int64."""
    whole = torch.as_tensor(value)
    if whole.ndim < 2:
        whole = whole.reshape(-1, 1)
        whole = whole.expand(batch, 1) if len(whole) == 1 else whole
    if whole.is_floating_point() or whole.ndim != 2 or len(whole) != batch or found(whole < 0):
        raise InputError(f"{name} must be whole samples, 0 or more, ({batch},) or ({batch}, K)")
    return whole.long()
