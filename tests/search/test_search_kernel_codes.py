import faiss
import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from remanence.errors import InputError
from remanence.search.kernel_descriptor.codes import code_loss
from remanence.search.kernel_descriptor.evaluation import matching_map


def _views(count, dim=32, seed=0, noise=0.5):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(count, dim, generator=generator)
    return [
        normalize(base + noise * torch.randn(count, dim, generator=generator)) for _ in range(2)
    ]


@pytest.fixture(scope="module")
def views():
    return _views(400, seed=1)


@pytest.fixture(scope="module")
def train():
    return _views(1000, seed=2)[0]


def test_the_first_row_is_that_of_the_descriptors(train, views):
    (row,) = code_loss(train, *views, keys=())
    assert (row.key, row.bytes) == ("float", 128)
    assert row.matching_map == pytest.approx(matching_map(*views))


def test_fewer_bytes_lose_more_and_chance_is_far(train, views):
    rows = code_loss(train, *views, keys=("PQ16x8", "PQ8x8", "PQ4x8", "ITQ32,LSH"))
    assert [row.bytes for row in rows] == [128, 16, 8, 4, 4]
    precision = [row.matching_map for row in rows[:4]]
    assert precision == sorted(precision, reverse=True)
    assert precision[1] > precision[3] + 0.05
    assert [row.fpr95 for row in rows[:4]] == sorted(row.fpr95 for row in rows[:4])
    assert min(row.matching_map for row in rows) > 0.1


@pytest.mark.parametrize("key", ["PQ8x8", "LSH"])
def test_answers_are_those_of_the_index(key, train, views):
    """Hamming distances tie, and a tie counts as wrong: the index's own answers bound those."""
    first, second = (v.numpy() for v in views)
    index = faiss.index_factory(32, key)
    if key.startswith("PQ"):
        index.do_polysemous_training = False  # slow, and changes no distance
    index.train(train.numpy())
    index.add(second)
    distance, nearest = index.search(first, 2)
    right = (nearest[:, 0] == np.arange(400)) & (distance[:, 0] < distance[:, 1])
    order = np.argsort(distance[:, 0], kind="stable")
    precision = np.cumsum(right[order]) / np.arange(1, 401)
    wanted = (precision * right[order]).sum() / 400
    row = code_loss(train, *views, keys=(key,))[1]
    # Answers of one distance come in any order here, and at once in the measure.
    assert row.matching_map == pytest.approx(wanted, abs=1e-4 if key == "PQ8x8" else 0.02)


def test_the_pairs_are_the_same_for_a_seed(train, views):
    one, other, third = (code_loss(train, *views, keys=("PQ4x8",), seed=s) for s in (0, 0, 1))
    assert one == other
    assert one[1].matching_map == third[1].matching_map


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"second": torch.ones(3, 32)}, "rows match"),
        ({"train": torch.ones(100, 32)}, "at least 256"),
        ({"train": torch.ones(300, 16)}, "of length 32"),
        ({"keys": ("PQ5x8",)}, "faiss makes no code 'PQ5x8'"),
        ({"keys": ("nonsense",)}, "faiss makes no code 'nonsense'"),
    ],
)
def test_bad_input(changed, message, train, views):
    given = {"train": train, "first": views[0], "second": views[1]} | changed
    with pytest.raises(InputError, match=message):
        code_loss(**given)
