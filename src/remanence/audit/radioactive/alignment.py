"""Least squares from the marking network's features to another network's, streamed.

arXiv 2002.00937, Section 3.3, "subspace alignment": carriers live in the marking network's feature
space, a suspect's head in its own. X = argmin ||Phi0 X - Phit||^2 over clean images carries the
head back: W_a = W_t X'. Only the sums of products are kept, so memory does not grow with the
number of images, and sums of parts add up to the sums of the whole.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from remanence.audit.evidence import Check
from remanence.errors import InputError

# Directions of the marker's features with less than this share of the largest variance are dead.
CUT_OFF = 1e-8

# log-probabilities in half precision miss a total of one by up to this, as a logarithm.
_LOG_TOTAL = 0.02


@dataclass(frozen=True)
class AlignmentSums:
    """What least squares needs of the images seen so far; float64, on the features' device.

    `targets` below are the suspect's features, or its logits (see `Alignment.head`). Processes
    add up their parts with `+`, or by an all-reduce (sum) of every tensor in `tensors()`.

    Attributes:
        gram: (d, d) sum of phi0 phi0'.
        cross: (d, t) sum of phi0 target'.
        features: (d,) sum of phi0.
        targets: (t,) sum of targets.
        squares: (t,) sum of squared targets.
        counts: (2,) images, and those whose targets were log-probabilities.
    """

    gram: Tensor
    cross: Tensor
    features: Tensor
    targets: Tensor
    squares: Tensor
    counts: Tensor

    @classmethod
    def of(cls, features: Tensor, targets: Tensor) -> Self:
        """Sum one batch of clean images, the same images through both networks.

        Args:
            features: (N, d) the marking network's features, any float type.
            targets: (N, t) the suspect's features or logits, same device.

        Returns:
            The sums of this batch.

        Raises:
            InputError: shapes do not match, or a value is NaN or infinite.
        """
        if features.ndim != 2 or targets.ndim != 2 or len(features) != len(targets):
            raise InputError(
                f"features {tuple(features.shape)} and targets {tuple(targets.shape)} do not match:"
                " give (N, d) and (N, t) of the same images"
            )
        phi0, y = features.detach().double(), targets.detach().double()
        for name, values in (("features", phi0), ("targets", y)):
            if not bool(values.isfinite().all()):
                raise InputError(f"{name} hold NaN or infinity: check the model's output")
        log_total = y.logsumexp(dim=1).abs()
        is_log_prob = (log_total < _LOG_TOTAL) & (y <= _LOG_TOTAL).all(dim=1)
        counts = torch.stack([torch.full_like(log_total, 1).sum(), is_log_prob.double().sum()])
        return cls(phi0.T @ phi0, phi0.T @ y, phi0.sum(0), y.sum(0), (y * y).sum(0), counts)

    def __add__(self, other: Self) -> Self:
        if self.cross.shape != other.cross.shape:
            raise InputError(
                f"sums over {tuple(self.cross.shape)} and {tuple(other.cross.shape)} features do"
                " not add up: give the same two networks"
            )
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return type(self)(*[a + b for a, b in pairs])

    def tensors(self) -> list[Tensor]:
        """The sums themselves, in the order of the constructor, for an all-reduce in place."""
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def num_images(self) -> int:
        """Images summed so far, N."""
        return int(self.counts[0].item())


@dataclass(frozen=True)
class Alignment:
    """The linear map from the marking network's features to the targets.

    Attributes:
        map: (d, t) float64, X.
        num_images: N it was fitted on.
        rank: directions of the marker's features that vary enough to be used, at most d.
        explained: share of the targets' variance (their energy, without intercept) explained.
        log_probs: whether all targets were log-probabilities, so that logits are known only up
            to a constant an image.
    """

    map: Tensor
    num_images: int
    rank: int
    explained: float
    log_probs: bool

    @property
    def dim(self) -> int:
        """Length d of the marking network's features."""
        return self.map.shape[0]

    @property
    def head(self) -> Tensor:
        """(t, d) the aligned head, where the targets were the suspect's logits.

        Least squares is linear in its target, so fitting logits W phi + b gives exactly W X', the
        head that the suspect's weights and features would give: with an intercept whatever b is,
        without one for b = 0.
        """
        return self.map.T

    def align(self, weight: Tensor) -> Tensor:
        """Carry a head on the targets back to the marking network's features.

        Args:
            weight: (K, t) the suspect's last linear layer.

        Returns:
            (K, d) float64, W_a = W_t X'.

        Raises:
            InputError: the weight does not fit the targets.
        """
        if weight.ndim != 2 or weight.shape[1] != self.map.shape[1]:
            raise InputError(
                f"weight {tuple(weight.shape)} does not fit {self.map.shape[1]} suspect features:"
                " give the layer that reads them, (K, t)"
            )
        return weight.detach().to(self.map) @ self.map.T

    def check_images(self) -> Check:
        """Whether there were images enough: 5 a feature; fewer leave it open.

        A bad fit hides a mark but never makes one up, so the check does not fail.
        """
        per_feature = self.num_images / self.dim
        finding = f"{self.num_images} images for {self.dim} features"
        if per_feature < 5:
            finding += ": a small p stays valid, a large one may only say that images were too few"
        return Check(
            assumption="There are images enough to align the two networks (5 for each feature).",
            holds=True if per_feature >= 5 else None,
            finding=finding,
        )


def solve_alignment(
    sums: AlignmentSums, *, intercept: bool = True, ridge: float = 0.0
) -> Alignment:
    """Solve the normal equations by an eigendecomposition of the Gram matrix.

    Args:
        sums: over clean images, of every process.
        intercept: fit a constant too; False is what the authors' code does.
        ridge: penalty on X, relative to the mean variance of a feature; not negative.

    Returns:
        The alignment, on the device of the sums.

    Raises:
        InputError: there are fewer images than features and no ridge, `ridge` is negative, or the
            features do not vary.
    """
    n, d = sums.num_images, sums.gram.shape[0]
    if ridge < 0:
        raise InputError(f"ridge {ridge} is negative: give 0 or more")
    if n < d and ridge == 0:
        raise InputError(
            f"{n} images cannot align {d} features: give at least {5 * d}, or a ridge above 0"
        )
    gram, cross, squares = sums.gram, sums.cross, sums.squares
    if intercept:
        gram = gram - sums.features.outer(sums.features) / n
        cross = cross - sums.features.outer(sums.targets) / n
        squares = squares - sums.targets**2 / n
    energy, directions = torch.linalg.eigh(gram)
    # The second bound is what rounding leaves of features that are constant.
    alive = energy > torch.maximum(CUT_OFF * energy[-1], 1e-14 * sums.gram.trace())
    if not bool(alive.any()):
        raise InputError("the marker's features do not vary over the images: give other images")
    energy, directions = energy[alive], directions[:, alive]
    penalty = ridge * energy.sum() / d
    solution = directions @ ((directions.T @ cross) / (energy + penalty)[:, None])
    missed = squares.sum() - 2 * (solution * cross).sum() + (solution * (gram @ solution)).sum()
    return Alignment(
        map=solution,
        num_images=n,
        rank=int(alive.sum().item()),
        explained=float(1 - missed / squares.sum().clamp(min=1e-300)),
        log_probs=bool(sums.counts[1] == sums.counts[0]),
    )


def class_centred(head: Tensor) -> Tensor:
    """Subtract the mean row, which removes whatever an image adds to all of its logits alike.

    Log-probabilities are logits less a constant an image; that constant's regression on the
    features adds the same row to every class, and the mean row with it.

    Args:
        head: (K, d) aligned head.

    Returns:
        (K, d), rows adding up to zero.
    """
    return head - head.mean(dim=0, keepdim=True)
