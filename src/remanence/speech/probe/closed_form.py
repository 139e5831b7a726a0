"""Linear probes without a learning rate: ridge regression, and multinomial logistic regression.

Both are convex: their answer does not depend on a seed, an order or a number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import minimize
from torch.nn.functional import cross_entropy, one_hot

from remanence.errors import InputError
from remanence.speech.probe.linear import LinearClassifier, check_examples, moments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

RIDGES = tuple(10.0**k for k in range(-6, 2))
ROWS = 65_536  # frames of which logits are held at a time


@dataclass
class RidgeSums:
    """What ridge regression needs to know of any number of frames, (D, D) and (C, D) in float64.

    Sums are taken about the running mean, so that features far from 0 lose no digits.

    Attributes:
        counts: Frames of each class (C,).
        means: Mean of each class (C, D).
        scatter: Sum over frames of (x - mean)(x - mean)^T (D, D).
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, dim: int, classes: int, device: torch.device | str = "cpu") -> RidgeSums:
        """Return the sums of no frames."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(zeros(classes), zeros(classes, dim), zeros(dim, dim))

    @property
    def count(self) -> Tensor:
        """Number of frames ()."""
        return self.counts.sum()

    @property
    def mean(self) -> Tensor:
        """Mean of all frames (D,)."""
        return self.counts @ self.means / self.count.clamp(min=1)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add frames (n, D) with labels (n,) int64; those with a label below 0 are left out."""
        known = labels >= 0
        x = features[known].to(self.scatter)
        if not len(x):
            return
        y = one_hot(labels[known].to(x.device), len(self.counts)).to(x)
        counts = y.sum(0)
        means = y.T @ x / counts.clamp(min=1).unsqueeze(1)
        centred = x - x.mean(0)
        self.merge(RidgeSums(counts, means, centred.T @ centred))

    def merge(self, other: RidgeSums) -> None:
        """Add the frames of other sums, such as another process's."""
        n, m = self.count, other.count
        if not int(m):
            return
        gap = other.mean - self.mean
        total = self.counts + other.counts
        share = (other.counts / total.clamp(min=1)).unsqueeze(1)
        scatter = self.scatter + other.scatter + torch.outer(gap, gap) * (n * m / (n + m))
        self.means = self.means + share * (other.means - self.means)
        self.counts, self.scatter = total, scatter

    def solve(self, ridges: Sequence[float]) -> list[LinearClassifier]:
        """Return, for each ridge, the least squares fit to one-hot labels.

        Minimises mean |y - W x - b|^2 + ridge |W d|^2 over W (C, D) and b (C,), where d are the
        deviations of the features: those of large values are not favoured.

        Raises:
            InputError: There are fewer than two frames, or a ridge is not positive.
        """
        n = float(self.count)
        if n < 2:
            raise InputError(f"{n:.0f} labelled frames: ridge regression needs at least 2")
        if min(ridges) <= 0:
            raise InputError(f"ridge {min(ridges):g}: give more than 0, such as 0.001")
        mean, variance = self.mean, self.scatter.diagonal() / n
        varies = variance > (1e-12 * mean).square()
        spread = torch.where(varies, variance, 1.0).sqrt()
        keep = varies.to(spread) / spread  # a dimension that does not vary gets weight 0
        correlation = self.scatter / n * torch.outer(keep, keep)
        target = (self.counts / n).unsqueeze(1) * (self.means - mean) * keep  # (C, D)
        values, vectors = torch.linalg.eigh(correlation)
        turned = target @ vectors
        prior = self.counts / n
        found = []
        for ridge in ridges:
            weight = (turned / (values.clamp(min=0) + ridge)) @ vectors.T * keep
            found.append(LinearClassifier(weight, prior - weight @ mean))
        return found

    def squared_error(self, classifier: LinearClassifier) -> float:
        """Return the mean over these frames of |y - W x - b|^2, y one-hot."""
        n = float(self.count)
        W, b = classifier.weight.to(self.scatter), classifier.bias.to(self.scatter)
        middle = W @ self.mean + b
        # Of the score of each class: variance and squared mean, less what agrees with y.
        square = torch.einsum("cd,de,ce->", W, self.scatter, W) / n + middle.square().sum()
        agree = (self.counts / n * ((W * self.means).sum(1) + b)).sum()
        return float(1 - 2 * agree + square)


def ridge_probe(
    folds: Sequence[RidgeSums], ridges: Sequence[float] = RIDGES
) -> tuple[LinearClassifier, float]:
    """Fit ridge regression, its ridge chosen by cross-validation over folds.

    Args:
        folds: Sums of the frames of each fold; no utterance should lie in two of them. With a
            single fold of frames there is nothing to choose by: the middle ridge is taken.
        ridges: What to choose from, rising.

    Returns:
        The classifier of all frames, and the ridge of the smallest squared error of frames that
        were held out.

    Raises:
        InputError: There are no folds or too few frames.
    """
    if not folds:
        raise InputError("no folds: give the sums of at least one")

    def together(parts: Sequence[RidgeSums]) -> RidgeSums:
        classes, dim = folds[0].means.shape
        total = RidgeSums.empty(dim, classes, folds[0].scatter.device)
        for part in parts:
            total.merge(part)
        return total

    full = [fold for fold in folds if int(fold.count) >= 2]
    best = len(ridges) // 2
    if len(full) > 1:
        errors = np.zeros(len(ridges))
        for held in full:
            fits = together([fold for fold in full if fold is not held]).solve(ridges)
            errors += [float(held.count) * held.squared_error(fit) for fit in fits]
        best = int(errors.argmin())
    return together(folds).solve([ridges[best]])[0], ridges[best]


def logistic_probe(
    features: Sequence[Tensor],
    labels: Sequence[Tensor],
    classes: int,
    *,
    l2: float = 1.0,
    iterations: int = 200,
    tolerance: float = 1e-6,
    device: torch.device | str | None = None,
) -> tuple[LinearClassifier, bool]:
    """Fit multinomial logistic regression by L-BFGS, on features of deviation 1.

    Minimises the sum of cross-entropies + l2/2 |W|^2, as scikit-learn does with C = 1/l2; the bias
    is free. Logits are held for a part of the frames at a time.

    Args:
        features: (n, D) of each utterance.
        labels: (n,) int64 of each; below 0 is not learned from.
        classes: C.
        l2: Weight of the penalty.
        iterations: At most so many.
        tolerance: Stop where no entry of the mean loss's gradient is larger.
        device: Where to compute; that of the features if None.

    Returns:
        The classifier, and whether the tolerance was reached.

    Raises:
        InputError: Features and labels do not fit, or `l2` is below 0.
    """
    check_examples(features, labels, classes)
    if not l2 >= 0:
        raise InputError(f"l2 {l2}: give 0 or more; 1 is usual")
    place = features[0].device if device is None else torch.device(device)
    y = torch.cat(list(labels))
    known = y >= 0
    x, y = torch.cat(list(features))[known].to(place), y[known].to(place)
    mean, spread = moments([x])
    x = ((x - mean) / spread).float()
    dim, n = x.shape[1], len(x)

    def objective(flat: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, object]:
        W = torch.from_numpy(flat).to(place, torch.float32).view(classes, dim + 1)
        W = W.clone().requires_grad_()
        total = 0.5 * l2 * W[:, :-1].double().square().sum()
        gradient = torch.autograd.grad(total, W)[0].double()
        total = total.detach()
        for part, own in zip(torch.split(x, ROWS), torch.split(y, ROWS), strict=True):
            logits = part @ W[:, :-1].T + W[:, -1]
            loss = cross_entropy(logits.double(), own, reduction="sum")
            gradient += torch.autograd.grad(loss, W)[0]
            total += loss.detach()
        return float(total) / n, (gradient / n).cpu().numpy().ravel()

    found = minimize(
        objective,
        np.zeros(classes * (dim + 1)),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": iterations, "gtol": tolerance, "ftol": 0.0, "maxcor": 20},
    )
    solution = torch.from_numpy(found.x).to(place).view(classes, dim + 1)
    weight = solution[:, :-1] / spread
    reached = bool(np.abs(found.jac).max() <= 10 * tolerance)
    return LinearClassifier(weight, solution[:, -1] - weight @ mean), reached
