"""Deja Vu: a training set shows in the confidences, in what a network can store, and in depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from remanence.audit.dejavu.depth_profile import DepthProfile
from remanence.audit.dejavu.detect import detect
from remanence.audit.dejavu.fraction import leaked_fraction
from remanence.audit.dejavu.layers import LayerProbe
from remanence.audit.dejavu.leak import top_margin
from remanence.audit.dejavu.memorization_report import MemorizationReport
from remanence.audit.dejavu.memorize import fit_memorizer
from remanence.audit.dejavu.sampling import MembershipTask
from remanence.audit.dejavu.transforms import TRAINING
from remanence.audit.membership.references import ReferencePool, train_references
from remanence.claims.claim import Claim
from remanence.claims.scenes import draw_scenes
from remanence.kit.report import Report, curve_figure
from remanence.kit.statistics import Interval, proportion_interval

SIDE = 16
TRAINED, HELD_OUT = 600, 900  # of 1,797; 297 train the new heads of the depth profile
CANDIDATES, REFERENCES = 200, 400
MODELS = 5
DRAWS = 8  # audits of each model at each leak
LEAKS = (0.0, 0.1, 0.25, 0.5, 1.0)
STORED = (50, 150, 400)
LEVEL = 0.05


@dataclass(frozen=True)
class _Measured:
    """Figures of the three parts.

    Attributes:
        alarms: Audits that called a leak, at each leak, of `MODELS * DRAWS`.
        distance: Mean one-sided distance at each leak.
        fraction: Mean estimate of the leaked fraction at each leak.
        memorised: By transform, one report for each size of the set.
        profile: Membership by depth.
        accuracy: On trained and on held-out images.
    """

    alarms: dict[float, int]
    distance: dict[float, float]
    fraction: dict[float, float]
    memorised: dict[str, list[MemorizationReport]]
    profile: DepthProfile
    accuracy: tuple[float, float]


def dejavu_claim() -> Claim:
    """Measure the claims of arXiv 1809.06396 on digit scenes."""
    measured = _measure()
    audits = MODELS * DRAWS
    false = _share(measured.alarms[0.0])
    found = _share(measured.alarms[1.0])
    input_layer, deepest = measured.profile.layers[0].auc, measured.profile.layers[-1].auc
    plain = measured.memorised["none"]
    shifted = measured.memorised["flip+shift"]
    holds = (
        measured.alarms[0.0] <= 5  # P(more than 5 of 40 | level 0.05) < 0.02
        and measured.alarms[1.0] == audits
        and input_layer.low <= 0.5 <= input_layer.high
        and deepest.low > 0.5
        and _balanced(plain[0]) >= 0.9
        and all(_balanced(a) > _balanced(b) for a, b in zip(plain[1:], shifted[1:], strict=True))
    )
    return Claim(
        system="dejavu",
        paper="Deja Vu: an empirical evaluation of the memorization properties of ConvNets "
        "(1809.06396)",
        sentence="Confidences tell that a set was in training; a network can store an arbitrary "
        "set of images; the layers below the head still tell who was a member.",
        measured=(
            f"A set of {CANDIDATES} training images was detected in {measured.alarms[1.0]} of "
            f"{audits} audits ({found.low:.0%} to {found.high:.0%}), one with a quarter of them "
            f"leaked in {measured.alarms[0.25]}; mean estimate of that quarter "
            f"{measured.fraction[0.25]:.2f}. {STORED[0]} arbitrary images are told from unseen "
            f"ones with balanced accuracy {_balanced(plain[0]):.2f}, {STORED[-1]} with "
            f"{_balanced(plain[-1]):.2f} ({_balanced(shifted[-1]):.2f} with flips and shifts). "
            f"Membership by depth: AUC {deepest.value:.3f} ({deepest.low:.3f} to "
            f"{deepest.high:.3f}) behind the last layer."
        ),
        control=(
            f"Held-out images as candidates: {measured.alarms[0.0]} of {audits} audits raised an "
            f"alarm at level {LEVEL:g} ({false.low:.0%} to {false.high:.0%}). Input pixels alone: "
            f"AUC {input_layer.value:.3f} ({input_layer.low:.3f} to {input_layer.high:.3f})."
        ),
        holds=holds,
        data="digit scenes of 16 pixels: scikit-learn's handwritten digits on cluttered canvases "
        "(synthetic), a perceptron with two hidden layers",
        details=lambda report: _details(report, measured),
    )


def _measure() -> _Measured:
    scenes, classes, _ = draw_scenes()
    grey = torch.from_numpy(scenes)[:, None].float() / 255
    small = nn.functional.interpolate(grey, SIDE, mode="area")
    x = (small - small.mean()) / small.std()
    y = torch.from_numpy(classes)
    design = np.tile(np.arange(len(x)) < TRAINED, (MODELS, 1))
    pool = train_references(_perceptron, x, y, design, epochs=40, batch_size=50, lr=0.02)
    margins = [top_margin(logits) for logits in pool.logits(x)]
    right = (pool.logits(x).argmax(2) == y).float()
    alarms, distance, fraction = _audits(margins)
    return _Measured(
        alarms,
        distance,
        fraction,
        {name: _memorise(x, name) for name in ("none", "flip+shift")},
        _profile(pool, x, y),
        (float(right[:, :TRAINED].mean()), float(right[:, TRAINED:].mean())),
    )


def _perceptron() -> nn.Module:
    width = 256
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(SIDE * SIDE, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


def _audits(margins: list[Any]) -> tuple[dict[float, int], dict[float, float], dict[float, float]]:
    rng = np.random.default_rng(0)
    alarms = dict.fromkeys(LEAKS, 0)
    distances: dict[float, list[float]] = {leak: [] for leak in LEAKS}
    fractions: dict[float, list[float]] = {leak: [] for leak in LEAKS}
    for margin in margins:
        for leak in LEAKS:
            for _ in range(DRAWS):
                inside = rng.permutation(TRAINED)
                outside = TRAINED + rng.permutation(HELD_OUT)
                leaked = round(leak * CANDIDATES)
                candidates = np.concatenate((inside[:leaked], outside[: CANDIDATES - leaked]))
                reference = margin[outside[CANDIDATES:][:REFERENCES]]
                found = detect(margin[candidates], reference, level=LEVEL).primary
                alarms[leak] += found.verdict == "detected"
                distances[leak].append(found.value)
                known = margin[inside[CANDIDATES:]]
                estimate = leaked_fraction(margin[candidates], reference, known, resamples=100)
                fractions[leak].append(estimate.value)
    return (
        alarms,
        {leak: float(np.mean(v)) for leak, v in distances.items()},
        {leak: float(np.mean(v)) for leak, v in fractions.items()},
    )


def _memorise(x: torch.Tensor, transform: str) -> list[MemorizationReport]:
    def network() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(SIDE * SIDE, 256), nn.ReLU(), nn.Linear(256, 1)
        )

    return [
        fit_memorizer(
            network,
            x,
            MembershipTask.draw(x, n, 500, seed=0),
            transform=TRAINING.get(transform),
            steps=500,
        ).report
        for n in STORED
    ]


def _profile(pool: ReferencePool, x: torch.Tensor, y: torch.Tensor) -> DepthProfile:
    members, unseen = slice(0, TRAINED), slice(TRAINED, 2 * TRAINED)
    public = slice(2 * TRAINED, None)
    probe = LayerProbe(pool.model(0))
    return probe.run((x[public], y[public]), (x[members], y[members]), (x[unseen], y[unseen]))


def _share(count: int) -> Interval:
    return proportion_interval(count, MODELS * DRAWS, "clopper-pearson")


def _balanced(report: MemorizationReport) -> float:
    return report.clean.balanced_accuracy.value


def _details(report: Report, measured: _Measured) -> None:
    seen, unseen = measured.accuracy
    report.text(
        f"Five networks, accuracy {seen:.1%} on the images they were trained on and {unseen:.1%} "
        f"on others. Each audit takes {CANDIDATES} candidates and {REFERENCES} held-out "
        "references and asks whether the candidates are more confident (one-sided "
        "Kolmogorov-Smirnov test)."
    )
    report.table(
        ["leaked, %", "audits", "alarms", "mean distance", "mean estimate of the fraction"],
        [
            [
                round(100 * leak),
                MODELS * DRAWS,
                measured.alarms[leak],
                measured.distance[leak],
                measured.fraction[leak],
            ]
            for leak in LEAKS
        ],
        "The first row is the control.",
    )
    report.figure(
        curve_figure(
            {
                name: (STORED, [100 * _balanced(r) for r in reports], None, None)
                for name, reports in measured.memorised.items()
            },
            "images in the set",
            "balanced accuracy on set and unseen images, %",
        ),
        "Explicit memorisation: the network is trained to say whether an image is in an arbitrary "
        "set. Images it never saw are the control; augmentation makes the task harder.",
        "balanced accuracy against the size of the memorised set",
    )
    report.table(
        ["transform", "images", "found, %", "seen refused, %", "unseen refused, %", "bits"],
        [
            [
                name,
                r.n,
                100 * r.clean.tpr.value,
                100 * r.clean.tnr_seen.value,
                100 * r.clean.tnr_unseen.value,
                r.stored_bits,
            ]
            for name, reports in measured.memorised.items()
            for r in reports
        ],
        "Bits stored about the set.",
    )
    depth = measured.profile.layers
    auc, low, high = (
        [getattr(layer.auc, name) for layer in depth] for name in ("value", "low", "high")
    )
    report.figure(
        curve_figure(
            {"new head": ([layer.depth for layer in depth], auc, low, high)},
            "depth (0: input pixels)",
            "AUC of membership",
        ),
        "The head was removed and a new one trained on other images, at every depth. The input "
        "must stay at one half.",
        "membership against depth",
    )
