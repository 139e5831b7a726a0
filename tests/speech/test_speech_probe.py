import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from remanence.errors import InputError
from remanence.speech.probe.accuracy import accuracy
from remanence.speech.probe.bootstrap import ratio_interval
from remanence.speech.probe.closed_form import RidgeSums, logistic_probe, ridge_probe
from remanence.speech.probe.linear import LinearClassifier, moments, train_linear, vote, windows
from remanence.speech.probe.splits import by_minutes, hold_out, per_class

CLASSES, DIM = 3, 5


def clouds(n=300, spread=1.0, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    y = rng.integers(CLASSES, size=n)
    centres = np.random.default_rng(9).normal(size=(CLASSES, DIM)) * 2
    x = centres[y] + rng.normal(size=(n, DIM)) * spread * np.array([1, 1, 1, 5, 0.1]) + offset
    return torch.from_numpy(x.astype("f4")), torch.from_numpy(y)


def sums_of(x, y, parts=1):
    sums = RidgeSums.empty(x.shape[1], CLASSES)
    for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
        sums.add(a, b)
    return sums


def direct(x, y, ridge):
    """Ridge regression by scikit-learn on standardised features."""
    z = (x.double().numpy() - x.double().numpy().mean(0)) / x.double().numpy().std(0)
    fit = Ridge(alpha=ridge * len(x)).fit(z, np.eye(CLASSES)[y.numpy()])
    return fit.predict(z)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_ridge_of_streamed_sums_equals_scikit_learn(offset):
    x, y = clouds(offset=offset)
    for parts in (1, 7):
        fit = sums_of(x, y, parts).solve([0.01])[0]
        np.testing.assert_allclose(fit.scores(x.double()), direct(x, y, 0.01), atol=1e-6)


def test_ridge_merge_equals_one_pass_and_unlabelled_frames_do_not_count():
    x, y = clouds()
    first, second = sums_of(x[:100], y[:100]), sums_of(x[100:], y[100:])
    first.merge(second)
    whole = sums_of(x, y)
    torch.testing.assert_close(first.scatter, whole.scatter)
    whole.add(torch.full((4, DIM), 99.0), torch.full((4,), -1))
    torch.testing.assert_close(first.means, whole.means)
    assert int(whole.count) == len(x)


def test_ridge_held_out_error_equals_the_error_taken_frame_by_frame():
    x, y = clouds()
    fit = sums_of(x, y).solve([0.3])[0]
    a, b = clouds(seed=1)
    by_hand = (torch.eye(CLASSES)[b] - fit.scores(a)).square().sum(1).mean()
    assert sums_of(a, b).squared_error(fit) == pytest.approx(float(by_hand), rel=1e-9)


def test_ridge_is_chosen_by_folds():
    # Fewer frames than dimensions and labels of noise: the largest ridge errs least.
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 40, generator=generator), torch.arange(60) % CLASSES
    folds = [RidgeSums.empty(40, CLASSES) for _ in range(3)]
    for i, fold in enumerate(folds):
        fold.add(x[i * 20 : i * 20 + 20], y[i * 20 : i * 20 + 20])
    assert ridge_probe(folds, (1e-6, 1e-2, 10.0))[1] == 10.0
    x, y = clouds(spread=0.1)
    folds = [sums_of(a, b) for a, b in zip(x.chunk(3), y.chunk(3), strict=True)]
    classifier, ridge = ridge_probe(folds, (1e-6, 1e-2, 10.0))
    assert ridge == 1e-6
    assert (classifier.predict(x) == y).all()


def test_a_constant_dimension_is_left_out():
    x, y = clouds()
    x = torch.cat([x, torch.full((len(x), 1), 7.25)], 1)
    sums = RidgeSums.empty(DIM + 1, CLASSES)
    sums.add(x, y)
    fit = sums.solve([0.01])[0]
    assert (fit.weight[:, -1] == 0).all()
    np.testing.assert_allclose(fit.scores(x.double()), direct(x[:, :-1], y, 0.01), atol=1e-6)


def test_logistic_equals_scikit_learn():
    x, y = clouds()
    fit, reached = logistic_probe([x[:90], x[90:]], [y[:90], y[90:]], CLASSES)
    z = (x.numpy() - x.double().numpy().mean(0)) / x.double().numpy().std(0)
    theirs = LogisticRegression(tol=1e-8, max_iter=1000).fit(z, y.numpy())
    ours = fit.scores(x.double()).softmax(1)
    assert reached
    np.testing.assert_allclose(ours, theirs.predict_proba(z), atol=2e-4)


def test_moments_of_parts():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 1000
    mean, spread = moments(x.split(7))
    torch.testing.assert_close(mean, x.double().mean(0))
    torch.testing.assert_close(spread, x.double().std(0, correction=0))


def test_windows():
    x = torch.arange(10.0).unsqueeze(1)
    assert [w.flatten().tolist() for w in windows(x, "frames", 4)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9],
    ]  # fmt: skip
    assert [w.item() for w in windows(x, "last", 4)] == [3, 7]
    assert [w.item() for w in windows(x, "mean", 4)] == [1.5, 5.5]
    assert [w.item() for w in windows(x[:3], "last", 4)] == [2]
    wide = torch.cat([x, -x], 1)
    (segments,) = windows(wide, "segments", 4)
    means = [0.5, 2.5, 4.5, 6.5, 8.5]
    assert segments.tolist() == [[value for mean in means for value in (mean, -mean)]]
    assert windows(wide[:2], "segments")[0].shape == (1, 10)
    with pytest.raises(InputError, match="pool 'first' is unknown"):
        windows(x, "first")


@pytest.mark.parametrize("standardise", [True, False])
def test_linear_by_adam_learns_and_repeats(standardise):
    x, y = clouds(n=600, offset=1.0)
    y[5] = -1
    parts = list(x.split(20)), list(y.split(20))
    train = [
        train_linear(*parts, CLASSES, epochs=40, lr=1e-2, standardise=standardise) for _ in range(2)
    ]
    assert torch.equal(train[0][0].weight, train[1][0].weight)
    losses = train[0][1]
    assert losses[-1] < 0.5 * losses[0]
    best = LogisticRegression(max_iter=2000).fit(x, y.clamp(min=0)).score(x, y)
    assert (train[0][0].predict(x) == y).double().mean() > best - 0.03


def test_linear_sees_windows_in_a_drawn_order():
    # Features that tell nothing, all of class 0 before all of class 1: the last class seen, were
    # they not shuffled, would be the answer.
    x, y = [torch.ones(4, 2)] * 80, [torch.full((4,), int(i >= 40)) for i in range(80)]
    for seed in range(3):
        fit = train_linear(x, y, 2, batch=1, epochs=1, lr=0.05, standardise=False, seed=seed)[0]
        assert 0.1 < fit.scores(x[0]).softmax(1)[0, 1] < 0.9


def test_linear_takes_one_step_of_the_papers_adam():
    # One step of Adam moves each entry by lr * g / (|g| + eps): by lr, whatever the gradient.
    x, y = clouds(n=64)
    before = train_linear([x], [y], CLASSES, epochs=1, lr=1e-30, standardise=False)[0]
    after = train_linear([x], [y], CLASSES, epochs=1, standardise=False)[0]
    moved = (after.weight - before.weight).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 2e-4), rtol=1e-2, atol=0)


def test_accuracy_is_exact_however_it_is_batched():
    # The official probes divide the sum over N batches by N - 1: 3 batches, all right, gave 1.5.
    labels = [torch.tensor([0, 1]), torch.tensor([2, 2]), torch.tensor([1, 0])]
    assert accuracy(labels, labels, 3).accuracy == 1.0
    wrong = [labels[0], labels[1], torch.tensor([2, 2])]
    found = accuracy(wrong, labels, 3)
    assert found.accuracy == 4 / 6
    assert found.confusion.tolist() == [[1, 0, 1], [0, 1, 1], [0, 0, 2]]
    assert found.balanced == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert found.right.tolist() == [2, 2, 0]


def test_accuracy_of_unequal_utterances_is_pooled_and_chance_is_the_best_constant_answer():
    labels = [torch.tensor([0]), torch.tensor([1, 1, 1, -1])]
    found = accuracy([torch.tensor([0]), torch.tensor([0, 0, 0, 0])], labels, 2)
    assert (found.accuracy, found.chance) == (0.25, 0.75)
    assert found.counts.tolist() == [1, 3]


def test_interval_covers_and_groups_widen_it():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(60):
        right = rng.random(80) < 0.7
        low, high = ratio_interval(right, np.ones(80), seed=seed, draws=300)
        hits += low <= 0.7 <= high
    assert 50 <= hits <= 60
    right = np.repeat(rng.random(10) < 0.5, 8)
    own = ratio_interval(right, np.ones(80))
    grouped = ratio_interval(right, np.ones(80), np.repeat(np.arange(10), 8).tolist())
    assert grouped[1] - grouped[0] > 1.8 * (own[1] - own[0])
    assert np.isnan(ratio_interval([1], [1])).all()


NAMES = [f"{speaker}/{i}" for speaker in "abcd" for i in range(10)]
SPEAKER = {name: name[0] for name in NAMES}


def test_hold_out_divides_utterances_or_speakers():
    train, test = hold_out(NAMES, 0.25, seed=1)
    assert (len(test), set(train) | set(test), set(train) & set(test)) == (10, set(NAMES), set())
    assert hold_out(NAMES[::-1], 0.25, seed=1) == (train, test)
    train, test = hold_out(NAMES, 0.25, groups=SPEAKER, seed=1)
    assert len({SPEAKER[n] for n in test}) == 1
    assert not {SPEAKER[n] for n in test} & {SPEAKER[n] for n in train}
    with pytest.raises(InputError, match="1 speakers"):
        hold_out(NAMES[:5], 0.25, groups=SPEAKER)


def test_few_labels_are_nested_and_enough():
    rng = np.random.default_rng(0)
    classes = {name: rng.choice(12, size=3).tolist() for name in NAMES}
    before = set()
    for k in (1, 2, 4, 8):
        chosen = set(per_class(classes, k, seed=3))
        assert before <= chosen
        for c in range(12):
            there = sum(c in own for own in classes.values())
            assert sum(c in classes[name] for name in chosen) >= min(k, there)
        before = chosen
    assert len(per_class({n: [SPEAKER[n]] for n in NAMES}, 3)) == 12
    assert per_class(classes, 2, seed=3) != per_class(classes, 2, seed=4)


def test_minutes_are_nested_and_speakers_take_turns():
    seconds = {name: 5.0 + i % 7 for i, name in enumerate(NAMES)}
    before = set()
    for minutes in (0.2, 0.5, 1, 3):
        chosen = set(by_minutes(seconds, minutes, groups=SPEAKER, seed=2))
        assert before <= chosen
        assert sum(seconds[n] for n in chosen) <= 60 * minutes
        counts = [sum(SPEAKER[n] == s for n in chosen) for s in "abcd"]
        assert max(counts) - min(counts) <= 1
        before = chosen
    total = sum(seconds.values()) / 60
    assert by_minutes(seconds, total) == sorted(NAMES)
    with pytest.raises(InputError, match="at most the"):
        by_minutes(seconds, total + 1)


def test_bad_examples_are_refused():
    x, y = clouds(n=10)
    with pytest.raises(InputError, match="label 2 of 2 classes"):
        train_linear([x], [y], 2)
    with pytest.raises(InputError, match="do not fit"):
        logistic_probe([x], [y[:5]], 3)
    with pytest.raises(InputError, match="nothing is labelled"):
        logistic_probe([x], [torch.full((10,), -1)], 3)
    with pytest.raises(InputError, match="1 class"):
        train_linear([x], [y], 1)


def test_windows_vote_and_ties_go_to_the_higher_mean():
    scores = torch.tensor([[9.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert int(vote(scores)) == 1
    assert int(vote(scores[:2])) == 0
    # Features without their mean over time: the mean score is the same for every utterance.
    frames = torch.tensor([[2.0], [-1.0], [-1.0]])
    classifier = LinearClassifier(torch.tensor([[1.0], [-1.0]]), torch.zeros(2))
    assert int(vote(classifier.scores(frames))) == 1
    assert int(vote(classifier.scores(-frames))) == 0
