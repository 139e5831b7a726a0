"""Effects with random parameters, each example its own; see `augmentation` for how they draw."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.speech.wavaugment.augmentation import RandomEffect
from remanence.speech.wavaugment.band_reject import (
    band_reject,
    depth_db,
    from_mel,
    reject_taps,
    to_mel,
)
from remanence.speech.wavaugment.clip import clip
from remanence.speech.wavaugment.noise import Mix, add_noise
from remanence.speech.wavaugment.pitch import pitch_shift
from remanence.speech.wavaugment.reverb import reverb
from remanence.speech.wavaugment.time_drop import time_drop
from remanence.speech.wavaugment.waves import as_waves, check_rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from remanence.speech.wavaugment.resampling import Quality
    from remanence.speech.wavaugment.wsola import Search

Range = float | tuple[float, float]


class RandomPitch(RandomEffect):
    """Pitch shifts of whole cents in [low, high), as the published code draws; `pitch_shift`.

    Draws `cents`. `low` equal to `high` fixes the shift.
    """

    def __init__(
        self,
        sample_rate: int,
        low: int = -300,
        high: int = 300,
        *,
        quality: Quality = "high",
        search: Search = "full",
        p: float = 1.0,
        always: bool = False,
    ) -> None:
        super().__init__(p=p, always=always)
        check_rate(sample_rate)
        self.sample_rate, self.quality, self.search = sample_rate, quality, search
        self.cents = _whole_range("cents", (low, high), -3600, 3600)

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `cents`, int64."""
        return {"cents": _integers(self.cents, len(lengths), generator)}

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Shift the pitch."""
        return pitch_shift(
            rows,
            self.sample_rate,
            values["cents"].double(),
            quality=self.quality,
            search=self.search,
            lengths=lengths,
        )


class RandomReverb(RandomEffect):
    """Reverberation; `reverb`. A range draws uniformly, a number is fixed.

    Draws `room` as whole percents in [low, high), as the published code does, then `reverberance`,
    `damping`, `stereo_depth`, `pre_delay_ms` and `wet_db`.
    """

    def __init__(
        self,
        sample_rate: float,
        *,
        room: Range = (0, 100),
        reverberance: Range = 50.0,
        damping: Range = 50.0,
        stereo_depth: Range = 100.0,
        pre_delay_ms: Range = 0.0,
        wet_db: Range = 0.0,
        p: float = 1.0,
        always: bool = False,
    ) -> None:
        super().__init__(p=p, always=always)
        check_rate(sample_rate)
        self.sample_rate = sample_rate
        self.room = _whole_range("room", room, 0, 100)
        self.ranges = {
            "reverberance": _range("reverberance", reverberance, 0, 100),
            "damping": _range("damping", damping, 0, 100),
            "stereo_depth": _range("stereo_depth", stereo_depth, 0, 100),
            "pre_delay_ms": _range("pre_delay_ms", pre_delay_ms, 0, 500),
            "wet_db": _range("wet_db", wet_db, -10, 10),
        }

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `room`, int64, and the others, float64."""
        room = _integers(self.room, len(lengths), generator)
        others = {k: _uniform(v, len(lengths), generator) for k, v in self.ranges.items()}
        return {"room": room, **others}

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Reverberate; one channel stays one."""
        return reverb(
            rows,
            self.sample_rate,
            reverberance=values["reverberance"],
            damping=values["damping"],
            room=values["room"],
            stereo_depth=values["stereo_depth"],
            pre_delay_ms=values["pre_delay_ms"],
            wet_db=values["wet_db"],
            lengths=lengths,
        )


class RandomNoise(RandomEffect):
    """Additive noise from a bank of clips at a uniform ratio; `add_noise`.

    Draws `clip`, `offset` (over all that leave the noise in one piece, where it is as long as the
    example; else over the whole clip) and `snr_db`. The bank is a buffer and moves with the module.

    Args:
        source: clips at the waves' sample rate: (M, T') or a sequence of (T',) floats.
        snr: dB, a number or a range.
        mix: see `add_noise`.
        p: probability that an example is touched.
        always: augment in eval mode too.

    Raises:
        InputError: an empty bank or an empty clip.
    """

    bank: Tensor

    def __init__(
        self,
        source: Tensor | Sequence[Tensor],
        snr: Range = (5.0, 15.0),
        *,
        mix: Mix = "rms",
        p: float = 1.0,
        always: bool = False,
    ) -> None:
        super().__init__(p=p, always=always)
        clips = [as_waves(clip).wave for clip in source]
        if not clips or any(clip.shape[:2] != (1, 1) for clip in clips):
            raise InputError("the noise bank is empty or not mono: give (M, T') or (T',) clips")
        self.sizes = torch.tensor([clip.shape[-1] for clip in clips])
        self.firsts = self.sizes.cumsum(0) - self.sizes
        self.register_buffer("bank", torch.cat([c[0, 0] for c in clips]), persistent=False)
        self.snr, self.mix = _range("snr", snr, -200, 200), mix

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `clip` and `offset`, int64, and `snr_db`, float64."""
        clip = _integers((0, len(self.sizes)), len(lengths), generator)
        size = self.sizes[clip]
        places = torch.where(size >= lengths, size - lengths + 1, size).clamp(max=size)
        offset = _below(places, generator)
        return {
            "clip": clip,
            "offset": offset,
            "snr_db": _uniform(self.snr, len(lengths), generator),
        }

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Mix the noise in."""
        if bool((values["clip"] >= len(self.sizes)).any()):
            raise InputError(f"parameters name a clip beyond the bank's {len(self.sizes)}")
        time = torch.arange(rows.shape[-1], device=rows.device)
        first, size, offset = (
            value.to(rows.device)[:, None]
            for value in (
                self.firsts[values["clip"]],
                self.sizes[values["clip"]],
                values["offset"],
            )
        )
        noise = self.bank.to(rows.device)[first + (offset + time) % size]
        return add_noise(rows, noise[:, None], values["snr_db"], mix=self.mix, lengths=lengths)


class RandomBandReject(RandomEffect):
    """A band uniform in mel, at most 27/256 `scaler` of the whole wide; `band_reject`.

    Draws `low_hz` and `high_hz` and reports `depth_db`, the gain at the band's middle: most bands
    are narrower than the filter's slopes and only weakened.

    Args:
        sample_rate: Hz.
        scaler: above 0, to 256/27.
        transition_hz: see `band_reject`.
        p: probability that an example is touched.
        always: augment in eval mode too.
    """

    def __init__(
        self,
        sample_rate: float,
        scaler: float = 1.0,
        *,
        transition_hz: float | None = None,
        p: float = 1.0,
        always: bool = False,
    ) -> None:
        super().__init__(p=p, always=always)
        check_rate(sample_rate)
        self.sample_rate, self.transition_hz = sample_rate, transition_hz
        self.scaler = _range("scaler", scaler, 1e-3, 256 / 27)[0]

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `low_hz` and `high_hz`; report `depth_db`; float64."""
        # A thousandth of a mel keeps the edges apart and the upper one below half the rate.
        top = to_mel(self.sample_rate / 2).item() - 1e-3
        width = _uniform((1e-3, top * 27 * self.scaler / 256), len(lengths), generator)
        start = _uniform((0.0, 1.0), len(lengths), generator) * (top - width)
        low, high = from_mel(start), from_mel(start + width)
        taps = reject_taps(self.sample_rate, low, high, transition_hz=self.transition_hz)
        depth = depth_db(taps, self.sample_rate, (low + high) / 2)
        return {"low_hz": low, "high_hz": high, "depth_db": depth}

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Weaken the band."""
        return band_reject(
            rows,
            self.sample_rate,
            values["low_hz"],
            values["high_hz"],
            transition_hz=self.transition_hz,
            lengths=lengths,
        )


class RandomTimeDrop(RandomEffect):
    """Silent stretches anywhere within the valid samples; `time_drop`.

    Draws `durations` of whole samples in [0, `max_ms`), cut to the example's length, then `starts`
    over all places that fit; both (B, count).
    """

    def __init__(
        self,
        sample_rate: float,
        max_ms: float = 100.0,
        *,
        count: int = 1,
        edge_ms: float = 0.0,
        p: float = 1.0,
        always: bool = False,
    ) -> None:
        super().__init__(p=p, always=always)
        check_rate(sample_rate)
        self.longest = int(sample_rate * _range("max_ms", max_ms, 0, 1e6)[0] / 1000)
        self.edge = int(sample_rate * _range("edge_ms", edge_ms, 0, 1e3)[0] / 1000)
        if self.longest < 1 or count < 1:
            raise InputError(f"max_ms {max_ms} or count {count} drops nothing: raise it")
        self.count = count

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `durations` and `starts`, int64."""
        ends = lengths[:, None].expand(-1, self.count)
        durations = _below(torch.full_like(ends, self.longest), generator).minimum(ends)
        return {"durations": durations, "starts": _below(ends - durations + 1, generator)}

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Silence the stretches."""
        return time_drop(
            rows, values["starts"], values["durations"], edge=self.edge, lengths=lengths
        )


class RandomClip(RandomEffect):
    """Clipping at a share of the extremes; `clip`. Draws `factor`.

    A range draws from the triangular law that rises over it, as the published example does.
    """

    def __init__(self, factor: Range = (0.5, 1.0), *, p: float = 1.0, always: bool = False) -> None:
        super().__init__(p=p, always=always)
        self.factor = _range("factor", factor, 0, 1)

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `factor`, float64."""
        low, high = self.factor
        rising = _uniform((0.0, 1.0), len(lengths), generator).sqrt()
        return {"factor": low + (high - low) * rising}

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Clip."""
        return clip(rows, values["factor"], lengths=lengths)


def _range(name: str, value: Range, least: float, most: float) -> tuple[float, float]:
    low, high = value if isinstance(value, tuple) else (value, value)
    if not least <= low <= high <= most:
        raise InputError(f"{name} {value} is no range within {least:g}..{most:g}: give low <= high")
    return low, high


def _whole_range(name: str, value: Range, least: float, most: float) -> tuple[int, int]:
    low, high = _range(name, value, least, most)
    if low != int(low) or high != int(high):
        raise InputError(f"{name} {value} is not whole: give whole numbers")
    return int(low), int(high)


def _uniform(bounds: tuple[float, float], n: int, generator: torch.Generator | None) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(n, dtype=torch.float64, generator=generator)


def _integers(bounds: tuple[int, int], n: int, generator: torch.Generator | None) -> Tensor:
    """Whole numbers in [low, high); `low` where both are equal."""
    low, high = bounds
    return low + _below(torch.full((n,), max(1, high - low)), generator)


def _below(limit: Tensor, generator: torch.Generator | None) -> Tensor:
    """Whole numbers 0..limit - 1, one for each of `limit`."""
    draws = torch.rand(limit.shape, dtype=torch.float64, generator=generator)
    return (draws * limit).long().minimum(limit - 1)
