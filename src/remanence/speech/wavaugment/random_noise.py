"""Random noise: from a bank of clips, and from the other examples of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.speech.wavaugment.augmentation import Augmentation, RandomEffect, RowEffect
from remanence.speech.wavaugment.band_reject import band_pass
from remanence.speech.wavaugment.draws import Range, as_range, below, uniform, whole
from remanence.speech.wavaugment.graph import found
from remanence.speech.wavaugment.noise import Mix, add_noise, check_mix, other_rows, sum_rows
from remanence.speech.wavaugment.params import Params
from remanence.speech.wavaugment.pitch import resample
from remanence.speech.wavaugment.waves import as_waves, check_rate, mono_clips

if TYPE_CHECKING:
    from collections.abc import Sequence


class RandomNoise(RowEffect):
    """Additive noise from a bank of clips at an even ratio; `add_noise`.

    Draws `clip`, `offset` (over all that leave the noise in one piece, where it is as long as the
    example; else over the whole clip) and `snr_db`, then the parameters of `chain` under `chain.`.
    The bank is a buffer, as are the clips' places in it, and moves with the module.

    Args:
        source: clips, (M, T') or a sequence of (T',) floats, at the waves' sample rate or at
            `noise_rate`.
        snr: dB, a number or a range.
        mix: see `add_noise`.
        band_hz: keep only the noise between two edges, (low, high) in Hz; needs `sample_rate`.
        sample_rate: Hz of the waves.
        noise_rate: Hz of the clips, where it is another: they are resampled, once; needs
            `sample_rate`.
        chain: augments the noise, each example's by its own draw, before it is mixed in.
        p: probability that an example is touched.
        always: augment in eval mode too.

    Raises:
        InputError: an empty bank or a clip that is no mono wave, an unknown mix, or a rate or a
            band that does not fit.
    """

    bank: Tensor
    places: Tensor

    def __init__(
        self,
        source: Tensor | Sequence[Tensor],
        snr: Range = (5.0, 15.0),
        *,
        mix: Mix = "rms",
        band_hz: tuple[float, float] | None = None,
        sample_rate: float | None = None,
        noise_rate: float | None = None,
        chain: Augmentation | None = None,
        p: float = 1.0,
        always: bool = False,
    ) -> None:
        super().__init__(p=p, always=always)
        check_mix(mix)
        clips = mono_clips("the noise bank", source)
        if sample_rate is None and (band_hz is not None or noise_rate is not None):
            raise InputError("band_hz and noise_rate need the waves' rate: give sample_rate")
        if sample_rate is not None:
            check_rate(sample_rate)
        if sample_rate is not None and noise_rate is not None:
            check_rate(noise_rate)
            clips = [resample(clip, sample_rate / noise_rate)[0] for clip in clips]
        if sample_rate is not None and band_hz is not None:
            clips = [band_pass(clip, sample_rate, *band_hz) for clip in clips]
        self.sizes = torch.tensor([clip.shape[-1] for clip in clips])
        self.firsts = self.sizes.cumsum(0) - self.sizes
        places = torch.stack([self.firsts, self.sizes])
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("bank", torch.cat([c[0, 0] for c in clips]), persistent=False)
        self.snr, self.mix = as_range("snr", snr, -200, 200), mix
        self.chain = chain

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `clip` and `offset`, int64, and `snr_db`, float64."""
        batch = len(lengths)
        clip = whole((0, len(self.sizes)), batch, generator)
        size = self.sizes[clip]
        places = torch.where(size >= lengths, size - lengths + 1, size).clamp(max=size)
        offset = below(places, generator)
        drawn = {"clip": clip, "offset": offset, "snr_db": uniform(self.snr, batch, generator)}
        if self.chain is None:
            return drawn
        own = self.chain.sample(batch, lengths, generator)
        return {**drawn, **Params.nest({"chain": own}).values}

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Mix the noise in."""
        clip = values["clip"]
        if found(clip >= len(self.sizes)):
            raise InputError(f"parameters name a clip beyond the bank's {len(self.sizes)}")
        noise = self._cut(values, rows.shape[-1]).to(rows.device)[:, None]
        if self.chain is not None:
            noise = self.chain.run(noise, lengths, Params(values).under("chain"))
        return add_noise(rows, noise, values["snr_db"], mix=self.mix, lengths=lengths)

    def _cut(self, values: dict[str, Tensor], time: int) -> Tensor:
        """The noise under each row, (B, T); a clip that ends starts over."""
        clip, offset = values["clip"], values["offset"]
        if not torch.compiler.is_compiling() and bool((offset + time <= self.sizes[clip]).all()):
            starts = (self.firsts[clip] + offset).tolist()
            return torch.stack([self.bank[start : start + time] for start in starts])
        steps = torch.arange(time, device=self.bank.device)
        first, size = self.places[:, clip.to(steps.device), None]
        return self.bank[first + (offset.to(steps.device)[:, None] + steps) % size]


class RandomBabble(RandomEffect):
    """Other examples of the batch talk over each example; `babble`, mixed in by `add_noise`.

    Draws `voices`, distinct rows and never the example's own, and `snr_db`. A batch of one has no
    others and stays as it is. Unlike other effects', the parameters belong to their batch as a
    whole: replay them on all its rows, in their order.

    Args:
        voices: how many others, or all where the batch holds fewer.
        snr: dB of the example over their sum, a number or a range.
        p: probability that an example is touched.
        always: augment in eval mode too.
    """

    def __init__(
        self,
        voices: int = 3,
        snr: Range = (0.0, 20.0),
        *,
        p: float = 1.0,
        always: bool = False,
    ) -> None:
        super().__init__(p=p, always=always)
        if voices < 1:
            raise InputError(f"voices {voices} is none: give at least 1")
        self.voices, self.snr = voices, as_range("snr", snr, -200, 200)

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `voices`, (B, min(voices, B - 1)) int64, and `snr_db`, float64."""
        voices = other_rows(len(lengths), self.voices, generator)
        return {"voices": voices, "snr_db": uniform(self.snr, len(lengths), generator)}

    def select(
        self, rows: Tensor, lengths: Tensor | None, params: Params, chosen: Tensor
    ) -> Tensor:
        """Let the others talk: all rows are heard, the chosen ones are changed."""
        voices, snr = (params.values[name][chosen] for name in ("voices", "snr_db"))
        heard = as_waves(rows, lengths).wave
        index = chosen.to(rows.device)
        ends = None if lengths is None else lengths[chosen]
        return add_noise(rows[index], sum_rows(heard, voices, chosen), snr, lengths=ends)
