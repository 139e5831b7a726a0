"""Digit scenes: synthetic photographs in which a handwritten digit is the object.

An 8-pixel digit alone fills its image, so nothing can look too small in it. Here each of
scikit-learn's digits is set near the middle of a larger, cluttered canvas, as an object in a
photograph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

CANVAS = 40
DESCRIPTION = (
    "digit scenes: scikit-learn's handwritten digits, each on a cluttered 40-pixel canvas "
    "(synthetic; 900 to train, 300 to select, 597 to report)"
)


def write_scenes(folder: Path, seed: int = 0) -> None:
    """Write the scenes as class folders below `train`, `validation` and `test`.

    Each digit appears in one scene only, so no handwriting is shared between splits.

    Args:
        folder: Folder to create.
        seed: Seed of the split and of the scenes.
    """
    digits = load_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits.target))
    parts = {"train": order[:900], "validation": order[900:1200], "test": order[1200:]}
    for split, rows in parts.items():
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True)
        for row in rows:
            clutter = digits.images[rng.choice(parts["train"], 3)]
            scene = _scene(digits.images[row], clutter, rng)
            scene.save(folder / split / str(digits.target[row]) / f"{row:04d}.png")


def _scene(
    digit: npt.NDArray[np.float64], clutter: npt.NDArray[np.float64], rng: np.random.Generator
) -> Image.Image:
    coarse = rng.normal(100, 12, size=(10, 10)).clip(0, 255).astype(np.uint8)
    canvas = _enlarged(coarse, CANVAS)
    middle = CANVAS / 2
    for other in clutter:  # parts of other digits, small and pale, at the border
        angle = rng.uniform(0, 2 * np.pi)
        at = middle + 0.47 * CANVAS * np.array([np.sin(angle), np.cos(angle)])
        _stamp(canvas, other, int(rng.integers(7, 10)), at, rng.uniform(30, 60) * _sign(rng))
    at = middle + rng.uniform(-5, 5, size=2)
    _stamp(canvas, digit, int(rng.integers(16, 23)), at, rng.uniform(100, 155) * _sign(rng))
    noisy = canvas + rng.normal(0, 4, size=canvas.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _sign(rng: np.random.Generator) -> float:
    return float(rng.choice([-1, 1]))


def _enlarged(pixels: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.float64]:
    resized = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(resized).astype(np.float64)


def _stamp(
    canvas: npt.NDArray[np.float64],
    digit: npt.NDArray[np.float64],
    side: int,
    at: npt.NDArray[np.float64],
    strength: float,
) -> None:
    """Add a digit of `side` pixels, centred at `at` (row, column), to the canvas in place."""
    ink = _enlarged((digit * 15.9).astype(np.uint8), side) / 255
    top, left = (int(v) for v in np.rint(at - side / 2))
    rows = slice(max(0, top), min(CANVAS, top + side))
    columns = slice(max(0, left), min(CANVAS, left + side))
    part = ink[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    canvas[rows, columns] += strength * part
