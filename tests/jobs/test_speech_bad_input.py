"""What is wrong with recordings, chains, features or items is said in one line, by any command."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from remanence.cli import main

RATE = 8000
NAMES = r"(?P<phone>.)_(?P<speaker>[a-z]+)_"
QUICK = (
    "--preset", "small", "--max-steps", "1", "--batch-size", "2", "--window", "0.3",
    "--augment", "none",
)  # fmt: skip


def voice(frames, seed):
    time = np.arange(frames) / RATE
    tone = sum(np.sin(2 * np.pi * (100 + 20 * seed) * k * time) / k for k in range(1, 9))
    return 0.1 * tone * np.sin(np.pi * np.arange(frames) / frames)


def write(path, wave, rate=RATE, subtype="PCM_16"):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, subtype=subtype)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders of recordings, each with one fault, and of features."""
    root = tmp_path_factory.mktemp("bad")
    for take in range(6):
        write(root / f"good/s{take % 2}/{take}.wav", voice(3000 + 50 * take, take))
    nan = voice(3000, 1)
    nan[100] = np.nan
    for fault in ("nan", "stereo", "clipped", "silent", "fast"):
        for take in range(2):
            write(root / fault / "s0" / f"ok{take}.wav", voice(3000, take))
    write(root / "nan/s0/a.wav", nan, subtype="FLOAT")
    write(root / "stereo/s0/a.wav", np.stack([voice(3000, 1), voice(3000, 2)], 1))
    write(root / "clipped/s0/a.wav", np.clip(30 * voice(3000, 1), -1, 1))
    write(root / "silent/s0/a.wav", np.zeros(3000))
    write(root / "fast/s0/a.wav", voice(6000, 1), 2 * RATE)
    cut = write(root / "cut/s0/a.wav", voice(3000, 1))
    cut.write_bytes(cut.read_bytes()[:2000])
    for folder in ("text", "nothing", "empty"):
        (root / folder).mkdir()
    (root / "text" / "a.wav").write_text("no sound\n")
    (root / "nothing" / "a.wav").write_bytes(b"")
    write(root / "hiss/long.wav", 0.1 * np.random.default_rng(0).normal(size=9000), 11025)
    write(root / "short/a.wav", 0.1 * np.random.default_rng(0).normal(size=300))
    write(root / "bare/a.wav", voice(3000, 1))
    rng = np.random.default_rng(1)
    for kind in ("ok", "nan", "flat", "whole", "wide"):
        (root / "features" / kind).mkdir(parents=True)
        for speaker in ("ann", "bob"):
            for phone in "ab":
                for take in range(2):
                    x = rng.normal(size=(20, 4)).astype("f4") + (phone == "a")
                    if kind == "nan" and take:
                        x[3, 2] = np.nan
                    x = {"flat": x[:, 0], "whole": (x > 0).astype("i4")}.get(kind, x)
                    x = x[..., : 3 if kind == "wide" and take else 20]
                    np.save(root / "features" / kind / f"{phone}_{speaker}_{take}.npy", x)
    (root / "features" / "mixed").mkdir()
    np.savez(root / "features/mixed/a_ann_0", features=np.ones((4, 2)), times=np.arange(4.0))
    np.save(root / "features/mixed/b_ann_0", np.ones((4, 2)))
    rows = [(f"{p}_{s}_{t}", p, s) for s in ("ann", "bob") for p in "ab" for t in range(2)]
    for name, onset, offset, others in (
        ("good", 0, 0.2, []),
        ("outside", 0, 3, []),
        ("backward", 0.1, 0.05, []),
        ("missing", 0, 0.2, [("zz", "a", "ann")]),
        ("alone", 0, 0.2, None),
        ("apart", 0, 0.2, []),
        ("brief", 0, 0.004, []),
    ):
        lines = [f"{file} {onset} {offset} {phone} {file if name == 'apart' else 'x'} y "
                 f"{'ann' if others is None else speaker}"
                 for file, phone, speaker in [*rows, *(others or [])]]  # fmt: skip
        (root / f"{name}.item").write_text("\n".join(["#header", *lines]) + "\n")
    (root / "one.txt").write_text("".join(f"{file} {'a ' * 20}\n" for file, _, _ in rows))
    (root / "there").mkdir()
    return root


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


def refused(capsys, *words):
    """Run a command that must refuse; return what it says."""
    before = sorted(Path().iterdir())
    assert main(["speech", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("remanence: ") for line in lines].count(True) == 1
    assert lines[-1].startswith("remanence: ")
    assert sorted(Path().iterdir()) == before  # nothing half-written
    return lines[-1]


READERS = {
    "augment": ("augment", "{}", "--chain", "reverb"),
    "noise": ("augment", "good", "--noise", "{}"),
    "cpc": ("cpc", "{}", *QUICK),
    "valid": ("cpc", "good", "--valid", "{}", *QUICK),
    "extract": ("extract", "{}", "--model", "mfcc"),
    "probe": ("probe", "mfcc", "--audio", "{}", "--target", "speaker"),
    "abx": ("abx", "mfcc", "--audio", "{}", "--names", "(?P<speaker>.+)/(?P<phone>.)"),
}


@pytest.mark.parametrize("reader", READERS)
def test_broken_recordings_are_named(reader, capsys):
    for fault, words in {
        "nothing": "a.wav is an empty file",
        "empty": "empty holds no recordings",
        "cut": "a.wav is cut off",
        "text": "a.wav cannot be read: Format not recognised; is it a recording?",
        "nan": "a.wav holds NaN or infinite samples, the first at 0.013 s",
        "nowhere": "nowhere: there is no such file or folder",
    }.items():
        if fault == "nan" and reader in ("probe", "abx"):
            continue  # one speaker: refused before a sample is read
        given = (word.format(fault) for word in READERS[reader])
        assert words in refused(capsys, *given, "--out", "out")


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        ("pitch,revreb", "column 7: 'revreb' is no effect"),
        ("pitch,reverb[room=0:101]", "column 19: reverb: room 0:101 lies outside 0..100"),
        ("pitch[-300:300", "column 6: this bracket is never closed"),
        ("pitch]", "column 6: this bracket closes nothing"),
        ("pitch[1]]", "column 9: this bracket closes nothing"),
        ("pitch,,clip", "column 7: an effect must stand here"),
        ("drop[nan]", "column 6: drop: ms nan"),
        ("clip[x]", "column 6: 'x' is no number"),
        ("noise", "say where it lies with --noise"),
        ("", "column 1: an effect must stand here"),
    ],
)
@pytest.mark.parametrize("command", ["augment", "cpc"])
def test_a_wrong_chain_is_pointed_at_before_anything_is_read(command, chain, words, capsys):
    # `empty` would be refused if it were opened.
    assert words in refused(capsys, command, "empty", "--chain", chain, "--out", "out")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("cpc bare --out out", "no telling who speaks in 'a'"),
        ("cpc good --names zz(?P<speaker>.) --out out", "does not match 'zz(?P<speaker>.)'"),
        ("cpc good --names (?P<speaker> --out out", "is no regular expression"),
        ("cpc good --names s --out out", "no named group"),
        ("probe features/ok --names (?P<speaker>.) --out out", "(?P<phone>...)"),
        ("abx features/ok --names (?P<phone>z) --out out", "no name matches"),
        ("augment good --chain reverb --out there", "there: already exists"),
        ("cpc good --out there", "there: already exists"),
        ("extract good --model mfcc --out there", "there: already exists"),
        (f"probe features/ok --names {NAMES} --out there", "there: already exists"),
        (f"abx features/ok --names {NAMES} --out there", "there: already exists"),
        ("augment good --chain reverb --resume --out out", "no interrupted run"),
        ("cpc good --resume --out out", "no interrupted run"),
        ("extract good --model mfcc --resume --out out", "no interrupted run"),
        ("extract good --model nobody --out out", "neither mfcc nor a CPC run"),
        ("extract good --model mfcc --layer 1 --out out", "are for CPC networks"),
        ("augment good --chain reverb --copies 0 --out out", "--copies 0: must be at least 1"),
        (f"abx features/nan --names {NAMES} --out out", "hold NaN or infinity"),
        (f"abx features/flat --names {NAMES} --out out", "have shape (20,)"),
        (f"abx features/wide --names {NAMES} --out out", "use one encoder for all"),
        (f"abx features/mixed --names {NAMES} --out out", "holds times and b_ann_0.npy none"),
        (f"probe features/mixed --names {NAMES} --out out", "holds times and b_ann_0.npy none"),
        (f"abx features/whole --names {NAMES} --out out", "floats, or use --distance identical"),
        (f"abx features/ok --names {NAMES} --distance kl --out out", "are no probabilities"),
        ("abx features/none --items good.item --out out", "no such folder of features"),
        ("abx features/ok --items nowhere.item --out out", "nowhere.item cannot be read"),
        ("abx features/ok --items outside.item --out out", "frames: check --frame-rate and item"),
        ("abx features/ok --items backward.item --out out", "ends before it begins"),
        ("abx features/ok --items missing.item --out out", "no features of 'zz'"),
        ("abx features/ok --items alone.item --speaker across --out out", "--speaker within alone"),
        ("abx features/ok --items apart.item --out out", "or take --context any"),
        ("abx features/ok --items brief.item --drop-empty --out out", "check --frame-rate against"),
        ("abx features/ok --items good.item --frame-rate nan --out out", "--frame-rate nan"),
        (f"probe features/nan --names {NAMES} --out out", "hold NaN or infinity"),
        (f"probe features/flat --names {NAMES} --out out", "have shape (20,)"),
        (f"probe features/whole --names {NAMES} --out out", "are integers"),
        ("probe features/ok --labels one.txt --out out", "labels name 1 class"),
        ("probe features/ok --labels outside.item --out out", "check --frame-rate and item"),
        (f"probe features/ok --names {NAMES} --test-names zzz --out out", "takes 0 of 8"),
    ],
)
def test_other_bad_input(words, said, capsys):
    assert said in refused(capsys, *words.split())


@pytest.mark.parametrize("command", ["augment", "extract", "probe", "abx"])
def test_a_gpu_that_is_not_there(command, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = {
        "augment": "good --chain reverb",
        "extract": "good --model mfcc",
        "probe": f"features/ok --names {NAMES}",
        "abx": f"features/ok --names {NAMES}",
    }[command]
    said = refused(capsys, command, *words.split(), "--device", "cuda", "--out", "out")
    assert "--device cuda: there is none here; take cpu" in said


STEREO, FAST = "the channels of 1 recording are", "1 recording of 16,000 Hz is resampled to 8,000"
CLIPPED, SILENT = "at full scale", "1 silent recording"


@pytest.mark.parametrize(
    ("command", "source", "words"),
    [
        ("augment --chain reverb --device cpu", "stereo", f"{STEREO} all kept"),
        ("augment --chain reverb --sample-rate 8000", "fast", FAST),
        ("augment --chain reverb", "clipped", f"1 of 3 recordings was {CLIPPED} already"),
        ("augment --chain reverb", "silent", SILENT),
        ("augment --chain noise --noise short", "good", "starts over in 6 outputs"),
        ("augment --chain noise --noise hiss", "good", "1 recording of 11,025 Hz is resampled to"),
        ("cpc " + " ".join(QUICK), "stereo", f"{STEREO} averaged"),
        ("cpc --sample-rate 8000 " + " ".join(QUICK), "fast", FAST),
        ("cpc " + " ".join(QUICK), "clipped", f"1 recording is {CLIPPED}"),
        ("cpc " + " ".join(QUICK), "silent", "1 recording is silent"),
        ("extract --model mfcc", "stereo", f"{STEREO} averaged"),
        ("extract --model mfcc --sample-rate 8000", "fast", FAST),
        ("extract --model mfcc", "clipped", f"1 recording is {CLIPPED}"),
        ("extract --model mfcc", "silent", "1 recording is silent"),
    ],
)
def test_what_is_done_to_recordings_is_said(command, source, words, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("remanence.kit.report.Report.figure", lambda *_: None)  # drawing is slow
    monkeypatch.setattr("remanence.jobs.speech.augment_report._example", lambda *_: None)
    name, *options = command.split()
    assert main(["speech", name, source, *options, "--out", str(tmp_path / "run")]) == 0
    assert words in capsys.readouterr().err
    page = (tmp_path / "run" / "report.html").read_text()
    assert words[1:] in page
