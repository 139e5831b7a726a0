"""Noise, time drops, clipping and levels against loops over examples and samples."""

import math

import pytest
import torch

from remanence.errors import InputError
from remanence.speech.wavaugment.clip import clip
from remanence.speech.wavaugment.levels import dither, gain, normalise_peak, to_channels
from remanence.speech.wavaugment.noise import add_noise, babble, other_rows
from remanence.speech.wavaugment.time_drop import time_drop


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double() * 0.1


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def test_the_measured_ratio_is_the_one_asked_for_in_every_row() -> None:
    loud = torch.tensor([1.0, 1e-3, 30, 1, 5])[:, None, None]
    x, n = noise(5, 2, 3000) * loud, noise(5, 2, 700, seed=1) * loud.flip(0)
    snr = torch.tensor([-10.0, 0, 5.5, 15, 40])
    lengths = torch.tensor([3000, 200, 2999, 1500, 5])
    y = add_noise(x, n, snr, lengths=lengths)
    for i, k in enumerate(lengths.tolist()):
        added = y[i, :, :k] - x[i, :, :k]
        assert 20 * math.log10(rms(x[i, :, :k]) / rms(added)) == pytest.approx(
            snr[i].item(), abs=1e-3
        )
        assert y[i, :, k:].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # compiled, and by torch
def test_one_channel_of_noise_serves_two_at_the_same_ratio(dtype: torch.dtype) -> None:
    x, n = noise(2, 2, 500).to(dtype), noise(2, 1, 500, seed=1).to(dtype)
    added = add_noise(x, n, 7.0) - x
    torch.testing.assert_close(added[:, 0], added[:, 1], atol=1e-7, rtol=0)
    for i in range(2):
        assert 20 * math.log10(rms(x[i]) / rms(added[i])) == pytest.approx(7, abs=1e-3)


def test_the_published_mix_doubles_the_decibels() -> None:
    x, n = noise(2, 1, 4000), noise(2, 1, 4000, seed=1)
    n *= rms(x) / rms(n)
    y = add_noise(x, n, 15.0, mix="wavaugment")
    r = 10**1.5
    torch.testing.assert_close(y, r / (1 + r) * x + n / (1 + r))
    speech, added = r / (1 + r) * x, y - r / (1 + r) * x
    assert 20 * math.log10(rms(speech) / rms(added)) == pytest.approx(30, abs=1e-6)


def test_the_peak_mix_has_its_ratio_and_peak_one() -> None:
    x, n = noise(3, 1, 500) * 7, noise(500, seed=1)
    y = add_noise(x, n, torch.tensor([0.0, 5, 20]), mix="rms_peak")
    for i, snr in enumerate((0, 5, 20)):
        plain = x[i, 0] / rms(x[i]) + n / rms(n) * 10 ** (-snr / 20)
        torch.testing.assert_close(y[i, 0], plain / plain.abs().max())


def test_short_noise_starts_over_from_its_offset() -> None:
    x = torch.ones(2, 1, 10).double()
    n = torch.tensor([[[1.0, 2, 3, 9]], [[4.0, 5, 9, 9]]]).double()
    y = add_noise(
        x,
        n,
        0.0,
        mix="wavaugment",
        offsets=torch.tensor([2, 7]),
        noise_lengths=torch.tensor([3, 2]),
    )
    added = 2 * y - x
    assert added[0, 0].tolist() == [3, 1, 2, 3, 1, 2, 3, 1, 2, 3]
    assert added[1, 0].tolist() == [5, 4, 5, 4, 5, 4, 5, 4, 5, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # compiled, and by torch
@pytest.mark.parametrize("rows", [1, 3])
def test_offsets_and_lengths_of_noise_equal_a_loop(rows: int, dtype: torch.dtype) -> None:
    x, n = noise(3, 2, 50).to(dtype), noise(rows, 1, 30, seed=1).to(dtype)
    offsets, sizes = torch.tensor([0, 7, 41]), torch.tensor([30, 11, 1])[:rows]
    lengths = torch.tensor([50, 20, 33])
    y = add_noise(x, n, 3.0, offsets=offsets, noise_lengths=sizes, lengths=lengths)
    expected = torch.zeros_like(y)
    for i, k in enumerate(lengths.tolist()):
        own, size = n[i % rows, 0], int(sizes[i % rows])
        looped = torch.stack([own[(int(offsets[i]) + t) % size] for t in range(k)])
        speech = x[i, :, :k]
        expected[i, :, :k] = speech + looped * rms(speech) / rms(looped) * 10 ** (-3 / 20)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mix", ["rms", "rms_peak"])
def test_silence_on_either_side_leaves_the_wave(mix: str) -> None:
    x = noise(2, 1, 50).float()
    x[1] = 0
    assert torch.equal(add_noise(x, torch.zeros(9), 5.0, mix=mix), x)
    assert torch.equal(add_noise(x, noise(9).float(), 5.0, mix=mix)[1], x[1])
    x.requires_grad_()
    add_noise(x, noise(9).float(), 5.0, mix=mix).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("mix", ["rms", "wavaugment", "rms_peak"])
def test_gradients_of_the_mixes_are_right(mix: str) -> None:
    x, n = noise(2, 1, 12).requires_grad_(), noise(2, 1, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: add_noise(a, b, 3.0, mix=mix), (x, n))


def test_babble_sums_other_rows() -> None:
    x = noise(3, 2, 20)
    voices = torch.tensor([[1, 2], [0, -1], [-1, -1]])
    y = babble(x, voices, lengths=torch.tensor([20, 10, 20]))
    expected = x[2].clone()
    expected[:, :10] += x[1, :, :10]
    torch.testing.assert_close(y[0], expected)
    torch.testing.assert_close(y[1, :, :10], x[0, :, :10])
    assert y[2].abs().sum() == 0
    drawn = other_rows(6, 4, torch.Generator().manual_seed(0))
    assert drawn.shape == (6, 4)
    for i, row in enumerate(drawn.tolist()):
        assert i not in row
        assert len(set(row)) == 4
    assert other_rows(1, 4).shape == (1, 0)


def test_time_drops_equal_a_loop() -> None:
    x = noise(3, 2, 40)
    starts = torch.tensor([[0, 10], [35, 2], [5, 7]])
    spans = torch.tensor([[3, 4], [50, 0], [1, 6]])
    lengths = torch.tensor([40, 38, 10])
    y = time_drop(x, starts, spans, lengths=lengths)
    expected = x.clone()
    for i in range(3):
        expected[i, :, lengths[i] :] = 0
        for s, d in zip(starts[i].tolist(), spans[i].tolist(), strict=True):
            expected[i, :, s : s + d] = 0
    assert torch.equal(y, expected)


def test_soft_edges_are_raised_cosines() -> None:
    y = time_drop(torch.ones(12).double(), 5, 2, edge=3)
    up = [0.5 - 0.5 * math.cos(math.pi * k / 4) for k in (1, 2, 3)]
    expected = torch.tensor([1, 1, *up[::-1], 0, 0, *up, 1, 1]).double()
    torch.testing.assert_close(y, expected)
    assert torch.equal(time_drop(torch.ones(12), 5, 0, edge=3), torch.ones(12))


def test_where_drops_overlap_the_later_noise_takes_the_earlier_ones_place() -> None:
    # On a wave of one level every drop is filled at that level, overlapped or not.
    x, ones = torch.full((1, 1, 12), 0.5).double(), torch.ones(1, 12)
    starts, spans = torch.tensor([[1, 3]]), torch.tensor([[5, 4]])
    y = time_drop(x, starts, spans, noise=-ones)
    assert y[0, 0].tolist() == [0.5] + [-0.5] * 6 + [0.5] * 5
    # Along slopes, as much noise comes as goes of the wave.
    left = time_drop(2 * x, starts, spans, edge=2)
    torch.testing.assert_close(time_drop(x, starts, spans, edge=2, noise=-ones), left - 0.5)


def test_clipping_takes_each_rows_own_valid_extremes() -> None:
    x = noise(3, 2, 100)
    x[1, 0, 60:] = 100
    x[2] += 5
    factor, lengths = torch.tensor([0.3, 0.9, 0.99]), torch.tensor([100, 50, 70])
    y = clip(x, factor, lengths=lengths)
    for i in range(3):
        row = x[i, :, : lengths[i]]
        k = factor[i].item()
        torch.testing.assert_close(
            y[i, :, : lengths[i]], row.clamp(row.min().item() * k, row.max().item() * k)
        )
    assert clip(torch.ones(1, 1, 4), 0.5, lengths=torch.tensor([0])).tolist() == [[[0] * 4]]


def test_levels_and_channels() -> None:
    x = noise(2, 2, 1000)
    torch.testing.assert_close(gain(x, torch.tensor([6.0, -20]))[1], x[1] / 10)
    peaks = normalise_peak(x.float(), -6.0).abs().amax((1, 2))
    torch.testing.assert_close(peaks, torch.full((2,), 10 ** (-6 / 20)))
    assert normalise_peak(torch.zeros(4)).tolist() == [0] * 4
    torch.testing.assert_close(to_channels(x, 1)[:, 0], (x[:, 0] + x[:, 1]) / 2)
    assert to_channels(x[:, :1], 3).shape == (2, 3, 1000)
    with pytest.raises(InputError, match="3 are asked"):
        to_channels(x, 3)


def test_dither_rounds_without_bias_and_with_two_steps_of_noise() -> None:
    x = torch.full((200_000,), 0.3 / 128).double()
    y = dither(x, bits=8, generator=torch.Generator().manual_seed(0)) * 128
    assert torch.equal(y, y.round())
    # Triangular dither: no bias, and an error variance of 1/4 step whatever the value.
    assert y.mean().item() == pytest.approx(0.3, abs=0.01)
    assert y.var().item() == pytest.approx(0.25, abs=0.01)
    assert dither(torch.tensor([2.0, -2]), bits=8).tolist() == [127 / 128, -1]


@pytest.mark.parametrize(
    ("noise_shape", "given", "word"),
    [
        ((2, 9), {}, "dimensions"),
        ((3, 1, 9), {}, "1 or 2 rows"),
        ((9,), {"snr_db": torch.zeros(3)}, "2 examples"),
        ((9,), {"snr_db": math.inf}, "snr_db"),
        ((9,), {"mix": "loud"}, "rms_peak"),
        ((9,), {"noise_lengths": [0]}, "empty noise"),
        ((9,), {"offsets": -1}, "whole samples"),
    ],
)
def test_bad_noise_is_named(noise_shape: tuple[int, ...], given: dict, word: str) -> None:
    with pytest.raises(InputError, match=word):
        add_noise(torch.ones(2, 1, 20), torch.ones(noise_shape), **{"snr_db": 5.0, **given})


def test_bad_drops_factors_and_voices_are_named() -> None:
    x = torch.ones(2, 1, 20)
    with pytest.raises(InputError, match="starts"):
        time_drop(x, -1, 2)
    with pytest.raises(InputError, match="one of each"):
        time_drop(x, torch.zeros(2, 2).long(), 2)
    with pytest.raises(InputError, match="factor"):
        clip(x, 1.5)
    with pytest.raises(InputError, match="itself"):
        babble(x, torch.tensor([[0], [0]]))
    with pytest.raises(InputError, match="bits"):
        dither(x, bits=25)
