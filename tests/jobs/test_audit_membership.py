import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy import stats

import remanence.kit.architectures  # noqa: F401  # registers cifar_convnet5
from remanence import cli
from remanence.audit.membership import ReferencePool, references_from_logits
from remanence.errors import InputError
from remanence.jobs.audit import membership as job
from remanence.jobs.audit import membership_references
from remanence.jobs.audit.membership import membership
from remanence.kit.images import open_images

MEMBERS, NONMEMBERS = "digits@test", "digits@train"  # the larger split has non-members enough
SIZE = 8
FAST = {"reference_epochs": 12, "reference_batch_size": 32, "reference_lr": 0.1}


def write_folder(folder, name, model, **arguments):
    """A model folder as timm and its users write it, with none of our code."""
    folder.mkdir()
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
    )
    config = {
        "architecture": name,
        "num_classes": 10,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, SIZE, SIZE],
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "classifier": "fc",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def pixels(source, limit=None):
    images = open_images(source, limit=limit)
    x = np.stack([np.asarray(images.image(i)) for i in range(len(images))])
    return torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1, torch.from_numpy(images.labels)


def train(model, x, y, epochs, lr=0.05):
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A fresh network, a checkpoint, and what it becomes when it is fine-tuned on the members."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    fresh = timm.create_model("cifar_convnet5", num_classes=10, width=4).eval()
    found = {"fresh": write_folder(root / "fresh", "cifar_convnet5", fresh, width=4)}
    x, y = pixels(NONMEMBERS)
    before = train(fresh, x[1000:1200], y[1000:1200], 4)
    found["before"] = write_folder(root / "before", "cifar_convnet5", before, width=4)
    x, y = pixels(MEMBERS, limit=200)
    tuned = train(before, x, y, 30)
    found["tuned"] = write_folder(root / "tuned", "cifar_convnet5", tuned, width=4)
    return found


@pytest.fixture(scope="module")
def audited(folders, tmp_path_factory):
    return membership(
        members=MEMBERS,
        nonmembers=NONMEMBERS,
        model=folders["tuned"],
        out=tmp_path_factory.mktemp("runs") / "audited",
        limit=200,
        references=6,
        **FAST,
    )


def scores_of(out):
    return pq.read_table(out / "scores.parquet").to_pydict()


# What it finds


def test_it_finds_the_leak_and_the_figures_follow_from_the_scores(audited):
    assert audited.evidence.verdict == "detected"
    rows = scores_of(audited.out)
    assert list(rows)[:5] == ["id", "set", "label", "loss", "margin"]
    assert list(audited.scores) == ["mast", "lira", "rmia", "malt", "zero-one"]
    member = np.array(rows["set"]) == "member"
    for name, figures in audited.results["attacks"].items():
        score = np.array(rows[name])
        test = stats.mannwhitneyu(score[member], score[~member], alternative="greater")
        auc = test.statistic / (member.sum() * (~member).sum())
        assert figures["auc"]["value"] == pytest.approx(auc)
        assert 10 ** figures["log10_p"] == pytest.approx(test.pvalue, rel=0.05)
    assert audited.results["evidence"]["statistic"] == "AUC of mast"
    assert audited.results["exploratory"][0]["statistic"] == "AUC of lira"


def references_of(out):
    def make():
        return timm.create_model("cifar_convnet5", num_classes=10, width=4)

    pool = ReferencePool.load(out / "references.safetensors", make)
    sides = [pixels(source, limit=200) for source in (MEMBERS, NONMEMBERS)]
    x, y = (torch.cat(part) for part in zip(*sides, strict=True))
    return pool, pool.logits(x), y


def test_threshold_and_posterior_come_from_the_references_alone(audited):
    pool, logits, y = references_of(audited.out)
    assert (pool.design.sum(0) == 3).all()
    references = references_from_logits(logits, y, pool.design)
    elsewhere, inside = [], []
    for k in range(6):
        target, others, member = references.leave_out(k)
        # The free energy of both sides in equal parts, written out.
        parts = [
            np.log(np.where(use, np.exp(-others.loss[..., 0]), 0).sum(0) / use.sum(0))
            for use in (others.member, ~others.member)
        ]
        elsewhere.append(-np.logaddexp(*parts) + np.log(2) - target.loss[:, 0])
        inside.append(member)
    score, member = np.concatenate(elsewhere), np.concatenate(inside)
    decision = audited.results["attacks"]["mast"]["decision"]
    values = np.unique(score)
    cuts = (values[1:] + values[:-1]) / 2
    balanced = [(score[member] >= c).mean() - (score[~member] >= c).mean() for c in cuts]
    best = cuts[int(np.argmax(balanced))]
    assert decision["threshold"] == pytest.approx(best, rel=1e-4)
    own = audited.scores["mast"]
    called = own >= decision["threshold"]
    truth = audited.member
    assert decision["balanced_accuracy"]["value"] == pytest.approx(
        (called[truth].mean() + (~called[~truth]).mean()) / 2
    )
    # A logistic function of the score, with the temperature that is reported.
    (temperature,) = audited.results["calibration"]["temperature"]
    (offset,) = audited.results["calibration"]["offset"]
    assert audited.posterior == pytest.approx(1 / (1 + np.exp(-own / temperature - offset)))

    def loss(a, b):
        return np.logaddexp(0, np.where(member, -1, 1) * (a * score + b)).mean()

    fitted = loss(1 / temperature, offset)
    for a, b in ((0.9, 0), (1.1, 0), (1, 0.1), (1, -0.1)):
        assert fitted <= loss(a / temperature, offset + b)


def test_a_network_that_saw_neither_side_is_not_accused(folders, audited, tmp_path):
    found = membership(
        members=MEMBERS,
        nonmembers=NONMEMBERS,
        model=folders["fresh"],
        out=tmp_path / "x",
        limit=200,
        reference_pool=audited.out,
    )
    assert found.evidence.verdict == "not detected"
    low, high = (found.results["attacks"]["mast"]["auc"][end] for end in ("low", "high"))
    assert low < 0.5 < high
    assert found.results["epsilon"]["epsilon"] == 0
    assert any("unlike the audited model" in note for note in found.results["notes"])
    assert not (tmp_path / "x" / "references.safetensors").exists()
    assert found.results["references"]["accuracy_in"] == pytest.approx(
        audited.results["references"]["accuracy_in"]
    )


def test_the_run_folder_is_whole_and_strict_json(audited):
    def refuse(word):
        raise AssertionError(word)

    text = (audited.out / "results.json").read_text()
    assert json.loads(text, parse_constant=refuse) == json.loads(json.dumps(audited.results))
    names = {path.name for path in audited.out.iterdir()}
    assert {"run.json", "report.html", "scores.parquet", "references.safetensors"} <= names
    assert not [name for name in names if name.endswith((".ckpt", ".part"))]
    html = (audited.out / "report.html").read_text()
    for words in ("Detected means", "No non-member was in the training set", "By class", "Epsilon"):
        assert words in html
    assert "candidates" not in html
    assert html.count("<svg") == 2


def test_sides_that_differ_without_any_model_are_not_interpretable(folders, tmp_path):
    rng = np.random.default_rng(0)
    for side, top in (("a", 256), ("b", 200)):
        for i in range(40):
            path = tmp_path / side / str(i % 10) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, top, (8, 8, 3), dtype=np.uint8)).save(path)
    found = membership(
        members=str(tmp_path / "a"),
        nonmembers=str(tmp_path / "b"),
        model=folders["fresh"],
        out=tmp_path / "x",
    )
    assert found.evidence.verdict == "not interpretable"
    assert any("blind classifier" in check.finding for check in found.evidence.failed)
    assert found.results["calibration"]["fitted_on"] == "nothing"  # 40 a side are too few
    assert np.isnan(found.posterior).all()


def test_plain_timm_folders_without_labels_or_references(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).eval()
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "test_resnet", "num_classes": 10}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "crop_pct": 1.0}
    (folder / "config.json").write_text(json.dumps(config))
    found = membership(
        members=MEMBERS,
        nonmembers=NONMEMBERS,
        model=str(folder),
        out=tmp_path / "x",
        limit=120,
        unlabelled=True,
        fpr=[0.05],
    )
    assert list(found.scores) == ["malt"]
    assert found.results["samples"]["labels"] == "predicted"
    assert "the predicted class takes the label's place" in found.results["notes"][0]
    assert [r["limit"] for r in found.results["attacks"]["malt"]["tpr_at_fpr"]] == [0.05]
    assert found.results["calibration"]["fitted_on"] == "a half of the samples"
    assert np.isfinite(found.posterior).all()


def test_attacks_on_parameters_and_pixels(folders, tmp_path):
    found = membership(
        members=MEMBERS,
        nonmembers=NONMEMBERS,
        model=folders["tuned"],
        pretrained=folders["before"],
        attack=["quantile", "malt"],
        out=tmp_path / "x",
        limit=420,
    )
    assert list(found.scores) == ["quantile", "malt", "matt"]
    fitted = np.isnan(found.scores["quantile"])
    assert fitted.sum() == 210
    assert not found.member[fitted].any()
    for figures in found.results["attacks"].values():  # nobody is judged on what was fitted on
        assert figures["threshold_from"] == "a half of the samples"
    assert found.results["units"] == {"what": "samples", "members": 360, "nonmembers": 210}
    unseen = ~found.member & ~fitted
    malt = found.results["attacks"]["malt"]["auc"]["value"]
    margin = np.array(scores_of(found.out)["margin"])
    pairs = margin[found.member][:, None] > margin[unseen]
    assert malt == pytest.approx(pairs.mean())
    # First order: how fast the losses fall on the way from the checkpoint, by finite differences.
    states = [
        {k: v.double() for k, v in timm_model(folders[name]).state_dict().items()}
        for name in ("before", "tuned")
    ]
    x, y = pixels(MEMBERS)
    expected = slope(*states, x[:5], y[:5])
    assert found.scores["matt"][:5] == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_the_inverse_hessian_is_for_small_networks(tmp_path):
    torch.manual_seed(0)
    tiny = timm.create_model("cifar_convnet5", num_classes=10, width=1).eval()
    folder = write_folder(tmp_path / "tiny", "cifar_convnet5", tiny, width=1)
    given = {"members": MEMBERS, "nonmembers": NONMEMBERS, "attack": ["malt", "iha"], "limit": 40}
    found = membership(model=folder, out=tmp_path / "x", **given)
    assert np.isfinite(found.scores["iha"]).all()
    assert found.evidence.statistic == "AUC of malt"
    large = timm.create_model("cifar_convnet5", num_classes=10, width=16)
    folder = write_folder(tmp_path / "large", "cifar_convnet5", large, width=16)
    refuse(
        "of up to 10,000 parameters; cifar_convnet5 has 70,618",
        tmp_path / "y",
        model=folder,
        **given,
    )


def timm_model(folder):
    model = timm.create_model("cifar_convnet5", num_classes=10, width=4)
    from safetensors.torch import load_file

    model.load_state_dict(load_file(f"{folder}/model.safetensors"))
    return model.eval()


def slope(before, after, x, y, step=1e-7):
    model = timm.create_model("cifar_convnet5", num_classes=10, width=4).double().eval()
    names = dict(model.named_parameters())
    losses = []
    for side in (1, -1):
        state = {
            k: v + side * step * (after[k] - v) if k in names else v for k, v in before.items()
        }
        model.load_state_dict(state)
        with torch.no_grad():
            losses.append(torch.nn.functional.cross_entropy(model(x.double()), y, reduction="none"))
    return ((losses[1] - losses[0]) / (2 * step)).numpy()


# Arrays


@pytest.fixture
def arrays(tmp_path):
    """Logits of 80 members, whose labels score higher, and 70 others, with references."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 150)
    logits = rng.normal(size=(150, 4)).astype(np.float32)
    logits[np.arange(150), labels] += 1 + (np.arange(150) < 80)
    mask = rng.random((8, 150)).argsort(0) < 4
    references = rng.normal(size=(8, 150, 4)).astype(np.float32)
    references[:, np.arange(150), labels] += 1 + mask
    files = {"m": logits[:80], "n": logits[80:], "ml": labels[:80], "nl": labels[80:]}
    files |= {"r": references, "rm": mask}
    for name, values in files.items():
        np.save(tmp_path / f"{name}.npy", values)
    return tmp_path


def options_of(arrays, *names):
    flags = {"ml": "member_labels", "nl": "nonmember_labels"}
    flags |= {"r": "reference_logits", "rm": "reference_members"}
    found = {"members": str(arrays / "m.npy"), "nonmembers": str(arrays / "n.npy")}
    return found | {flags[name]: arrays / f"{name}.npy" for name in names} | {"out": arrays / "x"}


def test_arrays_need_no_model(arrays):
    found = membership(**options_of(arrays, "ml", "nl", "r", "rm"))
    assert list(found.scores) == ["mast", "lira", "rmia", "malt", "zero-one"]
    assert found.evidence.verdict == "detected"
    assert found.results["calibration"]["fitted_on"] == "references"
    logits = np.load(arrays / "m.npy").astype(float)
    label = np.load(arrays / "ml.npy")
    others = np.where(np.eye(4)[label] == 1, -np.inf, logits)
    margin = logits[np.arange(80), label] - np.log(np.exp(others).sum(1))
    assert found.scores["malt"][:80] == pytest.approx(margin)


def test_arrays_without_labels_say_so(arrays):
    found = membership(**options_of(arrays))
    assert list(found.scores) == ["malt"]
    assert found.results["samples"]["accuracy"] is None
    assert "the predicted class takes the label's place" in found.results["notes"][0]
    assert "so nothing could be compared" in (arrays / "x" / "report.html").read_text()
    logits = np.load(arrays / "n.npy").astype(float)
    top = np.exp(logits - logits.max(1, keepdims=True))
    expected = -np.log(top.sum(1) - 1)
    assert found.scores["malt"][80:] == pytest.approx(expected)


def test_references_that_saw_no_sample_give_the_offline_attacks(arrays):
    np.save(arrays / "rm.npy", np.zeros((8, 150), dtype=bool))
    found = membership(**options_of(arrays, "ml", "nl", "r", "rm"))
    assert list(found.scores) == ["mast", "lira-offline", "rmia", "malt", "zero-one"]
    assert found.results["calibration"]["fitted_on"] == "a half of the samples"


def test_probabilities_are_refused_unless_announced(arrays):
    for name in ("m", "n"):
        logits = np.load(arrays / f"{name}.npy")
        odds = np.exp(logits)
        np.save(arrays / f"{name}.npy", odds / odds.sum(1, keepdims=True))
    with pytest.raises(InputError, match="look like probabilities"):
        membership(**options_of(arrays, "ml", "nl"))
    assert not list(arrays.glob("x*"))
    found = membership(**options_of(arrays, "ml", "nl"), probabilities=True)
    assert found.evidence.verdict == "detected"


def test_coarse_logits_are_noted(arrays):
    for name in ("m", "n"):
        np.save(arrays / f"{name}.npy", np.load(arrays / f"{name}.npy").astype(np.float16))
    notes = membership(**options_of(arrays, "ml", "nl")).results["notes"]
    assert any("16-bit" in note for note in notes)


def test_groups_are_counted_instead_of_samples(arrays):
    logits = np.concatenate([np.load(arrays / f"{name}.npy") for name in "mn"])
    labels = np.concatenate([np.load(arrays / f"{name}.npy") for name in ("ml", "nl")])
    groups = np.array([f"p{i // 2}" for i in range(80)] + [f"q{i // 2}" for i in range(70)])
    np.save(arrays / "g.npy", groups[:80])
    np.save(arrays / "h.npy", groups[80:])
    found = membership(
        **options_of(arrays, "ml", "nl"),
        member_groups=arrays / "g.npy",
        nonmember_groups=arrays / "h.npy",
    )
    others = np.where(np.eye(4)[labels] == 1, -np.inf, logits)
    margin = logits[np.arange(150), labels] - np.log(np.exp(others).sum(1))
    means = margin.reshape(75, 2).mean(1)
    test = stats.mannwhitneyu(means[:40], means[40:], alternative="greater", method="exact")
    assert found.results["units"] == {"what": "groups", "members": 40, "nonmembers": 35}
    assert 10**found.evidence.log10_p == pytest.approx(test.pvalue)
    rows = scores_of(found.out)
    assert rows["group"] == list(groups)
    assert found.results["grouped_auc"]["low"] < found.results["grouped_auc"]["high"]


# An interrupted run


def test_resume_does_not_train_again(folders, tmp_path, monkeypatch):
    options = {"members": MEMBERS, "nonmembers": NONMEMBERS, "model": folders["tuned"]}
    options |= {"out": tmp_path / "x", "limit": 40, "references": 6, "reference_epochs": 1}

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(job, "score_attacks", stop)
        with pytest.raises(KeyboardInterrupt):
            membership(**options)
    pool = (tmp_path / "x.partial" / "references.safetensors").read_bytes()
    with pytest.raises(InputError, match="pass --resume"):
        membership(**options)
    monkeypatch.setattr(membership_references, "train_references", stop)
    found = membership(**options, resume=True)
    assert (found.out / "references.safetensors").read_bytes() == pool
    assert not (tmp_path / "x.partial").exists()


# Bad input


def refuse(message, out, **options):
    before = {path.name for path in out.parent.iterdir()}
    with pytest.raises(InputError, match=message) as error:
        membership(out=out, **options)
    assert "\n" not in str(error.value)
    assert {path.name for path in out.parent.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonmembers": MEMBERS}, "150 of 150 non-members are also members"),
        ({"limit": 20}, "20 members: give at least 30 samples a side"),
        ({"model": None}, "--model: give the audited model's folder"),
        ({"model": "nowhere"}, "nowhere: no such model folder"),
        ({"nonmembers": "x.npy"}, "two .npy files or two image sources"),
        ({"attack": ["malts"]}, "--attack malts: unknown; give one of malt"),
        ({"attack": ["malt", "malt"]}, "given twice"),
        ({"attack": ["lira"]}, "--attack lira: needs reference models; give --references 16"),
        ({"attack": ["matt"]}, "--attack matt: needs --pretrained"),
        ({"attack": ["iha"]}, "--attack iha: cannot come first"),
        ({"attack": ["quantile"]}, "--attack quantile: 150 non-members"),
        ({"attack": ["zero-one"], "unlabelled": True}, "--attack zero-one: needs true labels"),
        ({"references": 7}, "--references 7: give an even number"),
        ({"references": 2}, "--references 2: must be at least 6"),
        ({"references": 6, "reference_pool": "p"}, "--references and --reference-pool: give one"),
        ({"reference_pool": "p"}, "p: holds no references.safetensors"),
        ({"reference_logits": "r.npy"}, "--reference-logits, --reference-members: give both"),
        ({"fpr": [0.0]}, "--fpr 0: give a rate between 0 and 1"),
        ({"level": 0.6}, "--level 0.6: must be at least"),
        ({"prior": 1.0}, "--prior 1: must be at least"),
        ({"member_labels": "l.npy"}, "images have their own labels"),
        ({"probabilities": True}, "a model gives logits"),
    ],
)
def test_what_cannot_work_is_refused(folders, tmp_path, options, message):
    given = {"members": MEMBERS, "nonmembers": NONMEMBERS, "model": folders["fresh"], "limit": 150}
    from pathlib import Path

    paths = ("reference_pool", "reference_logits", "member_labels")
    given |= {k: Path(v) if k in paths else v for k, v in options.items()}
    refuse(message, tmp_path / "x", **given)


def test_a_copy_under_another_name_is_refused(folders, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(64):
        path = tmp_path / "ab"[i % 2] / "01"[i // 2 % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    Image.open(tmp_path / "a" / "0" / "0.png").save(tmp_path / "b" / "0" / "other.bmp")
    refuse(
        re.escape("1 of 33 non-members are also members (such as 0/other.bmp)"),
        tmp_path / "x",
        members=str(tmp_path / "a"),
        nonmembers=str(tmp_path / "b"),
        model=folders["fresh"],
    )


def test_one_class_is_said_and_trains_no_references(folders, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(80):
        path = tmp_path / "ab"[i % 2] / "cat" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    given = {"members": str(tmp_path / "a"), "nonmembers": str(tmp_path / "b")}
    given["model"] = folders["fresh"]
    refuse(r"all samples are of one class \(cat\)", tmp_path / "x", references=6, **given)
    notes = membership(out=tmp_path / "x", **given).results["notes"]
    assert any("of one class (cat)" in note for note in notes)


def test_a_pool_of_other_samples_or_models_is_refused(folders, audited, tmp_path):
    given = {"members": MEMBERS, "nonmembers": NONMEMBERS, "reference_pool": audited.out}
    given["model"] = folders["tuned"]
    refuse("trained on other samples", tmp_path / "x", limit=100, **given)


def test_a_checkpoint_of_another_architecture_is_refused_before_training(folders, tmp_path):
    wide = timm.create_model("cifar_convnet5", num_classes=10, width=8)
    given = {"members": MEMBERS, "nonmembers": NONMEMBERS, "model": folders["tuned"], "limit": 40}
    other = write_folder(tmp_path / "wide", "cifar_convnet5", wide, width=8)
    refuse("one of the same architecture", tmp_path / "x", pretrained=other, references=6, **given)
    # A new head, though, is what fine-tuning gives a model.
    old = timm.create_model("cifar_convnet5", num_classes=3, width=4)
    write_folder(tmp_path / "old", "cifar_convnet5", old, width=4)
    config = json.loads((tmp_path / "old" / "config.json").read_text()) | {"num_classes": 3}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    found = membership(out=tmp_path / "x", pretrained=str(tmp_path / "old"), **given)
    assert any("another head (fc.bias, fc.weight)" in note for note in found.results["notes"])


def rewrite(arrays, name, change):
    values = np.load(arrays / f"{name}.npy")
    np.save(arrays / f"{name}.npy", change(values))


def poison(values):
    values[3] = np.nan
    return values


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("m", poison, "1 of 80 rows hold NaN"),
        ("r", poison, "NaN or infinity"),
        ("m", lambda v: v[:12], "12 members: give at least 30"),
        ("n", lambda v: v[:, :3], "3 logits a sample, .* has 4"),
        ("ml", lambda v: v + 3, "labels from 3 to 6 for 4 classes"),
        ("nl", lambda v: np.eye(4, dtype=int)[v], "give one integer label for each"),
        ("rm", lambda v: v[:, :-1], r"rm.npy: bool \(8, 149\); give bool \(8, 150\)"),
        ("rm", lambda v: v.astype(float), r"rm.npy: float64 \(8, 150\); give bool"),
        ("r", lambda v: v[:, :-1], r"give floats \(references, 150, 4\), members first"),
    ],
)
def test_broken_arrays_are_refused(arrays, name, change, message):
    rewrite(arrays, name, change)
    labels = () if name in "mn" else ("ml", "nl")
    given = options_of(arrays, *labels, "r", "rm")
    refuse(message, given.pop("out"), **given)


def test_the_command_says_so_in_one_line(arrays, capsys):
    given = [f"--{k} {arrays / v}" for k, v in {"members": "m.npy", "out": "x"}.items()]
    words = f"audit membership {' '.join(given)} --nonmembers digits"
    assert cli.main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("remanence: --members, --nonmembers: give two .npy files")


def test_rows_on_both_sides_are_refused(arrays):
    logits = np.load(arrays / "m.npy")
    rewrite(arrays, "n", lambda v: np.concatenate([v[:-5], logits[:5]]))
    given = options_of(arrays, "ml", "nl")
    refuse("5 of 70 non-members are also members", given.pop("out"), **given)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda i: f"p{i % 40}", "40 groups are also among the members"),
        (lambda i: f"{i // 80}{i % 20}", "20 groups of members: give at least 30"),
    ],
)
def test_groups_that_cannot_be_are_refused(arrays, groups, message):
    names = np.array([groups(i) for i in range(150)])
    np.save(arrays / "g.npy", names[:80])
    np.save(arrays / "h.npy", names[80:])
    given = options_of(arrays) | {"member_groups": arrays / "g.npy"}
    given["nonmember_groups"] = arrays / "h.npy"
    refuse(message, given.pop("out"), **given)
