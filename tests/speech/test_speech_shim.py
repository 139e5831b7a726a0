"""WavAugment's EffectChain: its names on our effects, and the sox program's output."""

import itertools
import pickle
import shutil
import subprocess

import numpy as np
import pytest
import torch

from remanence.errors import InputError
from remanence.speech.wavaugment.band_reject import band_reject
from remanence.speech.wavaugment.pitch import pitch_shift
from remanence.speech.wavaugment.shim import EffectChain

RATE = 16000
SOX = shutil.which("sox") or "sox"
needs_sox = pytest.mark.skipif(shutil.which("sox") is None, reason="the sox program is not here")


def wave(channels: int = 1) -> torch.Tensor:
    return torch.randn(channels, 8000, generator=torch.Generator().manual_seed(0)) * 0.05


def sox(x: torch.Tensor, *effects: str) -> np.ndarray:
    """What the sox program makes of (1, T), through 32-bit integers."""
    kind = ["-t", "raw", "-r", str(RATE), "-e", "signed", "-b", "32", "-c", "1"]
    done = subprocess.run(
        [SOX, "-D", *kind, "-", *kind, "-", *effects],
        input=(x[0].numpy() * 2**31).astype("<i4").tobytes(),
        capture_output=True,
        check=True,
    )
    return np.frombuffer(done.stdout, "<i4") / 2**31


def draw() -> int:
    return 70


def tone() -> torch.Tensor:
    return torch.ones(1, 8000)


def test_a_published_chain_draws_anew_at_each_application() -> None:
    cents, rooms = itertools.cycle([0, 100]), itertools.cycle([0, 90])
    chain = (
        EffectChain()
        .pitch("-q", lambda: next(cents))
        .rate("-q", RATE)
        .reverb(50, 50, lambda: next(rooms))
        .channels()
        .dither()
        .time_dropout(max_seconds=0.1)
    )
    x = wave()
    first, second = (chain.apply(x, {"rate": RATE}, {"rate": RATE}) for _ in range(2))
    assert first.shape == second.shape == x.shape
    assert not torch.equal(first, second)


@needs_sox
def test_pitch_rate_reverb_and_channels_equal_the_sox_program() -> None:
    x = (wave().double() * 2**31).round() / 2**31
    ours = (
        EffectChain()
        .pitch("-q", 100)
        .rate("-q", RATE)
        .reverb("-w", 40, 60, 70)
        .channels(1)
        .apply(x, {"rate": RATE})
    )
    effects = ["pitch", "-q", "100", "rate", "-q", "16000"]
    theirs = sox(x, *effects, "reverb", "-w", "40", "60", "70", "channels", "1")[:8000]
    # The clip's last millisecond hangs on how each side ends it.
    error = (ours[0].numpy()[: len(theirs)] - theirs)[:-100]
    assert 10 * np.log10((theirs[:-100] ** 2).sum() / (error**2).sum()) > 100


@needs_sox
@pytest.mark.parametrize(
    ("effect", "arguments", "least"),
    [
        ("sinc", ["-a", "120", "1000-2000"], 60),
        ("sinc", ["-a", "90", "300-3000"], 60),
        ("sinc", ["2000-1000"], 120),
        ("bandreject", ["1", "20000"], 150),
        ("bandreject", ["1000", "50"], 150),
    ],
)
def test_bands_equal_the_sox_program(effect: str, arguments: list[str], least: float) -> None:
    x = (wave().double() * 2**31).round() / 2**31
    theirs = sox(x, effect, *arguments)
    ours = getattr(EffectChain(), effect)(*arguments).apply(x, {"rate": RATE})[0].numpy()
    assert 10 * np.log10((theirs**2).sum() / ((ours - theirs) ** 2).sum()) > least


def test_a_pickled_chain_does_what_it_did() -> None:
    chain = (
        EffectChain(generator=torch.Generator().manual_seed(3))
        .pitch("-q", draw)
        .rate("-q", RATE)
        .reverb(50, 50, draw)
        .channels(1)
        .sinc("-a", "120", "500-100")
        .bandreject(900, 30)
        .tempo(1.1)
        .speed(1.1)
        .gain(-3)
        .norm(-1)
        .dither()
        .additive_noise(tone, snr=10)
        .time_dropout(max_seconds=0.1)
        .clip(0.9)
    )
    again = pickle.loads(pickle.dumps(chain))  # noqa: S301 (our own bytes)
    assert len(again) == len(chain) == 14
    first, second = (made.apply(wave(), {"rate": RATE}) for made in (chain, again))
    assert torch.equal(first, second)
    # The quick pitch stayed quick.
    high = EffectChain().pitch("-q", draw).rate(RATE).apply(wave(), {"rate": RATE})
    quick = EffectChain().pitch("-q", draw).rate("-q", RATE)
    quick = pickle.loads(pickle.dumps(quick)).apply(wave(), {"rate": RATE})  # noqa: S301
    assert not torch.equal(high, quick)


def test_in_place_is_taken_and_the_wave_is_never_written_to() -> None:
    for in_place in (False, True):
        x = wave()
        y = EffectChain(in_place).clip(0.1).time_dropout(max_frames=8000).apply(x, {"rate": RATE})
        assert torch.equal(x, wave())
        assert not torch.equal(y, x)
        EffectChain(in_place=in_place).dither().apply(x, {"rate": RATE}).zero_()
        assert bool(x.any()) != in_place
    with pytest.raises(InputError, match=r"in_place is .*Generator.*by name"):
        EffectChain(torch.Generator())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="generator is 5"):
        EffectChain(generator=5)  # type: ignore[arg-type]


def test_every_effect_of_sox_is_here_or_refused_with_the_way_round() -> None:
    methods = {name for name in vars(EffectChain) if name[0] not in "_K"} - {"apply", "clear"}
    assert methods == EffectChain.KNOWN_EFFECTS
    # What `sox --help-effect` knows, 14.4.2.
    names = (
        "allpass band bandpass bandreject bass bend biquad chorus channels compand contrast"
        " dcshift deemph delay dither divide downsample earwax echo echos equalizer fade fir"
        " firfit flanger gain highpass hilbert loudness lowpass mcompand noiseprof noisered norm"
        " oops overdrive pad phaser pitch rate remix repeat reverb reverse riaa silence sinc"
        " spectrogram speed splice stat stats stretch swap synth tempo treble tremolo trim"
        " upsample vad vol"
    )
    for name in set(names.split()) - EffectChain.KNOWN_EFFECTS:
        with pytest.raises(AttributeError, match=f"sox's '{name}' is not among ours: ") as caught:
            getattr(EffectChain(), name)
        assert "\n" not in str(caught.value)
    with pytest.raises(AttributeError, match="has lowpass_biquad"):
        EffectChain().lowpass(3000)
    with pytest.raises(AttributeError, match="'revreb': use reverb"):
        EffectChain().revreb(50)


def test_effects_are_the_functions_of_their_names() -> None:
    x = wave(2)
    info = {"rate": RATE}
    pitched = EffectChain().pitch(50).rate(RATE).apply(x, info)
    assert torch.equal(pitched, pitch_shift(x, RATE, 50))
    rejected = EffectChain().sinc("-a", "120", lambda: "900-300").apply(x, info)
    assert torch.equal(rejected, band_reject(x, RATE, 300, 900))
    noise = torch.ones(8000)
    noisy = EffectChain().additive_noise(lambda: noise, snr=0).apply(x, info)
    torch.testing.assert_close(noisy, (x + 1) / 2)
    clipped = EffectChain().clip(lambda: 0.5).apply(x, info)
    torch.testing.assert_close(clipped.max(), x.max() / 2)
    assert EffectChain().norm(-6).apply(x, info).abs().max().item() == pytest.approx(0.501187)
    torch.testing.assert_close(EffectChain().gain(20).apply(x, info), 10 * x)
    assert EffectChain().reverb().apply(x[:1], info).shape == (2, 8000)
    assert EffectChain().rate(8000).apply(x, info).shape == (2, 4000)
    assert EffectChain().tempo(2).apply(x, info).shape == (2, 4000)
    assert EffectChain().speed(2).apply(x, info).shape == (2, 4000)
    dropped = EffectChain().time_dropout(max_frames=20_000).apply(x, info)
    assert ((dropped == x) | (dropped == 0)).all()


def test_the_published_scripts_calls_run() -> None:
    # The calls of the README, of process_file.py and of librispeech_selfsupervised.py.
    draw = np.random.default_rng(0)
    x = wave()
    info = {"channels": 1, "length": x.size(1), "precision": 32, "rate": 16000.0}
    info["bits_per_sample"] = 32
    for chain in (
        EffectChain().pitch(100).rate(16_000),
        EffectChain().pitch("-q", lambda: draw.integers(-100, 100)).rate(16_000),
        EffectChain().pitch("100").rate(16_000).dither(),
        EffectChain().sinc("-a", "120", lambda: "1200.5-300.25"),
        EffectChain().bandreject(1, 20000),
        EffectChain().reverb(lambda: [50, 50, draw.integers(0, 100)]).channels(),
        EffectChain().clip(lambda: draw.triangular(0.5, 1, 1)),
        EffectChain().additive_noise(noise_generator=lambda: torch.ones(1, 8000), snr=10.0),
        EffectChain()
        .pitch("-q", lambda: draw.integers(-300, 300))
        .rate("-q", 16_000)
        .reverb(50, 50, lambda: draw.integers(0, 100))
        .channels()
        .additive_noise(lambda: torch.zeros(1, 8000), 15)
        .time_dropout(max_seconds=50 / 1000)
        .sinc("-a", "120", "500-100")
        .clip(0.9),
    ):
        y = chain.apply(x, src_info=info, target_info={**info, "length": 0})
        assert y.shape == x.shape
        assert y.isfinite().all()
        assert not torch.equal(y, x)
    assert EffectChain().reverb(50, 50, 30).channels().apply(x, info).shape == x.shape
    assert torch.equal(EffectChain().apply(x[0], src_info=info), x)
    same = EffectChain().additive_noise(lambda: x, snr=10.0).apply(x, info)
    torch.testing.assert_close(same, x)


def test_lengths_cut_and_fill_up() -> None:
    x = wave(2)
    chain = EffectChain().gain(0)
    assert torch.equal(chain.apply(x, {"rate": RATE, "length": 100}), x[:, :100])
    assert torch.equal(chain.apply(x, {"rate": RATE}, {"length": 100}), x[:, :100])
    longer = chain.apply(x, {"rate": RATE}, {"length": 9000})
    assert torch.equal(longer[:, :8000], x)
    assert longer[:, 8000:].abs().max() == 0
    with pytest.raises(InputError, match="length 9000"):
        chain.apply(x, {"rate": RATE, "length": 9000})
    assert len(chain) == 1
    chain.clear()
    assert len(chain) == 0
    with pytest.raises(AttributeError, match=r"'karaoke'.*reverb"):
        chain.karaoke(3)


def test_wrong_calls_are_named() -> None:
    x = wave()
    with pytest.raises(InputError, match="'rate'"):
        EffectChain().apply(x, {})
    with pytest.raises(InputError, match="one clip"):
        EffectChain().apply(x[None], {"rate": RATE})
    with pytest.raises(InputError, match="pitch takes 1 to 1"):
        EffectChain().pitch().apply(x, {"rate": RATE})
    with pytest.raises(InputError, match="'loud'"):
        EffectChain().gain("loud").apply(x, {"rate": RATE})
    for band in (["900"], ["-900"], ["-t", "50", "900-300"]):
        with pytest.raises(InputError, match=f"sinc {' '.join(band)} .*high-low"):
            EffectChain().sinc(*band).apply(x, {"rate": RATE})
    for effect, words, kept in (
        ("rate", ["-l", "8000"], "-q and -h"),
        ("rate", ["-m"], "-q and -h"),
        ("rate", ["-v", RATE], "-q and -h"),
        ("tempo", ["-s", 2], "-q"),
        ("gain", ["-n", 2], "leave it out"),
    ):
        with pytest.raises(InputError, match=f"^{effect} {words[0]} is not among ours: .*{kept}"):
            getattr(EffectChain(), effect)(*words).apply(x, {"rate": RATE})
    with pytest.raises(InputError, match="bandreject 9000 20 rejects nothing"):
        EffectChain().bandreject(9000, 20).apply(x, {"rate": RATE})
    with pytest.raises(InputError, match="wave is ndarray"):
        EffectChain().apply(x.numpy(), {"rate": RATE})  # type: ignore[arg-type]
    for rate in (None, "16000", 0):
        with pytest.raises(InputError, match="is not a rate"):
            EffectChain().apply(x, {"rate": rate})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="either"):
        EffectChain().time_dropout()
