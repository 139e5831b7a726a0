"""Membership inference on CIFAR-10 and on digits, with its margins, over several seeds. Slow.

Members are told from held-out samples of the same source, and the controls from samples or by
models that had nothing to tell.
"""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, conv2d, normalize

from remanence.audit.membership import (
    MALT,
    MAST,
    LineageWarning,
    LiRA,
    References,
    balanced_design,
    evaluate,
    matt,
    references_from_logits,
    signals_from_logits,
    train_references,
)
from remanence.kit.images import open_images

CIFAR10 = Path(__file__).parents[1] / "../shared/data/cifar10"
LOGISTIC = [(400, 10.0), (2000, 1e4), (4000, 1e4)]  # images a side, C of liblinear
MODELS = 34  # without the target, and one for each sample to leave the counts even: 32
SEEDS = range(3)

pytestmark = pytest.mark.slow
needs_cifar10 = pytest.mark.skipif(not CIFAR10.exists(), reason="needs ../shared/data/cifar10")


def pixels(images, rows):
    stacked = np.stack([np.asarray(images.image(int(row))) for row in rows])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2) / 255


def cifar10(split):
    # Nothing is decoded in advance: few of the images are read.
    return open_images(str(CIFAR10), split=split, cache_bytes=0, show=False)


# Logistic regression, protocol A of arXiv 1908.11229: ship against truck


def patch_features(images, others, draw):
    """Unit vectors (N, 128) and a 1: convolution with random patches of the other classes."""
    rng = np.random.default_rng(draw)
    corners = rng.integers(0, 27, (32, 2))
    filters = torch.stack(
        [o[:, r : r + 6, c : c + 6] for o, (r, c) in zip(others, corners, strict=True)]
    )
    filters = filters - filters.mean((1, 2, 3), keepdim=True)
    filters = normalize(filters.flatten(1)).view_as(filters)
    pooled = [
        adaptive_avg_pool2d((conv2d(chunk, filters) - 1).relu(), 2).flatten(1)
        for chunk in images.split(1000)
    ]
    x = normalize(torch.cat(pooled).double())
    return torch.cat([x, torch.ones(len(x), 1).double()], dim=1)


def logistic_regression(x, y, C):
    fitted = LogisticRegression(C=C, solver="liblinear", fit_intercept=False, tol=1e-4).fit(x, y)
    model = nn.Linear(x.shape[1], 1, bias=False).double().eval()
    model.weight.data = torch.from_numpy(fitted.coef_.copy())
    return model


def auc(members, others):
    scores = np.concatenate([members, others])
    return evaluate(scores, np.arange(len(scores)) < len(members)).auc.value


def audit(x, y, n, C, seed):
    """AUC of MALT, of MATT, and of MATT between two held-out sets where images are left."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    member, held, public, more = order.split([n, n, n, len(order) - 3 * n])
    model = logistic_regression(x[member], y[member], C)
    reference = logistic_regression(x[public], y[public], C).state_dict()

    def malt(rows):
        return MALT().score(signals_from_logits(model(x[rows]), y[rows]))

    def taylor(rows):
        return matt(model, reference, [(x[rows], y[rows])])

    with warnings.catch_warnings():  # the reference may lie far off: the model is convex
        warnings.simplefilter("ignore", LineageWarning)
        control = auc(taylor(held), taylor(more[:n])) if len(more) else np.nan
        return auc(malt(member), malt(held)), auc(taylor(member), taylor(held)), control


@pytest.fixture(scope="module")
def logistic():
    """What `audit` found, by row of the table, each (3, seeds)."""
    sources = [cifar10("train"), cifar10("test")]
    chosen = [np.flatnonzero(source.labels >= 8) for source in sources]
    images = torch.cat([pixels(s, rows) for s, rows in zip(sources, chosen, strict=True)])
    labels = [s.labels[rows] == 9 for s, rows in zip(sources, chosen, strict=True)]
    y = torch.from_numpy(np.concatenate(labels)).long()
    mean, std = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    eight_classes = np.flatnonzero(sources[0].labels < 8)
    found = {row: [] for row in LOGISTIC}
    for draw in range(3):
        others = np.random.default_rng(draw).choice(eight_classes, 32, replace=False)
        others = (pixels(sources[0], others) - mean) / std
        x = patch_features((images - mean) / std, others, draw)
        for (n, C), rows in found.items():
            rows += [audit(x, y, n, C, [draw, seed]) for seed in range(8)]
    return {row: np.array(values).T for row, values in found.items()}


@needs_cifar10
@pytest.mark.parametrize("row", LOGISTIC)
def test_the_gradient_beats_one_threshold_on_logistic_regression(logistic, row):
    malt, taylor, _ = logistic[row]
    assert taylor.mean() - malt.mean() >= 0.012


@needs_cifar10
def test_the_gradient_finds_less_the_more_images_are_trained_on(logistic):
    found = [logistic[row][1].mean() for row in LOGISTIC]
    assert found == sorted(found, reverse=True)


@needs_cifar10
@pytest.mark.parametrize("row", LOGISTIC[:2])
def test_the_gradient_tells_nothing_of_two_held_out_sets(logistic, row):
    control = logistic[row][2]
    # The standard error of 24 seeds is 0.0035 with 400 images a side.
    assert control.mean() == pytest.approx(0.5, abs=0.015)


# Perceptrons: each of 34 models is the target once, with 32 references for every sample


def perceptron(inputs):
    return nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 10))


def trained(x, y, design, epochs, seed):
    return train_references(
        lambda: perceptron(x.shape[1]),
        x,
        y,
        design,
        epochs=epochs,
        batch_size=64,
        lr=0.1,
        schedule="constant",
        seed=seed,
    )


def few(references, n):
    """Only n references of every sample, all of them trained without it."""
    rows = np.argsort(references.member, axis=0, kind="stable")[:n]
    columns = np.arange(references.member.shape[1])
    parts = (references.loss, references.margin, references.conf, references.member)
    return References(*(part[rows, columns] for part in parts))


def two_sided(target, references):
    """Offline LiRA as first released: how unlikely the margin is among the OUT, on either side."""
    out = ~references.member[..., None]
    margin = np.where(out, references.margin, np.nan)
    mean = np.nanmean(margin, axis=0)
    deviation = np.sqrt(np.nansum((margin - mean) ** 2) / (out.sum() - len(mean)))
    return -stats.norm.logpdf(target.margin, mean, deviation)[:, 0]


@pytest.fixture(scope="module")
def cifar_perceptrons():
    """AUC of MALT and MAST for every target, by name and number of references, (seeds, K)."""
    source = cifar10("train")
    found = {name: [] for name in ("malt", "mean 1", "mean 2", "lse 32")}
    for seed in SEEDS:
        rows = np.random.default_rng(seed).choice(len(source), 2000, replace=False)
        x = avg_pool2d(pixels(source, rows), 4).flatten(1)
        x, y = (x - x.mean()) / x.std(), torch.from_numpy(source.labels[rows])
        design = balanced_design(MODELS, len(x), seed)
        pool = trained(x, y, design, 40, seed)
        answers = references_from_logits(pool.logits(x), y, design)
        for k in range(MODELS):
            target, references, member = answers.leave_out(k)
            scores = {
                "malt": MALT().score(target),
                "mean 1": MAST(tau="out").score(target, few(references, 1)),
                "mean 2": MAST(tau="out").score(target, few(references, 2)),
                "lse 32": MAST().score(target, references),
            }
            for name, score in scores.items():
                found[name].append(evaluate(score, member).auc.value)
    return {name: np.reshape(values, (-1, MODELS)) for name, values in found.items()}


@needs_cifar10
@pytest.mark.parametrize("count", [1, 2])
def test_the_mean_loss_of_few_references_loses_to_one_threshold(cifar_perceptrons, count):
    gain = cifar_perceptrons[f"mean {count}"] - cifar_perceptrons["malt"]
    assert (gain.mean(axis=1) <= -0.03).all()


@needs_cifar10
def test_the_free_energy_of_32_references_beats_one_threshold(cifar_perceptrons):
    gain = cifar_perceptrons["lse 32"] - cifar_perceptrons["malt"]
    assert (gain.mean(axis=1) >= 0.01).all()


def digit_scores(target, references):
    return {
        "malt": MALT().score(target),
        "base": MAST().score(target, references),
        "one-sided": LiRA(online=False, variance="fixed").score(target, references),
        "two-sided": two_sided(target, references),
    }


@pytest.fixture(scope="module")
def digits():
    """AUC and TPR at 1 % FPR for every target, by attack, (seeds, K), and AUC of the controls.

    `unseen`: digits that no model saw, half of them called members. `stranger`: the same members
    and references, but the target never saw either side.
    """
    parts = {name: {} for name in ("auc", "tpr", "unseen", "stranger")}
    pixel_rows, classes = load_digits(return_X_y=True)
    for seed in SEEDS:
        order = np.random.default_rng(seed).permutation(len(classes))
        x = torch.tensor(pixel_rows[order] / 16, dtype=torch.float32)
        y = torch.from_numpy(classes[order])
        n, n_rest = 1200, len(x) - 1201  # an even number of digits to call members
        design, called = (balanced_design(MODELS, size, seed) for size in (n, n_rest))
        logits = trained(x[:n], y[:n], design, 60, seed).logits(x)
        answers = references_from_logits(logits[:, :n], y[:n], design)
        unseen = references_from_logits(logits[:, n:][:, :n_rest], y[n:][:n_rest], called)
        stranger = trained(x[n:], y[n:], np.ones((1, n_rest + 1), dtype=bool), 60, seed)
        stranger = signals_from_logits(stranger.logits(x[:n])[0], y[:n])

        def note(part, scores, member):
            for name, score in scores.items():
                roc = evaluate(score, member, fprs=(0.01,))
                parts[part].setdefault(name, []).append(roc.auc.value)
                if part == "auc":
                    parts["tpr"].setdefault(name, []).append(roc.tpr_at[0].value)

        for k in range(MODELS):
            target, references, member = answers.leave_out(k)
            note("auc", digit_scores(target, references), member)
            note("stranger", digit_scores(stranger, references), member)
            target, references, member = unseen.leave_out(k)
            note("unseen", digit_scores(target, references), member)
    return {
        part: {name: np.reshape(values, (-1, MODELS)) for name, values in rows.items()}
        for part, rows in parts.items()
    }


def test_a_threshold_for_each_digit_beats_one_for_all(digits):
    gain = digits["auc"]["base"] - digits["auc"]["malt"]
    assert (gain.mean(axis=1) >= 0.05).all()


def test_a_threshold_for_each_digit_finds_four_times_the_members_at_one_percent(digits):
    base, malt = (digits["tpr"][name].mean(axis=1) for name in ("base", "malt"))
    assert (base >= 4 * malt).all()


def test_offline_lira_is_better_on_one_side_than_on_two(digits):
    gain = digits["auc"]["one-sided"] - digits["auc"]["two-sided"]
    assert (gain.mean(axis=1) >= 0.04).all()


@pytest.mark.parametrize("attack", ["malt", "base", "one-sided", "two-sided"])
@pytest.mark.parametrize(
    ("control", "margin"),
    [
        # The standard error of 3 x 34 audits of 300 digits a side is 0.0024.
        ("unseen", 0.01),
        # Every digit is called a member by half of the audits, of the same answers: their mean is
        # far closer. Uneven counts of references, which alone tell a member, give 0.0024.
        ("stranger", 0.0015),
    ],
)
def test_where_there_is_nothing_to_tell_the_attacks_are_at_chance(digits, control, margin, attack):
    assert digits[control][attack].mean() == pytest.approx(0.5, abs=margin)
