"""Additive noise at a signal-to-noise ratio, measured on each example."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.speech.wavaugment.waves import Waves, as_waves, per_example

Mix = Literal["rms", "wavaugment", "rms_peak"]


def add_noise(
    wave: Tensor,
    noise: Tensor,
    snr_db: float | Tensor,
    *,
    mix: Mix = "rms",
    offsets: Tensor | int = 0,
    lengths: Tensor | None = None,
    noise_lengths: Tensor | None = None,
) -> Tensor:
    """Add noise at a level relative to each example's own.

    With x the wave, n the noise, RMS over all channels and valid samples of one example:

    - `rms`: x + n RMS(x) / RMS(n) 10^(-snr/20), so that the measured ratio is `snr_db`.
    - `wavaugment`: (r x + n) / (1 + r) with r = 10^(snr/10), as the published code mixes. No level
      is measured and r weighs amplitudes: for equal levels the ratio is 2 `snr_db`. Only to
      reproduce.
    - `rms_peak`: x / RMS(x) + n / RMS(n) 10^(-snr/20), divided by its peak.

    Under `rms` and `rms_peak` silent noise, and noise on silence, leave the wave as it is.

    Args:
        wave: floats (T,), (C, T) or (B, C, T).
        noise: floats (T',), or with as many dimensions as the wave; one row and one channel serve
            all. Noise shorter than the wave starts over; what is longer is cut.
        snr_db: dB; a number or (B,).
        mix: one of the three above.
        offsets: sample of the noise at which to start; a number or (B,).
        lengths: valid samples of each row of the wave, (B,).
        noise_lengths: valid samples of each row of the noise, (B,), at least 1.

    Returns:
        The wave's shape, dtype and device. Differentiable in both.

    Raises:
        InputError: shapes, lengths or values that do not fit, or an unknown mix.
    """
    if mix not in get_args(Mix):
        raise InputError(f"mix {mix!r} is unknown: give one of {get_args(Mix)}")
    waves = as_waves(wave, lengths)
    x = waves.wave.double()
    ratio = per_example("snr_db", snr_db, len(x), x.device)[:, None, None]
    n = _looped(waves, noise, offsets, noise_lengths)
    if mix == "wavaugment":
        r = 10 ** (ratio / 10)
        return waves.restore((r * x + n) / (1 + r))

    # The ratio of two RMS over the same samples is that of the norms; what lies past them is 0.
    energy_x, energy_n = (
        signal.square().sum((1, 2), keepdim=True) / signal.shape[1] for signal in (x, n)
    )
    audible = (energy_x > 0) & (energy_n > 0)
    norm_x = torch.where(audible, energy_x, 1).sqrt()
    norm_n = torch.where(audible, energy_n, 1).sqrt()
    mixed = x + n * norm_x / norm_n * 10 ** (-ratio / 20)
    if mix == "rms_peak":
        peak = mixed.abs().amax((1, 2), keepdim=True)
        mixed = mixed / torch.where(peak > 0, peak, 1)
    return waves.restore(torch.where(audible, mixed, x))


def _looped(
    waves: Waves, noise: Tensor, offsets: Tensor | int, noise_lengths: Tensor | None
) -> Tensor:
    """The noise under each row: (B, C or 1, T) float64, zero past the wave's lengths."""
    batch, channels, time = waves.wave.shape
    if noise.ndim not in (1, len(waves.shape)):
        raise InputError(
            f"noise has shape {tuple(noise.shape)} and the wave {waves.shape}: give (T',), or as"
            " many dimensions as the wave"
        )
    source = as_waves(noise, noise_lengths)
    rows = source.wave.to(waves.wave.device)
    if rows.shape[0] not in (1, batch) or rows.shape[1] not in (1, channels):
        raise InputError(
            f"noise has {rows.shape[0]} rows of {rows.shape[1]} channels: give 1 or {batch} rows,"
            f" 1 or {channels} channels"
        )
    ends = source.lengths.to(rows.device).expand(batch)
    if bool((ends < 1).any()):
        raise InputError("noise_lengths hold 0: leave empty noise out")
    starts = torch.as_tensor(offsets, device=rows.device).expand(batch)
    if starts.is_floating_point() or bool((starts < 0).any()):
        raise InputError("offsets must be whole samples, 0 or more")
    index = (starts[:, None] + torch.arange(time, device=rows.device)) % ends[:, None]
    looped = rows.expand(batch, -1, -1).gather(-1, index[:, None].expand(-1, rows.shape[1], -1))
    return looped.double() * waves.valid()


def babble(wave: Tensor, voices: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """Sum other examples of a batch, to be mixed in as noise.

    Args:
        wave: floats (B, C, T).
        voices: (B, K) rows that talk over each row; -1 for none, never the row itself.
        lengths: valid samples of each row, (B,).

    Returns:
        (B, C, T).

    Raises:
        InputError: rows that do not exist, or a row over itself.
    """
    waves = as_waves(wave, lengths)
    batch = len(waves.wave)
    rows = torch.as_tensor(voices).to(wave.device)
    own = torch.arange(batch, device=wave.device)[:, None]
    if rows.ndim != 2 or len(rows) != batch or bool(((rows < -1) | (rows >= batch)).any()):
        raise InputError(f"voices must be ({batch}, K) rows -1..{batch - 1}")
    if bool((rows == own).any()):
        raise InputError("voices hold a row that would talk over itself: draw other rows")
    weights = torch.zeros(batch, batch + 1, dtype=wave.dtype, device=wave.device)
    weights.scatter_add_(1, rows + 1, torch.ones_like(rows, dtype=wave.dtype))
    return torch.einsum("bo,oct->bct", weights[:, 1:], waves.wave)


def other_rows(batch_size: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw `count` distinct other rows for each row of a batch, (B, min(count, B - 1))."""
    keys = torch.rand(batch_size, batch_size, dtype=torch.float64, generator=generator)
    keys.fill_diagonal_(2)
    return keys.argsort(1)[:, : max(0, min(count, batch_size - 1))]
