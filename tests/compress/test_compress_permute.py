from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
import torchvision
from sklearn.cluster import KMeans
from torch import nn
from torch.nn import functional as F  # noqa: N812 -- torch's own abbreviation

from remanence.compress.permutation.channel_groups import ChannelGroups
from remanence.compress.permutation.channel_runs import Channels
from remanence.compress.permutation.permute import _Layer, permute
from remanence.errors import InputError


def randomise_norms(model: nn.Module) -> nn.Module:
    """Norms that differ by channel: a permutation that forgets one shows."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator).abs() * 0.5 + 0.3)
            module.running_var.copy_(
                torch.rand(module.running_var.shape, generator=generator) + 0.5
            )
    return model.eval()


def block_log_det(weight: torch.Tensor, block: int) -> float:
    blocks = weight.detach().flatten(1).reshape(-1, block).double().numpy()
    return float(np.linalg.slogdet(np.cov(blocks, rowvar=False, bias=True))[1])


def planted(model: nn.Module, *names: str) -> None:
    """Input channels of two kinds, loud and quiet, in random order."""
    generator = torch.Generator().manual_seed(3)
    modules = dict(model.named_modules())
    for name in names:
        weight = modules[name].weight.data
        shuffled = torch.randperm(weight.shape[1], generator=generator)
        scale = torch.where(shuffled % 4 == 0, 4.0, 0.25)
        weight.copy_(torch.randn(weight.shape, generator=generator) * scale[:, None, None] / 8)


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.reduce = nn.Conv2d(32, 32, 1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.expand = nn.Conv2d(32, 64, 1)
        self.skip = nn.Conv2d(32, 64, 1)
        self.head = nn.Linear(64 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        y = self.expand(F.relu(self.norm(self.reduce(x))))
        y = F.adaptive_avg_pool2d(F.relu(y + self.skip(x)), 2)
        return self.head(y.view(y.size(0), -1))


def kmeans_error(weight: torch.Tensor, block: int) -> float:
    blocks = weight.detach().flatten(1).reshape(-1, block).numpy()
    fit = KMeans(16, n_init=3, random_state=0, max_iter=50).fit(blocks)
    return float(fit.inertia_ / (blocks**2).sum())


def test_planted_structure_is_found_and_lowers_the_kmeans_error() -> None:
    torch.manual_seed(0)
    model = randomise_norms(Bottleneck())
    planted(model, "reduce", "expand", "skip")
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 3, 8, 8)
    result = permute(model, {"reduce": 4, "expand": 4, "skip": 4, "head": 4}, x, swaps=1000)

    assert result.notice == ""
    torch.testing.assert_close(result.model(x), model(x), rtol=0, atol=1e-4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])  # the network given is left alone

    modules = dict(result.model.named_modules())
    reported = {layer.name: layer for layer in result.layers}
    assert set(reported) == {"reduce", "expand", "skip"}  # the head's channels are 4 wide: no gain
    for name, layer in reported.items():
        own = block_log_det(model.get_submodule(name).weight, 4)
        assert layer.before == pytest.approx(own, abs=1e-3)
        assert layer.after == pytest.approx(block_log_det(modules[name].weight, 4), abs=1e-3)
    # One group each for `expand` (all its own) and for `reduce` and `skip` (shared).
    assert reported["expand"].after < reported["expand"].before - 4
    ours = kmeans_error(modules["expand"].weight, 4)
    assert ours < 0.75 * kmeans_error(model.expand.weight, 4)


def test_the_dealt_start_alone_is_near_the_best_for_variances() -> None:
    torch.manual_seed(0)
    model = randomise_norms(Bottleneck())
    planted(model, "expand")
    x = torch.randn(2, 3, 8, 8)
    dealt = permute(model, {"expand": 4}, x, swaps=0).layers[0]
    searched = permute(model, {"expand": 4}, x, swaps=1000).layers[0]
    assert searched.after <= dealt.after < dealt.before - 3


def test_incremental_swaps_never_raise_the_objective_and_repeat() -> None:
    torch.manual_seed(1)
    model = randomise_norms(Bottleneck())
    x = torch.randn(2, 3, 8, 8)
    few = permute(model, {"expand": 8}, x, swaps=50, seed=5).layers[0]
    many = permute(model, {"expand": 8}, x, swaps=500, seed=5)
    again = permute(model, {"expand": 8}, x, swaps=500, seed=5)
    assert many.layers[0].after < few.after < few.before
    for mine, theirs in zip(many.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("taps", "repeat", "block"), [(1, 1, 6), (9, 1, 18), (1, 3, 6), (1, 4, 6)])
def test_incremental_swaps_equal_recomputing(taps: int, repeat: int, block: int) -> None:
    torch.manual_seed(0)
    left, right = Channels(6, repeat), Channels(6, repeat)
    width = 6 * repeat * taps
    rows = torch.randn(20, 3 * width) * torch.rand(3 * width)
    layer = _Layer("x", rows, block, taps, [left, right, left])  # `left` is read twice
    order = np.arange(3 * width)
    draws = np.random.default_rng(0)
    for _ in range(60):
        group, starts = (left, [0, 2 * width]) if draws.random() < 0.5 else (right, [width])
        i, j = draws.choice(6, size=2, replace=False)
        candidate = order.copy()
        for start in starts:
            a, b = (start + slot * repeat * taps + np.arange(repeat * taps) for slot in (i, j))
            candidate[a], candidate[b] = order[b], order[a]
        swap = layer.swapped(group, i, j)
        assert swap.log_det == pytest.approx(block_log_det(rows[:, candidate], block), abs=1e-3)
        if draws.random() < 0.7:
            layer.accept(swap)
            order = candidate
    assert layer.log_det() == pytest.approx(block_log_det(rows[:, order], block), abs=1e-3)


def check(model: nn.Module, blocks: dict[str, int], x: torch.Tensor) -> set[str]:
    """Permute and compare outputs; return the layers that had something to gain."""
    model = randomise_norms(model)
    result = permute(model, blocks, x, swaps=60)
    assert result.notice == ""  # no group had to be put back: tracing understood every one
    with torch.no_grad():
        ours, theirs = result.model(x), model(x)
    assert theirs.std() > 0
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    names = dict(model.named_modules())
    moved = [
        n for n, m in result.model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and not torch.equal(m.weight, names[n].weight)
    ]  # fmt: skip
    assert moved
    return {layer.name for layer in result.layers}


def pointwise(model: nn.Module, block: int) -> dict[str, int]:
    return {
        name: block
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) and module.in_features % block == 0)
        or (
            isinstance(module, nn.Conv2d)
            and module.kernel_size == (1, 1)
            and module.groups == 1
            and module.in_channels % block == 0
        )
    }


def test_residual_network() -> None:
    torch.manual_seed(0)
    block = timm.models.resnet.BasicBlock
    model = timm.models.resnet.ResNet(
        block, (2, 2, 1, 1), channels=(8, 16, 16, 32), num_classes=5, zero_init_last=False
    )
    blocks = pointwise(model, 4) | {"layer1.0.conv2": 18, "layer2.1.conv1": 18, "layer3.0.conv1": 9}
    gained = check(model, blocks, torch.randn(2, 3, 32, 32))
    assert gained == set(blocks) - {"layer3.0.conv1"}  # a 9-wide block is one channel: no gain


def test_mobilenet_with_squeeze_and_excitation() -> None:
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v3_small(width_mult=0.5, num_classes=7)
    blocks = pointwise(model, 4)
    assert check(model, blocks, torch.randn(2, 3, 32, 32)) == set(blocks)


def test_dense_connections() -> None:
    torch.manual_seed(0)
    model = torchvision.models.densenet.DenseNet(
        growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=5
    )
    blocks = pointwise(model, 4)
    assert check(model, blocks, torch.randn(2, 3, 32, 32)) == set(blocks)


def test_vision_transformer_feed_forward() -> None:
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5
    )
    gained = check(model, {"blocks.0.mlp.fc2": 4, "blocks.0.mlp.fc1": 4}, torch.randn(2, 3, 16, 16))
    assert "blocks.0.mlp.fc2" in gained


class Odd(nn.Module):
    """Flatten of three kinds, shared and tied layers, a transposed and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.shared = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 12, 2, stride=2)
        self.grouped = nn.Conv2d(12, 12, 3, groups=3, padding=1)
        self.mix = nn.Conv2d(12 + 8, 16, 1)
        self.scale = nn.Parameter(torch.rand(16, 1, 1) + 0.5)
        self.shuffle = nn.PixelShuffle(2)
        self.late = nn.Conv2d(4, 8, 1)
        self.fc1 = nn.Linear(8 * 4, 24)
        self.norm = nn.LayerNorm(24)
        self.fc2 = nn.Linear(24, 24)
        self.fc3 = nn.Linear(24, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = self.shared(torch.relu(self.shared(x)))
        y = self.grouped(F.hardswish(self.up(x)))
        z = torch.cat([y, F.interpolate(x, scale_factor=2)], dim=1)
        z = self.late(self.shuffle(self.scale * self.mix(z)))
        z = F.adaptive_avg_pool2d(z, 2).permute(0, 2, 3, 1)  # (N, 2, 2, C): channels run fastest
        z = self.norm(self.fc1(z.reshape(z.shape[0], -1)))
        return self.fc3(self.fc2(F.gelu(z)))


def test_odd_network() -> None:
    torch.manual_seed(0)
    blocks = {"shared": 4, "up": 4, "mix": 4, "late": 4, "fc1": 4, "fc2": 4, "fc3": 4}
    gained = check(Odd(), blocks, torch.randn(3, 3, 8, 8))
    assert gained == {"shared", "up", "mix", "fc1", "fc2", "fc3"}  # pixel shuffle stops `late`


def test_tied_embedding_and_head() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 16)
            self.wide = nn.Linear(16, 32)
            self.back = nn.Linear(32, 16)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.table(tokens)
            return self.head(x + self.back(F.gelu(self.wide(x))))

    torch.manual_seed(0)
    model = Tied().eval()
    tokens = torch.arange(20).reshape(2, 10)
    result = permute(model, {"table": 4, "wide": 4, "back": 4}, tokens, swaps=100)
    assert {layer.name for layer in result.layers} == {"table", "wide", "back"}
    assert result.model.head.weight is result.model.table.weight
    torch.testing.assert_close(result.model(tokens), model(tokens), rtol=0, atol=1e-4)


def test_parameters_used_in_ways_not_understood_are_left_alone() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 16)
            self.b = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x)) + F.linear(x, self.a.weight)

    model = Functional().eval()
    groups = ChannelGroups(model, (torch.randn(2, 8),))
    assert groups.free() == []
    result = permute(model, {"b": 4}, torch.randn(2, 8))
    assert "not permuted" in result.notice
    assert torch.equal(result.model.b.weight, model.b.weight)


def test_untraceable_network_comes_back_with_a_notice() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if x.sum() > 0 else x

    model = Branch().train()
    result = permute(model, {"fc": 4}, torch.ones(2, 8))
    assert "torch.fx cannot trace" in result.notice
    assert result.layers == ()
    assert torch.equal(result.model.fc.weight, model.fc.weight)
    assert result.model.training


def test_groups_that_change_the_outputs_are_put_back() -> None:
    class Sorting(nn.Conv2d):  # a subclass that does not act channel by channel
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 -- torch's own name
            return super().forward(input).cumsum(1)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), Sorting(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
    ).eval()
    x = torch.randn(2, 3, 4, 4)
    result = permute(model, {"1": 4, "2": 4, "3": 4}, x, swaps=50)
    assert "1 of 3 groups" in result.notice
    torch.testing.assert_close(result.model(x), model(x), rtol=0, atol=1e-4)
    assert torch.equal(result.model[1].bias, model[1].bias)  # its outputs stay in order
    assert not torch.equal(result.model[0].bias, model[0].bias)


@pytest.mark.parametrize(
    ("blocks", "swaps", "message"),
    [
        ({"nothing": 4}, 10, "nothing is no layer"),
        ({"expand": 5}, 10, "cannot be cut into blocks of 5"),
        ({"expand": 4}, -1, "give 0 or more"),
    ],
)
def test_bad_inputs(blocks: dict[str, int], swaps: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        permute(Bottleneck(), blocks, torch.randn(1, 3, 8, 8), swaps=swaps)
