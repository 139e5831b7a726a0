"""Walk features against closed forms and a plain loop; the learned test's null, power and fits."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from remanence.audit.dejavu import dataset_inference
from remanence.audit.dejavu.dataset_inference import blind_walk, min_gd
from remanence.audit.dejavu.learned_test import RIDGE, learned_test
from remanence.audit.dejavu.null_check import null_rejections
from remanence.audit.dejavu.rank_test import mann_whitney
from remanence.errors import InputError

LEVEL = np.log10(0.05)


def network(classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 5 * 5, 30), nn.ReLU(), nn.Linear(30, classes)
    )
    # Sharp enough for walks to change labels.
    return nn.Sequential(layers, nn.BatchNorm1d(classes, affine=False)).eval().double()


def images(n: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, 5, 5, generator=generator, dtype=torch.float64)


# Features


def test_blind_walk_is_the_plain_loop() -> None:
    model, x = network(), images()
    ours = blind_walk(model, x, restarts=3, steps=20, scale=8, seed=3, batch_size=5)
    noise = 8 * dataset_inference._noise(x.shape[1:], 3, 3).double()
    changed = 0
    for i, w in itertools.product(range(len(x)), range(9)):
        label = model(x[i : i + 1]).argmax()
        for k in range(1, 21):
            delta = (x[i] + k * noise[w]).clamp(0, 1) - x[i]
            if model((x[i] + delta)[None]).argmax() != label:
                changed += 1
                break
        norm = (delta.abs().max(), delta.norm(), delta.abs().sum())[w // 3]
        assert ours[i, w] == pytest.approx(norm.item(), rel=1e-9)
    assert 20 < changed < 100


def test_row_depends_on_its_image_alone() -> None:
    model, x = network(), images()
    rows = blind_walk(model, x, scale=5)
    assert rows.shape == (12, 30)
    assert rows.dtype == np.float64
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    assert blind_walk(model, x[order], scale=5, batch_size=7) == pytest.approx(rows[order.numpy()])
    assert blind_walk(model, x[4:5], scale=5) == pytest.approx(rows[4:5])
    assert len(np.unique(rows.round(12), axis=0)) == 12


def test_noise_follows_its_laws() -> None:
    uniform, gaussian, laplace = (
        part.flatten().double() for part in dataset_inference._noise((3, 64, 64), 8, 0).split(8)
    )
    assert 0.00499 < uniform.abs().max() <= 0.005
    assert uniform.std() == pytest.approx(0.005 / 3**0.5, rel=0.01)
    assert gaussian.std() == pytest.approx(0.005, rel=0.01)
    assert laplace.abs().mean() == pytest.approx(0.01, rel=0.01)  # the scale of a Laplace law
    assert laplace.mean().abs() < 2e-4
    assert laplace.std() == pytest.approx(0.01 * 2**0.5, rel=0.01)


def test_only_walks_that_go_on_are_sent_through_the_model() -> None:
    seen = []

    def flips_at_once(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        return torch.stack([batch.mean((1, 2, 3)) == 0.5, batch.mean((1, 2, 3)) != 0.5], 1).double()

    blind_walk(flips_at_once, torch.full((8, 1, 2, 2), 0.5), restarts=2)
    assert sum(seen) == 8 + 8 * 6  # the clean images, and one step of every walk


def test_true_labels_end_walks_of_wrong_images_at_the_first_step() -> None:
    model, x = network(), images()
    wrong = (model(x).argmax(1) + 1) % 4
    rows = blind_walk(model, x, labels=wrong, restarts=2)
    noise = dataset_inference._noise(x.shape[1:], 2, 0).double()
    first = ((x[:, None] + noise).clamp(0, 1) - x[:, None]).flatten(2)
    assert rows[:, :2] == pytest.approx(first[:, :2].abs().amax(2).numpy())
    assert rows[:, 4:] == pytest.approx(first[:, 4:].abs().sum(2).numpy())


class Plane(nn.Module):
    """Two classes on either side of w x = b."""

    def __init__(self, w: Tensor, b: float) -> None:
        super().__init__()
        self.w, self.b = w, b

    def forward(self, x: Tensor) -> Tensor:
        side = x.flatten(1) @ self.w - self.b
        return torch.stack([-side, side], 1)


def test_min_gd_measures_the_distance_to_a_plane() -> None:
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(300, generator=generator, dtype=torch.float64)
    x = 0.4 + 0.2 * torch.rand(6, 3, 10, 10, generator=generator, dtype=torch.float64)
    model = Plane(w, float(w.sum() * 0.5)).eval()
    gap = (x.flatten(1) @ w - model.b).abs().numpy()
    own = model(x).argmax(1).numpy()
    features = min_gd(model, x).reshape(6, 3, 2)
    rows = np.arange(6)
    assert (features[rows, :, own] == 0).all()
    far = features[rows, :, 1 - own]
    # A descent ends within one step behind the plane.
    excess = far[:, 0] - gap / w.abs().sum().item()
    assert ((excess > -1e-12) & (excess <= 0.001)).all()
    excess = far[:, 1] - gap / w.norm().item()
    assert ((excess > -1e-12) & (excess <= 0.01)).all()
    steepest = w.abs().topk(100).values.sum().item()
    excess = far[:, 2] - 100 * gap / steepest
    assert ((excess > -1e-12) & (excess <= 1)).all()


def test_min_gd_rows_depend_on_their_images_and_leave_no_gradients() -> None:
    model, x = network(), images(5)
    rows = min_gd(model, x, steps=15)
    assert rows.shape == (5, 12)
    assert min_gd(model, x.flip(0), steps=15, batch_size=3) == pytest.approx(rows[::-1])
    assert all(p.grad is None for p in model.parameters())
    one_step = min_gd(model, x, steps=1).reshape(5, 3, 4)
    assert one_step[:, 0].max() == pytest.approx(0.001)
    assert one_step[:, 1].max() == pytest.approx(0.01)
    assert one_step[:, 2].max() == pytest.approx(0.75)  # all 75 coordinates, fewer than 100


def test_saturated_pixels_do_not_use_up_the_top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_inference, "TOP_K", 1)
    # The steepest pixel is white already and would have to become whiter.
    model = Plane(torch.tensor([9.0, 1.0]), 9.7).eval()
    features = min_gd(model, torch.tensor([[[[1.0, 0.2]]]])).reshape(3, 2)
    assert features[2, 1] == pytest.approx(0.5, abs=0.011)


def test_unusable_models_and_images_are_named() -> None:
    x = images(3)
    with pytest.raises(InputError, match="training mode"):
        blind_walk(network().train(), x)
    with pytest.raises(InputError, match="undo the normalisation"):
        min_gd(network(), 2 * x)
    with pytest.raises(InputError, match=r"\(N, C, H, W\)"):
        blind_walk(network(), x[0])


# The learned test


def test_learned_test_is_cross_fitted_ridge_regression() -> None:
    rng = np.random.default_rng(0)
    c, r = rng.normal(0.3, 1, (40, 5)), rng.normal(size=(60, 5))
    ours = learned_test(c, r, permutations=1, seed=4)
    x = np.concatenate([c, r])
    x = (x.argsort(0).argsort(0) + 1 - 50.5) / 50
    y = np.repeat([0.6, -0.4], [40, 60])
    fold_of = np.random.default_rng(4).permutation(100) % 5
    statistic, scores = 0.0, np.empty(100)
    for k in range(5):
        held = fold_of == k
        ridge = Ridge(RIDGE * (x**2).sum(), fit_intercept=False).fit(x[~held], y[~held])
        own = ridge.predict(x[held])
        scores[held] = (own - own.mean()) / own.std()
        inside, outside = scores[held & (y > 0)], scores[held & (y < 0)]
        error = np.sqrt(1 / len(inside) + 1 / len(outside))
        statistic += (inside.mean() - outside.mean()) / error / np.sqrt(5)
    assert ours.t == pytest.approx(statistic)
    assert np.concatenate([ours.candidate, ours.reference]) == pytest.approx(scores)


def test_learned_test_keeps_its_level_and_permuting_finished_scores_does_not() -> None:
    features = np.random.default_rng(1).lognormal(size=(3000, 6))
    valid, naive = [], []

    def log10_p(a: np.ndarray, b: np.ndarray) -> float:
        result = learned_test(a, b, permutations=199)
        naive.append(mann_whitney(result.candidate, result.reference).log10_p)
        valid.append(result.log10_p)
        return valid[-1]

    rate = null_rejections(features, log10_p, draws=2000, size=40, seed=2)
    assert 0.035 <= rate.value <= 0.06
    assert 0.004 <= np.mean(np.array(valid) <= -2) <= 0.016
    assert np.mean(np.array(naive) <= LEVEL) > 0.07


def test_learned_test_finds_what_single_features_hide() -> None:
    rng = np.random.default_rng(2)
    common = rng.normal(size=(400, 1))
    features = np.hstack([common + 0.1 * rng.normal(size=(400, 1)), common])
    features[:200, 0] += 0.1
    assert mann_whitney(features[:200, 0], features[200:, 0]).log10_p > LEVEL
    assert learned_test(features[:200], features[200:]).log10_p < -3


def test_rows_of_the_same_images_fool_the_fit_unless_grouped() -> None:
    rng = np.random.default_rng(3)
    naive, grouped = [], []
    ids = (np.repeat(np.arange(30), 4), np.repeat(np.arange(30, 60), 4))
    for seed in range(200):
        a, b = (np.repeat(side, 4, axis=0) for side in rng.normal(size=(2, 30, 8)))
        naive.append(learned_test(a, b, permutations=99, seed=seed).log10_p)
        grouped.append(learned_test(a, b, groups=ids, permutations=99, seed=seed).log10_p)
    assert np.mean(np.array(naive) <= LEVEL) > 0.5
    assert np.mean(np.array(grouped) <= LEVEL) < 0.1


def test_increasing_maps_and_outliers_change_nothing() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(0.2, 1, (50, 3)), rng.normal(size=(50, 3))
    before = learned_test(a, b)
    assert learned_test(np.exp(a), np.exp(b)).t == before.t
    a[a == a.max()] = 1e12
    assert learned_test(a, b).t == pytest.approx(before.t, abs=0.2)


def test_unusable_features_are_named() -> None:
    x = np.random.default_rng(5).normal(size=(30, 3))
    with pytest.raises(InputError, match=r"give a matrix \(N, F\)"):
        learned_test(x[:, 0], x)
    with pytest.raises(InputError, match="reference features hold NaN"):
        learned_test(x, np.where(x > 1, np.nan, x))
    with pytest.raises(InputError, match="3 features and references 2"):
        learned_test(x, x[:, :2])
    with pytest.raises(InputError, match="every feature is constant"):
        learned_test(np.ones((30, 2)), np.ones((30, 2)))
    with pytest.raises(InputError, match="1 folds of 60"):
        learned_test(x, x, folds=1)
