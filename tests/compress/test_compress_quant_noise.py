from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from remanence.compress.modules.quant_noise import QuantNoise, quant_noise, remove_quant_noise
from remanence.errors import InputError


def stored(module: nn.Module, name: str = "weight") -> torch.Tensor:
    return module.parametrizations[name].original


def test_a_thousand_training_passes_leave_the_weight_bit_unchanged() -> None:
    # Oracle 17 and trap 9: noise written into the weight zeroes 99 % of it within 50 passes.
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    before = layer.weight.detach().clone()
    quant_noise(layer, p=0.1, block=8).train()
    x = torch.randn(4, 32)
    for _ in range(1000):
        layer(x)
    assert torch.equal(stored(layer), before)
    layer.eval()
    assert torch.equal(layer.weight, before)
    assert torch.equal(remove_quant_noise(layer).weight, before)


@pytest.mark.parametrize(
    ("layer", "x", "block"),
    [
        (nn.Linear(12, 5), torch.randn(3, 12), 4),
        (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5), 9),
        (nn.ConvTranspose2d(8, 4, 2, groups=2), torch.randn(2, 8, 3, 3), 4),
        (nn.Embedding(7, 8), torch.tensor([0, 3, 6]), 2),
    ],
)
def test_the_output_is_right_on_average(layer: nn.Module, x: torch.Tensor, block: int) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        exact = layer.eval()(x)
        quant_noise(layer, p=0.3, block=block).train()
        draws = torch.stack([layer(x) for _ in range(4000)])
    error = (draws.mean(0) - exact).abs()
    # Five standard errors of the mean; a missing 1 / (1 - p) is off by 30 % of the signal.
    assert (error <= 5 * draws.std(0) / 4000**0.5 + 1e-5).all()
    assert draws.std(0).max() > 0


def test_whole_blocks_are_dropped_and_the_rest_scaled() -> None:
    torch.manual_seed(2)
    conv = quant_noise(nn.Conv2d(16, 32, 3), p=0.25, block=18).train()
    blocks = conv.weight.detach().reshape(32, 8, 18)
    original = stored(conv).detach().reshape(32, 8, 18)
    dropped = (blocks == 0).all(2)
    assert torch.equal((blocks == 0).any(2), dropped)
    torch.testing.assert_close(blocks[~dropped], original[~dropped] / 0.75)
    assert 0.15 < dropped.float().mean() < 0.35


def test_blocks_of_a_transposed_convolution_run_over_its_inputs() -> None:
    torch.manual_seed(2)
    layer = quant_noise(nn.ConvTranspose2d(8, 3, 2), p=0.5, block=8).train()
    zero = (layer.weight == 0).permute(1, 2, 3, 0)  # (Co, kh, kw, Ci)
    assert torch.equal(zero.any(-1), zero.all(-1))
    assert 0 < zero.float().mean() < 1


def test_gradient_goes_straight_through_to_dropped_blocks_too() -> None:
    torch.manual_seed(3)
    layer = quant_noise(nn.Linear(8, 4), p=0.5, block=2).train()
    x = torch.randn(6, 8)
    layer(x).sum().backward()
    expected = x.sum(0).expand(4, 8)
    torch.testing.assert_close(stored(layer).grad, expected)


def test_codewords_replace_the_chosen_blocks() -> None:
    torch.manual_seed(4)
    codebook = torch.randn(4, 2)
    layer = quant_noise(nn.Linear(64, 32), p=0.5, block=2, codebook=codebook).train()
    original = stored(layer).detach().reshape(-1, 2)
    noisy = layer.weight.detach().reshape(-1, 2)
    best = codebook[torch.cdist(original, codebook).argmin(1)]
    kept = (noisy == original).all(1)
    torch.testing.assert_close(noisy[~kept], best[~kept])
    assert 0.4 < kept.float().mean() < 0.6


def test_it_trains_with_an_optimiser_built_before() -> None:
    torch.manual_seed(5)
    layer = nn.Linear(8, 8, bias=False)
    parameter = layer.weight
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0)
    quant_noise(layer, p=0.1, block=4).train()
    assert stored(layer) is parameter
    x, target = torch.randn(256, 8), torch.randn(8, 8)
    for _ in range(300):
        optimiser.zero_grad()
        (layer(x) - x @ target.T).square().mean().backward()
        optimiser.step()
    remove_quant_noise(layer)
    # Noise shrinks the solution a little (it regularises): close to the target, not equal.
    assert (layer.weight - target).norm() / target.norm() < 0.25
    assert list(layer.state_dict()) == ["weight"]


def test_same_seed_same_noise_and_copies_keep_it() -> None:
    layer = quant_noise(nn.Linear(16, 16), p=0.3, block=4).train()
    twin = copy.deepcopy(layer)
    torch.manual_seed(6)
    first = layer.weight
    torch.manual_seed(6)
    assert torch.equal(first, twin.weight)
    assert not torch.equal(first, layer.weight)


def test_noise_follows_the_mode_of_the_module() -> None:
    layer = quant_noise(nn.Linear(16, 16).eval(), p=0.5, block=4)
    assert torch.equal(layer.weight, stored(layer))
    assert not torch.equal(layer.train().weight, stored(layer))


def test_packed_attention_projection() -> None:
    torch.manual_seed(7)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    before = attention.in_proj_weight.detach().clone()
    quant_noise(attention, p=0.5, block=4).train()
    x = torch.randn(2, 3, 8)
    assert not torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])
    assert torch.equal(stored(attention, "in_proj_weight"), before)
    assert torch.equal(remove_quant_noise(attention).in_proj_weight, before)


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.BatchNorm2d(4), {}, "no weight to distort"),
        (nn.Linear(8, 4), {"p": 1.0}, "probability below 1"),
        (nn.Linear(8, 4), {"block": 3}, "choose one of 1, 2, 4, 8"),
        (nn.Linear(8, 4), {"block": 4, "codebook": torch.randn(4, 3)}, r"give \(K, 4\)"),
        (nn.Linear(8, 4), {"block": 1, "codebook": torch.full((2, 1), torch.nan)}, "NaN"),
    ],
)
def test_bad_inputs(layer: nn.Module, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quant_noise(layer, **options)
    with pytest.raises(InputError, match="no quant-noise"):
        remove_quant_noise(layer)


def test_noise_is_not_added_twice() -> None:
    layer = quant_noise(nn.Linear(8, 4))
    assert isinstance(layer.parametrizations.weight[0], QuantNoise)
    with pytest.raises(InputError, match="already"):
        quant_noise(layer)
