"""Band rejection by a linear-phase filter: `sox sinc -a 120 high-low`.

A Kaiser-windowed high-pass at the upper edge plus a low-pass at the lower edge. The transition is
400 Hz wide at 16 kHz, so that a band narrower than that is weakened, not removed.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.speech.wavaugment.graph import constant, found
from remanence.speech.wavaugment.waves import as_waves, check_rate, fir, per_example

Number = TypeVar("Number", float, Tensor)
# sox's fit of the Kaiser window's beta: a row a transition width, q = 0.0005 * 2^row of the
# cutoff; cubic coefficients in the attenuation.
BETA_CUBICS = (
    (-6.784957e-10, 1.02856e-05, 0.1087556, -0.8978365),
    (-6.897885e-10, 1.027433e-05, 0.10876, -0.8974658),
    (-1.000683e-09, 1.030092e-05, 0.1087677, -0.8977898),
    (-3.654474e-10, 1.040631e-05, 0.1087085, -0.8917766),
    (8.106988e-09, 6.983091e-06, 0.1091387, -0.9022048),
    (9.519571e-09, 7.272678e-06, 0.1090068, -0.8890768),
    (-5.626821e-09, 1.342186e-05, 0.1083999, -0.8565452),
    (-9.965946e-08, 5.073548e-05, 0.1040967, -0.6822778),
    (1.604808e-07, -5.856462e-05, 0.1185998, -1.24824),
    (-1.511964e-07, 6.363034e-05, 0.1064627, -0.8076665),
)


def band_reject(
    wave: Tensor,
    sample_rate: float,
    low_hz: float | Tensor,
    high_hz: float | Tensor,
    *,
    attenuation: float = 120.0,
    transition_hz: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Weaken the frequencies between two edges; each edge is a number or (B,) numbers.

    Args:
        wave: floats (T,), (C, T) or (B, C, T).
        sample_rate: Hz.
        low_hz: lower edge, 0 or more; 0 rejects all below `high_hz`.
        high_hz: upper edge, above `low_hz` and below half the rate.
        attenuation: 60..180 dB, of the stop band, where the band is wider than the transition.
        transition_hz: width of each slope; 5 % of half the rate where None. A real notch takes a
            small one.
        lengths: valid samples of each row, (B,).

    Returns:
        The wave's shape, dtype and device, not delayed. Differentiable in the wave.

    Raises:
        InputError: an edge is out of range.
    """
    waves = as_waves(wave, lengths)
    batch, device = len(waves.wave), waves.wave.device
    low = per_example("low_hz", low_hz, batch, device)
    high = per_example("high_hz", high_hz, batch, device)
    taps = reject_taps(sample_rate, low, high, attenuation=attenuation, transition_hz=transition_hz)
    return waves.restore(fir(waves.wave, taps[:, None], taps.shape[1] // 2))


def band_pass(
    wave: Tensor,
    sample_rate: float,
    low_hz: float | Tensor,
    high_hz: float | Tensor,
    *,
    attenuation: float = 120.0,
    transition_hz: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Keep only the frequencies between two edges: the wave less its `band_reject`.

    Takes and raises what `band_reject` does.
    """
    waves = as_waves(wave, lengths)
    batch, device = len(waves.wave), waves.wave.device
    low = per_example("low_hz", low_hz, batch, device)
    high = per_example("high_hz", high_hz, batch, device)
    taps = -reject_taps(
        sample_rate, low, high, attenuation=attenuation, transition_hz=transition_hz
    )
    taps[:, taps.shape[1] // 2] += 1
    return waves.restore(fir(waves.wave, taps[:, None], taps.shape[1] // 2))


def reject_taps(
    sample_rate: float,
    low_hz: Tensor,
    high_hz: Tensor,
    *,
    attenuation: float = 120.0,
    transition_hz: float | None = None,
) -> Tensor:
    """Design one band-reject filter for each pair of edges.

    Args:
        sample_rate: Hz.
        low_hz: (B,) lower edges, Hz.
        high_hz: (B,) upper edges, Hz.
        attenuation: 60..180 dB.
        transition_hz: width of each slope; 5 % of half the rate where None.

    Returns:
        (B, K) float64 taps, K odd, symmetric about the middle; shorter filters stand between zeros.

    Raises:
        InputError: an edge, the attenuation or the transition is out of range.
    """
    check_rate(sample_rate)
    nyquist = sample_rate / 2
    low, high = low_hz.double(), high_hz.double()
    if found(~((low >= 0) & (low < high))):
        raise InputError("low_hz must lie at 0 or above and below high_hz: mend the band's edges")
    if found(~(high < nyquist)):
        raise InputError(f"high_hz must lie below half the sample rate, {nyquist:g} Hz")
    if not 60 <= attenuation <= 180:
        raise InputError(f"attenuation {attenuation} dB lies outside 60..180")
    slope = 0.05 * nyquist if transition_hz is None else transition_hz
    if not 0 < slope <= nyquist:
        raise InputError(f"transition_hz {slope} lies outside 0..{nyquist:g}: leave it out for 5 %")

    half_slope = slope / nyquist / 2
    # The upper edge's filter is designed first, and sox uses its beta for the lower one too.
    beta = _kaiser_beta(attenuation, half_slope * 0.5 / (high / nyquist))
    order = ((_width(beta) / half_slope + 1).ceil().clamp(11, 32767).long() | 1) - 1
    if torch.compiler.is_compiling():
        most = math.ceil(_width(_largest_beta(attenuation)) / half_slope + 1)
        half = min(max(most, 11), 32767) // 2
    else:
        half = int(order.max()) // 2
    z = torch.arange(-half, half + 1, device=low.device, dtype=torch.float64)
    inside = (1 - (z / (order[:, None] / 2)) ** 2).clamp(min=0)
    window: Tensor = (
        torch.special.i0(beta[:, None] * inside.sqrt()) / torch.special.i0(beta)[:, None]
    )
    window = window * (z.abs() <= order[:, None] / 2)

    def low_pass(edge: Tensor) -> Tensor:
        cutoff = (edge / nyquist)[:, None]
        return cutoff * (cutoff * z).sinc()

    taps = (low_pass(low) - low_pass(high)) * window
    taps[:, half] += 1
    return taps


def _width(beta: Number) -> Number:
    """Of the window, as a share of the transition."""
    return ((0.0007528358 - 1.577737e-5 * beta) * beta + 0.6248022) * beta + 0.06186902


def _cubics() -> Tensor:
    return torch.tensor(BETA_CUBICS, dtype=torch.float64)


def _largest_beta(attenuation: float) -> float:
    """Of all bands: beta runs on lines from row to row, and one row's width before the first."""
    fits = [
        ((a * attenuation + b) * attenuation + c) * attenuation + d for a, b, c, d in BETA_CUBICS
    ]
    return max(*fits, 2 * fits[0] - fits[1])


def _kaiser_beta(attenuation: float, q: Tensor) -> Tensor:
    cubics = constant(_cubics, q.device)
    powers = attenuation ** torch.arange(3, -1, -1, device=q.device).double()
    fits: Tensor = cubics @ powers
    place = (q / 0.0005).log2()
    row = place.trunc().clamp(0, 9).long()
    lower, upper = fits[row], fits[(row + 1).clamp(max=9)]
    return lower + (upper - lower) * (place - place.trunc())


def to_mel(hz: Tensor | float) -> Tensor:
    """Mel of frequencies: 2595 log10(1 + f / 700)."""
    return 2595 * torch.log10(1 + torch.as_tensor(hz, dtype=torch.float64) / 700)


def from_mel(mel: Tensor) -> Tensor:
    """Frequencies of mel, Hz."""
    return 700 * torch.expm1(mel * (math.log(10) / 2595))


def depth_db(taps: Tensor, sample_rate: float, hz: Tensor) -> Tensor:
    """Gain of each filter at one frequency, dB: how deep a random band really is.

    Args:
        taps: (B, K) symmetric taps, K odd.
        sample_rate: Hz.
        hz: (B,) frequencies, such as the bands' centres.

    Returns:
        (B,) float64, mostly negative.
    """
    z = torch.arange(taps.shape[1], device=taps.device).double() - taps.shape[1] // 2
    waves = torch.cos(2 * math.pi * (hz / sample_rate)[:, None] * z)
    return 20 * (taps * waves).sum(1).abs().clamp(min=1e-12).log10()
