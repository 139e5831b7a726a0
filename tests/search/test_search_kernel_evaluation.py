import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.metrics import average_precision_score, roc_curve
from torch.nn.functional import normalize

from remanence.errors import InputError
from remanence.search.kernel_descriptor import evaluation
from remanence.search.kernel_descriptor.evaluation import (
    fpr95,
    matching_map,
    retrieval_map,
    snn_map,
    verification_ap,
)

POSITIVES = (0.9, 0.8, 0.7, 0.1)
NEGATIVES = (0.6, 0.5, 0.2, 0.05)


def _pairs(positives, negatives):
    similarity = torch.tensor([*positives, *negatives], dtype=torch.float64)
    return similarity, torch.arange(len(similarity)) < len(positives)


def _vectors(count, dim, seed, noise=0.0):
    base = torch.randn(count, dim, generator=torch.Generator().manual_seed(1)).double()
    extra = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)).double()
    return normalize(base + noise * extra, dim=1)


def test_fpr95_by_hand():
    # 95 % of four positives are all four: the threshold is .1, which three negatives reach.
    assert fpr95(*_pairs(POSITIVES, NEGATIVES)) == 0.75
    assert fpr95(*_pairs((3.0, 2.0), (1.0, 0.0))) == 0
    assert fpr95(*_pairs((0.0,), (1.0, 2.0))) == 1


def test_fpr95_asks_for_19_of_20_and_no_more():
    positives = [1.0] * 19 + [-1.0]
    assert fpr95(*_pairs(positives, (0.0, 2.0))) == 0.5
    assert fpr95(*_pairs([*positives, -1.0], (0.0, 2.0))) == 1  # 20 of 21 are wanted


def test_a_negative_at_the_threshold_is_accepted():
    assert fpr95(*_pairs((0.5,), (0.5, 0.4))) == 0.5
    assert fpr95(*_pairs((0.5,) * 5, (0.5,) * 5)) == 1


def test_fpr95_agrees_with_the_roc_curve_of_scikit_learn():
    generator = np.random.default_rng(0)
    for _ in range(50):
        label = generator.random(200) < 0.3
        similarity = np.round(generator.normal(size=200) + label, 1)  # with ties
        fpr, tpr, _ = roc_curve(label, similarity, drop_intermediate=False)
        wanted = fpr[np.argmax(tpr >= 0.95 - 1e-12)]
        found = fpr95(torch.from_numpy(similarity), torch.from_numpy(label))
        assert found == pytest.approx(wanted, abs=1e-12)


def test_average_precision_is_that_of_scikit_learn_with_and_without_ties():
    generator = np.random.default_rng(0)
    for digits in (0, 1, 8):
        for _ in range(20):
            label = generator.random(100) < 0.3
            similarity = np.round(generator.normal(size=100) + label, digits)
            found = verification_ap(torch.from_numpy(similarity), torch.from_numpy(label))
            assert found == pytest.approx(average_precision_score(label, similarity), abs=1e-12)


def test_measures_do_not_depend_on_the_order():
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randn(300, generator=generator).mul(2).round()
    label = torch.rand(300, generator=generator) < 0.4
    order = torch.randperm(300, generator=generator)
    for measure in (fpr95, verification_ap):
        again = measure(similarity[order], label[order])
        assert again == pytest.approx(measure(similarity, label), abs=1e-12)
    first, second = _vectors(60, 4, 2, 0.5), _vectors(60, 4, 3, 0.5)
    first[30:], second[30:] = first[:30], second[:30]  # every answer ties with another one
    order = order[order < 60]
    assert matching_map(first, second) == matching_map(first[order], second[order]) == 0


def test_matching_by_hand():
    # Angles in degrees: query 0 is right and surest, 2 right and less sure, 1 takes the wrong one.
    def at(*degrees):
        angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    first, second = at(0, 50, 100), at(1, 104, 110)
    # Ranked: 0 (1 degree, right), 2 (4 degrees, to 104, wrong), 1 (49 degrees, to 1, wrong).
    assert matching_map(first, second) == pytest.approx(1 / 3)
    first, second = at(0, 95, 120), at(1, 104, 135)
    # 0 (1, right), 1 (9, right), 2 (15, right; 16 to the other)
    assert matching_map(first, second) == pytest.approx(1)
    first, second = at(0, 100, 130), at(3, 132, 149)
    # 2 is 2 degrees from 132, wrong and the surest; then 0 and 1 (32 degrees) are right.
    assert matching_map(first, second) == pytest.approx((1 / 2 + 2 / 3) / 3)
    # By the ratio: 2 (2 / 19), 0 (3 / 132) the surest, then 1 (32 / 49).
    assert matching_map(first, second, by="ratio") == pytest.approx((1 / 1 + 2 / 3) / 3)


@pytest.mark.parametrize("by", ["similarity", "ratio"])
def test_matching_agrees_with_brute_force(by, monkeypatch):
    monkeypatch.setattr(evaluation, "PAIRS", 500)  # several chunks
    first, second = _vectors(150, 8, 2, 0.6).float(), _vectors(150, 8, 3, 0.6).float()
    distance = cdist(first.double(), second.double())
    nearest, ranked = distance.argmin(1), np.sort(distance, axis=1)
    score = -ranked[:, 0] if by == "similarity" else -ranked[:, 0] / ranked[:, 1]
    right = nearest == np.arange(150)
    assert 0.2 < right.mean() < 0.9
    hits, total = 0, 0.0
    for rank, query in enumerate(np.argsort(-score), start=1):
        if right[query]:
            hits += 1
            total += hits / rank
    assert matching_map(first, second, by=by) == pytest.approx(total / 150, abs=1e-12)
    # K = N: the average precision of what was found, times how much was found.
    found = average_precision_score(right, score) * right.mean()
    assert matching_map(first, second, by=by) == pytest.approx(found, abs=1e-12)


def test_retrieval_by_hand_and_brute_force(monkeypatch):
    pool = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    relevant = torch.tensor([[True, False, True, False]])
    assert retrieval_map(torch.tensor([[-1.0]]), pool, relevant) == pytest.approx((1 + 2 / 3) / 2)
    # At equal distance from all, all come at once: precision 1/2 throughout.
    assert retrieval_map(torch.tensor([[0.0]]), torch.ones(4, 1), relevant) == pytest.approx(0.5)

    monkeypatch.setattr(evaluation, "PAIRS", 300)
    queries, pool = _vectors(20, 6, 2, 0.5).float(), _vectors(80, 6, 3, 0.5).float()
    pool[40:] = pool[:40]
    relevant = torch.rand(20, 80, generator=torch.Generator().manual_seed(0)) < 0.1
    relevant[:, 0] = True
    distance = cdist(queries.double(), pool.double())
    wanted = [
        average_precision_score(r, -d) for r, d in zip(relevant.numpy(), distance, strict=True)
    ]
    assert retrieval_map(queries, pool, relevant) == pytest.approx(np.mean(wanted), abs=1e-12)


def test_snn_agrees_with_brute_force():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(90, 5))
    points, images = generator.integers(0, 12, 90), generator.integers(0, 3, 90)
    x += 2.5 * generator.normal(size=(12, 5))[points]
    wanted = []
    for image in range(3):
        here = np.flatnonzero(images == image)
        right, score = [], []
        for i in here:
            others = [np.linalg.norm(x[i] - x[k]) for k in here if points[k] != points[i]]
            for j in here:
                if i != j and points[i] == points[j]:
                    own, other = np.linalg.norm(x[i] - x[j]), min(others)
                    right.append(own <= other)
                    score.append(-min(own, other) / max(own, other))
        wanted.append(average_precision_score(right, score))
    found = snn_map(torch.from_numpy(x), torch.from_numpy(points), torch.from_numpy(images))
    assert found == pytest.approx(np.mean(wanted), abs=1e-12)
    assert 0.3 < found < 0.95


def test_perfect_and_useless_descriptors():
    first = _vectors(50, 16, 2)
    assert matching_map(first, first) == 1
    assert matching_map(first, torch.ones_like(first)) == 0
    assert matching_map(torch.ones_like(first), first) <= 1 / 50 + 1e-12
    points, images = torch.arange(50) // 2, torch.zeros(50, dtype=torch.int64)
    assert snn_map(first[points], points, images) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fpr95(torch.ones(3), torch.ones(3, dtype=torch.bool)), "one kind"),
        (lambda: fpr95(torch.ones(3), torch.ones(4, dtype=torch.bool)), r"\(N,\) twice"),
        (lambda: fpr95(torch.tensor([1.0, torch.nan]), torch.tensor([True, False])), "NaN"),
        (lambda: matching_map(torch.ones(3, 2), torch.ones(4, 2)), "rows match"),
        (lambda: matching_map(torch.ones(3, 2), torch.ones(3, 2), by="rank"), "ranked by"),
        (lambda: matching_map(torch.ones(3, 2), torch.full((3, 2), torch.inf)), "infinity"),
        (
            lambda: retrieval_map(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, 3) > 0),
            "nothing relevant",
        ),
        (lambda: retrieval_map(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, 3)), "bool"),
        (lambda: retrieval_map(torch.ones(1, 2), torch.ones(0, 2), torch.zeros(1, 0)), "pool"),
        (lambda: snn_map(torch.ones(4, 2), torch.arange(4), torch.zeros(4)), "no trial"),
        (lambda: snn_map(torch.ones(4, 2), torch.arange(3), torch.zeros(3)), "images"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
