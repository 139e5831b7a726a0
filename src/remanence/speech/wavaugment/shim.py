"""WavAugment's `EffectChain`, so that its scripts run without libsox.

What differs: `pitch` resamples at once and keeps the length, so that a `rate` after it only sets
the quality; silence never gives NaN; `time_dropout` draws from a generator; samples are not cut off
at full scale; extremes, levels and ratios are in float; noise that is too short starts over; the
wave given is never written to; of sox's effects there are those in `EffectChain.KNOWN_EFFECTS`, and
each of the others is refused with the way round.
"""

from __future__ import annotations

import difflib
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NoReturn

from torch.nn import functional

from remanence.errors import InputError
from remanence.speech.wavaugment import shim_effects
from remanence.speech.wavaugment.waves import as_waves, check_generator, check_rate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import Tensor

    from remanence.speech.wavaugment.resampling import Quality
    from remanence.speech.wavaugment.shim_effects import Value

# sox's other effects, by the way round.
INSTEAD = {
    "torchaudio.functional has {0}_biquad": (
        "allpass band bandpass bass deemph equalizer highpass lowpass riaa treble"
    ),
    "torchaudio.functional has {0}": "contrast dcshift flanger overdrive phaser vad",
    "use gain(20 * log10(factor))": "vol",
    "slice the wave, as in wave[:, begin:end]": "trim",
    "use torch.nn.functional.pad": "pad",
    "use channels(1) to mix, wave[[0]] to choose": "remix",
    "use wave[[1, 0]]": "swap",
    "use wave.flip(-1)": "reverse",
    "use wave.repeat(1, times)": "repeat",
    "multiply the wave by a ramp": "fade",
    "use tempo": "stretch",
    "use rate": "upsample downsample",
    "run the sox program on the file": (
        "bend biquad chorus compand delay divide earwax echo echos fir firfit hilbert loudness"
        " mcompand noiseprof noisered oops silence spectrogram splice stat stats synth tremolo"
    ),
}


class EffectChain:
    """Effects by WavAugment's names, in the order of the calls, for one clip at a time.

    Arguments are numbers, sox's words, or functions that return one at each application:

        chain = EffectChain().pitch("-q", draw).rate("-q", 16000).reverb(50, 50, room).channels(1)
        y = chain.apply(x, src_info={"rate": 16000})

    A chain can be pickled, as a loader's workers may need, where its functions can: `def draw()` in
    a module, not a lambda.

    Args:
        in_place: what is returned may share the memory of the wave given, where no effect changed
            it. That wave is never written to, other than with WavAugment.
        generator: for `time_dropout`, on the CPU; torch's own where None, which a loader seeds
            anew in each of its workers.

    Raises:
        InputError: `in_place` is no bool, or the generator none or not on the CPU.
    """

    KNOWN_EFFECTS: ClassVar[frozenset[str]] = frozenset(
        {
            "additive_noise",
            "bandreject",
            "channels",
            "clip",
            "dither",
            "gain",
            "norm",
            "pitch",
            "rate",
            "reverb",
            "sinc",
            "speed",
            "tempo",
            "time_dropout",
        }
    )

    def __init__(
        self,
        in_place: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(in_place, bool):
            raise InputError(f"in_place is {in_place!r}: give True or False, generators by name")
        check_generator(generator)
        self.in_place = in_place
        self._generator = generator
        self._effects: list[partial[Tensor]] = []

    def __len__(self) -> int:
        return len(self._effects)

    def __getattr__(self, name: str) -> NoReturn:
        for way, names in INSTEAD.items():
            if name in names.split():
                raise AttributeError(f"sox's {name!r} is not among ours: {way.format(name)}")
        near = difflib.get_close_matches(name, self.KNOWN_EFFECTS, n=1)
        known = f"one of {', '.join(sorted(self.KNOWN_EFFECTS))}"
        raise AttributeError(f"EffectChain has no {name!r}: use {near[0] if near else known}")

    def clear(self) -> None:
        """Forget all effects."""
        self._effects.clear()

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
            InputError: no rate, no wave or more than one, or an effect's arguments are wrong.
        """
        if "rate" not in src_info:
            raise InputError("src_info holds no 'rate': give the wave's samples a second")
        rows = as_waves(wave).wave
        if wave.ndim > 2:
            raise InputError(f"wave has shape {tuple(wave.shape)}: give one clip, (C, T)")
        length = int(src_info.get("length", wave.shape[-1]))
        if not 0 < length <= wave.shape[-1]:
            raise InputError(f"src_info's length {length} is not within the wave: leave it out")
        check_rate(src_info["rate"])
        rate = int(src_info["rate"])
        target = {"rate": rate, "channels": 1, **(target_info or {})}
        held = shim_effects.Clip(rows[0, :, :length], rate, target)
        if not self.in_place:
            held.wave = held.wave.clone()
        for effect in self._effects:
            held.wave = effect(held)
        wanted = int(target.get("length", 0))
        return functional.pad(held.wave, (0, wanted - held.wave.shape[-1])) if wanted else held.wave

    def pitch(self, *arguments: Value) -> EffectChain:
        """`[-q] cents`."""
        return self._then(shim_effects.pitch, arguments=arguments)

    def tempo(self, *arguments: Value) -> EffectChain:
        """`[-q] factor`; changes the length."""
        return self._then(shim_effects.tempo, arguments=arguments)

    def speed(self, *arguments: Value) -> EffectChain:
        """`factor`; changes the length."""
        return self._then(shim_effects.speed, arguments=arguments)

    def rate(self, *arguments: Value) -> EffectChain:
        """`[-q | -h] [rate]`, quick or high: the target's rate where none is given."""
        quality: Quality = "quick" if "-q" in arguments else "high"
        if self._effects and self._effects[-1].func is shim_effects.pitch:
            self._effects[-1] = partial(self._effects[-1], quality=quality)
        return self._then(shim_effects.rate, arguments=arguments, quality=quality)

    def reverb(self, *arguments: Value) -> EffectChain:
        """`[-w] [reverberance damping room depth delay gain]`; makes one channel two."""
        return self._then(shim_effects.reverb, arguments=arguments)

    def channels(self, *arguments: Value) -> EffectChain:
        """`[count]`: the target's where none is given, else one."""
        return self._then(shim_effects.channels, arguments=arguments)

    def sinc(self, *arguments: Value) -> EffectChain:
        """`[-a attenuation] edge-edge`, Hz: rejects the band high first, passes it low first."""
        return self._then(shim_effects.sinc, arguments=arguments)

    def bandreject(self, *arguments: Value) -> EffectChain:
        """`frequency width`, Hz: a notch of two poles."""
        return self._then(shim_effects.bandreject, arguments=arguments)

    def gain(self, *arguments: Value) -> EffectChain:
        """`dB`."""
        return self._then(shim_effects.gain, arguments=arguments)

    def norm(self, *arguments: Value) -> EffectChain:
        """`[dB]`: the peak's level."""
        return self._then(shim_effects.norm, arguments=arguments)

    def dither(self, *arguments: Value) -> EffectChain:
        """Nothing: sox dithers only where the precision falls, and floats keep theirs."""
        del arguments
        return self._then(shim_effects.unchanged)

    def additive_noise(self, noise_generator: Callable[[], Tensor], snr: float) -> EffectChain:
        """Mix as WavAugment does, with `snr` in its own sense; see `add_noise`."""
        return self._then(shim_effects.additive_noise, noise_generator=noise_generator, snr=snr)

    def time_dropout(
        self, max_frames: int | None = None, max_seconds: float | None = None
    ) -> EffectChain:
        """Silence up to so many samples, or seconds, somewhere."""
        if (max_frames is None) == (max_seconds is None):
            raise InputError("time_dropout takes either max_frames or max_seconds: give one")
        return self._then(
            shim_effects.time_dropout,
            max_frames=max_frames,
            max_seconds=max_seconds,
            generator=self._generator,
        )

    def clip(self, clamp_factor: float | Callable[[], float]) -> EffectChain:
        """Cut off at a share of the extremes."""
        return self._then(shim_effects.clip, clamp_factor=clamp_factor)

    def _then(self, effect: Callable[..., Tensor], **settings: object) -> EffectChain:
        self._effects.append(partial(effect, **settings))
        return self
