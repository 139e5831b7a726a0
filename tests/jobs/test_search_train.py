import json
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch

from remanence.errors import InputError
from remanence.jobs.search.folder import open_model
from remanence.jobs.search.train import train
from remanence.jobs.search.train_report import CURVE, Measured, advice_of
from remanence.jobs.search.train_stages import Best, best_of
from remanence.kit.run import RunFolder
from remanence.kit.vectors import open_vectors
from remanence.search.catalyzer.network import Catalyzer
from remanence.search.heldout import Score, split

QUICK = {"hidden": 32, "epochs": 2, "batch_size": 64, "negative": 20, "koleo": [0.02]}
LONG = QUICK | {
    "epochs": 3, "nbytes": [4], "koleo": [0.01, 0.05], "finetune_epochs": 2, "against": ["none"],
}  # fmt: skip
CALL = (
    "import sys; from pathlib import Path; from remanence.jobs.search.train import train; "
    f"train('digits', out=Path(sys.argv[1]), **{LONG})"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def tuned(place):
    options = QUICK | {"koleo": [0.0, 0.05], "epochs": 6}
    return train(
        "digits",
        out=place / "tuned",
        nbytes=[4],
        finetune_epochs=1,
        against=["opq", "pca"],
        **options,
    )


@pytest.fixture(scope="module")
def nested(place):
    return train("digits", out=place / "nested", nbytes=[8, 2], against=["none"], **QUICK)


def results(done):
    return json.loads((done.out / "results.json").read_text())


def lines(out, stage):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == stage]


def test_the_run_folder_is_whole(tuned):
    assert {path.name for path in tuned.out.iterdir()} == {
        "run.json", "metrics.jsonl", "results.json", "report.html",
        "catalyzer.safetensors", "codes.json",
    }  # fmt: skip
    html = (tuned.out / "report.html").read_text()
    for word in ("OPQ to 16", "PCA to 16 + lattice", "not quantised", "even spread", "chosen",
                 "recall@10", "95 %", "bench"):  # fmt: skip
        assert word in html, word
    assert tuned.advice[4].sentence.split(":")[0] in html


def test_index_opens_it(tuned, nested):
    model = open_model(tuned.out, torch.device("cpu"))
    assert [(n, code.dim, code.r2) for n, code in model.codes.items()] == [(4, 16, 21)]
    assert torch.equal(model.catalyzer.head.weight, tuned.catalyzer.head.weight)
    assert list(open_model(nested.out, torch.device("cpu")).codes) == [2, 8]


def test_nested_codes_share_one_network(nested):
    assert nested.catalyzer.dims == (8, 24)
    assert {n: (code.dim, code.nbytes) for n, code in nested.codes.items()} == {
        2: (8, 2),
        8: (24, 8),
    }
    assert [each.nbytes for each in nested.measured] == [2, 2, 8, 8]
    by_bytes = {each.nbytes: each for each in nested.measured if "quantised" not in each.name}
    assert by_bytes[8].recall(10) > by_bytes[2].recall(10)
    assert nested.advice[8].choice == "not compared"


def test_every_epoch_is_logged(tuned):
    rows = lines(tuned.out, "train")
    assert [row["step"] for row in rows] == list(range(1, 7))
    for row in rows:
        assert {"rank_loss", "koleo", "koleo_of_uniform", "satisfied"} < row.keys()
        assert 0 < row["recall_at_10_4_bytes"] <= 1
        assert row["recall_at_1_4_bytes_floats"] <= row["recall_at_10_4_bytes_floats"]
    assert len(lines(tuned.out, "finetune")) == 1
    trials = lines(tuned.out, "tune")
    assert [row["weight"] for row in trials] == [0.0, 0.05]


def test_the_best_weight_and_epoch_are_kept(tuned):
    found = results(tuned)
    recalls = [trial["scores"][0]["quantised"][1] for trial in found["trials"]]
    rank = 10 if max(recalls) < 0.9 else 1
    recalls = [trial["scores"][0]["quantised"][(1, 10).index(rank)] for trial in found["trials"]]
    assert found["koleo"] == tuned.koleo == [0.0, 0.05][int(np.argmax(recalls))]
    seen = [
        (row["recall_at_10_4_bytes"], row["recall_at_1_4_bytes"], stage, row["step"])
        for stage in ("train", "finetune")
        for row in lines(tuned.out, stage)
    ]
    best = max(seen, key=lambda each: each[:2])
    rank = 10 if best[0] < 0.9 else 1
    if rank == 1:
        best = max(seen, key=lambda each: (each[1], each[0]))
    assert found["best"] == {"rank": rank, "stage": best[2], "epoch": best[3]}
    assert found["validation"][0]["quantised"][1] == best[0]


def test_what_is_reported_is_what_the_file_does_on_vectors_it_never_saw(tuned):
    vectors = torch.from_numpy(open_vectors("digits").array())
    learn, choosing, reporting = split(vectors, 0.2)
    found = results(tuned)
    assert (found["n_train"], found["n_base"], found["n_queries"]) == (
        len(learn),
        len(reporting.base),
        len(reporting.queries),
    )
    assert found["n_base_learned"] == reporting.learned == len(learn)
    embedding = Catalyzer.load(tuned.out / "catalyzer.safetensors").at(16)
    code = tuned.codes[4]
    base = code.decode(code.encode(embedding.embed(reporting.base)))
    order = (embedding.embed(reporting.queries) @ base.T).sort(dim=1, descending=True).indices
    gaps = torch.cdist(reporting.queries.double(), reporting.base.double())
    hits = order == gaps.argmin(1, keepdim=True)
    ours, plain, *others = tuned.measured
    for rank in CURVE:
        wanted = hits[:, :rank].any(1).double().mean().item()
        assert ours.recall(rank) == pytest.approx(wanted, abs=0.02)  # near ties
    assert plain.recall(10) >= ours.recall(10)
    assert {each.name.split(" to ")[0] for each in others} == {"OPQ", "PCA"}
    assert not torch.equal(choosing.queries, reporting.queries)
    low, high = ours.interval(10)
    assert low < ours.recall(10) < high or ours.recall(10) in (0, 1)


def test_advice_is_given_and_small_data_is_said(tuned):
    advice = results(tuned)["advice"]["4"]
    assert advice["choice"] == tuned.advice[4].choice
    assert "there were 1,438" in advice["sentence"]
    rivals = {each.name for each in tuned.measured[2:]}
    assert advice["choice"] in rivals | {"catalyzer + lattice", "no difference"}


def hits(at_1, at_10, n=1000):
    """Which of 1,000 queries find their neighbour among the first R of `CURVE`."""
    ranks = np.full(n, 99)
    ranks[: round(at_10 * n)] = 5
    ranks[: round(at_1 * n)] = 0
    return np.stack([ranks < r for r in CURVE], 1)


def test_advice_looks_where_methods_differ():
    """Measured: recall@10 is .95 for either among few vectors, and recall@1 tells them apart."""
    facts = {"trained_on": 100_000, "in_dim": 128}
    ours = Measured("catalyzer + lattice", 8, hits(0.50, 0.953))
    opq = Measured("OPQ to 64", 8, hits(0.42, 0.951))
    advice = advice_of(ours, [opq], **facts)
    assert advice.choice == "catalyzer + lattice"
    assert "recall@1 is 8.0 points above" in advice.sentence
    # One that is saturated is enough; and where none is, recall@10 counts.
    low = Measured("PQ", 8, hits(0.2, 0.5))
    assert "recall@1 " in advice_of(low, [opq], **facts).sentence
    far = Measured("RQ", 8, hits(0.3, 0.4))
    advice = advice_of(low, [far], **facts)
    assert advice.choice == "catalyzer + lattice" or "recall@10 is 10.0 points" in advice.sentence


def test_the_epoch_kept_is_the_best_where_epochs_differ():
    def best(rank, epoch, first, tenth):
        scores = (Score(8, 2, 1, (1, 1, 1), (first, tenth, 1)),)
        return Best(rank, "train", epoch, scores, {})

    assert best_of([best(10, 3, 0.2, 0.8), best(1, 5, 0.3, 0.7)]).epoch == 3
    assert best_of([best(10, 3, 0.2, 0.9), best(1, 5, 0.3, 0.7)]).epoch == 5


def test_hidden_layers_in_bfloat16(place):
    options = QUICK | {"nbytes": [2], "against": ["none"]}
    half = train("digits", out=place / "half", precision="bf16-mixed", **options)
    full = train("digits", out=place / "full", **options)
    weights = [done.catalyzer.state_dict() for done in (half, full)]
    assert {value.dtype for value in weights[0].values() if value.is_floating_point()} == {
        torch.float32
    }
    assert not torch.equal(weights[0]["body.0.weight"], weights[1]["body.0.weight"])
    assert abs(half.measured[0].recall(10) - full.measured[0].recall(10)) < 0.1


def test_a_rival_that_wants_more_vectors_is_told(place):
    done = train("digits", out=place / "lsq", **QUICK | {"nbytes": [1], "against": ["lsq"]})
    (note,) = results(done)["notes"]
    assert "LSQ of 1 bytes learns 1,438" in note
    assert note in (done.out / "report.html").read_text()


def test_signs_and_several_dimensions(place):
    signs = train("digits", out=place / "signs", kind="sign", nbytes=[2], against=["none"], **QUICK)
    assert (signs.codes[2].dim, signs.codes[2].bits) == (16, 16)
    dims = train("digits", out=place / "dims", nbytes=[2], dim=[8, 16], against=["pq"], **QUICK)
    assert [row["weight"] for row in lines(dims.out, "tune")] == [0.02, 0.02]
    best = max(results(dims)["trials"], key=lambda trial: trial["scores"][0]["quantised"][1])
    assert dims.codes[2].dim == best["scores"][0]["dim"]


def test_more_dimensions_than_the_vectors_have_are_warned_of(place, capfd):
    few = np.random.default_rng(0).normal(size=(900, 12)).astype("f4")
    np.save(place / "few.npy", few)
    done = train(str(place / "few.npy"), out=place / "wide", nbytes=[4], **QUICK)
    assert "16 dimensions and the vectors have 12" in capfd.readouterr().err.replace("\n", " ")
    assert "16 dimensions" in results(done)["warning"]
    assert "with a bit or more for each of 12" in done.advice[4].sentence
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_model(done.out, torch.device("cpu"))  # `index` and `query` do not say it again


@pytest.fixture(scope="module")
def whole(place):
    return train("digits", out=place / "whole", **LONG).out


def same(out, whole):
    for name in ("catalyzer.safetensors", "codes.json", "results.json", "metrics.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(out.glob("*.ckpt"))


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(place, whole):
    out = place / "killed"
    mark = place / "killed.partial" / "train.ckpt"
    # Sums of floats depend on the number of threads.
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-c", CALL, str(out)], env=env, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 100
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(InputError, match="--resume"):
        train("digits", out=out, **LONG)
    train("digits", out=out, resume=True, **LONG)
    same(out, whole)


def test_a_run_interrupted_after_every_checkpoint_ends_alike(place, whole, monkeypatch):
    save = RunFolder.save_state

    def save_and_die(self, name, state):
        save(self, name, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_state", save_and_die)
    stages = []
    while not (place / "often").exists():
        try:
            train("digits", out=place / "often", resume=bool(stages), **LONG)
        except KeyboardInterrupt:
            stages.append(len(list((place / "often.partial").glob("*.ckpt"))))
    assert stages == [1, 1, 2, 2, 2, 3, 3]  # two trials, three epochs, two of fine-tuning
    same(place / "often", whole)


@pytest.mark.slow
def test_two_processes_train_one_network(place):
    out = place / "two"
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    call = [sys.executable, *words, sys.executable, "-c", CALL, str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(call, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert lines(out, "train")[-1]["recall_at_10_4_bytes"] > 0.3
    assert len(lines(out, "tune")) == 2
    assert not out.with_name("two.partial").exists()


def test_rivals_are_not_run_twice(place, monkeypatch):
    from remanence.jobs.search import train_stages

    run, calls = train_stages.run_rival, []

    def once(key, *arguments, **options):
        calls.append(key)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(key, *arguments, **options)

    monkeypatch.setattr(train_stages, "run_rival", once)
    options = QUICK | {"nbytes": [4], "against": ["pq", "pca"], "out": place / "rivals"}
    with pytest.raises(KeyboardInterrupt):
        train("digits", **options)
    done = train("digits", resume=True, **options)
    assert calls[0] not in calls[1:]
    assert len(done.measured) == 2 + len(set(calls))


@pytest.fixture
def refused(tmp_path):
    def check(source, words, **options):
        before = {path.name for path in tmp_path.iterdir()}
        with pytest.raises(InputError, match=words) as error:
            train(str(source), out=tmp_path / "run", **QUICK | options)
        assert "\n" not in str(error.value)
        assert {path.name for path in tmp_path.iterdir()} == before

    return check


def test_bad_vectors_are_refused(tmp_path, refused):
    good = np.random.default_rng(0).normal(size=(800, 20)).astype("f4")
    bad = good.copy()
    bad[417, 3] = np.nan
    for name, rows in [
        ("nan", bad),
        ("constant", np.ones((800, 20), "f4")),
        ("few", good[:300]),
        ("flat", good[0]),
    ]:
        np.save(tmp_path / f"{name}.npy", rows)
    whole = np.concatenate([np.full((800, 1), 20, "i4").view("f4"), good], 1).tobytes()
    (tmp_path / "cut.fvecs").write_bytes(whole[:-7])
    refused(tmp_path / "nan.npy", "row 417 holds NaN")
    refused(tmp_path / "constant.npy", "all the same")
    refused(tmp_path / "few.npy", "leaves 20 queries")
    refused(tmp_path / "flat.npy", "vector a row")
    refused(tmp_path / "cut.fvecs", "cut.fvecs")
    refused(tmp_path / "none.npy", "none.npy")
    refused("digits@0:600", "rank 50: give at least 500", negative=50, validation=0.3)
    refused("digits", "rank 1500: give at least 15000", negative=1500)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nbytes": [0]}, "0 bytes"),
        ({"nbytes": [4, 4]}, "--nbytes 4 4: give each once"),
        ({"nbytes": [8], "dim": [2]}, r"8 bytes in dimension 2: give dimension 16 \(r2 515\)"),
        ({"nbytes": [4, 8], "dim": [16, 24, 32]}, "3 for 2 --nbytes"),
        ({"nbytes": [4], "dim": [16, 16]}, "--dim 16 16"),
        ({"nbytes": [4, 8], "dim": [24, 24], "finetune_epochs": 1}, "its own --dim"),
        ({"kind": "sign", "dim": [24]}, "dimension 64, not 24"),
        ({"koleo": [-0.1]}, "--koleo -0.1"),
        ({"koleo": [float("nan")]}, "--koleo nan"),
        ({"koleo": [0.1, 0.1]}, "give each once"),
        ({"epochs": 0}, "--epochs 0"),
        ({"validation": 1.5}, "--validation 1.5"),
        ({"against": ["opq", "none"]}, "--against none"),
        ({"batch_size": 2000}, "batches of 2000 of 1438"),
        ({"pool": 30}, "give at least 72"),
        ({"devices": 10_000}, "--devices 10000"),
        ({"precision": "16-mixed"}, "--precision 16-mixed: give one of 32-true, bf16-mixed"),
    ],
)
def test_bad_options_are_refused(refused, options, words):
    refused("digits", words, **options)


def test_a_folder_that_exists_is_kept(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("x")
    with pytest.raises(InputError, match="already exists"):
        train("digits", out=tmp_path / "run", **QUICK)
    assert (tmp_path / "run" / "mine").read_text() == "x"
