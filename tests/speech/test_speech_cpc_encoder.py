"""The encoder of CPC against convolutions and the norm's formula, and what its frames see."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d

from remanence.errors import InputError
from remanence.speech.cpc.encoder import ChannelNorm, Encoder

SHAPES = ((5, 3), (4, 2), (2, 1), (2, 1), (2, 1))


def encoder(hidden: int = 12, sample_rate: int = 16_000) -> Encoder:
    torch.manual_seed(0)
    made = Encoder(hidden, sample_rate).double()
    for norm in made.norms:
        assert isinstance(norm, ChannelNorm)
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias)
    return made


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_definition(made: Encoder, wave: Tensor) -> Tensor:
    x = wave.unsqueeze(1)
    for convolution, norm, (stride, zeros) in zip(
        made.convolutions, made.norms, SHAPES, strict=False
    ):
        assert isinstance(norm, ChannelNorm)
        weight, bias = (dict(convolution.named_parameters())[name] for name in ("weight", "bias"))
        x = conv1d(x, weight, bias, stride, zeros)
        mean = x.sum(1, keepdim=True) / x.shape[1]
        var = (x - mean).square().sum(1, keepdim=True) / (x.shape[1] - 1)
        x = (x - mean) / (var + 1e-5).sqrt()
        x = (x * norm.weight.view(1, -1, 1) + norm.bias.view(1, -1, 1)).clamp(min=0)
    return x.transpose(1, 2)


@pytest.mark.parametrize("sample_rate", [16_000, 8_000])
@pytest.mark.parametrize("samples", [159, 160, 465, 1_003, 2_047])
def test_convolutions_norms_and_rectifiers(sample_rate: int, samples: int) -> None:
    made, wave = encoder(sample_rate=sample_rate), noise(2, samples)
    assert torch.allclose(made(wave), by_definition(made, wave), atol=1e-12)


def test_gradients_are_those_of_convolutions() -> None:
    made, wave = encoder(), noise(2, 999)
    parameters = list(made.parameters())
    aim = noise(*made(wave).shape)
    expected = torch.autograd.grad((by_definition(made, wave) * aim).sum(), parameters)
    for ours, theirs in zip(
        torch.autograd.grad((made(wave) * aim).sum(), parameters), expected, strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_the_variance_is_unbiased() -> None:
    norm = ChannelNorm(2).double()
    x = torch.tensor([[3.0, 1.0]], dtype=torch.float64)  # mean 2, variance 2, not 1
    assert norm(x)[0, 0].item() == pytest.approx((2 + 1e-5) ** -0.5, abs=1e-12)


@pytest.mark.parametrize(
    ("sample_rate", "samples", "frames"),
    [
        (16_000, 159, 1),
        (16_000, 160, 1),
        (16_000, 16_000, 100),
        (16_000, 16_001, 100),
        (16_000, 16_158, 100),
        (16_000, 16_159, 101),
        (16_000, 16_160, 101),
        (16_000, 20_480, 128),
        (8_000, 79, 1),
        (8_000, 8_000, 100),
        (8_000, 7_200, 90),
    ],
)
def test_lengths(sample_rate: int, samples: int, frames: int) -> None:
    made = encoder(2, sample_rate)
    assert made(noise(1, samples)).shape == (1, frames, 2)
    assert made.frames(samples) == frames


@pytest.mark.parametrize(
    ("sample_rate", "stride", "before", "after"), [(16_000, 160, 153, 311), (8_000, 80, 73, 151)]
)
def test_receptive_field(sample_rate: int, stride: int, before: int, after: int) -> None:
    made = encoder(sample_rate=sample_rate)
    assert (made.stride, made.before, made.after) == (stride, before, after)
    t, wave = 3, noise(1, 7 * stride)
    touched = torch.arange(t * stride - before - 9, t * stride + after + 10)
    waves = wave.repeat(len(touched), 1)
    waves[torch.arange(len(touched)), touched] += 1
    with torch.no_grad():
        changed = (made(waves)[:, t] != made(wave)[:, t]).any(1)
    inside = (touched >= t * stride - before) & (touched <= t * stride + after)
    assert torch.equal(changed, inside)


def test_parameter_count() -> None:
    assert sum(p.numel() for p in Encoder().parameters()) == 1_317_120


def test_bfloat16_autocast_stays_close() -> None:
    made, wave = encoder().float(), noise(2, 1_600).float()
    with torch.autocast("cpu", torch.bfloat16):
        coarse = made(wave)
    assert (coarse.float() - made(wave)).abs().max() < 0.1


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (torch.zeros(1, 158), "158 samples: give at least 159"),
        (torch.zeros(1_600), "give floats"),
        (torch.zeros(1, 1_600, dtype=torch.int16), "torch.int16"),
    ],
)
def test_what_cannot_be_encoded(wave: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Encoder(4)(wave)


def test_arguments_out_of_range() -> None:
    with pytest.raises(InputError, match="44100: give 16000 or 8000"):
        Encoder(4, 44_100)
    with pytest.raises(InputError, match="hidden 1"):
        Encoder(1)
