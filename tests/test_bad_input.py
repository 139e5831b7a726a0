"""Bad input: one line on stderr that names the thing, exit status 2, nothing half-written."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from remanence.cli import main
from remanence.kit.models import create_network, save_network

SMALL = "--model cifar_convnet5 --size 8 --epochs 1 --limit 64 --batch-size 16"


def photo(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    for label in ("cat", "dog"):
        for i in range(20):
            photo(root / label / f"{i}.jpg", i)
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "model"
    save_network(create_network("cifar_convnet5", [str(i) for i in range(10)], size=8), folder)
    return folder


@pytest.fixture
def model(trained, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((trained / name).read_bytes())
    return folder


@pytest.fixture
def refused(tmp_path, capsys):
    def check(*words, out=None):
        out = tmp_path / "run" if out is None else out
        before = {path.name for path in tmp_path.iterdir()}
        assert main([*map(str, words), "--out", str(out)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("remanence: ")
        assert {path.name for path in tmp_path.iterdir()} == before
        return line

    return check


def classify(source, *more):
    return ["learn", "classifier", source, *SMALL.split(), *more]


def fix(source, folder, *more):
    sizes = "--limit 64 --epochs 1 --sizes 8 --tune-sizes 8"
    return ["learn", "fixres", source, "--model", folder, *sizes.split(), *more]


# The image source


def test_a_missing_folder(refused, tmp_path):
    assert f"{tmp_path / 'nowhere'}: no such file or folder" in refused(
        *classify(tmp_path / "nowhere")
    )


def test_a_class_folder_without_images(refused, photos):
    (photos / "cow").mkdir()
    assert f"{photos / 'cow'}: class folder without images" in refused(*classify(photos))


def test_no_class_folders(refused, tmp_path):
    photo(tmp_path / "flat" / "0.jpg")
    assert "flat: holds no class folders" in refused(*classify(tmp_path / "flat"))


def test_one_class(refused, tmp_path):
    for label in ("cat", "dog"):
        photo(tmp_path / "above" / "photos" / label / "0.jpg")
    line = refused(*classify(tmp_path / "above"))
    assert "photos: a classifier needs at least two classes" in line


def test_a_missing_split(refused, photos):
    assert "photos@test: no such split" in refused(*classify(f"{photos}@test"))
    assert "digits@val: digits has the splits train and test" in refused(*classify("digits@val"))
    assert "names no split" in refused(*classify("digits@"))


def test_an_unreadable_jpeg_is_named(refused, photos):
    path = photos / "dog" / "7.jpg"
    path.write_bytes(path.read_bytes()[:200])
    line = refused(*classify(photos))
    assert "dog/7.jpg: unreadable image (" in line
    assert "--skip-broken" in line


def test_skip_broken_goes_on_and_counts(photos, tmp_path, capsys):
    path = photos / "dog" / "7.jpg"
    path.write_bytes(path.read_bytes()[:200])
    out = tmp_path / "run"
    assert main([*map(str, classify(photos, "--skip-broken")), "--out", str(out)]) == 0
    assert "left out 1 unreadable of 40 images, first dog/7.jpg" in capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert results["skipped"] == 1
    assert results["images"] + results["train_images"] == 39


def parquet(path, labels, **columns):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    images = [{"bytes": buffer.getvalue(), "path": None}] * len(labels)
    pq.write_table(pa.table({"image": images, "label": labels} | columns), path)
    return path


def test_parquet_without_the_columns(refused, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"photo": [b""], "class": [0]}), path)
    assert "a.parquet: no column 'image'; it has photo, class" in refused(*classify(path))


def test_labels_out_of_range(refused, tmp_path):
    path = parquet(tmp_path / "a.parquet", [0, 1, -1])
    assert "a.parquet:2: label -1 is out of range" in refused(*classify(path))


def test_a_compressed_tar(refused, photos, tmp_path):
    path = tmp_path / "photos.tar.gz"
    with tarfile.open(path, "w:gz") as packed:
        packed.add(photos, "photos")
    assert "photos.tar.gz: not a .parquet or .tar file" in refused(*classify(path))


def test_a_dataset_that_is_not_there(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "timm cannot open it" in refused(*classify(f"torch/cifar10:{tmp_path / 'empty'}"))
    assert "needs the extra 'hf'" in refused(*classify("hfds/cifar10"))


# The network


def test_an_unknown_architecture(refused):
    words = classify("digits")
    words[words.index("cifar_convnet5")] = "cifar_convnet"
    assert "did you mean cifar_convnet5" in refused(*words)


def test_a_size_below_the_stride(refused):
    words = classify("digits")
    words[words.index("8")] = "3"
    assert "--size 3: below the stride of cifar_convnet5, 4 pixels" in refused(*words)


def test_a_missing_network(refused, tmp_path):
    assert "nowhere: no such model folder" in refused(*fix("digits", tmp_path / "nowhere"))


def test_tensors_that_do_not_fit(refused, model):
    state = load_file(model / "model.safetensors")
    del state["fc.bias"]
    save_file(state, model / "model.safetensors")
    assert "1 tensors missing, first fc.bias" in refused(*fix("digits", model))


def test_tensors_that_hold_nan(refused, model):
    state = load_file(model / "model.safetensors")
    state["fc.bias"][3] = torch.nan
    save_file(state, model / "model.safetensors")
    assert "tensor fc.bias holds NaN" in refused(*fix("digits", model))


def test_truncated_weights(refused, model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "damaged or unsafe weights" in refused(*fix("digits", model))


def test_a_configuration_that_is_not_json(refused, model):
    (model / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refused(*fix("digits", model))


def test_other_classes_than_the_network(refused, model, photos):
    line = refused(*fix(photos, model))
    assert "has 2 classes" in line
    assert "10 outputs" in line


def test_the_wrong_mean_for_the_checkpoint(refused, model):
    config = json.loads((model / "config.json").read_text())
    config["architecture"] = "test_efficientnet"
    config["pretrained_cfg"] |= {"tag": "r160_in1k", "mean": [0.1, 0.1, 0.1]}
    other = create_network("test_efficientnet", [str(i) for i in range(10)])
    save_file(other.model.state_dict(), model / "model.safetensors")
    (model / "config.json").write_text(json.dumps(config))
    assert "contradicts test_efficientnet.r160_in1k" in refused(*fix("digits", model))


# The output


def test_an_output_that_exists(refused, tmp_path):
    (tmp_path / "run").mkdir()
    assert f"{tmp_path / 'run'}: already exists" in refused(*classify("digits"))
    assert not list((tmp_path / "run").iterdir())


def test_an_output_that_cannot_be_created(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "run: cannot be created" in refused(*classify("digits"), out=tmp_path / "file" / "run")
    assert "/proc/run: cannot be created" in refused(*classify("digits"), out="/proc/run")


def test_a_disk_that_is_full_from_the_start(refused, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("remanence.kit.run.write_json", full)
    assert "run.partial: No space left on device" in refused(*classify("digits"))


def test_a_disk_that_fills_up_loses_no_training(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    words = [*map(str, classify("digits")), "--out", str(tmp_path / "run")]
    monkeypatch.setattr("remanence.kit.checkpoints.save_file", full)
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    weights = tmp_path / "run.partial" / "model" / "model.safetensors"
    assert lines[-1] == f"remanence: {weights}: No space left on device"
    assert "--resume goes on" in lines[-2]
    monkeypatch.undo()
    assert main([*words, "--resume"]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


# The options


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--epochs 0", "--epochs 0: must be at least 1"),
        ("--lr 0", "--lr 0: must be at least"),
        ("--batch-size 1", "--batch-size 1: must be at least 2"),
        ("--scale 0.5 0.2", "--scale 0.5 0.2: give two fractions"),
        ("--limit 0", "--limit 0: must be at least 1"),
        ("--limit 1", "1 image is too few to split"),
        ("--devices 0", "--devices 0"),
    ],
)
def test_an_option_out_of_range(refused, more, message):
    words = more.split()
    base = classify("digits")
    if words[0] in base:
        at = base.index(words[0])
        del base[at : at + 2]
    assert message in refused(*base, *words)
