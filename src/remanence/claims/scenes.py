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

    Args:
        folder: Folder to create.
        seed: Seed of the split and of the scenes.
    """
    scenes, labels, numbers = draw_scenes(seed)
    parts = {"train": slice(900), "validation": slice(900, 1200), "test": slice(1200, None)}
    for split, rows in parts.items():
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True)
        for scene, label, number in zip(scenes[rows], labels[rows], numbers[rows], strict=True):
            Image.fromarray(scene).save(folder / split / str(label) / f"{number:04d}.png")


def draw_scenes(
    seed: int = 0,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draw one scene of each digit, in random order.

    Each digit appears in one scene only, and the clutter comes from the first 900, so no
    handwriting of one part is the object in another.

    Args:
        seed: Seed of the order and of the scenes.

    Returns:
        Scenes (1797, 40, 40), their classes (1797,), and each digit's number in scikit-learn.
    """
    digits = load_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits.target))
    scenes = []
    for row in order:
        clutter = digits.images[rng.choice(order[:900], 3)]
        scenes.append(_scene(digits.images[row], clutter, rng))
    return np.stack(scenes), digits.target[order].astype(np.int64), order


def _scene(
    digit: npt.NDArray[np.float64], clutter: npt.NDArray[np.float64], rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
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
    return noisy.clip(0, 255).astype(np.uint8)


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
