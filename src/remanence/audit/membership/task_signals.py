"""Signals of heads that are no single choice of a class: several labels, tokens, real numbers."""

import math

import numpy as np
import torch
from torch import Tensor

from remanence.audit.membership.signals import (
    CHUNK_VALUES,
    ArrayOrTensor,
    Signals,
    concatenate,
    label_margins,
)
from remanence.errors import InputError


def multilabel_signals(logits: ArrayOrTensor, labels: ArrayOrTensor) -> Signals:
    """Signals of C independent yes-or-no labels: the loss is the sum of binary cross-entropies.

    `conf` is the probability that all labels are right, `margin` its log-odds, `correct` is 1
    where all are right, `hinge` the least margin of a label.

    Args:
        logits: (N, C) floats, one logit a label.
        labels: (N, C) zeros and ones.

    Raises:
        InputError: logits that are not finite, shapes that differ, or labels other than 0 and 1.
    """
    z, y = _pair(logits, labels)
    if z.ndim != 2 or y.shape != z.shape:
        raise InputError(f"logits {tuple(z.shape)} and labels {tuple(y.shape)} must be (N, C)")
    if not ((y == 0) | (y == 1)).all():
        raise InputError("labels must be 0 or 1 for every logit")
    phi = torch.where(y == 1, z, -z)
    return _joint(phi, torch.zeros(len(phi)), phi.amin(1), (phi > 0).all(1).double())


def language_model_signals(
    logits: ArrayOrTensor, labels: ArrayOrTensor, *, ignore_index: int = -100
) -> Signals:
    """Signals of token sequences: the loss is the mean negative log-likelihood of the tokens.

    `conf` is the geometric mean of the tokens' probabilities, `margin` its log-odds; `correct` and
    `hinge` are means over the tokens.

    Args:
        logits: (N, L, V) floats; position t must speak of label t, so shift them beforehand.
        labels: (N, L) token ids; positions that hold `ignore_index` (padding) do not count.
        ignore_index: the label of such positions.

    Raises:
        InputError: logits that are not finite, shapes or token ids that do not fit, or a sequence
            without any token that counts.
    """
    if logits.ndim != 3 or tuple(labels.shape) != tuple(logits.shape[:2]):
        raise InputError(
            f"logits {tuple(logits.shape)} must be (N, L, V), labels {tuple(labels.shape)} (N, L)"
        )
    rows = max(1, CHUNK_VALUES // math.prod(logits.shape[1:]))
    parts = []
    for start in range(0, len(logits), rows):
        z, y = _pair(logits[start : start + rows], labels[start : start + rows])
        use = y != ignore_index  # (B, L)
        count = use.sum(1)
        if not count.all():
            index = start + int((count == 0).nonzero()[0])
            raise InputError(f"sequence {index} has no token that counts: leave it out")
        tokens = y.masked_fill(~use, 0).long()
        if tokens.min() < 0 or tokens.max() >= z.shape[-1]:
            raise InputError(f"token ids must lie in 0 to {z.shape[-1] - 1} or be {ignore_index}")
        phi, hinge, correct = (x.where(use, x.new_zeros(())) for x in label_margins(z, tokens))
        hinge, correct = hinge.sum(1) / count, correct.sum(1) / count
        parts.append(_joint(phi.masked_fill(~use, math.inf), count.log(), hinge, correct))
    if not parts:
        raise InputError("there is no sequence to score")
    return concatenate(parts)


def regression_signals(predictions: ArrayOrTensor, targets: ArrayOrTensor) -> Signals:
    """Signals of a regression: the loss is the squared error, summed over outputs.

    There is no probability: `margin` is the loss with its sign changed, `conf` is exp(-loss),
    `correct` and `hinge` are NaN.

    Args:
        predictions: (N,) or (N, D) floats.
        targets: the same shape.

    Raises:
        InputError: values that are not finite or shapes that differ.
    """
    z, y = _pair(predictions, targets)
    if z.shape != y.shape or not z.isfinite().all() or not y.isfinite().all():
        raise InputError("predictions and targets must have one shape, (N,) or (N, D), all finite")
    loss = (z - y).reshape(len(z), -1).square().sum(1).numpy()
    undefined = np.full_like(loss, np.nan)
    labels = np.full(len(loss), -1)
    return Signals(loss, -loss, np.exp(-loss), undefined, undefined.copy(), labels)


def _joint(phi: Tensor, log_scale: Tensor, hinge: Tensor, correct: Tensor) -> Signals:
    """Combine events of log-odds phi (N, E): loss = sum_e log(1 + exp(-phi_e)) / exp(log_scale).

    An infinite phi is an event that does not count. The log of the loss is kept beside the loss,
    because the log-odds of the whole need it where the loss itself is as small as exp(-phi).
    """
    event = torch.logaddexp(torch.zeros_like(phi), -phi)
    log_event = torch.where(phi > 30, -phi - 0.5 * torch.exp(-phi), event.log())
    log_loss = log_event.logsumexp(1) - log_scale
    loss = event.sum(1) / log_scale.exp()
    # log(p / (1 - p)) for p = exp(-loss), with 1 - p = loss (1 - loss / 2 + ...) for small losses.
    margin = torch.where(
        loss < 1e-6, -log_loss - 0.5 * loss, -loss - torch.log(-torch.expm1(-loss))
    )
    return Signals(
        loss=loss.numpy(),
        margin=margin.numpy(),
        conf=torch.exp(-loss).numpy(),
        correct=correct.numpy(),
        hinge=hinge.numpy(),
        labels=np.full(len(loss), -1),
    )


def _pair(outputs: ArrayOrTensor, labels: ArrayOrTensor) -> tuple[Tensor, Tensor]:
    z, y = (
        x.detach().cpu() if isinstance(x, Tensor) else torch.tensor(np.array(x))
        for x in (outputs, labels)
    )
    z = z.double()
    bad = ~z.isfinite().reshape(len(z), -1).all(1)
    if bad.any():
        raise InputError(f"outputs hold NaN or infinity in {int(bad.sum())} of {len(z)} rows")
    return z, y
