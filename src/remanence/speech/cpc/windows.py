"""Windows: which pieces of which recordings make one.

Recordings lie one after the other on a tape, in stretches that a window never leaves. A stretch is
one recording, or the joined recordings of one speaker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """Samples `start` to `stop` of a recording.

    Attributes:
        recording: Number of the recording.
        start: First sample.
        stop: One past the last sample.
    """

    recording: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of one length.

    Attributes:
        window: Samples of each.
        starts: Where on the tape each begins (n,).
        speaker: Number of each one's speaker (n,).
        stretch: Number of the stretch that each lies in (n,).
        order: Recordings as they follow one another on the tape (R,).
        edges: Where on the tape each of them begins, and where the last ends (R + 1,).
    """

    window: int
    starts: Integers
    speaker: Integers
    stretch: Integers
    order: Integers
    edges: Integers

    def __len__(self) -> int:
        return len(self.starts)

    def pieces(self, i: int) -> tuple[Piece, ...]:
        """Return what window `i` is made of, in order; `window` samples together."""
        at, stop = int(self.starts[i]), int(self.starts[i]) + self.window
        place = int(np.searchsorted(self.edges, at, side="right")) - 1
        found = []
        while at < stop:
            begin, end = int(self.edges[place]), int(self.edges[place + 1])
            until = min(stop, end)
            found.append(Piece(int(self.order[place]), at - begin, until - begin))
            at, place = until, place + 1
        return tuple(found)


def cut(
    lengths: Integers,
    speakers: Integers,
    window: int,
    *,
    straddle: bool = False,
    rng: np.random.Generator | None = None,
) -> Windows:
    """Cut recordings into consecutive windows that share no sample.

    A recording of at least a window is a stretch of its own; shorter ones of one speaker are joined
    to a stretch. The windows of a stretch begin at an offset that leaves none out: what whole
    windows fit is cut in the same places every time. With `straddle` all recordings of a speaker
    are joined in the order given, and one offset in 0..window/2 holds for all speakers, as in the
    published code: windows may then hold the end of one recording and the beginning of the next.

    Args:
        lengths: Samples of each recording (R,), at least 1.
        speakers: Number of each recording's speaker (R,).
        window: Samples of a window.
        straddle: Join long recordings too.
        rng: Draws offsets and the order in which short recordings are joined; None for offset 0 and
            the order given.

    Returns:
        All windows, stretch by stretch.
    """
    alone = np.zeros(len(lengths), bool) if straddle else lengths >= window
    joined = np.flatnonzero(~alone)
    if rng is not None and not straddle:
        joined = rng.permutation(joined)
    joined = joined[np.argsort(speakers[joined], kind="stable")]
    order = np.concatenate((np.flatnonzero(alone), joined))
    edges = np.concatenate(([0], lengths[order].cumsum()))

    # A stretch begins at each long recording, and at the first of each speaker's joined ones.
    begins = np.ones(len(order), bool)
    begins[int(alone.sum()) + 1 :] = np.diff(speakers[joined]) != 0
    first = np.flatnonzero(begins)
    start = edges[first]
    length = np.diff(np.append(start, edges[-1]))
    if rng is None:
        offset = np.zeros(len(first), np.int64)
    elif straddle:
        # Whoever speaks longest keeps a window.
        most = min(window // 2, max(int(length.max()) - window, 0))
        offset = np.full(len(first), rng.integers(most + 1))
    else:
        offset = rng.integers(length % window + 1)
    count = np.maximum(length - offset, 0) // window

    stretch = np.repeat(np.arange(len(first)), count)
    number = np.arange(len(stretch)) - np.repeat(count.cumsum() - count, count)
    starts = (start + offset)[stretch] + number * window
    return Windows(window, starts, speakers[order[first]][stretch], stretch, order, edges)
