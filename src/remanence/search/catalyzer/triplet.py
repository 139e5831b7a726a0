"""The rank-preserving loss of the catalyzer (arXiv 1806.03198, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence.errors import InputError


def rank_triplet_loss(anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Return the mean of max(0, |a - p| - |a - n|): distances themselves, and no margin.

    Args:
        anchor: Embeddings (n, d), any floating type; all work is in float32 at least.
        positive: Embeddings of neighbours in the space of the inputs (n, d).
        negative: Embeddings of near vectors in the space of the outputs (n, d).

    Returns:
        Scalar. Two equal vectors give no gradient rather than NaN.

    Raises:
        InputError: The shapes differ, or there is no row.
    """
    if anchor.ndim != 2 or not anchor.shape == positive.shape == negative.shape or not len(anchor):
        shapes = ", ".join(str(tuple(z.shape)) for z in (anchor, positive, negative))
        raise InputError(f"triplets of shapes {shapes}: give three times the same (n, d)")
    with torch.autocast(anchor.device.type, enabled=False):
        return (_distance(anchor, positive) - _distance(anchor, negative)).clamp(min=0).mean()


def _distance(first: Tensor, second: Tensor) -> Tensor:
    kind = torch.promote_types(first.dtype, torch.float32)
    squared = (first.to(kind) - second.to(kind)).square().sum(1)
    apart = squared > 0
    # The root's slope at 0 is infinite: it is taken of 1 there, and the result put to 0.
    return torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)
