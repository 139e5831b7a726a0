"""Bad input of the compress commands: one line, status 2, nothing left behind."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from remanence.cli import main

CODE = """
import torch
from torch import nn
from torch.nn import functional as F

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(),
                         nn.Linear(64, 10))

def norms():
    return nn.Sequential(nn.Flatten(), nn.LayerNorm(16))

class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.strange = nn.Linear(16, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 8)
    def forward(self, x):
        x = self.used(x)
        return self.head(x @ (self.strange.weight * 2))

class Idle(Hidden):
    def forward(self, x):
        return self.head(self.used(x))

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(16, 64))
    def forward(self, x):
        return self.a(x)

def poisoned():
    model = make()
    model[0].weight.data[0, 0] = float("nan")
    return model

def broken():
    raise ValueError("no licence")

def number():
    return 3
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("refused")


@pytest.fixture(scope="module")
def code(place):
    (place / "net.py").write_text(CODE)
    return f"{place / 'net.py'}:"


@pytest.fixture(scope="module")
def data(place):
    rows = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    np.save(place / "x.npy", rows)
    np.save(place / "wide.npy", np.zeros((64, 17), np.float32))
    np.save(place / "few.npy", rows[:20])
    np.save(place / "objects.npy", np.array([{"a": 1}] * 40, dtype=object), allow_pickle=True)
    np.save(place / "words.npy", np.array(["a"] * 40))
    rows[30, 2] = np.nan
    np.save(place / "nan.npy", rows)
    (place / "text.npy").write_text("1 2 3")
    for i in range(40):
        folder = place / "flat"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (12, 12), (i, 2 * i, 3 * i)).save(folder / f"{i}.png")
    (place / "nine").mkdir()
    for i in range(9):
        Image.new("RGB", (12, 12)).save(place / "nine" / f"{i}.png")
    return place


@pytest.fixture(scope="module")
def whole(place, code, data):
    out = place / "whole"
    words = ["compress", "quantize", f"{code}make", str(data / "x.npy"), "--out", str(out)]
    assert main([*words, "--no-controls", "--finetune-steps", "0"]) == 0
    return out / "compressed.safetensors"


def refused(capsys, words, message):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("remanence: ")
    assert re.search(message, said), said
    assert len(said) < 600


@pytest.mark.parametrize(
    ("function", "inputs", "more", "message"),
    [
        ("make", "wide.npy", (), r"cannot run a calibration batch of shape \(.*, 17\)"),
        ("make", "nan.npy", (), r"nan.npy: row 30 holds NaN"),
        ("make", "few.npy", (), r"few.npy: too few: 8 samples .* has 5"),
        ("make", "objects.npy", (), "no array of numbers"),
        ("make", "words.npy", (), "give numbers"),
        ("make", "text.npy", (), "no array of numbers"),
        ("make", "nothing.npy", (), "nothing.npy: cannot be read .No such file"),
        ("make", "flat", (), "--size"),
        ("make", "flat", ("--size", "12"), "cannot run a calibration batch"),
        ("norms", "x.npy", (), "no convolution, linear layer or embedding"),
        ("Hidden", "x.npy", (), r"strange.*mul.*keep it in float .`keep`"),
        ("Idle", "x.npy", (), "never runs strange.*float"),
        ("Wrapped", "x.npy", (), r"a: its weight is computed from other"),
        ("poisoned", "x.npy", (), "tensor 0.weight holds NaN"),
        ("broken", "x.npy", (), r"net.py:broken: failed \(ValueError: no licence"),
        ("number", "x.npy", (), "no torch module"),
        ("absent", "x.npy", (), "absent"),
        ("make", "x.npy", ("--model-arg", "depth=3"), "depth"),
        ("make", "x.npy", ("--budget", "900B"), r"at least [\d,]+ bytes"),
        ("make", "x.npy", ("--budget", "much"), "5MiB .* or 20x"),
        ("make", "x.npy", ("--budget", "0.5x"), "5MiB .* or 20x"),
        ("make", "x.npy", ("--recipe", "tiny"), "neither a recipe nor a file; .* small, large"),
        ("make", "x.npy", ("--recipe", "{place}/bad.json"), "not valid JSON"),
        ("make", "x.npy", ("--recipe", "{place}/list.json"), "give an object"),
        ("make", "x.npy", ("--recipe", "{place}/role.json"), "'heads' is unknown"),
        ("make", "x.npy", ("--recipe", "{place}/rule.json"), "head is 'sometimes'"),
        ("make", "x.npy", ("--keep", "4.wieght"), "no layer is called '4.wieght'"),
        ("make", "x.npy", ("--keep", "re:("), "not a regular expression"),
        ("make", "x.npy", ("--keep", "re:.*"), "nothing would be quantised"),
        ("make", "x.npy", ("--metric", "best"), "best"),
        ("make", "x.npy", ("--calibration", "2"), "--calibration 2: must be at least 8"),
        ("make", "x.npy", ("--finetune-lr", "nan"), "--finetune-lr nan: must be"),
        ("make", "x.npy", ("--resume",), "no interrupted run"),
    ],
)
def test_quantize(capsys, place, code, data, function, inputs, more, message):
    (place / "bad.json").write_text("{")
    (place / "list.json").write_text("[1]")
    (place / "role.json").write_text('{"heads": "keep"}')
    (place / "rule.json").write_text('{"head": "sometimes"}')
    words = ["compress", "quantize", f"{code}{function}", data / inputs, "--out", place / "out"]
    more = [word.format(place=place) for word in more]
    refused(capsys, [*words, "--finetune-steps", "0", *more], message)
    assert not list(place.glob("out*"))


def test_the_smallest_budget_is_named_and_is_enough(capsys, place, code, data):
    words = ["compress", "quantize", f"{code}make", data / "x.npy", "--no-controls"]
    words += ["--finetune-steps", "0", "--out", place / "tight"]
    refused(capsys, [*words, "--budget", "900B"], r"[\d,]+ bytes")
    main([str(word) for word in [*words, "--budget", "900B"]])
    numbers = [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", capsys.readouterr().err)]
    smallest = max(numbers)
    assert main([str(word) for word in [*words, "--budget", f"{smallest}B"]]) == 0
    assert (place / "tight" / "compressed.safetensors").stat().st_size <= smallest


def test_a_folder_that_is_there_is_left(capsys, place, code, data, whole):
    before = whole.read_bytes()
    words = ["compress", "quantize", f"{code}make", data / "x.npy", "--out", whole.parent]
    refused(capsys, words, "already exists; choose another --out")
    words = ["compress", "inspect", whole, "--out", whole.parent]
    refused(capsys, words, "already exists; choose another --out")
    words = ["compress", "expand", whole, "--model", f"{code}make", "--out", whole.parent]
    refused(capsys, words, "already exists; choose another --out")
    assert whole.read_bytes() == before
    assert not list(place.glob("*.partial"))


def test_too_few_images(capsys, place, code, data):
    words = ["compress", "quantize", f"{code}make", data / "nine", "--size", 12]
    refused(capsys, [*words, "--out", place / "out"], "nine: too few: 8 samples")
    assert not list(place.glob("out*"))


@pytest.mark.parametrize("command", ["inspect", "expand"])
def test_damaged_files(capsys, place, code, whole, command):
    raw = whole.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    begin, _ = table["0.codebook"]["data_offsets"]
    edited = bytearray(raw)
    edited[8 + length + begin] ^= 1
    header = bytearray(raw)
    header[8 + raw[8:].index(b'"K"') if b'"K"' in raw else 20] ^= 1
    for name, content, message in (
        ("short", raw[:-5], r"truncated: .* is not whole"),
        ("shorter", raw[:100], "truncated inside its header"),
        ("header", bytes(header), "damaged"),
        ("edited", bytes(edited), r"0.codebook was edited or damaged"),
        ("empty", b"", "no safetensors file"),
    ):
        file = place / f"{name}.safetensors"
        file.write_bytes(content)
        words = ["compress", command, file, "--model", f"{code}make", "--out", place / "out"]
        if command == "inspect":
            words += ["--data", place / "x.npy"]
        refused(capsys, words, message)
        assert not list(place.glob("out*"))
    torch.save({"a": torch.zeros(3)}, place / "pickled.pth")
    refused(capsys, ["compress", command, place / "pickled.pth", "--out", place / "out"], "pickled")
    refused(capsys, ["compress", command, place / "gone", "--out", place / "out"], "gone")


def test_a_file_of_another_network(capsys, place, code, whole):
    other = ["compress", "expand", whole, "--out", place / "out", "--model"]
    refused(capsys, [*other, f"{code}norms"], "not the one that was saved.*no layer 0")
    refused(capsys, other[:-1], "give --model FILE.py:FUNCTION")
    save_file({"a": torch.zeros(2)}, place / "plain.safetensors")
    words = ["compress", "inspect", place / "plain.safetensors"]
    refused(capsys, words, "another program wrote it")
    refused(capsys, ["compress", "inspect", whole, "--modes"], "give --data")
    assert not list(place.glob("out*"))


def test_weights_that_do_not_fit(capsys, place):
    class Payload:
        def __reduce__(self):
            return (print, ("executed",))

    model = timm.create_model("test_efficientnet", num_classes=10)
    torch.save(model.state_dict(), place / "good.pth")
    torch.save({"a": Payload()}, place / "evil.pth")
    torch.save(model, place / "module.pth")
    torch.save({"state_dict": model.state_dict()}, place / "nested.pth")
    more = ["digits", "--out", place / "out", "--size", 32, "--limit", 60]
    for name, weights, message in (
        ("test_efficientnet", "evil.pth", "damaged or unsafe weights"),
        ("test_efficientnet", "module.pth", "damaged or unsafe weights"),
        ("test_efficientnet", "nested.pth", "state_dict is not a tensor"),
        ("test_efficientnet", "gone.pth", "gone.pth: no such file"),
        ("test_efficientnet", None, "--weights FILE"),
        ("test_resnet", "good.pth", "num_classes|does not fit"),
        ("resnet1818", "good.pth", "unknown architecture|did you mean"),
        ("torchvision:fasterrcnn_resnet50_fpn", "good.pth", "--model-arg num_classes=N"),
    ):
        words = ["compress", "quantize", name, *more]
        words += ["--weights", place / weights] if weights else []
        refused(capsys, words, message)
        assert not list(place.glob("out*"))
    assert "executed" not in capsys.readouterr().out


def test_a_model_folder_with_weights_of_its_own(capsys, place):
    folder = place / "folder"
    folder.mkdir()
    model = timm.create_model("test_efficientnet", num_classes=10)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "test_efficientnet", "num_classes": 10}
    (folder / "config.json").write_text(json.dumps(config))
    words = ["compress", "quantize", folder, "digits", "--out", place / "out"]
    refused(capsys, [*words, "--size", 32], "leave out .*--size")
    refused(capsys, [*words, "--model-arg", "drop_rate=0.1"], "leave out --weights")
    words[3] = place / "nowhere"
    refused(capsys, words, "nowhere: no such file or folder")
    assert not list(place.glob("out*"))
