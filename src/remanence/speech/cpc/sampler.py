"""Batches of windows: negatives are drawn within a batch, so who is in it decides what is learned.

With all windows of a batch from one speaker, no negative can be told by its voice (arXiv
2002.02848, Section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from remanence.errors import InputError
from remanence.speech.cpc.windows import Piece, Windows, cut

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

Mode = Literal["speaker", "sequence", "uniform", "sequential"]


@dataclass(frozen=True)
class WindowBatch:
    """One batch.

    Attributes:
        windows: The pieces of each window (B).
        speakers: The speaker of each window (B).
        everyone: The speakers of the windows of all processes at this step (processes B).
    """

    windows: tuple[tuple[Piece, ...], ...]
    speakers: tuple[str, ...]
    everyone: tuple[str, ...]


def same_speaker(speakers: Sequence[str]) -> float:
    """Return the chance that a negative, drawn evenly from windows, has its anchor's speaker.

    Args:
        speakers: Of the windows, at least one.
    """
    _, counts = np.unique(speakers, return_counts=True)
    return float(np.square(counts / len(speakers)).sum())


class WindowSampler:
    """Batches of windows, epoch by epoch, the same for the same seed.

    No window is in two batches of an epoch, and no sample in two windows. The last batch of a
    speaker or recording may be smaller. On several processes each has as many batches as the
    others, and at each step all have one of the same size: for that some windows are left out, no
    more than a batch for each further process. Iterating goes on where it stopped, or where
    `load_state_dict` says.

    Args:
        lengths: Samples of each recording (R,).
        speakers: Speaker of each recording (R,), or None where nobody knows.
        window: Samples of a window.
        batch: Windows a batch.
        mode: `speaker`, all of a batch from one speaker; `sequence`, from one recording (short
            recordings that are joined count as one); `uniform`, from all; `sequential`, in the
            order given, those shorter than a window last, nothing drawn.
        straddle: See `cut`.
        seed: Of offsets and order.
        rank: Number of this process.
        world_size: Number of processes.

    Attributes:
        skipped: Speakers with less than a window in all.
        epoch: Under way.
        done: Batches of this epoch that were given out.
        left_out: Windows of this epoch that no process is given.

    Raises:
        InputError: Nothing known of speakers that `mode` needs, an option out of range, no speaker
            with a window, or fewer batches than processes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        speakers: Sequence[str] | None,
        *,
        window: int,
        batch: int,
        mode: Mode = "speaker",
        straddle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if mode not in get_args(Mode):
            raise InputError(f"sampling {mode!r} is unknown: give one of {get_args(Mode)}")
        if window < 1 or batch < 1 or not 0 <= rank < world_size:
            raise InputError(
                f"window {window}, batch {batch}, rank {rank} of {world_size}: give at least 1, "
                "and a rank below the number of processes"
            )
        if speakers is None and mode == "speaker":
            raise InputError(
                "nothing says who speaks, and sampling 'speaker' needs it: name the speakers, or "
                "sample 'sequence' or 'uniform'"
            )
        names = [""] * len(lengths) if speakers is None else list(speakers)
        if len(names) != len(lengths):
            raise InputError(f"{len(names)} speakers for {len(lengths)} recordings: give one each")
        self.lengths = np.asarray(lengths, np.int64)
        if not len(self.lengths) or (self.lengths < 1).any():
            raise InputError("recordings are missing or empty: give at least one, none empty")
        self.names, place = np.unique(names, return_inverse=True)
        self.speakers = place.ravel().astype(np.int64)
        self.window, self.batch, self.mode, self.straddle = window, batch, mode, straddle
        self.seed, self.rank, self.world_size = seed, rank, world_size
        having = np.unique(self._cut(None).speaker)
        if not len(having):
            longest = int(np.bincount(self.speakers, self.lengths).max())
            raise InputError(
                f"no speaker has one window of {window:,} samples, the longest {longest:,} in all: "
                "give more speech or shorter windows"
            )
        self.skipped = tuple(str(name) for name in np.delete(self.names, having))
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.epoch, self.done = epoch, 0
        rng = np.random.default_rng((self.seed, epoch))
        self._windows = self._cut(None if self.mode == "sequential" else rng)
        batches = self._batches(rng)
        if len(batches) < self.world_size:  # perhaps for the windows that offsets cost
            self._windows = self._cut(None)
            batches = self._batches(rng)
        if len(batches) < self.world_size:
            raise InputError(
                f"{len(batches)} batches for {self.world_size} processes: give more speech, "
                "smaller batches or fewer processes"
            )
        self._steps = _steps(batches, self.world_size)
        self.left_out = len(self._windows) - sum(step.size for step in self._steps)

    def _cut(self, rng: np.random.Generator | None) -> Windows:
        return cut(self.lengths, self.speakers, self.window, straddle=self.straddle, rng=rng)

    def _batches(self, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        """Return the windows of each batch of all processes, in order."""
        count = len(self._windows)
        if self.mode == "sequential":
            return np.split(np.arange(count), range(self.batch, count, self.batch))
        group = {
            "speaker": self._windows.speaker,
            "sequence": self._windows.stretch,
            "uniform": np.zeros(count, np.int64),
        }[self.mode]
        order = rng.permutation(count)
        order = order[np.argsort(group[order], kind="stable")]
        edges = np.flatnonzero(np.diff(group[order])) + 1
        batches = [
            part
            for own in np.split(order, edges)
            for part in np.split(own, range(self.batch, len(own), self.batch))
        ]
        return [batches[i] for i in rng.permutation(len(batches))]

    def __len__(self) -> int:
        """Batches of this process in this epoch."""
        return len(self._steps)

    def __iter__(self) -> Iterator[WindowBatch]:
        """Yield the batches of this epoch that were not given out yet."""
        while self.done < len(self._steps):
            step = self._steps[self.done]
            self.done += 1
            chosen = step[self.rank]
            names = self._speakers(chosen)
            if self.mode in {"speaker", "sequence"}:
                assert len(set(names)) == 1, f"a batch of several speakers: {set(names)}"
            pieces = tuple(self._windows.pieces(i) for i in chosen.tolist())
            yield WindowBatch(pieces, names, self._speakers(step.ravel()))

    def _speakers(self, windows: NDArray[np.int64]) -> tuple[str, ...]:
        return tuple(str(name) for name in self.names[self._windows.speaker[windows]])

    def windows_of(self) -> dict[str, int]:
        """Return how many windows of each speaker are in this epoch's batches, of all processes."""
        given = np.concatenate([step.ravel() for step in self._steps])
        counts = np.bincount(self._windows.speaker[given], minlength=len(self.names))
        return {str(name): int(n) for name, n in zip(self.names, counts, strict=True)}

    def state_dict(self) -> dict[str, int]:
        """Return where in which epoch iterating stands."""
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go where `state_dict` stood."""
        self.set_epoch(state["epoch"])
        self.done = state["done"]


def _steps(batches: list[NDArray[np.int64]], processes: int) -> list[NDArray[np.int64]]:
    """Return the windows of each step (processes, B), B that of the smallest of its batches.

    Batches of about one size make a step, so that little is cut off; steps stay in the order of
    the batches.
    """
    largest_first = sorted(range(len(batches)), key=lambda i: -len(batches[i]))
    whole = len(batches) - len(batches) % processes
    together = [largest_first[i : i + processes] for i in range(0, whole, processes)]
    return [
        np.stack([batches[i][: len(batches[step[-1]])] for i in step])
        for step in sorted(together, key=min)
    ]
