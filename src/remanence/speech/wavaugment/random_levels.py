"""Random levels: clipping, gain, polarity, rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from remanence.errors import InputError
from remanence.speech.wavaugment.augmentation import RowEffect
from remanence.speech.wavaugment.clip import clip
from remanence.speech.wavaugment.draws import Range, as_range, seeds, uniform
from remanence.speech.wavaugment.levels import check_bits, gain, round_to_bits
from remanence.speech.wavaugment.row_noise import uniform_noise

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Law = Literal["triangular", "uniform"]


class RandomClip(RowEffect):
    """Clipping at a share of the extremes; `clip`. Draws `factor`.

    Args:
        factor: 0..1, a number or a range.
        law: over a range, `triangular`, which rises over it as in the published example, or
            `uniform`.
        keep_peak: see `clip`.
        p: probability that an example is touched.
        always: augment in eval mode too.
    """

    def __init__(
        self,
        factor: Range = (0.5, 1.0),
        *,
        law: Law = "triangular",
        keep_peak: bool = False,
        p: float = 1.0,
        always: bool = False,
    ) -> None:
        super().__init__(p=p, always=always)
        self.factor, self.keep_peak = as_range("factor", factor, 0, 1), keep_peak
        if law not in get_args(Law):
            raise InputError(f"law {law!r} is unknown: give one of {get_args(Law)}")
        self.law = law

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `factor`, float64."""
        low, high = self.factor
        share = uniform((0.0, 1.0), len(lengths), generator)
        rising = share.sqrt() if self.law == "triangular" else share
        return {"factor": low + (high - low) * rising}

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Clip."""
        return clip(rows, values["factor"], keep_peak=self.keep_peak, lengths=lengths)


class RandomGain(RowEffect):
    """A gain even in dB; `gain`. Draws `db`."""

    def __init__(self, db: Range = (-12.0, 0.0), *, p: float = 1.0, always: bool = False) -> None:
        super().__init__(p=p, always=always)
        self.db = as_range("db", db, -200, 200)

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `db`, float64."""
        return {"db": uniform(self.db, len(lengths), generator)}

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Change the level."""
        return gain(rows, values["db"], lengths=lengths)


class RandomPolarity(RowEffect):
    """The wave turned upside down, for about half the examples. Draws nothing but `apply`."""

    def __init__(self, *, p: float = 0.5, always: bool = False) -> None:
        super().__init__(p=p, always=always)

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw nothing."""
        del lengths, generator
        return {}

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Turn the wave."""
        del lengths, values
        return -rows


class RandomDither(RowEffect):
    """Rounding to fewer bits after triangular noise, as `dither` does. Draws `seed`."""

    def __init__(self, bits: int = 16, *, p: float = 1.0, always: bool = False) -> None:
        super().__init__(p=p, always=always)
        check_bits(bits)
        self.bits = bits

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `seed`, int64."""
        return {"seed": seeds(len(lengths), generator)}

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Round."""
        del lengths
        noise = uniform_noise(values["seed"].to(rows.device), 2, *rows.shape[1:])
        return round_to_bits(rows, noise.sum(1) - 1, self.bits)
