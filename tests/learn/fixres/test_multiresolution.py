"""Chosen by size, every prediction equals the separately adapted network's; fusions in the open."""

import copy
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from remanence.errors import InputError
from remanence.learn.fixres.multiresolution import MultiResolution, relative_cost

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = (48, 64, 96)
ADAPTED = {"fc.weight", "fc.bias", "layer4.0.bn2.weight", "layer4.0.bn2.running_mean"}


def adapted(model: nn.Module, seed: int) -> nn.Module:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in other.state_dict().items():
        if name in ADAPTED:
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return other


@pytest.fixture
def models() -> dict[int, Any]:
    torch.manual_seed(0)
    base = timm.create_model("resnet10t", num_classes=5).eval()
    assert base.state_dict().keys() >= ADAPTED
    return {0: base} | {size: adapted(base, size) for size in SIZES}


def inputs(n: int = 3) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {size: torch.randn(n, 3, size, size, generator=generator) for size in reversed(SIZES)}


def build(models: dict[int, Any], fuse: str = "logits", **options: Any) -> MultiResolution:
    bank = {size: models[size].state_dict() for size in reversed(SIZES)}
    return MultiResolution(copy.deepcopy(models[0]), bank, fuse, **options)


@torch.no_grad()
def test_each_size_is_its_own_network_bit_for_bit(models: dict[int, Any]) -> None:
    multi = build(models).train()
    for _ in range(2):  # nothing leaks from one size into the next
        for size, x in inputs().items():
            assert torch.equal(multi(x), models[size](x))
    shared = {n.removeprefix("model."): t for n, t in multi.state_dict().items()}
    assert all(torch.equal(shared[n], t) for n, t in models[0].state_dict().items())


@torch.no_grad()
def test_only_what_differs_is_stored(models: dict[int, Any]) -> None:
    expected = {f"bank.{size}.{name}" for size in SIZES for name in ADAPTED}
    assert {n for n in build(models).state_dict() if n.startswith("bank.")} == expected


@torch.no_grad()
def test_fusions(models: dict[int, Any]) -> None:
    xs = inputs()
    logits = torch.stack([models[s](xs[s]) for s in SIZES])
    z = [models[s].forward_head(models[s].forward_features(xs[s]), pre_logits=True) for s in SIZES]
    weight = torch.stack([models[s].fc.weight for s in SIZES])
    bias = torch.stack([models[s].fc.bias for s in SIZES])
    joint = nn.Linear(3 * z[0].shape[1], 5)
    for fuse, options, expected in [
        ("logits", {}, logits.mean(0)),
        ("prob", {}, logits.softmax(-1).mean(0).log()),
        (
            "embedding",
            {},
            functional.linear(torch.stack(z).mean(0), weight.mean(0), bias.mean(0)),
        ),
        ("concat", {}, logits.mean(0)),
        ("concat", {"concat_head": joint}, joint(torch.cat(z, 1))),
    ]:
        torch.testing.assert_close(build(models, fuse, **options)(xs), expected)
    pair = {48: xs[48], 96: xs[96]}
    torch.testing.assert_close(build(models)(pair), (logits[0] + logits[2]) / 2)


@torch.no_grad()
def test_convolutional_head_and_one_size() -> None:
    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool2d(1)
    net = nn.Sequential(nn.BatchNorm2d(3), pool, nn.Conv2d(3, 4, 1, bias=False), nn.Flatten())
    x = torch.randn(2, 3, 8, 8)
    for fuse in ("embedding", "concat", "prob"):
        multi = MultiResolution(copy.deepcopy(net), {8: {}}, fuse)
        torch.testing.assert_close(multi({8: x}).softmax(1), net.eval()(x).softmax(1))


@torch.no_grad()
@pytest.mark.parametrize("fuse", ["prob", "concat"])
def test_safetensors_round_trip(models: dict[int, Any], fuse: str, tmp_path: Any) -> None:
    multi = build(models, fuse)
    save_file(multi.state_dict(), tmp_path / "bank.safetensors")
    blank = timm.create_model("resnet10t", num_classes=5)
    state = load_file(tmp_path / "bank.safetensors")
    again = MultiResolution.from_state_dict(blank, state, fuse)
    assert torch.equal(again(inputs()), multi(inputs()))
    assert again.state_dict().keys() == multi.state_dict().keys()


def test_only_the_joint_head_trains(models: dict[int, Any]) -> None:
    multi = build(models, "concat").train()
    assert not multi.model.training
    assert multi.concat_head is not None
    assert multi.concat_head.training
    torch.autograd.backward(multi(inputs()).sum())
    assert multi.concat_head.weight.grad is not None


def test_bad_input(models: dict[int, Any]) -> None:
    base = models[0]
    multi = build(models, "concat")
    xs = inputs()
    relu = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: multi(torch.zeros(1, 3, 32, 32)), "48, 64, 96"),
        (lambda: multi(torch.zeros(1, 3, 48, 64)), "48, 64, 96"),
        (lambda: multi({48: xs[64]}), "under key 48"),
        (lambda: multi({48: xs[48]}), "every size"),
        (lambda: multi({}), "no images"),
        (lambda: MultiResolution(base, {}), "bank is empty"),
        (lambda: MultiResolution(base, {64: {}}, "max"), "unknown fusion 'max'"),
        (lambda: MultiResolution(base, {64: {"nope": torch.zeros(1)}}), "'nope' of size 64"),
        (lambda: MultiResolution(relu, {8: {"2.bias": torch.zeros(3)}}), "'2.bias' of size 8"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_relative_cost() -> None:
    assert relative_cost([224], 224) == 1
    assert relative_cost([224, 288, 384], 224) == pytest.approx(1 + 1.6530612 + 2.9387755)
