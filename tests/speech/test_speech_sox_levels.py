"""The effects that sox has no one word for, put together from what it has, against ours."""

import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from remanence.speech.wavaugment.clip import clip
from remanence.speech.wavaugment.levels import dither, gain, normalise_peak, to_channels
from remanence.speech.wavaugment.noise import add_noise
from remanence.speech.wavaugment.time_drop import time_drop

pytestmark = pytest.mark.skipif(
    shutil.which("sox") is None, reason="needs the sox program (Debian's package sox)"
)
RATE = 16000
KIND = ("-t", "raw", "-r", str(RATE), "-e", "signed", "-b", "32", "-c")


def voice(seed, channels=1, time=20480):
    rng = np.random.default_rng(seed)
    t = np.arange(time) / RATE
    buzz = sum(np.sin(2 * np.pi * 130 * k * t + seed) / k for k in range(1, 15))
    rows = 0.1 * buzz * (1 + np.sin(2 * np.pi * 3 * t)) + 0.01 * rng.normal(size=(channels, time))
    return np.round(rows * 2**31) / 2**31


class Sox:
    """The program, on raw 32-bit files of one folder."""

    def __init__(self, folder):
        self.folder = folder

    def write(self, name, wave):
        (self.folder / name).write_bytes(np.round(wave.T * 2**31).astype("<i4").tobytes())
        return [*KIND, str(len(wave)), str(self.folder / name)]

    def run(self, *words, out=1):
        done = subprocess.run(
            [shutil.which("sox"), "-D", *words[0], *KIND, str(out), "-", *words[1:]],
            capture_output=True,
            check=True,
        )
        return np.frombuffer(done.stdout, "<i4").reshape(-1, out).T / 2**31

    def rms(self, file):
        said = subprocess.run(
            [shutil.which("sox"), *file, "-n", "stat"], capture_output=True, check=True, text=True
        ).stderr
        # Six decimals are printed: a gain first makes them six digits.
        return float(re.search(r"RMS +amplitude: +([0-9.]+)", said)[1])


@pytest.fixture
def sox(tmp_path):
    return Sox(tmp_path)


def decibels(ours, theirs):
    difference = ours.double().numpy() - theirs
    return 10 * math.log10((theirs**2).sum() / max((difference**2).sum(), 1e-300))


@pytest.mark.parametrize("snr", [-5.0, 0.0, 7.3, 15.0])
def test_noise_at_a_ratio_equals_a_mix_by_sox(sox, snr):
    x, n = voice(0) / 4, voice(1)[:, ::-1] / 16
    speech, noise = sox.write("x", x), sox.write("n", n)
    level = sox.rms(speech) / sox.rms(noise) * 10 ** (-snr / 20)
    theirs = sox.run(["-m", "-v", "1", *speech, "-v", repr(level), *noise])
    ours = add_noise(torch.tensor(x), torch.tensor(n), snr)
    # sox prints its RMS with six decimals, which limits the mix to some 90 dB.
    assert decibels(ours, theirs) > 85


def test_noise_that_is_too_short_starts_over_as_sox_repeats_it(sox):
    x, n = voice(0), voice(1)[:, :3000]
    speech, noise = sox.write("x", x), sox.write("n", n)
    looped = sox.write("loop", sox.run(noise, "repeat", "6")[:, :20480])
    theirs = sox.run(["-m", "-v", "1", *speech, "-v", "1", *looped])
    level = float(np.sqrt((x**2).mean() / (np.tile(n, 7)[:, :20480] ** 2).mean()))
    ours = add_noise(torch.tensor(x), torch.tensor(n), 20 * math.log10(level))
    assert decibels(ours, theirs) > 160


def test_a_drop_equals_trimming_and_padding_by_sox(sox):
    x = voice(0)
    file = sox.write("x", x)
    first = sox.run(file, "trim", "0", "5000s", "pad", "0", "1600s")
    theirs = np.concatenate([first, sox.run(file, "trim", "6600s")], 1)
    assert np.array_equal(time_drop(torch.tensor(x), 5000, 1600).numpy(), theirs)


@pytest.mark.parametrize("factor", [0.3, 0.8])
def test_clipping_equals_driving_sox_beyond_full_scale(sox, factor):
    x = voice(0)
    x[0, 100], x[0, 200] = 0.5, -0.5  # extremes of one size: sox cuts off at one level
    x = x.clip(-0.5, 0.5)
    level = 0.5 * factor
    theirs = sox.run(sox.write("x", x), "vol", repr(1 / level), "vol", repr(level))
    assert decibels(clip(torch.tensor(x), factor), theirs) > 160


def test_gain_peak_and_channels_equal_sox(sox):
    x = voice(0, channels=2)
    file = sox.write("x", x)
    wave = torch.tensor(x)
    assert decibels(gain(wave, -3.7), sox.run(file, "gain", "-3.7", out=2)) > 160
    assert decibels(normalise_peak(wave, -1.0), sox.run(file, "norm", "-1", out=2)) > 160
    assert decibels(to_channels(wave, 1), sox.run(file, "remix", "-")) > 160


def test_dither_is_as_loud_as_that_of_sox(sox):
    x = voice(0)
    theirs = subprocess.run(
        [shutil.which("sox"), *sox.write("x", x), *KIND[:6], "-b", "16", "-c", "1", "-", "dither"],
        capture_output=True,
        check=True,
    ).stdout
    theirs = np.frombuffer(theirs, "<i2") / 2**15
    ours = dither(torch.tensor(x), generator=torch.Generator().manual_seed(0)).numpy()[0]
    loudness = [20 * math.log10(np.std(y - x[0])) for y in (ours, theirs)]
    # Triangular noise of two steps and the rounding: a quarter of a step squared.
    assert loudness[0] == pytest.approx(20 * math.log10(0.5 * 2**-15), abs=0.2)
    assert loudness[1] == pytest.approx(loudness[0], abs=0.2)
