"""Resampling by any ratio, each clip of a batch by its own, at a cost that no ratio changes.

Output sample n is the input's value at position q = n step, in input samples. "quick" is the cubic
of the program sox (`rate -q`), on the same clock of 32 fractional bits. "high" is a Kaiser-windowed
sinc of the band and attenuation of sox's default,

    y(q) = sum_k x[k] F sinc(F (q - k)) kaiser((q - k) / L),   F = 0.9568 scale,  L = 101.0 / scale

for scale = min(1, 1 / step): flat to 0.914 of the lower Nyquist frequency, 132 dB down from there.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from scipy.integrate import cumulative_simpson
from scipy.special import i0
from torch import Tensor
from torch.nn import functional

from remanence.errors import InputError
from remanence.speech.wavaugment.graph import constant
from remanence.speech.wavaugment.waves import chunked, fast_length, fits, next_fast

Quality = Literal["high", "quick"]
CUTOFF = 0.95681386  # 6 dB down, as a share of the lower Nyquist frequency
HALF_LENGTH = 101.025  # of the sinc, in samples of the lower rate
BETA = 13.7053  # of the Kaiser window: 132.4 dB
FRACTION_BITS = 32
ONE: int = 2**FRACTION_BITS
OFFSETS = np.linspace(-0.06, 0.06, 8193)  # of the transition's frequencies from the cutoff
START, SPACING = CUTOFF + float(OFFSETS[0]), float(OFFSETS[1] - OFFSETS[0])


def check_quality(quality: str) -> None:
    """Raise InputError unless a quality is one of those above."""
    if quality not in get_args(Quality):
        raise InputError(f"quality {quality!r} is unknown: give one of {get_args(Quality)}")


def resample_at(
    wave: Tensor,
    steps: Tensor,
    n_out: int,
    *,
    quality: Quality = "high",
    widest: float | None = None,
) -> Tensor:
    """Read each clip every `steps` samples.

    Args:
        wave: (B, C, T) float32 or float64; there are zeros before and after.
        steps: (B,) float64 at `home`, positive, in input samples per output sample.
        n_out: samples to return; a clip's own end lies at T / step.
        quality: `high` or `quick`, see above. `quick` does not keep high frequencies from aliasing.
        widest: what no step exceeds; the largest of them where None.

    Returns:
        (B, C, n_out). What lies more than a filter's length past a clip's end is undefined.

    Raises:
        InputError: `quality` is unknown.
    """
    check_quality(quality)
    if quality == "quick":
        return _cubic(wave, steps, n_out)
    if fits(wave):
        from remanence.speech.wavaugment.interpolation import interpolated  # imports numba

        return interpolated(wave, steps, n_out)
    return _sinc(wave, steps, n_out, steps.max().item() if widest is None else widest)


def _cubic(wave: Tensor, steps: Tensor, n_out: int) -> Tensor:
    batch, channels, n_samples = wave.shape
    clock = torch.floor(steps * ONE + 0.5).long().to(wave.device)[:, None, None]
    # One zero before the clip, and behind it enough for every later position.
    padded = functional.pad(wave, (1, 3))

    def interpolated(part: slice) -> Tensor:
        ticks = clock[part] * torch.arange(n_out, device=wave.device)
        x = (ticks & (ONE - 1)).double().div(ONE).to(wave.dtype)
        first = (ticks >> FRACTION_BITS).clamp(max=n_samples).expand(-1, channels, -1)
        before, s0, s1, s2 = (padded[part].gather(2, first + tap) for tap in range(4))
        b = (s1 + before) / 2 - s0
        a = (s2 - s1 + before - s0 - 4 * b) / 6
        c = s1 - s0 - a - b
        return ((a * x + b) * x + c) * x + s0

    return chunked(batch, channels * n_out, wave.device, interpolated)


def _sinc(wave: Tensor, steps: Tensor, n_out: int, widest: float) -> Tensor:
    """Filter in the frequency domain, then evaluate the Fourier series at n step.

    The series sum_k Y_k exp(2 pi i k n step / N) is a chirp z-transform: by Bluestein's identity
    2 k n = k^2 + n^2 - (n - k)^2 it is a convolution with a chirp, three transforms of fixed size.
    The filter is 132 dB down wherever its sampling could alias, so this is its sum to rounding.
    """
    channels, n_samples = wave.shape[1:]
    widest = max(2, math.ceil(widest))  # rounded up: clips alike share their shapes
    # The series repeats after n_fft samples: the filter must not reach across.
    n_fft = fast_length(n_samples + math.ceil(HALF_LENGTH * widest))
    n_bins = n_fft // 2  # the filter's gain at the Nyquist frequency is nothing
    n_chirp = next_fast(n_bins + n_out - 1, real=False)
    step = steps.to(wave.device)[:, None]

    def evaluated(part: slice) -> Tensor:
        return _evaluate(wave[part], step[part], n_out, (n_fft, n_bins, n_chirp))

    return chunked(len(wave), channels * n_chirp, wave.device, evaluated)


def _evaluate(wave: Tensor, steps: Tensor, n_out: int, lengths: tuple[int, int, int]) -> Tensor:
    n_fft, n_bins, n_chirp = lengths
    gain = _response(2 / n_fft * torch.arange(n_bins, device=wave.device) * steps.clamp(min=1))
    gain[:, 1:] *= 2  # each bin stands for its conjugate too
    gain = (gain / n_fft).to(wave.dtype)  # (B, K)

    # Turns of exp(i pi step m^2 / N), whole ones dropped while the numbers are still exact.
    m = torch.arange(max(n_bins, n_out), device=wave.device, dtype=torch.float64)
    half_turns = (steps / n_fft) * m.square()
    angle = (half_turns - 2 * torch.floor(half_turns / 2)).mul(math.pi).to(wave.dtype)
    chirp = torch.complex(angle.cos(), angle.sin())  # (B, max(K, n_out))

    kernel = chirp.new_zeros(len(chirp), n_chirp)
    kernel[:, :n_out] = chirp[:, :n_out].conj()
    kernel[:, n_chirp - n_bins + 1 :] = chirp[:, 1:n_bins].conj().flip(1)
    bins = torch.fft.rfft(wave, n_fft)[..., :n_bins] * (gain * chirp[:, :n_bins])[:, None]
    product = torch.fft.fft(bins, n_chirp) * torch.fft.fft(kernel)[:, None]
    series = torch.fft.ifft(product)[..., :n_out]
    turned = chirp[:, None, :n_out]
    out: Tensor = series.real * turned.real - series.imag * turned.imag
    return out


def _response(frequency: Tensor) -> Tensor:
    """The filter's gain at frequencies given as shares of the lower Nyquist frequency."""
    table = constant(_gains, frequency.device)
    at = ((frequency - START) / SPACING).clamp(0, len(table) - 2)
    low = at.long()
    gain: Tensor = table[low].lerp(table[low + 1], (at - low).clamp(max=1))
    return gain


def _gains() -> Tensor:
    return transition()[0]


@lru_cache(maxsize=1)
def transition() -> tuple[Tensor, float, float]:
    """The gain over the transition band: table, first frequency, spacing.

    A product in time is a convolution in frequency: the ideal step at the cutoff, smoothed by the
    Kaiser window's transform L / I0(beta) 2 sinh(r) / r, r^2 = beta^2 - (pi L f)^2.
    """
    root = np.emath.sqrt(BETA**2 - (math.pi * HALF_LENGTH * OFFSETS) ** 2)
    window = HALF_LENGTH / i0(BETA) * (np.sinh(root) / root).real
    passed = cumulative_simpson(window, x=OFFSETS, initial=0)
    gain = 1 - passed / passed[-1]
    return torch.from_numpy(gain), START, SPACING
