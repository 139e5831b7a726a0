"""Which frames belong to an item.

Frame i of features at `frame_rate` stands for the time (i + 1/2) / frame_rate, the centre of what
it sees. An item has the frames whose centres lie in it, both ends included. All of it is done in
whole numbers.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from remanence.errors import InputError
from remanence.speech.abx.items import WHOLE, most_common

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from remanence.speech.abx.items import Items

    Integers = NDArray[np.int64]

Slicing = Literal["inclusive", "librilight"]

SLACK = 2  # frames that a file may lack at its end, from windows that no longer fit
NANO = 10**9


def slice_frames(
    items: Items,
    frames: Mapping[str, int],
    *,
    frame_rate: float | Fraction | None = None,
    times: Mapping[str, Tensor] | None = None,
    slicing: Slicing = "inclusive",
) -> tuple[Integers, Integers]:
    """Return the frames of items, from `start` to before `stop`; none where start = stop.

    Args:
        items: The items; those without an end have all frames of their file from the onset on, and
            those of no length none.
        frames: Number of frames of each file.
        frame_rate: Frames a second, of evenly spaced features; or else
        times: Centres of the frames of each file in seconds, rising (T,).
        slicing: `inclusive`; or `librilight`, which leaves the last frame of each item out, as the
            code of Libri-light does (arXiv 1912.07875).

    Returns:
        start and stop (n,).

    Raises:
        InputError: Both or none of rate and times are given, times do not fit the frames, a file
            has no features, or an item lies outside its file.
    """
    if slicing not in get_args(Slicing):
        raise InputError(f"slicing {slicing!r} is unknown: give one of {get_args(Slicing)}")
    if (frame_rate is None) == (times is None):
        raise InputError("give either frame_rate or times, the centres of the frames")
    missing = [file for file in items.file if file not in frames]
    if missing:
        raise InputError(f"no features of {most_common(missing)}: extract them, or leave them out")
    length = np.array([frames[file] for file in items.file], np.int64)
    whole = items.offset == WHOLE
    if frame_rate is not None:
        start, last = _by_rate(items, frame_rate)
    else:
        assert times is not None
        start, last = _by_times(items, frames, times)
    outside = ~whole & (last > length - 1 + SLACK) | (start > length + SLACK)
    if outside.any():
        i = int(outside.argmax())
        raise InputError(
            f"{items.describe(i)}, lies outside its {length[i]} frames: check frame_rate and item"
        )
    stop = last + 1 if slicing == "inclusive" else last
    stop = np.where(whole, length, np.minimum(stop, length))
    start = np.clip(start, 0, length)
    return start, np.where(items.onset == items.offset, start, np.maximum(stop, start))


def _by_rate(items: Items, frame_rate: float | Fraction) -> tuple[Integers, Integers]:
    if not 0 < frame_rate < float("inf"):
        raise InputError(f"frame_rate {frame_rate}: give frames a second, above 0")
    rate = Fraction(frame_rate).limit_denominator(10**6)
    # t * rate / ticks - 1/2 over one denominator, in Python's own integers, which do not overflow.
    over = 2 * items.ticks * rate.denominator
    onset, offset = (
        2 * rate.numerator * t.astype(object) - items.ticks * rate.denominator
        for t in (items.onset, items.offset)
    )
    return (-(-onset // over)).astype(np.int64), (offset // over).astype(np.int64)


def _by_times(
    items: Items, frames: Mapping[str, int], times: Mapping[str, Tensor]
) -> tuple[Integers, Integers]:
    start, last = np.zeros(len(items), np.int64), np.zeros(len(items), np.int64)
    onset = -(-items.onset.astype(object) * NANO // items.ticks)
    offset = items.offset.astype(object) * NANO // items.ticks
    for file, own in items.by_file().items():
        if file not in times or tuple(times[file].shape) != (frames[file],):
            raise InputError(f"times of {file!r} do not fit: give {frames[file]}, one a frame")
        centres = torch.round(times[file].double() * NANO).long().cpu().numpy()
        if (np.diff(centres) <= 0).any():
            raise InputError(f"times of {file!r} do not rise: sort the frames")
        start[own] = np.searchsorted(centres, onset[own].astype(np.int64), "left")
        last[own] = np.searchsorted(centres, offset[own].astype(np.int64), "right") - 1
    return start, last
