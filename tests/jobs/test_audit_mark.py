"""The marking job: what it writes is compared with the source, with hashlib and with itself."""

import hashlib
import json
import os
import stat
import subprocess
import sys
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from remanence.audit import radioactive as ra
from remanence.errors import InputError
from remanence.jobs.audit.mark import mark
from remanence.jobs.audit.mark_network import config_from_json, config_to_json, open_marker
from remanence.jobs.audit.mark_shards import choose_images, image_paths
from remanence.kit.images import open_images

QUICK = {"fraction": 0.25, "iterations": 4, "limit": 120, "batch_size": 8}
SECRET = bytes(range(32)).hex()


def write_network(folder, *, seed=0, size=8, name="cifar_convnet5", **arguments):
    """Write a model folder as plain timm users do."""
    torch.manual_seed(seed)
    arguments = arguments or {"width": 4}
    model = timm.create_model(name, num_classes=10, **arguments)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    pretrained = {"input_size": [3, size, size], "crop_pct": 1.0, "interpolation": "bilinear"}
    pretrained |= {"mean": [0.3, 0.3, 0.3], "std": [0.4, 0.4, 0.4]}
    config = {"architecture": name, "num_classes": 10, "model_args": arguments}
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": pretrained}))
    return model.eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("marker") / "model"
    write_network(folder)
    return str(folder)


@pytest.fixture(scope="module")
def marked(model, tmp_path_factory):
    key = tmp_path_factory.mktemp("keys") / "own.key"
    key.write_text(SECRET)
    out = tmp_path_factory.mktemp("runs") / "marked"
    return mark("digits@train", model=model, out=out, key=key, **QUICK)


def digest(pixels):
    height, width, _ = pixels.shape
    return hashlib.sha256(f"({width}, {height})".encode() + pixels.tobytes()).hexdigest()


def test_every_image_is_there_and_only_the_marked_ones_differ(marked):
    source = open_images("digits@train", limit=120)
    rows = pq.read_table(marked.out / "manifest.parquet").to_pylist()
    assert [row["id"] for row in rows] == list(source.ids)
    assert sum(row["marked"] for row in rows) == marked.results["marked"] == 30
    psnrs = []
    for i, row in enumerate(rows):
        before = np.asarray(source.image(i))
        with Image.open(marked.out / "images" / row["path"]) as opened:
            assert (opened.format, opened.mode, opened.info) == ("PNG", "RGB", {})
            after = np.asarray(opened)
        assert row["path"].split("/")[0] == row["class"] == source.classes[source.labels[i]]
        assert (row["sha256_before"], row["sha256_after"]) == (digest(before), digest(after))
        change = after.astype(float) - before
        assert row["linf"] == abs(change).max() <= (8 if row["marked"] else 0)
        if row["marked"]:
            psnrs.append(20 * np.log10(255) - 10 * np.log10((change**2).mean()))
            assert row["psnr"] == pytest.approx(psnrs[-1])
        else:
            assert row["psnr"] is row["dot"] is None
    assert min(psnrs) > 34 - 0.05
    assert marked.results["psnr_mean"] == pytest.approx(np.mean(psnrs))
    assert marked.results["dot_mean"] > 0
    # The written folder opens like any other source, with the same labels.
    again = open_images(str(marked.out / "images"))
    assert np.bincount(again.labels).tolist() == np.bincount(source.labels).tolist()


def test_files_do_not_tell_which_are_marked(marked):
    files = list((marked.out / "images").rglob("*.png"))
    assert len(files) == 120
    assert len({file.stat().st_mtime for file in files}) == 1


def test_the_commitment_is_the_published_formula(marked):
    public = json.loads((marked.out / "public.json").read_text())
    manifest = hashlib.sha256((marked.out / "manifest.parquet").read_bytes()).digest()
    assert public["manifest_sha256"] == manifest.hex()
    assert public["commitment"] == hashlib.sha256(bytes.fromhex(SECRET) + manifest).hexdigest()


def test_nothing_in_the_folder_tells_the_key_or_the_carriers(marked):
    carriers = ra.carriers(ra.SecretKey.from_hex(SECRET), 10, 16)
    told = [SECRET.encode(), bytes.fromhex(SECRET), carriers[0, :2].tobytes()]
    told += [carriers[0, :2].astype(np.float32).tobytes(), f"{carriers[0, 0]:.8f}".encode()]
    for file in marked.out.rglob("*"):
        if file.is_file():
            raw = file.read_bytes()
            assert not any(word in raw for word in told), file


def test_the_report_says_what_can_be_detected(marked):
    page = (marked.out / "report.html").read_text()
    # z / sqrt(K d) at p = 1e-4, and 1 / sqrt(K d) by chance; one of ten classes has no mark.
    cells = marked.results["marked_classes"] * 16
    assert cells == 9 * 16
    assert f"{3.7190 / np.sqrt(cells):.4f}" in page
    assert f"standard deviation {1 / np.sqrt(cells):.3g}" in page
    assert "What will not be detected" in page
    assert "manifest.parquet" in page


def test_a_new_key_is_for_its_owner_only_and_lies_outside(model, tmp_path):
    out = tmp_path / "run"
    found = mark("digits@train", model=model, out=out, only_marked=True, **QUICK)
    assert found.key == tmp_path / "run.key"
    assert stat.S_IMODE(found.key.stat().st_mode) == 0o600
    assert len(bytes.fromhex(found.key.read_text())) == 32
    assert len(list((out / "images").rglob("*.png"))) == 30
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="already exists; pass --key"):
        mark("digits@train", model=model, out=out, **QUICK)
    assert not (tmp_path / "run.partial").exists()


def tree(folder):
    names = ("manifest.parquet", "public.json", "results.json")
    files = [folder / name for name in names] + sorted((folder / "images").rglob("*.png"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_killed_run_goes_on_to_the_same_bytes(model, marked, tmp_path, monkeypatch):
    out, calls = tmp_path / "marked", []
    real = ra.mark

    def killed(*args, **kwargs):
        calls.append(kwargs["ids"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(ra, "mark", killed)
    with pytest.raises(KeyboardInterrupt):
        mark("digits@train", model=model, out=out, key=marked.key, **QUICK)
    # What the kill left half-written must be written again.
    rows = pq.read_table(marked.out / "manifest.parquet").to_pylist()
    broken = tmp_path / "marked.partial" / "images" / [r["path"] for r in rows if r["marked"]][20]
    broken.parent.mkdir(parents=True, exist_ok=True)
    broken.write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match="pass --resume"):
        mark("digits@train", model=model, out=out, key=marked.key, **QUICK)
    other = tmp_path / "other.key"
    other.write_text("11" * 32)
    with pytest.raises(InputError, match="--key: the interrupted run"):
        mark("digits@train", model=model, out=out, key=other, resume=True, **QUICK)
    mark("digits@train", model=model, out=out, key=marked.key, resume=True, **QUICK)
    assert len(calls) == 5  # four shards, of which the third was begun twice
    assert tree(out) == tree(marked.out)
    assert not list(out.glob("*.ckpt"))


SCRIPT = """
from pathlib import Path
from remanence.jobs.audit.mark import mark
mark("digits@train", model={model!r}, out=Path({out!r}), key=Path({key!r}), **{options!r})
"""


def test_two_processes_write_the_same_bytes(model, marked, tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "marked"
    key = str(marked.key)
    script.write_text(SCRIPT.format(model=model, out=str(out), key=key, options=QUICK))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*start, str(script)], check=False, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert tree(out) == tree(marked.out)


def test_the_choice_of_images_is_secret_and_uniform():
    labels = np.repeat(np.arange(4), [10, 20, 30, 40])
    one, two = (ra.SecretKey(bytes([i]) * 32) for i in (1, 2))
    first = choose_images(labels, 0.2, one, 0, per_class=False)
    assert np.array_equal(first, choose_images(labels, 0.2, one, 0, per_class=False))
    assert len(first) == len(set(first)) == 20
    for key, seed in ((two, 0), (one, 1)):
        assert not np.array_equal(first, choose_images(labels, 0.2, key, seed, per_class=False))
    rows = choose_images(labels, 0.2, one, 0, per_class=True)
    assert np.bincount(labels[rows]).tolist() == [2, 4, 6, 8]
    draws = [choose_images(labels, 0.2, one, seed, per_class=False) for seed in range(400)]
    counts = np.bincount(np.concatenate(draws), minlength=100)
    assert ((counts - 80) ** 2 / (80 * 0.8)).sum() < 150  # chi-squared of 99 degrees: mean 99


def test_file_names_are_safe_and_unique():
    images = open_images("digits@train", limit=5)
    ids = ("a/b.jpg", "a/b.png", "../x", ".hidden", "B.JPG")
    odd = images.subset([0, 1, 2, 3, 4])
    odd = type(odd)("s", ("a", "A"), np.array([0, 0, 0, 0, 1]), ids, odd.store, odd.order)
    assert image_paths(odd) == [
        "a/b.png", "a/b-2.png", "a/_x.png", "a/hidden.png", "A-2/B.png",
    ]  # fmt: skip


def test_a_configuration_survives_json(model):
    for preset in ("paper", "fast", "small"):
        config = ra.MarkConfig.preset(preset, radius=7)
        plain = json.loads(json.dumps(config_to_json(config)))
        assert config_from_json(plain) == config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_marker(model).dim == 16


# Bad input


@pytest.fixture
def refused(model, tmp_path):
    def check(data="digits@train", **options):
        given = {"model": model, "out": tmp_path / "run"} | QUICK | options
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError) as caught:
            mark(data, **given)
        assert sorted(tmp_path.rglob("*")) == before
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return check


def test_options_out_of_range(refused):
    assert "--fraction 0" in refused(fraction=0.0)
    assert "--fraction 1.5" in refused(fraction=1.5)
    assert "--radius 0" in refused(radius=0.0)
    assert "--psnr nan" in refused(psnr=float("nan"))
    assert "--batch-size 0" in refused(batch_size=0)


def test_a_folder_that_exists(refused, tmp_path):
    (tmp_path / "run").mkdir()
    assert "already exists" in refused()


def test_keys_in_the_wrong_place_or_of_the_wrong_length(refused, tmp_path):
    assert "lies inside the run folder" in refused(key=tmp_path / "run" / "x.key")
    assert "lies inside the run folder" in refused(key=tmp_path / "run.partial" / "x.key")
    short = tmp_path / "short.key"
    short.write_text("ab" * 31)
    line = refused(key=short)
    assert line.startswith(f"{short}: ")
    assert "31 bytes" in line
    short.write_bytes(b"\xff\xfe")
    assert "not a key" in refused(key=short)
    assert "cannot be read" in refused(key=tmp_path)
    assert "cannot be written" in refused(key=tmp_path / "nowhere" / "x.key")


def test_images_smaller_than_the_crop(refused, tmp_path):
    write_network(tmp_path / "large", size=16)
    line = refused(model=str(tmp_path / "large"))
    assert "8 x 8 is smaller than the marking network's crop of 16" in line
    assert not (tmp_path / "run.key").exists()


def test_features_that_are_not_finite(refused, tmp_path):
    net = write_network(tmp_path / "huge")
    state = {
        k: v * (1e30 if "weight" in k and v.ndim == 4 else 1) for k, v in net.state_dict().items()
    }
    save_file(state, tmp_path / "huge" / "model.safetensors")
    assert "not finite" in refused(model=str(tmp_path / "huge"))


def test_a_network_without_a_linear_layer(refused, tmp_path):
    write_network(tmp_path / "headless")
    line = refused(model=str(tmp_path / "headless"), layer="nowhere")
    assert "layer 'nowhere' is no module" in line
    assert "--layer" in line
