"""And the Bit Goes Down: codewords chosen by what a layer outputs keep a network working."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from remanence.claims.claim import Claim
from remanence.jobs.compress.quantize import FLOAT, OURS, PAPER, PLAIN, quantize
from remanence.jobs.learn.classifier import classifier
from remanence.kit.report import Report
from remanence.kit.statistics import mean_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEEDS = (0, 1, 2)
CODEWORDS = 16
NAMES = {
    FLOAT: "float",
    PLAIN: "k-means of the weights (control)",
    PAPER: "the paper's metric of the inputs",
    OURS: "full metric, aimed at the float network's outputs",
}


@dataclass(frozen=True)
class _Measured:
    """Figures of every seed.

    Attributes:
        accuracy: Test accuracy in percent by network, (S,), without any training after the search.
        errors: Relative output error by network, mean over layers, (S,).
        ratio: How many times smaller the file is than the weights.
    """

    accuracy: dict[str, NDArray[np.float64]]
    errors: dict[str, NDArray[np.float64]]
    ratio: float


def compress_claim() -> Claim:
    """Measure the claim of arXiv 1907.05686 on handwritten digits."""
    measured = _measure()
    errors, accuracy = measured.errors, measured.accuracy
    gain = accuracy[OURS] - accuracy[PLAIN]
    low, high = mean_interval(gain)
    lowered = bool((errors[PAPER] <= 0.85 * errors[PLAIN]).all())
    halved = bool((errors[OURS] <= 0.5 * errors[PAPER]).all())
    plain, paper, ours = (f"{accuracy[name].mean():.1f} %" for name in (PLAIN, PAPER, OURS))
    return Claim(
        system="compress",
        paper="And the Bit Goes Down: Revisiting the Quantization of Neural Networks (1907.05686)",
        sentence="Codewords chosen by a layer's output on data, not by its weights, keep a network "
        "working in a small part of its bytes, without labels.",
        measured=(
            f"{measured.ratio:.1f} times smaller, no training after the search: {ours} right, of "
            f"{accuracy[FLOAT].mean():.1f} % in float. The paper's metric of the inputs takes the "
            f"layers' output error from {100 * errors[PLAIN].mean():.0f} % to "
            f"{100 * errors[PAPER].mean():.0f} %; the full one to "
            f"{100 * errors[OURS].mean():.1f} %. Mean over {len(SEEDS)} networks."
        ),
        control=(
            f"k-means of the weights, the same bytes: {plain} right ({gain.mean():+.1f} points for "
            f"ours, 95 % interval {low:+.1f} to {high:+.1f}); the paper's metric: {paper}."
        ),
        holds=lowered and halved and low >= 25 and bool((accuracy[OURS] >= 95).all()),
        data="scikit-learn's handwritten digits, enlarged to 16 pixels, a network of five "
        f"convolutions, {CODEWORDS} codewords for blocks of 9 weights",
        details=lambda report: _details(report, measured),
    )


def _measure() -> _Measured:
    accuracy: dict[str, list[float]] = {name: [] for name in NAMES}
    errors: dict[str, list[float]] = {name: [] for name in (PLAIN, PAPER, OURS)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = folder / "recipe.json"
        few: dict[str, Any] = {"codewords": CODEWORDS}
        recipe.write_text(json.dumps({"base": "small", "spatial": few, "head": few}))
        for seed in SEEDS:
            base, out = folder / f"base{seed}", folder / f"compressed{seed}"
            views: dict[str, Any] = {"scale": (0.6, 1.0), "flip": 0.0, "seed": seed}
            classifier(
                "digits", out=base, model="cifar_convnet5", size=16, epochs=6, lr=0.1, **views
            )
            outcome = quantize(
                str(base / "model"),
                "digits",
                out=out,
                recipe=str(recipe),
                finetune_steps=0,
                **views,
            )
            for measured in outcome.measured:
                assert measured.accuracy is not None
                accuracy[measured.name].append(100 * measured.accuracy[0])
            for name, layers in outcome.layers.items():
                errors[name].append(float(np.mean([layer.output_error for layer in layers])))
    return _Measured(
        {name: np.array(values) for name, values in accuracy.items()},
        {name: np.array(values) for name, values in errors.items()},
        outcome.size.ratio,
    )


def _details(report: Report, measured: _Measured) -> None:
    rows: list[list[Any]] = []
    for name, words in NAMES.items():
        found = measured.accuracy[name]
        low, high = mean_interval(found)
        errors = measured.errors.get(name)
        error = None if errors is None else 100 * float(errors.mean())
        rows.append([words, float(found.mean()), low, high, error])
    report.table(
        ["network", "right, %", "low", "high", "output error, %"],
        rows,
        f"Mean over {len(SEEDS)} networks with 95 % intervals; all but the first are files of the "
        "same size. Output error: squared and relative, mean over the layers, each on the inputs "
        "that the quantised layers before it leave.",
    )
