"""WavAugment, ABX and CPC (arXiv 2007.00991) on spoken digits, with margins. Slow.

3,000 recordings: ten digits, six speakers, fifty takes. Takes 0 to 4 are the data's own test set.
Margins were chosen on takes 5 to 9 with seeds 0 to 2; takes 0 to 4 were then measured once.
"""

import math
import shutil
import subprocess
from pathlib import Path

import librosa
import numpy as np
import pytest
import soxr
import torch
from torch import nn
from torch.nn import functional

from remanence.jobs.speech.cpc import cpc
from remanence.kit.audio import mfcc, read_audio
from remanence.kit.statistics import paired_bootstrap
from remanence.speech.abx.items import Items
from remanence.speech.abx.score import run
from remanence.speech.cpc.model import CPC
from remanence.speech.cpc.presets import PRESETS
from remanence.speech.wavaugment.band_reject import band_reject
from remanence.speech.wavaugment.chain import Chain
from remanence.speech.wavaugment.pitch import pitch_shift, tempo
from remanence.speech.wavaugment.random import RandomNoise, RandomReverb, RandomRoom
from remanence.speech.wavaugment.reverb import reverb

DIGITS = Path(__file__).parents[1] / "../shared/data/spoken_digits/recordings"
NAMES = r"(?P<phone>[0-9])_(?P<speaker>[a-z]+)_"
RATE = 8000
TEST = range(5)
CENTS = (-300, -100, -17, 50, 100, 299)
BANDS = ((1000, 2000), (120, 300), (20.2, 150.5), (3500, 3900))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DIGITS.exists(), reason="needs ../shared/data/spoken_digits"),
]
needs_sox = pytest.mark.skipif(shutil.which("sox") is None, reason="the program sox is not here")


def takes(numbers):
    """Waves (T,) of some takes of every digit and speaker, by name."""
    paths = sorted(p for p in DIGITS.glob("*.wav") if int(p.stem.split("_")[2]) in numbers)
    return {path.stem: read_audio(path) for path in paths}


def sox(wave, rate, *effects):
    """What the program makes of a wave (T,): 32 bits, as 16 would hide all below -90 dB."""
    raw = ["-t", "raw", "-e", "signed", "-b", "32", "-c", "1", "-r", str(rate)]
    samples = np.round(wave.double().numpy() * 2**31).astype("<i4")
    command = [shutil.which("sox"), "-D", *raw, "-", *raw, "-", *effects]
    done = subprocess.run(command, input=samples.tobytes(), capture_output=True, check=True)
    return torch.from_numpy(np.frombuffer(done.stdout, "<i4") / 2**31)


def agreement(theirs, ours):
    """Signal over difference, in dB, of equally long waves."""
    assert theirs.shape == ours.shape
    error = (theirs - ours.double()).square().sum().clamp(min=1e-300)
    return 10 * math.log10(theirs.square().sum() / error)


def fit(wave, size):
    """A wave of sox's, cut or filled up with zeros as `pitch_shift` does."""
    return functional.pad(wave, (0, size - len(wave)))


@pytest.fixture(scope="module", params=["1.28 s", "14 s", "14 s, 16 kHz"])
def clip(request):
    """Digits one after another: a name, a wave (T,) float32 on the grid of 16 bits, its rate."""
    waves = list(takes([0]).values())
    if request.param == "1.28 s":
        return request.param, torch.cat(waves[7:])[: int(1.28 * RATE)], RATE
    joined = torch.cat(waves[::2])[: 14 * RATE]
    if request.param == "14 s":
        return request.param, joined, RATE
    higher = soxr.resample(joined.numpy(), RATE, 2 * RATE, quality="VHQ")
    return request.param, torch.from_numpy(np.round(higher * 2**15) / 2**15), 2 * RATE


@needs_sox
@pytest.mark.parametrize(("search", "flags"), [("full", ()), ("quick", ("-q",))])
def test_tempo_equals_sox(clip, search, flags):
    name, wave, rate = clip
    found = []
    for factor in (0.840896, 0.943874, 1.0293, 1.18921):
        ours, _ = tempo(wave, rate, factor, search=search)
        found.append(agreement(sox(wave, rate, "tempo", *flags, repr(factor)), ours))
    print(f"{name}, tempo {search}: {min(found):.1f} dB or more")
    assert min(found) >= 180


@needs_sox
def test_pitch_equals_sox(clip):
    name, wave, rate = clip
    quick, high = [], []
    for cents in CENTS:
        theirs = sox(wave, rate, "pitch", "-q", str(cents), "rate", "-q", str(rate))
        ours = pitch_shift(wave, rate, cents, quality="quick", search="quick")
        quick.append(agreement(fit(theirs, len(wave)), ours))
        theirs = sox(wave, rate, "pitch", str(cents), "rate", str(rate))
        high.append(agreement(fit(theirs, len(wave)), pitch_shift(wave, rate, cents)))
    print(f"{name}, pitch: quick {min(quick):.1f} dB or more, high {min(high):.1f} dB or more")
    assert min(quick) >= (120 if len(wave) < 2 * rate else 100)
    assert min(high) >= 75


@needs_sox
def test_reverberation_equals_sox(clip):
    name, wave, rate = clip
    wave = wave / 8  # echoes at 100 would pass full scale, where sox cuts them off
    for reverberance, least in ((50, 120), (100, 80)):
        found = []
        for room in (0, 42, 100):
            theirs = sox(wave, rate, "reverb", str(reverberance), "50", str(room), "channels", "1")
            ours = reverb(wave, rate, reverberance=reverberance, room=room)
            found.append(agreement(theirs, ours))
        print(f"{name}, reverberance {reverberance}: {min(found):.1f} dB or more")
        assert min(found) >= least


@needs_sox
def test_band_rejection_equals_sox(clip):
    name, wave, rate = clip
    single, double = [], []
    for low, high in BANDS:
        theirs = sox(wave, rate, "sinc", "-a", "120", f"{high}-{low}")
        single.append(agreement(theirs, band_reject(wave, rate, low, high)))
        double.append(agreement(theirs, band_reject(wave.double(), rate, low, high)))
    print(f"{name}, band rejection: {min(single):.1f} dB or more, float64 {min(double):.1f}")
    assert min(single) >= 130
    assert min(double) >= 160


TRAIN, TRAIN_TALK, TEST_TALK = range(10, 20), range(20, 35), range(35, 50)
SEEDS = (3, 4, 5)
CLIP = 6400  # samples
EPOCHS = 30
COPIES = 2  # of each test recording in each condition
ARMS = ("nothing", "noise", "reverberation")
CLEAN, NOISY, ROOM, OTHER_ROOM = "clean", "in noise", "in a room", "in another kind of room"


def words(numbers):
    """Takes cut or filled up to one length, (N, 1, T), and their digits, (N,)."""
    own = takes(numbers)
    waves = [functional.pad(wave, (0, CLIP - len(wave))) for wave in own.values()]
    waves = torch.stack([wave / wave.square().mean().sqrt() for wave in waves])[:, None] / 20
    return waves, torch.tensor([int(name[0]) for name in own])


def noises(numbers, seed):
    """Minutes of babble, eight talk at once, and of noise whose power falls as 1/f^0 to 1/f^2."""
    generator = torch.Generator().manual_seed(seed)
    talk = [wave / wave.square().mean().sqrt() for wave in takes(numbers).values()]
    size = min(map(len, talk)) * len(talk) // 8
    voices = [
        torch.cat([talk[i] for i in torch.randperm(len(talk), generator=generator)])[:size]
        for _ in range(8)
    ]
    slope = torch.linspace(0, 1, 5)[:, None]
    shape = torch.arange(1, 30 * RATE // 2 + 2) ** -slope
    coloured = torch.fft.irfft(
        shape * torch.fft.rfft(torch.randn(5, 30 * RATE, generator=generator))
    )
    babble = sum(voices)[: size - size % 5].view(5, -1)
    return [clip / clip.std() for bank in (babble, coloured) for clip in bank]


def responses(seed):
    """Rooms (16, T) that are no recursion: the sound, then noise as strong, T60 0.3 to 0.9 s."""
    seconds = torch.arange(CLIP) / RATE
    decay = 10 ** (-3 * seconds / torch.linspace(0.3, 0.9, 16)[:, None])
    echoes = decay * torch.randn(16, CLIP, generator=torch.Generator().manual_seed(seed))
    echoes = echoes / echoes.square().sum(1, keepdim=True).sqrt()
    echoes[:, 0] = 1
    return echoes


def log_mel(waves):
    """(N, 1, T) to (N, 32, S) every 10 ms, each clip's level taken off."""
    filters = torch.from_numpy(librosa.filters.mel(sr=RATE, n_fft=256, n_mels=32))
    window = torch.hann_window(256)
    spectrum = torch.stft(waves[:, 0], 256, hop_length=80, window=window, return_complex=True)
    features = (filters @ spectrum.abs().square() + 1e-4).log()
    return features - features.mean((1, 2), keepdim=True)


def trained(waves, labels, augment, seed):
    """A small convolutional network; every arm takes the same steps in the same order."""
    torch.manual_seed(seed)
    order, draws = (torch.Generator().manual_seed(seed) for _ in range(2))

    def block(inputs, outputs, stride):
        convolution = nn.Conv1d(inputs, outputs, 5, stride=stride, padding=2)
        return convolution, nn.BatchNorm1d(outputs), nn.ReLU()

    network = nn.Sequential(
        *block(32, 64, 1), *block(64, 64, 2), *block(64, 96, 2), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    batches = len(labels) // 60
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, EPOCHS * batches)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(labels), generator=order).chunk(batches):
            heard = waves[chosen]
            if augment is not None:
                heard = augment(heard, generator=draws)
            loss = functional.cross_entropy(network(log_mel(heard)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def wrong(numbers, seeds):
    """Whether each recording was taken for another digit, by (trained with, tested in).

    Mean of its copies, (seeds, N).
    """
    waves, labels = words(TRAIN)
    heard, answers = words(numbers)
    noise, other_noise = noises(TRAIN_TALK, 0), noises(TEST_TALK, 1)
    effects = {
        "nothing": None,
        "noise": Chain([RandomNoise(noise, (0.0, 15.0), p=0.75)]),
        "reverberation": Chain([RandomReverb(RATE, reverberance=(40.0, 95.0), p=0.75)]),
    }
    worlds = {
        CLEAN: None,
        NOISY: RandomNoise(other_noise, (0.0, 10.0)),
        ROOM: RandomReverb(RATE, room=(50, 100), reverberance=(75.0, 95.0)),
        OTHER_ROOM: RandomRoom(responses(2)),
    }
    found = {(arm, world): [] for arm in ARMS for world in worlds}
    for seed in seeds:
        draws = torch.Generator().manual_seed(1000 + seed)
        repeated = heard.repeat(COPIES, 1, 1)
        tests = {
            world: log_mel(repeated if effect is None else effect(repeated, generator=draws))
            for world, effect in worlds.items()
        }
        for arm in ARMS:
            network = trained(waves, labels, effects[arm], seed)
            with torch.no_grad():
                for world, features in tests.items():
                    answer = network(features).argmax(1).view(COPIES, -1)
                    errors = (answer != answers).double().mean(0).numpy()
                    found[arm, world].append(errors)
                    print(f"seed {seed}, trained with {arm}, {world}: {100 * errors.mean():.1f} %")
    return {key: np.stack(rows) for key, rows in found.items()}


@pytest.fixture(scope="module")
def mistakes():
    return wrong(TEST, SEEDS)


def gains(mistakes, arm, world):
    """Relative drop of the error, and how many points less than with nothing, and the other effect.

    The points are with their 95 % intervals over recordings, the seeds' mean each.
    """
    other = next(name for name in ARMS[1:] if name != arm)
    mine, bare, others = (mistakes[name, world] for name in (arm, "nothing", other))
    drop = 1 - mine.mean() / bare.mean()
    points = [100 * np.array(paired_bootstrap(x.mean(0), mine.mean(0))) for x in (bare, others)]
    print(
        f"{world}: {100 * bare.mean():.1f} % without, {100 * mine.mean():.1f} % with {arm}, "
        f"{100 * drop:.0f} % less, {100 * others.mean():.1f} % with {other}; points "
        + ", ".join("{:.1f} ({:.1f} to {:.1f})".format(*found) for found in points)
    )
    return drop, *points


@pytest.mark.parametrize(("arm", "world"), [("noise", NOISY), ("reverberation", ROOM)])
def test_augmentation_makes_robust(mistakes, arm, world):
    drop, over_nothing, over_other = gains(mistakes, arm, world)
    assert drop >= 0.5
    assert over_nothing[1] > 0
    assert over_other[1] > 0
    assert (mistakes[arm, world].mean(1) < mistakes["nothing", world].mean(1)).all()


def test_reverberation_helps_in_rooms_of_another_kind(mistakes):
    drop, _, _ = gains(mistakes, "reverberation", OTHER_ROOM)
    assert drop >= 0.1


def abx(features):
    """Errors within and across speakers, in percent, of whole words."""
    items = Items.from_file_names(features, NAMES)
    return [run(features, items, frame_rate=100, speaker=side) for side in ("within", "across")]


def test_mfcc_tell_words_apart():
    within, across = abx({name: mfcc(wave, RATE) for name, wave in takes(TEST).items()})
    print(f"MFCC: within {100 * within.error:.2f} %, across {100 * across.error:.2f} %")
    assert within.error == pytest.approx(0.017, abs=0.003)
    assert across.error == pytest.approx(0.145, abs=0.005)


def test_random_features_tell_nothing_apart():
    generator = torch.Generator().manual_seed(0)
    names, waves = zip(*takes(TEST).items(), strict=True)
    # Durations tell words apart by themselves: each word gets that of another.
    lengths = [len(waves[i]) // 80 for i in torch.randperm(len(waves), generator=generator)]
    features = {
        name: torch.randn(length, 13, generator=generator)
        for name, length in zip(names, lengths, strict=True)
    }
    for side, found in zip(("within", "across"), abx(features), strict=True):
        print(f"random, {side}: {100 * found.error:.2f} %, standard error {100 * found.stderr:.2f}")
        assert abs(found.error - 0.5) <= 3 * found.stderr


def cpc_errors(folder, numbers, seed, steps=600):
    """ABX within speakers of a network before and after it learned from takes 10 to 49."""
    learn = [p for p in DIGITS.glob("*.wav") if int(p.stem.split("_")[2]) >= 10]
    (folder / "learn.txt").write_text("\n".join(sorted(str(p.resolve()) for p in learn)))
    done = cpc(
        str(folder / "learn.txt"), out=folder / "run", names=NAMES, preset="small", augment="none",
        max_steps=steps, seed=seed,
    )  # fmt: skip
    torch.manual_seed(seed)
    networks = CPC(**PRESETS["small"], sample_rate=RATE).eval(), CPC.load(done.out).eval()
    waves, found = takes(numbers), []
    with torch.no_grad():
        for name, network in zip(("untrained", "trained"), networks, strict=True):
            errors = abx({key: network.features(wave) for key, wave in waves.items()})
            found.append(errors[0])
            shown = " / ".join(f"{100 * result.error:.1f}" for result in errors)
            print(f"CPC, seed {seed}, {name}: within / across {shown} %")
    return found


def test_cpc_learns_words(tmp_path):
    untrained, trained = cpc_errors(tmp_path, TEST, seed=3)
    difference = trained.compare(untrained)
    low, high = (100 * value for value in difference.interval)
    print(f"{100 * difference.difference:.1f} points ({low:.1f} to {high:.1f})")
    assert trained.error <= 0.7 * untrained.error
    assert high < 0
