"""Linear heads on standardised features: logistic regression by L-BFGS, and a ridge map."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ROWS = 65_536  # of features in memory at once, as float32
STILL = 1e-6  # a feature that spreads less is constant


@dataclass(frozen=True)
class Standard:
    """Mean and scale of features, each (D,) float32.

    Constant features have scale 1, so that they stay 0.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Standard":
        """Measure (N, D) features, in float64."""
        n = len(features)
        mean = (
            torch.stack([part.double().sum(0) for part in torch.split(features, ROWS)]).sum(0) / n
        )
        squares = [(part.double() - mean).square().sum(0) for part in torch.split(features, ROWS)]
        std = (torch.stack(squares).sum(0) / n).sqrt()
        return cls(mean.float(), torch.where(std < STILL, torch.ones_like(std), std).float())

    def __call__(self, features: Tensor) -> Tensor:
        """Standardise (B, D) features of any dtype to float32."""
        return (features.float() - self.mean) / self.scale


@dataclass(frozen=True)
class Head:
    """Logistic regression: logits x W + b, W (D, K) and b (K,)."""

    weight: Tensor
    bias: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, K) of standardised features (B, D)."""
        return x.to(self.weight.device) @ self.weight + self.bias

    def margin(self, x: Tensor, labels: Tensor) -> Tensor:
        """z_y - logsumexp of the other logits, (B,) float64: the logit of the label's probability.

        Where softmax saturates at 1 the margin still tells images apart.
        """
        z = self.logits(x).double()
        y = labels.to(z.device)[:, None]
        own = z.gather(1, y)[:, 0]
        others = z.scatter(1, y, -torch.inf).logsumexp(1)
        return (own - others).cpu()


def fit_head(
    features: Tensor,
    labels: Tensor,
    n_classes: int,
    standard: Standard,
    *,
    l2: float,
    iterations: int,
    device: torch.device,
) -> Head:
    """Minimise mean cross-entropy + l2 |W|^2 by L-BFGS; the bias is free.

    The objective is strictly convex in W: there is one answer, and no seed.

    Args:
        features: (N, D) of any float dtype; standardised here, `ROWS` at a time.
        labels: (N,) int64 in [0, n_classes).
        n_classes: K.
        standard: of the features.
        l2: weight of the penalty.
        iterations: of L-BFGS at most.
        device: to compute on.
    """
    n, dim = features.shape

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(torch.split(features, ROWS), torch.split(labels, ROWS), strict=True):
            yield standard(x).to(device), y.to(device)

    ready = list(pieces()) if n <= ROWS else None
    weight = torch.zeros(dim, n_classes, device=device, requires_grad=True)
    bias = torch.zeros(n_classes, device=device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        tolerance_grad=1e-7,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def objective() -> float:
        solver.zero_grad()
        penalty = l2 * weight.square().sum()
        torch.autograd.backward(penalty)
        total = penalty.detach()
        for x, y in pieces() if ready is None else ready:
            loss = nn.functional.cross_entropy(x @ weight + bias, y, reduction="sum") / n
            torch.autograd.backward(loss)
            total = total + loss.detach()
        return float(total)

    with torch.enable_grad():
        solver.step(objective)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return Head(weight.detach(), bias.detach())


def ridge_map(
    source: Tensor, target: Tensor, source_standard: Standard, target_standard: Standard, l2: float
) -> Tensor:
    """Linear map (D, E) from standardised source to standardised target features.

    Minimises mean |x M - y|^2 + l2 |M|^2 in closed form; both are centred, so it needs no bias.

    Args:
        source: (N, D) features of the images that both networks have looked at.
        target: (N, E) features of the same images.
        source_standard: of `source`.
        target_standard: of `target`.
        l2: weight of the penalty.
    """
    dim = source.shape[1]
    gram = l2 * len(source) * torch.eye(dim, dtype=torch.float64)
    cross = torch.zeros(dim, target.shape[1], dtype=torch.float64)
    for a, b in zip(torch.split(source, ROWS), torch.split(target, ROWS), strict=True):
        x, y = source_standard(a).double(), target_standard(b).double()
        gram += x.T @ x
        cross += x.T @ y
    carry: Tensor = torch.linalg.solve(gram, cross)
    return carry.float()


def class_means(features: Tensor, labels: Tensor, n_classes: int, standard: Standard) -> Tensor:
    """Mean standardised features of each class, (K, D) float32."""
    sums = torch.zeros(n_classes, features.shape[1], dtype=torch.float64)
    for x, y in zip(torch.split(features, ROWS), torch.split(labels, ROWS), strict=True):
        sums.index_add_(0, y, standard(x).double())
    counts = torch.bincount(labels, minlength=n_classes).clamp(min=1)
    return (sums / counts[:, None]).float()
