import json
import shutil

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from remanence.errors import InputError
from remanence.jobs.search import query as query_module
from remanence.jobs.search.folder import open_index
from remanence.jobs.search.index import index
from remanence.jobs.search.query import query
from remanence.kit.vectors import open_ids, save_vectors
from remanence.search.catalyzer.network import Catalyzer
from remanence.search.exact import exact_neighbours
from remanence.search.index.file import describe
from remanence.search.index.spread import SpreadIndex
from remanence.search.lattice.sign import SignCode
from remanence.search.lattice.sphere import SphereLattice

DIM = 20
CODE = SphereLattice(16, 21)
CPU = torch.device("cpu")


def drawn(n, seed=0, dim=DIM):
    return np.random.default_rng(seed).normal(size=(n, dim)).astype("f4")


BASE, QUERIES = drawn(2000, 1), drawn(60, 2)


def spread(catalyzer, x):
    """Let the outputs of random weights spread, so that codes differ."""
    catalyzer.initialise(x)
    for norm in (catalyzer.body[1], catalyzer.body[4]):
        norm.momentum = None
    with torch.no_grad():
        catalyzer.train()(x)
        catalyzer.head.bias -= catalyzer.eval()(x).mean(0)


def write_model(folder, code):
    torch.manual_seed(0)
    catalyzer = Catalyzer(DIM, [code.dim], hidden=64)
    spread(catalyzer, torch.from_numpy(BASE))
    folder.mkdir()
    catalyzer.eval().save(folder / "catalyzer.safetensors")
    (folder / "codes.json").write_text(json.dumps({str(code.nbytes): describe(code)}))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    np.save(runs / "base.npy", BASE)
    np.save(runs / "queries.npy", QUERIES)
    truth, _ = exact_neighbours(QUERIES, BASE, 5)
    save_vectors(runs / "truth.ivecs", truth)
    return runs


@pytest.fixture(scope="module")
def queries(runs):
    return str(runs / "queries.npy")


@pytest.fixture(scope="module")
def stored(runs):
    return index(write_model(runs / "model", CODE), str(runs / "base.npy"), out=runs / "index").out


@pytest.fixture(scope="module")
def lists(runs, stored):
    return index(stored, str(runs / "base.npy"), out=runs / "lists", nlist=9).out


@pytest.fixture(scope="module")
def done(runs, stored, queries):
    return query(stored, queries, out=runs / "done", groundtruth=str(runs / "truth.ivecs"))


def refused(match, *arguments, out, **options):
    before = sorted(out.parent.iterdir())
    with pytest.raises(InputError, match=match) as error:
        query(*arguments, out=out, **options)
    assert "\n" not in str(error.value)
    assert sorted(out.parent.iterdir()) == before


def test_end_to_end_equals_python(done, stored):
    catalyzer = Catalyzer.load(stored / "catalyzer.safetensors")
    made = SpreadIndex(catalyzer.at(16), CODE)
    made.add(torch.from_numpy(BASE))
    scores, ids = made.search(torch.from_numpy(QUERIES), 100)
    np.testing.assert_array_equal(np.load(done.out / "ids.npy"), ids)
    np.testing.assert_array_equal(np.load(done.out / "scores.npy"), scores)
    assert (done.ids.dtype, done.scores.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(done.ids, ids)
    np.testing.assert_array_equal(open_ids(str(done.out / "ids.ivecs")), ids)


def test_the_folder_is_whole(done):
    names = {path.name for path in done.out.iterdir()}
    assert names == {
        "run.json", "results.json", "report.html", "ids.npy", "scores.npy", "ids.ivecs",
    }  # fmt: skip
    html = (done.out / "report.html").read_text()
    assert "The 100 nearest vectors of 60 queries" in html
    assert "recall@R" in html


def test_recall_is_counted_by_hand(done):
    truth = exact_neighbours(QUERIES, BASE, 1)[0]
    results = json.loads((done.out / "results.json").read_text())
    for r in (1, 10, 100):
        hits = int((done.ids[:, :r] == truth).any(1).sum())
        low, high = binomtest(hits, 60).proportion_ci(0.95, "wilson")
        found = results["recall"][str(r)]
        assert found["share"] == pytest.approx(hits / 60)
        assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert results["recall"]["100"]["share"] > 0.2  # chance: 0.05
    assert results["truth_not_there"] == 0


def test_batches_change_nothing(done, stored, queries, tmp_path, monkeypatch):
    monkeypatch.setattr(query_module, "ROWS", 7)
    again = query(stored, queries, out=tmp_path / "again")
    np.testing.assert_array_equal(again.ids, done.ids)
    np.testing.assert_array_equal(again.scores, done.scores)
    assert again.results["recall"] is None
    assert "--groundtruth" in (again.out / "report.html").read_text()


def test_probing_all_lists_is_an_exhaustive_search(done, lists, queries, tmp_path):
    every = query(lists, queries, out=tmp_path / "every", nprobe=9)
    np.testing.assert_array_equal(every.ids, done.ids)
    one = query(lists, queries, out=tmp_path / "one", k=1500, nprobe=1)
    assert one.results["short"] == 60
    assert (one.ids[:, -1] == -1).all()
    assert np.isneginf(one.scores[:, -1]).all()
    assert (
        open_index(lists, CPU).search(torch.from_numpy(QUERIES), 1500, nprobe=1)[1].numpy()
        == one.ids
    ).all()
    assert "--nprobe" in (one.out / "report.html").read_text()


def test_symmetric_search_counts_bits(runs, queries, tmp_path):
    code = SignCode(16)
    model = write_model(tmp_path / "model", code)
    stored = index(model, str(runs / "base.npy"), out=tmp_path / "index").out
    found = query(stored, queries, out=tmp_path / "out", k=10, symmetric=True)
    embed = Catalyzer.load(model / "catalyzer.safetensors").at(16).embed
    signs = [embed(torch.from_numpy(x)).numpy() < 0 for x in (QUERIES, BASE)]
    bits = (signs[0][:, None] != signs[1]).sum(-1)
    np.testing.assert_allclose(found.scores, 1 - 2 * np.sort(bits, axis=1)[:, :10] / 16, atol=1e-6)


def test_large_ids_are_not_cut(runs, stored, queries, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(2000) + 2**40)
    far = index(stored, str(runs / "base.npy"), out=tmp_path / "far", ids=tmp_path / "ids.npy").out
    found = query(far, queries, out=tmp_path / "out", groundtruth=str(runs / "truth.ivecs"))
    assert found.ids.min() >= 2**40
    assert not (found.out / "ids.ivecs").exists()
    assert found.results["truth_not_there"] == 60  # the truth names rows, not these ids
    assert "is not in the index" in (found.out / "report.html").read_text()


def test_bad_input_is_refused(runs, stored, lists, queries, tmp_path):
    out = tmp_path / "out"
    np.save(tmp_path / "wide.npy", drawn(5, dim=DIM + 1))
    bad = QUERIES.copy()
    bad[41, 3] = np.inf
    np.save(tmp_path / "bad.npy", bad)
    save_vectors(tmp_path / "truth.ivecs", np.zeros((59, 5), int))
    refused("--k 0: must be at least 1", stored, queries, out=out, k=0)
    refused("--k 2001: .* holds 2,000 vectors", stored, queries, out=out, k=2001)
    refused("dimension 21, but .*index takes 20", stored, str(tmp_path / "wide.npy"), out=out)
    refused("row 41 holds NaN", stored, str(tmp_path / "bad.npy"), out=out)
    refused(
        "59 queries, but .* has 60",
        stored,
        queries,
        out=out,
        groundtruth=str(tmp_path / "truth.ivecs"),
    )
    refused("holds float32; give whole", stored, queries, out=out, groundtruth=queries)
    refused("symmetric search is for binary", stored, queries, out=out, symmetric=True)
    refused("nprobe 2 without", stored, queries, out=out, nprobe=2)
    refused("nprobe 10: give 1 to 9", lists, queries, out=out, nprobe=10)
    refused("--nprobe 0", lists, queries, out=out, nprobe=0)
    refused("there is no such index", runs / "model", queries, out=out)


def test_a_foreign_catalyzer_is_refused(stored, queries, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(stored, copy)
    catalyzer = Catalyzer.load(copy / "catalyzer.safetensors")
    catalyzer.head.bias.data += 0.1
    catalyzer.save(copy / "catalyzer.safetensors")
    refused("was made with the transform", copy, queries, out=tmp_path / "out")
