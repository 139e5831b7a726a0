import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from remanence.errors import InputError
from remanence.jobs.speech import cpc_training
from remanence.jobs.speech.cpc import cpc
from remanence.jobs.speech.cpc_audio import hold_out, open_speech
from remanence.jobs.speech.cpc_waves import Waves
from remanence.kit.audio import mfcc
from remanence.kit.recordings import list_recordings
from remanence.speech.cpc.model import CPC
from remanence.speech.cpc.windows import Piece

RATE = 8000
NAMES = r"(?P<phone>[0-9])_(?P<speaker>[a-z]+)_"
QUICK = {
    "names": NAMES, "preset": "small", "window": 0.3, "batch_size": 3, "negatives": 8,
    "steps_ahead": 3, "max_steps": 7, "chain": "pitch[quality=quick,search=quick]",
}  # fmt: skip


def tone(pitch, vowel, seconds=0.5, rate=RATE, seed=0):
    """A harmonic tone: the speaker's pitch, and formants that tell the vowel."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    pitch = pitch * rng.uniform(0.95, 1.05)
    formant = (500, 1500)[vowel]
    parts = [
        np.exp(-(((h * pitch - formant) / 300) ** 2)) * np.sin(2 * np.pi * h * pitch * time)
        for h in range(1, 12)
    ]
    return 0.3 * sum(parts) + 0.01 * rng.standard_normal(len(time))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three speakers, two vowels, six takes each of 0.2 or 0.5 s."""
    folder = tmp_path_factory.mktemp("speech")
    (folder / "audio").mkdir()
    for speaker, pitch in {"anna": 220, "bert": 110, "carl": 140}.items():
        for vowel in (0, 1):
            for take in range(6):
                wave = tone(pitch, vowel, (0.2, 0.5)[take % 2], seed=take)
                name = folder / "audio" / f"{vowel}_{speaker}_{take}.wav"
                soundfile.write(name, wave, RATE)
    return folder


@pytest.fixture(scope="module")
def trained(place):
    options = QUICK | {"valid_fraction": 0.4, "checkpoint_steps": 2}
    return cpc(str(place / "audio"), out=place / "trained", **options)


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_run_folder_is_whole(trained):
    assert {path.name for path in trained.out.iterdir()} == {
        "run.json", "metrics.jsonl", "results.json", "report.html", "config.json",
        "model.safetensors",
    }  # fmt: skip
    model = CPC.load(trained.out)
    assert model.config["sample_rate"] == RATE
    assert model.config["window"] == 30
    found = json.loads((trained.out / "results.json").read_text())
    assert found["chance_loss"] == trained.chance == pytest.approx(math.log(9))
    assert found["steps"] == trained.steps == 7
    assert found["same_speaker_negatives"] == 1
    assert found["chosen_by"] == "ABX error"
    assert {row["held_out"] for row in found["speakers"].values()} == {5}
    recipe = found["recipe"]
    assert recipe["window, s"] == pytest.approx(0.3)
    assert (recipe["negatives"], recipe["learning rate"], recipe["heads"]) == (8, 1e-3, 4)
    assert recipe["chain"] == QUICK["chain"]
    html = (trained.out / "report.html").read_text()
    for word in ("guessing", "untrained", "steps ahead", "anna", "shorter than a window",
                 "within", "held-out", "pitch"):  # fmt: skip
        assert word in html, word


def test_every_epoch_is_logged_and_the_best_is_kept(trained):
    logged = rows(trained.out)
    assert [row["epoch"] for row in logged] == list(range(len(logged)))
    assert "loss" not in logged[0]  # the untrained network
    for row in logged:
        assert {"valid_loss", "valid_accuracy_3", "abx_within", "abx_across"} < row.keys()
    errors = {row["epoch"]: row["abx_within"] + row["abx_across"] for row in logged[1:]}
    assert trained.best_epoch == min(errors, key=errors.get)
    kept = next(row for row in logged if row["epoch"] == trained.best_epoch)
    assert trained.abx == {"within": kept["abx_within"], "across": kept["abx_across"]}
    assert trained.losses == tuple(kept[f"valid_loss_{k}"] for k in (1, 2, 3))


def test_what_is_reported_is_what_the_file_does(trained, place):
    from remanence.speech.abx.items import Items
    from remanence.speech.abx.score import run

    speech = open_speech(str(place / "audio"), NAMES, speakers=True)
    _, held = hold_out(speech, 0.4, 0)
    recordings = speech[held].recordings
    waves, model = Waves(recordings, RATE), CPC.load(trained.out)
    features = {r.name: model.features(waves.whole(i)) for i, r in enumerate(recordings)}
    items = Items.from_file_names(features, NAMES)
    plain = {r.name: mfcc(waves.whole(i), RATE) for i, r in enumerate(recordings)}
    found = json.loads((trained.out / "results.json").read_text())["abx"]
    html = (trained.out / "report.html").read_text()
    for kind, error in trained.abx.items():
        assert run(features, items, frame_rate=100, speaker=kind).error == error
        theirs = run(plain, items, frame_rate=100, speaker=kind).error
        assert found[kind]["mfcc"] == theirs
        verdict = "beats" if error < theirs else "does not beat"
        assert f"{kind[1:]} speakers the network {verdict} MFCC ({100 * error:.1f} against" in html


@pytest.mark.parametrize("stop", [0, 3, 5])
def test_it_goes_on_to_the_same_bits(trained, place, monkeypatch, stop):
    out, views, calls = place / f"resumed{stop}", cpc_training._views, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return views(*given)

    options = QUICK | {"valid_fraction": 0.4, "checkpoint_steps": 2, "out": out}
    monkeypatch.setattr(cpc_training, "_views", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cpc(str(place / "audio"), **options)
    monkeypatch.setattr(cpc_training, "_views", views)
    again = cpc(str(place / "audio"), **options, resume=True)
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (out / name).read_bytes() == (trained.out / name).read_bytes()
    assert again.losses == trained.losses


def test_all_views_and_samplings_train(place):
    seen = set()
    for augment, sampling in (
        ("none", "sequence"), ("future", "uniform"), ("both", "sequential"), ("same", "speaker")
    ):  # fmt: skip
        options = QUICK | {"max_steps": 2, "augment": augment, "sampling": sampling}
        options |= {"valid_fraction": 0, "straddle": sampling == "uniform"}
        options["chain"] = None if augment == "none" else options["chain"]
        out = place / f"{augment}"
        done = cpc(str(place / "audio"), out=out, **options)
        assert done.losses == ()
        assert done.best_epoch >= 1
        assert "nothing was held out that" in (out / "report.html").read_text()
        seen.add((out / "model.safetensors").read_bytes())
        shares = [row["same_speaker"] for row in rows(out)[1:]]
        assert (min(shares) < 1) == (sampling == "uniform")
    assert len(seen) == 4


def test_it_stops_where_nothing_gets_better(place):
    options = QUICK | {"augment": "none", "chain": None, "valid_fraction": 0.4, "lr": 1e-12}
    options |= {"epochs": 50, "max_steps": None, "patience": 2}
    done = cpc(str(place / "audio"), out=place / "stopped", **options)
    assert done.best_epoch == 1
    assert [row["epoch"] for row in rows(done.out)] == [0, 1, 2, 3]
    assert json.loads((done.out / "results.json").read_text())["stopped_early"]
    assert "before the end" in (done.out / "report.html").read_text()


def test_items_need_recordings_that_are_held_out(place, tmp_path):
    (tmp_path / "a.item").write_text("#header\n0_anna_0 0.0 0.1 a SIL SIL anna\n")
    options = QUICK | {"items": tmp_path / "a.item", "out": tmp_path / "run"}
    for share, words in ((0, "no held-out recording"), (0.9, "a phone twice|at least two phones")):
        with pytest.raises(InputError, match=words):
            cpc(str(place / "audio"), **options, valid_fraction=share)
    (tmp_path / "a.item").write_text("#header\nelsewhere 0.0 0.1 a SIL SIL anna\n")
    with pytest.raises(InputError, match="none of 1 items lies in the 5 held-out"):
        cpc(str(place / "audio"), **options)


def test_recordings_at_another_rate_and_noise_and_items(place, tmp_path):
    for i, speaker in enumerate(("dora", "emil")):
        for vowel in (0, 1):
            for take in range(3):
                wave = tone(120 + 60 * i, vowel, 0.6, 11025, take)
                (tmp_path / speaker).mkdir(exist_ok=True)
                two = np.stack([wave, 0.5 * wave], 1)
                soundfile.write(tmp_path / speaker / f"{vowel}{take}.wav", two, 11025)
    (tmp_path / "noise").mkdir()
    soundfile.write(tmp_path / "noise" / "hum.wav", np.random.default_rng(0).normal(size=500), 8000)
    lines = ["#file onset offset #phone prev next speaker"]
    lines += [
        f"{vowel}_{speaker}_{take} 0.05 0.15 v{vowel} SIL SIL {speaker}"
        for speaker in ("anna", "bert")
        for vowel in (0, 1)
        for take in range(3)
    ]
    (tmp_path / "digits.item").write_text("\n".join(lines) + "\n")
    options = QUICK | {"names": None, "chain": None, "max_steps": 1, "sample_rate": 16000}
    (tmp_path / "audio").mkdir()
    for speaker in ("dora", "emil"):
        (tmp_path / speaker).rename(tmp_path / "audio" / speaker)
    (tmp_path / "valid").mkdir()
    for path in (place / "audio").glob("*.wav"):
        (tmp_path / "valid" / path.stem.split("_")[1]).mkdir(exist_ok=True)
        target = tmp_path / "valid" / path.stem.split("_")[1] / path.name
        target.write_bytes(path.read_bytes())
    done = cpc(
        str(tmp_path / "audio"), out=tmp_path / "run", valid=str(tmp_path / "valid"),
        noise=str(tmp_path / "noise"), items=tmp_path / "digits.item", **options,
    )  # fmt: skip
    assert set(done.abx) == {"within", "across"}
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["abx_items"] == {"within": 12, "across": 12}
    said = " ".join(found["preparation"])
    assert "12 recordings of 11,025 Hz are resampled to 16,000 Hz" in said
    assert (
        "36 recordings of 8,000 Hz are resampled to 16,000 Hz, and hold nothing above 4,000 Hz"
        in said
    )
    assert "channels of 12 recordings are averaged" in said
    assert "1 clip, 0.1 s" in said
    assert CPC.load(tmp_path / "run").config["sample_rate"] == 16000


def test_windows_from_disk_are_those_in_memory(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(100, 0, 2.0, 11025), 11025, subtype="FLOAT")
    soundfile.write(tmp_path / "b.wav", tone(100, 1, 1.0, 8000), 8000, subtype="FLOAT")
    loud = tone(100, 1, 1.0, 8000)
    soundfile.write(tmp_path / "c.wav", np.stack([loud, 0.2 * loud], 1), 8000, subtype="FLOAT")
    recordings = list_recordings(tmp_path)
    kept = Waves(recordings, 8000, show=False)
    disk = Waves(recordings, 8000, in_memory=0, show=False)
    assert (kept.kept, disk.kept) == (3, 0)
    assert kept.lengths == disk.lengths
    assert np.abs(kept.whole(2).numpy() - 0.6 * loud).max() < 1e-6
    for pieces in (
        [Piece(0, 3001, 9000)],
        [Piece(0, 15500, 16000), Piece(1, 0, 5500)],
        [Piece(2, 100, 5000)],
    ):
        difference = kept.window(pieces) - disk.window(pieces)
        assert difference.abs().max() < 1e-4  # the recording's end is another to the filter


def test_held_out_recordings_are_of_each_speaker(place):
    speech = open_speech(str(place / "audio"), NAMES, speakers=True)
    learn, held = hold_out(speech, 0.1, 3)
    assert sorted(learn + held) == list(range(36))
    assert sorted(speech.speakers[i] for i in held) == ["anna", "bert", "carl"]
    assert hold_out(speech, 0.1, 3) == (learn, held) != hold_out(speech, 0.1, 4)
    assert hold_out(speech, 0, 3)[1] == []
    # Each lasts 0.6 s or so: one of a speaker makes no window, two do; and half at most are taken.
    held = hold_out(speech, 0.1, 3, seconds=1.0)[1]
    lasts = {s: sum(speech.recordings[i].seconds for i in held if speech.speakers[i] == s)
             for s in ("anna", "bert", "carl")}  # fmt: skip
    assert min(lasts.values()) >= 1.0 > max(lasts.values()) - 0.7
    assert hold_out(speech, 0.1, 3, seconds=99.0) == hold_out(speech, 0.1, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chain": "pitch,wobble"}, "column 7: 'wobble' is no effect"),
        ({"chain": "pitch,speed"}, "must stay aligned"),
        ({"chain": "swap"}, "must stay aligned"),
        ({"chain": "pitch,noise"}, "--noise FOLDER"),
        ({"noise": "nowhere", "chain": None}, "nowhere: there is no such"),
        ({"augment": "none"}, "--chain: --augment none takes none"),
        ({"augment": "past+future"}, "--augment past\\+future: give one of"),
        ({"names": "(?P<speaker>[0-9]+)x"}, "does not match"),
        ({"names": "[0-9]_[a-z]+"}, "no named group"),
        ({"names": None}, "no telling who speaks"),
        ({"window": 60.0}, "no speaker has one window"),
        ({"window": 0.1, "steps_ahead": 10}, "1 to window - 1"),
        ({"max_steps": 0}, "--max-steps 0: must be at least 1"),
        ({"devices": 99}, "--devices 99"),
        ({"items": "nowhere.item"}, "item file nowhere.item cannot be read"),
        ({"sample_rate": 11025}, "give 8000 or 16000"),
        ({"patience": 2, "valid_fraction": 0}, "--patience 2: nothing is held out"),
        ({"valid": "{audio}/0_anna_0.wav"}, "1 of its recordings"),
        ({"lr": 1e6, "clip": 1e9, "max_steps": 30}, "lower --lr"),
    ],
)
def test_bad_options_leave_nothing(place, tmp_path, change, words):
    audio = str(place / "audio")
    change = {k: v.format(audio=audio) if k == "valid" else v for k, v in change.items()}
    with pytest.raises(InputError, match=words) as error:
        cpc(audio, out=tmp_path / "run", **QUICK | change)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    if "lr" not in change:  # that one trained, and can go on
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda path: path.write_bytes(b""), "empty file"),
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "is cut off"),
        (lambda path: path.write_bytes(b"no sound" * 9), "cannot be read"),
        (lambda path: soundfile.write(path, np.full(9000, np.nan), RATE, "FLOAT"), "NaN"),
    ],
)
def test_broken_recordings_are_named(tmp_path, broken, words):
    for take in range(3):
        path = tmp_path / "audio" / "anna" / f"{take}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(100, 0), RATE)
    broken(tmp_path / "audio" / "anna" / "1.wav")
    with pytest.raises(InputError, match=words) as error:
        cpc(str(tmp_path / "audio"), out=tmp_path / "run", **QUICK | {"names": None})
    assert "1.wav" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["audio"]


CALL = """
import os
import sys
from pathlib import Path
import torch
from remanence.jobs.speech.cpc import cpc
from remanence.speech.cpc.training import Contrast
forward, stop, seeds = Contrast.forward, int(sys.argv[3]), []
def counted(*given):
    seeds.append(torch.initial_seed())
    if len(seeds) > stop:
        raise KeyboardInterrupt
    return forward(*given)
Contrast.forward = counted
scope = "global" if "global" in sys.argv else "local"
cpc(sys.argv[1], out=Path(sys.argv[2]), resume="resume" in sys.argv, negatives_scope=scope,
    **OPTIONS)
Path(f"seeds.{os.environ['RANK']}").write_text(" ".join(map(str, seeds)))
"""


@pytest.mark.slow
def test_two_processes_go_on_to_the_same_bits(place, tmp_path):
    options = QUICK | {"batch_size": 2, "valid_fraction": 0.4, "checkpoint_steps": 2}
    (tmp_path / "call.py").write_text(CALL.replace("OPTIONS", repr(options)))

    def call(out, *words, processes=2):
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 f"--nproc-per-node={processes}", "call.py", str(place / "audio"), out]  # fmt: skip
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            [*start, *words], check=False, cwd=tmp_path, env=env, capture_output=True, text=True
        )

    whole = call("whole", "99")
    assert whole.returncode == 0, whole.stderr
    seeds = [set((tmp_path / f"seeds.{rank}").read_text().split()) for rank in (0, 1)]
    assert [len(own) for own in seeds] == [7, 7]
    assert not seeds[0] & seeds[1]
    assert call("cut", "5").returncode != 0
    assert (tmp_path / "cut.partial").exists()
    alone = call("cut", "99", "resume", processes=1)
    assert "had 2, not 1; give the same to resume" in alone.stderr
    again = call("cut", "99", "resume")
    assert again.returncode == 0, again.stderr
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    last = rows(tmp_path / "whole")[-1]
    assert last["step"] == 7
    assert last["same_speaker"] == 1
    assert last["learning_rate"] == pytest.approx(2e-3)  # two processes, and one step of ramp
    everyone = call("everyone", "99", "global")
    assert everyone.returncode == 0, everyone.stderr
    assert rows(tmp_path / "everyone")[-1]["same_speaker"] < 1
    found = json.loads((tmp_path / "everyone" / "results.json").read_text())
    assert found["recipe"]["negatives scope"] == "global"


@pytest.mark.slow
def test_sweeps_are_learned(tmp_path):
    # Unlike a steady tone's, the frames of a sweep can be told apart, and foretold.
    time = np.arange(4000) / RATE
    for speaker in range(2):
        (tmp_path / "audio" / f"s{speaker}").mkdir(parents=True)
        for take in range(8):
            rng = np.random.default_rng((speaker, take))
            frequency = 300 * (5 + speaker) ** (2 * time) * rng.uniform(0.9, 1.1)
            wave = 0.3 * np.sin(2 * np.pi * np.cumsum(frequency) / RATE)
            wave += 0.01 * rng.standard_normal(len(time))
            soundfile.write(tmp_path / "audio" / f"s{speaker}" / f"{take}.wav", wave, RATE)
    options = QUICK | {"names": None, "augment": "none", "chain": None, "valid_fraction": 0.25}
    done = cpc(str(tmp_path / "audio"), out=tmp_path / "run", **options | {"max_steps": 300})
    assert np.mean(done.losses) < 0.8 * done.chance
    assert min(done.accuracies) > 2 / 9
