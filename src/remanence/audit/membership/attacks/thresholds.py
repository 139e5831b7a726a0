"""Thresholds on the loss: 0-1, MALT with one for all samples, MAST with one for each.

arXiv 1908.11229, Section 4. MAST scores tau(z) - loss(theta, z), where tau(z) stands for the
soft threshold of the theory and is estimated from the losses of reference models.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from remanence.audit.membership.attacks.base import Attack, Need
from remanence.audit.membership.attacks.reference_signals import BoolArray, References
from remanence.audit.membership.bayes import free_energy
from remanence.audit.membership.signals import FloatArray, Signals
from remanence.errors import InputError

Tau = Literal["out", "mid", "all", "lse"]
Statistic = Literal["mean", "median"]
LossLike = Literal["loss", "margin"]


@dataclass(frozen=True)
class ZeroOne(Attack):
    """A sample is a member if it is classified correctly (the gap attack)."""

    name = "zero-one"
    paper = "Yeom et al. 2018, 1709.01604: sees the predicted class and the true label"
    needs = frozenset[Need]({"labels"})

    def _score(self, target: Signals, references: References) -> FloatArray:  # noqa: ARG002  # the same arguments for all
        return target.correct


@dataclass(frozen=True)
class MALT(Attack):
    """One threshold for all samples, on the loss of the audited model.

    Attributes:
        signal: "margin", of which the loss is a falling function and which does not saturate;
            "loss"; or "entropy" of the predicted classes, for which no label is needed.
    """

    signal: Literal["margin", "loss", "entropy"] = "margin"

    paper = "Sablayrolles et al. 2019, 1908.11229: sees the loss of the sample"
    needs = frozenset[Need]()

    def __post_init__(self) -> None:
        _check_option("signal", self.signal, ("margin", "loss", "entropy"))

    @property
    def name(self) -> str:
        """Short name, as in `ATTACKS`."""
        return "malt" if self.signal == "margin" else f"malt-{self.signal}"

    def _score(self, target: Signals, references: References) -> FloatArray:  # noqa: ARG002  # the same arguments for all
        if self.signal == "margin":
            return target.margin
        if self.signal == "loss":
            return -target.loss
        if target.entropy is None:
            raise InputError("malt-entropy needs the entropy of the target: compute it from logits")
        return -target.entropy


@dataclass(frozen=True)
class MAST(Attack):
    """A threshold for each sample, from the losses of references on it.

    Attributes:
        tau: "out", mean over references without the sample (difficulty calibration, 2111.08440);
            "mid", halfway between the IN and the OUT mean (2112.03570); "all", mean over all
            references, refused unless each sample has as many IN references as any other; "lse",
            the free energy of the theory (BASE, 2505.24089), over both sides in equal parts, or
            over OUT where no sample has an IN reference.
        T: temperature of the posterior model, in [0, infinity]; read by "lse" alone.
        statistic: "median" withstands the heavy tail of losses; not for "lse".
        signal: "loss", or "margin" for its negative in the loss's place.
        offline_scale: factor on a threshold that comes from OUT references alone, to make up for
            the missing IN references; below 1.
    """

    tau: Tau = "lse"
    T: float = 1.0
    statistic: Statistic = "mean"
    signal: LossLike = "loss"
    offline_scale: float = 1.0

    paper = (
        "Sablayrolles et al. 2019, 1908.11229 (lse: Lassila et al. 2025, 2505.24089): sees the "
        "loss of the sample and trains references on data like the target's"
    )

    def __post_init__(self) -> None:
        _check_option("tau", self.tau, get_args(Tau))
        _check_option("statistic", self.statistic, get_args(Statistic))
        _check_option("signal", self.signal, get_args(LossLike))
        if self.tau == "lse" and self.statistic != "mean":
            raise InputError("tau='lse' is no median: give tau='out', 'mid' or 'all' with it")
        if self.tau in {"mid", "all"} and self.offline_scale != 1:
            raise InputError(f"offline_scale has no place in tau={self.tau!r}: use 'out' or 'lse'")
        if not 0 < self.offline_scale < math.inf:
            raise InputError(f"offline_scale {self.offline_scale} must be a positive number")

    @property
    def name(self) -> str:
        """Short name, as in `ATTACKS`."""
        return "mast" if self.tau == "lse" else f"mast-{self.tau}"

    @property
    def needs(self) -> frozenset[Need]:
        """What `score` has to be given."""
        sides: dict[Tau, tuple[Need, ...]] = {"mid": ("in", "out"), "all": ()}
        return frozenset[Need](("references", *sides.get(self.tau, ("out",))))

    def soft_threshold(self, references: References) -> FloatArray:
        """Tau of every sample and query, (N, Q)."""
        losses = references.loss if self.signal == "loss" else -references.margin
        inside, outside = references.member, ~references.member
        if self.tau == "lse":
            return self._free_energy(losses, inside)
        if self.tau == "out":
            return self.offline_scale * self._centre(losses, outside)
        if self.tau == "mid":
            return 0.5 * (self._centre(losses, inside) + self._centre(losses, outside))
        n_in = inside.sum(axis=0)
        if n_in.min() != n_in.max():
            raise InputError(
                f"tau='all' needs as many IN references for one sample as for another, not "
                f"{n_in.min()} to {n_in.max()}: use tau='mid' or 'lse'"
            )
        return self._centre(losses, np.ones_like(inside))

    def _free_energy(self, losses: FloatArray, member: BoolArray) -> FloatArray:
        out = free_energy(losses, self.T, ~member[..., None])
        if not member.any():
            return self.offline_scale * out
        # Equal parts of both sides: what counts is what they say, not how many they are.
        return free_energy(np.stack([free_energy(losses, self.T, member[..., None]), out]), self.T)

    def _centre(self, losses: FloatArray, use: BoolArray) -> FloatArray:
        if self.statistic == "mean":
            return free_energy(losses, math.inf, use[..., None])
        ordered = np.sort(np.where(use[..., None], losses, np.inf), axis=0)
        count = use.sum(axis=0)[None, :, None]
        low = np.take_along_axis(ordered, (count - 1) // 2, axis=0)
        high = np.take_along_axis(ordered, count // 2, axis=0)
        middle: FloatArray = 0.5 * (low + high)[0]
        return middle

    def _score(self, target: Signals, references: References) -> FloatArray:
        if self.tau == "lse" and references.member.any():
            references.require("in")
        loss = target.loss if self.signal == "loss" else -target.margin
        return self.soft_threshold(references) - loss


def _check_option(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{option} {value!r} is unknown: give one of {', '.join(known)}")
