"""Numbers in words: how many of what, and how long."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """`1 recording`, `1,200 recordings`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """A duration in the unit that suits it: `4.2 s`, `3.5 minutes`, `12.0 hours`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
