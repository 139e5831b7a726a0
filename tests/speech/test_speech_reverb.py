"""Reverberation against its closed forms, a float64 recursion, and the sox program."""

import math
import shutil
import subprocess

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from remanence.errors import InputError
from remanence.speech.wavaugment.reverb import convolve_room, reverb

needs_sox = pytest.mark.skipif(shutil.which("sox") is None, reason="the sox program is not here")


def speech_like(time: int, sample_rate: int, seed: int = 0) -> np.ndarray:
    """A buzz with a gliding pitch and a syllable's envelope, and a little noise; float64."""
    rng = np.random.default_rng(seed)
    t = np.arange(time) / sample_rate
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 1.3 * t + seed)) / sample_rate
    buzz = sum(np.sin(k * phase) / k for k in range(1, 20))
    envelope = np.clip(np.sin(2 * np.pi * 3 * t + seed), 0, None)
    return 0.05 * envelope * buzz + 0.005 * rng.standard_normal(time)


def sox(wave: np.ndarray, rate: int, *effects: str) -> np.ndarray:
    """What the sox program makes of (C, T), through 32-bit integers; (C', T')."""
    raw = np.round(wave.T * 2**31).astype("<i4").tobytes()
    kind = ["-t", "raw", "-r", str(rate), "-e", "signed", "-b", "32"]
    out = 1 if "channels" in effects else max(2 if "reverb" in effects else 1, len(wave))
    done = subprocess.run(
        [
            shutil.which("sox") or "sox",
            "-D",
            *kind,
            "-c",
            str(len(wave)),
            "-",
            *kind,
            "-c",
            str(out),
            "-",
            *effects,
        ],
        input=raw,
        capture_output=True,
        check=True,
    )
    return np.frombuffer(done.stdout, "<i4").reshape(-1, out).T / 2**31


def decibels(ours: torch.Tensor, theirs: np.ndarray) -> float:
    """Signal to difference."""
    difference = ours.double().numpy() - theirs
    return 10 * math.log10((theirs**2).sum() / max((difference**2).sum(), 1e-300))


def recursion(
    x: np.ndarray, rate: int, reverberance: float, damping: float, room: float, ear: int
) -> np.ndarray:
    """One ear's echoes of (T,) by direct recursion, filter after filter."""
    a = -1 / np.log(0.7)
    b = 100 / (np.log(0.02) * a + 1)
    fb, d = 1 - np.exp((reverberance - b) / (a * b)), 0.2 + 0.3 * damping / 100
    o, total = 12 * ear, np.zeros_like(x)
    for comb in (1116, 1188, 1277, 1356, 1422, 1491, 1557, 1617):
        n = int((0.1 + 0.9 * room / 100) * rate / 44100 * (comb + o) + 0.5)
        top, bottom = np.zeros(n + 2), np.zeros(n + 2)
        top[n], top[n + 1] = 1, -d
        bottom[0], bottom[1] = 1, -d
        bottom[n] -= fb * (1 - d)
        total += lfilter(top, bottom, x)
        o = -o
    for allpass in (225, 341, 441, 556):
        n = int(rate / 44100 * (allpass + o) + 0.5)
        top, bottom = np.zeros(n + 1), np.zeros(n + 1)
        top[0], top[n], bottom[0], bottom[n] = -1, 1.5, 1, -0.5
        total = lfilter(top, bottom, total)
        o = -o
    return 0.015 * total


@pytest.mark.parametrize(
    ("reverberance", "damping", "room", "wet_db"),
    [(50, 50, 100, 0), (50, 0, 0, 0), (0, 50, 50, 3), (20, 100, 10, -6), (80, 30, 5, 0)],
)
def test_the_impulse_response_sums_to_its_closed_form(
    reverberance: float, damping: float, room: float, wet_db: float
) -> None:
    a = -1 / math.log(0.7)
    b = 100 / (math.log(0.02) * a + 1)
    fb = 1 - math.exp((reverberance - b) / (a * b))
    x = torch.zeros(2**16, dtype=torch.float64)
    x[0] = 1
    y = reverb(x, 16000, reverberance=reverberance, damping=damping, room=room, wet_db=wet_db)
    assert y.sum().item() == pytest.approx(1 + 0.12 * 10 ** (wet_db / 20) / (1 - fb), rel=1e-5)


def test_reverberance_100_sums_to_7_over_twelve_seconds() -> None:
    x = torch.zeros(16000 * 12, dtype=torch.float64)
    x[0] = 1
    # At room 100 the echoes die by 1/e in 1.7 s, and 12 s would still lack 7e-4 of the sum.
    y = reverb(x, 16000, reverberance=100, room=50)
    assert y.sum().item() == pytest.approx(7, rel=1e-5)


@pytest.mark.parametrize(("room", "first"), [(0, 40), (100, 405)])
def test_the_first_echo_comes_after_the_shortest_comb(room: float, first: int) -> None:
    x = torch.zeros(2048, dtype=torch.float64)
    x[0] = 1
    y = reverb(x, 16000, room=room, wet_only=True)
    assert (y.abs() > 1e-6).nonzero()[0].item() == first
    assert y[:first].abs().max() < 1e-9


@pytest.mark.parametrize("reverberance", [0, 50, 100])
@pytest.mark.parametrize("room", [0, 37, 100])
def test_it_equals_the_direct_recursion(reverberance: float, room: float) -> None:
    x = speech_like(20480, 16000)
    both = [recursion(x, 16000, reverberance, 50, room, ear) for ear in (0, 1)]
    wave = torch.from_numpy(x)
    mono = reverb(wave, 16000, reverberance=reverberance, room=room, wet_only=True)
    stereo = reverb(wave, 16000, reverberance=reverberance, room=room, wet_only=True, mixdown=False)
    assert decibels(mono, (both[0] + both[1]) / 2) > 140
    assert decibels(stereo, np.stack(both)) > 140
    single = reverb(wave.float(), 16000, reverberance=reverberance, room=room)
    assert decibels(single, x + (both[0] + both[1]) / 2) > 130


@needs_sox
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
@pytest.mark.parametrize(("reverberance", "least"), [(50, 120), (100, 120)])
def test_mono_equals_the_sox_program(rate: int, reverberance: int, least: float) -> None:
    x = speech_like(20480, rate)[None]
    for room in (0, 42, 100):
        theirs = sox(x, rate, "reverb", str(reverberance), "50", str(room), "channels", "1")
        ours = reverb(torch.from_numpy(x).float(), rate, reverberance=reverberance, room=room)
        assert decibels(ours, theirs) > least


@needs_sox
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # compiled, and by transform
@pytest.mark.parametrize("channels", [1, 2])
def test_both_ears_depth_delay_gain_and_wet_only_equal_the_sox_program(
    channels: int, dtype: torch.dtype
) -> None:
    x = np.stack([speech_like(16000, 16000, seed) for seed in range(channels)])
    theirs = sox(x, 16000, "reverb", "-w", "60", "20", "80", "35", "12.3", "-4")
    ours = reverb(
        torch.from_numpy(x).to(dtype),
        16000,
        reverberance=60,
        damping=20,
        room=80,
        stereo_depth=35,
        pre_delay_ms=12.3,
        wet_db=-4,
        wet_only=True,
        mixdown=False,
    )
    assert decibels(ours, theirs) > 120


def test_a_batch_equals_its_rows_and_ragged_rows_equal_trimmed_clips() -> None:
    wave = torch.stack([torch.from_numpy(speech_like(6000, 16000, s)).float() for s in range(5)])
    wave = wave[:, None]
    room = torch.tensor([0.0, 20, 40, 99, 100])
    fade = torch.tensor([0.0, 100, 50, 50, 90])
    together = reverb(wave, 16000, room=room, reverberance=fade)
    lengths = torch.tensor([6000, 10, 3333, 0, 5999])
    ragged = reverb(wave, 16000, room=room, reverberance=fade, lengths=lengths)
    for i, n in enumerate(lengths.tolist()):
        alone = reverb(wave[i : i + 1], 16000, room=room[i], reverberance=fade[i].item())
        torch.testing.assert_close(together[i], alone[0], atol=1e-6, rtol=0)
        assert ragged[i, :, n:].abs().sum() == 0
        if n:
            trimmed = reverb(wave[i, :, :n], 16000, room=room[i], reverberance=fade[i])
            torch.testing.assert_close(ragged[i, :, :n], trimmed, atol=1e-6, rtol=0)


def test_it_is_linear_and_time_invariant() -> None:
    x, y = torch.randn(2, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = reverb(2 * x - 3 * y, 16000)
    torch.testing.assert_close(both, 2 * reverb(x, 16000) - 3 * reverb(y, 16000), atol=1e-6, rtol=0)
    late = reverb(torch.cat([torch.zeros(777).double(), x]), 16000)
    torch.testing.assert_close(late[777:], reverb(x, 16000), atol=1e-6, rtol=0)


def test_gradients_are_right_and_silence_stays_silent() -> None:
    x = torch.randn(2, 2, 48, dtype=torch.float64, requires_grad=True)
    room = torch.tensor([0.0, 10])
    assert torch.autograd.gradcheck(lambda w: reverb(w, 8000, room=room), x)
    assert reverb(torch.zeros(3, 1, 500), 16000).abs().max() == 0


def test_a_measured_room_equals_numpys_convolution_and_keeps_time() -> None:
    rng = np.random.default_rng(0)
    x, h = rng.standard_normal((3, 2, 500)), rng.standard_normal((3, 80)) * 0.1
    h[:, 7] = 3
    ours = convolve_room(torch.from_numpy(x), torch.from_numpy(h))
    for i in range(3):
        for c in range(2):
            full = np.convolve(x[i, c], h[i] / np.linalg.norm(h[i]))
            np.testing.assert_allclose(ours[i, c].numpy(), full[7 : 7 + 500], atol=1e-10)
    plain = convolve_room(
        torch.from_numpy(x), torch.from_numpy(h[0]), align=False, unit_energy=False
    )
    np.testing.assert_allclose(plain[1, 0].numpy(), np.convolve(x[1, 0], h[0])[:500], atol=1e-10)
    taps = torch.from_numpy(h[:, :9].copy()).requires_grad_()
    wave = torch.from_numpy(x[:, :, :30].copy()).requires_grad_()
    assert torch.autograd.gradcheck(convolve_room, (wave, taps))


@pytest.mark.parametrize(
    ("wave", "given", "word"),
    [
        (torch.zeros(100, dtype=torch.int16), {}, "32768"),
        (torch.full((100,), math.nan), {}, "NaN"),
        (torch.zeros(0), {}, "empty"),
        (torch.zeros(1, 3, 100), {}, "one or two"),
        (torch.zeros(100), {"room": 101}, "room"),
        (torch.zeros(2, 1, 100), {"room": torch.zeros(3)}, "2 examples"),
        (torch.zeros(2, 1, 100), {"lengths": torch.tensor([1, 101])}, "0..100"),
        (torch.zeros(2, 1, 100), {"lengths": torch.tensor([1])}, "2 integers"),
    ],
)
def test_bad_input_is_named(wave: torch.Tensor, given: dict, word: str) -> None:
    with pytest.raises(InputError, match=word) as error:
        reverb(wave, 16000, **given)
    assert "\n" not in str(error.value)


def test_a_silent_room_is_named() -> None:
    with pytest.raises(InputError, match="only zeros"):
        convolve_room(torch.zeros(10), torch.zeros(4))
