"""Random stretches of time: dropped, cut out, or swapped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.speech.wavaugment.augmentation import RowEffect
from remanence.speech.wavaugment.draws import Range, as_range, as_whole_range, below, seeds, whole
from remanence.speech.wavaugment.graph import home
from remanence.speech.wavaugment.pieces import chunk_swap, samples_left, splice_out
from remanence.speech.wavaugment.row_noise import normal_noise
from remanence.speech.wavaugment.time_drop import time_drop
from remanence.speech.wavaugment.waves import check_rate

if TYPE_CHECKING:
    from remanence.speech.wavaugment.params import Params

Fill = Literal["silence", "noise"]


class RandomTimeDrop(RowEffect):
    """Stretches anywhere within the valid samples, silenced or filled with noise; `time_drop`.

    Draws `durations` of whole samples in [0, `max_ms`), cut to the example's length, then `starts`
    over all places that fit; both (B, most of `count`). With noise also `seed`.

    Args:
        sample_rate: Hz.
        max_ms: longest stretch.
        count: how many stretches, or low..high, both included.
        edge_ms: a raised-cosine slope before and after each stretch; 2..5 ms let nothing click.
        fill: `silence`, or Gaussian `noise` at the level of what each stretch loses.
        p: probability that an example is touched.
        always: augment in eval mode too.
    """

    def __init__(
        self,
        sample_rate: float,
        max_ms: float = 100.0,
        *,
        count: Range = 1,
        edge_ms: float = 0.0,
        fill: Fill = "silence",
        p: float = 1.0,
        always: bool = False,
    ) -> None:
        super().__init__(p=p, always=always)
        self.longest = _longest(sample_rate, max_ms)
        self.edge = int(sample_rate * as_range("edge_ms", edge_ms, 0, 1e3)[0] / 1000)
        self.count = _count(count)
        if fill not in get_args(Fill):
            raise InputError(f"fill {fill!r} is unknown: give one of {get_args(Fill)}")
        self.fill = fill

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `durations` and `starts`, int64, and for noise `seed`, int64."""
        drawn = _stretches(lengths, self.longest, self.count, generator)
        return {**drawn, "seed": seeds(len(lengths), generator)} if self.fill == "noise" else drawn

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Drop the stretches."""
        starts, durations = values["starts"], values["durations"]
        noise = None
        if self.fill == "noise":
            noise = normal_noise(values["seed"].to(rows.device), rows.shape[-1])
        return time_drop(rows, starts, durations, edge=self.edge, noise=noise, lengths=lengths)


class RandomSpliceOut(RowEffect):
    """Stretches cut out and the gaps closed; `splice_out`. What is left ends sooner, at `ends`.

    Draws what `RandomTimeDrop` draws, and takes its arguments. The last sample always stays, so
    that nothing becomes empty.
    """

    changes_ends = True

    def __init__(
        self,
        sample_rate: float,
        max_ms: float = 100.0,
        *,
        count: Range = 1,
        p: float = 1.0,
        always: bool = False,
    ) -> None:
        super().__init__(p=p, always=always)
        self.longest, self.count = _longest(sample_rate, max_ms), _count(count)

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `durations` and `starts`, int64."""
        return _stretches((lengths - 1).clamp(min=0), self.longest, self.count, generator)

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Cut the stretches out."""
        return splice_out(rows, values["starts"], values["durations"], lengths=lengths)[0]

    def ends(self, lengths: Tensor, params: Params, time: int) -> Tensor:
        """Ends of the examples after the effect; see `Augmentation.ends`."""
        del time  # nothing grows
        values, old = params.to(home(lengths.device)).values, lengths.to(home(lengths.device))
        left = samples_left(values["starts"], values["durations"], old)
        return torch.where(values["apply"], left, old)


class RandomChunkSwap(RowEffect):
    """Chunks, far apart or near, change places; `chunk_swap`.

    Draws `order`, any permutation, and `starts` over all places that do not overlap, (B, chunks),
    and reports `sizes`: `share` of the example.

    Args:
        chunks: how many, 2 or more.
        share: of an example that one chunk holds, above 0; all together at most 1.
        p: probability that an example is touched.
        always: augment in eval mode too.
    """

    def __init__(
        self, chunks: int = 4, share: float = 0.01, *, p: float = 1.0, always: bool = False
    ) -> None:
        super().__init__(p=p, always=always)
        if chunks < 2:
            raise InputError(f"chunks {chunks} cannot change places: give 2 or more")
        self.chunks, self.share = chunks, as_range("share", share, 1e-6, 1 / chunks)[0]

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `order`, `starts` and `sizes`, int64."""
        shape = (len(lengths), self.chunks)
        order = torch.rand(shape, dtype=torch.float64, generator=generator).argsort(1)
        size = (lengths * self.share).long()
        spare = (lengths - self.chunks * size)[:, None].expand(shape)
        gaps = below(spare + 1, generator).sort(1)[0]
        starts = gaps + torch.arange(self.chunks) * size[:, None]
        return {"order": order, "starts": starts, "sizes": size}

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Swap the chunks."""
        return chunk_swap(rows, values["starts"], values["sizes"], values["order"], lengths=lengths)


def _longest(sample_rate: float, max_ms: float) -> int:
    check_rate(sample_rate)
    longest = int(sample_rate * as_range("max_ms", max_ms, 0, 1e6)[0] / 1000)
    if longest < 1:
        raise InputError(f"max_ms {max_ms} drops nothing: raise it")
    return longest


def _count(count: Range) -> tuple[int, int]:
    bounds = as_whole_range("count", count, 0, 1000)
    if bounds[1] < 1:
        raise InputError(f"count {count} drops nothing: raise it")
    return bounds


def _stretches(
    lengths: Tensor, longest: int, count: tuple[int, int], generator: torch.Generator | None
) -> dict[str, Tensor]:
    fewest, most = count
    ends = lengths[:, None].expand(-1, most)
    durations = below(torch.full_like(ends, longest), generator).minimum(ends)
    starts = below(ends - durations + 1, generator)
    if fewest < most:
        used = whole((fewest, most + 1), len(lengths), generator)
        durations = durations * (torch.arange(most) < used[:, None])
    return {"durations": durations, "starts": starts}
