"""FixRes and FixEfficientNet: a classifier is best tested larger than it was trained."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from remanence.claims.claim import Claim
from remanence.claims.scenes import DESCRIPTION, write_scenes
from remanence.jobs.learn.classifier import classifier
from remanence.jobs.learn.fixres import fixres
from remanence.kit.report import Cell, Report, curve_figure
from remanence.kit.statistics import BootstrapDifference, paired_bootstrap

if TYPE_CHECKING:
    import numpy.typing as npt

TRAIN_SIZE = 16
SWEEP = (8, 12, 16, 20, 24, 28, 32)
TUNED = (16, 20, 24)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class _Measured:
    """Figures of all seeds, by scope and test size.

    Attributes:
        equalising: Size at which objects would look as large as in training, pixels.
        right: Share of the seeds that predict each reported image right, (N,).
        recommended: The multiple of the network's stride next to it.
        calibration_error: Mean expected calibration error.
    """

    equalising: float
    recommended: int
    right: dict[tuple[str, int], npt.NDArray[np.float64]]
    calibration_error: dict[tuple[str, int], float]

    def accuracy(self, scope: str, size: int) -> float:
        return 100 * float(self.right[scope, size].mean())

    def gain(self, a: tuple[str, int], b: tuple[str, int]) -> BootstrapDifference:
        """Mean difference in points with its interval over images, seeds kept together."""
        return BootstrapDifference(
            *(100 * v for v in paired_bootstrap(self.right[a], self.right[b]))
        )

    @property
    def best(self) -> int:
        return max(SWEEP, key=lambda size: self.accuracy("none", size))


def fixres_claim() -> Claim:
    """Measure the claim of arXiv 1906.06423 on digit scenes."""
    scope = "classifier+last_bn"
    measured = _measure("cifar_convnet5", scope, smoothing=0.0)
    return _claim(
        measured,
        scope,
        system="fixres",
        paper="Fixing the train-test resolution discrepancy (1906.06423)",
        sentence="A classifier trained with random resized crops is best tested at a larger size "
        "than it was trained at, and tuning its last layers at that size adds to it.",
    )


def fixefficientnet_claim() -> Claim:
    """Measure the claim of arXiv 2003.08237 on digit scenes, with a depthwise-separable network."""
    scope = "head_block"
    measured = _measure("cifar_mobilenet", scope, smoothing=0.1)
    return _claim(
        measured,
        scope,
        system="fixefficientnet",
        paper="Fixing the train-test resolution discrepancy: FixEfficientNet (2003.08237)",
        sentence="The same correction, with label smoothing, raises a network of depthwise-"
        "separable convolutions that was trained with a stronger recipe.",
    )


def _measure(model: str, scope: str, *, smoothing: float) -> _Measured:
    right: dict[tuple[str, int], list[npt.NDArray[np.float64]]] = {}
    calibration: dict[tuple[str, int], list[float]] = {}
    geometry: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_scenes(folder / "scenes")
        for seed in SEEDS:
            trained = classifier(
                str(folder / "scenes"),
                out=folder / f"base{seed}",
                model=model,
                size=TRAIN_SIZE,
                epochs=10,
                lr=0.05,
                flip=0.0,
                smoothing=smoothing,
                seed=seed,
            )
            fixed = fixres(
                str(folder / "scenes"),
                model=[str(trained.out / "model")],
                out=folder / f"fixed{seed}",
                sizes=list(SWEEP),
                tune_sizes=list(TUNED),
                scope=[scope],
                epochs=2,
                flip=0.0,
                smoothing=smoothing,
                seed=seed,
            )
            # Shapes of images and crops alone recommend the size: nothing is selected.
            geometry = fixed.results["geometry"][0]
            for row, correct in zip(fixed.results["candidates"], fixed.correct, strict=True):
                key = (row["scope"], row["size"])
                right.setdefault(key, []).append(correct.astype(np.float64))
                calibration.setdefault(key, []).append(row["calibration_error"])
    return _Measured(
        geometry["equalising_size"],
        geometry["recommended"],
        {key: np.mean(arrays, axis=0) for key, arrays in right.items()},
        {key: float(np.mean(values)) for key, values in calibration.items()},
    )


def _claim(measured: _Measured, scope: str, **words: str) -> Claim:
    larger = measured.recommended
    base, tuned, same = ("none", TRAIN_SIZE), (scope, larger), (scope, TRAIN_SIZE)
    whole = measured.gain(tuned, base)
    control = measured.gain(same, base)
    beyond = measured.gain(tuned, same)
    adaptation = measured.gain(tuned, ("none", larger))
    holds = measured.best >= 1.1 * TRAIN_SIZE and whole.low > 0 and beyond.low > 0
    return Claim(
        holds=holds,
        data=DESCRIPTION,
        measured=(
            f"Trained at {TRAIN_SIZE} pixels: {measured.accuracy(*base):.1f} % there, best without "
            f"adaptation at {measured.best}; tuned at {larger}, where objects look alike: "
            f"{measured.accuracy(*tuned):.1f} %, {_points(whole)}. Mean of {len(SEEDS)} seeds."
        ),
        control=(
            f"The same tuning at {TRAIN_SIZE} pixels gives {_points(control)}, so the size itself "
            f"gives {_points(beyond)}; at {larger} pixels tuning gives {_points(adaptation)} "
            "over not tuning."
        ),
        details=lambda report: _details(report, measured, scope),
        **words,
    )


def _points(gain: BootstrapDifference) -> str:
    return f"{gain.difference:+.1f} points (95 % interval {gain.low:+.1f} to {gain.high:+.1f})"


def _details(report: Report, measured: _Measured, scope: str) -> None:
    curves: dict[str, Any] = {}
    for name, label in (("none", "not adapted"), (scope, scope)):
        sizes = sorted(size for key, size in measured.right if key == name)
        curves[label] = (sizes, [measured.accuracy(name, s) for s in sizes], None, None)
    report.figure(
        curve_figure(
            curves,
            "test size, pixels",
            "top-1 accuracy, %",
            {"train": TRAIN_SIZE, "equal": measured.equalising},
        ),
        f"Mean of {len(SEEDS)} seeds. At the size marked equal, which follows from the shapes of "
        "the images and the random resized crops alone, objects look as large as in training.",
        "accuracy against test size before and after tuning",
    )
    report.table(
        ["scope", "test size", "accuracy, %", "against as trained", "low", "high", "calibration"],
        [
            [
                "as trained" if key == ("none", TRAIN_SIZE) else key[0],
                key[1],
                Cell(
                    measured.accuracy(*key),
                    "best" if key == (scope, measured.recommended) else None,
                ),
                *measured.gain(key, ("none", TRAIN_SIZE)),
                measured.calibration_error[key],
            ]
            for key in measured.right
        ],
        "Differences in points with 95 % intervals (paired bootstrap over images); calibration is "
        "the expected calibration error.",
    )
