import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import pairwise_distances

from remanence.errors import InputError
from remanence.search import exact
from remanence.search.exact import exact_neighbours, recall_at, recall_hits


def brute(queries, base, k, metric):
    """Every pair in float64, sorted by cost and then number."""
    queries, base = queries.astype("f8"), base.astype("f8")
    if metric == "l2":
        costs = ((queries[:, None] - base) ** 2).sum(-1)
    else:
        if metric == "cosine":
            queries, base = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, base))
        costs = -(queries @ base.T)
    ids = np.lexsort((np.broadcast_to(np.arange(len(base)), costs.shape), costs))[:, :k]
    kept = np.take_along_axis(costs, ids, axis=1)
    return ids, kept if metric == "l2" else -kept


def vectors(n, d=20, seed=0, offset=0.0):
    return (np.random.default_rng(seed).normal(size=(n, d)) + offset).astype("f4")


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("k", [1, 10, 300])
def test_equals_brute_force(metric, k):
    queries, base = vectors(30, seed=1), vectors(300)
    ids, costs = exact_neighbours(queries, base, k, metric)
    wanted, values = brute(queries, base, k, metric)
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_allclose(costs, values, rtol=1e-5, atol=1e-6)
    assert (ids.dtype, costs.dtype) == (np.int64, np.float32)


def test_the_cosine_is_scikit_learns():
    queries, base = vectors(5, seed=1), vectors(40)
    _, found = exact_neighbours(queries, base, 40, "cosine")
    wanted = 1 - np.sort(pairwise_distances(queries, base, "cosine"), axis=1)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@given(st.integers(0, 2**32), st.integers(1, 30), st.sampled_from(["l2", "ip"]))
@settings(max_examples=40, deadline=None)
def test_ties_go_to_the_smaller_number(seed, k, metric):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2, (60, 4)).astype("f4")  # 16 different rows at most
    queries = rng.integers(0, 3, (25, 4)).astype("f4")
    np.testing.assert_array_equal(
        exact_neighbours(queries, base, k, metric)[0], brute(queries, base, k, metric)[0]
    )


def test_a_thousand_equal_rows_give_the_first_ones():
    base = np.repeat(vectors(3, seed=4), 1000, axis=0)
    ids, _ = exact_neighbours(base[[1500, 0]], base, 5)
    np.testing.assert_array_equal(ids, [range(1000, 1005), range(5)])


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_a_large_common_offset_does_not_blur_the_order(metric):
    # float32 products of vectors of squared length 2e7 err by more than the distances differ.
    queries, base = vectors(25, seed=1, offset=1000), vectors(400, offset=1000)
    found, wanted = (f(queries, base, 10, metric) for f in (exact_neighbours, brute))
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e18])
def test_the_cosine_holds_at_any_length(scale):
    queries, base = vectors(5, seed=1), vectors(100)
    found = exact_neighbours(queries * np.float32(scale), base * np.float32(scale), 9, "cosine")
    np.testing.assert_array_equal(found[0], brute(queries, base, 9, "cosine")[0])


@pytest.mark.parametrize("sizes", [(1, 299), (100, 100, 100), (7,) * 42 + (6,)])
def test_chunks_change_nothing(sizes):
    queries, base = vectors(10, seed=1), np.repeat(vectors(150), 2, axis=0)
    whole = exact_neighbours(queries, base, 12)
    chunks = np.split(base, np.cumsum(sizes)[:-1])
    for one, other in zip(whole, exact_neighbours(queries, iter(chunks), 12), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bytes_and_slices_of_a_large_array_are_taken(monkeypatch):
    monkeypatch.setattr(exact, "ROWS", 64)
    base = np.random.default_rng(0).integers(0, 256, (300, 16)).astype("u1")
    ids, costs = exact_neighbours(base[:20], base, 3)
    np.testing.assert_array_equal(ids, brute(base[:20], base, 3, "l2")[0])
    np.testing.assert_array_equal(ids[:, 0], range(20))
    assert (costs[:, 0] == 0).all()


def test_bad_input_is_refused():
    good = vectors(10)
    bad = good.copy()
    bad[7, 3] = np.nan
    zero = good.copy()
    zero[4] = 0
    for arguments, words in [
        ((good, good, 0), "at least 1"),
        ((good, good, 11), "at most 10"),
        ((good, good, 1, "l1"), "metric 'l1'"),
        ((good, good[:, :5], 1), "dimension 5 for queries of 20"),
        ((good, [good, bad], 1), "base row 17 holds NaN"),
        ((bad, good, 1), "query row 7 holds NaN"),
        ((good, zero, 1, "cosine"), "base row 4 is zero"),
        ((good[0], good, 1), "query vectors of shape"),
        ((good, good[0], 1), "base vectors of shape"),
        ((good, iter([]), 1), "among 0 base vectors"),
    ]:
        with pytest.raises(InputError, match=words):
            exact_neighbours(*arguments)


def test_recall_counts_the_first_neighbour_among_the_first_r():
    found = [[3, 1, 2], [0, 5, 4], [7, 8, -1], [9, 6, 5]]
    truth = [3, 4, 2, 6]
    assert recall_at(found, truth, (1, 2, 3)) == {1: 0.25, 2: 0.5, 3: 0.75}
    hits = recall_hits(found, np.array([[3, 1], [4, 0], [2, 7], [6, 9]]), (2,))
    np.testing.assert_array_equal(hits[2], [True, False, False, True])


def test_recall_of_the_exact_search_is_one_and_of_chance_is_r_over_n():
    queries, base = vectors(200, seed=1), vectors(1000)
    truth, _ = exact_neighbours(queries, base, 1)
    assert recall_at(exact_neighbours(queries, base, 100)[0], truth) == {1: 1, 10: 1, 100: 1}
    rng = np.random.default_rng(2)
    chance = np.stack([rng.permutation(1000)[:100] for _ in range(200)])
    assert recall_at(chance, truth)[100] == pytest.approx(0.1, abs=4 * 0.3 / 200**0.5)


def test_recall_refuses_what_does_not_match():
    for found, truth, ks, words in [
        ([[1, 2]], [1, 2], (1,), "give \\(q, K\\)"),
        ([[1, 2]], [1], (3,), "recall at 3 of lists of 2"),
        ([[1, 2]], [1], (0,), "recall at 0"),
        ([[1.0, 2.0]], [1], (1,), "give integers"),
        ([[1, 2]], [-1], (1,), "query 0 has no true"),
        (np.zeros((0, 2), int), np.zeros(0, int), (1,), "give \\(q, K\\)"),
    ]:
        with pytest.raises(InputError, match=words):
            recall_at(found, truth, ks)
