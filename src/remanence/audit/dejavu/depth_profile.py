"""What each depth of a network reveals of its training set, and whether depth matters."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import norm

from remanence.audit.dejavu.intervals import Scores, auc_estimate, delong
from remanence.audit.evidence import Check, Estimate, Evidence

Protocol = Literal["head", "classifier", "transfer"]


@dataclass(frozen=True)
class LayerResult:
    """What one depth reveals.

    Attributes:
        depth: 0 for the input, then in the order of the layers.
        layer: name of the module.
        dim: number of pooled features.
        auc: area under the ROC curve, members against non-members.
    """

    depth: int
    layer: str
    dim: int
    auc: Estimate


@dataclass(frozen=True)
class DepthProfile:
    """What each depth reveals, and what follows.

    Attributes:
        protocol: "head", "classifier" or "transfer".
        members: number of them.
        nonmembers: number of them.
        public: number of public images.
        layers: one result a depth, the input first.
        membership: the evidence at the deepest layer, named before the data were seen.
        trend: the evidence that membership grows with depth.
        control_ok: the input alone must not tell members from non-members.
    """

    protocol: Protocol
    members: int
    nonmembers: int
    public: int
    layers: tuple[LayerResult, ...]
    membership: Evidence
    trend: Evidence
    control_ok: Check


def profile(
    protocol: Protocol,
    names: tuple[str, ...],
    dims: tuple[int, ...],
    members: Scores,
    nonmembers: Scores,
    *,
    public: int,
) -> DepthProfile:
    """Put the figures together.

    Args:
        protocol: that gave the scores.
        names: of the L + 1 depths, the input first.
        dims: pooled features of each.
        members: (L + 1, M) scores, higher for a member.
        nonmembers: (L + 1, K) scores.
        public: number of public images.
    """
    m, k = members.shape[1], nonmembers.shape[1]
    aucs, covariance = delong(members, nonmembers)
    results = tuple(
        LayerResult(
            depth,
            name,
            dim,
            auc_estimate("AUC", float(aucs[depth]), covariance[depth, depth], m, k),
        )
        for depth, (name, dim) in enumerate(zip(names, dims, strict=True))
    )
    null_std = math.sqrt((m + k + 1) / (12 * m * k))  # of the Mann-Whitney statistic
    control = Check(
        "The input alone does not tell members from non-members.",
        bool(abs(aucs[0] - 0.5) <= float(norm.ppf(0.995)) * null_std),
        f"AUC at the input {aucs[0]:.3f}; 0.5 ± {norm.ppf(0.995) * null_std:.3f} is chance",
    )
    deepest = Evidence(
        question=f"Does layer {names[-1]} reveal which images the network was trained on?",
        statistic="AUC",
        value=float(aucs[-1]),
        null="members and non-members score alike (AUC 0.5)",
        log10_p=_log10_upper((aucs[-1] - 0.5) / null_std),
        method="Mann-Whitney, one-sided, normal",
        would_change="more candidates narrow the interval; duplicates among them widen it",
        estimates=(results[-1].auc,),
        checks=(control,),
    )
    return DepthProfile(
        protocol, m, k, public, results, deepest, _trend(aucs, covariance, control), control
    )


def _trend(aucs: Scores, covariance: Scores, control: Check) -> Evidence:
    """Slope of AUC by depth; the depths share their images, so their covariance counts."""
    depth = np.arange(len(aucs)) - (len(aucs) - 1) / 2
    weights = depth / np.square(depth).sum()
    slope = float(weights @ aucs)
    std = math.sqrt(max(float(weights @ covariance @ weights), 0.0))
    reach = float(norm.ppf(0.975)) * std
    return Evidence(
        question="Does membership show more at greater depth?",
        statistic="slope of AUC by depth",
        value=slope,
        null="AUC does not grow with depth",
        log10_p=_log10_upper(slope / std) if std > 0 else math.nan,
        method="linear contrast with DeLong covariance, one-sided, normal",
        would_change="more candidates; other layers",
        estimates=(Estimate("slope of AUC by depth", slope, slope - reach, slope + reach),),
        checks=(control,),
    )


def _log10_upper(z: float) -> float:
    return float(norm.logsf(z)) / math.log(10)
