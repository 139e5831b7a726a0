"""Channels along an axis of a tensor, and which of them move together."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Channels:
    """A run of channels that share one permutation.

    Attributes:
        count: Number of channels.
        repeat: How many neighbouring entries of the axis each channel has (after a flatten).
        tied_to: A run that it moves with; None for the root of those tied.
        fixed: Of a root: only the identity is allowed.
    """

    count: int
    repeat: int = 1
    tied_to: Channels | None = field(default=None, repr=False)
    fixed: bool = field(default=False, repr=False)

    def root(self) -> Channels:
        """Return the representative of everything tied to this run."""
        found = self
        while found.tied_to is not None:
            found = found.tied_to
        return found

    def freeze(self) -> None:
        """Forbid any permutation but the identity."""
        self.root().fixed = True

    def frozen(self) -> bool:
        """Tell whether only the identity is allowed."""
        return self.root().fixed

    def repeated(self, times: int) -> Channels:
        """Return the same channels with `times` as many entries each."""
        run = Channels(self.count, self.repeat * times)
        run.tied_to = self.root()
        return run

    def tie(self, other: Channels) -> None:
        """Make both runs move together."""
        mine, theirs = self.root(), other.root()
        if mine is not theirs:
            theirs.fixed |= mine.fixed
            mine.tied_to = theirs


Runs = list[Channels]


def tie(ours: Runs, theirs: Runs) -> None:
    """Make the channels of two axes move together; axes cut differently are frozen.

    Args:
        ours: Runs of one axis.
        theirs: Runs of the other.
    """
    same = [(run.count, run.repeat) for run in ours] == [(run.count, run.repeat) for run in theirs]
    if not same:
        freeze(ours)
        freeze(theirs)
        return
    for mine, other in zip(ours, theirs, strict=True):
        mine.tie(other)


def fixed(count: int) -> Runs:
    """Return one run of channels that stay where they are.

    Args:
        count: Number of channels.
    """
    run = Channels(count)
    run.freeze()
    return [run]


def freeze(runs: Runs) -> None:
    """Forbid any permutation of these channels.

    Args:
        runs: Runs of an axis.
    """
    for run in runs:
        run.freeze()
