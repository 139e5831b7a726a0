"""A linear layer on frozen features, trained by Adam (arXiv 2002.02848, section 4).

The layer sees features of frames that no gradient reaches: what it finds was there before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch.nn.functional import adaptive_avg_pool1d, cross_entropy, one_hot

from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

Pool = Literal["frames", "last", "mean", "segments"]

WINDOW = 128  # frames, 1.28 s at 100 a second
SEGMENTS = 5  # of an utterance whose means stand side by side


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """A linear classifier.

    Attributes:
        weight: (C, D).
        bias: (C,).
    """

    weight: Tensor
    bias: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """Return the score of each class (..., C) for features (..., D)."""
        return features.to(self.weight) @ self.weight.T + self.bias

    def predict(self, features: Tensor) -> Tensor:
        """Return the number of the best class (...), int64, for features (..., D)."""
        return self.scores(features).argmax(-1)


def vote(scores: Tensor) -> Tensor:
    """Return the class () that most frames or windows of an utterance are taken for.

    The mean of scores would be the score of the mean, which is the same for all utterances where
    features have had their mean over time taken out.

    Args:
        scores: (n, C); a tie goes to the higher mean.
    """
    votes = one_hot(scores.argmax(1), scores.shape[1]).sum(0)
    return (votes + 0.5 * scores.double().mean(0).softmax(0)).argmax()


def windows(features: Tensor, pool: Pool = "frames", window: int = WINDOW) -> list[Tensor]:
    """Cut the features of an utterance into windows, and take what is to be classified of each.

    Args:
        features: (S, D), S at least 1.
        pool: `frames` keeps every frame; `last` keeps the last frame of each window, as the
            official speaker probe does; `mean` the mean over the window. `segments` puts the means
            of five equal stretches of the utterance side by side: for words, which are known by
            their order.
        window: Frames a window.

    Returns:
        One tensor a window: (window, D), or (1, D) where pooled. The rest at the end is a shorter
        window; where pooled it is left out, unless it is all there is. Of `segments`, one (1, 5 D).

    Raises:
        InputError: `pool` is unknown.
    """
    if pool not in get_args(Pool):
        raise InputError(f"pool {pool!r} is unknown: give one of {', '.join(get_args(Pool))}")
    if pool == "segments":
        means = adaptive_avg_pool1d(features.T.unsqueeze(0), SEGMENTS)[0]  # (D, 5)
        return [means.T.reshape(1, -1)]
    parts = list(torch.split(features, window))
    if pool == "frames":
        return parts
    if len(parts) > 1 and len(parts[-1]) < window:
        parts.pop()
    return [part[-1:] if pool == "last" else part.mean(0, keepdim=True) for part in parts]


def moments(features: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (D,), float64, of all rows of features (n, D) each.

    The deviation of a dimension that does not vary is 1.
    """
    count, mean, scatter = 0, torch.zeros(()), torch.zeros(())
    for part in features:
        rows = part.double()
        own = rows.mean(0)
        gap = own - mean.to(own)
        total = count + len(rows)
        scatter = scatter.to(own) + (rows - own).square().sum(0)
        scatter = scatter + gap.square() * (count * len(rows) / total)
        mean = mean.to(own) + gap * (len(rows) / total)
        count = total
    spread = (scatter / max(count, 1)).sqrt()
    return mean, torch.where(spread > 1e-12 * mean.abs(), spread, 1.0)


def train_linear(
    features: Sequence[Tensor],
    labels: Sequence[Tensor],
    classes: int,
    *,
    epochs: int = 10,
    batch: int = 8,
    lr: float = 2e-4,
    eps: float = 2e-8,
    standardise: bool = True,
    seed: int = 0,
    device: torch.device | str | None = None,
    step: Callable[[], None] | None = None,
) -> tuple[LinearClassifier, Tensor]:
    """Train a linear layer with cross-entropy; the defaults are the paper's.

    Args:
        features: (n, D) of each window; see `windows`.
        labels: (n,) int64 of each window; a label below 0 is not learned from.
        classes: C.
        epochs: Passes over the windows.
        batch: Windows a step.
        lr: Learning rate of Adam.
        eps: Its epsilon.
        standardise: Whether to bring each dimension to mean 0 and deviation 1 first. The paper does
            not, and need not: features of its network lie within -1 and 1. The classifier that is
            returned takes the features as they were.
        seed: For the initial weights and the order of windows.
        device: Where to train; that of the features if None.
        step: Called after each epoch, for progress.

    Returns:
        The classifier, and the mean loss of each epoch (epochs,), on the CPU.

    Raises:
        InputError: Features and labels do not fit, or nothing is labelled.
    """
    check_examples(features, labels, classes)
    place = features[0].device if device is None else torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    dim = features[0].shape[1]
    bound = 1 / math.sqrt(dim)
    weight = torch.empty(classes, dim).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(classes).uniform_(-bound, bound, generator=generator)
    parameters = [w.to(place).requires_grad_() for w in (weight, bias)]
    mean, spread = torch.zeros(dim), torch.ones(dim)
    if standardise:
        mean, spread = moments(features)
    mean, spread = mean.to(place, torch.float32), spread.to(place, torch.float32)
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999), eps=eps)
    losses = []
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator).tolist()
        total, count = torch.zeros((), device=place), torch.zeros((), device=place)
        for i in range(0, len(order), batch):
            x = torch.cat([features[j] for j in order[i : i + batch]]).to(place).float()
            y = torch.cat([labels[j] for j in order[i : i + batch]]).to(place)
            logits = ((x - mean) / spread) @ parameters[0].T + parameters[1]
            known = (y >= 0).sum()
            loss = cross_entropy(logits, y.clamp(min=-1), ignore_index=-1, reduction="sum")
            optimizer.zero_grad(set_to_none=True)
            (loss / known.clamp(min=1)).backward()  # type: ignore[no-untyped-call]  # torch's own
            optimizer.step()
            total += loss.detach()
            count += known
        losses.append(total / count)
        if step is not None:
            step()
    weight, bias = (w.detach() for w in parameters)
    weight = weight / spread
    return LinearClassifier(weight, bias - weight @ mean), torch.stack(losses).cpu()


def check_examples(features: Sequence[Tensor], labels: Sequence[Tensor], classes: int) -> None:
    """Refuse examples that no classifier can be trained on.

    Args:
        features: (n, D) of each window or utterance.
        labels: (n,) int64 of each.
        classes: C, at least 2.

    Raises:
        InputError: See above.
    """
    if classes < 2:
        raise InputError(f"{classes} class: there is nothing to tell apart; label at least two")
    if len(features) != len(labels) or not features:
        raise InputError(
            f"{len(features)} features and {len(labels)} labels: give both for each utterance"
        )
    known = False
    for i, (x, y) in enumerate(zip(features, labels, strict=True)):
        if x.ndim != 2 or y.shape != x.shape[:1] or x.shape[1] != features[0].shape[1]:
            raise InputError(
                f"example {i}: features {tuple(x.shape)} and labels {tuple(y.shape)} do not fit; "
                "give (n, D), D the same for all, and (n,)"
            )
        if len(y) and int(y.max()) >= classes:
            raise InputError(f"example {i}: label {int(y.max())} of {classes} classes; give less")
        known = known or bool((y >= 0).any())
    if not known:
        raise InputError("nothing is labelled: give at least one label of 0 or more")
