"""Networks and inputs of every kind go through the same command."""

import json

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

from remanence.cli import main
from remanence.compress.storage.file import inspect_file
from remanence.jobs.compress.subject import open_compressed
from remanence.kit.checkpoints import load_weights, read_weights
from remanence.kit.models import open_network

FILE = "compressed.safetensors"
TRANSFORMER = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))

def make(width=32):
    torch.manual_seed(0)
    return Net(width)

class Twins(nn.Module):
    def __init__(self):
        super().__init__()
        self.short, self.long = nn.Linear(16, 64), nn.Linear(16, 128)
        self.head = nn.Linear(192, 8)

    def forward(self, x):
        return self.head(torch.cat([self.short(x), self.long(x)], 1).relu())

def tokens():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 64), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(),
                         nn.Linear(64, 8))

def pictures():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
"""
DETECTOR = "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn"


def quantize(model, data, out, *more):
    words = ["compress", "quantize", str(model), str(data), "--out", str(out), "--no-controls"]
    quick = [
        "--calibration",
        "16",
        "--positions",
        "2048",
        "--batch-size",
        "8",
        "--finetune-steps",
        "2",
    ]
    assert main([*words, *quick, *more]) == 0
    return json.loads((out / "results.json").read_text())


@pytest.fixture
def code(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(TRANSFORMER)
    return path


def pictures(folder, count, size=24):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = rng.integers(0, 255, (size + i % 3, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_transformer_of_the_users_own(tmp_path, code, dtype):
    data = tmp_path / "x.npy"
    np.save(data, np.random.default_rng(0).normal(size=(64, 7, 32)).astype(dtype))
    found = quantize(f"{code}:make", data, tmp_path / "out", "--onnx")
    names = {layer["name"] for layer in found["layers"]}
    assert "encoder.layers.0.self_attn.in_proj" in names
    assert found["measured"][1]["accuracy"] is None
    assert found["measured"][1]["agreement"] >= 0.5
    assert (tmp_path / "out" / "compressed.onnx").exists()

    file = tmp_path / "out" / FILE
    words = ["compress", "inspect", str(file), "--model", f"{code}:make", "--data", str(data)]
    assert main([*words, "--teacher", f"{code}:make", "--modes"]) == 0
    assert main(["compress", "expand", str(file), "--out", str(tmp_path / "no")]) == 2
    words = ["compress", "expand", str(file), "--out", str(tmp_path / "plain")]
    assert main([*words, "--model", f"{code}:make"]) == 0
    opened = open_compressed(file, f"{code}:make")
    plain = opened.untrained.eval()
    plain.load_state_dict(load_file(tmp_path / "plain" / "model" / "model.safetensors"))
    x = torch.randn(3, 7, 32)
    with torch.no_grad():
        assert (plain(x) - opened.subject.model(x)).abs().max() < 1e-5


def test_arguments_of_the_users_function(tmp_path, code):
    data = tmp_path / "x.npy"
    np.save(data, np.random.default_rng(0).normal(size=(40, 3, 64)).astype(np.float32))
    found = quantize(f"{code}:make", data, tmp_path / "out", "--model-arg", "width=64")
    assert found["size"]["total"] == (tmp_path / "out" / FILE).stat().st_size


def test_layers_of_several_heights_on_one_input(tmp_path, code):
    data = tmp_path / "x.npy"
    np.save(data, np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32))
    found = quantize(f"{code}:Twins", data, tmp_path / "out")
    assert [layer["name"] for layer in found["layers"]] == ["short", "long", "head"]


def test_whole_numbers_of_an_embedding(tmp_path, code):
    data = tmp_path / "x.npy"
    np.save(data, np.random.default_rng(0).integers(0, 50, (64, 8)).astype(np.int16))
    found = quantize(f"{code}:tokens", data, tmp_path / "out", "--permute")
    assert {layer["name"] for layer in found["layers"]} >= {"2"}
    assert found["kept"]["0"] == "embedding"


def test_images_of_a_module_that_is_told_its_size(tmp_path, code):
    data = pictures(tmp_path / "flat", 40)
    out = tmp_path / "out"
    found = quantize(f"{code}:pictures", data, out, "--size", "20")
    assert found["measured"][1]["accuracy"] is None  # no class folders, no labels
    assert found["samples"]["test"] == 10 - 2
    words = ["compress", "inspect", str(out / FILE), "--model", f"{code}:pictures", "--data"]
    assert main([*words, str(data), "--size", "20"]) == 0
    found = quantize(f"{code}:pictures", "digits", tmp_path / "d", "--size", "20", "--limit", "60")
    assert found["measured"][1]["accuracy"] is not None  # ten classes, ten outputs


def test_a_torchvision_network_with_its_weights(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1(num_classes=10)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    name = "torchvision:squeezenet1_1"
    out = tmp_path / "out"
    more = ["--weights", str(tmp_path / "w.pth"), "--size", "40", "--limit", "80"]
    found = quantize(name, "digits", out, *more, "--model-arg", "num_classes=10")
    assert found["measured"][0]["accuracy"] is not None
    words = f"compress inspect {out / FILE} --data digits --limit 80 --teacher {tmp_path / 'w.pth'}"
    assert main(words.split()) == 0
    assert main(["compress", "expand", str(out / FILE), "--out", str(tmp_path / "plain")]) == 0
    opened = open_compressed(out / FILE).subject
    again = open_network(str(tmp_path / "plain" / "model"))
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert (again.model(x) - opened.model.eval()(x)).abs().max() < 1e-5
    assert opened.network.test.size == again.test.size == 40


def test_the_classes_are_read_from_the_weights(tmp_path):
    model = timm.create_model("test_efficientnet", num_classes=6)  # its last tensor is the head's
    state = dict(sorted(model.state_dict().items(), reverse=True))  # and here it is not
    save_file(state, tmp_path / "w.safetensors")
    out = tmp_path / "out"
    more = ["--weights", str(tmp_path / "w.safetensors"), "--size", "32", "--limit", "80"]
    quantize("test_efficientnet", "digits", out, *more)
    assert inspect_file(out / FILE).architecture["num_classes"] == 6


def test_a_vision_transformer(tmp_path):
    torch.manual_seed(0)
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **arguments)
    folder = tmp_path / "vit"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": arguments}
    config["pretrained_cfg"] = {"input_size": [3, 16, 16], "classifier": "head"}
    (folder / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    found = quantize(folder, "digits", out, "--limit", "80", "--permute", "--layer-steps", "2")
    assert "blocks.1.mlp.fc2" in {layer["name"] for layer in found["layers"]}
    assert main(["compress", "expand", str(out / FILE), "--out", str(tmp_path / "plain")]) == 0
    again = timm.create_model(f"local-dir:{tmp_path / 'plain' / 'model'}", pretrained=True).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = open_compressed(out / FILE).subject.model(x)
        assert (again(x) - expected).abs().max() < 1e-5


@pytest.mark.slow
def test_a_detector(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.get_model(
        DETECTOR.removeprefix("torchvision:"), weights=None, weights_backbone=None, num_classes=3
    )
    torch.save(model.state_dict(), tmp_path / "w.pth")
    for split in ("train", "validation", "test"):
        pictures(tmp_path / "data" / split, 8, size=64)
    small = ["--model-arg", "min_size=64", "--model-arg", "max_size=96"]
    out = tmp_path / "out"
    keep = ["--keep", "roi_heads.box_head.fc6"]  # its rows of 12,544 alone would take minutes
    weights = ["--weights", str(tmp_path / "w.pth")]
    found = quantize(DETECTOR, tmp_path / "data", out, *weights, *small, *keep)
    assert found["size"]["total"] == (out / FILE).stat().st_size
    assert found["curve"] == []
    assert main(["compress", "inspect", str(out / FILE), "--data", str(tmp_path / "data")]) == 0
    words = ["compress", "expand", str(out / FILE), "--out", str(tmp_path / "plain")]
    assert main(words) == 0
    opened = open_compressed(out / FILE)
    images = [torch.rand(3, 64, 64)]
    state = opened.untrained
    load_weights(state, read_weights(tmp_path / "plain" / "model"), "plain")
    with torch.no_grad():
        ours, theirs = opened.subject.model(images)[0], state(images)[0]
    assert torch.allclose(ours["boxes"], theirs["boxes"], atol=1e-2)
