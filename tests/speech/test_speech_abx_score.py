import math
import tracemalloc
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import norm, ttest_1samp

from remanence.errors import InputError
from remanence.speech.abx.cells import check_cells, context_names, fixed_subsample
from remanence.speech.abx.distances import frame_distances
from remanence.speech.abx.items import Items
from remanence.speech.abx.score import _result, merge, run
from remanence.speech.abx.statistics import (
    Cells,
    Mean,
    cell_keys,
    p_value,
    speaker_interval,
    speaker_stderr,
)


def _corpus(seed=0, speakers=3, phones="abc", contexts=2, most=4, *, frames=5, levels=None):
    """Items of one file each, with some cells missing; and features near their phone's."""
    rng = np.random.default_rng(seed)
    table = {"file": [], "phone": [], "prev": [], "next": [], "speaker": []}
    features = {}
    centre = {phone: rng.normal(size=4) for phone in phones}
    for s, p, c in product(range(speakers), phones, range(contexts)):
        for _ in range(rng.integers(0, most + 1)):
            name = f"f{len(features)}"
            for key, value in zip(table, (name, p, f"l{c}", "r", f"s{s}"), strict=True):
                table[key].append(value)
            values = centre[p] + 1.5 * rng.normal(size=(rng.integers(1, frames + 1), 4))
            if levels:
                values = np.round(values / 4 * levels)
            features[name] = torch.tensor(values)
    return features, Items.from_table(table)


def _dtw(d):
    cost, length = np.full((2, d.shape[0] + 1, d.shape[1] + 1), np.inf, np.float32)
    cost[0, 0], length[0, 0] = 0, 0
    for i in range(d.shape[0]):
        for j in range(d.shape[1]):
            before = min(((cost[i, j], 0), (cost[i + 1, j], 1), (cost[i, j + 1], 2)))[1]
            u, v = ((i, j), (i + 1, j), (i, j + 1))[before]
            cost[i + 1, j + 1] = cost[u, v] + d[i, j]
            length[i + 1, j + 1] = length[u, v] + 1
    return cost[-1, -1] / length[-1, -1]


def _triple_loop(features, items, distance, speaker, context):
    """Errors (ties 1, others 2) and triplets of all cells, by going over all triplets."""
    n = len(items)
    d = np.array([
        [_dtw(frame_distances(features[x], features[y], distance).numpy()) for y in items.file]
        for x in items.file
    ])  # fmt: skip
    around = [("any",) if context == "any" else (items.prev[i], items.next[i]) for i in range(n)]
    cells = {}
    for x, a, b in product(range(n), repeat=3):
        if not around[x] == around[a] == around[b] or items.speaker[a] != items.speaker[b]:
            continue
        if items.phone[x] != items.phone[a] or items.phone[a] == items.phone[b] or x == a:
            continue
        if (items.speaker[x] == items.speaker[a]) != (speaker == "within"):
            continue
        key = (*("\t".join(around[x]), items.speaker[a], items.speaker[x]), items.phone[a],
               items.phone[b])  # fmt: skip
        cells.setdefault(key, []).append(2 * (d[x, a] > d[x, b]) + (d[x, a] == d[x, b]))
    return {key: (sum(wrong), len(wrong)) for key, wrong in cells.items()}


def _means(cells, aggregate, speaker):
    """The means in words: dictionaries of lists, one level after the other."""

    def level(values, key):
        grouped = {}
        for name, value in values:
            grouped.setdefault(key(*name), []).append(value)
        return [(name, float(np.mean(group))) for name, group in grouped.items()]

    if aggregate == "weighted":
        return sum(w for w, _ in cells.values()) / sum(2 * n for _, n in cells.values())
    values = [(key, wrong / (2 * count)) for key, (wrong, count) in cells.items()]
    if aggregate == "librilight" or speaker == "within":
        values = level(values, lambda c, s, x, p, q: (s, p, q))  # noqa: ARG005 - by name
    else:
        values = level(values, lambda c, s, x, p, q: (s, x, p, q))  # noqa: ARG005 - by name
    values = level(values, lambda *key: key[-2:])
    return float(np.mean([value for _, value in values]))


def _named(cells):
    speakers, phones = np.array(cells.speakers), np.array(cells.phones)
    keys = zip(
        np.array(cells.contexts)[cells.context], speakers[cells.speaker],
        speakers[cells.x_speaker], phones[cells.phone], phones[cells.other], strict=True,
    )  # fmt: skip
    return dict(zip(keys, zip(cells.wrong, cells.triplets, strict=True), strict=True))


def _groups(cells):
    return list(zip(cells.context, cells.speaker, cells.phone, cells.other, strict=True))


@pytest.mark.parametrize("speaker", ["within", "across"])
@pytest.mark.parametrize("context", ["within", "any"])
@pytest.mark.parametrize("distance", ["angular", "euclidean", "identical"])
def test_all_cells_and_means_are_those_of_a_triple_loop(speaker, context, distance, monkeypatch):
    levels = 1 if distance == "identical" else None
    features, items = _corpus(levels=levels, seed=4)
    if context == "any":
        monkeypatch.setattr("remanence.speech.abx.cells.BIN", 10)  # speaker by speaker
    result = run(features, items, frame_rate=1, speaker=speaker, context=context, distance=distance)
    wanted = _triple_loop(features, items, distance, speaker, context)
    assert _named(result.cells) == wanted
    assert len(wanted) >= 10
    for aggregate in ("librilight", "zerospeech2017", "weighted"):
        again = run(features, items, frame_rate=1, speaker=speaker, context=context,
                    distance=distance, aggregate=aggregate)  # fmt: skip
        assert again.error == pytest.approx(_means(wanted, aggregate, speaker), abs=1e-12)


def test_an_asymmetric_distance_is_called_from_x(monkeypatch):
    features, items = _corpus(seed=2, contexts=1)
    features = {name: x.softmax(1) for name, x in features.items()}
    for bins in (512, 5):
        monkeypatch.setattr("remanence.speech.abx.cells.BIN", bins)
        result = run(features, items, frame_rate=1, speaker="across", distance="kl")
        wanted = _triple_loop(features, items, "kl", "across", "within")
        assert _named(result.cells) == wanted


@pytest.mark.parametrize("mu", [0, 0.5, 1, 2, 4])
def test_error_of_two_normal_laws_is_the_closed_form(mu):
    n = 600
    quantiles = norm.ppf((np.arange(n) + 0.5) / n)  # a sample without chance
    values = np.concatenate([quantiles, quantiles + mu])
    names = [f"{i}" for i in range(2 * n)]
    items = Items.from_table({"file": names, "phone": ["p"] * n + ["q"] * n})
    features = {name: torch.tensor([[v]]) for name, v in zip(names, values, strict=True)}
    result = run(features, items, frame_rate=100, distance="euclidean")
    a, b = norm.cdf(mu / math.sqrt(2)), norm.cdf(mu / math.sqrt(6))
    assert 1 - result.error == pytest.approx(a * b + (1 - a) * (1 - b), abs=0.002)


def test_limits_chance_and_perfect_features():
    features, items = _corpus(speakers=4, phones="abcd", most=6)
    for speaker in ("within", "across"):
        same = {name: torch.full((3, 7), 0.3) for name in features}
        assert run(same, items, frame_rate=1, speaker=speaker).error == 0.5
        assert (
            run({n: x * 0 for n, x in same.items()}, items, frame_rate=1, speaker=speaker).error
            == 0.5
        )
        hot = {
            name: torch.eye(4)["abcd".index(phone)].repeat(2, 1)
            for name, phone in zip(items.file, items.phone, strict=True)
        }
        assert run(hot, items, frame_rate=1, speaker=speaker).error == 0
        generator = torch.Generator().manual_seed(0)
        noise = {name: torch.randn(3, 7, generator=generator) for name in features}
        result = run(noise, items, frame_rate=1, speaker=speaker)
        assert abs(result.error - 0.5) < 3 * result.stderr + 0.02


def test_what_must_not_matter_does_not():
    features, items = _corpus(speakers=3, most=6)
    rotation = torch.linalg.qr(
        torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double()
    )[0]
    turned = {name: 7 * x @ rotation for name, x in features.items()}
    order = np.random.default_rng(0).permutation(len(items))
    table = {name: getattr(items, name)[order].tolist() for name in ("file", "prev", "next")}
    table["phone"] = [{"a": "z", "b": "y", "c": "x"}[p] for p in items.phone[order]]
    table["speaker"] = [{"s0": "s9", "s1": "s8", "s2": "s7"}[s] for s in items.speaker[order]]
    for speaker in ("within", "across"):
        error = run(features, items, frame_rate=1, speaker=speaker).error
        for x, y in ((turned, items), (features, Items.from_table(table))):
            other = run(x, y, frame_rate=1, speaker=speaker)
            assert other.error == pytest.approx(error, abs=1e-12)


def test_swapping_two_phones_is_another_cell():
    features, items = _corpus(seed=4)
    table = run(features, items, frame_rate=1, context="any").table()
    assert abs(table["a", "b"] + table["b", "a"] - 1) > 0.1


def test_zero_vectors_are_one_another():
    items = Items.from_table({"file": list("abcd"), "phone": list("ppqq")})
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    assert (
        run(dict(zip("abcd", (zero, zero, one, one), strict=True)), items, frame_rate=1).error == 0
    )


def test_means_over_cells_differ_as_in_the_example():
    # X speaker u has one context with error 0, v has three with error 1.
    one = np.ones(4, np.int64)
    x_speaker, wrong = np.array([1, 2, 2, 2]), np.array([0, 2, 2, 2])
    cells = Cells(np.arange(4), 0 * one, x_speaker, 0 * one, one, wrong, one,
                  tuple("abcd"), tuple("suv"), tuple("pq"))  # fmt: skip
    assert Mean(cells, cells.error, "librilight")(np.ones(3)) == 0.75
    assert Mean(cells, cells.error, "zerospeech2017")(np.ones(3)) == 0.5


def test_shards_add_to_the_same_bits(monkeypatch):
    features, items = _corpus(speakers=4, most=6)
    for side in (4096, 6):
        monkeypatch.setattr("remanence.speech.abx.cells.SIDE", side)  # tables cut in pieces
        for speaker, most in (("within", None), ("across", None), ("across", 2)):
            options = {
                "frame_rate": 1,
                "speaker": speaker,
                "max_x_speakers": most,
                "context": "any",
            }
            whole = run(features, items, **options)
            shards = [run(features, items, **options, shard=(i, 3)) for i in range(3)]
            added = merge(shards)
            assert (added.error, added.stderr) == (whole.error, whole.stderr)
            assert np.array_equal(added.cells.wrong, whole.cells.wrong)


def test_progress_is_told_to_the_end():
    features, items = _corpus(speakers=4, most=6)
    for speaker in ("within", "across"):
        told = []
        run(features, items, frame_rate=1, speaker=speaker, tell=lambda *t, to=told: to.append(t))
        done, total = zip(*told, strict=True)
        assert list(done) == sorted(set(done))
        assert len(set(total)) == 1
        assert done[-1] == total[0] > 0


@pytest.mark.parametrize("context", ["within", "any"])
@pytest.mark.parametrize("speaker", ["within", "across"])
def test_items_are_known_to_hold_cells_before_they_are_scored(speaker, context):
    outcomes = set()
    for seed in range(30):
        features, items = _corpus(seed, speakers=2, phones="ab", contexts=2, most=1 + seed % 2)
        if not features:
            continue
        said = []
        for check in (partial(run, features, frame_rate=1), check_cells):
            try:
                check(items=items, speaker=speaker, context=context)
                said.append("")
            except InputError as error:
                said.append(str(error))
        assert said[0] == said[1]
        outcomes.add(said[0] == "")
    assert outcomes == {True, False}


def test_subsamples_are_fixed_and_fair():
    features, items = _corpus(speakers=6, most=8, contexts=3)
    few = run(features, items, frame_rate=1, max_group=2)
    assert few.error == run(features, items, frame_rate=1, max_group=2).error
    assert few.cells.triplets.max() == 2 * 1 * 2
    exact = run(features, items, frame_rate=1, speaker="across")
    drawn = [run(features, items, frame_rate=1, speaker="across", max_x_speakers=1, seed=seed)
             for seed in range(12)]  # fmt: skip
    for result in drawn:
        known, keys = cell_keys([exact.cells, result.cells])
        by_key = dict(zip(known, exact.cells.error, strict=True))
        assert [by_key[key] for key in keys] == result.cells.error.tolist()
        assert sorted(_groups(result.cells)) == sorted(
            set(_groups(exact.cells))
        )  # one speaker of X each
    assert np.mean([result.error for result in drawn]) == pytest.approx(exact.error, abs=0.02)
    for speaker in ("within", "across"):
        some = fixed_subsample(items, 60, speaker=speaker)
        assert 10 < len(some) <= 60
        assert some.file.tolist() == fixed_subsample(items, 60, speaker=speaker).file.tolist()
        assert len(run(features, some, frame_rate=1, speaker=speaker).cells)
    assert len(fixed_subsample(items, 40, speaker="across", context="any")) <= 40


def test_the_items_of_a_group_are_drawn_anew_by_each_seed():
    features, items = _corpus(speakers=4, most=8, contexts=1, seed=1)
    exact = run(features, items, frame_rate=1).error
    drawn = [run(features, items, frame_rate=1, max_group=3, seed=s).error for s in range(40)]
    assert len(set(drawn)) > 30
    assert np.mean(drawn) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("speaker", ["within", "across"])
def test_subsamples_of_a_few_large_groups_hold_all_speakers(speaker):
    rows = [(s, p, i) for s in "tuvwxy" for p in "abc" for i in range(40)]
    speakers, phones, _ = zip(*rows, strict=True)
    items = Items.from_table({"file": range(720), "phone": phones, "speaker": speakers})
    some = fixed_subsample(items, 150, speaker=speaker)
    assert 100 < len(some) <= 150
    assert set(some.speaker) == set("tuvwxy")


def test_standard_error_of_balanced_speakers_is_that_of_their_means():
    rng = np.random.default_rng(0)
    speaker, phone = (grid.ravel() for grid in np.mgrid[:8, :2])
    wrong = rng.integers(0, 2000, 16)
    cells = Cells(0 * speaker, speaker, speaker, phone, 1 - phone, wrong, np.full(16, 1000),
                  ("any",), tuple("abcdefgh"), ("p", "q"))  # fmt: skip
    result = _result(cells, "librilight", "inclusive", 0, 4000, 0)
    means = cells.error.reshape(8, 2).mean(1)
    assert result.error == pytest.approx(means.mean())
    assert result.stderr == pytest.approx(means.std(ddof=1) / math.sqrt(8))
    half = 1.96 * means.std() / math.sqrt(8)
    assert result.interval == pytest.approx((means.mean() - half, means.mean() + half), abs=0.012)
    assert result.table("speaker")["c",] == pytest.approx(means[2])


def _brute(cells, values, aggregate, weights):
    """The mean, with each speaker there as often as its weight says, but never X to itself."""
    copies = {}
    for i in range(len(cells)):
        s, x = cells.speaker[i], cells.x_speaker[i]
        for a, b in product(range(weights[s]), range(1 if x == s else weights[x])):
            key = (cells.phone[i], cells.other[i]), (s, a), (x, b)
            copies.setdefault(key, []).append((values[i], cells.triplets[i]))
    if aggregate == "weighted":
        rows = [row for own in copies.values() for row in own]
        return sum(v * n for v, n in rows) / sum(n for _, n in rows)
    groups = {}
    for (pair, s, _), own in copies.items():
        rows = [v for v, _ in own]
        key = (pair, s) if aggregate == "librilight" else pair
        groups.setdefault(key, []).extend(
            rows if aggregate == "librilight" else [float(np.mean(rows))]
        )
    if aggregate == "librilight":
        speakers = groups
        groups = {}
        for (pair, _), rows in speakers.items():
            groups.setdefault(pair, []).append(float(np.mean(rows)))
    return float(np.mean([np.mean(rows) for rows in groups.values()]))


@pytest.mark.parametrize("aggregate", ["librilight", "zerospeech2017", "weighted"])
def test_means_and_standard_errors_weigh_both_speakers_of_a_cell(aggregate):
    rng = np.random.default_rng(0)
    grid = np.stack([g.ravel() for g in np.mgrid[:3, :4, :4, :2, :2]])
    c, s, x, p, q = grid[:, (grid[1] != grid[2]) & (grid[3] != grid[4]) & (rng.random(192) < 0.7)]
    n = len(c)
    triplets = rng.integers(1, 9, n)
    cells = Cells(c, s, x, p, q, rng.integers(0, 2 * triplets + 1), triplets,
                  tuple("xyz"), tuple("stuv"), ("p", "q"))  # fmt: skip
    mean, everyone = Mean(cells, cells.error, aggregate), np.arange(4)
    for weights in ([1, 1, 1, 1], [2, 1, 0, 3], [0, 1, 1, 1], [1, 0, 4, 0], [3, 1, 2, 2]):
        wanted = _brute(cells, cells.error, aggregate, weights)
        assert mean(np.array(weights, float)) == pytest.approx(wanted, abs=1e-12)
    left = [_brute(cells, cells.error, aggregate, np.where(everyone == k, 0, 1)) for k in everyone]
    wanted = math.sqrt(3 / 4 * np.square(np.array(left) - np.mean(left)).sum())
    assert speaker_stderr(mean, everyone) == pytest.approx(wanted, abs=1e-12)
    low, high = speaker_interval(mean, everyone, wanted, 300, 0)
    drawn = [
        _brute(cells, cells.error, aggregate, np.bincount(rows, minlength=4))
        for rows in np.random.default_rng(0).integers(0, 4, (300, 4))
        if len(set(rows)) > 1
    ]
    assert (low, high) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.03)


def test_balanced_speakers_are_tested_as_a_t_test_does():
    rng = np.random.default_rng(0)
    speaker, phone = (grid.ravel() for grid in np.mgrid[:5, :2])
    results = []
    for wrong in rng.integers(0, 2000, (2, 10)):
        cells = Cells(0 * speaker, speaker, speaker, phone, 1 - phone, wrong, np.full(10, 1000),
                      ("any",), tuple("abcde"), ("p", "q"))  # fmt: skip
        results.append(_result(cells, "librilight", "inclusive", 0, 0, 0))
    means = [result.cells.error.reshape(5, 2).mean(1) for result in results]
    found, known = results[0].compare(results[1]), ttest_1samp(means[0] - means[1], 0)
    assert found.p_value == pytest.approx(known.pvalue)
    assert found.interval == pytest.approx(known.confidence_interval(0.95))
    wanted = ttest_1samp(means[0], 0).confidence_interval(0.95)
    assert results[0].interval == pytest.approx(wanted)
    assert p_value(0.1, math.nan, 5) != p_value(0.1, 0, 5) == 0


def test_comparison_finds_a_difference_and_none():
    features, items = _corpus(speakers=8, most=6)
    generator = torch.Generator().manual_seed(0)
    worse = {n: x + 2 * torch.randn(x.shape, generator=generator) for n, x in features.items()}
    good, bad = (run(f, items, frame_rate=1, context="any") for f in (features, worse))
    found = good.compare(bad)
    assert found.difference == pytest.approx(good.error - bad.error)
    assert found.p_value < 0.05
    assert found.interval[1] < 0
    none = good.compare(good)
    assert (none.difference, none.p_value) == (0, 1)
    with pytest.raises(InputError, match="different items"):
        good.compare(run(features, items, frame_rate=1))


@pytest.mark.parametrize("speaker", ["within", "across"])
@pytest.mark.parametrize("options", [{}, {"max_group": 2}, {"max_x_speakers": 1}])
def test_comparison_of_two_rates_leaves_out_what_only_one_has(speaker, options):
    rng = np.random.default_rng(0)
    rows = [(f"s{s}", p, c) for s, p, c, _ in product(range(4), "pq", "xyz", range(4))]
    speakers, phones, contexts = zip(*rows, strict=True)
    onset = np.array([20 * i + (6 if c == "y" else 0) for i, c in enumerate(contexts)]) / 1000
    # Tokens of context y have frames at 100 Hz alone, and so has one in sixteen of the others.
    short = [c == "y" or i % 16 == 1 for i, c in enumerate(contexts)]
    onset = np.where(short, np.round(onset - onset % 0.02 + 0.012, 3), onset)
    offset = np.where(short, onset + 0.006, onset + 0.02)
    items = Items.from_table({"file": ["f"] * len(rows), "phone": phones, "prev": contexts,
                              "speaker": speakers, "onset": np.round(onset, 3),
                              "offset": np.round(offset, 3)})  # fmt: skip
    slow = {"f": torch.tensor(rng.normal(size=(100, 4)))}
    fast = {"f": slow["f"].repeat_interleave(2, 0)}
    options = {"speaker": speaker, "drop_empty": True, **options}
    first = run(fast, items, frame_rate=100, **options)
    second = run(slow, items, frame_rate=50, **options)
    assert first.dropped == 0 < second.dropped
    assert {second.cells.contexts[c] for c in second.cells.context} == {"x\tSIL", "z\tSIL"}
    found = first.compare(second)
    common = set(_named(first.cells)) & set(_named(second.cells))
    assert found.cells == len(common) == len(second.cells)
    mine, theirs = _named(first.cells), _named(second.cells)
    whole = [key for key in common if theirs[key][1] == mine[key][1]]
    assert whole
    assert all(theirs[key] == mine[key] for key in whole)  # drawn alike
    if not options.get("max_group"):
        few = run(slow, items[~np.array(short)], frame_rate=50, speaker=speaker)
        assert all(_named(few.cells)[key] == theirs[key] for key in theirs)


def test_labels_with_blanks_make_no_contexts_meet():
    table = {"file": list("abcd"), "phone": list("ppqq"), "prev": ["x y", "x", "x y", "x"],
             "next": ["z", "y z", "z", "y z"]}  # fmt: skip
    items = Items.from_table(table)
    assert len(set(context_names(items, "within"))) == 2
    assert context_names(items, "any") == ["any"] * 4
    with pytest.raises(InputError, match="no valid cell"):
        run({name: torch.ones(1, 3) for name in "abcd"}, items, frame_rate=1)


def test_cells_of_any_vocabulary_are_known_by_number():
    rng = np.random.default_rng(0)
    features, items = _corpus(speakers=3, most=6)
    cells = run(features, items, frame_rate=1, speaker="across").cells

    def padded(names):
        return (*names, *range(10**5))

    huge = replace(cells, contexts=padded(cells.contexts), speakers=padded(cells.speakers),
                   phones=padded(cells.phones))  # fmt: skip
    some = np.sort(rng.choice(len(cells), len(cells) // 2, replace=False))
    names = ("context", "speaker", "x_speaker", "phone", "other", "wrong", "triplets")
    part = replace(huge, **{name: getattr(huge, name)[some] for name in names})
    first, second = cell_keys([huge, part])
    assert (np.diff(first) > 0).all()
    assert np.array_equal(first[some], second)
    for aggregate in ("librilight", "zerospeech2017"):
        wanted = Mean(cells, cells.error, aggregate)(np.ones(3))
        assert Mean(huge, huge.error, aggregate)(np.ones(10**5 + 3)) == wanted


@pytest.mark.parametrize("options", [{}, {"max_x_speakers": 5}])
def test_many_speakers_of_many_words_need_little_memory(options):
    n, words = 240, 120
    names = [f"f{i}" for i in range(n)]
    phones, people = [i % words for i in range(n)], [i // 2 for i in range(n)]
    items = Items.from_table({"file": names, "phone": phones, "speaker": people})
    features = dict(zip(names, torch.randn(n, 1, 4), strict=True))
    tracemalloc.start()
    result = run(features, items, frame_rate=1, speaker="across", context="any", **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(result.cells) == n
    assert peak < 100 * 2**20


@pytest.mark.parametrize("speaker", ["within", "across"])
@pytest.mark.parametrize("context", ["within", "any"])
def test_tables_counted_in_pieces_give_the_same_cells(speaker, context, monkeypatch):
    features, items = _corpus(seed=4, speakers=5)
    whole = run(features, items, frame_rate=1, speaker=speaker, context=context)
    monkeypatch.setattr("remanence.speech.abx.counting.CELLS", 20)
    pieces = run(features, items, frame_rate=1, speaker=speaker, context=context)
    assert _named(pieces.cells) == _named(whole.cells)


@pytest.mark.parametrize("speaker", ["within", "across"])
def test_comparison_of_equals_is_rarely_significant(speaker):
    rng = np.random.default_rng(0)
    S = 10
    s, x, p = (grid.ravel() for grid in np.mgrid[:S, :S, :2])
    keep = (s == x) == (speaker == "within")
    s, x, p = s[keep], x[keep], p[keep]
    significant = 0
    for _ in range(200):
        results = []
        for _ in range(2):
            errors = 0.3 + 0.05 * rng.normal(size=S)[s] + 0.05 * rng.normal(size=S)[x]
            wrong = (2000 * (errors + 0.02 * rng.normal(size=len(s)))).astype(int)
            cells = Cells(0 * s, s, x, p, 1 - p, wrong, np.full(len(s), 1000), ("any",),
                          tuple("abcdefghij"), ("p", "q"))  # fmt: skip
            results.append(_result(cells, "librilight", "inclusive", 0, 0, 0))
        significant += results[0].compare(results[1]).p_value < 0.05
    assert 1 <= significant <= 22  # 10 expected


@pytest.mark.parametrize("speaker", ["within", "across"])
@pytest.mark.parametrize("distance", ["angular", "euclidean", "kl_symmetric"])
def test_another_engine_finds_the_same_error(speaker, distance):
    fastabx, polars = pytest.importorskip("fastabx"), pytest.importorskip("polars")
    features, items = _corpus(speakers=4, phones="abcd", contexts=3, most=6)
    features = {name: x.float() for name, x in features.items()}
    if distance == "kl_symmetric":
        features = {name: x.softmax(1) for name, x in features.items()}
    rows = [features[name] for name in items.file]
    ends = np.cumsum([len(row) for row in rows]).tolist()
    index = dict(enumerate(zip([0, *ends[:-1]], ends, strict=True)))
    accessor = fastabx.InMemoryAccessor(index, torch.cat(rows), torch.device("cpu"))
    columns = ("phone", "prev", "next", "speaker")
    labels = polars.DataFrame({name: getattr(items, name).tolist() for name in columns})
    sides = {"by": ["prev", "next", "speaker"]}
    if speaker == "across":
        sides = {"by": ["prev", "next"], "across": ["speaker"]}
    task = fastabx.Task(fastabx.Dataset(labels, accessor), on="phone", **sides)
    score = fastabx.Score(task, distance, progress=False)
    result = run(features, items, frame_rate=1, speaker=speaker, distance=distance)
    assert len(result.cells) == len(task)
    theirs = score.collapse(levels=[("prev", "next"), "speaker"])
    assert result.error == pytest.approx(theirs, abs=1e-6)
    weighted = run(features, items, frame_rate=1, speaker=speaker, distance=distance,
                   aggregate="weighted")  # fmt: skip
    assert weighted.error == pytest.approx(score.collapse(weighted=True), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"speaker": "across"}, "across speakers with one speaker"),
        ({}, {"frame_rate": None}, "either frame_rate or times"),
        ({"d": torch.ones(1, 4)}, {}, "differ in dimension"),
        ({"d": torch.full((1, 3), math.nan)}, {}, "NaN"),
        ({"d": torch.ones(1, 3).int()}, {}, "give floats"),
        ({"d": torch.zeros(0, 3)}, {}, "1 items have no frame"),
        ({"d": None}, {}, "no features of 'd'"),
        ({}, {"distance": "kl"}, "probabilities"),
        ({}, {"aggregate": "mean"}, "aggregate"),
        ({}, {"speaker": "both"}, "speaker 'both'"),
        ({}, {"context": "some"}, "context 'some'"),
        ({}, {"max_group": 1}, "max_group"),
        ({}, {"max_x_speakers": 0}, "max_x_speakers"),
        ({}, {"shard": (1, 1)}, "shard"),
    ],
)
def test_bad_input_is_refused_in_one_line(change, options, message):
    items = Items.from_table({"file": list("abcd"), "phone": list("ppqq")})
    features = {name: torch.ones(1, 3) for name in "abcd"} | change
    features = {name: x for name, x in features.items() if x is not None}
    with pytest.raises(InputError, match=message) as error:
        run(features, items, **({"frame_rate": 1} | options))
    assert "\n" not in str(error.value)


def test_items_without_a_cell_are_refused():
    ones = {name: torch.ones(1, 3) for name in "abc"}
    for phones, message in (("ppp", "two phones"), ("pqr", "no valid cell")):
        items = Items.from_table({"file": list("abc"), "phone": list(phones)})
        with pytest.raises(InputError, match=message):
            run(ones, items, frame_rate=1)
    empty = Items.from_table({"file": list("abcd"), "phone": list("ppqp")})
    result = run(ones | {"d": torch.zeros(0, 3)}, empty, frame_rate=1, drop_empty=True)
    assert (result.error, result.dropped) == (0.5, 1)
    assert math.isnan(result.stderr)
