"""Random noise: from a bank of clips, and from the other examples of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.speech.wavaugment.augmentation import Augmentation, RandomEffect, RowEffect
from remanence.speech.wavaugment.band_reject import band_pass
from remanence.speech.wavaugment.draws import Range, as_range, below, uniform, whole
from remanence.speech.wavaugment.noise import Mix, add_noise, other_rows, sum_rows
from remanence.speech.wavaugment.params import Params
from remanence.speech.wavaugment.waves import as_waves

if TYPE_CHECKING:
    from collections.abc import Sequence


class RandomNoise(RowEffect):
    """Additive noise from a bank of clips at an even ratio; `add_noise`.

    Draws `clip`, `offset` (over all that leave the noise in one piece, where it is as long as the
    example; else over the whole clip) and `snr_db`, then the parameters of `chain` under `chain.`.
    The bank is a buffer and moves with the module.

    Args:
        source: clips at the waves' sample rate (`resample` brings them there): (M, T') or a
            sequence of (T',) floats.
        snr: dB, a number or a range.
        mix: see `add_noise`.
        band_hz: keep only the noise between two edges, (low, high) in Hz; needs `sample_rate`.
        sample_rate: Hz of the clips.
        chain: augments the noise, each example's by its own draw, before it is mixed in.
        p: probability that an example is touched.
        always: augment in eval mode too.

    Raises:
        InputError: an empty bank or an empty clip, or a band that does not fit.
    """

    bank: Tensor

    def __init__(
        self,
        source: Tensor | Sequence[Tensor],
        snr: Range = (5.0, 15.0),
        *,
        mix: Mix = "rms",
        band_hz: tuple[float, float] | None = None,
        sample_rate: float | None = None,
        chain: Augmentation | None = None,
        p: float = 1.0,
        always: bool = False,
    ) -> None:
        super().__init__(p=p, always=always)
        clips = [as_waves(clip).wave for clip in source]
        if not clips or any(clip.shape[:2] != (1, 1) for clip in clips):
            raise InputError("the noise bank is empty or not mono: give (M, T') or (T',) clips")
        if band_hz is not None:
            if sample_rate is None:
                raise InputError("band_hz needs the clips' rate: give sample_rate")
            clips = [band_pass(clip, sample_rate, *band_hz) for clip in clips]
        self.sizes = torch.tensor([clip.shape[-1] for clip in clips])
        self.firsts = self.sizes.cumsum(0) - self.sizes
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
        if bool((clip >= len(self.sizes)).any()):
            raise InputError(f"parameters name a clip beyond the bank's {len(self.sizes)}")
        noise = self._cut(values, rows.shape[-1]).to(rows.device)[:, None]
        if self.chain is not None:
            noise = self.chain.run(noise, lengths, Params(values).under("chain"))
        return add_noise(rows, noise, values["snr_db"], mix=self.mix, lengths=lengths)

    def _cut(self, values: dict[str, Tensor], time: int) -> Tensor:
        """The noise under each row, (B, T); a clip that ends starts over."""
        clip, offset = values["clip"], values["offset"]
        first, size = self.firsts[clip], self.sizes[clip]
        if bool((offset + time <= size).all()):
            starts = (first + offset).tolist()
            return torch.stack([self.bank[start : start + time] for start in starts])
        steps = torch.arange(time, device=self.bank.device)
        first, size, offset = (v.to(steps.device)[:, None] for v in (first, size, offset))
        return self.bank[first + (offset + steps) % size]


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
