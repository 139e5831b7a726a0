"""The effects of `shim.EffectChain`, each on one clip, with arguments as sox takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.signal import lfilter
from torch import Tensor

from remanence.errors import InputError
from remanence.speech.wavaugment.band_reject import band_pass, band_reject
from remanence.speech.wavaugment.clip import clip as clipped
from remanence.speech.wavaugment.levels import gain as louder
from remanence.speech.wavaugment.levels import normalise_peak, to_channels
from remanence.speech.wavaugment.noise import add_noise
from remanence.speech.wavaugment.pitch import pitch_shift, resample
from remanence.speech.wavaugment.pitch import speed as played
from remanence.speech.wavaugment.pitch import tempo as stretched
from remanence.speech.wavaugment.reverb import reverb as echoing
from remanence.speech.wavaugment.time_drop import time_drop
from remanence.speech.wavaugment.waves import check_rate, fir

if TYPE_CHECKING:
    from remanence.speech.wavaugment.resampling import Quality
    from remanence.speech.wavaugment.wsola import Search

# What sox takes, or what returns it, or a list of it, at each application.
Plain = float | str
Value = Plain | Callable[[], Plain | list[Plain]]


@dataclass
class Clip:
    """The wave (C, T) between two effects."""

    wave: Tensor
    rate: int
    target: Mapping[str, float]


def pitch(held: Clip, arguments: tuple[Value, ...], quality: Quality = "high") -> Tensor:
    """Shift the pitch and keep the length."""
    words, (cents,) = _read("pitch", arguments, ("-q",), 1, 1)
    return pitch_shift(held.wave, held.rate, cents, quality=quality, search=_search(words))


def tempo(held: Clip, arguments: tuple[Value, ...]) -> Tensor:
    """Play faster or slower at the same pitch."""
    words, (factor,) = _read("tempo", arguments, ("-q",), 1, 1)
    return stretched(held.wave, held.rate, factor, search=_search(words))[0]


def speed(held: Clip, arguments: tuple[Value, ...]) -> Tensor:
    """Play faster or slower, pitch and all."""
    return played(held.wave, _read("speed", arguments, (), 1, 1)[1][0])[0]


def rate(held: Clip, arguments: tuple[Value, ...], quality: Quality) -> Tensor:
    """Resample, if the rate is another."""
    _, numbers = _read("rate", arguments, ("-q", "-h"), 0, 1)
    new = numbers[0] if numbers else held.target["rate"]
    check_rate(new)
    old, held.rate = held.rate, int(new)
    if old == held.rate:
        return held.wave
    return resample(held.wave, held.rate / old, quality)[0]


def reverb(held: Clip, arguments: tuple[Value, ...]) -> Tensor:
    """Reverberate; one channel becomes two."""
    words, numbers = _read("reverb", arguments, ("-w", "--wet-only"), 0, 6)
    defaults = (50.0, 50.0, 100.0, 100.0, 0.0, 0.0)
    reverberance, damping, room, depth, delay, wet = (*numbers, *defaults[len(numbers) :])
    return echoing(
        held.wave,
        held.rate,
        reverberance=reverberance,
        damping=damping,
        room=room,
        stereo_depth=depth,
        pre_delay_ms=delay,
        wet_db=wet,
        wet_only=bool(words),
        mixdown=False,
    )


def channels(held: Clip, arguments: tuple[Value, ...]) -> Tensor:
    """Mix to so many channels."""
    _, numbers = _read("channels", arguments, (), 0, 1)
    return to_channels(held.wave, int(numbers[0] if numbers else held.target["channels"]))


def sinc(held: Clip, arguments: tuple[Value, ...]) -> Tensor:
    """Reject or pass a band, as the order of its edges says."""
    given = [str(value) for value in _drawn(arguments)]
    decibels, band = 120.0, given
    if given[:1] == ["-a"] and len(given) == 3:
        decibels, band = _number("sinc", given[1]), given[2:]
    edges = band[0].split("-") if len(band) == 1 else []
    if len(edges) != 2 or not all(edges):
        raise InputError(
            f"sinc {' '.join(given)} is not among ours: give 'high-low' to reject a band or"
            " 'low-high' to pass it, after '-a', '120' if need be"
        )
    first, second = (_number("sinc", edge) for edge in edges)
    if first > second:
        return band_reject(held.wave, held.rate, second, first, attenuation=decibels)
    # sox's band-pass turns the wave upside down.
    return -band_pass(held.wave, held.rate, first, second, attenuation=decibels)


def bandreject(held: Clip, arguments: tuple[Value, ...]) -> Tensor:
    """Notch by two poles."""
    _, (frequency, width) = _read("bandreject", arguments, (), 2, 2)
    if not (0 < frequency < held.rate / 2 and width > 0):
        raise InputError(
            f"bandreject {frequency:g} {width:g} rejects nothing: give a frequency within"
            f" 0..{held.rate / 2:g} Hz and a width above 0"
        )
    # The cookbook's notch, as its impulse response: of as many samples as the wave it is exact.
    angle = 2 * math.pi * frequency / held.rate
    alpha = math.sin(angle) * width / (2 * frequency)
    middle = -2 * math.cos(angle)
    impulse = np.zeros(held.wave.shape[-1])
    impulse[0] = 1
    taps = lfilter([1, middle, 1], [1 + alpha, middle, 1 - alpha], impulse)
    rows = held.wave[None]
    return fir(rows, torch.from_numpy(taps).to(rows.device)[None, None], 0)[0].to(rows.dtype)


def gain(held: Clip, arguments: tuple[Value, ...]) -> Tensor:
    """Change the level."""
    return louder(held.wave, _read("gain", arguments, (), 1, 1)[1][0])


def norm(held: Clip, arguments: tuple[Value, ...]) -> Tensor:
    """Change the level to that of a peak."""
    return normalise_peak(held.wave, *_read("norm", arguments, (), 0, 1)[1])


def unchanged(held: Clip) -> Tensor:
    """Leave the wave."""
    return held.wave


def additive_noise(held: Clip, noise_generator: Callable[[], Tensor], snr: float) -> Tensor:
    """Mix noise in, at WavAugment's ratio."""
    return add_noise(held.wave, noise_generator().to(held.wave), snr, mix="wavaugment")


def time_dropout(
    held: Clip,
    max_frames: int | None,
    max_seconds: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Silence a stretch."""
    longest = max_frames or int(held.rate * (max_seconds or 0))
    time = held.wave.shape[-1]
    first, second = torch.rand(2, dtype=torch.float64, generator=generator).tolist()
    duration = min(int(first * longest), time)
    return time_drop(held.wave, int(second * (time - duration + 1)), duration)


def clip(held: Clip, clamp_factor: float | Callable[[], float]) -> Tensor:
    """Cut off at a share of the extremes."""
    return clipped(held.wave, clamp_factor() if callable(clamp_factor) else clamp_factor)


def _search(words: list[str]) -> Search:
    return "quick" if "-q" in words else "full"


def _number(effect: str, value: float | str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{effect} takes numbers and not {value!r}") from None


def _drawn(arguments: tuple[Value, ...]) -> list[Plain]:
    """The arguments, drawn where they are functions."""
    given: list[Plain] = []
    for argument in arguments:
        value = argument() if callable(argument) else argument
        given.extend(value if isinstance(value, list) else [value])
    return given


def _read(
    effect: str, arguments: tuple[Value, ...], known: tuple[str, ...], least: int, most: int
) -> tuple[list[str], list[float]]:
    """The words and the numbers among an effect's arguments."""
    given = _drawn(arguments)
    words = [value for value in given if isinstance(value, str) and value in known]
    for value in given:
        # A minus and no number: a flag of sox's that would change what is done.
        if (
            isinstance(value, str)
            and value not in known
            and value[:1] == "-"
            and value[1:].isalpha()
        ):
            has = f"it has {' and '.join(known)}" if known else "leave it out"
            raise InputError(f"{effect} {value} is not among ours: {has}")
    numbers = [_number(effect, value) for value in given if value not in known]
    if not least <= len(numbers) <= most:
        raise InputError(f"{effect} takes {least} to {most} numbers and was given {len(numbers)}")
    return words, numbers
