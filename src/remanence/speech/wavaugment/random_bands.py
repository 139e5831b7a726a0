"""Random bands of frequency, rejected."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.speech.wavaugment.augmentation import RowEffect
from remanence.speech.wavaugment.band_reject import (
    band_reject,
    depth_db,
    from_mel,
    reject_taps,
    to_mel,
)
from remanence.speech.wavaugment.draws import Range, as_range, as_whole_range, uniform, whole
from remanence.speech.wavaugment.frequency_drop import frequency_drop


class RandomBandReject(RowEffect):
    """A band even in mel, at most 27/256 `scaler` of the whole wide; `band_reject`.

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
        _check_slopes(sample_rate, transition_hz)
        self.sample_rate, self.transition_hz = sample_rate, transition_hz
        self.scaler = as_range("scaler", scaler, 1e-3, 256 / 27)[0]

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `low_hz` and `high_hz`; report `depth_db`; float64."""
        # A thousandth of a mel keeps the edges apart and the upper one below half the rate.
        top = to_mel(self.sample_rate / 2).item() - 1e-3
        width = uniform((1e-3, top * 27 * self.scaler / 256), len(lengths), generator)
        start = uniform((0.0, 1.0), len(lengths), generator) * (top - width)
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


class RandomFrequencyDrop(RowEffect):
    """Several bands of one width, their middles even over all frequencies; `frequency_drop`.

    Draws `low_hz` and `high_hz`, (B, most of `count`); a band that an example does without has
    equal edges.

    Args:
        sample_rate: Hz.
        count: how many bands, low..high, both included.
        width: of a band, as a share of half the rate, above 0, to 1.
        transition_hz: see `band_reject`.
        p: probability that an example is touched.
        always: augment in eval mode too.
    """

    def __init__(
        self,
        sample_rate: float,
        count: Range = (1, 3),
        width: float = 0.1,
        *,
        transition_hz: float | None = None,
        p: float = 1.0,
        always: bool = False,
    ) -> None:
        super().__init__(p=p, always=always)
        _check_slopes(sample_rate, transition_hz)
        self.count = as_whole_range("count", count, 0, 64)
        if self.count[1] < 1:
            raise InputError(f"count {count} drops nothing: raise it")
        self.width = as_range("width", width, 1e-3, 1)[0]
        self.sample_rate, self.transition_hz = sample_rate, transition_hz

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `low_hz` and `high_hz`, float64."""
        batch, (fewest, most) = len(lengths), self.count
        count = whole((fewest, most + 1), batch, generator)
        middle = uniform((0.0, 1.0), batch * most, generator).view(batch, most)
        edges = torch.stack([middle - self.width / 2, middle + self.width / 2])
        low, high = edges.clamp(0, 1 - 1e-6) * self.sample_rate / 2
        used = torch.arange(most) < count[:, None]
        return {"low_hz": low, "high_hz": torch.where(used, high, low)}

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Reject the bands."""
        return frequency_drop(
            rows,
            self.sample_rate,
            values["low_hz"],
            values["high_hz"],
            transition_hz=self.transition_hz,
            lengths=lengths,
        )


def _check_slopes(sample_rate: float, transition_hz: float | None) -> None:
    """Raise InputError now, and not at the first draw, where no filter can be designed."""
    low, high = torch.tensor([[0.0], [1.0]])
    reject_taps(sample_rate, low, high, transition_hz=transition_hz)
