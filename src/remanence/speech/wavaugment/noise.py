"""Additive noise at a signal-to-noise ratio, measured on each example."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.speech.wavaugment.graph import found, numbers
from remanence.speech.wavaugment.waves import Waves, as_waves, fits, per_example

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
    check_mix(mix)
    if snr_db is None:
        raise InputError("snr_db is None: give the ratio in dB")
    waves = as_waves(wave, lengths)
    decibels = per_example("snr_db", snr_db, len(waves.wave), waves.wave.device)
    source, starts = _source(waves, noise, offsets, noise_lengths)
    if mix == "rms" and fits(waves.wave) and fits(source.wave) and source.wave.shape[1] == 1:
        from remanence.speech.wavaugment.compiled import mixed as compiled  # numba takes time

        rows, time = len(source.wave), source.wave.shape[-1]
        firsts = torch.arange(rows) * time if rows > 1 else torch.zeros(1, dtype=torch.int64)
        ends = source.lengths
        first, end, start = (v.expand(len(decibels)) for v in (firsts, ends, starts))
        ratio = 10 ** (-decibels / 20)
        out = compiled(waves.wave, waves.lengths, source.wave.flatten(), (first, end, start), ratio)
        return waves.restore(out)
    x, ratio = waves.wave.double(), decibels[:, None, None]
    n = _looped(waves, source, starts)
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


def check_mix(mix: str) -> None:
    """Raise InputError unless a mix is one that there is."""
    if mix not in get_args(Mix):
        raise InputError(f"mix {mix!r} is unknown: give one of {get_args(Mix)}")


def _source(
    waves: Waves, noise: Tensor, offsets: Tensor | int, noise_lengths: Tensor | None
) -> tuple[Waves, Tensor]:
    """The noise on the wave's device, checked, and where each row starts in it, (B,) or ()."""
    batch, channels, _ = waves.wave.shape
    if not isinstance(noise, Tensor):
        raise InputError(f"noise is {type(noise).__name__}: give a tensor")
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
    # Looked at where they were given: on a GPU a look waits for all that runs there.
    if noise_lengths is not None and found(torch.as_tensor(noise_lengths) < 1):
        raise InputError("noise_lengths hold 0: leave empty noise out")
    starts = numbers(offsets, rows.device)
    if starts.is_floating_point() or found(starts < 0):
        raise InputError("offsets must be whole samples, 0 or more")
    ends = source.lengths.to(rows.device)
    return Waves(rows, ends, source.shape, source.ragged), starts.to(rows.device)


def _looped(waves: Waves, source: Waves, starts: Tensor) -> Tensor:
    """The noise under each row: (B, C or 1, T) float64, zero past the wave's lengths."""
    batch, _, time = waves.wave.shape
    rows = source.wave
    ends, starts = (v.expand(batch) for v in (source.lengths, starts))
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
    rows = torch.as_tensor(voices)
    if rows.ndim != 2 or len(rows) != batch:
        raise InputError(f"voices must be ({batch}, K) rows -1..{batch - 1}")
    return sum_rows(waves.wave, rows, torch.arange(batch, device=rows.device))


def sum_rows(rows: Tensor, voices: Tensor, own: Tensor) -> Tensor:
    """Sum the voices of some rows only.

    Args:
        rows: (B, C, T) floats, zero past each row's length.
        voices: (N, K) rows at `home`, -1 for none.
        own: (N,) the row that the voices talk over, at `home`.

    Returns:
        (N, C, T).

    Raises:
        InputError: as `babble`.
    """
    batch = len(rows)
    if found((voices < -1) | (voices >= batch)):
        raise InputError(f"voices name rows outside -1..{batch - 1}: replay the batch as it was")
    if found(voices == own[:, None]):
        raise InputError("voices hold a row that would talk over itself: draw other rows")
    weights = rows.new_zeros(len(voices), batch + 1, device=voices.device)
    weights.scatter_add_(1, voices + 1, torch.ones_like(voices, dtype=rows.dtype))
    return torch.einsum("no,oct->nct", weights[:, 1:].to(rows.device), rows)


def other_rows(batch_size: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw `count` distinct other rows for each row of a batch, (B, min(count, B - 1))."""
    keys = torch.rand(batch_size, batch_size, dtype=torch.float64, generator=generator)
    keys.fill_diagonal_(2)
    return keys.argsort(1)[:, : max(0, min(count, batch_size - 1))]
