"""Reverberation: sox's variant of freeverb, and rooms given by their impulse response.

A channel is eight parallel combs with a low-pass in their loops, then four all-pass-like filters
in series,

    C(z) = z^-D (1 - d z^-1) / (1 - d z^-1 - fb (1 - d) z^-D)
    P(z) = (1.5 z^-E - 1) / (1 - 0.5 z^-E)

float32 waves on the processor go through the recursions themselves, compiled. All others, such as
those on a GPU or with a gradient, go through one FFT, as the filter is linear and time-invariant.
Its response never ends; what the FFT's period would fold back onto the start is pushed down by
evaluating H on a circle of radius rho > 1, which weights the wave by rho^-n before and by rho^n
after.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.speech.wavaugment.graph import constant, found
from remanence.speech.wavaugment.waves import (
    as_waves,
    check_rate,
    chunked,
    fast_length,
    fir,
    fits,
    per_example,
)

COMB_LENGTHS = (1116, 1188, 1277, 1356, 1422, 1491, 1557, 1617)
ALLPASS_LENGTHS = (225, 341, 441, 556)
STEREO_SPREAD = 12
# rho^N: folding leaves 1e-8, and so does float64 rounding, which grows by the same factor.
FOLD = 1e8


def reverb(
    wave: Tensor,
    sample_rate: float,
    *,
    reverberance: float | Tensor = 50.0,
    damping: float | Tensor = 50.0,
    room: float | Tensor = 100.0,
    stereo_depth: float | Tensor = 100.0,
    pre_delay_ms: float | Tensor = 0.0,
    wet_db: float | Tensor = 0.0,
    wet_only: bool = False,
    mixdown: bool = True,
    lengths: Tensor | None = None,
) -> Tensor:
    """Reverberate as `sox reverb` does; each parameter is a number or (B,) numbers.

    Args:
        wave: floats (T,), (C, T) or (B, C, T); one or two channels.
        sample_rate: Hz.
        reverberance: 0..100 %, how long the echoes last.
        damping: 0..100 %, how much faster the high frequencies die.
        room: 0..100 %, the length of the combs.
        stereo_depth: 0..100 %, how much the two ears' filters differ.
        pre_delay_ms: 0..500 ms of silence before the echoes.
        wet_db: -10..10 dB, level of the echoes.
        wet_only: leave the wave itself out.
        mixdown: average the two ears of a mono wave (`sox ... channels 1`); False returns both,
            as (2, T) or (B, 2, T). A stereo wave stays stereo.
        lengths: valid samples of each row, (B,).

    Returns:
        The wave's shape (but for `mixdown`), dtype and device. Differentiable in the wave.

    Raises:
        InputError: a value is out of range, or there are more than two channels.
    """
    check_rate(sample_rate)
    waves = as_waves(wave, lengths)
    rows = waves.wave
    batch, channels, _ = rows.shape
    if channels > 2:
        raise InputError(f"wave has {channels} channels: reverb takes one or two")

    def share(name: str, value: float | Tensor) -> Tensor:
        return per_example(name, value, batch, rows.device, low=0, high=100)

    settings = torch.stack(
        [
            share("reverberance", reverberance),
            share("damping", damping),
            share("room", room),
            share("stereo_depth", stereo_depth),
            per_example("pre_delay_ms", pre_delay_ms, batch, rows.device, low=0, high=500),
            per_example("wet_db", wet_db, batch, rows.device, low=-10, high=10),
        ]
    )  # (6, B)
    ears = 1 if channels == 1 and mixdown else 2
    loops = _loops(settings, sample_rate)
    heard = rows[:, 0] if channels == 1 else rows.mean(1)
    if fits(rows) and bool((loops.combs > 0).all() and (loops.allpasses > 0).all()):
        from remanence.speech.wavaugment.compiled import echoes  # numba takes time to import

        out = echoes(heard, loops, ears, None if wet_only else rows)
    else:
        out = _transformed(heard, loops, ears)
        if not wet_only:
            out = out + rows
    if ears == channels:
        return waves.restore(out)
    if waves.ragged:
        out = out.masked_fill(~waves.valid(), 0)
    return out if wave.ndim == 3 else out[0]


class Loops(NamedTuple):
    """The filters of B examples and two ears: lengths in samples, and coefficients."""

    combs: Tensor  # (B, 2, 8) int64
    allpasses: Tensor  # (B, 2, 4) int64
    delays: Tensor  # (B,) int64, before the echoes
    feedbacks: Tensor  # (B,) float64, fb
    dampings: Tensor  # (B,) float64, d
    gains: Tensor  # (B,) float64


def _lengths() -> Tensor:
    return torch.tensor(COMB_LENGTHS + ALLPASS_LENGTHS)


def _loops(settings: Tensor, sample_rate: float) -> Loops:
    reverberance, damping, room, depth, pre_delay_ms, wet_db = settings
    # Feedback: 0.3 at reverberance 0, 0.98 at 100, evenly in log(1 - fb).
    a = -1 / math.log(1 - 0.3)
    b = 100 / (math.log(1 - 0.98) * a + 1)
    rate = sample_rate / 44100
    # The right ear's filters are longer and shorter in turn, from the first comb to the last
    # all-pass; the left ear's are as they stand.
    turns = 1.0 - 2 * (torch.arange(12, device=settings.device) % 2).double()
    spread = STEREO_SPREAD * depth[:, None, None] / 100 * turns  # (B, 1, 12)
    spread = torch.cat([torch.zeros_like(spread), spread], 1)  # (B, 2, 12)
    lengths = spread + constant(_lengths, settings.device)
    scale = (0.9 * room / 100 + 0.1)[:, None, None]
    return Loops(
        (scale * rate * lengths[..., :8] + 0.5).long(),
        (rate * lengths[..., 8:] + 0.5).long(),
        (pre_delay_ms / 1000 * sample_rate + 0.5).long(),
        1 - ((reverberance - b) / (a * b)).exp(),
        0.3 * damping / 100 + 0.2,
        0.015 * 10 ** (wet_db / 20),
    )


def _transformed(heard: Tensor, loops: Loops, ears: int) -> Tensor:
    """The echoes of (B, T), by Fourier transform: (B, ears, T)."""
    batch, time = heard.shape
    length = fast_length(time)
    clock = torch.arange(time, device=heard.device, dtype=torch.float64)
    weight = FOLD ** (-clock / length)

    def wet(part: slice) -> Tensor:
        with torch.no_grad():
            response = _response(Loops(*(x[part] for x in loops)), length)
        if ears == 1:
            response = response.mean(1, keepdim=True)
        spectrum = torch.fft.rfft(heard[part, None].double() * weight, length)
        echo: Tensor = torch.fft.irfft(spectrum * response, length)
        return (echo[..., :time] / weight).to(heard.dtype)

    return chunked(batch, length, heard.device, wet)


def _response(loops: Loops, length: int) -> Tensor:
    """H of both ears (B, 2, length // 2 + 1) on the circle of radius FOLD^(1 / length)."""
    d = loops.dampings[:, None]
    advance = _Advance(length, d.device)
    low_pass = 1 - d / advance(torch.ones_like(loops.delays))  # (B, F): 1 - d z^-1
    loop = loops.feedbacks[:, None] * (1 - d) / low_pass
    pre = advance(loops.delays)
    ears = []
    for ear in (0, 1):
        response = torch.zeros_like(low_pass)
        for comb in loops.combs[:, ear].T:
            # C = 1 / (z^D - fb (1 - d) / (1 - d z^-1))
            response += advance(comb).sub_(loop).reciprocal_()
        response = response.mul_(loops.gains[:, None]).div_(pre)
        for allpass in loops.allpasses[:, ear].T:
            # P = (1.5 - z^E) / (z^E - 0.5)
            ahead = advance(allpass)
            response.mul_(1.5 - ahead).div_(ahead.sub_(0.5))
        ears.append(response)
    return torch.stack(ears, 1)


class _Advance:
    """z^D at the half circle's frequencies; outer products save all but a few sines."""

    def __init__(self, length: int, device: torch.device) -> None:
        self.bins = length // 2 + 1
        self.stride = math.isqrt(self.bins - 1) + 1
        self.log_radius = math.log(FOLD) / length
        self.angle = 2 * math.pi / length * torch.arange(self.stride, device=device).double()

    def __call__(self, delay: Tensor) -> Tensor:
        """(B,) whole samples to (B, F) complex128."""
        delay = delay[:, None].double()
        fine = delay * self.angle
        radius = (delay * self.log_radius).exp().expand_as(fine)
        coarse = torch.polar(radius, fine * self.stride)
        ones = torch.ones_like(fine)
        powers = coarse[:, :, None] * torch.polar(ones, fine)[:, None]
        return powers.flatten(1)[:, : self.bins]


def convolve_room(
    wave: Tensor,
    impulse: Tensor,
    *,
    align: bool = True,
    unit_energy: bool = True,
    lengths: Tensor | None = None,
) -> Tensor:
    """Play a wave in a room given by its impulse response.

    Args:
        wave: floats (T,), (C, T) or (B, C, T).
        impulse: floats (K,) for all rows, or (B, K), one a row; at the wave's sample rate.
        align: move the direct sound, the response's largest value, to lag 0, so that what was
            said stays where it was.
        unit_energy: divide each response by its norm, so that the level stays about the same.
        lengths: valid samples of each row, (B,).

    Returns:
        The wave's shape, dtype and device: the tail past the end is cut. Differentiable in both.

    Raises:
        InputError: the response is not floats of those shapes, or holds NaN or only zeros.
    """
    waves = as_waves(wave, lengths)
    batch = len(waves.wave)
    if not isinstance(impulse, Tensor):
        raise InputError(f"impulse is {type(impulse).__name__}: give a tensor")
    if not impulse.is_floating_point() or not impulse.numel() or impulse.ndim not in (1, 2):
        raise InputError(
            f"impulse is {impulse.dtype} {tuple(impulse.shape)}: give floats (K,) or (B, K)"
        )
    taps = impulse.to(waves.wave.device).double().reshape(-1, impulse.shape[-1])
    if len(taps) not in (1, batch):
        raise InputError(f"impulse has {len(taps)} rows: give one, or one for each of {batch}")
    norm = taps.norm(dim=1, keepdim=True)
    if found(~((norm > 0) & norm.isfinite())):
        raise InputError("impulse holds NaN, infinity or only zeros: give a measured response")
    if unit_energy:
        taps = taps / norm
    direct = taps.abs().argmax(1) if align else torch.zeros_like(taps[:, 0]).long()
    return waves.restore(fir(waves.wave, taps[:, None], direct))
