"""`remanence audit dejavu` on a network that was trained, by plain torch and timm, to overfit."""

import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy import stats

from remanence import cli
from remanence.audit.dejavu import contributions, detectable, images_needed_by_rank
from remanence.errors import InputError
from remanence.jobs.audit.dejavu import dejavu
from remanence.jobs.audit.image_sets import image_sets
from remanence.kit.images import open_images

SIZE, MEAN, STD = 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def draw(n, seed):
    """Blobs of random colours under random labels: nothing to learn but each image."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear").mul(255).byte()
    return images, torch.randint(4, (n,), generator=generator)


def write(path, images, labels):
    def png(image):
        stream = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, "PNG")
        return {"bytes": stream.getvalue(), "path": None}

    table = {"image": [png(image) for image in images], "label": labels.tolist()}
    pq.write_table(pa.table(table), path)
    return str(path)


def train(folder, images, labels, steps):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    x = normalised(images)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randperm(len(x))[:100]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[rows]), labels[rows]).backward()
        optimizer.step()
    folder.mkdir()
    save_file(model.eval().state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "test_resnet",
        "num_classes": 4,
        "pretrained_cfg": {
            "input_size": [3, SIZE, SIZE],
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": list(MEAN),
            "std": list(STD),
            "num_classes": 4,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model


def normalised(images):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (images / 255 - mean) / std


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    trained, fresh, held_out = draw(200, 1), draw(300, 2), draw(300, 3)
    model = train(root / "net", *trained, steps=70)
    train(root / "clean_net", *draw(200, 9), steps=15)
    mixed = [torch.cat((a[:60], b[:60])) for a, b in zip(trained, fresh, strict=True)]
    return {
        "root": root,
        "model": str(root / "net"),
        "module": model,
        "clean_model": str(root / "clean_net"),
        "leaked": write(root / "leaked.parquet", *mixed),
        "known": write(root / "known.parquet", trained[0][100:], trained[1][100:]),
        "fresh": write(root / "fresh.parquet", fresh[0][60:], fresh[1][60:]),
        "reference": write(root / "reference.parquet", *held_out),
        "images": {"leaked": mixed, "reference": held_out, "fresh": fresh, "trained": trained},
    }


@pytest.fixture(scope="module")
def found(world):
    return dejavu(
        out=world["root"] / "found",
        candidate=world["leaked"],
        reference=world["reference"],
        model=world["model"],
        known_members=world["known"],
        test="mw_loss",
        explore=["ks1", "ks", "mw", "calibrated"],
        reference_model=[world["clean_model"]],
        equivalence=0.1,
        null_check=100,
        seed=1,
    )


def logits(world, name):
    with torch.no_grad():
        return world["module"](normalised(world["images"][name][0])).double()


def margins(world, name):
    z, y = logits(world, name), world["images"][name][1][:, None]
    others = z.scatter(1, y, -torch.inf).logsumexp(1)
    return (z.gather(1, y)[:, 0] - others).numpy()


def test_half_a_leak_is_found_and_measured(found):
    assert found.evidence[0].verdict == "detected"
    fraction = found.results["leaked_fraction"]
    assert fraction["low"] < 0.5 < fraction["high"]
    assert fraction["high"] - fraction["low"] < 0.5
    assert found.results["equivalence"]["verdict"] == "not detected"
    assert found.results["power"]["smallest"] < 0.5


def test_the_figures_are_those_of_an_independent_computation(world, found):
    candidate, reference = margins(world, "leaked"), margins(world, "reference")
    u = stats.mannwhitneyu(candidate, reference, alternative="greater", method="asymptotic")
    evidence = found.evidence[0]
    assert evidence.value == pytest.approx(u.statistic / (120 * 300), abs=1e-6)
    assert evidence.log10_p == pytest.approx(np.log10(u.pvalue), rel=1e-3)
    confidences = [logits(world, name).softmax(1).max(1).values for name in ("leaked", "reference")]
    ks = stats.ks_2samp(*confidences, alternative="less")
    assert found.exploratory[0].value == pytest.approx(ks.statistic, abs=1e-6)
    assert all(e.question.startswith("Exploratory") for e in found.exploratory)


def test_the_contributions_add_up_to_the_finding_and_blame_nobody(found):
    table = pq.read_table(found.out / "scores.parquet").to_pydict()
    assert "leaked" not in table
    own = np.array([c for c in table["contribution"] if c is not None])
    assert len(own) == 120
    assert own.mean() == pytest.approx(found.evidence[0].value - 0.5)
    scores = np.array(table["score"])
    assert own[0] == np.mean(scores[120:] < scores[0]) - 0.5
    assert contributions([1.0], [0.0, 1.0, 1.0, 2.0])[0] == 0.25 + 0.25 - 0.5


def test_the_folder_is_whole_and_the_page_says_what_it_should(found):
    names = {p.name for p in found.out.iterdir()}
    assert names >= {"run.json", "results.json", "report.html", "scores.parquet"}
    assert json.loads((found.out / "results.json").read_text())["verdict"] == "detected"
    html = (found.out / "report.html").read_text()
    for words in ("D = ", "known members", "Exploratory", "False alarms", "Has it been removed"):
        assert words in html
    alarms = found.results["false_alarms"]
    assert alarms["low"] <= 0.05
    assert "no more often" in str(found.results["checks"])


def test_what_was_not_trained_on_is_not_accused(world, tmp_path):
    clean = dejavu(
        out=tmp_path / "x",
        candidate=world["fresh"],
        reference=world["reference"],
        model=world["model"],
        known_members=world["known"],
        test="mw_loss",
        equivalence=0.45,
    )
    assert clean.evidence[0].verdict == "not detected"
    assert clean.results["equivalence"]["verdict"] == "detected"
    assert "no proof" in (tmp_path / "x" / "report.html").read_text()


def test_arrays_give_what_images_give(world, found, tmp_path):
    arguments = {"test": "mw_loss", "out": tmp_path / "x"}
    for role, name in (("candidate", "leaked"), ("reference", "reference")):
        np.save(tmp_path / f"{role}.npy", logits(world, name).float().numpy())
        np.save(tmp_path / f"{role}_y.npy", world["images"][name][1].numpy())
        arguments[role] = str(tmp_path / f"{role}.npy")
        arguments[f"{role}_labels"] = tmp_path / f"{role}_y.npy"
    by_arrays = dejavu(**arguments)
    assert by_arrays.evidence[0].value == pytest.approx(found.evidence[0].value, abs=1e-6)
    assert any(check.holds is None for check in by_arrays.evidence[0].checks)


def test_scores_near_one_are_not_rounded(tmp_path):
    np.save(tmp_path / "c.npy", 1 - 1e-12 * np.arange(1, 41))
    np.save(tmp_path / "r.npy", 1 - 1e-9 * np.arange(1, 41))
    result = dejavu(
        out=tmp_path / "x",
        candidate=str(tmp_path / "c.npy"),
        reference=str(tmp_path / "r.npy"),
    )
    assert result.results["distance"] == 1
    assert result.evidence[0].verdict == "detected"


def test_a_shift_is_called_a_shift_and_nothing_else(world, tmp_path):
    images, labels = world["images"]["trained"]
    dark = write(tmp_path / "dark.parquet", (images * 0.6).byte(), labels)
    result = dejavu(
        out=tmp_path / "x",
        candidate=dark,
        reference=world["reference"],
        model=world["model"],
    )
    assert result.evidence[0].verdict == "not interpretable"
    html = (tmp_path / "x" / "report.html").read_text()
    assert "there is a shift between the two sets" in html
    assert "were in training" not in html


def test_images_on_both_sides_are_refused_and_counted(world, tmp_path):
    images, labels = world["images"]["reference"]
    fresh = world["images"]["fresh"]
    both = write(
        tmp_path / "both.parquet",
        torch.cat((fresh[0][60:160], images[:7])),
        torch.cat((fresh[1][60:160], labels[:7])),
    )
    with pytest.raises(InputError, match="7 of 107 candidates are also references"):
        dejavu(
            out=tmp_path / "x", candidate=both, reference=world["reference"], model=world["model"]
        )
    assert [p.name for p in tmp_path.iterdir()] == ["both.parquet"]


def test_candidates_that_are_known_members_are_counted_and_left_out(world, tmp_path):
    fresh, trained = world["images"]["fresh"], world["images"]["trained"]
    source = write(
        tmp_path / "c.parquet",
        torch.cat((fresh[0][60:], trained[0][100:140])),
        torch.cat((fresh[1][60:], trained[1][100:140])),
    )
    result = dejavu(
        out=tmp_path / "x",
        candidate=source,
        reference=world["reference"],
        model=world["model"],
        known_members=world["known"],
    )
    assert result.results["candidates_known_to_be_trained_on"] == 40
    assert result.results["tested"] == [240, 300]
    assert result.evidence[0].verdict == "not detected"
    named = pq.read_table(tmp_path / "x" / "duplicates.parquet").to_pydict()
    assert sorted(set(named["set"])) == ["candidate", "known member"]
    assert len(named["id"]) == 80
    assert "40 of 280 candidates are pixel by pixel" in (tmp_path / "x/report.html").read_text()


def test_copies_count_as_one(world, tmp_path):
    images, labels = world["images"]["fresh"]
    source = write(tmp_path / "c.parquet", images.repeat(3, 1, 1, 1), labels.repeat(3))
    result = dejavu(
        out=tmp_path / "x",
        candidate=source,
        reference=world["reference"],
        model=world["model"],
        permutations=199,
    )
    assert result.evidence[0].method == "199 permutations of 600 groups"
    assert result.results["with_duplicates_in_their_own_set"] == 600


def test_several_data_sets_are_corrected_for_their_number(world, tmp_path):
    result = dejavu(
        out=tmp_path / "x",
        hypothesis=[
            f"theirs={world['leaked']},{world['reference']}",
            f"ours={world['fresh']},{world['reference']}",
        ],
        model=world["model"],
        test="mw_loss",
    )
    assert result.results["detected"] == ["theirs"]
    theirs, ours = result.evidence
    assert theirs.corrected_log10_p == pytest.approx(theirs.log10_p + np.log10(2))
    assert ours.verdict == "not detected"
    assert "All hypotheses" in (tmp_path / "x" / "report.html").read_text()


def test_bets_stop_when_they_have_won(world, tmp_path):
    common = {"reference": world["reference"], "model": world["model"], "test": "mw_loss"}
    won = dejavu(out=tmp_path / "x", candidate=world["known"], stream=20, **common)
    assert won.evidence[0].verdict == "detected"
    assert won.results["tested"] == [len(won.results["wealth"]) * 20 - 20] * 2
    assert won.results["tested"][0] < 100
    open_ = dejavu(out=tmp_path / "y", candidate=world["fresh"], stream=20, **common)
    assert open_.evidence[0].verdict == "not detected"
    assert open_.results["tested"] == [240, 240]


def test_the_learned_test_runs_on_images_and_on_features(world, tmp_path):
    result = dejavu(
        out=tmp_path / "x",
        candidate=world["leaked"],
        reference=world["reference"],
        model=world["model"],
        test="learned",
        restarts=1,
        limit=40,
        permutations=99,
    )
    assert result.evidence[0].statistic == "out-of-fold t"
    random = np.random.default_rng(0)
    np.save(tmp_path / "c.npy", random.normal(0.7, 1, (80, 3)))
    np.save(tmp_path / "r.npy", random.normal(0, 1, (80, 3)))
    features = dejavu(
        out=tmp_path / "y",
        candidate=str(tmp_path / "c.npy"),
        reference=str(tmp_path / "r.npy"),
        test="learned",
    )
    assert features.evidence[0].verdict == "detected"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test": "ks3"}, "--test ks3: unknown"),
        ({"candidate": None}, "give --candidate and --reference"),
        ({"hypothesis": ["a=b,c"]}, "--hypothesis names its own sets"),
        ({"model": None}, "--model: give the folder"),
        ({"explore": ["ks1"]}, "--explore: give other tests than ks1"),
        ({"equivalence": 0.1}, "--equivalence: needs --known-members"),
        ({"test": "calibrated"}, "--test calibrated: give --reference-model"),
        ({"reference_model": ["x"]}, "--reference-model: is for --test calibrated"),
        ({"stream": 5, "null_check": 9}, "--null-check does not go with --stream"),
        ({"known_members": "K", "test": "learned"}, "--known-members: the learned test"),
        ({"reference": "r.npy"}, "give either images for all sets"),
        ({"level": 0.7}, "--level 0.7"),
        ({"permutations": 5}, "--permutations 5: must be at least 99"),
        ({"limit": 12}, "give at least 30 candidates; there are 12"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_bad_options_are_refused_in_one_line(world, tmp_path, options, message):
    usual = {
        "candidate": world["leaked"],
        "reference": world["reference"],
        "model": world["model"],
    }
    with pytest.raises(InputError, match=re.escape(message)) as error:
        dejavu(out=tmp_path / "x", **(usual | options))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("candidate", "options", "message"),
    [
        (np.full(40, np.nan), {}, "40 of 40 rows hold NaN"),
        (np.zeros(40), {}, "candidate scores are all 0"),
        (np.arange(12.0), {}, "give at least 20 candidates; there are 12"),
        (np.full((40, 4), 0.25), {}, "give values before the softmax"),
        (np.zeros((2, 3, 4)), {}, "give one score a sample"),
        (np.array([["a"]] * 40), {}, "give one score a sample"),
        (np.random.default_rng(0).normal(size=(40, 4)), {"test": "mw_loss"}, "needs labels"),
        (np.arange(40.0), {"limit": 9}, "--limit: is for images"),
    ],
)
def test_bad_arrays_are_refused_in_one_line(tmp_path, candidate, options, message):
    np.save(tmp_path / "c.npy", candidate)
    np.save(tmp_path / "r.npy", np.random.default_rng(1).normal(size=(40, *candidate.shape[1:])))
    with pytest.raises(InputError, match=re.escape(message)):
        dejavu(
            out=tmp_path / "x",
            candidate=str(tmp_path / "c.npy"),
            reference=str(tmp_path / "r.npy"),
            **options,
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.npy", "r.npy"]


def test_the_command_has_the_options_of_the_function(world, tmp_path, monkeypatch, capsys):
    job = ("remanence.jobs.audit.dejavu:dejavu", "help")
    monkeypatch.setitem(cli.COMMANDS, ("audit", "dejavu"), job)
    words = f"--candidate {world['leaked']} --reference {world['leaked']} --model {world['model']}"
    assert cli.main(["audit", "dejavu", *words.split(), "--out", str(tmp_path / "x")]) == 2
    assert "120 of 120 candidates are also references" in capsys.readouterr().err
    assert cli.main(["audit", "dejavu", "--help"]) == 0
    assert "--known-members" in capsys.readouterr().out


def test_files_of_another_make_are_told_apart(tmp_path):
    images, labels = draw(40, 5)
    one = open_images(write(tmp_path / "one.parquet", images, labels))
    folder = tmp_path / "jpeg" / "a"
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:02}.jpg", quality=60)
    first, second = image_sets([one, open_images(str(tmp_path / "jpeg"))])
    assert set(first.fingerprints["file format"]) == {"PNG"}
    assert set(second.fingerprints["file format"]) == {"JPEG"}
    assert not set(first.fingerprints["JPEG table"]) & set(second.fingerprints["JPEG table"])
    assert first.images.shape == (40, 3, SIZE, SIZE)  # never enlarged: hashes would coincide
    assert len(set(first.digests)) == 40


def test_the_images_needed_give_the_power_they_promise():
    shift, leak = 1.2, 0.2
    auc = float(stats.norm.cdf(shift / np.sqrt(2)))
    m = images_needed_by_rank(auc, leak)
    random = np.random.default_rng(0)
    found = 0
    for _ in range(400):
        c = random.normal(size=m) + shift * (random.random(m) < leak)
        p = stats.mannwhitneyu(c, random.normal(size=m), alternative="greater").pvalue
        found += p <= 0.05
    assert 0.74 < found / 400 < 0.88
    with pytest.raises(InputError, match="give an AUC"):
        images_needed_by_rank(0.5, leak)


def test_power_is_none_where_members_look_like_others():
    scores = np.random.default_rng(0).normal(size=100)
    assert detectable("mw", 50, 50, scores, scores).smallest is None
    assert detectable("ks1", 50, 50, scores - 9, scores).smallest is None
    strong = detectable("ks1", 50, 50, scores + 9, scores)
    assert strong.separation == 1
    assert list(strong.needed.values()) == sorted(strong.needed.values(), reverse=True)
