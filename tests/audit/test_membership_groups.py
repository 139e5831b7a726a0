"""Group membership: people with several images each, simulated with a shared part."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.audit.membership.groups import clustered_auc, combine
from remanence.audit.membership.roc import auc_estimate, delong, evaluate
from remanence.errors import InputError

PHI = NormalDist().cdf


def people(
    n: int, images: int, *, effect: float, shared: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n people a side; scores = effect of membership + a part per person + noise per image."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(2 * n), images)
    member = groups < n
    scores = effect * member + shared * rng.normal(size=2 * n)[groups]
    scores += rng.normal(size=len(groups))
    order = rng.permutation(len(groups))
    return scores[order], member[order], groups[order]


def test_group_beats_sample_by_its_closed_form() -> None:
    shared, images, effect = 0.5, 9, 0.8
    scores, member, groups = people(3000, images, effect=effect, shared=shared, seed=0)
    combined = combine(scores, member, groups)
    sample, group = evaluate(scores, member).auc, evaluate(combined.scores, combined.member).auc
    assert sample.value == pytest.approx(PHI(effect / math.sqrt(2 * (shared**2 + 1))), abs=0.01)
    exact = PHI(effect / math.sqrt(2 * (shared**2 + 1 / images)))
    assert group.value == pytest.approx(exact, abs=0.012)
    assert group.low > sample.high


@pytest.mark.parametrize(("how", "reduce"), [("mean", np.mean), ("sum", np.sum), ("max", np.max)])
def test_combination_is_a_loop(how: str, reduce: object) -> None:
    rng = np.random.default_rng(1)
    names = rng.choice(["ann", "bob", "cy", "dee"], 200)
    member = np.isin(names, ["bob", "dee"])
    scores = rng.normal(size=200)
    combined = combine(scores, member, names, how)  # type: ignore[arg-type]  # a parametrised literal
    assert combined.names.tolist() == ["ann", "bob", "cy", "dee"]
    assert combined.member.tolist() == [False, True, False, True]
    assert combined.sizes.tolist() == [int((names == n).sum()) for n in combined.names]
    loop = [reduce(scores[names == n]) for n in combined.names]  # type: ignore[operator]  # a numpy reduction
    assert combined.scores == pytest.approx(loop)


def test_default_is_not_fooled_by_the_number_of_images() -> None:
    # No leak at all, but members brought more images: only the sum and the maximum say otherwise.
    rng = np.random.default_rng(2)
    sizes = np.r_[np.full(200, 20), np.full(200, 4)]
    groups = np.repeat(np.arange(400), sizes)
    scores, member = rng.normal(size=len(groups)) + 1, groups < 200
    aucs = {}
    for how in ("mean", "sum", "max"):
        combined = combine(scores, member, groups, how)  # type: ignore[arg-type]  # a literal each
        aucs[how] = evaluate(combined.scores, combined.member).auc
    assert aucs["mean"].low < 0.5 < aucs["mean"].high
    assert aucs["sum"].low > 0.9
    assert aucs["max"].low > 0.7


def test_independent_images_would_be_a_false_promise() -> None:
    """Coverage of 95 % intervals for the AUC of single images."""
    shared, effect = 1.0, 0.5
    truth = PHI(effect / math.sqrt(2 * (shared**2 + 1)))
    naive, clustered = 0, 0
    for seed in range(400):
        scores, member, groups = people(40, 10, effect=effect, shared=shared, seed=seed)
        plain = auc_estimate(*delong(scores, member), 400, 0.95)
        right = clustered_auc(scores, member, groups)
        assert right.value == pytest.approx(plain.value)
        naive += plain.low <= truth <= plain.high
        clustered += right.low <= truth <= right.high
    assert naive / 400 < 0.75
    assert 0.92 <= clustered / 400 <= 0.98


def test_copies_add_no_certainty() -> None:
    scores, member, groups = people(40, 1, effect=0.5, shared=0, seed=3)
    once = clustered_auc(scores, member, groups)
    copies = clustered_auc(np.repeat(scores, 7), np.repeat(member, 7), np.repeat(groups, 7))
    assert (copies.low, copies.high) == pytest.approx((once.low, once.high))


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_groups_of_one_are_delong(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, member = rng.integers(0, 9, 90).astype(float), np.arange(90) < 40
    alone = clustered_auc(scores, member, rng.permutation(90))
    plain = auc_estimate(*delong(scores, member), 40, 0.95)
    assert (alone.value, alone.low, alone.high) == pytest.approx(
        (plain.value, plain.low, plain.high), rel=1e-9
    )


def test_bad_groups() -> None:
    scores, member = np.zeros(80), np.arange(80) < 40
    with pytest.raises(InputError, match="group 39 holds both"):
        combine(scores, member, np.minimum(np.arange(80), 39))
    with pytest.raises(InputError, match="one group"):
        combine(scores, member, np.zeros(3))
    with pytest.raises(InputError, match="median"):
        combine(scores, member, np.arange(80), "median")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(InputError, match="2 groups"):
        clustered_auc(scores, member, member)
