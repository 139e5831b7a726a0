"""What training really changed, tensor by tensor, against a table written by hand."""

import copy
import functools
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from remanence.errors import InputError
from remanence.learn.fixres.batchnorm import recalibrate_bn_
from remanence.learn.fixres.scopes import (
    SCOPES,
    Adaptation,
    changed_tensors,
    check_batch,
    hash_state,
)

AFFINE = ("weight", "bias")
MOVED = ("running_mean", "running_var")
LIVE = (*MOVED, "num_batches_tracked")


class Expected(NamedTuple):
    """The names that the scopes mean in one architecture, read in timm's source."""

    side: int
    head: str
    norm: str
    block: tuple[str, ...]
    stage: tuple[str, ...]
    options: Mapping[str, Any] = MappingProxyType({})


THIN = {"channels": (16, 32, 64, 128)}
NETS = {
    "resnet18": Expected(64, "fc", "layer4.1.bn2", ("layer4.1.conv2",), ("layer4",), THIN),
    "resnet50": Expected(64, "fc", "layer4.2.bn3", ("layer4.2.conv3",), ("layer4",), THIN),
    "efficientnet_b0": Expected(
        64,
        "classifier",
        "bn2",
        ("conv_head",),
        ("blocks.5", "blocks.6", "conv_head", "bn2"),
        {"drop_rate": 0.2, "drop_path_rate": 0.2},
    ),
    "densenet121": Expected(
        64,
        "classifier",
        "features.norm5",
        ("features.denseblock4.denselayer2.conv2",),
        ("features.transition3", "features.denseblock4", "features.norm5"),
        {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    ),
    "mobilenetv3_small_050": Expected(
        64,
        "classifier",
        "blocks.5.0.bn1",
        ("blocks.5.0.conv", "conv_head"),
        ("blocks.4", "blocks.5", "conv_head"),
    ),
    "convnext_atto": Expected(
        64, "head.fc", "head.norm", ("stages.3.blocks.1.mlp.fc2",), ("stages.3", "head.norm")
    ),
    "vit_tiny_patch16_224": Expected(
        32,
        "head",
        "norm",
        ("blocks.1.mlp.fc2",),
        ("blocks.1", "norm"),
        {"img_size": 32, "depth": 2, "proj_drop_rate": 0.1},
    ),
}


@functools.cache
def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **NETS[name].options)
    with torch.no_grad():
        for parameter in model.parameters():  # no zeros, which would stop gradients
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert isinstance(model, nn.Module)
    return model


def batch(side: int, n: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, side, side, generator=generator), torch.arange(n) % 4


def declared(scope: str, net: Expected, names: list[str]) -> set[str]:
    def own(prefix: str, *suffixes: str) -> set[str]:
        return {f"{prefix}.{s}" for s in suffixes} & set(names)

    head = own(net.head, *AFFINE)
    last = own(net.norm, *AFFINE, *LIVE)

    def inside(prefixes: tuple[str, ...]) -> set[str]:
        return {n for n in names if n.startswith(tuple(f"{p}." for p in prefixes))}

    return {
        "none": set(),
        "bn_stats": own(net.norm, *MOVED),
        "equalize": head,
        "classifier": head,
        "released": head | own(net.norm, *LIVE),
        "classifier+last_bn": head | last,
        "head_block": head | last | inside(net.block),
        "last_stage": head | inside(net.stage),
        "full": set(names),
    }[scope]


def adapt(adaptation: Adaptation, x: Tensor, y: Tensor, steps: int = 2) -> None:
    """Anyone's loop: train(), and an optimiser over every parameter, decay included."""
    adaptation.train()
    optimiser = torch.optim.AdamW(adaptation.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(steps):
        loss = functional.cross_entropy(adaptation(x), y)
        if loss.requires_grad:
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
    if adaptation.scope == "bn_stats":
        recalibrate_bn_(adaptation.model, [x])
    if adaptation.scope == "equalize":
        with torch.no_grad():
            for parameter in adaptation.model.get_submodule(adaptation.head).parameters():
                parameter.mul_(0.9).add_(0.1)
    adaptation.eval()
    adaptation(x)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", NETS)
def test_scope_audit(name: str, scope: str) -> None:
    net, model = NETS[name], network(name)
    # Other images for every scope: on the same ones, statistics could already stand at their goal.
    x, y = batch(net.side, seed=SCOPES.index(scope))
    adaptation = Adaptation(model, scope, x[:1], num_classes=4)
    before = hash_state(model)
    expected = declared(scope, net, list(before))
    assert scope in ("none", "bn_stats") or expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bn_stats without a BatchNorm
        adapt(adaptation, x, y)
    assert set(changed_tensors(before, hash_state(model))) == expected
    assert set(adaptation.moving) == expected
    parameters = {n for n, _ in model.named_parameters()}
    trains = expected & parameters if scope not in ("bn_stats", "equalize") else set()
    assert set(adaptation.trainable) == trains
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains
    adaptation.check(before)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "vit_tiny_patch16_224"])
def test_same_size_and_scope_none_is_the_base_model_bit_for_bit(name: str) -> None:
    model = network(name).eval()
    x, _ = batch(NETS[name].side)
    logits = model(x)
    adaptation = Adaptation(copy.deepcopy(model), "none", x[:1])
    assert torch.equal(adaptation.train()(x), logits)
    assert torch.equal(adaptation.eval()(x), logits)
    assert adaptation.model.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("scope", SCOPES)
def test_modes(scope: str) -> None:
    net = NETS["efficientnet_b0"]
    x, _ = batch(net.side)
    adaptation = Adaptation(network("efficientnet_b0"), scope, x)
    assert adaptation.training  # as every new module
    for wrapped in (adaptation, copy.deepcopy(adaptation)):
        wrapped.train()
        training = {n for n, m in wrapped.model.named_modules() if m.training}
        if scope in ("released", "classifier+last_bn", "head_block"):
            assert training == {"bn2"}
        elif scope == "last_stage":
            norms = {
                n for n in training if isinstance(wrapped.model.get_submodule(n), nn.BatchNorm2d)
            }
            assert training == norms
            assert {"bn2", "blocks.5.0.bn1", "blocks.6.0.bn3"} <= norms
            assert not any(n.startswith("blocks.4") for n in norms)
        else:
            everything = {n for n, _ in wrapped.model.named_modules()}
            assert training == (everything if scope == "full" else set())
        assert not any(m.training for m in wrapped.eval().modules())


def test_modes_survive_sync_batch_norm() -> None:
    x, _ = batch(64)
    model = copy.deepcopy(network("resnet18"))
    adaptation = Adaptation(model, "released", x)
    assert adaptation.cells == 4
    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
    synced = convert(adaptation).train()
    assert {n for n, m in synced.model.named_modules() if m.training} == {"layer4.1.bn2"}
    assert Adaptation(synced.model, "released", x).cells is None


def test_the_frozen_part_keeps_no_activations() -> None:
    x, _ = batch(64)
    adaptation = Adaptation(network("resnet18"), "classifier+last_bn", x)
    grads = []
    adaptation.model.get_submodule("layer4.1.conv2").register_forward_hook(
        lambda _m, _args, out: grads.append(out.requires_grad)
    )
    assert adaptation(x).requires_grad
    assert grads == [False]


def test_check_names_what_strayed() -> None:
    x, _ = batch(64)
    model = copy.deepcopy(network("resnet18"))
    adaptation = Adaptation(model, "released", x)
    before = hash_state(model)
    with torch.no_grad():
        state = model.state_dict()
        state["fc.weight"].add_(1)
        state["layer4.1.bn2.weight"][3] += 1e-6
        state["bn1.num_batches_tracked"].add_(1)
    with pytest.raises(RuntimeError, match=r"'released'.*bn1.num_batches_tracked, layer4.1.bn2.w"):
        adaptation.check(before)


def test_hashes_see_dtype_shape_and_sign_of_zero() -> None:
    def digest(tensor: Tensor) -> str:
        holder = nn.Module()
        holder.register_buffer("t", tensor)
        return hash_state(holder)["t"]

    zeros = [
        torch.zeros(2, 3),
        torch.zeros(3, 2),
        -torch.zeros(2, 3),
        torch.zeros(2, 3, dtype=torch.int32),
        torch.zeros(2, 6, dtype=torch.bfloat16),
        torch.zeros(()),
    ]
    assert len({digest(t) for t in zeros}) == len(zeros)
    grid = torch.arange(6.0).view(2, 3)
    assert digest(grid.t().contiguous().t()) == digest(grid)
    assert changed_tensors({"a": "1", "b": "2"}, {"b": "3", "c": "4"}) == ["a", "b", "c"]


def test_torchvision_last_stage_is_the_last_block() -> None:
    import torchvision

    x = torch.randn(1, 3, 64, 64)
    for name, stage in [
        ("resnet18", ("layer4.", "fc.")),
        ("mobilenet_v3_small", ("features.11.", "features.12.", "classifier.")),
        ("efficientnet_b0", ("features.7.", "features.8.", "classifier.")),
    ]:
        model = torchvision.models.get_model(name, num_classes=4)
        adaptation = Adaptation(model, "last_stage", x)
        expected = {n for n, _ in model.named_parameters() if n.startswith(stage)}
        assert set(adaptation.trainable) == expected


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
            for _ in range(3)
        )
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def test_stages_in_a_module_list_and_none_at_all() -> None:
    x = torch.randn(1, 3, 8, 8)
    adaptation = Adaptation(Listed(), "last_stage", x)
    assert {n.rpartition(".")[0] for n in adaptation.trainable} == {
        *("blocks.2.0", "blocks.2.1", "blocks.2.2"),
        "fc",
    }
    flat = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    with pytest.warns(UserWarning, match="no norm"), pytest.raises(InputError, match="no stages"):
        Adaptation(flat, "last_stage", x)


def test_check_batch() -> None:
    check_batch(64, 1)
    check_batch(2, 49)
    with pytest.raises(InputError, match=r"4 x 9 cells leaves 36 .* at least 8 images"):
        check_batch(4, 9)


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.fc.weight = nn.Parameter(torch.ones(4, 3, dtype=torch.int8), requires_grad=False)
        self.fc.bias = None  # type: ignore[assignment]  # what quantisers leave

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean((2, 3))
        return functional.linear(z, self.fc.weight.to(z.dtype))


def refused(model: nn.Module, scope: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        Adaptation(model, scope, torch.randn(1, 3, 16, 16))
    assert "\n" not in str(error.value)


def test_refused_models() -> None:
    refused(network("resnet18"), "last_bn", "unknown scope 'last_bn'.*released")
    refused(Quantised(), "classifier", "head 'fc' has no float weights")


@pytest.mark.filterwarnings("ignore")  # torch.ao is on its way out, and says so
def test_converted_models() -> None:
    ao = pytest.importorskip("torch.ao.quantization")
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    folded = ao.fuse_modules(block, [["0", "1", "2"]])
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    refused(nn.Sequential(folded, pool, nn.Linear(4, 4)), "released", "'0.0' is quantised or has")
    head = ao.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)))
    refused(nn.Sequential(block, pool, head), "classifier", "'2.0' is quantised")
