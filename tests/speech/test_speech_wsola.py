"""WSOLA against a loop written from its definition, and against the program sox."""

import math
import shutil
import subprocess

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from remanence.errors import InputError
from remanence.speech.wavaugment.wsola import sizes, stretch

needs_sox = pytest.mark.skipif(shutil.which("sox") is None, reason="the program sox is not here")


def voice(sample_rate, seconds, seed=0):
    """A gliding buzz under three formants, with breath and pauses, on a 16-bit grid."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(sample_rate * seconds)) / sample_rate
    pitch = 120 + 30 * np.sin(2 * np.pi * 0.7 * t + seed) + 10 * rng.standard_normal()
    phase = 2 * np.pi * np.cumsum(pitch) / sample_rate
    wave = np.zeros_like(t)
    for harmonic in range(1, 24):
        gain = sum(np.exp(-(((harmonic * 120 - f) / 150) ** 2)) for f in (500, 1400, 2400))
        wave += (gain + 0.02) * np.cos(harmonic * phase)
    wave = wave * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t)) + 0.05 * rng.standard_normal(len(t))
    wave[(t % 0.9) > 0.8] = 0
    return np.round(0.5 * wave / np.abs(wave).max() * 2**15) / 2**15


def sox(path, wave, sample_rate, *effects):
    """Run sox with 32-bit samples in and out: 16 bits would hide all below -90 dB."""
    samples = np.round(np.asarray(wave, dtype=np.float64).T * 2**31).astype(np.int32)
    wavfile.write(path / "in.wav", sample_rate, samples)
    out = path / "out.wav"
    subprocess.run(["sox", "-D", path / "in.wav", "-b", "32", out, *effects], check=True)  # noqa: S607 - sox is looked up on the path
    return wavfile.read(out)[1].T / 2**31


def agreement(reference, other):
    """Signal over difference, in dB."""
    error = np.square(reference - other).sum()
    return 10 * math.log10(np.square(reference).sum() / max(error, 1e-300))


def reference(wave, sample_rate, factor, search):
    """The definition, one segment and one offset at a time: (C, T) float64."""
    segment, span, overlap, hop = sizes(sample_rate)
    n_out = math.floor(wave.shape[1] / factor + 0.5)
    u = np.pad(wave, ((0, 0), (span // 2, 0)))
    read, pieces, tail = 0, [], None
    for s in range(max(1, math.ceil(n_out / hop))):
        read = math.floor(factor * s * hop + 0.5)
        need = read + segment + span
        u = np.pad(u, ((0, 0), (0, max(0, need - u.shape[1]))))
        if tail is None:
            j = span // 2
            head = u[:, j : j + overlap]
        else:

            def difference(i, read=read, tail=tail, u=u):
                return np.square(u[:, read + i : read + i + overlap] - tail).sum()

            j = full(difference, span) if search == "full" else quick(difference, span)
            ramp = np.arange(overlap) / overlap
            head = tail * (1 - ramp) + u[:, read + j : read + j + overlap] * ramp
        start = read + j
        pieces += [head, u[:, start + overlap : start + hop]]
        tail = u[:, start + hop : start + segment]
    return np.concatenate(pieces, axis=1)[:, :n_out]


def full(difference, span):
    return min(range(span), key=difference)


def quick(difference, span):
    previous = best = (span + 1) // 2
    lowest = difference(best)
    for step in (64, 16, 4, 1):
        for direction in (-1, 1):
            m = 1
            while step == 64 or m <= 3:
                i = previous + direction * m * step
                if not 0 <= i < span:
                    break
                if difference(i) < lowest:
                    best, lowest = i, difference(i)
                m += 1
        previous = best
    return best


def lengths(n_samples, factors):
    return [math.floor(n_samples / factor + 0.5) for factor in factors]


@pytest.mark.parametrize(
    ("sample_rate", "expected"),
    [
        (8000, (656, 117, 96, 560)),
        (16000, (1312, 235, 192, 1120)),
        (22050, (1808, 324, 264, 1544)),
        (44100, (3616, 647, 528, 3088)),
    ],
)
def test_sizes_at_four_rates(sample_rate, expected):
    assert sizes(sample_rate) == expected


@pytest.mark.parametrize("search", ["full", "quick"])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_clip_follows_the_definition_with_its_own_factor(search, channels):
    factors = torch.tensor([0.55, 0.840896, 0.99, 1.18921, 2.3], dtype=torch.float64)
    wave = np.stack(
        [[voice(8000, 0.7, seed=10 * b + c) for c in range(channels)] for b in range(5)]
    )
    ends = lengths(wave.shape[2], factors.tolist())
    got = stretch(torch.from_numpy(wave), 8000, factors, max(ends), search=search)
    for row, factor, clip, end in zip(got, factors.tolist(), wave, ends, strict=True):
        expected = reference(clip, 8000, factor, search)
        assert expected.shape[1] == end
        np.testing.assert_allclose(row[:, :end].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("search", ["full", "quick"])
def test_direct_squares_choose_the_same_splices(search):
    wave = torch.from_numpy(np.stack([voice(16000, 1.3, seed=s) for s in range(6)]))[:, None]
    wave[3] *= 1e-4
    wave[4, :, :6000] *= 1e-4  # quiet and loud in one clip
    wave[5] = (torch.arange(wave.shape[2]) % 100 < 50).double() - 0.5  # exact ties
    factors = torch.linspace(0.7, 1.4, 6, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        fast, direct = (
            stretch(wave.to(dtype), 16000, factors, 29000, search=search, exact=exact)
            for exact in (False, True)
        )
        assert torch.equal(fast, direct)


def test_of_equal_offsets_the_first_wins():
    # Of period 32, shorter than the search: several offsets continue it without a seam.
    wave = ((np.arange(6000) % 32) < 16) - 0.5
    expected = reference(wave[None], 8000, 1.25, "full")
    factors = torch.tensor([1.25], dtype=torch.float64)
    got = stretch(torch.from_numpy(wave)[None, None], 8000, factors, expected.shape[1])
    assert np.array_equal(got[0].numpy(), expected)


def test_silence_stays_silence_and_short_clips_pass():
    for n_samples in (1, 2, 100, 1311, 1400):
        for factor in (0.1, 0.9, 1.7, 100.0):
            wave = torch.zeros(1, 1, n_samples)
            out = stretch(wave, 16000, torch.tensor([factor], dtype=torch.float64), 2 * n_samples)
            assert out.shape == (1, 1, 2 * n_samples)
            assert not out.any()


def test_same_channels_stay_the_same():
    mono = torch.from_numpy(voice(16000, 1)).float()
    factors = torch.tensor([1.19], dtype=torch.float64)
    left, right = stretch(mono.expand(1, 2, -1), 16000, factors, 13000)[0]
    assert torch.equal(left, right)


def test_gradients_pass_through_the_splices_chosen():
    wave = torch.from_numpy(voice(400, 0.25))[None, None].repeat(2, 1, 1).requires_grad_()
    factors = torch.tensor([0.8, 1.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: stretch(x, 400, factors, 125), wave, eps=1e-7, atol=1e-5
    )


def test_bad_arguments_are_named():
    wave, factors = torch.zeros(1, 1, 100), torch.ones(1, dtype=torch.float64)
    with pytest.raises(InputError, match="search 'slow' is unknown"):
        stretch(wave, 16000, factors, 100, search="slow")
    with pytest.raises(InputError, match="sample_rate 100 is too low"):
        stretch(wave, 100, factors, 100)


@needs_sox
@pytest.mark.parametrize(("search", "flag"), [("full", []), ("quick", ["-q"])])
@pytest.mark.parametrize(("sample_rate", "seconds"), [(8000, 5.3), (16000, 1.28), (44100, 1.1)])
def test_sox_gives_the_same_samples(tmp_path, search, flag, sample_rate, seconds):
    wave = voice(sample_rate, seconds)
    factors = [0.840896, 0.943874, 0.999423, 1.0293, 1.18921, 1.7]
    ends = lengths(len(wave), factors)
    batch = torch.from_numpy(wave).float().expand(len(factors), 1, -1)
    factor = torch.tensor(factors, dtype=torch.float64)
    got = stretch(batch, sample_rate, factor, max(ends), search=search).double()
    for row, value, end in zip(got, factors, ends, strict=True):
        expected = sox(tmp_path, wave, sample_rate, "tempo", *flag, repr(value))
        assert len(expected) == end
        assert agreement(expected, row[0, :end].numpy()) > 180


@needs_sox
def test_sox_gives_the_same_samples_in_stereo(tmp_path):
    wave = np.stack([voice(16000, 1.1, seed=1), voice(16000, 1.1, seed=2)])
    expected = sox(tmp_path, wave, 16000, "tempo", "1.12")
    factors = torch.tensor([1.12], dtype=torch.float64)
    got = stretch(torch.from_numpy(wave).float()[None], 16000, factors, expected.shape[1])
    assert agreement(expected, got[0].double().numpy()) > 180
