"""Resampling on the processor, of float32 waves, as `resampling` defines it under "high".

A non-uniform Fourier transform. In the frequency domain a clip is low-passed and its rate doubled;
at twice the rate a Kaiser window of eight taps is enough to read between the samples, as what the
window does to the band is undone beforehand. 135 dB below white noise it is the sum of sincs.

Import this only where it is about to run: numba takes time to import.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy.fft import irfft, rfft
from scipy.special import i0

from remanence.kernels import in_threads
from remanence.speech.wavaugment.compiled import PHASES, REACH, SHARE, interpolate
from remanence.speech.wavaugment.resampling import HALF_LENGTH, transition
from remanence.speech.wavaugment.waves import fast_length

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Floats = NDArray[np.float32]

BETA = 0.97 * 1.5 * math.pi * REACH  # the least folds back from the doubled rate
BLOCK_REACHES = 10  # of the low-pass in a block: more costs cache, fewer costs overlap


def interpolated(wave: Tensor, steps: Tensor, n_out: int) -> Tensor:
    """Read each clip every `steps` samples.

    Args:
        wave: (B, C, T) float32 on the CPU; there are zeros before and after.
        steps: (B,) float64 on the CPU, positive, in input samples per output sample.
        n_out: samples to return.

    Returns:
        (B, C, n_out), without a gradient.
    """
    waves = wave.detach().numpy()
    out = np.empty((*waves.shape[:2], n_out), np.float32)
    weights = _weights()

    def run(start: int, stop: int) -> None:
        for row, step in enumerate(steps[start:stop].tolist(), start):
            doubled = _doubled(waves[row], step, n_out)
            interpolate(doubled, 2 * REACH, 2 * step, weights, out[row])

    in_threads(run, len(out), wave.numel() // SHARE)
    return torch.from_numpy(out)


def _doubled(wave: Floats, step: float, n_out: int) -> Floats:
    """A clip (C, T) at twice its rate, low-passed, from REACH samples before its start on."""
    reach = math.ceil(HALF_LENGTH * max(1, step))
    wave = wave[:, : math.ceil(n_out * step) + reach]
    channels, time = wave.shape
    whole = time + 2 * REACH
    n_fft = fast_length(min(whole, BLOCK_REACHES * reach) + 2 * reach)
    hop = n_fft - 2 * reach
    blocks = -(-whole // hop)
    padded = np.zeros((channels, 2 * reach + blocks * hop), np.float32)
    padded[:, reach + REACH : reach + REACH + time] = wave
    framed = sliding_window_view(padded, n_fft, axis=1)[:, ::hop]  # (C, blocks, N)
    spectrum = rfft(framed) * _gain(n_fft, max(1, step))
    # A block's first and last samples have folded over.
    kept = irfft(spectrum, 2 * n_fft)[..., 2 * reach : 2 * (reach + hop)]
    return np.ascontiguousarray(kept.reshape(channels, -1), np.float32)


def _gain(n_fft: int, step: float) -> Floats:
    """Of the low-pass for a step of at least 1, the doubling, and the undoing: (N // 2 + 1,)."""
    gain = _undoing(n_fft).copy()
    passed, start, spacing = transition()
    bins = n_fft / 2 / step  # to the lower Nyquist frequency
    first = math.ceil(start * bins)
    last = min(math.ceil((start + spacing * len(passed)) * bins), len(gain))
    at = (np.arange(first, last) / bins - start) / spacing
    gain[first:last] *= np.interp(at, np.arange(len(passed)), passed.numpy())
    gain[last:] = 0
    return gain


@lru_cache(maxsize=64)
def _undoing(n_fft: int) -> Floats:
    """Twice one over the window's response, at the frequencies of n_fft samples."""
    frequency = np.arange(n_fft // 2 + 1) / (2 * n_fft)  # in turns a sample at twice the rate
    root = np.sqrt(BETA**2 - (2 * math.pi * REACH * frequency) ** 2)
    response = 2 * REACH / i0(BETA) * np.sinh(root) / root
    undoing: Floats = (2 / response).astype(np.float32)
    return undoing


@lru_cache(maxsize=1)
def _weights() -> Floats:
    """The window around each place between two samples: (PHASES + 1, 2 REACH)."""
    distance = np.arange(PHASES + 1)[:, None] / PHASES + REACH - 1 - np.arange(2 * REACH)
    window = i0(BETA * np.sqrt(np.clip(1 - (distance / REACH) ** 2, 0, None))) / i0(BETA)
    weights: Floats = window.astype(np.float32)
    return weights
