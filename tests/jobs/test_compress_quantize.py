import io
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from remanence.cli import main
from remanence.compress.storage.file import inspect_file
from remanence.errors import InputError
from remanence.jobs.compress.expand import expand
from remanence.jobs.compress.inspect import inspect
from remanence.jobs.compress.quantize import quantize
from remanence.jobs.compress.subject import open_compressed
from remanence.jobs.learn.classifier import classifier
from remanence.kit.models import open_network
from remanence.kit.run import RunFolder

FILE = "compressed.safetensors"
QUICK = {"calibration": 64, "finetune_steps": 12, "limit": 160, "batch_size": 16}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def base(runs):
    out = runs / "base"
    classifier(
        "digits",
        out=out,
        model="cifar_convnet5",
        model_arg=["width=16"],
        size=16,
        epochs=4,
        limit=800,
        flip=0.0,
        lr=0.1,
    )
    return str(out / "model")


@pytest.fixture(scope="module")
def done(runs, base):
    return quantize(
        base, "digits", out=runs / "run", sensitivity=True, permute=True, flip=0.0, **QUICK
    )


@pytest.fixture(scope="module")
def whole(runs, base):
    return quantize(base, "digits", out=runs / "whole", controls=False, **QUICK).out


@pytest.fixture(scope="module")
def result(done):
    return json.loads((done.out / "results.json").read_text())


def test_the_run_folder_is_whole(done, result):
    names = {path.name for path in done.out.iterdir()}
    assert names == {"run.json", "metrics.jsonl", "results.json", "report.html", FILE}
    assert [line["stage"] for line in _lines(done.out)] == ["quantise"] * len(result["layers"])
    html = (done.out / "report.html").read_text()
    for word in ("plain k-means", "metric", "KL", "of one size", f"{done.size.ratio:.1f} times"):
        assert word in html, word


def test_the_size_is_that_of_the_file(done, result):
    size = (done.out / FILE).stat().st_size
    assert done.size.total == size == result["size"]["total"]
    assert done.size.codes + done.size.codebooks + done.size.other + done.size.header == size
    assert {each.bytes for each in done.measured[1:]} == {size}
    parameters = sum(p.numel() for p in open_network(_base(done)).model.parameters())
    assert done.size.uncompressed == 4 * parameters
    assert done.size.ratio == pytest.approx(4 * parameters / size)


def test_the_returned_network_is_the_one_in_the_file(done):
    opened = open_compressed(done.out / FILE).subject
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(opened.model(x), done.model(x))
    assert opened.network.test.size == 16
    assert opened.network.classes == tuple("0123456789")


def test_what_is_measured_is_so(done):
    assert [each.name for each in done.measured][:2] == ["float", "compressed"]
    first, ours, *_ = done.measured
    assert first.accuracy[0] > 0.5 > 1 / 10
    assert first.kl == pytest.approx(0, abs=1e-6)
    assert first.agreement == 1
    assert 0 < ours.kl < math.log(10)
    lost = ours.difference.difference
    assert lost == pytest.approx(ours.accuracy[0] - first.accuracy[0])


def test_outputs_suffer_less_than_by_k_means_of_the_weights(done):
    error = {
        name: np.mean([layer.output_error for layer in layers])
        for name, layers in done.layers.items()
    }
    assert error["compressed"] < 0.5 * error["plain k-means"]
    by_name = {each.name: each for each in done.measured}
    assert by_name["compressed, not tuned"].kl < by_name["plain k-means, not tuned"].kl
    assert by_name["compressed"].kl <= by_name["compressed, not tuned"].kl + 0.02


def test_inspect_shows_every_layer(done, capsys):
    found = inspect(done.out / FILE)
    printed = capsys.readouterr().out
    info = inspect_file(done.out / FILE)
    for layer in info.layers:
        assert layer.name in printed
    assert f"{done.size.total:,} bytes" in printed
    assert "in float" in printed
    assert found.measured == ()


def test_inspect_measures_against_the_teacher(done, capsys):
    out = done.out.parent / "seen"
    words = f"compress inspect {done.out / FILE} --out {out} --data digits --limit 160 --modes"
    assert main([*words.split(), "--teacher", _base(done)]) == 0
    seen = json.loads((out / "results.json").read_text())
    assert "same answer" in capsys.readouterr().out
    assert seen["size"]["total"] == done.size.total
    assert seen["kl"][1] == pytest.approx(done.measured[1].kl, rel=1e-3)
    assert seen["accuracy"][1][0] == done.measured[1].accuracy[0]
    names = {layer.name for layer in inspect_file(done.out / FILE).layers}
    assert set(seen["sensitivity"]) == set(seen["modes"]) == names
    assert all("dense" in choice["costs"] for choice in seen["modes"].values())
    assert "lookup, ms" in (out / "report.html").read_text()


def test_the_teacher_may_be_a_file_of_weights(done):
    weights = f"{_base(done)}/model.safetensors"
    first, ours = inspect(done.out / FILE, data="digits", limit=160, teacher=weights).measured
    assert first.agreement == 1
    assert ours.kl == pytest.approx(done.measured[1].kl, rel=1e-3)


def test_without_a_teacher_nothing_is_said_of_it(done):
    (alone,) = inspect(done.out / FILE, data="digits", limit=160).measured
    assert alone.accuracy == done.measured[1].accuracy
    assert alone.kl is None
    assert alone.agreement is None


def test_sensitivity_names_the_layers(result):
    shares = result["sensitivity"]
    assert set(shares) == {layer["name"] for layer in result["layers"]}
    assert list(shares.values()) == sorted(shares.values())


def test_expand_gives_the_network_back(done):
    plain = expand(done.out / FILE, out=done.out.parent / "plain")
    opened = open_network(str(plain.out / "model"))
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert (opened.model(x) - done.model(x)).abs().max() < 1e-5
    assert not any("codebook" in name for name in load_file(plain.out / "model/model.safetensors"))
    assert opened.classes == tuple("0123456789")


def test_keep_and_a_recipe_file(runs, base):
    rules = runs / "rules.json"
    rules.write_text(json.dumps({"base": "large", "head": "keep", "spatial": {"codewords": 16}}))
    names = [name for name, m in open_network(base).model.named_modules() if hasattr(m, "stride")]
    convolutions = [name for name in names if name]
    found = quantize(
        base,
        "digits",
        out=runs / "kept",
        recipe=str(rules),
        keep=[convolutions[2]],
        controls=False,
        **QUICK | {"finetune_steps": 0},
    )
    layers = {layer.name: layer for layer in inspect_file(found.out / FILE).layers}
    assert convolutions[2] not in layers
    assert layers
    assert max(layer.codewords for layer in layers.values()) <= 16
    kept = json.loads((found.out / "results.json").read_text())["kept"]
    assert kept[convolutions[2]] == "asked for"
    original = load_file(f"{base}/model.safetensors")[f"{convolutions[2]}.weight"]
    stored = load_file(found.out / FILE)[f"{convolutions[2]}.weight"]
    assert torch.equal(stored, original.half())
    assert [each.name for each in found.measured] == ["float", "compressed"]


def test_a_budget_is_kept(runs, base):
    found = quantize(
        base,
        "digits",
        out=runs / "budget",
        budget="12x",
        controls=False,
        **QUICK | {"finetune_steps": 0, "calibration": 16},
    )
    size, most = (found.out / FILE).stat().st_size, found.size.uncompressed // 12
    assert 0.8 * most < size <= most
    assert found.size.total == size


def test_labels_of_the_training_images_never_reach_the_file(runs, base):
    pictures = np.random.default_rng(0).integers(0, 255, (120, 16, 16, 3), dtype=np.uint8)
    encoded = []
    for picture in pictures:
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "PNG")
        encoded.append({"bytes": stream.getvalue()})
    for folder, seed in (("one", 1), ("two", 2)):
        (runs / folder).mkdir()
        labels = np.random.default_rng(seed).integers(0, 10, len(pictures))
        labels[100:] = np.arange(20) % 10  # of the test images, which are measured
        for split, part in (("train", slice(100)), ("test", slice(100, None))):
            table = pa.table({"image": encoded[part], "label": labels[part]})
            pq.write_table(table, runs / folder / f"{split}.parquet")
        quantize(
            base,
            str(runs / folder),
            out=runs / f"labels-{folder}",
            controls=False,
            **QUICK | {"limit": None, "finetune_steps": 4},
        )
    assert _bytes(runs / "labels-one") == _bytes(runs / "labels-two")


def test_the_seed_decides(runs, base, whole):
    for name, seed in (("same", 0), ("other", 1)):
        quantize(base, "digits", out=runs / name, controls=False, seed=seed, **QUICK)
    assert _bytes(runs / "same") == _bytes(whole)
    codes = [load_file(out / FILE) for out in (whole, runs / "other")]
    assert any(not torch.equal(codes[0][k], codes[1][k]) for k in codes[0] if "codes" in k)


def test_an_interrupted_run_goes_on_to_the_same_bytes(runs, base, whole, monkeypatch):
    common = {"controls": False, **QUICK}
    save, calls = RunFolder.save_state, []

    def die(self, name, state):
        save(self, name, state)
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_state", die)
    with pytest.raises(KeyboardInterrupt):
        quantize(base, "digits", out=runs / "cut", **common)
    monkeypatch.undo()
    assert not (runs / "cut").exists()
    with pytest.raises(InputError, match="--resume"):
        quantize(base, "digits", out=runs / "cut", **common)
    quantize(base, "digits", out=runs / "cut", resume=True, **common)
    assert _bytes(runs / "cut") == _bytes(whole)
    seen = [(line["name"], line["output_error"]) for line in _lines(runs / "cut")]
    assert seen == [(line["name"], line["output_error"]) for line in _lines(whole)]
    assert not list((runs / "cut").glob("*.ckpt"))


def test_timm_opens_what_expand_writes(runs):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7)
    for module in model.modules():  # statistics and an epsilon that are not the defaults
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(1e-4, 1e-2)
            module.running_mean.normal_()
    folder = _timm_folder(runs / "timm", model, 7)
    found = quantize(
        str(folder),
        "digits",
        out=runs / "resnet",
        onnx=True,
        controls=False,
        calibration=16,
        limit=100,
        batch_size=8,
        finetune_steps=1,
    )
    plain = expand(found.out / FILE, out=runs / "resnet-plain")
    again = timm.create_model(f"local-dir:{plain.out / 'model'}", pretrained=True).eval()
    assert {m.eps for m in again.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-5}
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = found.model(x)
        assert (again(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert found.measured[1].accuracy is None  # ten digits are not its seven classes
    assert found.measured[1].agreement is not None

    expand(found.out / FILE, out=runs / "resnet-onnx", onnx=True, size=48)
    for file in (found.out / "compressed.onnx", runs / "resnet-onnx" / "compressed.onnx"):
        assert file.stat().st_size < 1.4 * found.size.total
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(runs / "resnet-onnx" / "compressed.onnx")
    (out,) = session.run(None, {"input": x.numpy()})
    assert np.abs(out - expected.numpy()).max() < 1e-3 * expected.abs().max().item()


def _timm_folder(folder, model, classes):
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
    )
    config = {
        "architecture": "test_resnet",
        "num_classes": classes,
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "first_conv": "conv1.0",
            "classifier": "fc",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _base(done):
    return str(done.out.parent / "base" / "model")


def _bytes(out):
    return (out / FILE).read_bytes()


def _lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
