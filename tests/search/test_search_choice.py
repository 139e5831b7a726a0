import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from remanence.errors import InputError
from remanence.search import heldout
from remanence.search.catalyzer.training import Settings
from remanence.search.choice import (
    Comparison,
    Trial,
    advise,
    best_trial,
    code_for_bytes,
    new_catalyzer,
    shortened,
    trial_rank,
    tune,
)
from remanence.search.heldout import HeldOut, Score, score, split, telling_rank
from remanence.search.index.file import code_from, describe
from remanence.search.lattice.sphere import SphereLattice


def manifold(n, seed=0):
    """A curved sheet of 4 dimensions in 24."""
    fixed = torch.Generator().manual_seed(9)
    first, second = torch.randn(4, 48, generator=fixed), torch.randn(48, 24, generator=fixed)
    u = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return torch.tanh(u @ first) @ second


# The code for a number of bytes


@pytest.mark.parametrize(
    ("nbytes", "dim", "r2"), [(4, 16, 21), (5, 16, 47), (8, 24, 79), (12, 40, 78), (16, 48, 135)]
)
def test_the_published_sizes(nbytes, dim, r2):
    code = code_for_bytes(nbytes)
    assert (code.dim, code.r2, code.nbytes) == (dim, r2, nbytes)


@pytest.mark.parametrize("nbytes", [1, 2, 3, 4, 6, 7, 8, 10])
def test_a_lattice_takes_the_bytes_it_is_asked_for(nbytes):
    code = code_for_bytes(nbytes)
    assert code.dim % 8 == 0
    assert code.nbytes == nbytes == -(-math.ceil(math.log2(code.nv)) // 8)
    if nbytes >= 4:
        assert 2 <= 8 * nbytes / code.dim <= 3


def test_a_dimension_may_be_given():
    code = code_for_bytes(8, dim=32)
    assert (code.dim, code.r2) == (32, 36)
    assert (code_for_bytes(4, "lattice", 24).r2, code_for_bytes(2, dim=40).nbytes) == (10, 2)


def test_signs_take_a_bit_a_dimension():
    code = code_for_bytes(8, "sign")
    assert (code.dim, code.bits, code.nbytes) == (64, 64, 8)
    assert code_for_bytes(8, "sign", 64).dim == 64


def test_gosset_shells_are_the_largest_that_fit():
    assert [code_for_bytes(n, "e8").nv for n in (1, 2)] == [240, 60_480]  # 240 sigma_3(m)
    assert code_for_bytes(2, "e8").dim == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0,), "0 bytes: give at least 1"),
        ((8, "lattice", 2), r"8 bytes in dimension 2: give dimension 16 \(r2 515\), 24 \(r2 79\)"),
        ((1, "lattice", 200), r"1 bytes in dimension 200: give dimension 64 \(r2 1\), 56"),
        ((8, "sign", 24), "dimension 64, not 24"),
        ((2, "e8", 24), "dimension 8, not 24"),
        ((4, "e8"), "1 to 3 bytes, not 4"),
        ((8, "opq"), "one of lattice, sign, e8"),
    ],
)
def test_what_there_is_no_code_for_is_refused(arguments, words):
    with pytest.raises(InputError, match=words) as error:
        code_for_bytes(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("nbytes", "kind"), [(4, "lattice"), (4, "sign"), (2, "e8")])
def test_a_code_comes_back_from_its_parameters(nbytes, kind):
    code = code_for_bytes(nbytes, kind)
    plain = json.loads(json.dumps(describe(code)))
    again = code_from(plain)
    assert type(again) is type(code)
    assert (again.dim, again.r2, again.nv) == (code.dim, code.r2, code.nv)


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"kind": "PQ", "dim": 8, "r2": 1},
        {"kind": "SphereLattice", "dim": "8", "r2": 1},
        {"kind": "SignCode", "dim": 8, "r2": 1},
        {"kind": "E8Shell", "dim": 16, "r2": 8},
        {"kind": "SphereLattice", "dim": 8, "r2": 7, "nbytes": 2},
    ],
)
def test_parameters_of_no_code_are_refused(plain):
    with pytest.raises(InputError, match="describes no code"):
        code_from(plain)


# Held-out vectors


def rows_of(part):
    return part[:, 0].int().tolist()


def test_the_split_shares_nothing():
    """But for a base, which has what is learned from."""
    vectors = torch.arange(3000.0).view(1500, 2)
    train, choosing, reporting = split(vectors, 0.2, seed=3)
    assert [len(part) for part in (train, choosing.queries, reporting.queries)] == [1200, 100, 100]
    asked = rows_of(choosing.queries) + rows_of(reporting.queries)
    assert len(set(asked)) == 200
    assert not set(asked) & set(rows_of(train))
    for held_out in (choosing, reporting):
        base = rows_of(held_out.base)
        assert sorted(base + asked) == rows_of(vectors)  # once each: no query is in a base
        assert set(rows_of(train)) < set(base)
        assert held_out.learned == 1200
        gaps = torch.cdist(held_out.queries.double(), held_out.base.double())
        assert torch.equal(gaps.argmin(1), torch.from_numpy(held_out.truth))
    assert torch.equal(train[:, 0], train[:, 0].sort().values)
    again, _, _ = split(vectors, 0.2, seed=3)
    other, _, _ = split(vectors, 0.2, seed=4)
    assert torch.equal(train, again)
    assert not torch.equal(train, other)
    assert len(split(vectors, 0.2, most=27)[1].queries) == 27


def test_bases_are_bounded_and_what_was_not_learned_from_comes_first(monkeypatch):
    monkeypatch.setattr(heldout, "CHOOSING", 120)
    monkeypatch.setattr(heldout, "REPORTING", 700)
    vectors = torch.rand(1500, 2, generator=torch.Generator().manual_seed(0))
    train, choosing, reporting = split(vectors, 0.3)  # 450: 150 and 150 queries, 150 are left
    learned = {tuple(row) for row in train.tolist()}
    for held_out, size, number in ((choosing, 120, 0), (reporting, 700, 550)):
        base = [tuple(row) for row in held_out.base.tolist()]
        assert len(base) == size
        assert len(learned.intersection(base)) == held_out.learned == number
        assert not {tuple(row) for row in held_out.queries.tolist()} & set(base)
        places = [at for at, row in enumerate(base) if row in learned]
        if number:  # mixed, so that ties favour neither
            assert 250 < sum(places) / number < 450
            assert places[0] < 10


def test_too_few_queries_or_too_small_a_base_are_refused():
    with pytest.raises(InputError, match=r"leaves 23 queries: .* at least 0.075"):
        split(torch.rand(1000, 2), 0.07)
    with pytest.raises(InputError, match="99 vectors to search among"):
        HeldOut.of(torch.rand(99, 2), torch.rand(3, 2))


def test_the_rank_that_tells():
    assert [telling_rank(best) for best in (0.0, 0.5, 0.899, 0.9, 1.0)] == [10, 10, 10, 1, 1]


def test_scores_are_those_of_brute_force_and_of_the_inputs_truth():
    vectors = manifold(900)
    base, queries = vectors[:600], vectors[600:]
    catalyzer = new_catalyzer(24, [8, 16], hidden=32, seed=1).eval()
    codes = [SphereLattice(8, 15), SphereLattice(16, 21), SphereLattice(16, 4)]
    found = score(catalyzer, codes, HeldOut.of(base, queries))
    gaps = (queries.double()[:, None] - base.double()).square().sum(2)
    truth = gaps.argmin(1)
    for code, each in zip(codes, found, strict=True):
        assert (each.dim, each.r2, each.nbytes) == (code.dim, code.r2, code.nbytes)
        z, y = (catalyzer.at(code.dim).embed(x).double() for x in (base, queries))
        for rows, seen in (
            (z, each.floats),
            (code.decode(code.encode(z)).double(), each.quantised),
        ):
            order = (y @ rows.T).sort(dim=1, descending=True, stable=True).indices
            hits = order == truth[:, None]
            wanted = [hits[:, :r].any(1).double().mean().item() for r in (1, 10, 100)]
            assert seen == pytest.approx(wanted, abs=0.004)  # near ties of float32
    assert found[1].floats == found[2].floats
    assert found[1].quantised[1] > found[2].quantised[1]  # 32 bits against 15


# Tuning


SHORT = Settings(epochs=24, lr=1e-2, batch_size=64, positives=5, negative=20)


@pytest.fixture(scope="module")
def sets():
    train, choosing, _ = split(manifold(3000), 0.4)
    return train, choosing


@pytest.fixture(scope="module")
def trials(sets):
    codes = [[SphereLattice(8, 15)], [SphereLattice(16, 4)]]
    return list(tune(*sets, codes, (0.0, 0.05), settings=SHORT, hidden=32, seed=1))


def test_a_spread_is_chosen_and_a_collapse_is_not(trials):
    assert [trial.koleo for trial in trials] == [0.0, 0.05, 0.0, 0.05]
    assert [trial.scores[0].dim for trial in trials] == [8, 8, 16, 16]
    for none, some in (trials[:2], trials[2:]):
        assert some.spread < none.spread - 0.3
        assert some.uniform == none.uniform
    crowded, spread = (trial.scores[0].quantised[1] for trial in trials[2:])
    assert spread > crowded + 0.1
    assert trials[2].scores[0].floats[1] > crowded + 0.2  # which recall in floats does not show
    best = best_trial(trials)
    assert trials[best].scores[0].quantised[1] == max(t.scores[0].quantised[1] for t in trials)


def test_tuning_goes_on_where_it_was_interrupted(sets, trials):
    plain = json.loads(json.dumps([asdict(trial) for trial in trials[:3]]))
    done = [Trial.from_dict(each) for each in plain]
    assert done == trials[:3]
    codes = [[SphereLattice(8, 15)], [SphereLattice(16, 4)]]
    rest = list(tune(*sets, codes, (0.0, 0.05), settings=SHORT, hidden=32, seed=1, done=done))
    assert rest == trials[3:]


def test_the_best_is_by_recall_at_10_in_codes_not_in_floats():
    def trial(floats, quantised):
        return Trial(0.01, 0.0, 0.0, tuple(Score(8, 2, 1, (0, f, 0), (1, q, 1)) for f, q in
                                           zip(floats, quantised, strict=True)))  # fmt: skip

    rows = [trial([0.9], [0.3]), trial([0.5], [0.4]), trial([0.99], [0.4])]
    assert best_trial(rows) == 1
    ties = [trial([0.9], [0.3]) for _ in range(3)]
    assert best_trial([ties[0], replace(ties[0], koleo=9), ties[2]]) == 0
    low = [replace(each, scores=(replace(each.scores[0], quantised=(first, 0.3, 1)),))
           for each, first in zip(ties, (0.1, 0.2, 0.15), strict=True)]  # fmt: skip
    assert best_trial(low) == 1  # by recall@1
    nested = [trial([0, 0], [0.1, 0.7]), trial([0, 0], [0.5, 0.5])]
    assert best_trial(nested) == 1
    assert trial_rank(rows) == 10


def test_where_recall_at_10_is_saturated_the_best_is_by_recall_at_1():
    def trial(first, tenth):
        return Trial(0.01, 0.0, 0.0, (Score(8, 2, 1, (1, 1, 1), (first, tenth, 1)),))

    rows = [trial(0.5, 0.953), trial(0.6, 0.951), trial(0.61, 0.6)]
    assert (trial_rank(rows), best_trial(rows)) == (1, 2)
    assert best_trial(rows[:2]) == 1
    assert best_trial([trial(0.5, 0.899), trial(0.6, 0.898)]) == 0
    assert best_trial([trial(0.5, 0.93), trial(0.5, 0.94)]) == 1  # equal at 1: by recall@10


def test_short_trainings_are_short_but_not_too_small():
    assert shortened(Settings(epochs=40), 500_000) == (Settings(epochs=10), 50_000)
    assert shortened(Settings(epochs=40), 3000)[1] == 1500
    assert shortened(Settings(epochs=1), 600) == (Settings(epochs=1), 500)  # 10 k_neg


def test_nothing_to_choose_from_is_refused(sets):
    with pytest.raises(InputError, match="at least one of each"):
        list(tune(*sets, [], settings=SHORT))


def test_weights_come_from_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = new_catalyzer(6, [4], hidden=8, seed=2)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    second, third = new_catalyzer(6, [4], hidden=8, seed=2), new_catalyzer(6, [4], hidden=8, seed=3)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, third.head.weight)


# Advice


def told(*rows, **changes):
    facts = {"rank": 10, "nbytes": 8, "queries": 4000, "trained_on": 10**6, "in_dim": 128} | changes
    return advise(rows, **facts)


OPQ = Comparison("OPQ to 32", 0.80, 0.77, 0.02, 0.04)
LSQ = Comparison("LSQ", 0.80, 0.83, -0.04, -0.02)
TIE = Comparison("RQ", 0.80, 0.795, -0.01, 0.02)


def test_ours_is_advised_where_it_beats_all():
    advice = told(OPQ)
    assert advice.choice == "catalyzer + lattice"
    assert "3.0 points above that of OPQ to 32 (95 % interval +2.0 to +4.0)" in advice.sentence
    assert "training vectors" not in advice.sentence
    assert "scalar" not in advice.sentence


def test_the_sentence_names_the_rank():
    for row in (OPQ, LSQ, TIE):
        assert "recall@10" in told(row).sentence
        for rank in (1, 100):
            sentence = told(row, rank=rank).sentence
            assert f"recall@{rank} " in sentence or f"recall@{rank}:" in sentence
            assert "recall@10 " not in sentence
            assert "recall@10:" not in sentence


def test_the_best_rival_is_advised_where_one_is_better():
    worse = Comparison("PQ", 0.80, 0.82, -0.03, -0.01)
    advice = told(OPQ, worse, LSQ, TIE)
    assert advice.choice == "LSQ"
    assert "Use LSQ at 8 bytes" in advice.sentence
    assert "(95 % interval 2.0 points to 4.0 points)" in advice.sentence


def test_an_interval_over_zero_is_no_difference():
    for rows in ((TIE,), (OPQ, TIE)):
        advice = told(*rows)
        assert advice.choice == "no difference"
        assert "4,000 queries show no difference" in advice.sentence
        assert "RQ is simpler" in advice.sentence


def test_rules_of_thumb_are_added():
    assert (
        "50,000 training vectors or more, and there were 1,438"
        in told(OPQ, trained_on=1438).sentence
    )
    assert "each of 64 dimensions" in told(OPQ, in_dim=64).sentence
    advice = told(trained_on=1438)
    assert advice.choice == "not compared"
    assert advice.sentence.count(".") == 1
    assert np.all(["\n" not in each.sentence for each in (advice, told(OPQ))])
