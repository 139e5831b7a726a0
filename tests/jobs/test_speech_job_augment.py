"""`speech augment`: the files it writes, what they depend on, and bad input."""

import itertools
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from torch.nn import functional

from remanence.cli import main
from remanence.errors import InputError
from remanence.jobs.speech import augment as job
from remanence.jobs.speech import augment_batches
from remanence.jobs.speech.augment import augment
from remanence.jobs.speech.augment_noise import GIVEN, RECIPES, Chains, chain_text
from remanence.jobs.speech.augment_plan import cut
from remanence.kit.audio import read_audio
from remanence.kit.report import Report
from remanence.kit.words import counted
from remanence.speech.wavaugment.chain import Chain, from_recipe
from remanence.speech.wavaugment.chain_text import from_text
from remanence.speech.wavaugment.params import Params
from remanence.speech.wavaugment.pitch import speed
from remanence.speech.wavaugment.random import RandomSpeed, RandomTempo

RATE = 8000
FRAMES = {"ann/one": 2531, "ann/two": 4800, "bob/one": 2600, "bob/deep/two": 2533}
CPC2 = "pitch[-300:300],noise[5:15],reverb[room=0:100]"


def voice(frames, seed, rate=RATE):
    """A harmonic tone that swells and fades."""
    time = np.arange(frames) / rate
    pitch = 100 + 20 * seed
    tone = sum(np.sin(2 * np.pi * pitch * k * time + k * seed) / k for k in range(1, 9))
    return 0.1 * tone * np.sin(np.pi * np.arange(frames) / frames)


def write(path, wave, rate=RATE, subtype="PCM_16"):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, subtype=subtype)
    return path


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    """Drawing takes most of a small run's time: one test does it."""
    if "report" not in request.node.name:
        monkeypatch.setattr(job, "build_report", lambda *_: Report(""))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("audio")
    for seed, (name, frames) in enumerate(FRAMES.items()):
        write(root / "speech" / f"{name}.wav", voice(frames, seed))
    hiss = np.random.default_rng(0).normal(size=30_000) * 0.05
    write(root / "noise" / "long.wav", hiss[:9000])
    write(root / "noise" / "short.wav", hiss[:700])
    write(root / "other" / "fast.flac", hiss, 16_000)
    (root / "empty").mkdir()
    return root


def run(files, out, source="speech", **options):
    options.setdefault("noise", None if "chain" in options else str(files / "noise"))
    return augment(str(files / source), out=out, **options)


def lines(out):
    return [json.loads(line) for line in (out / "params.jsonl").read_text().splitlines()]


def sounds(out):
    """The samples of every file; libsndfile writes the time of day into files of floats."""
    files = sorted((out / "audio").rglob("*.*"))
    return {p.relative_to(out): soundfile.read(p, dtype="float32")[0].tobytes() for p in files}


def drawn(row):
    return [Params.from_json(json.dumps(piece["params"])) for piece in row["pieces"]]


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "build_report", lambda *_: Report(""))
        return run(files, tmp_path_factory.mktemp("runs") / "whole", copies=2, subtype="FLOAT")


def test_paths_and_lengths_are_kept_and_every_copy_has_its_own_draw(whole):
    rows = lines(whole.out)
    names = [f"audio/{name}_copy{copy}.wav" for name in sorted(FRAMES) for copy in (0, 1)]
    assert sorted(row["output"] for row in rows) == sorted(names)
    for row in rows:
        info = soundfile.info(whole.out / row["output"])
        assert (info.frames, info.samplerate) == (FRAMES[row["recording"]], RATE)
    assert len({row["pieces"][0]["params"]["1.snr_db"]["values"][0] for row in rows}) == 8
    assert whole.results["outputs"] == 8
    assert whole.results["hours"] == pytest.approx(2 * sum(FRAMES.values()) / RATE / 3600)
    held = json.loads((whole.out / "results.json").read_text())
    assert sum(held["effects"]["1 pitch"]["parameters"]["cents"]["counts"]) == 8
    assert not list(whole.out.glob("*.ckpt"))


def test_a_file_is_what_its_line_and_the_methods_make(whole, files):
    names = ["long", "short"]
    bank = [read_audio(files / "noise" / f"{name}.wav") for name in names]
    chain = from_text("pitch,noise[dir=x],reverb", RATE, lambda _: bank)
    for row in lines(whole.out):
        x = read_audio(files / "speech" / f"{row['recording']}.wav")
        (params,) = drawn(row)
        y = read_audio(whole.out / row["output"])
        torch.testing.assert_close(y, chain(x, params=params), atol=1e-6, rtol=0)
        assert row["pieces"][0]["noise"] == {"1": names[int(params.values["1.clip"])]}


def test_a_draw_depends_on_seed_name_and_copy_alone(whole, files, tmp_path):
    fewer = run(files, tmp_path / "a", source="speech/bob/**/*.wav", subtype="FLOAT", copies=2)
    small = run(files, tmp_path / "b", batch_seconds=1, subtype="FLOAT", copies=2)
    other = run(files, tmp_path / "c", subtype="FLOAT", copies=2, seed=1)
    before = {row["output"].replace("bob/", "", 1): row for row in lines(whole.out)}
    for row in lines(fewer.out):
        assert row["pieces"][0]["params"] != before[row["output"]]["pieces"][0]["params"]
    before = {row["output"]: row for row in lines(whole.out)}
    for row in lines(small.out):
        assert row["pieces"] == before[row["output"]]["pieces"]
        old, new = (read_audio(out / row["output"]) for out in (whole.out, small.out))
        torch.testing.assert_close(old, new, atol=1e-6, rtol=0)
    for row in lines(other.out):
        assert row["pieces"][0]["params"] != before[row["output"]]["pieces"][0]["params"]


def test_other_recordings_beside_it_change_nothing(whole, files, tmp_path):
    fewer = tmp_path / "speech"
    shutil.copytree(files / "speech" / "bob", fewer / "bob")
    part = augment(
        str(fewer), out=tmp_path / "run", noise=str(files / "noise"), copies=1, subtype="FLOAT"
    )
    before = {row["output"]: row for row in lines(whole.out)}
    for row in lines(part.out):
        twin = row["output"].replace(".wav", "_copy0.wav")
        assert row["pieces"] == before[twin]["pieces"]
        old, new = read_audio(whole.out / twin), read_audio(part.out / row["output"])
        torch.testing.assert_close(old, new, atol=1e-6, rtol=0)


def test_shares_make_the_bytes_of_the_whole(whole, files, tmp_path):
    found, rows = {}, []
    for rank in (0, 1):
        share = run(files, tmp_path / "run", copies=2, subtype="FLOAT", rank=rank, world_size=2)
        assert share.out == tmp_path / f"run-{rank}-of-2"
        found |= sounds(share.out)
        rows += lines(share.out)
        assert 0 < share.results["outputs"] < 8
    assert found == sounds(whole.out)
    assert sorted(map(json.dumps, rows)) == sorted(map(json.dumps, lines(whole.out)))


def test_an_interrupted_run_goes_on_to_the_same_bytes(whole, files, tmp_path, monkeypatch):
    calls, real = [], augment_batches.write_wav

    def write_or_stop(*args, **options):
        calls.append(args[0])
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(augment_batches, "write_wav", write_or_stop)
    options = {"copies": 2, "subtype": "FLOAT"}
    with pytest.raises(KeyboardInterrupt):
        run(files, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    finished = len(list((tmp_path / "run.partial").glob("*.ckpt")))
    assert finished
    calls.clear()
    again = run(files, tmp_path / "run", resume=True, **options)
    assert 0 < len(calls) <= 7
    assert len(calls) < 8
    assert sounds(again.out) == sounds(whole.out)
    assert (again.out / "params.jsonl").read_bytes() == (whole.out / "params.jsonl").read_bytes()


def test_resuming_writes_what_is_missing_and_refuses_other_recordings(files, tmp_path, monkeypatch):
    source = tmp_path / "speech"
    shutil.copytree(files / "speech", source)
    options = {"chain": "speed[0.7:0.9],reverb", "batch_seconds": 1.0, "subtype": "FLOAT"}
    whole = augment(str(source), out=tmp_path / "whole", **options)
    real, calls = augment_batches.write_wav, []

    def write_or_stop(*args, **given):
        calls.append(args[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **given)

    monkeypatch.setattr(augment_batches, "write_wav", write_or_stop)
    with pytest.raises(KeyboardInterrupt):
        augment(str(source), out=tmp_path / "run", **options)
    calls[0].unlink()
    (source / "ann" / "one.wav").rename(source / "ann" / "none.wav")
    with pytest.raises(InputError, match="was begun with other recordings"):
        augment(str(source), out=tmp_path / "run", resume=True, **options)
    (source / "ann" / "none.wav").rename(source / "ann" / "one.wav")
    again = augment(str(source), out=tmp_path / "run", resume=True, **options)
    assert sounds(again.out) == sounds(whole.out)


def test_params_replay_to_the_same_bytes(whole, files, tmp_path):
    old = whole.out / "params.jsonl"
    again = run(files, tmp_path / "all", replay=old, subtype="FLOAT")
    assert sounds(again.out) == sounds(whole.out)
    assert (again.out / "params.jsonl").read_bytes() == old.read_bytes()
    some = tmp_path / "some.jsonl"
    some.write_text("".join(line + "\n" for line in old.read_text().splitlines()[2:4]))
    part = run(files, tmp_path / "part", replay=some, subtype="FLOAT")
    for path in sounds(part.out):
        new, kept = read_audio(part.out / path), read_audio(whole.out / path)
        torch.testing.assert_close(new, kept, atol=1e-6, rtol=0)
    assert part.results["outputs"] == 2


def test_replay_refuses_what_it_was_not_drawn_for(whole, files, tmp_path):
    old = whole.out / "params.jsonl"
    one = tmp_path / "one.jsonl"
    row = lines(whole.out)[0]

    def refused(words, **change):
        one.write_text(json.dumps(row | change) + "\n")
        with pytest.raises(InputError, match=words):
            run(files, tmp_path / "run", replay=one)
        assert [p.name for p in tmp_path.iterdir()] == ["one.jsonl"]

    refused("no recording 'x'", recording="x")
    one.write_text(2 * (json.dumps(row) + "\n"))
    with pytest.raises(InputError, match="one_copy0 twice"):
        run(files, tmp_path / "run", replay=one)
    refused("names no file", output="audio/../../x.wav")
    refused("no line of a params", output="/etc/x.wav")
    refused("not those of its chain", chain="drop")
    piece = row["pieces"][0]
    refused("give the same recording", pieces=[piece | {"stop": 9}])
    refused("give the noise of that run", pieces=[piece | {"noise": {"1": "x"}}])
    with pytest.raises(InputError, match="leave --copies out"):
        run(files, tmp_path / "run", replay=old, copies=2)
    with pytest.raises(InputError, match=r"cannot be read"):
        run(files, tmp_path / "run", replay=tmp_path / "none.jsonl")


def test_each_keeps_its_rate_and_its_channels(files, tmp_path):
    source = tmp_path / "mixed"
    left, right = voice(3000, 1, 16_000), voice(3000, 2, 16_000)
    write(source / "stereo.wav", np.stack([left, right], 1), 16_000)
    write(source / "same.wav", np.stack([left, left], 1), 16_000)
    write(source / "slow.flac", voice(2000, 3))
    chain = "pitch,noise,clip"
    made = augment(str(source), out=tmp_path / "run", chain=chain, noise=str(files / "noise"))
    assert soundfile.info(made.out / "audio/slow.wav").samplerate == RATE
    for name in ("stereo", "same"):
        info = soundfile.info(made.out / f"audio/{name}.wav")
        assert (info.samplerate, info.channels, info.frames) == (16_000, 2, 3000)
    same = read_audio(made.out / "audio/same.wav", mono=True)
    twin, _ = soundfile.read(made.out / "audio/same.wav", dtype="float32")
    assert np.array_equal(twin[:, 0], twin[:, 1])
    assert same.abs().max() > 0.05
    said = " ".join(made.results["remarks"])
    assert "2 recordings of 8,000 Hz are resampled to 16,000 Hz" in said  # the noise
    assert "the channels of 2 recordings are all kept" in said


def test_all_are_brought_to_one_rate_and_that_is_said(files, tmp_path, capsys):
    made = run(files, tmp_path / "run", source="other", chain="reverb", sample_rate=RATE)
    info = soundfile.info(made.out / "audio/fast.wav")
    assert (info.samplerate, info.frames) == (RATE, 15_000)
    assert "1 recording of 16,000 Hz is resampled to 8,000 Hz" in capsys.readouterr().err
    flac = run(files, tmp_path / "flac", chain="reverb", format="flac", subtype="PCM_24")
    assert soundfile.info(flac.out / "audio/ann/one.flac").subtype == "PCM_24"


def test_noise_is_as_loud_as_its_line_says(files, tmp_path):
    made = run(
        files, tmp_path / "run", chain="noise[0:20]", noise=str(files / "noise"), subtype="FLOAT"
    )
    for row in lines(made.out):
        x = read_audio(files / "speech" / f"{row['recording']}.wav").double()
        rest = read_audio(made.out / row["output"]).double() - x
        measured = 10 * math.log10(x.square().sum() / rest.square().sum())
        assert measured == pytest.approx(
            row["pieces"][0]["params"]["0.snr_db"]["values"][0], abs=0.01
        )
        assert measured == pytest.approx(row["pieces"][0]["snr_db"]["0"], abs=0.01)
    looped = {r["output"] for r in lines(made.out) if r["pieces"][0]["noise"]["0"] == "short"}
    assert {row["output"] for row in lines(made.out) if row["noise_looped"]} == looped
    assert made.results["outputs_with_looped_noise"] == len(looped) > 0
    assert any(f"starts over in {len(looped)} " in r for r in made.results["remarks"])


@pytest.mark.parametrize("overflow", ["clip", "lower", "float"])
def test_what_goes_beyond_full_scale_is_counted_and_said(overflow, tmp_path, capsys):
    loud = voice(4000, 1)
    write(tmp_path / "loud" / "a.wav", loud / np.abs(loud).max())
    write(tmp_path / "loud" / "b.wav", loud)
    options = {"subtype": "FLOAT"} if overflow == "float" else {"overflow": overflow}
    made = augment(
        str(tmp_path / "loud"),
        out=tmp_path / "run",
        chain="reverb[100,reverberance=100,wet=10]",
        **options,
    )
    y, _ = soundfile.read(made.out / "audio/a.wav")
    results, (row, _) = made.results, lines(made.out)
    said = capsys.readouterr().err
    assert results["outputs_beyond_full_scale"] == 1
    assert results["inputs_at_full_scale"] == 1
    assert "1 of 2 recordings was at full scale already, perhaps clipped" in said
    assert "1 of 2 outputs went beyond full scale" in said
    if overflow == "clip":
        assert results["samples_cut_off"] == results["samples_beyond_full_scale"] > 0
        assert (np.abs(y) > 1 - 2**-14).sum() >= results["samples_cut_off"]
        assert f": {counted(results['samples_cut_off'], 'sample')} w" in said
    elif overflow == "lower":
        assert results["samples_cut_off"] == 0
        assert np.abs(y).max() == pytest.approx(1, abs=2**-14)
        assert row["gain_db"] < -0.1
        assert f"by up to {-row['gain_db']:.1f} dB" in said
    else:
        assert np.abs(y).max() > 1.01
        assert results["samples_cut_off"] == 0
        assert "which floats keep" in said


def test_lowered_recordings_end_at_the_largest_sample_of_16_bits(tmp_path):
    loud = write(tmp_path / "loud.wav", voice(4000, 1) / np.abs(voice(4000, 1)).max())
    made = augment(
        str(loud), out=tmp_path / "run", chain="gain[6]", overflow="lower", subtype="PCM_24"
    )
    y, _ = soundfile.read(made.out / "audio/loud.wav")
    assert np.abs(y).max() == pytest.approx(1 - 2**-15, abs=2**-23)


def test_long_recordings_are_joined_without_a_seam(files, tmp_path):
    source = write(tmp_path / "long.wav", voice(37_123, 2), subtype="FLOAT")
    options = {"piece_seconds": 1.0, "subtype": "FLOAT", "batch_seconds": 1.0}
    idle = augment(str(source), out=tmp_path / "idle", chain="pitch[p=0]", **options)
    y = read_audio(idle.out / "audio/long.wav")
    torch.testing.assert_close(y, read_audio(source), atol=1e-7, rtol=0)
    moved = augment(str(source), out=tmp_path / "moved", noise=str(files / "noise"), **options)
    (row,) = lines(moved.out)
    assert row["frames"] == 37_123
    assert len(row["pieces"]) == 5
    assert len({piece["params"]["0.cents"]["values"][0] for piece in row["pieces"]}) == 5
    assert any(
        "1 recording of more than 1 s: augmented in pieces" in r for r in moved.results["remarks"]
    )
    again = augment(
        str(source),
        out=tmp_path / "b",
        noise=str(files / "noise"),
        **options | {"batch_seconds": 9},
    )
    old, new = (read_audio(r.out / "audio/long.wav") for r in (moved, again))
    torch.testing.assert_close(old, new, atol=1e-6, rtol=0)


def test_pieces_cover_a_recording_and_overlap_by_the_fade():
    for frames in (1, 7999, 8000, 8001, 100_000):
        pieces = cut(frames, RATE, 1.0)
        assert pieces[0][0] == 0
        assert pieces[-1][1] == frames
        assert all(a[1] - b[0] == 160 for a, b in itertools.pairwise(pieces))
        assert max(stop - start for start, stop in pieces) <= 8160
    assert cut(8000, RATE, 1.0) == [(0, 8000)]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_ones(name):
    bank = torch.randn(3, 500)
    text = from_text(chain_text(name, "x"), RATE, lambda _: bank, noise=GIVEN, always=True)
    recipe = from_recipe(name, RATE, bank, always=True)
    x = 0.1 * torch.randn(4, 1, 900)
    a, b = (c(x, generator=torch.Generator().manual_seed(0)) for c in (text, recipe))
    assert torch.equal(a, b)


def test_noise_folders_in_the_chain_are_opened_too(files, tmp_path):
    text = f"noise[20,dir={files / 'other'}], noise"
    made = run(files, tmp_path / "run", chain=text, noise=str(files / "noise"))
    for row in lines(made.out):
        assert row["pieces"][0]["noise"]["0"] == "fast"
        assert row["pieces"][0]["noise"]["1"] in ("long", "short")
    assert sum(r.startswith("noise in ") for r in made.results["remarks"]) == 2


def test_noise_that_rates_share_is_counted_once(files, tmp_path):
    source = tmp_path / "mixed"
    for rate in (RATE, 11_025, 16_000):
        write(source / f"{rate}.wav", voice(2000, 1, rate), rate)
    made = augment(str(source), out=tmp_path / "run", chain="noise", noise=str(files / "noise"))
    said = " ".join(r for r in made.results["remarks"] if r.startswith("noise in "))
    assert said.count("2 clips") == 1
    assert said.count("resampled to 11,025") == said.count("resampled to 16,000") == 1


def test_an_effect_in_the_noise_is_counted_where_the_noise_is_mixed_in(files, tmp_path):
    noise = str(files / "noise")
    made = run(files, tmp_path / "run", chain="noise[9,p=0.5,chain=[clip]]", noise=noise, copies=4)
    counts = {name: effect["applied"] for name, effect in made.results["effects"].items()}
    assert 0 < counts["1.1 clip"] == counts["1 noise"] < 16


def test_noise_goes_into_every_step_that_names_no_folder(files):
    noise, other = str(files / "noise"), str(files / "other")
    for given, places in {
        "noise": {"0": "noise"},
        "pitch, noise[5:15] ,drop[fill=noise]": {"1": "noise"},
        f"noise[dir={other}],oneof[[noise,clip]]": {"0": "other", "1.0": "noise"},
        f"noise[chain=[noise[dir={other}]]]": {"0.chain.0": "other", "0": "noise"},
        "noise[5,chain=[noise]]": {"0.chain.0": "noise", "0": "noise"},
    }.items():
        chains = Chains(noise, torch.device("cpu"))
        built = chains.build(chain_text(given, noise), RATE, show=False)
        names = {"noise": ["long", "short"], "other": ["fast"]}
        assert {p: bank.names for p, bank in built.banks.items()} == {
            place: names[name] for place, name in places.items()
        }


def test_chains_within_chains_are_measured_counted_and_replayed(files, tmp_path):
    noise = str(files / "noise")
    chain = f"someof[2,of=[noise[9,chain=[clip]],room[dir={noise}],pitch]]"
    made = run(files, tmp_path / "run", chain=chain, noise=noise, copies=5, subtype="FLOAT")
    effects = made.results["effects"]
    assert list(effects) == ["1.1.1 clip", "1.1 noise", "1.2 room", "1.3 pitch"]
    counts = {name: effect["applied"] for name, effect in effects.items()}
    assert counts["1.1.1 clip"] == counts["1.1 noise"] > 0
    assert counts["1.1 noise"] + counts["1.2 room"] + counts["1.3 pitch"] == 2 * 20
    assert (
        sum("0.0" in row["pieces"][0]["snr_db"] for row in lines(made.out)) == counts["1.1 noise"]
    )
    assert made.results["snr_db"]["largest_difference"] < 0.01
    for row in lines(made.out):
        for place in row["pieces"][0]["noise"]:
            assert row["pieces"][0]["params"][f"{place}.apply"]["values"] == [True]
    replay = tmp_path / "run" / "params.jsonl"
    again = run(files, tmp_path / "again", replay=replay, noise=noise, subtype="FLOAT")
    assert sounds(again.out) == sounds(made.out)


@pytest.mark.parametrize("factor", [1.25, 0.8])
def test_speed_ends_files_where_the_speech_ends(factor, files, tmp_path):
    made = run(files, tmp_path / "run", chain=f"speed[{factor}]", subtype="FLOAT", copies=2)
    for row in lines(made.out):
        old = FRAMES[row["recording"]]
        assert row["frames"] == math.floor(old / factor + 0.5)
        x = read_audio(files / "speech" / f"{row['recording']}.wav")
        y = read_audio(made.out / row["output"])
        torch.testing.assert_close(y, speed(x, factor)[0], atol=1e-6, rtol=0)
    assert "speed: files become longer or shorter, and words move" in made.results["remarks"]
    assert made.results["hours"] == pytest.approx(
        2 * sum(FRAMES.values()) / factor / RATE / 3600, rel=1e-3
    )
    shared = {}
    for rank in (0, 1):
        options = {"subtype": "FLOAT", "copies": 2, "rank": rank, "world_size": 2}
        shared |= sounds(run(files, tmp_path / "part", chain=f"speed[{factor}]", **options).out)
    assert shared == sounds(made.out)
    with pytest.raises(InputError, match=r"one\.wav: lasts longer than --piece-seconds 0\.3"):
        run(files, tmp_path / "no", chain="speed[1.25]", piece_seconds=0.3)
    again = run(files, tmp_path / "again", replay=made.out / "params.jsonl", subtype="FLOAT")
    assert sounds(again.out) == sounds(made.out)


def test_what_slows_down_is_kept_to_its_end_by_all_that_follows(files, tmp_path):
    noise = write(tmp_path / "noise.wav", np.ones(4000) * 0.1)
    chain = "oneof[[tempo[0.5],tempo[0.6]]],noise[0],swap[2,share=0.5],speed[0.9]"
    source = files / "speech/ann/one.wav"
    options = {"noise": str(noise), "copies": 4, "subtype": "FLOAT"}
    made = augment(str(source), out=tmp_path / "run", chain=chain, **options)
    frames = {math.floor(math.floor(2531 / f + 0.5) / 0.9 + 0.5) for f in (0.5, 0.6)}
    assert {row["frames"] for row in lines(made.out)} == frames
    for row in lines(made.out):
        assert row["noise_looped"]  # it is as long as the recording, and not as what it became
        (params,) = drawn(row)
        assert int(params.values["2.sizes"]) in (5062 // 2, 4218 // 2)
        length = torch.tensor([2531])
        room = Chain([RandomTempo(RATE, 0.5), RandomSpeed(0.9)]).most_samples(2531)
        whole = from_text(chain, RATE, lambda _: [torch.full((4000,), 0.1)], noise="x")
        x = functional.pad(read_audio(source), (0, room - 2531))
        y = whole(x, length, params=params)[: row["frames"]]
        torch.testing.assert_close(read_audio(made.out / row["output"]), y, atol=1e-6, rtol=0)
    del options["copies"]
    again = augment(
        str(source), out=tmp_path / "again", replay=made.out / "params.jsonl", **options
    )
    assert sounds(again.out) == sounds(made.out)


def test_recordings_of_a_few_samples_do_not_become_empty(tmp_path):
    for frames in (1, 2, 80):
        write(tmp_path / "short" / f"{frames}.wav", np.ones(frames) * 0.1)
    chain = "splice[1000],speed[10],tempo[9.9]"
    made = augment(str(tmp_path / "short"), out=tmp_path / "run", chain=chain)
    assert {row["frames"] for row in lines(made.out)} == {1}


def test_silence_stays_silence(files, tmp_path):
    write(tmp_path / "mute" / "a.wav", np.zeros(1500))
    made = augment(
        str(tmp_path / "mute"), out=tmp_path / "run", noise=str(files / "noise"), chain=CPC2
    )
    assert not read_audio(made.out / "audio/a.wav").any()
    assert made.results["snr_db"] is None
    assert "1 silent recording: no noise" in " ".join(made.results["remarks"])


def test_the_report_shows_plays_and_escapes(files, tmp_path):
    source = tmp_path / "<b>speech"
    for k in range(7):
        write(source / f"<i>{k}.wav", voice(2000 + k, k))
    noise = str(files / "noise")
    made = augment(str(source), out=tmp_path / "run", noise=noise, chain=f"{CPC2},drop,bandreject")
    page = (made.out / "report.html").read_text()
    assert page.count("<audio controls") == 10
    assert page.count('src="data:audio/wav;base64,') == 10
    assert "img-src data:; media-src data:" in page
    assert not re.search("<b>speech|<i>", page)
    assert "&lt;i&gt;0" in page
    for words in ("shift", "room size", "dB reached", "ms from", "Signal-to-noise"):
        assert words in page


def refused(words, tmp_path, source, **options):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=words) as error:
        augment(str(source), out=tmp_path / "run", **options)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_recordings_are_refused(files, tmp_path):
    refused("no such file", tmp_path, tmp_path / "none", chain="reverb")
    refused("no recordings", tmp_path, files / "empty", chain="reverb")
    empty = tmp_path / "empty.wav"
    empty.write_bytes(b"")
    refused("empty.wav is an empty file", tmp_path, empty, chain="reverb")
    text = tmp_path / "text.wav"
    text.write_text("no sound" * 9)
    refused("text.wav cannot be read", tmp_path, text, chain="reverb")
    short = tmp_path / "short.wav"
    short.write_bytes((files / "speech/ann/one.wav").read_bytes()[:-99])
    refused("short.wav is cut off", tmp_path, short, chain="reverb")
    nan = voice(2000, 1)
    nan[7] = np.nan
    broken = write(tmp_path / "nan.wav", nan, subtype="FLOAT")
    refused("nan.wav holds NaN", tmp_path, broken, chain="reverb")
    three = write(tmp_path / "three.wav", np.zeros((900, 3)))
    refused("three.wav: wave has 3 channels", tmp_path, three, chain="reverb")


def test_broken_recordings_are_left_out_counted_and_named(files, tmp_path, capsys):
    source = tmp_path / "speech"
    shutil.copytree(files / "speech", source)
    (source / "ann" / "empty.wav").write_bytes(b"")
    nan = voice(2000, 1)
    nan[7] = np.nan
    write(source / "bob" / "nan.wav", nan, subtype="FLOAT")
    refused("empty.wav is an empty file", tmp_path, source, chain="reverb")
    options = {"copies": 2, "skip_broken": True, "subtype": "FLOAT"}
    made = augment(str(source), out=tmp_path / "run", chain="reverb,drop", **options)
    assert sorted(made.results["broken"]) == ["ann/empty", "bob/nan"]
    assert "holds NaN" in made.results["broken"]["bob/nan"]
    assert "2 unreadable recordings left out, the first: recording" in capsys.readouterr().err
    assert {row["recording"] for row in lines(made.out)} == set(FRAMES)
    assert made.results["outputs"] == len(sounds(made.out)) == 8
    clean = run(files, tmp_path / "clean", chain="reverb,drop", copies=2, subtype="FLOAT")
    assert sounds(made.out) == sounds(clean.out)
    lines_before = made.out / "params.jsonl"
    (source / "ann" / "one.wav").write_bytes(b"")
    again = augment(
        str(source), out=tmp_path / "b", replay=lines_before, skip_broken=True, subtype="FLOAT"
    )
    assert again.results["outputs"] == 6
    only = str(source / "ann" / "[eo]*.wav")
    for copies in (made, again):
        shutil.rmtree(copies.out)
    refused("none of 2 recordings is whole", tmp_path, only, chain="clip", skip_broken=True)


def test_bad_chains_are_refused_and_pointed_at(files, tmp_path):
    speech = files / "speech"
    for chain, words in {
        "revreb": "column 1: 'revreb' is no effect",
        "pitch,reverb[room=0:200]": "column 19: reverb: room 0:200 lies outside",
        "pitch[a]": "column 7: 'a' is no number",
        "pitch,noise": "say where it lies with --noise",
        "cpc2": "say where it lies with --noise",
        "": "an effect must stand here",
        " ": "an effect must stand here",
        "pitch]": "column 6: this bracket closes nothing",
        "bandreject,pitch[1": "column 17: this bracket is never closed",
        "babble": "take noise.dir=FOLDER",
    }.items():
        refused(words, tmp_path, speech, chain=chain)
    refused("say where it lies with --noise", tmp_path, speech)
    refused("no step of --chain reverb takes it", tmp_path, speech, chain="reverb", noise="x")


def test_bad_noise_is_refused(files, tmp_path):
    speech = files / "speech"
    refused("noise: .*no recordings", tmp_path, speech, noise=str(files / "empty"))
    refused("noise: .*no such file", tmp_path, speech, noise=str(tmp_path / "none"))
    (tmp_path / "text.wav").write_text("no sound" * 9)
    refused("noise: .*text.wav cannot be read", tmp_path, speech, noise=str(tmp_path / "text.wav"))


def test_bad_options_are_refused(files, tmp_path, monkeypatch):
    speech = files / "speech"
    for options, words in [
        ({"copies": 0}, "--copies 0"),
        ({"batch_seconds": 0.0}, "--batch-seconds 0"),
        ({"sample_rate": 3}, "--sample-rate 3"),
        ({"subtype": "FLOAT", "format": "flac"}, "--subtype FLOAT: .flac holds one of PCM_S8"),
        ({"rank": 0}, "give both, or neither"),
        ({"rank": 2, "world_size": 2}, "must be 0 to 1"),
        ({"rank": 98, "world_size": 99}, "less work"),
        ({"resume": True}, "no interrupted run"),
    ]:
        refused(words, tmp_path, speech, chain="reverb", **options)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("--device cuda: there is none", tmp_path, speech, chain="reverb", device="cuda")
    (tmp_path / "run").mkdir()
    refused("already exists", tmp_path, speech, chain="reverb")


def test_the_command_line_refuses_in_one_line(files, tmp_path, capsys):
    speech, out = str(files / "speech"), str(tmp_path / "run")
    for words in (
        ["speech", "augment", speech, "--chain", "pitch[1", "--out", out],
        ["speech", "augment", str(files / "empty"), "--chain", "reverb", "--out", out],
    ):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("remanence: ")
        assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_torchrun_writes_the_same_bytes_into_one_folder(whole, files, tmp_path):
    code = (
        "import sys; from pathlib import Path;"
        "from remanence.jobs.speech.augment import augment;"
        "augment(sys.argv[1], out=Path(sys.argv[2]), noise=sys.argv[3], copies=2, subtype='FLOAT')"
    )
    script = tmp_path / "go.py"
    script.write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = map(str, [script, files / "speech", tmp_path / "run", files / "noise"])
    subprocess.run([*torchrun, *words], check=True, timeout=300)
    assert sounds(tmp_path / "run") == sounds(whole.out)
    assert lines(tmp_path / "run") == lines(whole.out)
