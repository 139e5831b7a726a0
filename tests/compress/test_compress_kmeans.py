"""k-means in a metric against brute force, closed forms and independent implementations."""

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans as Peer
from torch import Tensor

from remanence.compress.quantizer.float16 import round_to_float16
from remanence.compress.quantizer.kmeans import KMeans, kmeans, metric_factor, nearest
from remanence.errors import InputError


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gram(d: int, seed: int = 99, rows: int = 40) -> Tensor:
    x = drawn(rows, d, seed)
    return x.T @ x


def distances(points: Tensor, centroids: Tensor, metric: Tensor | None = None) -> Tensor:
    gaps = points.double()[:, None] - centroids.double()[None]
    metric = torch.eye(points.shape[1]) if metric is None else metric
    return torch.einsum("nki,ij,nkj->nk", gaps, metric.double(), gaps)


def check(found: KMeans, points: Tensor, metric: Tensor | None = None, tol: float = 1e-9) -> None:
    """The result is what its fields say, by brute force."""
    table = distances(points, found.centroids, metric)
    mine = table.gather(1, found.codes[:, None])[:, 0]
    scale = table.mean().item() + 1e-300
    assert (mine - table.min(1).values).max().item() <= tol * scale
    assert mine.sum().item() == pytest.approx(found.objective[-1], rel=1e-5, abs=tol * scale)
    assert found.centroids.isfinite().all()
    assert all(a > b for a, b in zip(found.objective, found.objective[1:], strict=False))


# --- oracle 9(a) 1: the assignment


@pytest.mark.parametrize("d", [4, 8, 9, 18])
def test_assignment_is_the_argmin_of_the_output_error_on_inputs(d: int) -> None:
    for seed in range(100):
        x, w, c = drawn(23, d, seed), drawn(40, d, seed + 500), drawn(16, d, seed + 900)
        output_errors = (x[None] @ (w.T[None] - c[:, :, None])).norm(dim=1)  # (K, n)
        assert torch.equal(nearest(w, c, metric=x.T @ x), output_errors.argmin(0))


@pytest.mark.parametrize("metric", [None, gram(9)])
def test_a_common_offset_does_not_drown_the_differences_in_float32(metric: Tensor | None) -> None:
    points = 5 + 1e-2 * drawn(2000, 9, dtype=torch.float32)
    centroids = points[:64] + 1e-3
    brute = distances(points, centroids, metric)
    codes = nearest(points, centroids, metric=metric)
    assert (codes == brute.argmin(1)).float().mean().item() > 0.999
    mine = brute.gather(1, codes[:, None])[:, 0]
    assert (mine / brute.min(1).values.clamp(min=1e-12) - 1).max().item() < 1e-3


@pytest.mark.parametrize("setting", ["legacy", "cuda"])
def test_reduced_precision_settings_do_not_reach_the_products(setting: str) -> None:
    program = f"""
import torch
from remanence.compress.quantizer.kmeans import (
    nearest,
)
from remanence.modes import exact_products
points, centroids = torch.randn(3000, 9), torch.randn(256, 9)
expected = nearest(points, centroids)
if {setting!r} == "legacy":
    torch.set_float32_matmul_precision("medium")
else:
    torch.backends.{setting if setting != "legacy" else "cuda"}.matmul.fp32_precision = "tf32"
backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
before = [backend.fp32_precision for backend in backends]
with torch.autocast("cpu", dtype=torch.bfloat16):
    assert torch.equal(nearest(points, centroids), expected)
with exact_products():
    assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
assert [backend.fp32_precision for backend in backends] == before
if {setting!r} == "legacy":
    assert torch.get_float32_matmul_precision() == "medium"
"""
    subprocess.run([sys.executable, "-c", program], check=True)  # global settings stay there


def test_of_equal_centroids_the_first_wins_also_over_many_tiles() -> None:
    centroids = drawn(300, 3).float()
    doubled = torch.cat([centroids, centroids.flip(0), centroids])
    points = drawn(5001, 3, 1).float()
    assert torch.equal(nearest(points, doubled), nearest(points, centroids))
    assert torch.equal(nearest(centroids, doubled), torch.arange(300))


def test_large_codebooks_and_single_points() -> None:
    centroids = drawn(65_536, 2).float()
    assert nearest(centroids[40_000:40_001], centroids).tolist() == [40_000]


# --- oracle 2: the update


@pytest.mark.parametrize("rows", [40, 5])
def test_the_mean_solves_the_least_squares_problem_of_the_update(rows: int) -> None:
    x, w = drawn(rows, 9, 1), drawn(30, 9, 2)
    stacked = x.repeat(len(w), 1)
    best = torch.linalg.lstsq(stacked, (w @ x.T).reshape(-1, 1), driver="gelsd").solution[:, 0]
    found = kmeans(w, 1, metric=x.T @ x)
    errors = [((w - c) @ x.T).square().sum().item() for c in (best, found.centroids[0])]
    assert errors[1] == pytest.approx(errors[0], rel=1e-10)
    assert found.objective[-1] == pytest.approx(errors[0], rel=1e-9)
    assert torch.allclose(found.centroids[0], w.mean(0), atol=1e-12)
    assert torch.allclose(found.centroids[0], best, atol=1e-9) == (rows > 9)


def test_weights_count_like_repeated_points() -> None:
    points, times = drawn(200, 4), torch.randint(0, 4, (200,))
    start = drawn(8, 4, 3)
    weighted = kmeans(points, 8, weights=times, init=start, tolerance=0, iterations=50)
    repeated = kmeans(points.repeat_interleave(times, 0), 8, init=start, tolerance=0, iterations=50)
    assert torch.allclose(weighted.centroids, repeated.centroids, atol=1e-12)
    assert weighted.objective[-1] == pytest.approx(repeated.objective[-1], rel=1e-9)
    assert torch.equal(weighted.codes.repeat_interleave(times), repeated.codes)


# --- oracle 3: the objective never rises


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 120),
    k=st.integers(1, 40),
    d=st.integers(1, 5),
    levels=st.sampled_from([2, 5, 0]),
    rank=st.sampled_from([0, 2, 40]),
    init=st.sampled_from(["kmeans++", "random", "far"]),
    weighted=st.booleans(),
    double=st.booleans(),
)
def test_objective_falls_and_the_result_is_consistent(
    seed: int,
    n: int,
    k: int,
    d: int,
    levels: int,
    rank: int,
    init: str,
    weighted: bool,
    double: bool,
) -> None:
    points = drawn(n, d, seed)
    points = (points * levels).round() if levels else points
    points = points if double else points.float()
    metric = gram(d, seed, rank) if rank else None
    start = drawn(1, d, seed + 1).expand(k, d) + 50 if init == "far" else init
    weights = torch.rand(n) + 0.1 if weighted else None
    found = kmeans(points, k, metric=metric, weights=weights, init=start, seed=seed, tolerance=0)
    if weighted:
        assert all(a > b for a, b in zip(found.objective, found.objective[1:], strict=False))
    else:
        check(found, points, metric, tol=1e-9 if double else 1e-4)
    if len(points.unique(dim=0)) <= k:
        assert found.objective == (0.0,)
        assert torch.equal(found.centroids[found.codes], points)


def test_one_centroid_a_point_and_one_for_all() -> None:
    points = drawn(64, 4)
    assert kmeans(points, 64).objective[-1] == 0
    assert torch.allclose(kmeans(points, 1).centroids[0], points.mean(0))


# --- oracle 4: independent implementations


@pytest.mark.parametrize("metric", [None, gram(9)])
def test_inertia_equals_that_of_scikit_learn_from_the_same_start(metric: Tensor | None) -> None:
    points = drawn(3000, 9)
    start = points[:32].clone()
    factor = torch.eye(9).double() if metric is None else torch.linalg.cholesky(metric)
    peer = Peer(32, init=(start @ factor).numpy(), n_init=1, max_iter=300, tol=0)
    peer.fit((points @ factor).numpy())
    found = kmeans(points, 32, metric=metric, init=start, iterations=300, tolerance=0)
    assert found.objective[-1] == pytest.approx(peer.inertia_, rel=1e-6)
    assert np.array_equal(found.codes.numpy(), peer.labels_)


def test_assignments_equal_those_of_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    points, centroids = drawn(5000, 9).float(), drawn(256, 9, 1).float()
    index = faiss.IndexFlatL2(9)
    index.add(centroids.numpy())
    theirs = index.search(points.numpy(), 1)[1][:, 0]
    assert np.array_equal(nearest(points, centroids).numpy(), theirs)


# --- oracles 5 and 16: symmetries


def test_a_change_of_basis_changes_only_the_basis() -> None:
    points, metric, basis = drawn(500, 6), gram(6), drawn(6, 6, 7)
    inverse = torch.linalg.inv(basis)
    here = kmeans(points, 16, metric=metric, init=points[:16], tolerance=0)
    there = kmeans(
        points @ basis.T,
        16,
        metric=inverse.T @ metric @ inverse,
        init=points[:16] @ basis.T,
        tolerance=0,
    )
    assert torch.equal(here.codes, there.codes)
    assert torch.allclose(here.centroids @ basis.T, there.centroids, atol=1e-9)
    plain = kmeans(points, 16, init=points[:16], tolerance=0)
    assert not torch.equal(plain.codes, here.codes)  # the metric matters at all


@pytest.mark.parametrize("power", [-60, -20, -1, 1, 20, 60])
def test_scaling_the_points_scales_the_centroids(power: int) -> None:
    points = drawn(800, 9, dtype=torch.float32)
    here, there = kmeans(points, 32), kmeans(points * 2.0**power, 32)
    assert torch.equal(here.codes, there.codes)
    assert torch.equal(here.centroids * 2.0**power, there.centroids)
    assert there.objective[-1] == pytest.approx(here.objective[-1] * 4.0**power, rel=1e-12)


@pytest.mark.parametrize("power", range(-20, 21))
def test_float16_codewords_keep_their_codes_at_any_scale(power: int) -> None:
    points = drawn(500, 4, dtype=torch.float32)
    codebook = kmeans(points, 16).centroids
    here = nearest(points, round_to_float16(codebook)[0])
    rounded, exponent = round_to_float16(codebook * 2.0**power)
    assert torch.equal(nearest(points * 2.0**power, rounded), here)
    stored = (rounded * 2.0**-exponent).half()
    assert stored.isfinite().all()
    assert torch.equal(stored.float() * 2.0**exponent, rounded)
    assert ((rounded - codebook * 2.0**power).norm() / rounded.norm()).item() < 2**-11


def test_float16_leaves_ordinary_codebooks_alone_and_rescues_the_rest() -> None:
    ordinary = torch.tensor([[65_519.0, 1.0], [2.0**-8, 1e-9]])
    rounded, exponent = round_to_float16(ordinary)
    assert exponent == 0
    assert torch.equal(rounded, ordinary.half().float())
    for values in ([65_520.0, 1.0], [1e30, -2e30], [3e-8, 1e-8], [-1e-30, 0.0]):
        rounded, exponent = round_to_float16(torch.tensor([values]))
        assert exponent != 0
        assert torch.allclose(rounded, torch.tensor([values]), rtol=2**-10, atol=0)
    assert round_to_float16(torch.zeros(2, 2)) == (pytest.approx(torch.zeros(2, 2)), 0)
    with pytest.raises(InputError, match="codebook"):
        round_to_float16(torch.tensor([[float("nan")]]))


# --- oracle 11: what is already quantised stays as it is


@pytest.mark.parametrize("init", ["kmeans++", "random"])
@pytest.mark.parametrize("spare", [0, 100])
def test_points_that_are_codewords_already_come_back_exactly(init: str, spare: int) -> None:
    codebook = drawn(64, 9).half().float()
    codebook[0] = 0
    points = codebook[torch.randint(64, (5000,))]
    found = kmeans(points, 64 + spare, metric=gram(9), init=init)  # type: ignore[arg-type]
    rounded, exponent = round_to_float16(found.centroids)
    assert exponent == 0
    assert torch.equal(rounded[found.codes], points)
    assert found.objective[-1] == 0
    assert torch.equal(nearest(points, rounded, metric=gram(9)), found.codes)


# --- trap T10: empty clusters


@pytest.mark.parametrize(
    "points",
    [
        torch.full((300, 4), 0.25),
        torch.cat([torch.zeros(2700, 4), drawn(300, 4, dtype=torch.float32)]),
        drawn(5, 4, dtype=torch.float32),
        torch.cat([torch.zeros(999, 4), torch.ones(1, 4)]),
    ],
    ids=["constant", "90 % zeros", "fewer points than centroids", "one that differs"],
)
@pytest.mark.parametrize("init", ["kmeans++", "random", torch.zeros(32, 4)], ids=str)
def test_degenerate_points(points: Tensor, init: str | Tensor) -> None:
    found = kmeans(points, 32, init=init, iterations=30)  # type: ignore[arg-type]
    check(found, points, tol=1e-5)
    used = min(32, len(points.unique(dim=0)))
    assert len(found.codes.unique()) == used


def test_empty_clusters_take_the_points_with_the_largest_errors() -> None:
    points = torch.cat([0.01 * drawn(1000, 2), 100 + drawn(1, 2), -100 + drawn(1, 2)])
    found = kmeans(points, 3, init=torch.zeros(3, 2).double(), iterations=1)
    assert len(found.codes.unique()) == 3
    assert found.codes[-2] != found.codes[-1]
    assert found.objective[-1] < 1e-3 * found.objective[0]


def test_a_cluster_without_weight_keeps_a_finite_centroid() -> None:
    points = torch.cat([drawn(50, 2), 100 + drawn(50, 2)])
    weights = torch.cat([torch.ones(50), torch.zeros(50)])
    found = kmeans(points, 4, weights=weights, init=torch.cat([points[:3], points[-1:]]))
    assert found.centroids.isfinite().all()
    assert np.isfinite(found.objective).all()


# --- the rest


def test_the_same_seed_gives_the_same_bytes_for_any_number_of_threads() -> None:
    points, metric = drawn(20_003, 9, dtype=torch.float32), gram(9)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(kmeans(points, 128, metric=metric, iterations=3, tolerance=0))
    for other in results[1:]:
        assert torch.equal(results[0].codes, other.codes)
        assert torch.equal(results[0].centroids, other.centroids)
        assert results[0].objective == other.objective
    other = kmeans(points, 128, metric=metric, iterations=3, tolerance=0, seed=1)
    assert not torch.equal(results[0].codes, other.codes)


def test_stopping_restarts_and_annealing() -> None:
    points = drawn(10_000, 4, dtype=torch.float32)
    long = kmeans(points, 64, iterations=300, tolerance=0)
    short = kmeans(points, 64, iterations=300, tolerance=1e-3)
    assert short.iterations < long.iterations < 300
    assert long.objective[-1] < short.objective[-1] < 1.05 * long.objective[-1]
    assert len(long.objective) == long.iterations + 1
    best = kmeans(points, 64, restarts=4)
    assert best.objective[-1] < kmeans(points, 64).objective[-1]
    annealed = kmeans(points, 64, anneal=True)
    check(annealed, points, tol=1e-5)
    assert annealed.objective[-1] < 1.01 * kmeans(points, 64).objective[-1]


def test_kmeans_plus_plus_starts_better_than_random_points() -> None:
    centres = 30 * drawn(40, 4)
    points = centres[torch.arange(4000) % 40] + 0.1 * drawn(4000, 4, 5)
    start = {
        init: np.mean([kmeans(points, 40, init=init, seed=s).objective[0] for s in range(4)])
        for init in ("kmeans++", "random")
    }
    assert start["kmeans++"] < 0.5 * start["random"]


def test_metric_factor_of_regular_and_singular_metrics() -> None:
    for rows in (40, 3):
        factor = metric_factor(gram(6, rows=rows))
        assert torch.allclose(factor @ factor.T, gram(6, rows=rows), atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": torch.zeros(4)}, "a row each"),
        ({"points": torch.full((4, 2), float("nan"))}, "NaN"),
        ({"k": 0}, "at least 1"),
        ({"metric": torch.eye(3)}, "metric"),
        ({"metric": torch.zeros(2, 2)}, "metric is zero"),
        ({"metric": torch.full((2, 2), float("inf"))}, "metric holds"),
        ({"weights": torch.ones(3)}, "weights"),
        ({"weights": -torch.ones(9)}, "weights"),
        ({"weights": torch.zeros(9)}, "weights"),
        ({"init": torch.zeros(3, 2)}, "init"),
        ({"init": "other"}, "init"),
        ({"init": torch.full((2, 2), float("nan"))}, "init"),
        ({"iterations": 0}, "iterations"),
        ({"restarts": 0}, "restarts"),
        ({"tolerance": -1.0}, "tolerance"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"points": drawn(9, 2), "k": 2} | change
    with pytest.raises(InputError, match=message) as caught:
        kmeans(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("centroids", [drawn(4, 2), torch.full((4, 3), float("nan"))])
def test_nearest_refuses_centroids_that_do_not_fit(centroids: Tensor) -> None:
    with pytest.raises(InputError, match="centroids"):
        nearest(drawn(4, 3), centroids)
