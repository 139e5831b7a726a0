import json
import shutil

import faiss
import numpy as np
import pytest
import torch

from remanence.errors import InputError
from remanence.jobs.search import folder as folder_module
from remanence.jobs.search import index as index_module
from remanence.jobs.search.folder import open_index
from remanence.jobs.search.index import index
from remanence.kit import vectors as kit_vectors
from remanence.search.catalyzer.network import Catalyzer
from remanence.search.index.file import describe
from remanence.search.index.spread import SpreadIndex
from remanence.search.lattice.sign import SignCode
from remanence.search.lattice.sphere import SphereLattice

DIM = 20
CODES = {4: SphereLattice(16, 21), 2: SphereLattice(8, 7)}
CPU = torch.device("cpu")


def drawn(n, seed=0, dim=DIM):
    return np.random.default_rng(seed).normal(size=(n, dim)).astype("f4")


def spread(catalyzer, x):
    """Let the outputs of random weights spread, so that codes differ."""
    catalyzer.initialise(x)
    for norm in (catalyzer.body[1], catalyzer.body[4]):
        norm.momentum = None
    with torch.no_grad():
        catalyzer.train()(x)
        catalyzer.head.bias -= catalyzer.eval()(x).mean(0)


def write_model(folder, codes=CODES, seed=0, dim=DIM):
    torch.manual_seed(seed)
    catalyzer = Catalyzer(dim, sorted({code.dim for code in codes.values()}), hidden=16)
    spread(catalyzer, torch.from_numpy(drawn(500, dim=dim)))
    folder.mkdir()
    catalyzer.eval().save(folder / "catalyzer.safetensors")
    described = {str(n): describe(code) for n, code in codes.items()}
    (folder / "codes.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def model(runs):
    return write_model(runs / "model")


@pytest.fixture(scope="module")
def files(runs):
    np.save(runs / "a.npy", drawn(1500, 1))
    np.save(runs / "b.npy", drawn(500, 2))
    return str(runs / "a.npy"), str(runs / "b.npy")


@pytest.fixture(scope="module")
def base():
    return torch.from_numpy(np.concatenate([drawn(1500, 1), drawn(500, 2)]))


@pytest.fixture(scope="module")
def done(runs, model, files):
    return index(model, *files, out=runs / "done", nbytes=4)


def by_hand(model, vectors, ids=None, nbytes=4, **how):
    code = CODES[nbytes]
    made = SpreadIndex(
        Catalyzer.load(model / "catalyzer.safetensors").at(code.dim), code, seed=0, **how
    )
    if made.nlist:
        made.train(vectors)
    made.add(vectors, ids)
    return made


def assert_same(one, other, k=20, **how):
    queries = torch.from_numpy(drawn(30, 9))
    for a, b in zip(one.search(queries, k, **how), other.search(queries, k, **how), strict=True):
        assert torch.equal(a, b)


def refused(match, *arguments, out, **options):
    before = sorted(out.parent.iterdir())
    with pytest.raises(InputError, match=match) as error:
        index(*arguments, out=out, **options)
    assert "\n" not in str(error.value)
    assert sorted(out.parent.iterdir()) == before


def test_it_is_the_index_of_all_vectors_in_order(done, model, base):
    opened = open_index(done.out, CPU)
    assert opened.ids.tolist() == list(range(2000))
    assert_same(opened, by_hand(model, base))
    assert_same(opened, done.index)


def test_the_folder_is_whole_and_serves_by_itself(done, model, runs, base):
    names = {path.name for path in done.out.iterdir()}
    assert names == {
        "run.json", "metrics.jsonl", "results.json", "report.html", "index.safetensors",
        "catalyzer.safetensors", "codes.json",
    }  # fmt: skip
    shutil.copytree(done.out, runs / "elsewhere")
    assert_same(open_index(runs / "elsewhere", CPU), by_hand(model, base))
    lines = (done.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["vectors"] for line in lines] == [1500, 500]


def test_bytes_are_those_of_the_file(done):
    results = json.loads((done.out / "results.json").read_text())
    size = (done.out / "index.safetensors").stat().st_size
    stored = results["bytes"]
    assert stored["total"] == size == stored["header"] + sum(stored["parts"].values())
    assert stored["parts"] == {"codes": 2000 * 4}
    assert results["bytes_a_vector"] == 4
    assert results["vectors"] == results["added"] == 2000
    html = (done.out / "report.html").read_text()
    assert "2,000 vectors in 4 bytes each" in html
    assert "Rounding" in html


def test_chunks_and_progress_change_nothing(done, model, files, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "CHUNK", 333)
    monkeypatch.setattr(kit_vectors, "CHUNK", 100)
    again = index(model, *files, out=tmp_path / "again", nbytes=4)
    assert_same(again.index, done.index)
    name = "index.safetensors"
    assert (again.out / name).read_bytes() == (done.out / name).read_bytes()


def test_rounding_is_the_mean_cosine_to_what_is_stored(done, base):
    found = done.results["rounding"]
    units = done.index.transform.embed(base)
    decoded = done.index.reconstruct(torch.arange(2000))
    assert found["vectors"] == 2000
    assert found["cosine"] == pytest.approx(float((units * decoded).sum(1).mean()), abs=1e-5)
    # mean cos of uniform vectors with d = 16, r2 = 21, by the table of the paper's codes
    assert found["uniform"] == pytest.approx(0.9632, abs=0.002)


def test_lists(model, files, base, tmp_path):
    made = index(model, *files, out=tmp_path / "lists", nbytes=4, nlist=7, storage="int8")
    opened = open_index(made.out, CPU)
    assert (opened.nlist, opened.storage) == (7, "int8")
    flat = by_hand(model, base)
    queries = torch.from_numpy(drawn(30, 9))
    assert torch.equal(opened.search(queries, 20, nprobe=7)[1], flat.search(queries, 20)[1])
    found = made.results["lists"]
    assert sum(found["sizes"]) == 2000
    assert found["largest"] == found["sizes"][0] >= found["median"] >= found["smallest"]
    shares = np.array(found["sizes"]) / 2000
    assert found["imbalance"] == pytest.approx(7 * (shares**2).sum())
    assert "Inverted lists" in (made.out / "report.html").read_text()
    assert made.results["bytes_a_vector"] == 4 + 2  # the list's number


def test_lists_learn_from_a_sample_of_all_sources(model, files, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "A_LIST", 50)
    seen = []
    plain = SpreadIndex.train
    monkeypatch.setattr(
        SpreadIndex, "train", lambda self, x: (seen.append(x.clone()), plain(self, x))
    )
    index(model, *files, out=tmp_path / "lists", nbytes=4, nlist=8)
    rows = {row.tobytes() for row in seen[0].numpy()}
    assert len(rows) == 400
    counts = [len(rows & {row.tobytes() for row in drawn(n, s)}) for n, s in ((1500, 1), (500, 2))]
    assert sum(counts) == 400
    assert 60 < counts[1] < 140


def test_ids(model, files, base, runs, tmp_path):
    ids = np.random.default_rng(3).permutation(10**6)[:2000]
    np.save(tmp_path / "ids.npy", ids)
    (tmp_path / "ids.txt").write_text("\n".join(map(str, ids)))
    wanted = by_hand(model, base, torch.from_numpy(ids))
    for name in ("ids.npy", "ids.txt"):
        out = runs / f"named {name}"
        made = index(model, *files, out=out, nbytes=4, ids=tmp_path / name)
        assert_same(open_index(made.out, CPU), wanted)
        assert made.results["bytes_a_vector"] == 4 + 8


def test_onto_removes_then_merges_then_adds(done, model, files, base, tmp_path):
    np.save(tmp_path / "gone.npy", np.array([3, 7, 1999, 5000]))
    np.save(tmp_path / "new.npy", drawn(3, 5))
    np.save(tmp_path / "ids.npy", np.array([7, 3, 9000]))  # freed ids may be given again
    np.save(tmp_path / "other.npy", np.arange(10_000, 10_500))
    other = index(model, files[1], out=tmp_path / "other", nbytes=4, ids=tmp_path / "other.npy")
    before = (done.out / "index.safetensors").read_bytes()
    made = index(
        model,
        str(tmp_path / "new.npy"),
        out=tmp_path / "onto",
        onto=done.out,
        remove=tmp_path / "gone.npy",
        merge=[other.out],
        ids=tmp_path / "ids.npy",
    )
    wanted = by_hand(model, base)
    wanted.remove(torch.tensor([3, 7, 1999]))
    wanted.add(base[1500:], torch.arange(10_000, 10_500))
    wanted.add(torch.from_numpy(drawn(3, 5)), torch.tensor([7, 3, 9000]))
    assert_same(open_index(made.out, CPU), wanted)
    counts = [made.results[name] for name in ("before", "removed", "not_there", "merged", "added")]
    assert counts == [2000, 3, 1, 500, 3]
    assert made.results["vectors"] == 2500
    assert (done.out / "index.safetensors").read_bytes() == before


def test_an_index_is_a_model_and_numbers_on(done, model, files, base, tmp_path):
    made = index(done.out, files[1], out=tmp_path / "more", onto=done.out)
    wanted = by_hand(model, base)
    wanted.add(base[1500:])
    assert_same(open_index(made.out, CPU), wanted)
    assert made.index.ids[-1] == 2499


def test_merging_alone(done, model, tmp_path):
    made = index(model, out=tmp_path / "merged", nbytes=4, merge=[done.out])
    assert_same(made.index, done.index)
    assert made.results["rounding"] is None
    assert made.results["rate"] is None


def test_faiss_gives_the_same_scores(model, files, tmp_path):
    for nlist in (0, 5):
        made = index(
            model, *files, out=tmp_path / f"faiss{nlist}", nbytes=4, nlist=nlist, faiss=True
        )
        plain = faiss.read_index(str(made.out / "index.faiss"))
        queries = torch.from_numpy(drawn(30, 9))
        embedded = made.index.transform.embed(queries).numpy()
        scores, ids = plain.search(embedded, 10)
        np.testing.assert_allclose(scores, made.index.search(queries, 10)[0], atol=1e-5)
        # Equal codes tie, and faiss orders them as it likes: the ids are those of the scores.
        points = made.index.reconstruct(torch.from_numpy(ids).flatten()).view(30, 10, 16).numpy()
        np.testing.assert_allclose((embedded[:, None] * points).sum(-1), scores, atol=1e-5)
        assert "index.faiss" in (made.out / "report.html").read_text()


def test_the_only_code_is_taken_and_signs_work(tmp_path):
    model = write_model(tmp_path / "signs", {2: SignCode(16)})
    np.save(tmp_path / "x.npy", drawn(50))
    made = index(model, str(tmp_path / "x.npy"), out=tmp_path / "out")
    assert made.results["code"]["kind"] == "SignCode"
    assert made.results["bytes_a_vector"] == 2


def test_bad_options_are_refused(model, files, done, tmp_path):
    out = tmp_path / "out"
    refused("BASE: give vectors", model, out=out)
    refused("--nbytes 3: .* codes of 2 and 4 bytes", model, *files, out=out, nbytes=3)
    refused("--nbytes 8: .* codes of 2 and 4 bytes", model, *files, out=out)
    refused("--remove: give the index", model, *files, out=out, remove=tmp_path / "x.npy")
    refused("--nlist -1", model, *files, out=out, nlist=-1)
    refused("--nlist: an index that is added to", model, *files, out=out, onto=done.out, nlist=0)
    refused("--nbytes: an index", model, *files, out=out, onto=done.out, nbytes=4)
    refused("--ids: names the vectors", model, out=out, merge=[done.out], ids=tmp_path / "x.npy")
    refused("--nlist: lists are learned", model, out=out, nbytes=4, merge=[done.out], nlist=2)
    refused("2000 vectors to train 2001", model, *files, out=out, nbytes=4, nlist=2001)
    refused("no such folder", tmp_path / "none", *files, out=out)
    refused("already exists", model, *files, out=done.out)


def test_bad_vectors_leave_nothing_behind(model, files, tmp_path):
    out = tmp_path / "out"
    bad = drawn(400)
    bad[333, 2] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    np.save(tmp_path / "wide.npy", drawn(5, dim=DIM + 1))
    refused(
        "bad.npy: row 333 holds NaN", model, files[0], str(tmp_path / "bad.npy"), out=out, nbytes=4
    )
    for given in ((str(tmp_path / "wide.npy"),), (*files, str(tmp_path / "wide.npy"))):
        refused("dimension 21, but .*model takes 20", model, *given, out=out, nbytes=4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.arange(1999), "1999 ids for 2000 vectors"),
        (np.zeros(2000, int), "id 0 would be there twice"),
        (-np.arange(2000), "entry 1999 is negative"),
        (np.arange(2000) / 2, "holds float64"),
        (np.zeros((2000, 2), int), "has 2 columns"),
    ],
)
def test_wrong_ids_are_refused(model, files, tmp_path, values, words):
    np.save(tmp_path / "ids.npy", values)
    refused(words, model, *files, out=tmp_path / "out", nbytes=4, ids=tmp_path / "ids.npy")


def test_wrong_ids_in_text_are_refused(model, files, tmp_path):
    refused("no such file", model, *files, out=tmp_path / "o", nbytes=4, ids=tmp_path / "ids.txt")
    for text, words in (("1 2 x", "entry 2 is 'x'"), ("1\n-2", "entry 1 is '-2'")):
        (tmp_path / "ids.txt").write_text(text)
        refused(words, model, *files, out=tmp_path / "o", nbytes=4, ids=tmp_path / "ids.txt")


def test_another_model_is_refused(files, done, tmp_path):
    other = write_model(tmp_path / "other", seed=1)
    words = "was made with the transform .*, not with"
    refused(words, other, *files, out=tmp_path / "out", onto=done.out)
    refused(words, other, *files, out=tmp_path / "out", nbytes=4, merge=[done.out])
    narrow = write_model(tmp_path / "narrow", {2: CODES[2]})
    refused("no map to", narrow, *files, out=tmp_path / "out", onto=done.out)


def test_ids_that_are_in_both_are_refused(model, done, tmp_path):
    words = "id 0 would be there twice"
    refused(words, model, out=tmp_path / "out", onto=done.out, merge=[done.out])


def test_a_damaged_folder_is_refused(model, done, files, tmp_path):
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(done.out, copy)
    stored = bytearray((copy / "index.safetensors").read_bytes())
    stored[-100] ^= 1
    (copy / "index.safetensors").write_bytes(stored)
    refused("edited or damaged", model, *files, out=out, onto=copy)
    (copy / "index.safetensors").write_bytes(stored[:200])
    refused("no index, or damaged", model, *files, out=out, onto=copy)
    (copy / "index.safetensors").unlink()
    refused("there is no such index", model, *files, out=out, onto=copy)
    shutil.copytree(model, copy, dirs_exist_ok=True)
    for text in (
        "",
        "[]",
        "{}",
        '{"4": 1}',
        '{"x": {}}',
        '{"4": {"kind": "SphereLattice", "dim": 1000000, "r2": 50}}',
        '{"4": {"kind": "SphereLattice", "dim": 8, "r2": 7}}',
        '{"4": {"kind": "Other", "dim": 16, "r2": 21}}',
        '{"4": {"kind": "SphereLattice", "dim": 16, "r2": -1}}',
    ):
        (copy / "codes.json").write_text(text)
        refused("codes.json: damaged", copy, *files, out=out, nbytes=4)
    (copy / "codes.json").unlink()
    refused("codes.json: there is no such file", copy, *files, out=out)
    (copy / "catalyzer.safetensors").write_bytes(b"junk")
    refused("is not a catalyzer", copy, *files, out=out)


def test_bytes_are_counted_without_reading_tensors(done):
    stored = folder_module.stored_bytes(done.out / "catalyzer.safetensors")
    assert stored.total == (done.out / "catalyzer.safetensors").stat().st_size
    assert stored.header + sum(stored.parts.values()) == stored.total
