"""Phone error rate: edits that turn what was heard into what was said, over its length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from remanence.errors import InputError
from remanence.speech.probe.bootstrap import ratio_interval

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ErrorRate:
    """Error rates of several utterances; they may exceed 1.

    Attributes:
        mean: Mean over utterances of each one's own rate, the figure of Libri-light (arXiv
            1912.07875).
        mean_interval: 95 % interval of it, resampling groups.
        pooled: All edits over all symbols of the references: long utterances weigh more.
        pooled_interval: 95 % interval of it.
        edits: Of each utterance (N,).
        lengths: Of each reference (N,).
    """

    mean: float
    mean_interval: tuple[float, float]
    pooled: float
    pooled_interval: tuple[float, float]
    edits: NDArray[np.int64]
    lengths: NDArray[np.int64]


def edit_distance(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> int:
    """Return the fewest substitutions, insertions and deletions that turn one into the other."""
    numbers: dict[Hashable, int] = {}
    a, b = (
        np.array([numbers.setdefault(symbol, len(numbers)) for symbol in sequence], dtype=np.int64)
        for sequence in (reference, hypothesis)
    )
    steps = np.arange(len(b) + 1)
    row = steps.copy()
    for i, symbol in enumerate(a, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (b != symbol))
        # An insertion costs one a step to the right: a running minimum of what is left without.
        row = np.minimum.accumulate(np.concatenate([[i], best]) - steps) + steps
    return int(row[-1])


def error_rate(
    references: Sequence[Sequence[Hashable]],
    hypotheses: Sequence[Sequence[Hashable]],
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> ErrorRate:
    """Return the error rate of hypotheses.

    Args:
        references: What was said, N sequences.
        hypotheses: What was heard.
        groups: What is resampled for the intervals, such as the speaker of each utterance;
            utterances if None.
        seed: For the resampling.

    Raises:
        InputError: Numbers of sequences differ, there are none, or a reference is empty.
    """
    if len(references) != len(hypotheses) or not references:
        raise InputError(
            f"{len(references)} references and {len(hypotheses)} hypotheses: give one of both for "
            "each utterance"
        )
    lengths = np.array([len(reference) for reference in references], dtype=np.int64)
    if not lengths.all():
        raise InputError(
            f"reference {int((lengths == 0).argmax())} is empty: leave utterances without phones "
            "out"
        )
    edits = np.array(
        [edit_distance(r, h) for r, h in zip(references, hypotheses, strict=True)], dtype=np.int64
    )
    rates, ones = edits / lengths, np.ones(len(edits))
    return ErrorRate(
        float(rates.mean()),
        ratio_interval(rates, ones, groups, seed=seed),
        float(edits.sum() / lengths.sum()),
        ratio_interval(edits, lengths, groups, seed=seed),
        edits,
        lengths,
    )
