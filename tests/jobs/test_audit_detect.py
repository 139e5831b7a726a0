"""The detection job against an independent computation: numpy's least squares, Student's t."""

import io
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import nn

from remanence.audit import radioactive as ra
from remanence.errors import InputError
from remanence.jobs.audit.detect import detect
from remanence.jobs.audit.mark import mark
from remanence.kit.images import open_images

SECRET = bytes(range(32)).hex()
LIMIT = {"limit": 300, "calibrate": 50}


def write_network(folder, *, seed=0, name="cifar_convnet5", classes=None, **arguments):
    """Write a model folder as plain timm users do."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=10, **arguments).eval()
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    pretrained = {"input_size": [3, 8, 8], "crop_pct": 1.0, "interpolation": "bilinear"}
    pretrained |= {"mean": [0.3, 0.3, 0.3], "std": [0.4, 0.4, 0.4]}
    config = {"architecture": name, "num_classes": 10, "model_args": arguments}
    if classes is not None:
        config["label_names"] = classes
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": pretrained}))
    return model


def with_head(source, folder, change):
    """Copy a model folder with another last layer."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    state["fc.weight"] = change(state["fc.weight"].double()).float()
    save_file(state, folder / "model.safetensors")
    return str(folder)


def carriers(secret=SECRET, recipient=None):
    return torch.from_numpy(ra.carriers(ra.SecretKey.from_hex(secret), 10, 16, recipient))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A marked data set, its marking network, and a suspect whose head leans to the carriers."""
    folder = tmp_path_factory.mktemp("lab")
    write_network(folder / "marker", width=4)
    (folder / "own.key").write_text(SECRET)
    mark(
        "digits@train",
        model=str(folder / "marker"),
        out=folder / "marked",
        key=folder / "own.key",
        fraction=0.5,
        iterations=2,
        limit=200,
        per_class=True,
    )
    with_head(folder / "marker", folder / "guilty", lambda w: w + 0.15 * carriers())
    return folder


@pytest.fixture
def run(lab, tmp_path):
    def call(name="run", data="digits@test", **options):
        given = {
            "suspect": str(lab / "guilty"),
            "marker": str(lab / "marker"),
            "key": lab / "own.key",
            "public": [lab / "marked" / "public.json"],
            "manifest": [lab / "marked" / "manifest.parquet"],
        }
        return detect(data, out=tmp_path / name, **(given | LIMIT | options))

    return call


def pixels(source="digits@test", limit=300):
    images = open_images(source, limit=limit)
    stack = torch.stack([torch.from_numpy(np.array(images.image(i))) for i in range(len(images))])
    return (stack.permute(0, 3, 1, 2) / 255 - 0.3) / 0.4


def features(model, x):
    model.fc = nn.Identity()
    with torch.inference_mode():
        return model(x).double().numpy()


def fisher(head, u):
    """log10 p by Student's t, which is another form of the cosine's law, and SciPy's Fisher."""
    c = (head * u).sum(1) / np.linalg.norm(head, axis=1) / np.linalg.norm(u, axis=1)
    d = u.shape[1]
    p = stats.t.sf(c * np.sqrt((d - 1) / (1 - c**2)), d - 1)
    return c, float(np.log10(stats.combine_pvalues(p, "fisher").pvalue))


def test_a_head_on_the_marking_network(lab, run):
    head = load_file(lab / "guilty" / "model.safetensors")["fc.weight"].double().numpy()
    c, log10_p = fisher(head, carriers().numpy())
    found = run()
    assert found.evidence.log10_p == pytest.approx(log10_p, abs=1e-6)
    assert log10_p < -5
    assert found.evidence.verdict == "detected"
    assert [row["cosine"] for row in found.results["per_class"]] == pytest.approx(c, abs=1e-6)
    assert found.results["dim_tested"] == 16
    innocent = run("clean", suspect=str(lab / "marker"))
    head = load_file(lab / "marker" / "model.safetensors")["fc.weight"].double().numpy()
    assert innocent.evidence.log10_p == pytest.approx(fisher(head, carriers().numpy())[1], abs=1e-6)
    assert innocent.evidence.verdict == "not detected"


@pytest.fixture(scope="module")
def other(lab):
    """A suspect of another architecture whose aligned head leans to the carriers."""
    folder = lab / "other"
    model = write_network(folder, seed=5, name="cifar_resnet20")
    x = pixels()
    phi0 = marker_features(lab)
    fit = torch.linalg.lstsq
    phit = features(model, x)
    solution = fit(torch.from_numpy(phi0 - phi0.mean(0)), torch.from_numpy(phit - phit.mean(0)))
    # W X' = U has a solution where the suspect has more features than the marker.
    lean = fit(solution.solution, carriers().T).solution.T
    state = load_file(folder / "model.safetensors")
    state["fc.weight"] = (state["fc.weight"] + 0.05 * lean / lean.norm() * 30).float()
    save_file(state, folder / "model.safetensors")
    logits = phit @ state["fc.weight"].double().numpy().T + state["fc.bias"].double().numpy()
    centred = phi0 - phi0.mean(0)
    head = np.linalg.lstsq(centred, logits - logits.mean(0), rcond=1e-8)[0].T
    return folder, logits, head


def test_another_architecture_by_its_weights_and_by_its_outputs(lab, run, other):
    folder, logits, head = other
    log10_p = fisher(head, carriers().numpy())[1]
    white = run(suspect=str(folder))
    assert white.evidence.log10_p == pytest.approx(log10_p, abs=1e-3)  # features are float32
    assert white.evidence.verdict == "detected"
    (crossed,) = white.results["explored"]
    assert crossed["log10_p"] == pytest.approx(log10_p, abs=1e-3)

    np.save(lab / "logits.npy", logits)
    told = run("logits", suspect=str(lab / "logits.npy"))
    assert told.evidence.log10_p == pytest.approx(log10_p, abs=1e-3)
    # Log-probabilities and probabilities tell the head up to a common row, which is centred away.
    centred = fisher(head - head.mean(0), carriers().numpy())[1]
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    for name, values in (("log", log_probs), ("prob", np.exp(log_probs))):
        np.save(lab / f"{name}.npy", values)
        told = run(name, suspect=str(lab / f"{name}.npy"))
        assert told.evidence.log10_p == pytest.approx(centred, abs=1e-2)


def test_references_take_the_ordinary_directions_out(lab, run, tmp_path):
    clean = load_file(lab / "marker" / "model.safetensors")["fc.weight"].double()
    # A reference of three classes leaves room in 16 dimensions.
    torch.manual_seed(2)
    reference = pixels_logits(lab, clean[:3] + 0.1 * torch.randn(3, 16))
    np.save(tmp_path / "reference.npy", reference)
    found = run(reference=[str(tmp_path / "reference.npy")])
    basis = np.linalg.qr(aligned(lab, reference).T)[0]
    guilty = load_file(lab / "guilty" / "model.safetensors")["fc.weight"].double().numpy()
    u = carriers().numpy()
    out = [rows - rows @ basis @ basis.T for rows in (guilty, u)]
    # In the complement, as coordinates of 13 dimensions.
    frame = np.linalg.svd(np.eye(16) - basis @ basis.T)[0][:, :13]
    log10_p = fisher(out[0] @ frame, out[1] @ frame)[1]
    assert found.results["dim_tested"] == 13
    assert found.evidence.log10_p == pytest.approx(log10_p, abs=1e-3)
    names = [one["statistic"] for one in found.results["explored"]]
    assert names == ["without references"]


def marker_features(lab):
    model = timm.create_model("cifar_convnet5", num_classes=10, width=4).eval()
    model.load_state_dict(load_file(lab / "marker" / "model.safetensors"))
    return features(model, pixels())


def pixels_logits(lab, weight):
    return marker_features(lab) @ weight.numpy().T


def aligned(lab, logits):
    phi0 = marker_features(lab)
    centred = phi0 - phi0.mean(0)
    return np.linalg.lstsq(centred, logits - logits.mean(0), rcond=1e-8)[0].T


def test_classes_are_matched_by_name_by_file_and_by_answers(lab, run, tmp_path):
    order = np.random.default_rng(3).permutation(
        10
    )  # the suspect's class j is the owner's order[j]
    shuffled = tmp_path / "shuffled"
    names = [str(k) for k in order]
    with_head(lab / "guilty", shuffled, lambda w: w[order])
    config = json.loads((shuffled / "config.json").read_text())
    plain = run("plain").evidence.log10_p
    blind = run("blind", suspect=str(shuffled))
    assert blind.evidence.log10_p > plain + 3  # taken in order, the mark is lost
    (unknown,) = [c for c in blind.evidence.checks if "classes" in c.assumption]
    assert unknown.holds is None

    table = {name: j for j, name in enumerate(names)}
    (tmp_path / "map.json").write_text(json.dumps(table))
    by_file = run("file", suspect=str(shuffled), classes=str(tmp_path / "map.json"))
    (shuffled / "config.json").write_text(json.dumps(config | {"label_names": names}))
    by_name = run("name", suspect=str(shuffled))
    for found in (by_file, by_name):
        assert found.evidence.log10_p == pytest.approx(plain, abs=1e-9)
    # A class that the owner leaves out is not tested.
    (tmp_path / "map.json").write_text(json.dumps(table | {"7": None}))
    fewer = run("fewer", suspect=str(shuffled), classes=str(tmp_path / "map.json"))
    assert [row["class"] for row in fewer.results["per_class"]] == list("012345689")

    # By its answers: a suspect that knows the digits, one logit a class, in another order.
    images = open_images("digits@test", limit=300)
    answers = np.random.default_rng(0).normal(size=(300, 10))
    answers[np.arange(300), np.argsort(order)[images.labels]] += 8
    np.save(tmp_path / "answers.npy", answers)
    matched = run("match", suspect=str(tmp_path / "answers.npy"), classes="match")
    assert [row["suspect_class"] for row in matched.results["per_class"]] == [
        str(j) for j in np.argsort(order)
    ]


def test_marked_images_are_left_out_of_the_alignment(lab, run):
    published = str(lab / "marked" / "images")
    found = run(data=published, marked_data=published)
    measured = found.results["measured"]
    assert measured["marked images left out"] == "100"
    assert measured["clean images"].startswith("100 of")
    assert measured["published images compared"] == "pixels as in the manifest; 100 marked"
    unknown = run("unknown", data=published, manifest=None)
    assert "no manifest" in unknown.results["measured"]["marked images left out"]


def test_outputs_follow_the_images_that_are_kept(lab, run):
    published = str(lab / "marked" / "images")
    model = timm.create_model("cifar_convnet5", num_classes=10, width=4).eval()
    model.load_state_dict(load_file(lab / "guilty" / "model.safetensors"))
    with torch.inference_mode():
        np.save(lab / "all.npy", model(pixels(published, limit=None)).numpy())
    network = run(data=published)
    outputs = run("outputs", data=published, suspect=str(lab / "all.npy"))
    assert outputs.evidence.log10_p == pytest.approx(network.evidence.log10_p, abs=0.05)


def test_only_marked_classes_are_tested(lab, run, tmp_path):
    out = tmp_path / "few"
    mark(
        "digits@train",
        model=str(lab / "marker"),
        out=out,
        key=lab / "own.key",
        fraction=0.005,
        iterations=1,
        limit=600,
    )
    found = run(public=[out / "public.json"], manifest=[out / "manifest.parquet"])
    rows = [row["class"] for row in found.results["per_class"]]
    assert 1 <= len(rows) <= 3
    assert found.results["power"]["num_classes"] == len(rows)


def test_the_recipient_who_leaked(lab, run, tmp_path):
    keys = {"anna": "a1" * 32, "bob": "bb" * 32}
    for name, secret in keys.items():
        (tmp_path / f"{name}.key").write_text(secret)
    lean = carriers(keys["bob"], "bob")
    leaked = with_head(lab / "marker", tmp_path / "leaked", lambda w: w + 0.15 * lean)
    words = [f"{name}={tmp_path / name}.key" for name in keys]
    nothing = {"key": None, "public": None, "manifest": None}
    found = run(suspect=leaked, recipients=words, **nothing)
    rows = {row["recipient"]: row for row in found.results["recipients"]}
    assert rows["bob"]["verdict"] == "detected"
    assert rows["anna"]["verdict"] == "not detected"
    head = load_file(tmp_path / "leaked" / "model.safetensors")["fc.weight"].double().numpy()
    raw = fisher(head, lean.numpy())[1]
    assert rows["bob"]["log10_p"] == pytest.approx(raw, abs=1e-6)
    assert rows["bob"]["log10_p_corrected"] == pytest.approx(raw + np.log10(2), abs=1e-6)
    assert "bob" in found.evidence.question


@pytest.mark.filterwarnings("ignore::remanence.audit.radioactive.MarkingInfeasible")
def test_decoys(lab, run, tmp_path):
    suspect = with_head(lab / "marker", tmp_path / "suspect", lambda w: 3 * w)
    found = run(suspect=suspect, limit=100, decoys=19, batch_size=100)
    losses = found.results["decoy_losses"]
    rank = sum(loss <= losses[0] for loss in losses[1:])
    assert found.decoys.p == pytest.approx((1 + rank) / 20)
    assert len(losses) == 20
    # The real set and a decoy set, marked and judged by hand.
    images = open_images("digits@test", limit=100)
    labels = torch.from_numpy(images.labels)
    grey = torch.stack([torch.from_numpy(np.array(images.image(i))) for i in range(100)])
    model = timm.create_model("cifar_convnet5", num_classes=10, width=4).eval()
    model.load_state_dict(load_file(tmp_path / "suspect" / "model.safetensors"))
    config = ra.MarkConfig.preset("small", iterations=2, augment=ra.PadCropFlip(8, 2))
    for number, decoy in ((0, None), (8, 7)):
        marked = ra.mark(
            grey.permute(0, 3, 1, 2),
            labels,
            ra.FeatureExtractor(model, input_size=(3, 8, 8)),
            torch.from_numpy(ra.carriers(ra.SecretKey.from_hex(SECRET), 10, 16, decoy=decoy)),
            mean=(0.3,) * 3,
            std=(0.4,) * 3,
            config=config,
            ids=images.ids,
            batch_size=100,
        )
        with torch.inference_mode():
            logits = model((marked.images / 255 - 0.3) / 0.4)
        expected = float(nn.functional.cross_entropy(logits, labels))
        assert losses[number] == pytest.approx(expected, abs=1e-5)
    assert len(set(losses)) == 20
    assert "decoy" in (found.out / "report.html").read_text()


def test_the_report_and_the_record(run):
    found = run()
    page = (found.out / "report.html").read_text()
    for words in (
        "Was this model trained on the marked images?",
        "The model is independent of the carriers",
        "match the published commitment",
        "What would change the verdict",
        "does not show that the images were not used",
    ):
        assert words in page
    results = json.loads((found.out / "results.json").read_text())
    assert results["evidence"] == json.loads(json.dumps(found.evidence.to_dict()))
    assert len(results["per_class"]) == 10
    for file in found.out.rglob("*"):
        assert SECRET.encode() not in file.read_bytes()
    no_commitment = run("none", public=None)
    (check,) = [c for c in no_commitment.evidence.checks if "carriers were fixed" in c.assumption]
    assert check.holds is None


# Bad input


@pytest.fixture
def refused(run, tmp_path):
    def check(**options):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError) as caught:
            run(**options)
        assert sorted(tmp_path.rglob("*")) == before
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return check


def test_options_that_cannot_work(refused, tmp_path, lab):
    assert "--level 0.9" in refused(level=0.9)
    assert "--decoys 5: cannot reach level 0.05; give at least 19" in refused(decoys=5)
    assert "give either --key" in refused(key=None)
    assert "goes with --key" in refused(key=None, recipients=["a=b"], recipient="a")
    assert "give NAME=KEYFILE" in refused(key=None, recipients=["a"])
    assert "no --manifest" in refused(manifest=None, marked_data="digits@train")
    np.save(lab / "any.npy", np.zeros((300, 10)))
    assert "give its model folder" in refused(decoys=19, suspect=str(lab / "any.npy"))
    (tmp_path / "run").mkdir()
    assert "already exists" in refused()


def test_keys_that_are_not_the_ones(refused, tmp_path):
    wrong = tmp_path / "wrong.key"
    wrong.write_text("cd" * 32)
    assert "do not match the commitment" in refused(key=wrong)
    assert "cannot be read" in refused(key=tmp_path / "nowhere.key")
    words = [f"anna={wrong}", f"bob={wrong}"]
    assert "share a key" in refused(key=None, recipients=words, public=None, manifest=None)
    assert "given twice" in refused(key=None, recipients=[words[0], words[0]])
    assert "was made for no one in particular" in refused(recipient="anna")


def test_records_that_were_changed(refused, tmp_path, lab):
    table = (lab / "marked" / "manifest.parquet").read_bytes()
    changed = tmp_path / "manifest.parquet"
    read = pq.read_table(io.BytesIO(table))
    pq.write_table(read.slice(1), changed)
    assert "not the manifest that" in refused(manifest=[changed])
    changed.write_bytes(table[:-50])
    assert "manifest" in refused(manifest=[changed])
    pq.write_table(read.replace_schema_metadata(None), changed)
    assert "not a manifest" in refused(manifest=[changed])
    public = tmp_path / "public.json"
    public.write_text("{}")
    assert "not a commitment" in refused(public=[public])


def test_published_images_that_were_recompressed(refused, tmp_path, lab):
    for file in (lab / "marked" / "images").rglob("*.png"):
        target = tmp_path / "jpeg" / file.parent.name / f"{file.stem}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).save(target)
    line = refused(marked_data=str(tmp_path / "jpeg"))
    assert "are not those of the manifest" in line


def test_networks_that_are_not_the_ones(refused, tmp_path):
    write_network(tmp_path / "wide", width=8)
    line = refused(marker=str(tmp_path / "wide"))
    assert "32 dimensions" in line
    assert "have 16" in line
    write_network(tmp_path / "seed", seed=9, width=4)
    assert "is not the network that marked" in refused(marker=str(tmp_path / "seed"))


def test_outputs_that_do_not_fit(refused, tmp_path):
    array = tmp_path / "array.npy"
    np.save(array, np.zeros((299, 10)))
    assert "299 rows for the 300 images" in refused(suspect=str(array))
    np.save(array, np.random.default_rng(0).normal(size=(300, 7)))
    assert "the class map is missing" in refused(suspect=str(array))
    assert "class map cannot be read" in refused(suspect=str(array), classes="nowhere.json")
    given = tmp_path / "map.json"
    given.write_text('{"0": 7}')
    assert "which the suspect lacks" in refused(suspect=str(array), classes=str(given))
    given.write_text('{"x": 1}')
    assert "none of the owner's classes" in refused(suspect=str(array), classes=str(given))


def test_too_few_images_and_classes_that_were_not_marked(refused, other, tmp_path):
    folder = str(other[0])
    line = refused(suspect=folder, limit=12)
    assert "12 images cannot align 16 features: give at least 80" in line
    photo = Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))
    for name in ("cat", "dog"):
        (tmp_path / "animals" / name).mkdir(parents=True)
        photo.save(tmp_path / "animals" / name / "0.png")
    assert "cat, dog were not marked" in refused(data=str(tmp_path / "animals"))


def test_features_that_are_not_finite(refused, tmp_path):
    net = write_network(tmp_path / "huge", width=4)
    state = {k: 1e30 * v if v.ndim == 4 else v for k, v in net.state_dict().items()}
    save_file(state, tmp_path / "huge" / "model.safetensors")
    assert "NaN or infinite" in refused(suspect=str(tmp_path / "huge"))
