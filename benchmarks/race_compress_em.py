"""Race of the EM of product quantisation on the layers of ResNet-18, small blocks.

Ours, faiss, scikit-learn and the code released with the paper (arXiv 1907.05686) cluster the same
blocks from the same centroids for the same number of iterations: in the plain metric and in that of
the layer's inputs, which faiss and scikit-learn are given as whitened points. Weights are Gaussian,
inputs rectified and correlated; shapes that occur several times are run once and counted.

The released code is imported from `--official DIR`, a checkout of facebookresearch/kill-the-bits;
its calls to CUDA are sent to the processor. It compares every centroid with every block on every
sampled input row, hours an iteration, so that its E-step is timed on 64 rows, 64 centroids and up
to 2,048 blocks and multiplied up to the rows that its sampling rule takes; its M-step counts as
nothing. On one small layer it runs to the end, on 32 input rows that all contestants share.
"""

from __future__ import annotations

import importlib
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faiss
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torchvision.models import resnet18

import harness
from remanence.compress.layout import Layout, codeword_count, layout_of
from remanence.compress.quantizer.kmeans import kmeans, metric_factor, nearest

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

SLICE_ROWS, SLICE_CENTROIDS, SLICE_BLOCKS = 64, 64, 2048
SHARED_ROWS = 32
OFFICIAL = "official, E-step multiplied up"


@dataclass(frozen=True)
class Course:
    """The blocks of a layer, its inputs, and the start that all contestants share."""

    name: str
    count: int  # layers of this shape
    points: Tensor  # (n, d)
    inputs: Tensor  # (rows, d)
    start: Tensor  # (K, d)
    official_rows: int
    iterations: int

    @property
    def scores(self) -> int:
        """Pairs of block and centroid, over all iterations."""
        return len(self.points) * len(self.start) * self.iterations

    @property
    def flops(self) -> int:
        """Multiplications and additions that the products of these pairs take."""
        return 2 * self.points.shape[1] * self.scores

    def metric(self) -> Tensor:
        """Return the Gram matrix of the inputs (d, d)."""
        inputs = self.inputs.double()
        return inputs.T @ inputs

    def lap(self, seconds: float, centroids: Tensor, metric: Tensor | None) -> harness.Lap:
        """Return a lap with the objective that centroids reach, by one yardstick for all."""
        codes = nearest(self.points, centroids, metric=metric)
        gaps = (self.points - centroids[codes]).double()
        if metric is not None:
            gaps = gaps @ metric_factor(metric)
        mean = gaps.square().sum().item() / len(gaps)
        return harness.Lap(self.scores, seconds, {"seconds": seconds, "objective": mean})


def courses(iterations: int) -> list[Course]:
    """Return ResNet-18's layers but the first, a course a shape."""
    names: dict[Layout, list[str]] = {}
    for name, module in resnet18().named_modules():
        if (layout := layout_of(module)) is not None and name != "conv1":
            names.setdefault(layout, []).append(name)
    generator = torch.Generator().manual_seed(0)
    listed = []
    for layout, (name, *others) in names.items():
        block = 9 if layout.taps == 9 else 4
        points = torch.randn(layout.rows * layout.row_length // block, block, generator=generator)
        points *= (2 / layout.row_length) ** 0.5
        mix = torch.randn(block, block, generator=generator)
        inputs = (torch.randn(4096, block, generator=generator) @ mix + 0.5).relu()
        k = codeword_count(2048 if layout.kind == "linear" else 256, len(points))
        start = points[torch.randperm(len(points), generator=generator)[:k]]
        samples = (
            5000 if name == "fc" else 1000 if name.startswith(("layer1", "layer2")) else 25_000
        )
        rows = samples // layout.rows * (layout.row_length // block)
        listed.append(Course(name, 1 + len(others), points, inputs, start, rows, iterations))
    return listed


def ours(course: Course, metric: Tensor | None) -> harness.Lap:
    """Run remanence."""
    began = time.perf_counter()
    found = kmeans(
        course.points,
        len(course.start),
        metric=metric,
        init=course.start,
        iterations=course.iterations,
        tolerance=0,
    )
    return course.lap(time.perf_counter() - began, found.centroids, metric)


def by_faiss(course: Course, metric: Tensor | None) -> harness.Lap:
    """Run faiss.Kmeans, on all points."""
    began = time.perf_counter()
    factor = _factor(course, metric)
    k, d = course.start.shape
    peer = faiss.Kmeans(
        d,
        k,
        niter=course.iterations,
        max_points_per_centroid=len(course.points),
        min_points_per_centroid=1,
    )
    peer.train((course.points @ factor).numpy(), init_centroids=(course.start @ factor).numpy())
    seconds = time.perf_counter() - began
    return course.lap(seconds, torch.from_numpy(peer.centroids) @ factor.inverse(), metric)


def by_scikit_learn(course: Course, metric: Tensor | None) -> harness.Lap:
    """Run scikit-learn's KMeans."""
    began = time.perf_counter()
    factor = _factor(course, metric)
    start = (course.start @ factor).numpy()
    peer = KMeans(len(start), init=start, n_init=1, max_iter=course.iterations, tol=0)
    peer.fit((course.points @ factor).numpy())
    seconds = time.perf_counter() - began
    return course.lap(seconds, torch.from_numpy(peer.cluster_centers_) @ factor.inverse(), metric)


def official_slice(course: Course, module: Any, _metric: Tensor | None) -> harness.Lap:
    """Time the released E-step on a slice and multiply it up."""
    blocks = course.points[:SLICE_BLOCKS].T.contiguous()
    centroids = course.start[:SLICE_CENTROIDS].clone()
    distances = module.Distances(blocks, centroids)
    rows = course.inputs[: min(SLICE_ROWS, course.official_rows)]
    distances(rows)
    began = time.perf_counter()
    distances(rows)
    seconds = time.perf_counter() - began
    done = len(rows) * len(centroids) * blocks.shape[1]
    whole = course.official_rows * course.scores
    return harness.Lap(course.scores, seconds * whole / done, {"seconds": seconds * whole / done})


def official_whole(course: Course, module: Any, metric: Tensor | None) -> harness.Lap:
    """Run the released EM to the end, on the inputs whose Gram matrix the others are given."""
    inputs = torch.eye(course.points.shape[1]) if metric is None else course.inputs
    columns = course.points.T.contiguous()
    em = module.EM(len(course.start), columns, verbose=False)
    em.centroids = course.start.clone()
    began = time.perf_counter()
    for i in range(course.iterations):
        em.step(inputs, inputs, columns, i)
    return course.lap(time.perf_counter() - began, em.centroids, metric)


def official(folder: Path) -> Any:
    """Import the released EM, its distances on the processor, in pieces that memory holds."""
    sys.path.insert(0, str(folder / "src"))
    module: Any = importlib.import_module("quantization.em")
    module.Distances = importlib.import_module("quantization.distance").Distances

    class OnProcessor(nn.Module):
        """In the place of ComputeDistances, which spreads over GPUs and halves until it fits."""

        def __init__(self, columns: Tensor, centroids: Tensor) -> None:
            super().__init__()
            self.parts = [module.Distances(p, centroids) for p in columns.split(512, dim=1)]

        def update_centroids(self, centroids: Tensor) -> None:
            for part in self.parts:
                part.centroids.data = centroids

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.cat([part(inputs) for part in self.parts], 1).sqrt()

    module.ComputeDistances = OnProcessor
    return module


def total(runs: list[tuple[Course, harness.Race]], name: str) -> float:
    """Return the seconds that all layers take, by the median lap of each shape."""
    return sum(
        course.count * sorted(lap.seconds for lap in run.laps[name])[len(run.laps[name]) // 2]
        for course, run in runs
    )


def sgemm_rate() -> float:
    """Return the float32 operations a second of a square product: the limit for any E-step."""
    a = torch.randn(1024, 1024)
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return float(2 * 1024**3 / min(seconds))


def _factor(course: Course, metric: Tensor | None) -> Tensor:
    return torch.eye(course.points.shape[1]) if metric is None else metric_factor(metric).float()


def _summary(title: str, runs: list[tuple[Course, harness.Race]]) -> None:
    print(f"\nAll {sum(course.count for course, _ in runs)} layers of ResNet-18, {title}:")
    mine = total(runs, "ours")
    for name in runs[0][1].laps:
        seconds = total(runs, name)
        print(f"  {name}: {seconds:,.1f} s, {seconds / mine:,.2f} x ours")
    flops, rate = sum(course.count * course.flops for course, _ in runs), sgemm_rate()
    print(
        f"  limit: {flops / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s of a square product are "
        f"{flops / rate:.2f} s; ours takes {mine * rate / flops:.1f} x that"
    )


def main() -> None:
    """Race on every shape in both metrics, then to the end on a small layer."""
    options = harness.parser(__doc__)
    options.set_defaults(rounds=1, warmup=0)
    options.add_argument("--official", type=Path, help="checkout of kill-the-bits")
    options.add_argument("--iterations", type=int, default=25)
    asked: argparse.Namespace = options.parse_args()
    facts = harness.environment(
        ["torch", "torchvision", "faiss-cpu", "scikit-learn"], asked.threads
    )
    torch.set_num_threads(asked.threads)
    faiss.omp_set_num_threads(asked.threads)
    module = official(asked.official) if asked.official else None
    races = []
    listed = courses(asked.iterations)
    for label, in_metric in (("plain metric", False), ("metric of the inputs", True)):
        runs = []
        for course in listed:
            metric = course.metric() if in_metric else None
            k, d = course.start.shape
            contestants: dict[str, Callable[[], harness.Lap]] = {
                "ours": partial(ours, course, metric),
                "faiss Kmeans": partial(by_faiss, course, metric),
                "scikit-learn KMeans": partial(by_scikit_learn, course, metric),
            }
            if module is not None and in_metric:
                contestants[OFFICIAL] = partial(official_slice, course, module, metric)
            title = f"{course.count} x {course.name}: n={len(course.points)} d={d} K={k}, {label}"
            runs.append((course, harness.race(title, contestants, asked, unit="scores/s")))
        races += [run for _, run in runs]
        _summary(label, runs)
    if module is not None:
        first = listed[0]
        small = Course(**(vars(first) | {"inputs": first.inputs[:SHARED_ROWS]}))
        for label, metric in (("plain metric", None), ("metric of 32 rows", small.metric())):
            contestants = {
                "ours": partial(ours, small, metric),
                "official, whole run": partial(official_whole, small, module, metric),
            }
            title = f"{small.name} to the end, {small.iterations} iterations, {label}"
            races.append(harness.race(title, contestants, asked, unit="scores/s"))
    harness.finish(races, facts, asked)


if __name__ == "__main__":
    main()
