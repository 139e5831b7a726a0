"""Pitch, tempo, speed and resampling against closed forms, plain loops and the program sox."""

import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from scipy.special import i0
from torch.utils._python_dispatch import TorchDispatchMode

from remanence.errors import InputError
from remanence.speech.wavaugment.pitch import (
    pitch_shift,
    remap_times,
    resample,
    speed,
    tempo,
)
from remanence.speech.wavaugment.resampling import resample_at

DIGITS = Path(__file__).parents[2] / "../shared/data/spoken_digits/recordings"
CENTS = [-300, -100, -17, 1, 50, 100, 299]
needs_sox = pytest.mark.skipif(shutil.which("sox") is None, reason="the program sox is not here")
needs_digits = pytest.mark.skipif(
    not DIGITS.exists(), reason="needs ../shared/data/spoken_digits/recordings"
)


def voice(sample_rate, seconds, seed=0):
    """A gliding buzz under three formants, with breath, faded in, on a 16-bit grid."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(sample_rate * seconds)) / sample_rate
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * t + seed)) / sample_rate
    wave = np.zeros_like(t)
    for harmonic in range(1, 24):
        gain = sum(np.exp(-(((harmonic * 120 - f) / 150) ** 2)) for f in (500, 1400, 2400))
        wave += (gain + 0.02) * np.cos(harmonic * phase)
    wave = wave * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t)) + 0.05 * rng.standard_normal(len(t))
    wave *= np.minimum(t / 0.05, 1)
    return np.round(0.5 * wave / np.abs(wave).max() * 2**15) / 2**15


def digits(seconds):
    """Every 37th recording, one after another, at 8 kHz."""
    paths = sorted(DIGITS.glob("*.wav"))[::37]
    waves = [wavfile.read(path)[1] / 2**15 for path in paths]
    return np.concatenate(waves)[: int(8000 * seconds)]


def sox(path, wave, sample_rate, *effects):
    """Run sox with 32-bit samples in and out: 16 bits would hide all below -90 dB."""
    samples = np.round(np.asarray(wave, dtype=np.float64).T * 2**31).astype(np.int32)
    wavfile.write(path / "in.wav", sample_rate, samples)
    out = path / "out.wav"
    subprocess.run(["sox", "-D", path / "in.wav", "-b", "32", out, *effects], check=True)  # noqa: S607 - sox is looked up on the path
    return wavfile.read(out)[1].T / 2**31


def agreement(reference, other):
    """Signal over difference, in dB, over the samples both have."""
    n = min(len(reference), len(other))
    error = np.square(reference[:n] - other[:n]).sum()
    return 10 * math.log10(np.square(reference[:n]).sum() / max(error, 1e-300))


def peak_hz(wave, sample_rate):
    spectrum = np.abs(np.fft.rfft(np.asarray(wave) * np.hanning(len(wave)), 2**18))
    return spectrum.argmax() * sample_rate / 2**18


def batch_of_voices(n_clips, sample_rate=16000, seconds=0.6):
    return torch.from_numpy(np.stack([voice(sample_rate, seconds, s) for s in range(n_clips)]))


@pytest.mark.parametrize("quality", ["high", "quick"])
@pytest.mark.parametrize("cents", [-1200, -300, 300, 1200])
def test_a_sine_moves_to_its_new_frequency_and_keeps_its_length(quality, cents):
    sine = 0.5 * torch.sin(2 * math.pi * 440 * torch.arange(20480) / 16000)
    shifted = pitch_shift(sine, 16000, cents, quality=quality)
    assert shifted.shape == sine.shape
    assert abs(peak_hz(shifted, 16000) - 440 * 2 ** (cents / 1200)) < 1


def test_no_shift_returns_the_clip_bit_for_bit():
    wave = torch.randn(3, 2, 5000)
    cents = torch.tensor([0.0, 120.0, 0.0])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        given = wave.to(dtype)
        shifted = pitch_shift(given, 16000, cents)
        assert shifted.dtype == dtype
        assert torch.equal(shifted[::2], given[::2])
        assert not torch.equal(shifted[1], given[1])
        assert torch.equal(pitch_shift(given, 16000, 0), given)
        assert torch.equal(tempo(given, 16000, 1)[0], given)
        assert torch.equal(speed(given, 1.0)[0], given)


def test_every_length_comes_back():
    rng = np.random.default_rng(0)
    for n_samples in [1, 2, 3, 5, 117, 656, 1311, 1312, 1547, *rng.integers(1, 5001, 60), 20480]:
        wave = torch.from_numpy(rng.uniform(-0.5, 0.5, (2, 1, n_samples))).float()
        cents = torch.from_numpy(rng.uniform(-1500, 1500, 2).round())
        quality = rng.choice(["high", "quick"])
        shifted = pitch_shift(wave, 16000, cents, quality=quality, search="quick")
        assert shifted.shape == wave.shape
        assert shifted.isfinite().all()
        factor = float(rng.uniform(0.3, 3))
        expected = math.floor(n_samples / factor + 0.5)
        for out, ends in (tempo(wave, 16000, factor), speed(wave, factor, quality=quality)):
            assert out.shape == (2, 1, expected)
            assert ends.tolist() == [expected] * 2


def test_extreme_factors_pass():
    wave = batch_of_voices(2)[:, None, :3000].float()
    for cents in (-7972, 3986):
        shifted = pitch_shift(wave, 16000, cents)
        assert shifted.shape == wave.shape
        assert shifted.isfinite().all()
    out, ends = tempo(wave, 16000, torch.tensor([0.1, 100.0]))
    assert ends.tolist() == [30000, 30]
    assert not out[1, :, 30:].any()


def test_silence_gives_silence():
    for effect in (pitch_shift, tempo):
        out = effect(torch.zeros(2, 1, 4000), 16000, torch.tensor([0.8, 1.3]))
        assert not (out[0] if isinstance(out, tuple) else out).any()


def test_the_three_shapes_agree():
    clip = torch.from_numpy(voice(16000, 0.5)).float()
    alone = pitch_shift(clip, 16000, 150)
    stereo = pitch_shift(clip.expand(2, -1), 16000, 150)
    batch = pitch_shift(clip.expand(3, 2, -1), 16000, 150)
    assert stereo.shape == (2, 8000)
    assert batch.shape == (3, 2, 8000)
    for other in (stereo[0], stereo[1], batch[0, 0], batch[2, 1]):
        torch.testing.assert_close(other, alone, atol=1e-6, rtol=0)
    faster, ends = speed(clip[None], 1.25)
    assert faster.shape == (1, 6400)
    assert ends.tolist() == [6400]


@pytest.mark.parametrize("quality", ["high", "quick"])
def test_a_clip_gets_the_same_alone_and_in_a_ragged_batch(quality):
    lengths = torch.tensor([9600, 9000, 4001, 1500, 37, 0])
    wave = batch_of_voices(6)[:, None].float()
    cents = torch.tensor([250.0, -300.0, 17.0, 300.0, -90.0, 5.0])
    factors = 2 ** (-cents.double() / 1200)
    together = {
        "pitch": pitch_shift(wave, 16000, cents, quality=quality, lengths=lengths),
        "tempo": tempo(wave, 16000, factors, lengths=lengths)[0],
        "speed": speed(wave, factors, quality=quality, lengths=lengths)[0],
    }
    for row, length in enumerate(lengths[:-1].tolist()):
        clip = wave[row : row + 1, :, :length]
        alone = {
            "pitch": pitch_shift(clip, 16000, cents[row].item(), quality=quality),
            "tempo": tempo(clip, 16000, factors[row].item())[0],
            "speed": speed(clip, factors[row].item(), quality=quality)[0],
        }
        for name, out in alone.items():
            torch.testing.assert_close(
                together[name][row : row + 1, :, : out.shape[2]], out, atol=2e-6, rtol=0
            )
            assert not together[name][row, :, out.shape[2] :].any()
    assert not together["pitch"][-1].any()


def test_what_lies_behind_a_clip_is_ignored():
    wave = batch_of_voices(1)[:, None].float()
    filled = wave.clone()
    filled[..., 5000:] = 0.7
    lengths = torch.tensor([5000])
    outs = [pitch_shift(x, 16000, -200, lengths=lengths) for x in (wave, filled)]
    assert torch.equal(*outs)


class Shapes(TorchDispatchMode):
    """Writes down what ran, and what shapes came out."""

    def __init__(self):
        super().__init__()
        self.log = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.log.append((str(func), out.shape if isinstance(out, torch.Tensor) else None))
        return out


@pytest.mark.parametrize("quality", ["high", "quick"])
def test_the_amounts_drawn_change_no_shapes(quality):
    wave = batch_of_voices(4)[:, None].float()
    logs = []
    for cents in ([-300.0, -10.0, 5.0, 299.0], [-250.0, -200.0, -30.0, -100.0], [300, 1, 0, 0]):
        with Shapes() as shapes:
            pitch_shift(wave, 16000, torch.tensor(cents), quality=quality)
        logs.append(shapes.log)
    assert logs[0] == logs[1] == logs[2]


def test_loudness_is_kept():
    wave = batch_of_voices(6)[:, None]
    cents = torch.tensor([-300.0, -200, -50, 50, 200, 299])
    shifted = pitch_shift(wave, 16000, cents)
    levels = 10 * (shifted.square().mean(-1) / wave.square().mean(-1)).log10()
    assert levels.abs().max() < 1


def sinc(wave, step, n_out):
    """The sum of the definition, sample by sample of the output."""
    scale = min(1.0, 1 / step)
    cutoff, half = 0.95681386 * scale, 101.025 / scale
    distance = np.arange(n_out)[:, None] * step - np.arange(len(wave))
    root = np.sqrt(np.clip(1 - (distance / half) ** 2, 0, 1))
    window = np.where(np.abs(distance) <= half, i0(13.7053 * root) / i0(13.7053), 0)
    return (cutoff * np.sinc(cutoff * distance) * window) @ wave


def cubic(wave, step, n_out):
    """The definition on an integer clock of 32 fractional bits."""
    clock, out = math.floor(step * 2**32 + 0.5), []
    for n in range(n_out):
        k, x = divmod(n * clock, 2**32)
        x /= 2**32
        s = [wave[i] if 0 <= i < len(wave) else 0.0 for i in range(k - 1, k + 3)]
        b = (s[2] + s[0]) / 2 - s[1]
        a = (s[3] - s[2] + s[0] - s[1] - 4 * b) / 6
        c = s[2] - s[1] - a - b
        out.append(((a * x + b) * x + c) * x + s[1])
    return np.array(out)


# The longer clip is transformed in blocks.
@pytest.mark.parametrize("length", [1, 700, 2001])
@pytest.mark.parametrize(
    ("quality", "definition", "floor"), [("high", sinc, (135, 130)), ("quick", cubic, (280, 130))]
)
def test_resampling_is_the_sum_of_its_definition(quality, definition, floor, length):
    steps = [0.2, 0.840896, 0.999423, 1.18921, 2.7, 6.0] if length < 2000 else [0.9, 1.3]
    rng = np.random.default_rng(0)
    wave = rng.uniform(-0.5, 0.5, (len(steps), 2, length))
    n_out = [max(1, math.floor(length / step + 0.5)) for step in steps]
    for dtype, least in zip((torch.float64, torch.float32), floor, strict=True):
        tensor = torch.from_numpy(wave).to(dtype)
        step_tensor = torch.tensor(steps, dtype=torch.float64)
        got = resample_at(tensor, step_tensor, max(n_out), quality=quality).double().numpy()
        for row, clip, step, n in zip(got, wave, steps, n_out, strict=True):
            for channel in range(2):
                expected = definition(clip[channel], step, n)
                assert agreement(expected, row[channel, :n]) > least


def test_high_quality_does_not_alias():
    t = torch.arange(16000, dtype=torch.float64) / 16000
    above, below = torch.sin(2 * math.pi * 6000 * t), torch.sin(2 * math.pi * 3000 * t)
    halved, ends = resample(torch.stack([above, below])[:, None], 0.5)
    assert ends.tolist() == [8000, 8000]
    levels = halved[:, 0, 200:-200].square().mean(1).sqrt() * math.sqrt(2)
    assert levels[0] < 1e-6
    assert abs(levels[1] - 1) < 1e-6


def test_resample_and_speed_are_each_others_inverse():
    wave = torch.from_numpy(voice(16000, 0.5)).double()
    faster, ends = resample(wave, 0.8, "quick")
    again, again_ends = speed(wave, 1.25, quality="quick")
    assert torch.equal(faster, again)
    assert ends.tolist() == again_ends.tolist() == [6400]
    back, _ = resample(resample(wave, 2.0)[0], 0.5)
    # The voice's breath reaches into the two filters' transition band.
    assert agreement(wave.numpy()[200:-200], back.numpy()[200:-200]) > 20


@pytest.mark.parametrize("quality", ["high", "quick"])
def test_gradients_of_resampling_are_right(quality):
    wave = torch.randn(2, 1, 40, dtype=torch.float64, requires_grad=True)
    steps = torch.tensor([0.8, 1.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: resample_at(x, steps, 45, quality=quality), wave)


def test_gradients_of_a_pitch_shift_follow_the_splices():
    wave = batch_of_voices(2)[:, None].requires_grad_()
    weights = torch.randn(2, 1, 9600, dtype=torch.float64)
    (pitch_shift(wave, 16000, torch.tensor([200.0, 0.0])) * weights).sum().backward()
    assert torch.equal(wave.grad[1], weights[1])
    # With the splices fixed the shift is linear, and scaling a clip moves none of them.
    value = (pitch_shift(wave, 16000, torch.tensor([200.0, 0.0])) * weights)[0].sum()
    torch.testing.assert_close((wave.grad[0] * wave[0]).sum(), value)


def test_times_follow_the_clicks():
    sample_rate, at, factors = 16000, 9000, [0.7, 0.9, 1.0, 1.3]
    wave = torch.zeros(4, 1, 20000)
    wave[..., at : at + 40] = 0.9
    times = torch.tensor([[0.0, at / sample_rate, 1.25]]).expand(4, -1).double()
    mapped = remap_times(times, torch.tensor(factors))
    torch.testing.assert_close(mapped, times / torch.tensor(factors).double()[:, None])
    fast, _ = speed(wave, torch.tensor(factors))
    spliced, _ = tempo(wave, sample_rate, torch.tensor(factors))
    for row in range(4):
        middle = mapped[row, 1].item() * sample_rate + 20 / factors[row]
        heard = (fast[row, 0].abs() > 0.45).nonzero().double().mean().item()
        assert abs(heard - middle) < 1
        heard = (spliced[row, 0].abs() > 0.45).nonzero().double().mean().item()
        assert abs(heard - mapped[row, 1].item() * sample_rate - 20) < 0.0147 * sample_rate


def test_times_of_every_kind():
    assert remap_times(torch.tensor(3), 2.0).item() == 1.5
    assert remap_times(torch.tensor([1.0, 9.0]), 2.0, durations=10.0).tolist() == [0.5, 4.5]
    assert remap_times(torch.tensor([1.0, 11.0]), 2.0, durations=10.0).tolist() == [0.5, 5.0]
    assert remap_times(torch.zeros(2, 3, 2), torch.tensor([1.0, 2.0])).shape == (2, 3, 2)
    with pytest.raises(InputError, match="factor has shape"):
        remap_times(torch.zeros(3), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wave": torch.zeros(100, dtype=torch.int16)}, "int16"),
        ({"wave": torch.tensor([0.0, math.nan])}, "NaN"),
        ({"wave": torch.zeros(1, 1, 1, 5)}, "shape"),
        ({"cents": math.nan}, "cents"),
        ({"cents": 4000}, "cents"),
        ({"cents": torch.zeros(3)}, "cents has shape"),
        ({"sample_rate": 100}, "sample_rate 100"),
        ({"quality": "best"}, "quality 'best'"),
        ({"search": "none"}, "search 'none'"),
        ({"lengths": torch.tensor([101, 5])}, "lengths"),
        ({"lengths": torch.tensor([-1, 5])}, "lengths"),
        ({"lengths": torch.tensor([5])}, "lengths"),
    ],
)
def test_bad_input_is_named_in_one_line(change, message):
    given = {"wave": torch.zeros(2, 1, 100), "sample_rate": 16000, "cents": 10.0}
    with pytest.raises(InputError, match=message) as error:
        pitch_shift(**(given | change))
    assert "\n" not in str(error.value)
    for factor in (0.0, 0.09, 101.0, math.inf):
        with pytest.raises(InputError, match="factor"):
            tempo(given["wave"], 16000, factor)


@needs_sox
@pytest.mark.parametrize(("sample_rate", "seconds"), [(16000, 1.28), (8000, 1.28), (16000, 14.2)])
def test_sox_shifts_the_same(tmp_path, sample_rate, seconds):
    compare_with_sox(tmp_path, voice(sample_rate, seconds), sample_rate, CENTS)


@needs_sox
@needs_digits
@pytest.mark.parametrize("seconds", [1.28, 14.2])
def test_sox_shifts_spoken_digits_the_same(tmp_path, seconds):
    compare_with_sox(tmp_path, digits(seconds), 8000, CENTS)


def compare_with_sox(tmp_path, wave, sample_rate, cents):
    batch = torch.from_numpy(wave).float().expand(len(cents), 1, -1)
    shifts = torch.tensor(cents)
    rate = str(sample_rate)
    quick = pitch_shift(batch, sample_rate, shifts, quality="quick", search="quick").double()
    high = pitch_shift(batch, sample_rate, shifts).double()
    for row, shift in enumerate(cents):
        expected = sox(tmp_path, wave, sample_rate, "pitch", "-q", str(shift), "rate", "-q", rate)
        assert agreement(expected, quick[row, 0].numpy()) > 140
        expected = sox(tmp_path, wave, sample_rate, "pitch", str(shift), "rate", rate)
        ours = high[row, 0].numpy()
        assert agreement(expected, ours) > 70
        # What differs is the transition band, and the ends: sox's stages start from nothing.
        assert agreement(expected[300 : len(wave) - 300], ours[300:-300]) > 75


@needs_sox
@pytest.mark.parametrize("step", [0.5, 0.840896, 1.18921, 1.9])
def test_sox_changes_speed_the_same(tmp_path, step):
    wave = voice(16000, 1.1)
    expected = sox(tmp_path, wave, 16000, "speed", repr(step), "rate", "16000")
    got, ends = speed(torch.from_numpy(wave), step)
    assert len(expected) == ends.item()
    assert agreement(expected[300:-300], got.numpy()[300:-300]) > 75
