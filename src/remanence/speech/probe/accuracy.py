"""How many are right, exactly, with chance, an interval and who was taken for whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from remanence.errors import InputError
from remanence.speech.probe.bootstrap import ratio_interval

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Accuracy of predictions, fractions from 0 to 1.

    Attributes:
        accuracy: Right ones over all that are labelled.
        interval: 95 % interval, resampling groups; NaN where there are fewer than two.
        balanced: Mean over the classes that occur of the accuracy of each.
        chance: Accuracy of the best constant answer; at least 1 / C.
        confusion: Number of each true class (rows) taken for each class (columns), (C, C) int64.
        right: Right ones of each utterance (N,).
        counts: Labelled ones of each utterance (N,).
    """

    accuracy: float
    interval: tuple[float, float]
    balanced: float
    chance: float
    confusion: NDArray[np.int64]
    right: NDArray[np.int64]
    counts: NDArray[np.int64]


def accuracy(
    predicted: Sequence[Tensor],
    labels: Sequence[Tensor],
    classes: int,
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Accuracy:
    """Count what is right; the official probes divide by one batch too few.

    Args:
        predicted: (n,) int64 of each utterance.
        labels: (n,) int64 of each; below 0 is not counted.
        classes: C.
        groups: What is resampled for the interval, such as the speaker of each utterance;
            utterances if None.
        seed: For the resampling.

    Raises:
        InputError: Predictions and labels do not fit, or nothing is labelled.
    """
    if len(predicted) != len(labels) or any(
        p.shape != y.shape for p, y in zip(predicted, labels, strict=False)
    ):
        raise InputError(f"predictions of {len(predicted)} utterances do not fit {len(labels)}")
    sizes = [len(y) for y in labels]
    y = torch.cat([torch.as_tensor(y).cpu() for y in labels]) if sizes else torch.empty(0).long()
    known = (y >= 0).numpy()
    if not known.any():
        raise InputError("nothing to count: no test utterance is labelled")
    p = torch.cat([p.cpu() for p in predicted]).numpy()[known]
    owner = np.repeat(np.arange(len(sizes)), sizes)[known]
    truth = y.numpy()[known]
    confusion = np.bincount(truth * classes + p, minlength=classes**2).reshape(classes, classes)
    right = np.bincount(owner[truth == p], minlength=len(sizes))
    counts = np.bincount(owner, minlength=len(sizes))
    seen = confusion.sum(1)
    each = confusion.diagonal()[seen > 0] / seen[seen > 0]
    return Accuracy(
        float(right.sum() / counts.sum()),
        ratio_interval(right, counts, groups, seed=seed),
        float(each.mean()),
        float(seen.max() / seen.sum()),
        confusion.astype(np.int64),
        right.astype(np.int64),
        counts.astype(np.int64),
    )
