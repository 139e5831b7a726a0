"""WavAugment's `EffectChain`, so that its scripts run without libsox.

What differs: `pitch` resamples at once and keeps the length, so that a `rate` after it only sets
the quality; silence never gives NaN; `time_dropout` draws from a generator; samples are not cut off
at full scale; extremes, levels and ratios are in float; noise that is too short starts over; the
wave given is never written to; of sox's effects there are those below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from remanence.errors import InputError
from remanence.speech.wavaugment.band_reject import band_reject
from remanence.speech.wavaugment.clip import clip
from remanence.speech.wavaugment.levels import gain, normalise_peak, to_channels
from remanence.speech.wavaugment.noise import add_noise
from remanence.speech.wavaugment.pitch import pitch_shift, resample, speed, tempo
from remanence.speech.wavaugment.reverb import reverb
from remanence.speech.wavaugment.time_drop import time_drop

if TYPE_CHECKING:
    from remanence.speech.wavaugment.resampling import Quality
    from remanence.speech.wavaugment.wsola import Search

# What sox takes, or what returns it, or a list of it, at each application.
Plain = float | str
Value = Plain | Callable[[], Plain | list[Plain]]


@dataclass
class _Clip:
    """The wave (C, T) between two effects."""

    wave: Tensor
    rate: int
    target: Mapping[str, float]


class EffectChain:
    """Effects by WavAugment's names, in the order of the calls, for one clip at a time.

    Arguments are numbers, sox's words, or functions that return one at each application:

        chain = EffectChain().pitch("-q", draw).rate("-q", 16000).reverb(50, 50, room).channels(1)
        y = chain.apply(x, src_info={"rate": 16000})

    Args:
        generator: for `time_dropout`, on the CPU; torch's own where None.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self._generator = generator
        self._effects: list[Callable[[_Clip], Tensor]] = []
        self._qualities: dict[int, Quality] = {}

    def __len__(self) -> int:
        return len(self._effects)

    def __getattr__(self, name: str) -> NoReturn:
        known = [k for k, v in vars(EffectChain).items() if callable(v) and not k.startswith("_")]
        raise AttributeError(f"EffectChain has no {name!r}: use one of {', '.join(sorted(known))}")

    def clear(self) -> None:
        """Forget all effects."""
        self._effects.clear()
        self._qualities.clear()

    def apply(
        self,
        wave: Tensor,
        src_info: Mapping[str, float],
        target_info: Mapping[str, float] | None = None,
    ) -> Tensor:
        """Run the chain.

        Args:
            wave: floats (T,) or (C, T).
            src_info: holds `rate`, Hz; may hold `length`, the samples to use.
            target_info: may hold the `rate` and `channels` for `rate()` and `channels()`, and
                `length`, to which the result is cut or filled up with zeros; 0 leaves it.

        Returns:
            (C, T), as the effects leave it.

        Raises:
            InputError: no rate, more than one clip, or an effect's arguments are wrong.
        """
        if "rate" not in src_info:
            raise InputError("src_info holds no 'rate': give the wave's samples a second")
        if wave.ndim not in (1, 2):
            raise InputError(f"wave has shape {tuple(wave.shape)}: give one clip, (C, T)")
        length = int(src_info.get("length", wave.shape[-1]))
        if not 0 < length <= wave.shape[-1]:
            raise InputError(f"src_info's length {length} is not within the wave: leave it out")
        rate = int(src_info["rate"])
        target = {"rate": rate, "channels": 1, **(target_info or {})}
        held = _Clip(wave.reshape(-1, wave.shape[-1])[:, :length], rate, target)
        for effect in self._effects:
            held.wave = effect(held)
        wanted = int(target.get("length", 0))
        return functional.pad(held.wave, (0, wanted - held.wave.shape[-1])) if wanted else held.wave

    def pitch(self, *arguments: Value) -> EffectChain:
        """`[-q] cents`."""
        place = len(self._effects)

        def effect(held: _Clip) -> Tensor:
            words, (cents,) = _read("pitch", arguments, ("-q",), 1, 1)
            quality = self._qualities.get(place, "high")
            return pitch_shift(held.wave, held.rate, cents, quality=quality, search=_search(words))

        return self._then(effect)

    def tempo(self, *arguments: Value) -> EffectChain:
        """`[-q] factor`; changes the length."""

        def effect(held: _Clip) -> Tensor:
            words, (factor,) = _read("tempo", arguments, ("-q", "-s"), 1, 1)
            return tempo(held.wave, held.rate, factor, search=_search(words))[0]

        return self._then(effect)

    def speed(self, *arguments: Value) -> EffectChain:
        """`factor`; changes the length."""

        def effect(held: _Clip) -> Tensor:
            return speed(held.wave, _read("speed", arguments, (), 1, 1)[1][0])[0]

        return self._then(effect)

    def rate(self, *arguments: Value) -> EffectChain:
        """`[-q] [rate]`: the target's where none is given."""
        quality: Quality = "quick" if "-q" in arguments else "high"
        self._qualities[len(self._effects) - 1] = quality

        def effect(held: _Clip) -> Tensor:
            _, numbers = _read("rate", arguments, ("-q", "-l", "-m", "-h", "-v"), 0, 1)
            old, held.rate = held.rate, int(numbers[0] if numbers else held.target["rate"])
            if old == held.rate:
                return held.wave
            return resample(held.wave, held.rate / old, quality)[0]

        return self._then(effect)

    def reverb(self, *arguments: Value) -> EffectChain:
        """`[-w] [reverberance damping room depth delay gain]`; makes one channel two."""

        def effect(held: _Clip) -> Tensor:
            words, numbers = _read("reverb", arguments, ("-w", "--wet-only"), 0, 6)
            defaults = (50.0, 50.0, 100.0, 100.0, 0.0, 0.0)
            reverberance, damping, room, depth, delay, wet = (*numbers, *defaults[len(numbers) :])
            return reverb(
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

        return self._then(effect)

    def channels(self, *arguments: Value) -> EffectChain:
        """`[count]`: the target's where none is given, else one."""

        def effect(held: _Clip) -> Tensor:
            _, numbers = _read("channels", arguments, (), 0, 1)
            count = numbers[0] if numbers else held.target["channels"]
            return to_channels(held.wave, int(count))

        return self._then(effect)

    def sinc(self, *arguments: Value) -> EffectChain:
        """`[-a attenuation] high-low`: rejects the band, high first."""

        def effect(held: _Clip) -> Tensor:
            given = [str(value) for value in _drawn(arguments)]
            decibels = 120.0
            if len(given) == 3 and given[0] == "-a":
                decibels = _number("sinc", given[1])
                given = given[2:]
            edges = given[0].split("-") if len(given) == 1 else []
            if len(edges) != 2:
                raise InputError(f"sinc {given} is not understood: give '-a', '120', 'high-low'")
            high, low = (_number("sinc", edge) for edge in edges)
            return band_reject(held.wave, held.rate, low, high, attenuation=decibels)

        return self._then(effect)

    def gain(self, *arguments: Value) -> EffectChain:
        """`dB`."""
        return self._then(lambda held: gain(held.wave, _read("gain", arguments, (), 1, 1)[1][0]))

    def norm(self, *arguments: Value) -> EffectChain:
        """`[dB]`: the peak's level."""

        def effect(held: _Clip) -> Tensor:
            return normalise_peak(held.wave, *_read("norm", arguments, (), 0, 1)[1])

        return self._then(effect)

    def dither(self, *arguments: Value) -> EffectChain:
        """Nothing: sox dithers only where the precision falls, and floats keep theirs."""
        del arguments
        return self

    def additive_noise(self, noise_generator: Callable[[], Tensor], snr: float) -> EffectChain:
        """Mix as WavAugment does, with `snr` in its own sense; see `add_noise`."""

        def effect(held: _Clip) -> Tensor:
            noise = noise_generator().to(held.wave)
            return add_noise(held.wave, noise, snr, mix="wavaugment")

        return self._then(effect)

    def time_dropout(
        self, max_frames: int | None = None, max_seconds: float | None = None
    ) -> EffectChain:
        """Silence up to so many samples, or seconds, somewhere."""
        if (max_frames is None) == (max_seconds is None):
            raise InputError("time_dropout takes either max_frames or max_seconds: give one")

        def effect(held: _Clip) -> Tensor:
            longest = max_frames or int(held.rate * (max_seconds or 0))
            time = held.wave.shape[-1]
            first, second = torch.rand(2, dtype=torch.float64, generator=self._generator).tolist()
            duration = min(int(first * longest), time)
            return time_drop(held.wave, int(second * (time - duration + 1)), duration)

        return self._then(effect)

    def clip(self, clamp_factor: float | Callable[[], float]) -> EffectChain:
        """Cut off at a share of the extremes."""
        return self._then(
            lambda held: clip(held.wave, clamp_factor() if callable(clamp_factor) else clamp_factor)
        )

    def _then(self, effect: Callable[[_Clip], Tensor]) -> EffectChain:
        self._effects.append(effect)
        return self


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
    numbers = [_number(effect, value) for value in given if value not in known]
    if not least <= len(numbers) <= most:
        raise InputError(f"{effect} takes {least} to {most} numbers and was given {len(numbers)}")
    return words, numbers
