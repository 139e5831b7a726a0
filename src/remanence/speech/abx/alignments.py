"""Where phones begin and end: the text of TextGrid and .phn files, and labels of frames.

Each function returns intervals (onset, offset, label) in whole ticks, in order of time.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from itertools import groupby
from typing import TYPE_CHECKING

from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TICKS = 10**9  # a second in ticks, where a file gives seconds

Interval = tuple[int, int, str]

LATEST = 10**9  # seconds, some thirty years
LONGEST = 18  # digits of a number of samples, which 64 bits hold

# A quoted text, in which "" stands for a quote; or a flag; or a number that is no index in []; or a
# remark, which nobody reads.
_TOKEN = re.compile(
    r'"((?:[^"]|"")*)"|<(\w+)>|(?<![\w\[.])(-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?![\w\]])'
    r"|!.*"
)


def ticks_of(seconds: str | float, what: str) -> int:
    """Return decimal seconds as ticks; what lies below a nanosecond is rounding of floats."""
    try:
        time = Decimal(str(seconds))
        known = abs(time) <= LATEST
    except (InvalidOperation, ValueError):
        known = False
    if not known:
        raise InputError(f"{what}: {str(seconds)!r} is no time: give seconds")
    return round(time * TICKS)


def parse_textgrid(text: str, tier: str, what: str = "TextGrid") -> list[Interval]:
    """Return the intervals of one tier of a Praat TextGrid, long or short format.

    Args:
        text: The file's text.
        tier: The tier's name; or the end of it after " - ", as in "speaker - phones".
        what: The file's name, for messages.

    Returns:
        Intervals in nanoseconds, empty labels included.

    Raises:
        InputError: The text is no TextGrid, or lacks the tier or holds several of that name.
    """
    if "ooTextFile" not in text[:200] or "TextGrid" not in text[:200]:
        raise InputError(
            f"{what} is no TextGrid: it should begin with 'File type = \"ooTextFile\"'"
        )
    tokens = _tokens(text)
    found: dict[str, list[Interval]] = {}
    try:
        for _ in range(2):  # the file's type, its class
            next(tokens)
        _number(tokens), _number(tokens)
        if next(tokens) != "<exists>":
            raise InputError(f"{what} holds no tiers: align it first")
        for _ in range(int(_number(tokens))):
            kind, name = next(tokens), next(tokens)
            _number(tokens), _number(tokens)
            intervals = []
            for _ in range(int(_number(tokens))):
                onset = ticks_of(_number(tokens), what)
                offset = ticks_of(_number(tokens), what) if kind == '"IntervalTier' else onset
                intervals.append((onset, offset, next(tokens)[1:].strip()))
            if kind != '"IntervalTier' or tier not in {name[1:], name[1:].rpartition(" - ")[2]}:
                continue
            if name in found:
                raise InputError(f"{what} holds two tiers {name[1:]!r}: rename one")
            found[name] = intervals
    except (StopIteration, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what} breaks off or is damaged: save it again as a TextGrid") from None
    if len(found) != 1:
        have = f"{len(found)} tiers" if found else "no interval tier"
        raise InputError(f"{what} holds {have} {tier!r}: name the tier that holds the phones")
    return next(iter(found.values()))


def parse_phn(text: str, what: str = ".phn") -> list[Interval]:
    """Return the intervals of a TIMIT .phn file: a line `first_sample end_sample phone` each.

    Raises:
        InputError: A line is of another form.
    """
    intervals = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        words = line.split()
        if len(words) != 3 or not (words[0].isdigit() and words[1].isdigit()):
            raise InputError(f"{what} line {number}: write 'first_sample end_sample phone'")
        if max(map(len, words[:2])) > LONGEST:
            raise InputError(
                f"{what} line {number}: {words[1]} is a later time than can be: mend it"
            )
        intervals.append((int(words[0]), int(words[1]), words[2]))
    return intervals


def runs_of_labels(labels: Iterable[object]) -> list[Interval]:
    """Return the runs of equal labels, one a frame, in ticks of a frame."""
    intervals, start = [], 0
    for label, run in groupby(labels):
        end = start + sum(1 for _ in run)
        intervals.append((start, end, str(label)))
        start = end
    return intervals


def _tokens(text: str) -> Iterator[str]:
    """Yield quoted texts, each after a quote, flags in angles, and numbers."""
    for match in _TOKEN.finditer(text):
        quoted, flag, number = match.groups()
        if quoted is not None:
            yield '"' + quoted.replace('""', '"')
        elif flag or number:
            yield f"<{flag}>" if flag else number


def _number(tokens: Iterator[str]) -> str:
    token = next(tokens)
    if token[0] in '"<':
        raise ValueError(token)
    return token
