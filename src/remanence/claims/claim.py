"""What a claim reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from remanence.kit.report import Report


@dataclass(frozen=True)
class Claim:
    """A paper's claim, measured here.

    Attributes:
        system: The name that `remanence reproduce` knows it by.
        paper: Title and arXiv id.
        sentence: The claim in one sentence.
        measured: What was measured here, with its interval.
        control: What the control gave.
        holds: Whether the claim holds here.
        data: What it was measured on; says so where it is synthetic.
        details: Writes the claim's own section of the report.
    """

    system: str
    paper: str
    sentence: str
    measured: str
    control: str
    holds: bool
    data: str
    details: Callable[[Report], None]
