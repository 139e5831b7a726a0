"""What every effect's door lets in, and what it answers to the rest."""

import math
import warnings

import numpy as np
import pytest
import torch

from remanence.errors import InputError
from remanence.speech.wavaugment.levels import gain
from remanence.speech.wavaugment.noise import add_noise
from remanence.speech.wavaugment.pitch import resample
from remanence.speech.wavaugment.random import (
    RandomBandReject,
    RandomFrequencyDrop,
    RandomNoise,
    RandomPitch,
    RandomReverb,
    RandomRoom,
    RandomSpeed,
    RandomTempo,
)
from remanence.speech.wavaugment.reverb import convolve_room, reverb
from remanence.speech.wavaugment.waves import check_generator


def test_what_is_no_tensor_is_named() -> None:
    for wave, kind in ((np.ones(9, np.float32), "ndarray"), ([0.5], "list"), (None, "NoneType")):
        with pytest.raises(InputError, match=f"wave is {kind}: give a tensor"):
            reverb(wave, 16000)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=f"wave is {kind}"):
            RandomReverb(16000)(wave)
    with pytest.raises(InputError, match="noise is ndarray"):
        add_noise(torch.ones(9), np.ones(9), 5.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="impulse is ndarray"):
        convolve_room(torch.ones(9), np.ones(9))  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [None, "16000", 0, -1, math.nan, math.inf])
def test_a_rate_that_is_none_is_named(rate: object) -> None:
    with pytest.raises(InputError, match=f"sample_rate {rate!r} is not a rate"):
        reverb(torch.ones(9), rate)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is not a rate"):
        RandomPitch(rate)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is not a rate"):
        RandomBandReject(rate)  # type: ignore[arg-type]
    reverb(torch.ones(9), np.int64(8000))


def test_a_generator_of_another_kind_is_named() -> None:
    check_generator(None)
    check_generator(torch.Generator())
    for seed in (0, 5, np.random.default_rng(0)):
        with pytest.raises(InputError, match=r"generator is .*manual_seed"):
            check_generator(seed)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error")
def test_only_samples_that_are_no_numbers_are_refused_not_large_ones() -> None:
    for dtype in (torch.float32, torch.float64):
        # Their sum is infinite, and they are not.
        loud = torch.full((8,), torch.finfo(dtype).max, dtype=dtype)
        assert torch.equal(gain(loud, 0.0), loud)
        for value in (math.nan, math.inf):
            wrong = torch.tensor([0.0, value, -value], dtype=dtype)
            with pytest.raises(InputError, match="NaN or infinity"):
                gain(wrong, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wave_with_a_gradient_warns_of_nothing(dtype: torch.dtype) -> None:
    wave = torch.ones(64, dtype=dtype, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gain(wave, 6.0).sum().backward()
    assert wave.grad is not None


def test_what_cannot_work_is_refused_when_an_effect_is_made() -> None:
    bank = [torch.ones(9)]
    with pytest.raises(InputError, match="mix 'loud'"):
        RandomNoise(bank, mix="loud")  # type: ignore[arg-type]
    for kind in (RandomBandReject, RandomFrequencyDrop):
        for transition in (-1, 0, 8001):
            with pytest.raises(InputError, match=r"transition_hz .* lies outside 0\.\.8000"):
                kind(16000, transition_hz=transition)
    for kind, name in ((RandomNoise, "the noise bank"), (RandomRoom, "the bank of responses")):
        for source in ([], torch.ones(300), torch.ones(3, 2, 9), [torch.ones(2, 9)]):
            with pytest.raises(InputError, match=f"{name} is empty or not mono"):
                kind(source)
        for wrong in (torch.ones(0), np.ones(9), torch.full((3,), math.nan)):
            with pytest.raises(InputError, match=f"{name}, clip 1: wave "):
                kind([torch.ones(9), wrong])
    for given in ({"band_hz": (100, 900)}, {"noise_rate": 8000}):
        with pytest.raises(InputError, match="give sample_rate"):
            RandomNoise(bank, **given)
    with pytest.raises(InputError, match="sample_rate 0 is not a rate"):
        RandomNoise(bank, noise_rate=0, sample_rate=16000)
    for kind in (RandomPitch, RandomTempo):
        with pytest.raises(InputError, match="sample_rate 300 is too low"):
            kind(300)
        with pytest.raises(InputError, match="search 'most'"):
            kind(16000, search="most")
    for made in (lambda: RandomPitch(16000, quality="low"), lambda: RandomSpeed(quality="low")):
        with pytest.raises(InputError, match="quality 'low'"):
            made()
    for factor, words in (((1.1, 0.9), "high to low"), ("fast", "no range"), (0.01, "outside")):
        with pytest.raises(InputError, match=words):
            RandomSpeed(factor)
    with pytest.raises(InputError, match="generator is 5"):
        RandomSpeed()(torch.ones(9), generator=5)


def test_noise_at_another_rate_is_brought_to_the_waves() -> None:
    time = torch.arange(4410) / 44100
    hum = torch.sin(2 * math.pi * 1000 * time)
    wave = torch.zeros(1, 1, 1600)
    wave[..., 0] = 1
    noisy = RandomNoise([hum], 0.0, noise_rate=44100, sample_rate=16000)
    by_hand = RandomNoise([resample(hum, 16000 / 44100)[0]], 0.0)
    drawn = by_hand.sample(1, 1600, torch.Generator().manual_seed(0))
    out = noisy(wave, params=drawn)
    assert torch.equal(out, by_hand(wave, params=drawn))
    assert torch.fft.rfft((out - wave)[0, 0]).abs().argmax() == 100  # of bins of 10 Hz
