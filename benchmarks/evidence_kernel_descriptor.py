r"""Evidence of kernel descriptors on the Oxford affine sequences, beside kornia's on equal patches.

    python benchmarks/evidence_kernel_descriptor.py --data ../shared/data

700 key points of each first image go through the homographies to the five others; upright patches
of 64 pixels, with the noise of a detector ("medium"). Whitening is learned on the three other
sequences (leave one out). FPR95 is on as many random pairs of a sequence that do not match as on
those that do, matching mAP that of HPatches; both in percent, means over sequences and seeds of the
noise. Intervals are 95 % bootstrap intervals over key points, the same for all rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import cv2
import kornia
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from remanence.search.kernel_descriptor.descriptor import KernelDescriptor
from remanence.search.kernel_descriptor.evaluation import average_precision, fpr95
from remanence.search.kernel_descriptor.matching import nearest_two
from remanence.search.kernel_descriptor.moments import Moments
from remanence.search.kernel_descriptor.views import PatchGroups, View, patch_pairs
from remanence.search.kernel_descriptor.whitening import KINDS, Whitening

SEQUENCES = ("bikes", "boat", "leuven", "wall")
SIZE = 64
POLAR = 175  # components of the polar part, which come first
RESAMPLED = 100


class Answers(NamedTuple):
    """What one descriptor says of one sequence, for V views of N key points.

    Attributes:
        score: Minus the distance to the nearest (V, N).
        right: The nearest is the right one (V, N).
        same: Minus the distance to the right one (V, N).
        stranger: Minus the distance to another one (V, N).
    """

    score: Tensor
    right: Tensor
    same: Tensor
    stranger: Tensor


def read(folder: Path) -> tuple[Tensor, list[View]]:
    """Image 1 of a sequence and the others with their homographies."""
    images = [
        torch.from_numpy(cv2.imread(str(folder / f"img{k}.png"), cv2.IMREAD_GRAYSCALE))
        for k in range(1, 7)
    ]
    views = [
        View(image, torch.from_numpy(np.loadtxt(folder / f"H1to{k}p")))
        for k, image in enumerate(images[1:], start=2)
    ]
    return images[0], views


def describe(patches: Tensor) -> dict[str, Tensor]:
    """Descriptors of patches (N, s, s) that need no learning."""
    concat = KernelDescriptor()(patches).vectors
    peers = {
        "kornia MKD": kornia.feature.MKDDescriptor(SIZE, "concat", whitening=None),
        "kornia SIFT": kornia.feature.SIFTDescriptor(SIZE, rootsift=False),
    }
    found = {
        "polar": normalize(concat[:, :POLAR], dim=1),
        "cartesian": normalize(concat[:, POLAR:], dim=1),
        "concat": concat,
    }
    with torch.inference_mode():
        for name, peer in peers.items():
            found[name] = torch.cat([peer(c[:, None]) for c in torch.split(patches, 256)]).clone()
    # What kornia's own option rootsift does last.
    found["kornia RootSIFT"] = normalize(found["kornia SIFT"], p=1, dim=1).sqrt()
    found["OpenCV RootSIFT"] = opencv_rootsift(patches)
    small = interpolate(patches[:, None], (16, 16), mode="area").flatten(1)
    found["16 x 16 pixels"] = normalize(small - small.mean(dim=1, keepdim=True), dim=1)
    return found


def opencv_rootsift(patches: Tensor) -> Tensor:
    """RootSIFT of OpenCV, its window laid over the whole patch, with the blur of its pyramid."""
    sift = cv2.SIFT_create()
    # The window is 12 sigmas wide, and OpenCV's size is two.
    place = [cv2.KeyPoint((SIZE - 1) / 2, (SIZE - 1) / 2, SIZE / 6, 0, 1, 0)]
    levels = (255 * patches).round().to(torch.uint8).numpy()
    vectors = np.concatenate([sift.compute(patch, place)[1] for patch in levels])
    return normalize(torch.from_numpy(vectors).clamp_min(0), p=1, dim=1).sqrt()


def learn(sequences: list[tuple[Tensor, Tensor]]) -> Moments:
    """Moments of descriptors (V + 1, N, D) that are valid (V + 1, N), and of their pairs."""
    moments = Moments(sequences[0][0].shape[-1])
    for vectors, valid in sequences:
        for view, seen in zip(vectors, valid, strict=True):
            moments.add(view[seen])
        for view, seen in zip(vectors[1:], valid[1:], strict=True):
            moments.add_pairs(vectors[0][seen], view[seen])
    return moments


def answer(vectors: Tensor, valid: Tensor) -> Answers:
    """Match the first image with each other one, among the key points that both show."""
    reference, views = vectors[0].double(), vectors[1:].double()
    count = len(reference)
    answers = []
    for number, (view, seen) in enumerate(zip(views, valid[1:], strict=True), start=1):
        rows = seen.nonzero().squeeze(1)
        nearest = nearest_two(reference[rows], view[rows])
        distance = nearest.distances[:, 0]
        right = nearest.indices[:, 0] == torch.arange(len(rows))
        right &= distance < nearest.distances[:, 1]
        shift = torch.randint(
            1, len(rows), (len(rows),), generator=torch.Generator().manual_seed(number)
        )
        other = rows[(torch.arange(len(rows)) + shift) % len(rows)]
        filled = [torch.full((count,), -torch.inf, dtype=torch.float64) for _ in range(3)]
        filled[0][rows] = -distance
        filled[1][rows] = -(reference - view).norm(dim=1)[rows]
        filled[2][rows] = -(reference[rows] - view[other]).norm(dim=1)
        hit = torch.zeros(count, dtype=torch.bool)
        hit[rows] = right
        answers.append((filled[0], hit, *filled[1:]))
    return Answers(*(torch.stack(each) for each in zip(*answers, strict=True)))


def figures(answers: Answers, resampled: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Matching mAP and FPR95 for each row of key points (B, N), in percent (B,)."""
    precision = torch.zeros(len(resampled), dtype=torch.float64)
    for score, right in zip(answers.score, answers.right, strict=True):
        score, right = score[resampled], right[resampled]  # noqa: PLW2901 - resampled
        # Those not shown rank last, are not right, and do not count.
        shown = score.isfinite().sum(dim=1)
        precision += average_precision(score, right) * right.sum(dim=1) / shown
    false = []
    for rows in resampled:
        same, stranger = answers.same[:, rows].flatten(), answers.stranger[:, rows].flatten()
        similarity = torch.cat([same[same.isfinite()], stranger[stranger.isfinite()]])
        label = torch.arange(len(similarity)) < len(similarity) // 2
        false.append(fpr95(similarity, label))
    return (100 * precision / len(answers.score)).numpy(), 100 * np.array(false)


def measure(groups: dict[str, PatchGroups], resampled: Tensor) -> dict[str, np.ndarray]:
    """For each descriptor, (sequence, mAP or FPR95, resample)."""
    raw = {
        name: {
            key: vectors.unflatten(0, group.valid.shape)
            for key, vectors in describe(group.patches.flatten(0, 1)).items()
        }
        for name, group in groups.items()
    }
    learned = [(key, kind) for key in ("polar", "cartesian", "concat") for kind in KINDS]
    learned += [("kornia MKD", "pcaws"), ("kornia RootSIFT", "pcawt"), ("kornia RootSIFT", "lws")]
    learned += [("OpenCV RootSIFT", kind) for kind in ("pcawt", "pcaws", "lws")]
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for name, group in groups.items():
        others = [other for other in groups if other != name]
        everything = dict(raw[name])
        moments = {
            key: learn([(raw[other][key], groups[other].valid) for other in others])
            for key in {key for key, _ in learned}
        }
        for key, kind in learned:
            vectors = raw[name][key]
            whitening = Whitening.fit(moments[key], kind, dim=min(128, vectors.shape[-1]))
            everything[f"{key} {kind}"] = whitening(vectors.flatten(0, 1)).unflatten(
                0, group.valid.shape
            )
        for key, vectors in everything.items():
            found.setdefault(key, []).append(figures(answer(vectors, group.valid), resampled))
    return {key: np.array(each) for key, each in found.items()}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--most", type=int, default=700, help="key points of an image")
    options = parser.parse_args()
    folder = options.data / "oxford_affine"
    sequences = {name: read(folder / name) for name in SEQUENCES}
    runs: list[dict[str, np.ndarray]] = []
    for seed in track(range(options.seeds), "seeds"):
        groups = {
            name: patch_pairs(image, views, most=options.most, size=SIZE, seed=seed)
            for name, (image, views) in sequences.items()
        }
        count = min(group.valid.shape[1] for group in groups.values())
        groups = {
            n: PatchGroups(g.patches[:, :count], g.valid[:, :count]) for n, g in groups.items()
        }
        draws = np.random.default_rng(0).integers(0, count, (RESAMPLED, count))
        rows = np.vstack([np.arange(count), draws])  # the figure itself comes first
        runs.append(measure(groups, torch.from_numpy(rows)))
    console = Console(width=110)
    table = Table("descriptor", "FPR95", "mAP", "mAP over raw", *SEQUENCES, title=f"{count} places")
    for key in runs[0]:
        means = np.mean([run[key] for run in runs], axis=0)  # (sequence, measure, resample)
        base = np.mean([run[key.rsplit(" pca", 1)[0].rsplit(" lw", 1)[0]] for run in runs], axis=0)
        cells = []
        for values in (means[:, 1].mean(0), means[:, 0].mean(0), (means - base)[:, 0].mean(0)):
            low, high = np.percentile(values[1:], [2.5, 97.5])
            cells.append(f"{values[0]:.1f} ({low:.1f} to {high:.1f})")
        if base is means or np.array_equal(base, means):
            cells[2] = ""
        table.add_row(key, *cells, *(f"{value:.1f}" for value in means[:, 0, 0]))
    console.print(table)


if __name__ == "__main__":
    main()
