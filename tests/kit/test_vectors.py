import io
import pickle
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from remanence.errors import InputError
from remanence.kit import vector_files
from remanence.kit.vectors import (
    check_finite,
    check_same_dimension,
    check_varies,
    open_ids,
    open_vectors,
    save_vectors,
)

TYPES = {".fvecs": "<f4", ".bvecs": "u1", ".ivecs": "<i4"}
BINS = {".fbin": "<f4", ".u8bin": "u1", ".i8bin": "i1"}


def table(n=7, d=3, dtype="<f4", seed=0):
    return np.random.default_rng(seed).integers(0, 100, (n, d)).astype(dtype)


def vecs_bytes(rows):
    """The format by hand, a row at a time."""
    return b"".join(np.int32(len(row)).astype("<i4").tobytes() + row.tobytes() for row in rows)


def write(path, values):
    """Write any kind that is read, by means other than ours."""
    kind = path.suffix
    if kind in TYPES:
        path.write_bytes(vecs_bytes(values.astype(TYPES[kind])))
    elif kind in BINS:
        head = np.array(values.shape, "<u4").tobytes()
        path.write_bytes(head + values.astype(BINS[kind]).tobytes())
    elif kind == ".npy":
        np.save(path, values)
    elif kind == ".npz":
        np.savez(path, only=values)
    elif kind == ".safetensors":
        save_file({"only": torch.from_numpy(values.copy())}, path)
    else:
        lists = pa.array(list(values), pa.list_(pa.float32()))
        pq.write_table(pa.table({"id": range(len(values)), "only": lists}), path, row_group_size=3)
    return path


def lines(error):
    return str(error.value).splitlines()


def refused(source, *words):
    with pytest.raises(InputError) as error:
        check_finite(open_vectors(str(source)))
    assert len(lines(error)) == 1
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("kind", vector_files.SUFFIXES)
def test_every_kind_gives_the_rows_that_were_written(tmp_path, kind):
    values = table(n=10, d=4)
    opened = open_vectors(str(write(tmp_path / f"a{kind}", values)))
    assert opened.shape == (10, 4)
    assert len(opened) == 10
    assert opened.dtype.itemsize == {".bvecs": 1, ".u8bin": 1, ".i8bin": 1}.get(kind, 4)
    for found in (opened.array(), opened.rows(0, 10), np.concatenate([*opened.chunks(3)])):
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        assert found.flags.writeable
        np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(opened.rows(2, 9), values[2:9])
    np.testing.assert_array_equal(opened.take([9, 0, 3, 3, 1]), values[[9, 0, 3, 3, 1]])
    assert opened.take([]).shape == (0, 4)
    assert opened.rows(2, 2).shape == (0, 4)
    assert opened.rows(1, 4, stored=True).dtype == opened.dtype


@pytest.mark.parametrize("kind", vector_files.SUFFIXES)
def test_a_range_counts_from_its_start(tmp_path, kind):
    values = table(n=10)
    path = write(tmp_path / f"a{kind}", values)
    opened = open_vectors(f"{path}@2:8")
    assert opened.shape == (6, 3)
    np.testing.assert_array_equal(opened.array(), values[2:8])
    np.testing.assert_array_equal(opened.rows(1, 3), values[3:5])
    np.testing.assert_array_equal(opened.take([5, 0]), values[[7, 2]])
    np.testing.assert_array_equal(open_vectors(f"{path}@7:").array(), values[7:])
    np.testing.assert_array_equal(open_vectors(f"{path}@:2").array(), values[:2])
    with pytest.raises(InputError, match="has no row 6"):
        opened.take([0, 6])
    with pytest.raises(InputError, match="has no rows 0:7"):
        opened.rows(0, 7)
    for wrong in ("3:3", "5:2", "0:11", "10:"):
        refused(f"{path}@{wrong}", "no such rows", "at most 10")


@given(
    arrays("f4", st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.floats(width=32)),
    st.sampled_from([".npy", ".fvecs"]),
)
@settings(max_examples=60, deadline=None)
def test_saved_floats_come_back_bit_by_bit(tmp_path_factory, values, kind):
    path = tmp_path_factory.mktemp("v") / f"a{kind}"
    save_vectors(path, values)
    bad = ~np.isfinite(values).all(1)
    if bad.any():
        refused(path, f"row {bad.argmax()} ")
    else:
        found = open_vectors(str(path)).array(stored=True)
        assert found.tobytes() == values.tobytes()
    if kind == ".fvecs":
        assert path.read_bytes() == vecs_bytes(values)


@given(st.data(), st.sampled_from([".ivecs", ".bvecs", ".npy"]))
@settings(max_examples=40, deadline=None)
def test_saved_integers_come_back(tmp_path_factory, data, kind):
    dtype = "u1" if kind == ".bvecs" else "i4"
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    values = data.draw(arrays(dtype, shape))
    path = tmp_path_factory.mktemp("v") / f"a{kind}"
    save_vectors(path, values)
    found = open_vectors(str(path)).array(stored=True)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values)
    if values.min() >= 0:
        np.testing.assert_array_equal(open_ids(str(path)), values)


def test_what_a_format_would_change_is_not_written(tmp_path):
    for kind, values in [
        (".bvecs", [[256]]),
        (".bvecs", [[-1]]),
        (".bvecs", [[0.5]]),
        (".ivecs", [[2**31]]),
        (".ivecs", [[np.nan]]),
        (".txt", [[1]]),
        (".npy", [1, 2]),
        (".npy", np.zeros((0, 3))),
        (".npy", [["a"]]),
    ]:
        with pytest.raises(InputError):
            save_vectors(tmp_path / f"a{kind}", values)
        assert not (tmp_path / f"a{kind}").exists()


def test_a_file_is_mapped_not_read(tmp_path):
    path = tmp_path / "a.npy"
    np.lib.format.open_memmap(path, "w+", "f4", (2**22, 512)).flush()  # 8 GiB, sparse
    opened = open_vectors(str(path))
    assert opened.shape == (2**22, 512)
    assert opened.rows(4_000_000, 4_000_001).sum() == 0


def test_big_endian_doubles_halves_and_columns_are_read(tmp_path):
    values = table()
    for number, other in enumerate((values.astype(">f8"), values.astype("f2"), values[:, ::-1].T)):
        np.save(tmp_path / f"{number}.npy", other)
        np.testing.assert_array_equal(open_vectors(str(tmp_path / f"{number}.npy")).array(), other)
    np.save(tmp_path / "f.npy", np.asfortranarray(values))
    np.testing.assert_array_equal(
        open_vectors(str(tmp_path / "f.npy")).take([3, 1]), values[[3, 1]]
    )
    save_file({"x": torch.from_numpy(values).bfloat16()}, tmp_path / "b.safetensors")
    found = open_vectors(str(tmp_path / "b.safetensors"))
    np.testing.assert_array_equal(found.take([6, 2]), values[[6, 2]])


def test_a_name_picks_one_of_several(tmp_path):
    one, two = table(seed=1), table(n=4, seed=2)
    np.savez(tmp_path / "a.npz", one=one, two=two)
    save_file({"one": torch.tensor(one), "two": torch.tensor(two)}, tmp_path / "a.safetensors")
    pq.write_table(pa.table({"one": list(one), "two": list(table())}), tmp_path / "a.parquet")
    for kind in vector_files.NAMED:
        path = tmp_path / f"a{kind}"
        np.testing.assert_array_equal(open_vectors(f"{path}@one").array(), one)
        np.testing.assert_array_equal(open_vectors(f"{path}@one@1:3").array(), one[1:3])
        refused(path, "holds several", "one, two")
        refused(f"{path}@three", "holds no 'three'", "one, two")
        refused(f"{path}@", "names nothing")


def test_an_at_of_an_existing_path_is_part_of_it(tmp_path):
    path = tmp_path / "b@0:2.npy"
    np.save(path, table())
    assert open_vectors(str(path)).shape == (7, 3)
    assert open_vectors(f"{path}@0:2").shape == (2, 3)


def test_the_digits_are_scikit_learns():
    opened = open_vectors("digits")
    assert opened.shape == (1797, 64)
    assert opened.dtype == np.float32
    np.testing.assert_array_equal(opened.array(), load_digits().data)
    assert open_vectors("digits@1500:").shape == (297, 64)


# Damage


@pytest.mark.parametrize("kind", TYPES)
def test_a_truncated_file_says_where(tmp_path, kind):
    path = write(tmp_path / f"a{kind}", table())
    whole = path.read_bytes()
    width = len(whole) // 7
    path.write_bytes(whole[: 2 * width + 5])
    refused(path, "truncated in row 2", f"byte {2 * width + 5}")
    refused(f"{path}@0:1", "truncated")
    path.write_bytes(whole[:5])
    refused(path, "truncated", "dimension 3")
    path.write_bytes(whole[:2])
    refused(path, "truncated")
    path.write_bytes(b"")
    refused(path, "is empty")


@pytest.mark.parametrize("kind", TYPES)
def test_a_row_of_another_dimension_is_named(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(vector_files, "CHUNK", 2)
    path = tmp_path / f"a{kind}"
    raw = bytearray(vecs_bytes(table(dtype=TYPES[kind])))
    width = len(raw) // 7
    raw[5 * width] = 9
    path.write_bytes(raw)
    refused(path, "row 5 says dimension 9", "the first one 3")
    refused(f"{path}@5:6", "row 5")
    assert len(open_vectors(f"{path}@0:5")) == 5
    path.write_bytes(vecs_bytes(table(dtype=TYPES[kind])) + vecs_bytes(table(1, 4, TYPES[kind])))
    refused(path, "row 7 says dimension 4") if kind != ".bvecs" else refused(path, "dimension 4")


@pytest.mark.parametrize("dimension", [0, -3, 2**30])
def test_a_nonsense_dimension_is_refused(tmp_path, dimension):
    (tmp_path / "a.fvecs").write_bytes(np.int32(dimension).tobytes() + bytes(60))
    refused(tmp_path / "a.fvecs", f"dimension {dimension}")


def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path):
    for kind in (*BINS, ".npy"):
        path = write(tmp_path / f"a{kind}", table())
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        refused(path, "truncated at byte", "in row 6")
        path.write_bytes(whole + b"x")
        refused(path, "1 bytes too long")
        path.write_bytes(whole[:5])
        refused(path)
    head = np.array([2**31, 2**31], "<u4").tobytes()
    (tmp_path / "b.fbin").write_bytes(head + bytes(8))
    refused(tmp_path / "b.fbin", "truncated")


@pytest.mark.parametrize("kind", [".npy", ".npz", ".safetensors", ".parquet"])
def test_a_file_of_another_kind_is_refused(tmp_path, kind):
    path = tmp_path / f"a{kind}"
    for junk in (b"", b"junk" * 50, write(tmp_path / f"b{kind}", table()).read_bytes()[:-40]):
        path.write_bytes(junk)
        refused(path, str(path))


@given(st.sampled_from(vector_files.SUFFIXES), st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_bytes_are_refused_or_read_never_more(tmp_path_factory, kind, data):
    folder = tmp_path_factory.mktemp("v")
    raw = bytearray(write(folder / f"a{kind}", table()).read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=3)):
        raw[place] = data.draw(st.integers(0, 255))
    (folder / f"a{kind}").write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        assert open_vectors(str(folder / f"a{kind}")).array().ndim == 2
    except InputError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 - any other error fails the test


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("was unpickled",))


def test_nothing_is_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[Trap()]], dtype=object), allow_pickle=True)
    refused(tmp_path / "a.npy", "Python objects")
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Trap()))
    refused(tmp_path / "b.npy", "not a .npy")
    np.savez(tmp_path / "c.npz", a=np.array([[Trap()]], dtype=object))
    refused(tmp_path / "c.npz", "Python objects")
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as packed:
        packed.writestr("a.npy", pickle.dumps(Trap()))
    refused(tmp_path / "d.npz")


def test_a_table_of_the_wrong_sort_is_refused(tmp_path):
    for values, words in [
        (np.zeros(5, "f4"), "shape (5,)"),
        (np.zeros((2, 2, 2), "f4"), "shape (2, 2, 2)"),
        (np.float32(3), "shape ()"),
        (np.zeros((0, 4), "f4"), "at least one"),
        (np.zeros((4, 0), "f4"), "at least one"),
        (np.zeros((2, 2), bool), "holds bool"),
        (np.zeros((2, 2), complex), "holds complex"),
        (np.full((2, 2), "a"), "holds <U1"),
    ]:
        np.save(tmp_path / "a.npy", values)
        refused(tmp_path / "a.npy", words)
    refused(tmp_path / "none.npy", "no such file")
    refused(tmp_path / "none.npz@x", "no such file")
    refused(tmp_path, "unknown kind")
    refused(tmp_path / "a.csv", "unknown kind", ".fvecs", ".parquet", "digits")
    (tmp_path / "folder.npy").mkdir()
    refused(tmp_path / "folder.npy", "no such file")


def test_parquet_rows_of_unlike_length_or_with_gaps_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [[1.0, 2.0]] * 5
    kind = pa.list_(pa.float32())
    for broken, words in [
        ([*rows, [1.0]], "row 5 of column 'v' holds 1 values; give 2"),
        ([*rows, None], "row 5 of column 'v' holds nothing"),
        ([*rows, [1.0, None]], "row 5 of 'v' holds an empty value"),
        ([[], []], "at least one"),
        ([], "at least one"),
    ]:
        pq.write_table(pa.table({"v": pa.array(broken, kind)}), path, row_group_size=4)
        refused(path, words)
    pq.write_table(pa.table({"v": [1.0, 2.0], "w": ["a", "b"]}), path)
    refused(path, "no column holds lists")
    pq.write_table(pa.table({"v": [1.0], "w": [[1.0]]}), path)
    refused(f"{path}@v", "'v' holds no lists")
    pq.write_table(pa.table({"v": [["a"], ["b"]]}), path)
    refused(path, "give real numbers")
    fixed = pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2))
    pq.write_table(pa.table({"v": fixed}), path)
    np.testing.assert_array_equal(open_vectors(str(path)).array(), [[1, 2], [3, 4]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_what_is_not_finite_is_named_by_row_however_it_is_read(tmp_path, bad):
    values = table(n=20).astype("f8")
    values[13, 1] = bad
    np.save(tmp_path / "a.npy", values)
    opened = open_vectors(str(tmp_path / "a.npy"))
    for read in (
        opened.array,
        lambda: opened.take([1, 13]),
        lambda: opened.rows(10, 15),
        lambda: [*opened.chunks(6)],
        lambda: opened.rows(10, 15, stored=True),
    ):
        with pytest.raises(InputError, match="row 13 holds"):
            read()
    assert opened.rows(0, 13).shape == (13, 3)
    refused(f"{tmp_path / 'a.npy'}@10:", "row 3 holds")


def test_vectors_that_are_all_the_same_are_refused(tmp_path):
    values = np.ones((9, 3), "f4")
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(InputError, match="its 9 vectors are all the same"):
        check_varies(open_vectors(str(tmp_path / "a.npy")))
    values[8, 2] = 2
    np.save(tmp_path / "a.npy", values)
    check_varies(open_vectors(str(tmp_path / "a.npy")))
    with pytest.raises(InputError, match="all the same"):
        check_varies(open_vectors(f"{tmp_path / 'a.npy'}@:8"))


def test_unlike_dimensions_are_both_told(tmp_path):
    for d in (3, 4):
        np.save(tmp_path / f"{d}.npy", table(d=d))
    three, four = (open_vectors(str(tmp_path / f"{d}.npy")) for d in (3, 4))
    check_same_dimension(three, three)
    with pytest.raises(InputError, match=r"4\.npy: vectors of dimension 4.*3\.npy have 3"):
        check_same_dimension(three, three, four)


def test_indices_must_be_integers(tmp_path):
    np.save(tmp_path / "a.npy", table())
    opened = open_vectors(str(tmp_path / "a.npy"))
    for wrong in ([0.5], [[1]], [True], 1):
        with pytest.raises(InputError, match="list of integers"):
            opened.take(wrong)
    with pytest.raises(InputError, match="has no row -1"):
        opened.take([0, -1])


def test_ids_out_of_range_are_named(tmp_path):
    ids = table(n=5, d=4, dtype="i4")
    ids[3, 2] = 100
    save_vectors(tmp_path / "a.ivecs", ids)
    found = open_ids(str(tmp_path / "a.ivecs"), below=101)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, ids)
    with pytest.raises(InputError, match="row 3 names vector 100; numbers are 0 to 99"):
        open_ids(str(tmp_path / "a.ivecs"), below=100)
    ids[1, 0] = -1
    save_vectors(tmp_path / "a.ivecs", ids)
    with pytest.raises(InputError, match="row 1 names vector -1"):
        open_ids(str(tmp_path / "a.ivecs"))
    np.save(tmp_path / "a.npy", ids.astype("f4"))
    with pytest.raises(InputError, match="whole numbers"):
        open_ids(str(tmp_path / "a.npy"))


def test_version_two_headers_are_read(tmp_path):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, table(), version=(2, 0))
    (tmp_path / "a.npy").write_bytes(stream.getvalue())
    np.testing.assert_array_equal(open_vectors(str(tmp_path / "a.npy")).array(), table())
