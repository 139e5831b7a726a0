import math

import numpy as np
import pytest
import torch

from remanence.errors import InputError
from remanence.speech.abx import distances, pairs
from remanence.speech.abx.distances import check_features, frame_distances, frame_norms
from remanence.speech.abx.dtw import dtw, dtw_both_ways, wavefront
from remanence.speech.abx.pairs import Sequences, item_distances, mutual_distances


def reference(d):
    """The total of the best path over its length, by going back along it."""
    d = np.asarray(d, np.float32)
    cost = np.empty_like(d)
    for i in range(d.shape[0]):
        for j in range(d.shape[1]):
            before = [cost[i - 1, j - 1]] if i and j else []
            before += [cost[i, j - 1]] if j else []
            before += [cost[i - 1, j]] if i else []
            cost[i, j] = d[i, j] + min(before, default=np.float32(0))
    i, j, length = d.shape[0] - 1, d.shape[1] - 1, 1
    while i and j:
        diagonal, left, up = cost[i - 1, j - 1], cost[i, j - 1], cost[i - 1, j]
        if diagonal <= left and diagonal <= up:
            i, j = i - 1, j - 1
        elif left <= up:
            j -= 1
        else:
            i -= 1
        length += 1
    return cost[-1, -1] / np.float32(length + i + j)


def _both(distance, n, m):
    """By the compiled code and by torch, the same bits."""
    compiled, (forward, backward) = dtw(distance, n, m), dtw_both_ways(distance, n, m)
    assert torch.equal(compiled, forward)
    assert torch.equal(dtw(distance.mT, m, n), backward)
    return compiled


def _lengths(pairs, most, generator):
    return torch.randint(1, most + 1, (pairs,), generator=generator)


X = (
    [(0, 1), (0, 0), (1, 1)],
    [(0, 2), (0, 1), (1, 1), (-1, 0)],
    [(0, 0), (0, 1)],
)
Y = [(0, 1), (1, 2), (0, 0)]


@pytest.mark.parametrize(
    ("x", "wanted"),
    list(zip(X, (math.sqrt(2) / 2, 3 / 4, (2 + math.sqrt(2)) / 3), strict=True)),
)
def test_pairs_worked_out_by_hand(x, wanted):
    table = frame_distances(torch.tensor(x).float(), torch.tensor(Y).float(), "euclidean")
    result = _both(table[None], torch.tensor([len(x)]), torch.tensor([3]))
    assert result.item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("levels", [None, 2, 4])
def test_bits_are_those_of_the_reference_with_and_without_ties(levels):
    generator = torch.Generator().manual_seed(0)
    distance = torch.rand(150, 9, 11, generator=generator)
    if levels:
        distance = (distance * levels).floor() / levels
    n, m = _lengths(150, 9, generator), _lengths(150, 11, generator)
    result = _both(distance, n, m)
    wanted = [reference(d[:i, :j]) for d, i, j in zip(distance, n, m, strict=True)]
    assert result.numpy().tolist() == wanted


def test_padding_does_not_matter():
    generator = torch.Generator().manual_seed(1)
    distance = torch.rand(40, 7, 6, generator=generator)
    n, m = _lengths(40, 7, generator), _lengths(40, 6, generator)
    inside = (torch.arange(7)[:, None] < n[:, None, None]) & (torch.arange(6) < m[:, None, None])
    for filling in (0, math.inf, math.nan):
        padded = distance.where(inside, torch.tensor(float(filling)))
        assert torch.equal(_both(padded, n, m), _both(distance, n, m))


def test_constants_and_transposes():
    n = torch.tensor([5, 1, 3])
    assert _both(torch.full((3, 5, 5), 0.25), n, n.flip(0)).tolist() == [0.25] * 3
    distance = torch.rand(30, 6, 8, generator=torch.Generator().manual_seed(2))
    n, m = torch.full((30,), 6), torch.full((30,), 8)
    assert torch.equal(dtw(distance, n, m), dtw(distance.mT, m, n))
    assert len(dtw(torch.zeros(0, 3, 3), torch.zeros(0).long(), torch.zeros(0).long())) == 0


def test_wavefront_tells_of_ties():
    distance = torch.tensor([[[1.0, 0], [0, 0]], [[1, 0], [0.5, 0]]])  # C: 1 1 / 1 .
    distance[0, 0, 0] = 3
    two = torch.tensor([2, 2])
    assert not wavefront(distance, two, two)[1].any()  # the diagonal is best
    distance = torch.zeros(1, 3, 3)
    distance[0, 0] = torch.tensor([0.0, 5, 0])
    distance[0, 1] = torch.tensor([5.0, 9, -9])
    distance[0, 2] = torch.tensor([0.0, -9, 0])
    assert wavefront(distance, torch.tensor([3]), torch.tensor([3]))[1].all()


@pytest.mark.parametrize(
    ("n", "m"), [([0], [1]), ([3], [1]), ([1], [4]), ([1.0], [1]), ([1, 1], [1])]
)
def test_wrong_lengths_are_refused(n, m):
    with pytest.raises(InputError, match=r"lengths|dtw of"):
        dtw(torch.zeros(1, 2, 3), torch.tensor(n), torch.tensor(m))


def test_distances_of_frames():
    x = torch.tensor([[1.0, 0], [3, 4], [0, 0]])
    y = torch.tensor([[2.0, 2 * math.sqrt(3)], [0, 0], [-1, 0], [3, 4]])
    angular = frame_distances(x, y)
    assert angular[0].tolist() == pytest.approx([1 / 3, 1, 1, math.acos(0.6) / math.pi], abs=1e-6)
    assert angular[1, 3] == 0  # exactly
    assert angular[2].tolist() == [1, 0, 1, 1]
    assert angular[:, 1].tolist() == [1, 1, 0]
    cosine = frame_distances(x, y, "cosine")
    assert cosine[0].tolist() == pytest.approx([0.5, 1, 2, 0.4], abs=1e-6)
    assert cosine[2].tolist() == [1, 0, 1, 1]
    euclidean = frame_distances(x, y, "euclidean")
    assert euclidean[:, 3].tolist() == pytest.approx([math.sqrt(20), 0, 5], abs=1e-6)
    assert euclidean[1, 3] == 0
    ids = torch.tensor([[3, 1], [2, 1]])
    assert frame_distances(ids, ids, "identical").tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("scale", [1e-170, 1e-3, 1e170])
def test_norms_of_any_size(scale):
    frames = torch.tensor([[3.0, 4], [0, 0], [0, 1]]).double() * scale
    assert (frame_norms(frames) / scale).tolist() == pytest.approx([5, 0, 1])
    table = frame_distances(frames, frames)
    assert table[0].tolist() == pytest.approx([0, 1, math.acos(0.8) / math.pi], abs=1e-6)
    assert table[1].tolist() == [1, 0, 1]


def test_norms_are_taken_in_pieces():
    frames = torch.randn(1000, 7, generator=torch.Generator().manual_seed(0))
    frames[17] = 0
    wanted = frames.double().square().sum(1).sqrt()
    taken = []
    norm = torch.linalg.vector_norm

    def spy(x, **options):
        taken.append(len(x))
        return norm(x, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "PIECE", 700)
        patch.setattr(torch.linalg, "vector_norm", spy)
        found = frame_norms(frames)
    assert max(taken) == 100
    torch.testing.assert_close(found, wanted)
    assert found[17] == 0
    assert len(frame_norms(frames[:0])) == 0


def test_kullback_leibler():
    p, q = torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(0)).softmax(-1).double()
    wanted = np.array([[sum(p[i] * ((p[i] + 1e-6) / (q[j] + 1e-6)).log()) for j in range(5)]
                       for i in range(5)])  # fmt: skip
    back = np.array([[sum(q[j] * ((q[j] + 1e-6) / (p[i] + 1e-6)).log()) for j in range(5)]
                     for i in range(5)])  # fmt: skip
    np.testing.assert_allclose(frame_distances(p, q, "kl"), wanted, atol=1e-7)
    np.testing.assert_allclose(
        frame_distances(p, q, "kl_symmetric"), (wanted + back) / 2, atol=1e-7
    )
    assert frame_distances(p, p, "kl").diagonal().tolist() == [0] * 5


@pytest.mark.parametrize("distance", ["angular", "cosine", "euclidean", "kl_symmetric", "kl"])
def test_equal_frames_are_equally_far_wherever_they_lie(distance):
    generator = torch.Generator().manual_seed(0)
    book = torch.randn(7, 53, generator=generator).softmax(-1)
    first, second = (torch.randint(7, (n,), generator=generator) for n in (131, 257))
    table = frame_distances(book[first], book[second], distance)
    small = frame_distances(book, book, distance)
    assert torch.equal(table, small[first][:, second])
    if distance != "kl":
        assert torch.equal(small, small.T)


@pytest.mark.parametrize(
    ("frames", "distance", "message"),
    [
        (torch.ones(3, 2).long(), "angular", "give floats"),
        (torch.tensor([[0.0, math.nan]]), "angular", "NaN"),
        (torch.ones(3, 2, 2), "angular", "give \\(frames"),
        (torch.ones(3, 2), "kl", "probabilities"),
        (torch.tensor([[-0.5, 1.5]]), "kl_symmetric", "probabilities"),
        (torch.ones(3, 2), "manhattan", "unknown"),
    ],
)
def test_bad_frames_are_refused(frames, distance, message):
    with pytest.raises(InputError, match=message) as error:
        check_features({"a": frames}, distance)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("distance", ["identical", "euclidean"])
@pytest.mark.parametrize("table", [2**25, 500, 60])
def test_tables_of_items_are_those_of_single_pairs(distance, table, monkeypatch):
    for name in ("TABLE", "DEVICE_TABLE", "COLUMNS"):
        monkeypatch.setattr(pairs, name, table)
    generator = torch.Generator().manual_seed(3)
    length = torch.randint(1, 11, (40,), generator=generator).numpy()
    frames = torch.randint(4, (200, 1), generator=generator).double()  # many ties
    start = torch.randint(190, (40,), generator=generator).numpy()
    sequences = Sequences(frames, start, length)

    def single(i, j):
        x, y = (frames[start[k] : start[k] + length[k]] for k in (i, j))
        return reference(frame_distances(x, y, distance))

    wanted = np.array([[single(i, j) for j in range(40)] for i in range(40)])
    items = np.arange(40)
    assert (wanted != wanted.T).any()  # ties make a difference
    np.testing.assert_array_equal(mutual_distances(sequences, items, distance), wanted)
    rows, columns = items[::3], items[5:]
    for padded in (False, True):
        if padded:
            monkeypatch.setattr(pairs, "_align_compiled", pairs._align_padded)
        ahead, back = item_distances(sequences, rows, columns, distance, both=True)
        np.testing.assert_array_equal(ahead, wanted[np.ix_(rows, columns)])
        np.testing.assert_array_equal(back, wanted[np.ix_(columns, rows)].T)


@pytest.mark.parametrize("way", ["_align_compiled", "_align_padded"])
def test_one_long_item_against_many_is_taken_in_pieces(way, monkeypatch):
    for name in ("TABLE", "DEVICE_TABLE", "COLUMNS"):
        monkeypatch.setattr(pairs, name, 1000)
    if way == "_align_padded":
        monkeypatch.setattr(pairs, "_align_compiled", pairs._align_padded)
    sizes = []
    distances_of = Sequences.distances

    def spy(self, rows, columns, distance):
        sizes.append(len(rows) * len(columns))
        return distances_of(self, rows, columns, distance)

    monkeypatch.setattr(Sequences, "distances", spy)
    length = np.full(60, 20)
    frames = torch.randn(1200, 3, generator=torch.Generator().manual_seed(0))
    sequences = Sequences(frames, np.arange(60) * 20, length)
    found, _ = item_distances(sequences, np.arange(1), np.arange(60), "euclidean", both=False)
    assert max(sizes) <= 6400  # one row of sixteen items
    assert found.shape == (1, 60)
    mutual = mutual_distances(sequences, np.arange(60), "euclidean")
    assert max(sizes) <= 6400
    assert np.array_equal(mutual[0], found[0])
