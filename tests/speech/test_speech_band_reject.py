"""Band rejection against published tap counts and depths, and the sox program."""

import math
import shutil
import subprocess

import numpy as np
import pytest
import torch

from remanence.errors import InputError
from remanence.speech.wavaugment.band_reject import (
    band_pass,
    band_reject,
    depth_db,
    from_mel,
    reject_taps,
    to_mel,
)

needs_sox = pytest.mark.skipif(shutil.which("sox") is None, reason="the sox program is not here")
BANDS = [
    (2000, 1000, 317, -122.6),
    (7000, 6500, 315, -115.8),
    (300, 120, 323, -19.7),
    (150.5, 20.2, 323, -13.2),
    (7990, 7900, 315, -10.3),
    (213.3, 0.001, 323, -31.9),
]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double() * 0.1


def sox_sinc(wave: torch.Tensor, rate: int, *arguments: str) -> np.ndarray:
    kind = ["-t", "raw", "-r", str(rate), "-e", "signed", "-b", "32", "-c", "1"]
    done = subprocess.run(
        [shutil.which("sox") or "sox", "-D", *kind, "-", *kind, "-", "sinc", *arguments],
        input=np.round(wave.numpy() * 2**31).astype("<i4").tobytes(),
        capture_output=True,
        check=True,
    )
    return np.frombuffer(done.stdout, "<i4") / 2**31


@pytest.mark.parametrize(("high", "low", "count", "depth"), BANDS)
def test_taps_have_the_published_count_symmetry_and_depth(
    high: float, low: float, count: int, depth: float
) -> None:
    taps = reject_taps(16000, torch.tensor([low]), torch.tensor([high]))
    assert taps.shape == (1, count)
    torch.testing.assert_close(taps, taps.flip(1), atol=0, rtol=0)
    centre = torch.tensor([(low + high) / 2]).double()
    assert depth_db(taps, 16000, centre).item() == pytest.approx(depth, abs=0.06)


@needs_sox
@pytest.mark.parametrize(("high", "low", "count", "depth"), BANDS)
def test_it_equals_the_sox_program(high: float, low: float, count: int, depth: float) -> None:
    assert count > depth
    x = noise(8000)
    x = (x * 2**31).round() / 2**31
    theirs = sox_sinc(x, 16000, "-a", "120", f"{high}-{low}")
    power = (theirs**2).sum()
    for wave, least in ((x, 160), (x.float(), 130)):
        ours = band_reject(wave, 16000, low, high).double().numpy()
        assert 10 * math.log10(power / ((ours - theirs) ** 2).sum()) > least


@needs_sox
@pytest.mark.parametrize(("rate", "attenuation", "slope"), [(8000, 80, 100), (44100, 150, 1000)])
def test_other_rates_attenuations_and_slopes_equal_the_sox_program(
    rate: int, attenuation: int, slope: int
) -> None:
    x = (noise(8000) * 2**31).round() / 2**31
    theirs = sox_sinc(x, rate, "-a", str(attenuation), "-t", str(slope), "1500-700")
    ours = band_reject(x, rate, 700, 1500, attenuation=attenuation, transition_hz=slope).numpy()
    assert 10 * math.log10((theirs**2).sum() / ((ours - theirs) ** 2).sum()) > 160


def test_what_is_rejected_and_what_is_kept_sum_to_the_wave() -> None:
    x = noise(3, 2, 4000)
    low, high = torch.tensor([100.0, 0, 3000]), torch.tensor([900.0, 500, 3900])
    both = band_reject(x, 8000, low, high) + band_pass(x, 8000, low, high)
    torch.testing.assert_close(both, x, atol=1e-12, rtol=0)


def test_a_narrow_slope_makes_a_real_notch() -> None:
    low, high = torch.tensor([300.0]).double(), torch.tensor([400.0]).double()
    wide = depth_db(reject_taps(16000, low, high), 16000, (low + high) / 2)
    narrow = depth_db(reject_taps(16000, low, high, transition_hz=40), 16000, (low + high) / 2)
    assert wide > -25
    assert narrow < -100


def test_a_batch_equals_its_rows_and_ragged_rows_equal_trimmed_clips() -> None:
    x = noise(4, 1, 3000).float()
    low, high = torch.tensor([20.2, 6500, 120, 0]), torch.tensor([150.5, 7000, 300, 2000])
    lengths = torch.tensor([3000, 1200, 1, 0])
    together = band_reject(x, 16000, low, high)
    ragged = band_reject(x, 16000, low, high, lengths=lengths)
    for i, n in enumerate(lengths.tolist()):
        alone = band_reject(x[i], 16000, low[i].item(), high[i].item())
        torch.testing.assert_close(together[i], alone, atol=1e-6, rtol=0)
        assert ragged[i, :, n:].abs().sum() == 0
        if n:
            trimmed = band_reject(x[i, :, :n], 16000, low[i], high[i])
            torch.testing.assert_close(ragged[i, :, :n], trimmed, atol=1e-6, rtol=0)


def test_gradients_are_right_silence_stays_silent_and_mel_goes_back() -> None:
    x = noise(2, 1, 60).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: band_reject(w, 8000, 500, 900), x)
    assert band_reject(torch.zeros(2, 100), 16000, 100, 200).abs().max() == 0
    assert to_mel(8000).item() == pytest.approx(2840.0, abs=0.1)
    hz = torch.tensor([0.0, 3, 440, 8000]).double()
    torch.testing.assert_close(from_mel(to_mel(hz)), hz)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (200, 200, "below high_hz"),
        (-1, 200, "0 or above"),
        (100, 8000, "8000 Hz"),
        (math.nan, 1, "low_hz"),
    ],
)
def test_bad_edges_are_named(low: float, high: float, word: str) -> None:
    with pytest.raises(InputError, match=word):
        band_reject(torch.zeros(100), 16000, low, high)
