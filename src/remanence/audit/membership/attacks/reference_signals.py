"""What K reference models, each trained on known samples, say about the samples of an audit."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from remanence.audit.membership.signals import (
    ArrayOrTensor,
    FloatArray,
    IntArray,
    Signals,
    signals_from_logits,
)
from remanence.errors import InputError

BoolArray = npt.NDArray[np.bool_]
Side = Literal["in", "out"]


@dataclass(frozen=True, eq=False)
class References:
    """Signals of K reference models on N samples and Q queries.

    Arrays (K, N) of a single query are taken as (K, N, 1).

    Attributes:
        loss: (K, N, Q) cross-entropy, in nats.
        margin: (K, N, Q) log-odds of the label.
        conf: (K, N, Q) probability of the label.
        member: (K, N) Booleans, True where reference k was trained on sample n.
        correct: (K, N, Q) as in `Signals`, needed only to make a reference the target.
        hinge: (K, N, Q) likewise.
        labels: (N,) the labels that were scored; None where unknown.

    Raises:
        InputError: shapes that differ, masks that are not Boolean, or signals that are not finite.
    """

    loss: FloatArray
    margin: FloatArray
    conf: FloatArray
    member: BoolArray
    correct: FloatArray | None = None
    hinge: FloatArray | None = None
    labels: IntArray | None = None

    def __post_init__(self) -> None:
        for name in ("loss", "margin", "conf", "correct", "hinge"):
            values = getattr(self, name)
            if values is None:
                continue
            array = np.asarray(values, dtype=np.float64)
            array = array[..., None] if array.ndim == 2 else array
            object.__setattr__(self, name, array)
            if array.ndim != 3 or not array.size or array.shape != self.loss.shape:
                raise InputError(f"{name} of shape {array.shape} must be (K, N, Q) as the loss is")
            if name in {"loss", "margin", "conf"} and not np.isfinite(array).all():
                bad = np.flatnonzero(~np.isfinite(array).all(axis=(1, 2)))
                raise InputError(f"{name} of references {_first(bad)} is not finite: check them")
        member = np.ascontiguousarray(self.member)
        if member.dtype != np.bool_ or member.shape != self.loss.shape[:2]:
            raise InputError(
                f"membership masks are {member.dtype} of shape {member.shape}: "
                f"give Booleans of shape {self.loss.shape[:2]}"
            )
        object.__setattr__(self, "member", member)
        if self.labels is not None and self.labels.shape != (self.loss.shape[1],):
            raise InputError(f"labels of shape {self.labels.shape} must be (N,)")

    def __len__(self) -> int:
        return len(self.loss)

    @classmethod
    def stack(cls, signals: Sequence[Signals], member: npt.ArrayLike) -> Self:
        """Join the signals of K references, each on the same N samples.

        Args:
            signals: one entry a reference.
            member: (K, N) Booleans, True where reference k was trained on sample n.

        Raises:
            InputError: no reference, or references that scored different labels or shapes.
        """
        if not signals:
            raise InputError("there is no reference: give the signals of at least one model")
        first = signals[0]
        for k, other in enumerate(signals):
            if other.loss.shape != first.loss.shape or (other.labels != first.labels).any():
                raise InputError(
                    f"reference {k} scored other samples, queries or labels than reference 0"
                )
        stacked = {
            name: np.stack([getattr(one, name) for one in signals])
            for name in ("loss", "margin", "conf", "correct", "hinge")
        }
        return cls(**stacked, member=np.asarray(member), labels=first.labels)

    def require(self, side: Side) -> None:
        """Check that every sample has a reference that was trained with or without it.

        Raises:
            InputError: some have none; names how many and the first few.
        """
        missing = np.flatnonzero(~self._covered(side))
        if len(missing):
            raise InputError(
                f"{len(missing)} of {self.member.shape[1]} samples have no {side.upper()} "
                f"reference (indices {_first(missing)}): train more references or leave these "
                "samples out with select()"
            )

    def covered(self, sides: Iterable[Side]) -> BoolArray:
        """Tell which samples have at least one reference on each of the sides, (N,)."""
        covered = np.ones(self.member.shape[1], dtype=bool)
        for side in sides:
            covered &= self._covered(side)
        return covered

    def select(self, keep: npt.NDArray[Any]) -> "References":
        """Return the references on some samples: a Boolean mask (N,) or indices."""
        return self._pick((slice(None), keep))

    def leave_out(self, k: int) -> tuple[Signals, "References", BoolArray]:
        """Make reference k the target and keep the others.

        Where every sample is in equally many references, the others hold one IN reference fewer
        for the target's members and one OUT reference fewer for the rest, and these counts alone
        tell who is a member: an attack that averages over them finds members that the target
        does not show. So each sample also loses its first reference of the other side. The rows
        of the result then no longer stand for one model each.

        Args:
            k: index of the new target.

        Returns:
            The target's signals, the other references (K - 2 of them, or K - 1 where the design
            is not balanced), and the target's members (N,).

        Raises:
            InputError: k is out of range or no reference would be left.
        """
        n_in = self.member.sum(axis=0)
        balanced = n_in.min() == n_in.max() and 0 < n_in[0] < len(self)
        if not 0 <= k < len(self) or len(self) < 2 + balanced:
            raise InputError(
                f"reference {k} cannot be left out of {len(self)}: give 0 to {len(self) - 1}, "
                "and at least 3 references"
            )
        rest = np.roll(np.arange(len(self)), -k)[1:, None]  # (K - 1, 1)
        if balanced:
            first = (self.member[rest[:, 0]] != self.member[k]).argmax(axis=0)  # (N,)
            row = np.arange(len(rest) - 1)[:, None]
            rest = rest[row + (row >= first), 0]  # (K - 2, N)
        sample = np.arange(self.member.shape[1])
        undefined = np.full_like(self.loss[k], np.nan)
        target = Signals(
            self.loss[k],
            self.margin[k],
            self.conf[k],
            undefined if self.correct is None else self.correct[k],
            undefined if self.hinge is None else self.hinge[k],
            np.full(len(sample), -1) if self.labels is None else self.labels,
        )
        return target, self._pick((rest, sample)), self.member[k].copy()

    def _pick(self, index: tuple[Any, Any]) -> "References":
        return References(
            self.loss[index],
            self.margin[index],
            self.conf[index],
            self.member[index],
            None if self.correct is None else self.correct[index],
            None if self.hinge is None else self.hinge[index],
            None if self.labels is None else self.labels[index[1]],
        )

    def _covered(self, side: Side) -> BoolArray:
        use = self.member if side == "in" else ~self.member
        covered: BoolArray = np.any(use, axis=0)
        return covered


def references_from_logits(
    logits: ArrayOrTensor,
    labels: ArrayOrTensor,
    member: npt.ArrayLike,
    temperature: float = 1.0,
    *,
    probabilities: bool = False,
) -> References:
    """Signals of K references from their logits.

    Args:
        logits: (K, N, C) or (K, N, Q, C); (K, N) for a binary head.
        labels: (N,) integer classes; those of the target where it had to predict them.
        member: (K, N) Booleans, True where reference k was trained on sample n.
        temperature: as in `signals_from_logits`.
        probabilities: as in `signals_from_logits`.

    Raises:
        InputError: as in `signals_from_logits` and `References`.
    """
    if logits.ndim not in {2, 3, 4}:
        raise InputError(f"logits of shape {tuple(logits.shape)} must be (K, N, C) or (K, N, Q, C)")
    signals = [
        signals_from_logits(one, labels, temperature, probabilities=probabilities) for one in logits
    ]
    return References.stack(signals, member)


def _first(indices: IntArray) -> str:
    return ", ".join(map(str, indices[:5])) + (", ..." if len(indices) > 5 else "")
