"""Per-sample signals of membership, exact from logits (arXiv 1908.11229, 2112.03570).

With margin phi = z_y - logsumexp over j != y of z_j, the log-odds of the label, the loss is
log(1 + exp(-phi)). No probability is formed on the way, so that confident samples stay apart: a
loss computed as logsumexp(z) - z_y is exactly 0 for margins above 37.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from remanence.errors import InputError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
ArrayOrTensor = Tensor | npt.NDArray[Any]

CHUNK_VALUES = 2**22  # logits turned to float64 at a time: 32 MB


@dataclass(frozen=True, eq=False)
class Signals:
    """What one model says about N samples, each seen through Q queries (its augmentations).

    Arrays (N,) of a single query are taken as (N, 1).

    Attributes:
        loss: (N, Q) cross-entropy, in nats.
        margin: (N, Q) log-odds log(p / (1 - p)) of the label.
        conf: (N, Q) probability p of the label.
        correct: (N, Q) 1 where the label is the predicted class, else 0; NaN where undefined.
        hinge: (N, Q) logit of the label minus the largest other logit; NaN where undefined.
        labels: (N,) int64 classes; -1 where there is none.
        entropy: (N, Q) entropy of the predicted classes, in nats, or None.
        predicted: whether the predicted classes took the place of true labels.

    Raises:
        InputError: shapes that differ, no sample, or a loss, margin or confidence that is not
            finite.
    """

    loss: FloatArray
    margin: FloatArray
    conf: FloatArray
    correct: FloatArray
    hinge: FloatArray
    labels: IntArray
    entropy: FloatArray | None = None
    predicted: bool = False

    def __post_init__(self) -> None:
        for name in ("loss", "margin", "conf", "correct", "hinge", "entropy"):
            values = getattr(self, name)
            if values is None:
                continue
            array = np.asarray(values, dtype=np.float64)
            array = array[:, None] if array.ndim == 1 else array
            object.__setattr__(self, name, array)
            if array.ndim != 2 or not array.size or array.shape != self.loss.shape:
                raise InputError(f"{name} of shape {array.shape} must be (N, Q) as the loss is")
            if name in {"loss", "margin", "conf"} and not np.isfinite(array).all():
                n_bad = int((~np.isfinite(array)).any(axis=1).sum())
                raise InputError(f"{name} is not finite for {n_bad} samples: check the model")
        object.__setattr__(self, "labels", np.asarray(self.labels, dtype=np.int64))
        if self.labels.shape != (len(self.loss),):
            raise InputError(f"labels of shape {self.labels.shape} must be ({len(self.loss)},)")

    def __len__(self) -> int:
        return len(self.loss)

    def select(self, keep: npt.NDArray[Any]) -> "Signals":
        """Return the signals of some samples: a Boolean mask (N,) or indices."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return Signals(**{k: v[keep] if isinstance(v, np.ndarray) else v for k, v in parts.items()})


def signals_from_logits(
    logits: ArrayOrTensor,
    labels: ArrayOrTensor | None = None,
    temperature: float = 1.0,
    *,
    probabilities: bool = False,
) -> Signals:
    """Signals of a classifier, in float64 whatever the logits' dtype.

    Args:
        logits: (N, C), or (N, Q, C) for Q queries; (N,), (N, 1) or (N, Q, 1) for a binary head of
            one logit, which speaks for class 1.
        labels: (N,) integer classes; None puts the class of the largest mean logit in their place.
        temperature: the logits are divided by it; positive. Not the T of the posterior model.
        probabilities: `logits` holds probabilities: their logarithms are taken, and what a
            softmax has rounded to 0 is lost.

    Raises:
        InputError: logits that are not finite or look like probabilities, or labels that are out
            of range, one-hot or not integers.
    """
    n = len(logits)
    if logits.ndim not in {1, 2, 3} or not n or 0 in logits.shape:
        raise InputError(f"logits of shape {tuple(logits.shape)} must be (N, C) or (N, Q, C)")
    if not 0 < temperature < math.inf:
        raise InputError(f"logit temperature {temperature} must be a positive number")
    if logits.dtype in {torch.float16, torch.bfloat16, np.dtype(np.float16)}:
        _warn_half(logits.dtype)
    n_classes = max(2, logits.shape[-1]) if logits.ndim > 1 else 2
    y = None if labels is None else _check_labels(labels, n, n_classes)
    rows = max(1, CHUNK_VALUES // math.prod(logits.shape[1:]))
    n_bad, like_probabilities, n_zero = 0, True, 0
    parts = []
    for start in range(0, n, rows):
        z = _as_rows(logits[start : start + rows])  # (B, Q, C)
        bad = ~z.isfinite().all(-1).all(-1)
        n_bad += int(bad.sum())
        if z.shape[-1] == 1:
            # One value per sample: class 1 against class 0.
            like_probabilities &= bool(((z >= 0) & (z <= 1)).all())
            z = torch.cat((1 - z if probabilities else torch.zeros_like(z), z), dim=-1)
        else:
            like_probabilities &= _look_like_probabilities(z)
        if probabilities:
            n_zero += int((z <= 0).any(-1).sum())
            z = z.clamp(min=torch.finfo(torch.float32).tiny).log()
        part = None if y is None else torch.from_numpy(y[start : start + rows])
        parts.append(_signals(z / temperature, part))
    if n_bad:
        raise InputError(f"logits hold NaN or infinity in {n_bad} of {n} rows: check the model")
    single = logits.ndim == 1 or logits.shape[-1] == 1
    if probabilities and not like_probabilities:
        raise InputError("rows are no probabilities (non-negative, sum 1): give logits instead")
    if not probabilities and like_probabilities and not single:
        raise InputError("logits look like probabilities (rows sum to 1): set probabilities=True")
    if not probabilities and like_probabilities and n > 1:
        _warn("all logits lie in [0, 1]: if they are probabilities, set probabilities=True")
    if n_zero:
        _warn(f"{n_zero} rows hold a probability of 0: confident samples tie; give logits instead")
    return concatenate(parts)


def model_signals(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    label: Literal["true", "predicted"] = "true",
    queries: Sequence[Callable[[Tensor], Tensor]] = (lambda images: images,),
    temperature: float = 1.0,
    probabilities: bool = False,
) -> Signals:
    """Signals of a module over batches, in eval mode, without autocast, on the module's device.

    Args:
        model: returns logits (B, C), (B, 1) or (B,); its training flags are put back afterwards.
        batches: (images (B, ...), labels (B,)) in a fixed order.
        label: "predicted" ignores the labels and takes the predicted classes instead.
        queries: Q functions of a batch of images, one for each query, for example the identity
            and a flip. They must not be random: target and references have to see the same.
        temperature: as in `signals_from_logits`.
        probabilities: as in `signals_from_logits`.

    Raises:
        InputError: no batch, an output that is not a tensor, or logits or labels that
            `signals_from_logits` refuses.
    """
    if not queries:
        raise InputError("there is no query: give at least one function of a batch of images")
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    modes = [(module, module.training) for module in model.modules()]
    parts: list[Signals] = []
    halves: set[Any] = set()
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for images, labels in batches:
                seen = images.to(device)
                outputs = [model(query(seen)) for query in queries]
                for output in outputs:
                    if not isinstance(output, Tensor) or output.shape[:1] != images.shape[:1]:
                        kind = type(output).__name__
                        raise InputError(f"the model gave a {kind}, not one row of logits a sample")
                    if output.ndim > 2:
                        raise InputError(f"logits of shape {tuple(output.shape)} must be (B, C)")
                halves.update(o.dtype for o in outputs if o.element_size() < 4)
                logits = torch.stack([o.double().reshape(len(o), -1) for o in outputs], dim=1)
                truth = labels if label == "true" else None
                parts.append(
                    signals_from_logits(logits, truth, temperature, probabilities=probabilities)
                )
    finally:
        for module, mode in modes:
            module.training = mode
    if not parts:
        raise InputError("there is no batch to score: give at least one (images, labels)")
    for dtype in halves:
        _warn_half(dtype)
    return concatenate(parts)


def concatenate(parts: Sequence[Signals]) -> Signals:
    """Join the signals of one model on several batches of samples."""
    joined = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(Signals)
        if isinstance(getattr(parts[0], field.name), np.ndarray)
    }
    return Signals(**joined, predicted=parts[0].predicted)


def label_margins(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Margin, hinge and correctness (...) of labels (...) under logits (..., C)."""
    index = labels.unsqueeze(-1)
    at_label = z.gather(-1, index).squeeze(-1)
    others = z.scatter(-1, index, -math.inf)
    margin = at_label - others.logsumexp(-1)
    return margin, at_label - others.amax(-1), (z.argmax(-1) == labels).to(z)


def _signals(z: Tensor, labels: Tensor | None) -> Signals:
    # Rows that are not finite are counted by the caller, and must not stop it here.
    z = z.nan_to_num(0, 0, 0)
    y = z.mean(1).argmax(-1) if labels is None else labels
    margin, hinge, correct = label_margins(z, y[:, None].expand(z.shape[:2]))
    return Signals(
        loss=torch.logaddexp(torch.zeros_like(margin), -margin).numpy(),
        margin=margin.numpy(),
        conf=margin.sigmoid().numpy(),
        correct=correct.numpy(),
        hinge=hinge.numpy(),
        labels=y.numpy(),
        entropy=torch.special.entr(z.softmax(-1)).sum(-1).numpy(),
        predicted=labels is None,
    )


def _as_rows(values: ArrayOrTensor) -> Tensor:
    """Float64 (B, Q, C) on the CPU; a copy, so that memory-mapped arrays may be read-only."""
    rows = values.detach() if isinstance(values, Tensor) else torch.tensor(np.array(values))
    if not rows.is_floating_point():
        raise InputError(f"logits of dtype {rows.dtype} must be floating point")
    rows = rows.to(device="cpu", dtype=torch.float64)
    if rows.ndim == 1:
        rows = rows[:, None]
    return rows[:, None] if rows.ndim == 2 else rows


def _look_like_probabilities(z: Tensor) -> bool:
    # 2e-3 covers the rounding of sums of float16.
    return bool((z >= 0).all()) and bool(((z.sum(-1) - 1).abs() < 2e-3).all())


def _check_labels(labels: ArrayOrTensor, n: int, n_classes: int) -> IntArray:
    y = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if y.ndim == 2 and y.shape[1] > 1 and set(np.unique(y)) <= {0, 1}:
        raise InputError(f"labels of shape {y.shape} are one-hot: give classes, labels.argmax(1)")
    if y.shape != (n,):
        raise InputError(f"labels of shape {y.shape} must be ({n},), one class a row of logits")
    if y.dtype.kind not in "iub":
        raise InputError(f"labels of dtype {y.dtype} must be integer classes")
    if y.min() < 0 or y.max() >= n_classes:
        raise InputError(
            f"labels run from {y.min()} to {y.max()}: they must lie in 0 to {n_classes - 1}"
        )
    return y.astype(np.int64)


def _warn_half(dtype: object) -> None:
    _warn(f"logits of {dtype} are coarse and tie samples: compute them in float32")


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)
