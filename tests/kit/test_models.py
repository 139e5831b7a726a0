import errno
import json
import os
import pickle
from dataclasses import replace

import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config
from torch import nn

from remanence.errors import InputError
from remanence.kit import models
from remanence.kit.checkpoints import CONFIG, WEIGHTS
from remanence.kit.models import Network, create_network, open_network, save_network
from remanence.kit.preprocessing import Preprocessing

CLASSES = ("cat", "dog", "cow")
NAME = "cifar_convnet5"
VIT = "vit_tiny_patch16_224"


def small(seed=0, **changes):
    network = create_network(NAME, CLASSES, size=16, seed=seed)
    return replace(network, **changes)


def logits(model, size):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(images)


def edit(folder, **changes):
    path = folder / CONFIG
    config = json.loads(path.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(config))


def refused(source):
    with pytest.raises(InputError) as caught:
        open_network(str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    save_network(small(), tmp_path / "model")
    return tmp_path / "model"


# Create


def test_a_seed_gives_the_weights_and_the_size_is_kept():
    first, again, other = small(3), small(3), small(4)
    assert torch.equal(logits(first.model, 16), logits(again.model, 16))
    assert not torch.equal(logits(first.model, 16), logits(other.model, 16))
    assert first.train.size == first.test.size == 16
    assert first.classes == CLASSES


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "resnet81: unknown architecture; did you mean resnet18"),
        ("torchvision:resnet81", "unknown architecture; did you mean torchvision:resnet18"),
        ("qqqq", "qqqq: unknown architecture; see timm.list_models()"),
        ("some/where", "some/where: not an architecture"),
        ("resnet18.nobody", "resnet18.nobody: cannot be built (Invalid pretrained tag"),
        # It would fetch a backbone.
        ("torchvision:fcn_resnet50", "torchvision:fcn_resnet50: unknown architecture"),
    ],
)
def test_an_unknown_architecture_is_refused_with_near_names(name, message):
    with pytest.raises(InputError) as caught:
        create_network(name, CLASSES)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (NAME, 0, "--size 0: must be at least 1"),
        (NAME, -8, "--size -8: must be at least 1"),
        (NAME, 3, "--size 3: below the stride of cifar_convnet5, 4 pixels"),
        ("resnet10t", 31, "--size 31: below the stride of resnet10t, 32 pixels"),
        ("torchvision:resnet18", 8, "below the stride of torchvision:resnet18, 32 pixels"),
        ("test_vit", 12, "--size 12: below the stride of test_vit, 16 pixels"),
        ("torchvision:alexnet", 40, "--size 40: torchvision:alexnet cannot take such images"),
    ],
)
def test_a_size_that_the_network_cannot_take_is_refused(name, size, message):
    with pytest.raises(InputError) as caught:
        create_network(name, CLASSES, size=size)
    assert message in str(caught.value)


@pytest.mark.parametrize("classes", [(), ("images",)])
def test_one_class_is_no_choice(classes):
    with pytest.raises(InputError, match="at least two classes"):
        create_network(NAME, classes)


# Round trip


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (NAME, 12),
        ("cifar_resnet20", 8),
        ("cifar_mobilenet", 16),
        ("test_resnet", 96),
        ("test_efficientnet.r160_in1k", 64),
        ("test_vit", 96),
        ("test_vit", None),
        ("test_byobnet", 64),
    ],
)
def test_timm_opens_what_is_written_and_gives_the_same_logits(tmp_path, name, size):
    network = create_network(name, CLASSES, size=size)
    train = replace(network.train, crop_pct=0.9)
    larger = train.size if "vit" in name else train.size + 8
    network = replace(network, train=train, test=replace(train, size=larger, crop_pct=1.0))
    save_network(network, tmp_path / "model")
    expected = logits(network.model, larger)

    theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert torch.equal(logits(theirs, larger), expected)
    data = resolve_data_config({}, model=theirs, use_test_size=True)
    assert tuple(data["input_size"]) == (3, larger, larger)
    assert data["crop_pct"] == 1.0
    assert tuple(data["mean"]) == train.mean
    data = resolve_data_config({}, model=theirs)
    assert tuple(data["input_size"]) == (3, train.size, train.size)
    assert data["crop_pct"] == 0.9

    ours = open_network(str(tmp_path / "model"))
    assert torch.equal(logits(ours.model, larger), expected)
    assert not ours.model.training
    assert (ours.train, ours.test) == (network.train, network.test)
    assert ours.classes == CLASSES
    assert ours.name == name.partition(".")[0]
    # And once more: what was read can be written.
    save_network(ours, tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text()) == json.loads(
        (tmp_path / "model" / CONFIG).read_text()
    )


@pytest.mark.parametrize("created", [64, 96])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        (VIT, {"depth": 1, "embed_dim": 32, "num_heads": 2}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16}),
    ],
)
def test_a_transformer_whose_size_was_changed_opens_again(tmp_path, name, options, created):
    model = timm.create_model(name, num_classes=3, img_size=created, **options)
    model.set_input_size(128)
    pre = Preprocessing(created)
    network = Network(model, name, pre, replace(pre, size=128), CLASSES)
    save_network(network, tmp_path / "model")
    expected = logits(model, 128)
    ours = open_network(str(tmp_path / "model"))
    assert torch.equal(logits(ours.model, 128), expected)
    assert ours.test.size == 128
    theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert torch.equal(logits(theirs, 128), expected)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("torchvision:squeezenet1_1", 40),
        ("torchvision:shufflenet_v2_x0_5", 64),
        ("torchvision:googlenet", 32),
    ],
)
def test_torchvision_networks_open_again(tmp_path, name, size):
    network = create_network(name, CLASSES, size=size)
    assert isinstance(network.model.train()(torch.randn(2, 3, size, size)), torch.Tensor)
    network = replace(network, test=replace(network.test, size=size + 8))
    save_network(network, tmp_path / "model")
    ours = open_network(str(tmp_path / "model"))
    assert torch.equal(logits(ours.model, size + 8), logits(network.model, size + 8))
    assert (ours.train, ours.test, ours.name) == (network.train, network.test, name)


def test_a_torchvision_vit_opens_again_at_its_size(tmp_path, monkeypatch):
    from torchvision.models import VisionTransformer

    def tiny(_, *, image_size=224, **options):
        options.pop("weights")
        return VisionTransformer(image_size, 16, 1, 1, 16, 16, **options)

    monkeypatch.setattr("torchvision.models.get_model", tiny)
    network = create_network("torchvision:vit_b_16", CLASSES, size=48)
    save_network(network, tmp_path / "model")
    ours = open_network(str(tmp_path / "model"))
    assert torch.equal(logits(ours.model, 48), logits(network.model, 48))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle of tensors"])
@pytest.mark.parametrize("name", [NAME, VIT, "test_resnet"])
def test_folders_of_timms_own_making_open(tmp_path, name, safe):
    options = {"img_size": 96, "depth": 1} if name == VIT else {}
    model = timm.create_model(name, num_classes=3, **options)
    labels = {"label_names": list(CLASSES)}
    timm.models.save_for_hf(model, tmp_path, model_config=labels, safe_serialization=safe)
    ours = open_network(str(tmp_path))
    size = ours.train.size
    assert torch.equal(logits(ours.model, size), logits(model, size))
    assert ours.classes == CLASSES
    if name == VIT:
        assert size == 96


def test_timms_first_layout_on_one_level_opens(tmp_path):
    model = timm.create_model(NAME, num_classes=3)
    save_file(model.state_dict(), tmp_path / WEIGHTS)
    flat = {"architecture": NAME, "num_classes": 3, "input_size": [3, 24, 24], "crop_pct": 0.8}
    (tmp_path / CONFIG).write_text(json.dumps(flat))
    ours = open_network(str(tmp_path))
    assert ours.train.size == 24
    assert ours.train.crop_pct == 0.8


def test_a_module_with_options_keeps_them(tmp_path):
    model = timm.create_model("cifar_resnet20", num_classes=3, depth=8)
    save_network(open_network(model), tmp_path / "model")
    ours = open_network(str(tmp_path / "model"))
    assert torch.equal(logits(ours.model, 16), logits(model, 16))


def test_a_module_without_a_configuration_needs_its_size():
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    with pytest.raises(InputError, match="Sequential: has no timm configuration"):
        open_network(module)
    assert open_network(module, size=8).test == Preprocessing(8)


# Normalisation (FixEfficientNet's trap)


def test_the_advprop_trap_is_caught_on_the_real_name(tmp_path):
    network = create_network("tf_efficientnet_b0.ap_in1k", CLASSES, size=32)
    assert network.train.mean == (0.5, 0.5, 0.5)
    network.origin = {"tag": "ap_in1k"}
    save_network(network, tmp_path / "model")
    ours = open_network(str(tmp_path / "model"))
    # Written once more, its tag stays its own and not that of timm's default checkpoint.
    save_network(ours, tmp_path / "again")
    assert open_network(str(tmp_path / "again")).origin == {"tag": "ap_in1k"}
    edit(tmp_path / "model", pretrained_cfg__mean=[0.485, 0.456, 0.406])
    assert "contradicts tf_efficientnet_b0.ap_in1k" in refused(tmp_path / "model")
    edit(tmp_path / "model", pretrained_cfg__mean=None)
    assert "contradicts tf_efficientnet_b0.ap_in1k" in refused(tmp_path / "model")
    edit(tmp_path / "model", architecture="tf_efficientnet_b0.ap_in1k", pretrained_cfg__tag=None)
    assert "contradicts tf_efficientnet_b0.ap_in1k" in refused(tmp_path / "model")


def test_fresh_weights_carry_no_tag(tmp_path):
    network = create_network("test_resnet", CLASSES, size=64)
    save_network(network, tmp_path / "model")
    config = json.loads((tmp_path / "model" / CONFIG).read_text())
    assert "tag" not in config["pretrained_cfg"]
    assert "license" not in config["pretrained_cfg"]


# Bad folders


def test_tensors_that_do_not_fit_are_refused_by_name(folder):
    path = folder / WEIGHTS
    whole = load_file(path)
    for change, message in (
        ({"fc.bias": None}, "1 tensors missing, first fc.bias"),
        ({"extra": torch.zeros(1)}, "1 tensors unexpected, first extra"),
        ({"fc.bias": torch.zeros(4)}, "fc.bias has shape (4,), the network expects (3,)"),
        ({"fc.bias": torch.tensor([0, float("nan"), 0])}, "fc.bias holds NaN or infinity"),
        ({"fc.bias": torch.tensor([0, float("inf"), 0])}, "fc.bias holds NaN or infinity"),
    ):
        changed = {k: v for k, v in (whole | change).items() if v is not None}
        save_file(changed, path)
        assert message in refused(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights_are_refused(folder, keep):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged or unsafe weights" in refused(folder)


def test_missing_parts_are_refused(folder, tmp_path):
    assert "no such model folder" in refused(tmp_path / "nowhere")
    assert "no such model folder" in refused(folder / CONFIG)
    (folder / WEIGHTS).unlink()
    assert f"holds no {WEIGHTS}" in refused(folder)
    (folder / CONFIG).unlink()
    assert "holds no readable config.json" in refused(folder)


@pytest.mark.parametrize("text", ["", "{", "[" * 10000, "\x00", "nonsense"])
def test_a_configuration_that_is_not_json_is_refused(folder, text):
    (folder / CONFIG).write_text(text)
    assert "not valid JSON" in refused(folder)
    (folder / CONFIG).write_bytes(b"\xff\xfe")
    assert "not valid JSON" in refused(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": None}, "has no 'architecture'"),
        ({"architecture": "resnet81"}, "unknown architecture"),
        ({"architecture": "hf-hub:a/b"}, "not an architecture"),
        ({"architecture": "/etc/passwd"}, "not an architecture"),
        ({"num_classes": "ten"}, "num_classes is 'ten'"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"num_classes": 4}, "tensor fc."),
        ({"pretrained_cfg": [1]}, "'pretrained_cfg' must be an object"),
        ({"model_args": "x"}, "'model_args' must be an object"),
        ({"model_args": {"widht": 3}}, "cannot be built with {'widht': 3}"),
        ({"model_args": {"width": "x"}}, "cannot be built with"),
        ({"model_args": {"pretrained": True}}, "model_args must not hold 'pretrained'"),
        ({"model_args": {"checkpoint_path": "/x"}}, "must not hold 'checkpoint_path'"),
        ({"pretrained_cfg__mean": "grey"}, "broken preprocessing"),
        ({"pretrained_cfg__mean": [0.5]}, "give three finite means"),
        ({"pretrained_cfg__std": [0, 1, 1]}, "three positive deviations"),
        ({"pretrained_cfg__crop_pct": 1.5}, "a crop_pct in (0, 1]"),
        ({"pretrained_cfg__crop_pct": float("nan")}, "a crop_pct in (0, 1]"),
        ({"pretrained_cfg__crop_pct": "x"}, "broken preprocessing"),
        ({"pretrained_cfg__input_size": 224}, "broken preprocessing"),
        ({"pretrained_cfg__input_size": [1, 32, 32]}, "only square RGB"),
        ({"pretrained_cfg__input_size": [3, 32, 48]}, "only square RGB"),
        ({"pretrained_cfg__crop_mode": "zoom"}, "unknown crop_mode 'zoom'"),
    ],
)
def test_a_broken_configuration_is_refused(folder, changes, message):
    edit(folder, **changes)
    assert message in refused(folder)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_does_not_run(folder, tmp_path):
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    sprung = tmp_path / "sprung"
    torch.save(weights | {"fc.bias": Trap(sprung)}, folder / "pytorch_model.bin")
    assert "damaged or unsafe weights" in refused(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    assert "damaged or unsafe weights" in refused(folder)
    assert not sprung.exists()
    # The trap works where nothing guards against it.
    pickle.loads((folder / "pytorch_model.bin").read_bytes())  # noqa: S301  # that is the trap
    assert sprung.exists()


def test_a_pickle_of_anything_but_a_state_dict_is_refused(folder):
    (folder / WEIGHTS).unlink()
    for value, message in (
        ({"model": {"fc.bias": torch.zeros(3)}}, "model is not a tensor"),
        ([1, 2], "damaged or unsafe weights"),
        (torch.zeros(3), "damaged or unsafe weights"),
    ):
        torch.save(value, folder / "pytorch_model.bin")
        assert message in refused(folder)


# The hub


def test_hub_failures_are_one_line(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr("timm.create_model", fail)
    assert refused("hf-hub:me/pets") == "hf-hub:me/pets: cannot be opened (no route)"


def test_a_network_from_the_hub_keeps_labels_and_options(monkeypatch, tmp_path):
    made = timm.create_model("cifar_resnet20", num_classes=3, depth=8)
    made.pretrained_cfg |= {"label_names": list(CLASSES), "tag": "mine", "license": "mit"}
    monkeypatch.setattr("timm.create_model", lambda *_, **__: made)
    network = open_network("hf-hub:me/pets")
    monkeypatch.undo()
    assert network.classes == CLASSES
    save_network(network, tmp_path / "model")
    ours = open_network(str(tmp_path / "model"))
    assert torch.equal(logits(ours.model, 16), logits(made, 16))
    assert ours.origin == {"tag": "mine", "license": "mit"}
    with torch.no_grad():
        made.fc.bias[0] = float("nan")
    monkeypatch.setattr("timm.create_model", lambda *_, **__: made)
    assert "tensor fc.bias holds NaN" in refused("hf-hub:me/pets")


# Writing


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*_, **__):
        # What safetensors says when the disk is full.
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr("remanence.kit.checkpoints.save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save_network(small(), tmp_path / "model")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "model" / WEIGHTS)


def test_arguments_that_json_cannot_hold_are_refused(tmp_path):
    model = timm.create_model("test_vit", num_classes=3, act_layer=nn.GELU)
    with pytest.raises(InputError, match=r"test_vit: config\.json cannot hold"):
        save_network(open_network(model), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_describe_gives_plain_values():
    assert models.describe(Preprocessing(8))["crop_mode"] == "center"
