"""Frequency dropping: several bands of a wave are rejected at once."""

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.speech.wavaugment.band_reject import reject_taps
from remanence.speech.wavaugment.waves import as_waves, fast_length, fir


def frequency_drop(
    wave: Tensor,
    sample_rate: float,
    low_hz: Tensor,
    high_hz: Tensor,
    *,
    attenuation: float = 120.0,
    transition_hz: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Reject K bands of each example: `band_reject` K times, as one filter.

    Args:
        wave: floats (T,), (C, T) or (B, C, T).
        sample_rate: Hz.
        low_hz: (B, K) lower edges, 0 or more; best on the CPU.
        high_hz: (B, K) upper edges, below half the rate; no band where both edges are equal.
        attenuation: see `band_reject`.
        transition_hz: see `band_reject`.
        lengths: valid samples of each row, (B,).

    Returns:
        The wave's shape, dtype and device, not delayed. Differentiable in the wave.

    Raises:
        InputError: edges of another shape or out of range.
    """
    waves = as_waves(wave, lengths)
    batch = len(waves.wave)
    low, high = (torch.as_tensor(edge, dtype=torch.float64) for edge in (low_hz, high_hz))
    if low.ndim != 2 or low.shape != high.shape or len(low) != batch:
        raise InputError(
            f"low_hz are {tuple(low.shape)} and high_hz {tuple(high.shape)}: give ({batch}, K)"
        )
    bands = low.shape[1]
    none = low == high
    # A band that stands in where there is none, to be replaced.
    low, high = low.masked_fill(none, 0), high.masked_fill(none, sample_rate / 4)
    taps = reject_taps(
        sample_rate,
        low.flatten(),
        high.flatten(),
        attenuation=attenuation,
        transition_hz=transition_hz,
    ).view(batch, bands, -1)
    middle = taps.shape[-1] // 2
    through = torch.arange(taps.shape[-1], device=taps.device) == middle
    taps = torch.where(none[:, :, None], through.to(taps.dtype), taps)
    whole = bands * 2 * middle + 1
    length = fast_length(whole)
    cascade = torch.fft.irfft(torch.fft.rfft(taps, length).prod(1), length)[:, :whole]
    return waves.restore(fir(waves.wave, cascade[:, None].to(wave.device), bands * middle))
