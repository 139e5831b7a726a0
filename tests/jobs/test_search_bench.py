import json

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from remanence.errors import InputError
from remanence.jobs.search import bench as bench_module
from remanence.jobs.search import bench_methods
from remanence.jobs.search.bench import bench
from remanence.jobs.search.bench_methods import Row
from remanence.jobs.search.bench_report import compare
from remanence.kit.vectors import save_vectors
from remanence.search.catalyzer.network import Catalyzer
from remanence.search.exact import exact_neighbours, recall_at
from remanence.search.index.file import describe
from remanence.search.index.spread import SpreadIndex
from remanence.search.lattice.sphere import SphereLattice
from remanence.search.rivals import rivals, run_rival

DIM = 16
CODE = SphereLattice(8, 7)


def drawn(n, seed):
    """Clusters with a falling spectrum, which codes can use."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(30, DIM)) * 2
    noise = rng.normal(size=(n, DIM)) * np.geomspace(2, 0.1, DIM)
    return (centres[rng.integers(30, size=n)] + noise + 3).astype("f4")


LEARN, BASE, QUERIES = drawn(400, 0), drawn(1000, 1), drawn(50, 2)
TRUTH = exact_neighbours(QUERIES, BASE, 1)[0][:, 0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    for name, values in {"learn": LEARN, "base": BASE, "queries": QUERIES}.items():
        np.save(runs / f"{name}.npy", values)
    return runs


@pytest.fixture(scope="module")
def given(runs):
    return {
        "base": str(runs / "base.npy"),
        "queries": str(runs / "queries.npy"),
        "learn": str(runs / "learn.npy"),
        "threads": 1,
    }


@pytest.fixture(scope="module")
def model(runs):
    torch.manual_seed(0)
    catalyzer = Catalyzer(DIM, [8], hidden=32)
    catalyzer.initialise(torch.from_numpy(LEARN))
    with torch.no_grad():
        catalyzer.train()(torch.from_numpy(LEARN))
    (runs / "model").mkdir()
    catalyzer.eval().save(runs / "model" / "catalyzer.safetensors")
    (runs / "model" / "codes.json").write_text(json.dumps({"2": describe(CODE)}))
    (runs / "model" / "results.json").write_text(json.dumps({"n_train": 321}))
    (runs / "model" / "run.json").write_text(json.dumps({"seconds": 12.5}))
    return runs / "model"


@pytest.fixture(scope="module")
def done(runs, given, model):
    return bench(**given, out=runs / "done", nbytes=[2, 1], model=[model])


def refused(match, out, **options):
    before = sorted(out.parent.iterdir())
    with pytest.raises(InputError, match=match) as error:
        bench(**options, out=out)
    assert "\n" not in str(error.value)
    assert sorted(out.parent.iterdir()) == before


def test_every_method_has_a_row(done):
    assert [(row.nbytes, row.name, row.failed is None) for row in done.rows] == [
        (1, "PQ", True),
        (1, "OPQ to 16", True),
        (1, "OPQ to 8", True),
        (1, "OPQ to 4", True),
        (1, "RQ", True),
        (1, "LSQ", True),
        (1, "ITQ", True),
        (1, "PCA to 4 + lattice", True),
        (1, "PCA to 4, not quantised", True),
        (1, "PCA to 3 + lattice", True),
        (1, "PCA to 3, not quantised", True),
        (1, "catalyzer + lattice", False),
        (2, "PQ", True),
        (2, "OPQ to 16", True),
        (2, "OPQ to 8", True),
        (2, "RQ", True),
        (2, "LSQ", True),
        (2, "ITQ", True),
        (2, "PCA to 8 + lattice", True),
        (2, "PCA to 8, not quantised", True),
        (2, "PCA to 6 + lattice", True),
        (2, "PCA to 6, not quantised", True),
        (2, "catalyzer + lattice", True),
        (2, "catalyzer + OPQ to 8", True),
        (2, "catalyzer in 8, not quantised", True),
    ]
    (failed,) = [row for row in done.rows if row.failed]
    assert failed.failed.endswith("has codes of 2 bytes a vector; train with this number too")


def test_bytes_are_those_stored_and_training_is_told(done):
    for row in done.rows:
        if row.failed:
            continue
        assert row.n_train == (321 if row.family == "catalyzer" or "in 8" in row.name else 400)
        if row.family == "catalyzer":
            # the lattice's 16 bits fill two bytes; a code takes its bits and no more
            assert row.stored == pytest.approx(CODE.bits / 8, abs=0.001)
            assert row.train_seconds == 12.5
        elif row.family is not None:
            assert row.stored == row.nbytes
            assert row.train_seconds > 0
        else:
            assert row.stored == 4 * int(row.name.split(",")[0].split()[-1])
        assert min(row.model, row.encode_seconds, row.search_seconds) > 0


def test_a_catalyzers_weights_are_counted_with_its_codebooks(done):
    models = {row.name: row.model for row in done.rows if row.nbytes == 2}
    weights = 4 * (16 * 32 + 32 * 32 + 32 * 8)  # and some biases and statistics
    assert weights < models["catalyzer + lattice"] < 1.5 * weights
    codebooks = 4 * (256 * 8 + 8 * 8)
    assert models["catalyzer + OPQ to 8"] >= models["catalyzer + lattice"] + codebooks


def test_recall_is_that_of_the_methods_themselves(done):
    entries = {(2, each["name"]): each for each in done.results["sizes"]["2"]["methods"]}
    order = np.random.default_rng(0).permutation(400)
    for rival in rivals(DIM, 2):
        if rival.name in {"PQ", "OPQ to 8", "PCA to 8 + lattice"}:
            found = run_rival(rival.key, LEARN[order], BASE, QUERIES, 100, threads=1)
            for r, share in recall_at(found.ids, TRUTH).items():
                assert entries[2, rival.name]["recall"][str(r)]["share"] == pytest.approx(share)


def test_recall_of_the_catalyzer_is_that_of_its_index(done, model):
    embedding = Catalyzer.load(model / "catalyzer.safetensors").at(8)
    made = SpreadIndex(embedding, CODE)
    made.add(torch.from_numpy(BASE))
    ids = made.search(torch.from_numpy(QUERIES), 100)[1].numpy()
    entries = {each["name"]: each for each in done.results["sizes"]["2"]["methods"]}
    entry = entries["catalyzer + lattice"]
    for r, share in recall_at(ids, TRUTH).items():
        assert entry["recall"][str(r)]["share"] == pytest.approx(share)
        low, high = binomtest(round(50 * share), 50).proportion_ci(0.95, "wilson")
        found = entry["recall"][str(r)]
        assert (found["low"], found["high"]) == pytest.approx((low, high))
        assert entry["curve"][r - 1] == pytest.approx(share)
    base, queries = (embedding.embed(torch.from_numpy(x)).numpy() for x in (BASE, QUERIES))
    plain = exact_neighbours(queries, base, 100)[0]
    entry = entries["catalyzer in 8, not quantised"]
    assert entry["recall"]["10"]["share"] == pytest.approx(recall_at(plain, TRUTH)[10])


def test_the_folder_is_whole(done):
    names = {path.name for path in done.out.iterdir()}
    assert names == {"run.json", "metrics.jsonl", "results.json", "report.html"}
    results = json.loads((done.out / "results.json").read_text())
    assert list(results["sizes"]) == ["1", "2"]
    assert results["shared"] == {"learn and base": 0, "learn and queries": 0, "base and queries": 0}
    html = (done.out / "report.html").read_text()
    for words in ("What 1 or 2 bytes", "recall@10, %", "LSQ", "McNemar", "was not run", "<svg"):
        assert words in html
    lines = [json.loads(line) for line in (done.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 26))


def test_an_interrupted_run_goes_on(done, given, model, runs, monkeypatch):
    options = given | {"nbytes": [2], "against": ["pq", "pca"], "model": [model]}
    whole = bench(**options, out=runs / "whole")
    calls = []
    attempt = bench_methods.Method.attempt

    def stop(self, data, tell):
        calls.append(self.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return attempt(self, data, tell)

    monkeypatch.setattr(bench_methods.Method, "attempt", stop)
    with pytest.raises(KeyboardInterrupt):
        bench(**options, out=runs / "cut")
    monkeypatch.setattr(
        bench_module, "exact_neighbours", None
    )  # the ground truth is not computed again
    again = bench(**options, out=runs / "cut", resume=True)
    assert calls.count("PQ") == 1
    assert calls[3] == calls[4]
    assert len(calls) == len(whole.rows) + 1
    for one, other in zip(again.rows, whole.rows, strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(one.ranks, other.ranks)
        assert one.stored == other.stored
    assert "was interrupted" in (again.out / "report.html").read_text()
    steps = (again.out / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == len(whole.rows)
    wanted = {row.name: row.ranks for row in done.rows if row.nbytes == 2}
    for row in again.rows:
        np.testing.assert_array_equal(row.ranks, wanted[row.name])


def test_too_few_vectors_to_learn_from_give_a_line(given, runs):
    options = given | {"learn": f"{given['learn']}@0:100"}
    found = bench(**options, out=runs / "few", nbytes=[2], against=["pq", "pca"])
    assert {row.failed for row in found.rows if row.family == "pq"} == {
        "100 training vectors: give at least 256"
    }
    assert any("PCA" in row.name and row.failed is None for row in found.rows)
    assert found.results["sizes"]["2"]["reference"] is None
    html = (found.out / "report.html").read_text()
    assert "PQ was not run: 100 training vectors: give at least 256." in html


def test_a_ground_truth_is_used_and_checked(given, tmp_path):
    wide = exact_neighbours(QUERIES, BASE, 3)[0]
    save_vectors(tmp_path / "truth.ivecs", wide)
    options = given | {"nbytes": [2], "against": ["pq"]}
    found = bench(**options, out=tmp_path / "out", groundtruth=str(tmp_path / "truth.ivecs"))
    computed = bench(**options, out=tmp_path / "computed")
    np.testing.assert_array_equal(found.rows[0].ranks, computed.rows[0].ranks)
    save_vectors(tmp_path / "other.ivecs", (wide + 1) % 1000)
    save_vectors(tmp_path / "short.ivecs", wide[:49])
    save_vectors(tmp_path / "far.ivecs", wide + 1000)
    for name, words in (
        ("other", "nearest to query 0, but .* is nearer"),
        ("short", "neighbours of 49 queries, but there are 50"),
        ("far", "numbers are 0 to 999"),
    ):
        refused(words, tmp_path / "bad", **options, groundtruth=str(tmp_path / f"{name}.ivecs"))


def test_shared_vectors_are_told(given, runs):
    options = given | {"learn": given["base"], "queries": f"{given['base']}@0:20"}
    found = bench(**options, out=runs / "shared", nbytes=[2], against=["pq"])
    assert found.results["shared"] == {
        "learn and base": 1000,
        "learn and queries": 20,
        "base and queries": 20,
    }
    assert "Take care: 20 of the queries" in (found.out / "report.html").read_text()


def test_bad_input_is_refused(given, model, tmp_path):
    out = tmp_path / "out"
    refused("--nbytes 0: give 1 to 64", out, **given, nbytes=[0])
    refused("--against rabitq: give one of pq, opq", out, **given, against=["rabitq"])
    refused("--threads 0", out, **(given | {"threads": 0}))
    refused("--against: none of these", out, **given, nbytes=[3], against=["itq"])
    refused("has 99 vectors; give at least 100", out, **(given | {"base": f"{given['base']}@0:99"}))
    bad = BASE.copy()
    bad[7, 1] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    refused("row 7 holds NaN", out, **(given | {"base": str(tmp_path / "bad.npy")}))
    np.save(tmp_path / "wide.npy", np.ones((400, DIM + 1), "f4"))
    wide = str(tmp_path / "wide.npy")
    refused("dimension 17, but those of .* have 16", out, **(given | {"learn": wide}))
    every = {"base": wide, "queries": wide, "learn": wide}
    refused("dimension 17, but .*model takes 16", out, **(given | every), model=[model])
    refused("no such folder", out, **given, model=[tmp_path / "none"])


def row(name, family, ranks, n_train=100_000):
    return Row(name, family, 4, np.array(ranks), 4.0, 10, n_train, 1.0, 1.0, 1.0)


def test_differences_are_paired_with_the_best_opq():
    many = 1000
    good, bad = [0] * 500 + [99] * 500, [0] * 450 + [99] * 550
    rows = [
        row("OPQ a", "opq", bad),
        row("OPQ b", "opq", good),
        row("PQ", "pq", bad),
        row("floats", None, [0] * many),
        Row("LSQ", "lsq", 4, np.zeros(0, np.int64), failed="why"),
    ]
    found = compare(rows, 96)
    assert (found["reference"], found["best"]) == ("OPQ b", "OPQ b")
    entries = {each["name"]: each for each in found["methods"]}
    gap = entries["PQ"]["against_opq"]["10"]
    assert gap["difference"] == pytest.approx(-0.05)
    assert gap["low"] < -0.05 < gap["high"] < 0
    assert gap["p"] == pytest.approx(binomtest(0, 50).pvalue)
    assert gap["p_corrected"] == pytest.approx(2 * gap["p"])  # Holm, two tests
    for name in ("OPQ b", "floats", "LSQ"):
        assert entries[name]["against_opq"] == {}


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ([0] * 700 + [99] * 300, "Use catalyzer + lattice at 4 bytes"),
        ([0] * 300 + [99] * 700, "Use OPQ at 4 bytes"),
        ([0] * 500 + [99] * 500, "show no difference"),
    ],
)
def test_the_advice_follows_the_figures(ours, words):
    opq = row("OPQ", "opq", [0] * 500 + [99] * 500)
    found = compare([opq, row("catalyzer + lattice", "catalyzer", ours)], 96)
    assert words in found["advice"]
    assert "no catalyzer" in compare([opq], 96)["advice"]


def test_where_most_is_found_among_ten_the_first_counts():
    ours, theirs = ([0] * n + [5] * (950 - n) + [99] * 50 for n in (500, 420))
    theirs[-50:-48] = [5, 5]
    rows = [row("OPQ", "opq", theirs), row("catalyzer + lattice", "catalyzer", ours)]
    found = compare(rows, 128)
    assert found["rank"] == 1
    assert (found["best"], found["reference"]) == ("catalyzer + lattice", "OPQ")
    assert "recall@1 is 8.0 points above that of OPQ" in found["advice"]
    low = [row("OPQ", "opq", [0] * 10 + [5] * 800 + [99] * 190)]
    assert compare(low, 128)["rank"] == 10
    assert "recall@10, 81.0%" in compare(low, 128)["advice"]


def test_a_bug_is_no_method_that_was_not_run(given, runs, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(bench_methods, "run_rival", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        bench(**given, out=runs / "bug", nbytes=[2], against=["pq"])


def test_a_method_that_wants_more_vectors_is_told(done):
    notes = {(r.nbytes, r.name): r.note for r in done.rows if r.note}
    assert list(notes) == [(1, "LSQ"), (2, "LSQ")]
    assert "it wants 5,120 or more" in notes[2, "LSQ"]
    assert notes[2, "LSQ"] in (done.out / "report.html").read_text()


def test_a_miss_is_a_rank_beyond_the_list():
    ids = np.array([[4, 2, 9], [1, 2, 3]])
    np.testing.assert_array_equal(bench_methods.ranks(ids, np.array([9, 7])), [2, 3])
