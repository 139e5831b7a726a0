"""Radioactive data: a network trained on marked images gives itself away."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from remanence.audit.membership.references import train_references
from remanence.audit.radioactive.augment import PadCropFlip
from remanence.audit.radioactive.calibration import Calibration, calibrate
from remanence.audit.radioactive.carriers import SecretKey, carriers
from remanence.audit.radioactive.detection import Detection, detect_whitebox
from remanence.audit.radioactive.features import FeatureExtractor
from remanence.audit.radioactive.head import prepare_head
from remanence.audit.radioactive.marking import MarkConfig, Marked, MarkingInfeasible, mark
from remanence.claims.claim import Claim
from remanence.claims.scenes import CANVAS, draw_scenes
from remanence.kit.report import Cell, Report

if TYPE_CHECKING:
    from numpy.typing import NDArray

PART = 1200  # digits of each drawing that the owner trains on; the other 597 measure accuracy
FRACTION = 0.2
KEYS = 5
LEVEL = 0.05
MEAN, STD = (0.4,), (0.15,)


@dataclass(frozen=True)
class _Measured:
    """Figures of every secret key.

    Attributes:
        marked: Detections in heads trained on the marked data.
        clean: Detections with the same keys in a head trained on the unmarked data.
        accuracy: Of the heads trained on marked data, (keys,).
        clean_accuracy: Of the head trained on unmarked data.
        images: The marked images of the first key.
        calibration: p-values of the clean head under random keys.
        pixels: The first marked image before marking, (40, 40).
    """

    marked: list[Detection]
    clean: list[Detection]
    accuracy: NDArray[np.float64]
    clean_accuracy: float
    images: Marked[torch.Tensor]
    calibration: Calibration
    pixels: torch.Tensor


def radioactive_claim() -> Claim:
    """Measure the claim of arXiv 2002.00937 on digit scenes, with a head on frozen features."""
    measured = _measure()
    found = np.array([d.log10_p for d in measured.marked])
    control = np.array([d.log10_p for d in measured.clean])
    alarms = int((control <= np.log10(LEVEL)).sum())
    detected = int((found <= np.log10(LEVEL)).sum())
    lost = 100 * (measured.clean_accuracy - float(measured.accuracy.mean()))
    null = measured.calibration.check
    psnr = float(np.mean(measured.images.psnr))
    return Claim(
        system="radioactive",
        paper="Radioactive data: tracing through training (2002.00937)",
        sentence="Imperceptible marks on a part of a training set show in the classifier trained "
        "on it, with an exact p-value, at no cost in accuracy.",
        measured=(
            f"{FRACTION:.0%} of {2 * PART:,} images marked at {psnr:.1f} dB: median log10 p "
            f"{np.median(found):.1f} (from {found.min():.1f} to {found.max():.1f}) over {KEYS} "
            f"secret keys, {detected} detected at level {LEVEL:g}; accuracy "
            f"{-lost:+.1f} points ({100 * measured.clean_accuracy:.1f} % without marks)."
        ),
        control=(
            f"The same keys against a classifier trained on the unmarked images: median log10 p "
            f"{np.median(control):.2f}, {alarms} of {KEYS} flagged. {null.finding}"
        ),
        holds=bool(
            np.median(found) <= -2
            and detected >= KEYS - 1
            and alarms <= 1
            and lost <= 3
            and null.holds
        ),
        data="digit scenes of 40 pixels: scikit-learn's handwritten digits on cluttered canvases "
        "(synthetic); a linear classifier on the features of a small convolutional network that "
        "was trained on other scenes",
        details=lambda report: _details(report, measured),
    )


def _measure() -> _Measured:
    marker = _trained_marker(*_scenes(seeds=(1,), rows=slice(None)))
    extractor = FeatureExtractor(marker, input_size=(1, CANVAS, CANVAS))
    owned, labels = _scenes(seeds=(0, 2), rows=slice(PART))
    unseen, unseen_labels = _scenes(seeds=(0, 2), rows=slice(PART, None))
    features, unseen_features = _features(extractor, owned), _features(extractor, unseen)
    chosen = np.random.default_rng(0).permutation(len(owned))[: round(FRACTION * len(owned))]
    # A head of images that were never marked: the ordinary class directions, which carry no mark,
    # are projected away.
    rest = np.setdiff1d(np.arange(len(owned)), chosen)
    reference = [_head(features[rest], labels[rest])[:, :-1]]
    clean_head = _head(features, labels)
    config = MarkConfig.preset("small", augment=PadCropFlip(CANVAS, 2), iterations=12)
    marked, clean, accuracy = [], [], []
    images: Marked[torch.Tensor] | None = None
    for number in range(KEYS):
        key = SecretKey.from_bytes(bytes([100 + number]) * 32)
        secret = torch.from_numpy(carriers(key, 10, extractor.dim))
        with warnings.catch_warnings(action="ignore", category=MarkingInfeasible):
            done = mark(
                owned[chosen], labels[chosen], extractor, secret, mean=MEAN, std=STD, config=config
            )
        images = done if images is None else images
        published = features.clone()
        published[chosen] = _features(extractor, done.images)
        head = _head(published, labels)
        accuracy.append(_accuracy(head, unseen_features, unseen_labels))
        found, control = (
            detect_whitebox(weight[:, :-1], None, secret, reference=reference)
            for weight in (head, clean_head)
        )
        marked.append(found)
        clean.append(control)
    assert images is not None
    prepared = prepare_head(
        clean_head[:, :-1].double(),
        alignment=None,
        reference=reference,
        class_map=None,
        center=False,
        provenance=None,
    )
    return _Measured(
        marked,
        clean,
        np.array(accuracy),
        _accuracy(clean_head, unseen_features, unseen_labels),
        images,
        calibrate(prepared),
        owned[chosen[0], 0],
    )


def _scenes(seeds: tuple[int, ...], rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = [draw_scenes(seed) for seed in seeds]
    scenes = np.concatenate([scenes[rows] for scenes, _, _ in drawn])
    labels = np.concatenate([labels[rows] for _, labels, _ in drawn])
    return torch.from_numpy(scenes)[:, None], torch.from_numpy(labels)


def _normalised(images: torch.Tensor) -> torch.Tensor:
    return (images.float() / 255 - MEAN[0]) / STD[0]


def _trained_marker(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    def network() -> nn.Module:
        layers: list[nn.Module] = []
        for before, after in ((1, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    design = np.ones((1, len(images)), dtype=bool)
    pool = train_references(
        network,
        images,
        labels,
        design,
        epochs=10,
        batch_size=32,
        lr=0.1,
        prepare=_normalised,
        vectorize=False,
    )
    return pool.model(0)


def _features(extractor: FeatureExtractor, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([extractor(_normalised(part)) for part in torch.split(images, 256)])


def _head(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Fit a weakly regularised linear classifier: weights and bias, (10, d + 1)."""
    fitted = LogisticRegression(C=10, max_iter=300).fit(features.numpy(), labels.numpy())
    return torch.from_numpy(np.column_stack((fitted.coef_, fitted.intercept_))).double()


def _accuracy(head: torch.Tensor, features: torch.Tensor, labels: torch.Tensor) -> float:
    logits = features.double() @ head[:, :-1].T + head[:, -1]
    return float((logits.argmax(1) == labels).double().mean())


def _details(report: Report, measured: _Measured) -> None:
    report.table(
        ["secret key", "log10 p, marked", "log10 p, clean", "mean cosine", "accuracy, %"],
        [
            [
                number,
                Cell(
                    found.evidence.log10_p, "best" if found.evidence.verdict == "detected" else None
                ),
                control.log10_p,
                float(np.mean(found.cosines)),
                100 * float(accuracy),
            ]
            for number, (found, control, accuracy) in enumerate(
                zip(measured.marked, measured.clean, measured.accuracy, strict=True)
            )
        ],
        "One row a key. The clean column is the control: a classifier that never saw a mark.",
    )
    report.text("The marking itself: " + measured.images.checks[0].finding)
    report.figure(
        _pictures(measured),
        "An image, the same image marked, and ten times the difference around grey.",
        "a digit scene before and after marking",
    )


def _pictures(measured: _Measured) -> Any:
    from matplotlib.figure import Figure

    before, after = measured.pixels.float(), measured.images.images[0, 0].float()
    figure = Figure(figsize=(5, 1.9), layout="constrained")
    panels = (before, after, (128 + 10 * (after - before)).clip(0, 255))
    for axes, panel, name in zip(
        figure.subplots(1, 3), panels, ("before", "marked", "difference x 10"), strict=True
    ):
        axes.imshow(panel.numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
    return figure
