"""The index of codes against brute force over decoded vectors, and its files against damage."""

import hashlib
import json
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from remanence.errors import InputError
from remanence.search.index import file as file_module
from remanence.search.index import scan as scan_module
from remanence.search.index import storage as storage_module
from remanence.search.index import topk
from remanence.search.index.spread import Kind, SpreadIndex
from remanence.search.lattice.code import SphericalCode
from remanence.search.lattice.gosset import E8Shell
from remanence.search.lattice.sign import SignCode
from remanence.search.lattice.sphere import SphereLattice

CODES = [
    SphereLattice(24, 79),  # 64 bits, half of the codes above 2^63
    SphereLattice(24, 3),  # 14 bits
    SphereLattice(40, 7),  # 32 bits
    SphereLattice(16, 21),
    SphereLattice(48, 30),  # 79 bits
    E8Shell(3),
    SignCode(32),
    SignCode(20),
    SignCode(72),
]
STORAGES: list[Kind] = ["codes", "int8"]


class Projection:
    """Onto the first directions of a random basis; in float64, so that batches do not matter."""

    def __init__(self, in_dim: int, out_dim: int, seed: int = 0) -> None:
        self.in_dim, self.out_dim = in_dim, out_dim
        basis = torch.randn(in_dim, in_dim, generator=torch.Generator().manual_seed(seed))
        self.weights = torch.linalg.qr(basis.double()).Q[:, :out_dim]
        self.digest = hashlib.sha256(self.weights.numpy().tobytes()).hexdigest()

    def embed(self, x: Tensor) -> Tensor:
        return normalize(x.double() @ self.weights, dim=1).float()


def drawn(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def made(
    code: SphericalCode, n: int = 1500, storage: Kind = "codes", nlist: int = 0, seed: int = 1
) -> tuple[SpreadIndex, Tensor]:
    """Return an index of n vectors, and the vectors."""
    transform = Projection(code.dim + 8, code.dim)
    index = SpreadIndex(transform, code, storage=storage, nlist=nlist)
    x = drawn(n, code.dim + 8, seed)
    if nlist:
        index.train(x)
    index.add(x)
    return index, x


def brute(
    index: SpreadIndex, x: Tensor, ids: Tensor, queries: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Rank decoded vectors in float64, of equal ones the smaller id first."""
    code = index.code
    points = code.quantize(index.transform.embed(x)).double()
    # One product at a time, in order: equal points get equal scores.
    q = index.transform.embed(queries).double()
    scores = torch.zeros(len(q), len(x), dtype=torch.float64)
    for i in range(code.dim):
        scores += q[:, i, None] * points[:, i]
    by_id = ids.argsort()
    order = by_id[scores[:, by_id].argsort(dim=1, descending=True, stable=True)][:, :k]
    return (scores.gather(1, order) / code.r2**0.5).float(), ids[order]


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("code", CODES, ids=lambda code: f"{type(code).__name__}{code.dim}")
def test_search_is_brute_force_over_decoded_vectors(code: SphericalCode, storage: Kind) -> None:
    index, x = made(code, storage=storage)
    queries = drawn(40, code.dim + 8, 2)
    wanted = brute(index, x, torch.arange(len(x)), queries, 10)
    for part in (slice(0, 40), slice(0, 1), slice(3, 5)):
        assert same(index.search(queries[part], 10), (wanted[0][part], wanted[1][part]))
    assert wanted[0].dtype == torch.float32
    assert index.nbytes == len(x) * (code.nbytes if storage == "codes" else code.dim)


def test_order_by_score_is_order_by_distance() -> None:
    index, _ = made(CODES[0])
    queries = drawn(5, 32, 2)
    scores, ids = index.search(queries, 20)
    units = index.reconstruct(ids.flatten()).view(5, 20, 24)
    gaps = (index.transform.embed(queries)[:, None] - units).double().square().sum(2)
    assert torch.allclose(gaps, 2 - 2 * scores.double(), atol=1e-6)
    assert bool((gaps.diff(dim=1) > -1e-9).all())


@pytest.mark.parametrize("storage", STORAGES)
def test_equal_scores_come_by_id_in_any_blocks(
    storage: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = SphereLattice(8, 2)  # 112 points: each score many times
    transform = Projection(16, 8)
    x, queries = drawn(900, 16, 1), drawn(30, 16, 2)
    ids = torch.randperm(5000, generator=torch.Generator().manual_seed(0))[:900]
    index = SpreadIndex(transform, code, storage=storage, nlist=7)
    index.train(x)
    index.add(x, ids)
    wanted = brute(index, x, ids, queries, 37)
    assert same(index.search(queries, 37, nprobe=7), wanted)
    index._lists, index.nlist = None, 0
    for chunk, scores, fewest in ((2**16, 2**19, 2**13), (100, 64, 1), (333, 1000, 70)):
        monkeypatch.setattr(storage_module, "CHUNK", chunk)
        monkeypatch.setattr(topk, "SCORES", scores)
        monkeypatch.setattr(topk, "FEWEST", fewest)
        assert same(index.search(queries, 37), wanted)
        for i in range(3):
            found = index.search(queries[i : i + 1], 37)
            assert same(found, (wanted[0][i : i + 1], wanted[1][i : i + 1]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 400), st.integers(1, 60), st.integers(1, 70))
def test_the_best_k_of_any_points(seed: int, n: int, k: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    queries = torch.from_numpy(rng.standard_normal((3, 5)).astype(np.float32))
    points = torch.from_numpy(rng.integers(-2, 3, (n, 5)).astype(np.int8))
    ids = torch.from_numpy(rng.permutation(1000)[:n])
    top = topk.TopK(queries, min(k, n), 2.0)
    for start in range(0, n, block):
        top.offer(points[start : start + block], ids[start : start + block])
    scores, found = top.result(k)
    for i in range(3):
        exact = [
            sum(float(a) * float(b) for a, b in zip(queries[i], p, strict=True)) for p in points
        ]
        order = sorted(range(n), key=lambda j: (-exact[j], int(ids[j])))[:k]
        assert found[i, : len(order)].tolist() == [int(ids[j]) for j in order]
        assert scores[i, : len(order)].tolist() == [np.float32(exact[j] / 2) for j in order]
        assert bool((found[i, len(order) :] == -1).all())


def test_what_float32_confuses_is_told_apart() -> None:
    # Products with points of one sum differ by less than float32 rounds sums of this size.
    rng = np.random.default_rng(0)
    queries = torch.from_numpy((1 + 1e-6 * rng.standard_normal((4, 24))).astype(np.float32))
    points = torch.from_numpy(np.repeat([1, 3, 7], 8).astype(np.int8))
    points = torch.stack([points[rng.permutation(24)] for _ in range(3000)])
    exact = torch.zeros(4, 3000, dtype=torch.float64)
    for i in range(24):
        exact += queries[:, i, None].double() * points[:, i]
    wanted = exact.argsort(dim=1, descending=True, stable=True)[:, :5]
    confused = (queries @ points.float().T).argsort(dim=1, descending=True, stable=True)[:, :5]
    assert not torch.equal(confused, wanted)
    top = topk.TopK(queries, 5, 20.0)
    top.offer(points, torch.arange(3000))
    assert torch.equal(top.result(5)[1], wanted)


def test_the_quick_scan_of_few_queries_is_certain_or_left(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    quick = scan_module._scan_by_faiss

    def spy(*args: object) -> Tensor:
        found = quick(*args)  # type: ignore[arg-type]
        left.append(len(found))
        return found

    monkeypatch.setattr(scan_module, "_scan_by_faiss", spy)
    index, x = made(CODES[0], storage="int8")
    queries = drawn(2, 32, 2)
    assert same(index.search(queries, 10), brute(index, x, torch.arange(len(x)), queries, 10))
    index, x = made(SphereLattice(8, 1), storage="int8")  # 16 points, so that ties are long
    queries = drawn(2, 16, 2)
    assert same(index.search(queries, 10), brute(index, x, torch.arange(len(x)), queries, 10))
    assert left == [0, 2]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("nlist", [0, 16])
def test_adding_in_chunks_changes_nothing(
    storage: Kind, nlist: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, x = made(CODES[0], storage=storage, nlist=nlist)
    monkeypatch.setattr("remanence.search.index.spread.CHUNK", 97)
    parts = SpreadIndex(whole.transform, whole.code, storage=storage, nlist=nlist)
    if nlist:
        parts.train(x)
    for part in x.chunk(10):
        parts.add(part)
    assert len(parts) == len(whole) == 1500
    assert torch.equal(parts._rows.all_codes(), whole._rows.all_codes())
    queries = drawn(9, 32, 2)
    assert same(parts.search(queries, 10), whole.search(queries, 10))


@pytest.mark.parametrize("storage", STORAGES)
def test_all_lists_are_the_flat_index_and_few_are_their_rows(storage: Kind) -> None:
    index, x = made(CODES[0], 3000, storage, nlist=32)
    queries = drawn(50, 32, 2)
    wanted = brute(index, x, torch.arange(3000), queries, 10)
    assert same(index.search(queries, 10, nprobe=32), wanted)
    lists = index._lists
    assert lists is not None
    embedded = index.transform.embed(queries)
    units = index.reconstruct(torch.arange(3000))
    assert np.array_equal(lists.numbers, (units @ lists.centroids.T).argmax(1).numpy())
    near = (embedded @ lists.centroids.T).topk(6).indices
    scores, ids = index.search(queries, 10)  # the square root of 32, rounded up
    alone = torch.cat([index.search(q[None], 10)[1] for q in queries])
    assert torch.equal(ids, alone)
    for i in range(50):
        inside = torch.isin(torch.from_numpy(lists.numbers.astype(np.int64)), near[i])
        rows = inside.nonzero()[:, 0]
        best = brute(index, x[rows], rows, queries[i : i + 1], 10)
        assert same((scores[i : i + 1], ids[i : i + 1]), best)
    found = (ids[:, :1] == wanted[1][:, :1]).float().mean()
    assert 0.3 < found < 1  # a sixth of the lists finds more than a sixth, and not all


@pytest.mark.parametrize("storage", STORAGES)
def test_more_results_than_vectors_are_padded(storage: Kind) -> None:
    index, x = made(CODES[0], 5, storage)
    queries = drawn(4, 32, 2)
    scores, ids = index.search(queries, 8)
    assert scores.shape == ids.shape == (4, 8)
    assert same((scores[:, :5], ids[:, :5]), brute(index, x, torch.arange(5), queries, 5))
    assert bool((scores[:, 5:] == -torch.inf).all())
    assert bool((ids[:, 5:] == -1).all())
    empty = SpreadIndex(index.transform, index.code, storage=storage)
    scores, ids = empty.search(queries, 3)
    assert scores.tolist() == [[-float("inf")] * 3] * 4
    assert ids.tolist() == [[-1] * 3] * 4
    assert index.search(queries[:0], 3)[0].shape == (0, 3)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("nlist", [0, 16])
def test_remove_keeps_the_ids_of_the_others(storage: Kind, nlist: int) -> None:
    index, x = made(CODES[0], storage=storage, nlist=nlist)
    queries = drawn(9, 32, 2)
    assert index.remove(torch.tensor([-1, 1500, 9000])) == 0
    assert index._ids.explicit is None
    gone = torch.cat([torch.arange(0, 1500, 3), torch.tensor([0, 3, 7777])])
    assert index.remove(gone) == 500
    left = torch.tensor([i for i in range(1500) if i % 3])
    assert torch.equal(index.ids, left)
    wanted = brute(index, x[left], left, queries, 10)
    assert same(index.search(queries, 10, nprobe=nlist or None), wanted)
    again = drawn(2, 32, 5)
    index.add(again)
    assert index.ids[-2:].tolist() == [1500, 1501]
    units = index.reconstruct(torch.tensor([1501, 1]))
    direct = index.code.decode(
        index.code.encode(index.transform.embed(torch.stack([again[1], x[1]])))
    )
    assert torch.equal(units, direct)
    assert index.remove(index.ids) == 1002
    assert len(index) == index.nbytes == 0
    index.add(again[:1])
    assert index.ids.tolist() == [1502]  # an id is not used again by itself


def test_ids_that_number_on_cost_nothing_and_others_are_kept() -> None:
    index, x = made(CODES[0], 20)
    assert index._ids.explicit is None
    index.add(drawn(2, 32, 3), torch.tensor([2**62, 40]))
    assert index.ids[-2:].tolist() == [2**62, 40]
    index.add(drawn(1, 32, 4))
    assert index.ids[-1] == 2**62 + 1
    assert index.search(x[3:4], 1)[1].item() == 3


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("nlist", [0, 16])
def test_merge_is_adding(storage: Kind, nlist: int) -> None:
    whole, x = made(CODES[0], storage=storage, nlist=nlist)
    first = SpreadIndex(whole.transform, whole.code, storage=storage, nlist=nlist)
    if nlist:
        first.train(x)
    second = SpreadIndex(whole.transform, whole.code, storage="codes")
    first.add(x[:700])
    second.add(x[700:], torch.arange(700, 1500))
    first.merge(second)
    queries = drawn(9, 32, 2)
    assert same(first.search(queries, 10), whole.search(queries, 10))
    assert first._ids.explicit is None
    with pytest.raises(InputError, match="id 700 would be there twice"):
        first.merge(second)
    assert len(first) == 1500
    foreign = SpreadIndex(Projection(32, 24, seed=1), whole.code)
    with pytest.raises(
        InputError, match=f"{foreign.transform.digest[:12]}.*{whole.transform.digest[:12]}"
    ):
        first.merge(foreign)
    with pytest.raises(InputError, match="does not go into one of"):
        first.merge(SpreadIndex(whole.transform, SphereLattice(24, 10)))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("nlist", [0, 16])
@pytest.mark.parametrize("code", CODES, ids=lambda code: f"{type(code).__name__}{code.dim}")
def test_save_and_load_preserve(
    code: SphericalCode, storage: Kind, nlist: int, tmp_path: Path
) -> None:
    index, _ = made(code, 600, storage, nlist)
    queries = drawn(9, code.dim + 8, 2)
    path = tmp_path / "x.index"
    index.save(path)
    tensors = -(-600 * code.bits // 8) + nlist * (code.dim * 4) + (1200 if nlist else 0)
    assert tensors < path.stat().st_size < tensors + 2048
    loaded = SpreadIndex.load(path, index.transform)
    assert (loaded.storage, loaded.nlist, len(loaded)) == (storage, nlist, 600)
    assert same(loaded.search(queries, 10), index.search(queries, 10))
    index.remove(torch.arange(0, 600, 2))
    index.save(path)
    loaded = SpreadIndex.load(path, index.transform)
    assert torch.equal(loaded.ids, torch.arange(1, 600, 2))
    assert same(loaded.search(queries, 10), index.search(queries, 10))
    loaded.add(drawn(1, code.dim + 8))
    assert loaded.ids[-1] == 600
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.index"]


def test_a_million_codes_of_8_bytes_are_a_file_of_8_megabytes(tmp_path: Path) -> None:
    code, path = CODES[0], tmp_path / "x.index"
    header = file_module.Header(
        "ab" * 32, 128, file_module.describe(code), "codes", 10**6, code.bits, 0, 0, 10**6
    )
    file_module.write(path, header, {"codes": torch.zeros(10**6, 8, dtype=torch.uint8)})
    assert 8_000_000 < path.stat().st_size < 8_002_048


@pytest.mark.parametrize(
    ("code", "n", "size"), [(SphereLattice(24, 3), 1001, 1752), (SphereLattice(40, 2), 999, 1499)]
)
def test_bits_that_a_code_lacks_are_not_stored(
    code: SphericalCode, n: int, size: int, tmp_path: Path
) -> None:
    index, _ = made(code, n)
    index.save(tmp_path / "x")
    with safe_open(tmp_path / "x", "pt") as opened:
        assert opened.get_tensor("codes").shape == (
            size,
        )  # ceil(14 * 1001 / 8), ceil(12 * 999 / 8)
    loaded = SpreadIndex.load(tmp_path / "x", index.transform)
    assert torch.equal(loaded._rows.all_codes(), index._rows.all_codes())


def test_codes_of_31_bits(tmp_path: Path) -> None:
    code = SphereLattice.from_bits(20, 31)
    assert code.bits == 31
    index, _ = made(code, 1001)
    index.save(tmp_path / "x")
    size = (tmp_path / "x").stat().st_size
    assert -(-1001 * 31 // 8) < size < -(-1001 * 31 // 8) + 2048
    loaded = SpreadIndex.load(tmp_path / "x", index.transform)
    assert torch.equal(loaded._rows.all_codes(), index._rows.all_codes())


def test_an_empty_and_an_untrained_index_are_saved(tmp_path: Path) -> None:
    for nlist in (0, 4):
        index = SpreadIndex(Projection(32, 24), CODES[0], nlist=nlist, seed=7)
        index.save(tmp_path / "x")
        loaded = SpreadIndex.load(tmp_path / "x", index.transform)
        assert (len(loaded), loaded.nlist, loaded.seed) == (0, nlist, 7)


def rewritten(path: Path, *, seal: bool = True, **changes: object) -> None:
    """Change tensors or header fields of a file, with a new checksum unless `seal` is False."""
    with safe_open(path, "pt") as opened:
        fields = json.loads(opened.metadata()[file_module.KEY])
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 - no dict
    for name, value in changes.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            fields[name] = value
    checksum = fields.pop("sha256")
    if seal:
        checksum = file_module._checksum(fields, tensors)
    save_file(tensors, path, metadata={file_module.KEY: json.dumps(fields | {"sha256": checksum})})


DAMAGE: dict[str, tuple[dict[str, object], str]] = {
    "version": ({"version": 2}, "has version 2 and this library reads 1"),
    "a field more": ({"mode": 2}, "no index, or damaged"),
    "dimension of vectors": ({"in_dim": 31}, "does not fit"),
    "count": ({"count": 601}, "other tensors"),
    "negative count": ({"count": -1}, "does not fit"),
    "count no number": ({"count": "600"}, "does not fit"),
    "bits": ({"bits": 63}, "does not fit"),
    "code no dictionary": ({"code": 3}, "does not fit"),
    "unknown code": ({"code": {"kind": "Mesh", "dim": 24, "r2": 79}}, "does not fit"),
    "code of another dimension": (
        {"code": {"kind": "SphereLattice", "dim": 9999, "r2": 79}},
        "does not fit",
    ),
    "empty shell": ({"code": {"kind": "SphereLattice", "dim": 24, "r2": -1}}, "does not fit"),
    "storage": ({"storage": "float"}, "does not fit"),
    "a code not below nv": (
        {"codes": torch.full((600, 8), 255, dtype=torch.uint8)},
        "code 0 is not below",
    ),
    "codes of another type": ({"codes": torch.zeros(600, 8, dtype=torch.int8)}, "other tensors"),
    "a tensor more": ({"more": torch.zeros(1)}, "other tensors"),
    "negative id": ({"ids": torch.arange(-1, 599)}, "ids from -1"),
    "an id twice": ({"ids": torch.zeros(600, dtype=torch.int64)}, "id 0 would be there twice"),
    "list out of range": (
        {"lists": torch.full((600,), 16, dtype=torch.uint16)},
        "none of its 16 lists",
    ),
    "centroid": ({"centroids": torch.full((16, 24), torch.nan)}, "centroids hold NaN"),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_is_not_right_is_refused(name: str, storage: Kind, tmp_path: Path) -> None:
    index, _ = made(CODES[0], 600, storage, nlist=16)
    path = tmp_path / "x"
    index.save(path)
    changes, message = DAMAGE[name]
    rewritten(path, **changes)
    with pytest.raises(InputError, match=message) as error:
        SpreadIndex.load(path, index.transform)
    assert "\n" not in str(error.value)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    index, _ = made(CODES[0], 600)
    path = tmp_path / "x"
    index.save(path)
    whole = path.read_bytes()
    for length in (0, 5, 8, 300, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="no index, or damaged"):
            SpreadIndex.load(path, index.transform)
    path.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])
    with pytest.raises(InputError, match="edited or damaged"):
        SpreadIndex.load(path, index.transform)
    path.write_bytes(whole)
    rewritten(path, seal=False, following=7)
    with pytest.raises(InputError, match="edited or damaged"):
        SpreadIndex.load(path, index.transform)
    save_file({"codes": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="no index"):
        SpreadIndex.load(path, index.transform)
    torch.save({"codes": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="no index"):
        SpreadIndex.load(path, index.transform)
    with pytest.raises(InputError, match="there is no index"):
        SpreadIndex.load(tmp_path / "y", index.transform)
    with pytest.raises(InputError, match="cannot be written"):
        index.save(tmp_path / "no" / "y")


def test_another_transform_is_refused_and_both_are_named(tmp_path: Path) -> None:
    index, _ = made(CODES[0], 10)
    index.save(tmp_path / "x")
    other = Projection(32, 24, seed=5)
    with pytest.raises(
        InputError, match=f"{index.transform.digest[:12]}, not with {other.digest[:12]}"
    ):
        SpreadIndex.load(tmp_path / "x", other)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, x = made(CODES[0], 10)
    index.save(tmp_path / "x")
    before = (tmp_path / "x").read_bytes()

    def full(_tensors: object, part: Path, **_: object) -> None:
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_module, "save_file", full)
    index.add(x)
    with pytest.raises(InputError, match="No space left"):
        index.save(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_decoding_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage_module, "CHUNK", 100)
    for name in ("spread", "scan", "export"):
        monkeypatch.setattr(f"remanence.search.index.{name}.CHUNK", 100)
    monkeypatch.setattr(topk, "SCORES", 640)
    monkeypatch.setattr(topk, "FEWEST", 64)
    code = SphereLattice(24, 79)
    sizes: list[int] = []
    for name in ("quantize", "rank", "unrank"):
        method = getattr(code, name)
        monkeypatch.setattr(code, name, lambda x, m=method: (sizes.append(len(x)), m(x))[1])
    scored: list[int] = []
    offer = topk.TopK.offer_scored
    monkeypatch.setattr(
        topk.TopK,
        "offer_scored",
        lambda self, scores, *rest: (scored.append(scores.numel()), offer(self, scores, *rest)),
    )
    for storage in STORAGES:
        for nlist in (0, 2):
            index, x = made(code, 500, storage, nlist)
            index.search(x, 10)
            index.search(x[:1], 10)
            index.reconstruct(index.ids)
            index.save(tmp_path / "x")
            SpreadIndex.load(tmp_path / "x", index.transform)
            index.to_faiss()
    assert max(sizes) == 100
    assert max(scored) <= 640


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("code", [CODES[0], CODES[3], CODES[6]], ids=lambda code: str(code.dim))
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("nlist", [0, 16])
def test_faiss_gives_the_same_scores(
    code: SphericalCode, storage: Kind, nlist: int, explicit: bool, tmp_path: Path
) -> None:
    index, _ = made(code, 2000, storage, nlist)
    if explicit:
        index.remove(torch.arange(0, 2000, 5))
    queries = drawn(20, code.dim + 8, 2)
    exported = index.to_faiss()
    faiss.write_index(exported, str(tmp_path / "x.faiss"))
    embedded = index.transform.embed(queries).numpy()
    for peer in (exported, faiss.read_index(str(tmp_path / "x.faiss"))):
        for nprobe in {nlist, 4} if nlist else {0}:
            if nlist:
                faiss.extract_index_ivf(peer).nprobe = nprobe
            scores, ids = index.search(queries, 30, nprobe=nprobe or None)
            theirs, names = peer.search(embedded, 30)
            assert np.allclose(theirs, scores.numpy(), atol=2e-6)
            alike = names == ids.numpy()
            # Where ids differ, neighbours in the list have equal scores.
            assert alike.mean() > (0.5 if isinstance(code, SignCode) else 0.99)
            units = index.reconstruct(torch.from_numpy(names.ravel())).view(20, 30, -1)
            mine = (units * torch.from_numpy(embedded)[:, None]).sum(2)
            assert np.allclose(mine.numpy(), theirs, atol=2e-6)
    if nlist:
        assert faiss.extract_index_ivf(index.to_faiss()).nprobe == 4


@pytest.mark.parametrize("explicit", [False, True])
def test_the_faiss_graph_finds_nearly_all(explicit: bool, tmp_path: Path) -> None:
    index, _ = made(CODES[0], 2000)
    if explicit:
        index.remove(torch.arange(0, 2000, 5))
    queries = drawn(50, 32, 2)
    graph = index.to_faiss(hnsw=16)
    faiss.write_index(graph, str(tmp_path / "x.faiss"))
    peer = faiss.read_index(str(tmp_path / "x.faiss"))
    scores, ids = index.search(queries, 1)
    parameters = faiss.SearchParametersHNSW(efSearch=200)
    embedded = index.transform.embed(queries).numpy()
    theirs, names = peer.search(embedded, 1, params=parameters)
    alike = names == ids.numpy()
    assert alike.mean() > 0.9
    assert np.allclose(theirs[alike], scores.numpy()[alike], atol=2e-6)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dim", [16, 20, 64, 72])
@pytest.mark.parametrize("shuffled", [False, True])
def test_symmetric_search_is_hamming(
    dim: int, storage: Kind, shuffled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remanence.search.index.hamming.CHUNK", 130)
    index = SpreadIndex(Projection(dim + 8, dim), SignCode(dim), storage=storage)
    x, queries = drawn(400, dim + 8, 1), drawn(12, dim + 8, 2)
    ids = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    index.add(x, ids if shuffled else None)
    ids = ids if shuffled else torch.arange(400)
    signs = index.transform.embed(x) < 0
    differ = ((index.transform.embed(queries) < 0)[:, None] != signs).sum(2)
    by_id = ids.argsort()
    order = by_id[differ[:, by_id].argsort(dim=1, stable=True)][:, :50]
    scores, found = index.search(queries, 50, symmetric=True)
    assert torch.equal(found, ids[order])
    assert torch.equal(scores, 1 - 2 * differ.gather(1, order) / dim)
    scores, found = index.search(queries, 401, symmetric=True)
    assert bool((found[:, 400] == -1).all())
    assert bool((scores[:, 400] == -torch.inf).all())
    peer = index.to_faiss(symmetric=True)
    codes = index.code.encode(index.transform.embed(queries)).numpy()
    distances, names = peer.search(codes, 50)
    assert np.array_equal(distances, differ.gather(1, order).numpy())
    place = torch.empty(400, dtype=torch.long).scatter_(0, ids, torch.arange(400))
    assert np.array_equal(differ.gather(1, place[torch.from_numpy(names)]).numpy(), distances)


def test_errors_name_the_thing_and_leave_the_index_as_it_was() -> None:
    index, x = made(CODES[0], 20)

    def refused(call: object, message: str) -> None:
        with pytest.raises(InputError, match=message) as error:
            call()  # type: ignore[operator]
        assert "\n" not in str(error.value)
        assert len(index) == 20

    refused(lambda: index.add(drawn(3, 31)), r"\(3, 31\).*32")
    refused(lambda: index.search(drawn(3, 24), 1), r"\(3, 24\).*32")
    refused(lambda: index.add(x[0]), r"\(32,\)")
    refused(lambda: index.add(x.bool()), "bool")
    refused(lambda: index.search(x, 0), "k 0")
    refused(lambda: index.search(x, 1, nprobe=1), "nprobe 1 without")
    refused(lambda: index.search(x, 1, symmetric=True), "binary codes")
    refused(lambda: index.add(x[:2], torch.tensor([30, 30])), "id 30 would be there twice")
    refused(lambda: index.add(x[:2], torch.tensor([30, 4])), "id 4 would be there twice")
    refused(lambda: index.add(x[:2], torch.tensor([30, -4])), "ids from -4 to 30")
    refused(lambda: index.add(x[:2], torch.tensor([2**63 - 1, 30])), "give 0 to")
    refused(lambda: index.add(x[:2], torch.tensor([30])), r"\(1,\) for 2 vectors")
    refused(lambda: index.add(x[:2], torch.tensor([30.0, 31.0])), "float32")
    refused(lambda: index.remove(torch.tensor([1.0])), "int64")
    refused(lambda: index.reconstruct(torch.tensor([3, 99])), "no id 99")
    refused(lambda: index.train(x), "has no lists")
    refused(lambda: index.to_faiss(hnsw=1), "hnsw 1")
    refused(lambda: index.to_faiss(symmetric=True), "SignCode")
    refused(lambda: SpreadIndex(index.transform, CODES[3]), "dimension 16 for a transform to 24")
    refused(lambda: SpreadIndex(index.transform, CODES[0], nlist=-1), "nlist -1")
    refused(lambda: SpreadIndex(index.transform, CODES[0], storage="int4"), "storage 'int4'")  # type: ignore[arg-type]

    fresh = SpreadIndex(index.transform, CODES[0], nlist=4)
    refused(lambda: fresh.add(x), "call train first")
    refused(lambda: fresh.search(x, 1), "call train first")
    refused(fresh.to_faiss, "call train first")
    refused(lambda: fresh.train(x[:3]), "3 vectors to train 4 lists")
    fresh.train(x)
    fresh.add(x)
    refused(lambda: fresh.search(x, 1, nprobe=0), "nprobe 0: give 1 to 4")
    refused(lambda: fresh.search(x, 1, nprobe=5), "nprobe 5: give 1 to 4")
    refused(lambda: fresh.train(x), "vectors already")


def test_the_row_of_a_nan_is_counted_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remanence.search.index.spread.CHUNK", 7)
    index, x = made(CODES[0], 20)
    for value in (torch.nan, torch.inf):
        bad = x.clone()
        bad[16, 3] = value
        with pytest.raises(InputError, match="row 16 holds NaN or infinity"):
            index.add(bad)
        with pytest.raises(InputError, match="row 16 holds NaN or infinity"):
            index.search(bad, 3)
        with pytest.raises(InputError, match="row 16 holds NaN or infinity"):
            SpreadIndex(index.transform, index.code, nlist=2).train(bad)
    assert len(index) == 20


def test_integers_are_vectors_too() -> None:
    index, _ = made(CODES[0], 20)
    x = torch.randint(
        0, 256, (30, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    index.add(x)
    assert index.search(x, 1)[1][:, 0].tolist() == list(range(20, 50))


def test_a_transform_that_breaks_its_word_is_named() -> None:
    class Half(Projection):
        def embed(self, x: Tensor) -> Tensor:
            return super().embed(x).half()

    index = SpreadIndex(Half(32, 24), CODES[0])
    with pytest.raises(InputError, match=r"the transform returned torch\.float16"):
        index.add(drawn(3, 32))
