"""Random pitch, speed and tempo."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from remanence.speech.wavaugment.augmentation import RowEffect
from remanence.speech.wavaugment.draws import Range, as_range, as_whole_range, uniform, whole
from remanence.speech.wavaugment.pitch import pitch_shift, speed, tempo
from remanence.speech.wavaugment.waves import check_rate

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
            lengths=lengths,
        )


class RandomSpeed(RowEffect):
    """Play faster or slower, pitch and all, by a factor even over a range; `speed`.

    The batch keeps its shape: a faster example ends earlier, at `ends`, with zeros behind it; a
    slower one is cut at its old end. Draws `factor`.
    """

    changes_ends = True

    def __init__(
        self,
        factor: Range = (0.9, 1.1),
        *,
        quality: Quality = "high",
        p: float = 1.0,
        always: bool = False,
    ) -> None:
        super().__init__(p=p, always=always)
        self.factor, self.quality = as_range("factor", factor, 0.1, 10), quality

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `factor`, float64."""
        return {"factor": uniform(self.factor, len(lengths), generator)}

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Change the speed."""
        out, _ = speed(rows, values["factor"], quality=self.quality, lengths=lengths)
        return functional.pad(out, (0, rows.shape[-1] - out.shape[-1]))

    def ends(self, lengths: Tensor, params: Params) -> Tensor:
        """Ends of the examples after the effect; see `Augmentation.ends`."""
        return _sooner(lengths, params)


class RandomTempo(RowEffect):
    """Play faster or slower at the same pitch, by a factor even over a range; `tempo`.

    Keeps the batch's shape as `RandomSpeed` does. Draws `factor`.
    """

    changes_ends = True

    def __init__(
        self,
        sample_rate: int,
        factor: Range = (0.9, 1.1),
        *,
        search: Search = "full",
        p: float = 1.0,
        always: bool = False,
    ) -> None:
        super().__init__(p=p, always=always)
        check_rate(sample_rate)
        self.sample_rate, self.search = sample_rate, search
        self.factor = as_range("factor", factor, 0.1, 10)

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `factor`, float64."""
        return {"factor": uniform(self.factor, len(lengths), generator)}

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Change the tempo."""
        factor = values["factor"]
        out, _ = tempo(rows, self.sample_rate, factor, search=self.search, lengths=lengths)
        return functional.pad(out, (0, rows.shape[-1] - out.shape[-1]))

    def ends(self, lengths: Tensor, params: Params) -> Tensor:
        """Ends of the examples after the effect; see `Augmentation.ends`."""
        return _sooner(lengths, params)


def _sooner(lengths: Tensor, params: Params) -> Tensor:
    values = params.values
    played = torch.floor(lengths.cpu() / values["factor"].cpu() + 0.5).long().minimum(lengths.cpu())
    return torch.where(values["apply"].cpu(), played, lengths.cpu())
