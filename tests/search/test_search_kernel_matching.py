import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch.nn.functional import normalize

from remanence.errors import InputError
from remanence.search.kernel_descriptor import matching
from remanence.search.kernel_descriptor.matching import METHODS, match


def _random(count, dim, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator).to(dtype)


def _brute_force(first, second, method, limit):
    """Matches as a set of triples, from the whole matrix of distances."""
    distance = cdist(normalize(first.double(), dim=1), normalize(second.double(), dim=1))
    found = []
    for i, row in enumerate(distance):
        j = int(row.argmin())
        ratio = row[j] / np.sort(row)[1]
        if method != "ratio":
            column = distance[:, j]
            if column.argmin() != i:
                continue
            ratio = max(ratio, column[i] / np.sort(column)[1])
        if method == "mutual" or ratio <= limit:
            found.append((i, j, 1 - row[j] ** 2 / 2, ratio))
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", [(50, 70), (70, 50), (3, 2)])
def test_matches_are_those_of_brute_force(method, sizes, monkeypatch):
    monkeypatch.setattr(matching, "PAIRS", 300)  # several chunks
    first, second = _random(sizes[0], 5, 0), _random(sizes[1], 5, 1)
    found = match(first, second, method, ratio=0.8)
    wanted = _brute_force(first, second, method, 0.8)
    assert [tuple(pair) for pair in found.indices.tolist()] == [w[:2] for w in wanted]
    for values, place in ((found.similarity, 2), (found.ratio, 3)):
        assert values.tolist() == pytest.approx([w[place] for w in wanted], abs=1e-12)
    assert found.indices.dtype == torch.int64
    if sizes != (3, 2):
        assert len(wanted) > 5


def test_exchanging_the_sides_gives_the_same_mutual_matches():
    first, second = _random(80, 6, 0), _random(60, 6, 1)
    for method in ("mutual", "mutual+ratio"):
        one, other = match(first, second, method), match(second, first, method)
        order = other.indices[:, 1].argsort()
        assert torch.equal(one.indices, other.indices[order].flip(1))
        torch.testing.assert_close(one.ratio, other.ratio[order])


def test_a_threshold_keeps_the_most_similar():
    first, second = _random(80, 4, 0), _random(60, 4, 1)
    every = match(first, second, "mutual")
    some = match(first, second, "mutual", threshold=0.95)
    assert 0 < len(some.indices) < len(every.indices)
    assert torch.equal(some.indices, every.indices[every.similarity >= 0.95])


@pytest.mark.parametrize("method", METHODS)
def test_zero_vectors_take_no_part(method):
    first, second = _random(20, 6, 0), _random(20, 6, 1)
    wanted = match(first, second, method)
    blank = torch.zeros(1, 6, dtype=torch.float64)
    found = match(torch.cat([blank, first, blank]), torch.cat([blank, second]), method)
    assert torch.equal(found.indices, wanted.indices + 1)
    torch.testing.assert_close(found.ratio, wanted.ratio)
    assert len(match(torch.zeros(5, 6), torch.zeros(4, 6), method).indices) == 0


@pytest.mark.parametrize("method", METHODS)
def test_none_and_one(method):
    vectors = _random(3, 4, 0, torch.float32)
    for first, second in ((vectors[:0], vectors), (vectors, vectors[:0]), (vectors[:0],) * 2):
        found = match(first, second, method)
        assert found.indices.shape == (0, 2)
        assert found.ratio.shape == found.similarity.shape == (0,)
    one = match(vectors[:1], vectors[:1], method)
    assert one.indices.tolist() == [[0, 0]]
    assert one.ratio.tolist() == [0.0]  # no rival
    assert match(vectors, vectors[1:2], "mutual").indices.tolist() == [[1, 0]]


def test_equal_candidates_are_a_tie_that_the_first_wins_and_the_ratio_test_refuses():
    vectors = _random(1, 64, 3, torch.float32)
    second = torch.cat([_random(1, 64, 4, torch.float32), vectors, vectors])
    found = match(vectors, second, "mutual")
    assert found.indices.tolist() == [[0, 1]]
    assert found.ratio.tolist() == [1.0]
    assert len(match(vectors, second, "ratio").indices) == 0
    near = match(vectors + 1e-3, second, "ratio", ratio=1.0)
    assert near.ratio.tolist() == [1.0]


def test_the_ratio_is_exact_between_vectors_that_almost_agree():
    # In float32 a cosine cannot tell distances below 3e-4; differences can.
    first = torch.zeros(1, 8)
    first[0, 0] = 1
    second = first.repeat(2, 1)
    second[0, 1], second[1, 2] = 2e-5, 4e-5
    found = match(first, second, "ratio")
    assert found.indices.tolist() == [[0, 0]]
    assert float(found.ratio) == pytest.approx(0.5, rel=1e-3)


def test_lengths_and_half_precision_do_not_matter():
    first, second = _random(30, 16, 0, torch.float32), _random(30, 16, 1, torch.float32)
    wanted = match(first, second)
    assert torch.equal(match(3 * first, 0.1 * second).indices, wanted.indices)
    assert match(first.half(), second.half()).similarity.dtype == torch.float32


def test_memory_is_bounded():
    sizes = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    first, second = _random(6000, 2, 0), _random(5000, 2, 1)
    with Watched():
        match(first, second)
    assert max(sizes) <= matching.PAIRS < 6000 * 5000


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "nearest"}, "method 'nearest': give one of mutual, ratio"),
        ({"ratio": 0.0}, "ratio 0.0"),
        ({"ratio": float("nan")}, "ratio nan"),
        ({"threshold": 1.5}, "threshold 1.5"),
        ({"first": torch.ones(3)}, "shapes"),
        ({"first": torch.ones(3, 5)}, "shapes"),
        ({"first": torch.full((3, 4), torch.nan)}, "NaN"),
        ({"first": torch.ones(3, 4, dtype=torch.uint8)}, "uint8"),
    ],
)
def test_bad_input(changed, message):
    with pytest.raises(InputError, match=message):
        match(**({"first": torch.ones(3, 4), "second": torch.ones(2, 4)} | changed))
