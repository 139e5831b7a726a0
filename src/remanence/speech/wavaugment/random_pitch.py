"""Random pitch, speed and tempo."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from remanence.speech.wavaugment.augmentation import RowEffect
from remanence.speech.wavaugment.draws import Range, as_range, as_whole_range, uniform, whole
from remanence.speech.wavaugment.graph import declared, home
from remanence.speech.wavaugment.pitch import pitch_shift, speed, tempo
from remanence.speech.wavaugment.resampling import check_quality
from remanence.speech.wavaugment.waves import check_rate
from remanence.speech.wavaugment.wsola import check_search, sizes

if TYPE_CHECKING:
    from remanence.speech.wavaugment.params import Params
    from remanence.speech.wavaugment.resampling import Quality
    from remanence.speech.wavaugment.wsola import Search


class RandomPitch(RowEffect):
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
        sizes(sample_rate)  # which refuses a rate that is too low
        check_quality(quality)
        check_search(search)
        self.sample_rate, self.quality, self.search = sample_rate, quality, search
        self.cents = as_whole_range("cents", (low, high), -3600, 3600)

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `cents`, int64."""
        return {"cents": whole(self.cents, len(lengths), generator)}

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Shift the pitch."""
        return pitch_shift(
            rows,
            self.sample_rate,
            values["cents"].double(),
            quality=self.quality,
            search=self.search,
            bounds=declared(self.cents),
            lengths=lengths,
        )


class _Played(RowEffect):
    """Plays by a factor even over a range, and says where that ends."""

    changes_ends = True

    def __init__(self, factor: Range, *, p: float, always: bool) -> None:
        super().__init__(p=p, always=always)
        self.factor = as_range("factor", factor, 0.1, 10)

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `factor`, float64."""
        return {"factor": uniform(self.factor, len(lengths), generator)}

    def ends(self, lengths: Tensor, params: Params, time: int) -> Tensor:
        """Ends of the examples after the effect; see `Augmentation.ends`."""
        values, old = params.to(home(lengths.device)).values, lengths.to(home(lengths.device))
        played = torch.floor(old / values["factor"] + 0.5).long().clamp(max=time)
        return torch.where(values["apply"], played.maximum(old.clamp(max=1)), old)

    def most_samples(self, length: int) -> int:
        """The most samples after the effect; see `Augmentation.most_samples`."""
        return max(length, math.floor(length / self.factor[0] + 0.5))


class RandomSpeed(_Played):
    """Play faster or slower, pitch and all, by a factor even over a range; `speed`.

    The batch keeps its shape: a faster example ends sooner, at `ends`, with zeros behind it, a
    slower one later, in the padding behind its length. It is cut where the batch ends: pad by
    `most_samples` before, and nothing is. Draws `factor`.
    """

    def __init__(
        self,
        factor: Range = (0.9, 1.1),
        *,
        quality: Quality = "high",
        p: float = 1.0,
        always: bool = False,
    ) -> None:
        super().__init__(factor, p=p, always=always)
        check_quality(quality)
        self.quality = quality

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Change the speed."""
        out, _ = speed(
            rows,
            values["factor"],
            quality=self.quality,
            bounds=declared(self.factor),
            lengths=lengths,
        )
        return functional.pad(out, (0, rows.shape[-1] - out.shape[-1]))


class RandomTempo(_Played):
    """Play faster or slower at the same pitch, by a factor even over a range; `tempo`.

    Keeps the batch's shape as `RandomSpeed` does. Draws `factor`.
    """

    def __init__(
        self,
        sample_rate: int,
        factor: Range = (0.9, 1.1),
        *,
        search: Search = "full",
        p: float = 1.0,
        always: bool = False,
    ) -> None:
        super().__init__(factor, p=p, always=always)
        check_rate(sample_rate)
        sizes(sample_rate)  # which refuses a rate that is too low
        check_search(search)
        self.sample_rate, self.search = sample_rate, search

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Change the tempo."""
        out, _ = tempo(
            rows,
            self.sample_rate,
            values["factor"],
            search=self.search,
            bounds=declared(self.factor),
            lengths=lengths,
        )
        return functional.pad(out, (0, rows.shape[-1] - out.shape[-1]))
