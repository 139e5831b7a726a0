"""What trains the networks of `remanence speech cpc`, unless options say otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Preset = Literal["cpc2", "small"]


@dataclass(frozen=True)
class Recipe:
    """What trains a network, beside its sizes.

    Attributes:
        window: Seconds of a window.
        negatives: Of each frame.
        lr: Peak learning rate.
        epochs: Passes at most.
        max_steps: Steps at most.
        ramp_epochs: In which the learning rate rises.
        ramp_steps: Likewise.
    """

    window: float
    negatives: int
    lr: float
    epochs: int | None = None
    max_steps: int | None = None
    ramp_epochs: int = 0
    ramp_steps: int = 0

    def changed(
        self,
        *,
        window: float | None,
        negatives: int | None,
        lr: float | None,
        epochs: int | None,
        max_steps: int | None,
    ) -> Recipe:
        """Return it with what is given in place of its own; an end replaces both ends."""
        ends = (epochs, max_steps)
        if ends == (None, None):
            ends = (self.epochs, self.max_steps)
        return replace(
            self,
            window=self.window if window is None else window,
            negatives=self.negatives if negatives is None else negatives,
            lr=self.lr if lr is None else lr,
            epochs=ends[0],
            max_steps=ends[1],
        )

    def ramp(self, epoch_steps: int) -> int:
        """Return in how many steps the learning rate rises: a tenth of all at most."""
        by_epochs = math.inf if self.epochs is None else self.epochs * epoch_steps
        total = min(by_epochs, math.inf if self.max_steps is None else self.max_steps)
        return int(min(self.ramp_epochs * epoch_steps + self.ramp_steps, total / 10))


RECIPES: Mapping[Preset, Recipe] = {
    "cpc2": Recipe(window=1.28, negatives=128, lr=2e-4, epochs=200, ramp_epochs=10),
    "small": Recipe(window=0.9, negatives=64, lr=1e-3, max_steps=3000, ramp_steps=100),
}
