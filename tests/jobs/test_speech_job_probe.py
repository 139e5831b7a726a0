import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from remanence.errors import InputError
from remanence.jobs.speech import probe as probe_module
from remanence.jobs.speech import probe_fit
from remanence.jobs.speech.features import open_features
from remanence.jobs.speech.probe import probe
from remanence.jobs.speech.probe_labels import open_labels

PHONES, SPEAKERS = ("aa", "b", "k", "sil"), ("ann", "bob", "cid", "dee")
NAMES = r"(?P<speaker>[a-z]+)_(?P<phone>[a-z]+)_"
# Real recordings, where they lie beside the repository.
DIGITS = Path(__file__).parents[3] / "shared" / "data" / "spoken_digits" / "recordings"


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Utterances of four runs of phones, each a direction of four; two others are of the voice."""
    folder = tmp_path_factory.mktemp("speech")
    (folder / "features").mkdir()
    rng = np.random.default_rng(0)
    lines, items, sequences = [], ["#file onset offset #phone prev-phone next-phone speaker"], []
    for i in range(40):
        speaker = i % 4
        order = rng.permutation(4)
        phones = np.repeat(order, rng.integers(10, 20, size=4))
        x = 0.3 * rng.normal(size=(len(phones), 7))
        x[np.arange(len(phones)), phones] += 1
        x[:, 4:6] += 10 + np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])[speaker]
        x[:, 6] = 4.0
        name = f"{SPEAKERS[speaker]}/u{i:02d}"
        (folder / "features" / SPEAKERS[speaker]).mkdir(exist_ok=True)
        np.save(folder / "features" / f"{name}.npy", x.astype("f4"))
        lines.append(" ".join([name, *(PHONES[p] for p in phones)]))
        ends = np.flatnonzero(np.diff(phones, append=-1)) + 1
        for begin, end in zip([0, *ends[:-1]], ends, strict=True):
            if PHONES[phones[begin]] != "sil":
                items.append(f"{name} {begin / 100} {end / 100} {PHONES[phones[begin]]} _ _ x")
        sequences.append(" ".join([name, *(PHONES[p] for p in order if PHONES[p] != "sil")]))
    for file, rows in {"frames": lines, "items": items, "sequences": sequences}.items():
        (folder / f"{file}.txt").write_text("\n".join(rows) + "\n")
    return folder


def run(speech, tmp_path, **options):
    given = {"labels": speech / "frames.txt"} | options
    return probe(str(speech / "features"), out=tmp_path / "run", **given).results


@pytest.mark.parametrize("method", ["ridge", "logistic", "linear"])
def test_phones_by_labels_of_frames(speech, tmp_path, method):
    more = {"epochs": 60, "lr": 0.01} if method == "linear" else {}
    results = run(speech, tmp_path, method=method, **more)
    low, high = results["interval"]
    # The direction of largest value is right about 99 times in 100 with this noise.
    assert low <= results["accuracy"] <= high
    assert results["accuracy"] > 0.95
    assert results["chance"] < 0.4
    assert (results["train_utterances"], results["test_utterances"]) == (32, 8)
    assert results["counted"] == "frames"
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    rows = (tmp_path / "run" / "predictions.txt").read_text().splitlines()
    truth = dict(line.split(" ", 1) for line in (speech / "frames.txt").read_text().splitlines())
    pairs = [
        pair
        for row in rows
        for pair in zip(row.split()[1:], truth[row.split()[0]].split(), strict=True)
    ]
    assert len(pairs) == results["test_labels"]
    assert sum(a == b for a, b in pairs) / len(pairs) == pytest.approx(results["accuracy"])
    report = (tmp_path / "run" / "report.html").read_text()
    assert report.count("<svg") == (2 if method == "linear" else 1)


def test_items_say_the_same_as_labels_of_frames(speech, tmp_path):
    features = open_features(str(speech / "features"))
    by_frame = open_labels(features, speech / "frames.txt", None, "phone", "phones")
    by_item = open_labels(features, speech / "items.txt", None, "phone", "phones")
    for name in features:
        count = len(features[name])
        a, b = (
            labels.of_frames(name, count, features.when([name])) for labels in (by_frame, by_item)
        )
        silent = a == by_frame.classes.index("sil")
        assert (b[silent] == -1).all()
        assert (a[~silent] == b[~silent]).all()
    results = run(speech, tmp_path, labels=speech / "items.txt")
    assert results["classes"] == 3
    assert results["accuracy"] > 0.95
    assert results["remarks"] == []
    slow = open_features(str(speech / "features"), frame_rate=40.0)
    open_labels(slow, speech / "items.txt", None, "phone", "phones")
    assert "is a frame rate of 40 a second right?" in slow.remarks[0]


def test_alignments_in_textgrids_and_phn(speech, tmp_path):
    features = open_features(str(speech / "features"))
    wanted = open_labels(features, speech / "items.txt", None, "phone", "phones")
    rows = {}
    for line in (speech / "items.txt").read_text().splitlines()[1:]:
        name, onset, offset, phone, *_ = line.split()
        rows.setdefault(name, []).append((float(onset), float(offset), phone))
    for kind in ("TextGrid", "phn"):
        for name, row in rows.items():
            path = tmp_path / kind / f"{name}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "phn":
                text = "".join(f"{round(a * 16000)} {round(b * 16000)} {p}\n" for a, b, p in row)
            else:
                text = (
                    '"ooTextFile"\n"TextGrid"\n0\n9\n<exists>\n1\n"IntervalTier"\n"phones"\n0\n9\n'
                )
                text += f"{len(row)}\n" + "".join(f'{a}\n{b}\n"{p}"\n' for a, b, p in row)
            path.write_text(text)
        found = open_labels(features, tmp_path / kind, None, "phone", "phones")
        for name in features:
            count = len(features[name])
            when = features.when([name])
            pair = [labels.of_frames(name, count, when).tolist() for labels in (found, wanted)]
            assert pair[0] == pair[1]
        assert found.speakers["ann/u00"] == "ann"


def test_times_in_files_say_which_phone_a_frame_is_of(speech, tmp_path):
    for path in (speech / "features").rglob("*.npy"):
        target = tmp_path / "timed" / path.relative_to(speech / "features")
        target.parent.mkdir(parents=True, exist_ok=True)
        values = np.load(path)
        times = 7 + (np.arange(len(values)) + 0.5) / 100
        np.savez(target.with_suffix(".npz"), features=values[::3], times=times[::3])
    lines = [line.split() for line in (speech / "items.txt").read_text().splitlines()]
    later = [[line[0], *(str(7 + float(t)) for t in line[1:3]), *line[3:]] for line in lines[1:]]
    (tmp_path / "items.txt").write_text("\n".join(map(" ".join, [lines[0], *later])))
    features = open_features(str(tmp_path / "timed"))
    timed = open_labels(features, tmp_path / "items.txt", None, "phone", "phones")
    even = open_features(str(speech / "features"))
    usual = open_labels(even, speech / "items.txt", None, "phone", "phones")
    for name in features:
        found = timed.of_frames(name, len(features[name]), features.when([name]))
        assert (found == usual.of_frames(name, len(even[name]), even.when([name]))[::3]).all()
    found = probe(str(tmp_path / "timed"), out=tmp_path / "run", labels=tmp_path / "items.txt")
    assert found.results["accuracy"] > 0.95
    assert found.results["frame_rate"] == pytest.approx(100 / 3)
    assert found.results["remarks"] == ["frames lie where the times in their files say"]


def test_speakers_and_held_out_speakers(speech, tmp_path, capsys):
    results = run(speech, tmp_path / "a", labels=None, target="speaker")
    assert results["accuracy"] == 1.0
    assert results["counted"] == "files"
    assert results["classes"] == 4
    last = run(
        speech, tmp_path / "b", labels=None, target="speaker", pool="last", method="linear", lr=1e-3
    )
    assert last["window_accuracy"] < 1.0  # one frame of one window says less than its mean
    held = run(speech, tmp_path / "c", by_speaker=True, test_fraction=0.5)
    assert (held["interval_over"], held["test_utterances"]) == ("speakers", 20)
    rows = (tmp_path / "c" / "run" / "predictions.txt").read_text().splitlines()
    assert len({row.split("/")[0] for row in rows}) == 2
    assert "no interval" not in capsys.readouterr().err
    run(speech, tmp_path / "d", by_speaker=True)
    assert "no interval: it takes two speakers to test on" in capsys.readouterr().err


def test_few_labels_are_nested_and_spare_the_test_set(speech, tmp_path):
    test = None
    for k in (4, 2, 1):
        results = run(speech, tmp_path / str(k), labels_per_class=k, test_names=r"u\d*[05]$")
        assert results["train_utterances"] == k  # every utterance holds every phone
        assert results["train_utterances_there"] == 32
        rows = (tmp_path / str(k) / "run" / "predictions.txt").read_text().splitlines()
        names = [row.split()[0] for row in rows]
        assert all(name[-1] in "05" for name in names)
        assert names == (test or names)
        test = names
    results = run(speech, tmp_path / "m", minutes=0.05)
    assert 0 < results["train_minutes"] <= 0.05


def test_whole_files_by_name_with_a_list_of_test_names(tmp_path, capsys):
    folder = tmp_path / "words"
    folder.mkdir()
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(3, 4))
    for i in range(30):
        word = i % 3
        x = centres[word] + 0.5 * rng.normal(size=(int(rng.integers(20, 300)), 4))
        np.save(folder / f"{SPEAKERS[i % 4]}_{'xyz'[word]}_{i}.npy", x)
    names = sorted(path.stem for path in folder.iterdir())
    (tmp_path / "test.txt").write_text("\n".join(names[::5]) + "\n")
    found = probe(str(folder), out=tmp_path / "run", names=NAMES,
                  test_names=str(tmp_path / "test.txt"))  # fmt: skip
    assert found.results["accuracy"] == 1.0
    assert found.results["window_accuracy"] == 1.0
    rows = (tmp_path / "run" / "predictions.txt").read_text().split("\n")[:-1]
    assert rows == [f"{name} {name.split('_')[1]}" for name in names[::5]]
    # Nine of ten files to test on are x, which is the rarest to learn from.
    rare = [name for name in names if "_x_" in name][:9] + [n for n in names if "_y_" in n][:1]
    (tmp_path / "rare.txt").write_text("\n".join(rare))
    capsys.readouterr()
    found = probe(str(folder), out=tmp_path / "c", names=NAMES, pool="segments",
                  test_names=str(tmp_path / "rare.txt"))  # fmt: skip
    assert found.results["chance"] == 0.9
    assert "one answer for all has at most 90.0 %" in capsys.readouterr().err
    assert "would get right" in (tmp_path / "c" / "report.html").read_text()
    (tmp_path / "test.txt").write_text("nobody\n")
    with pytest.raises(InputError, match="'nobody' are no labelled utterances"):
        probe(str(folder), out=tmp_path / "b", names=NAMES, test_names=str(tmp_path / "test.txt"))


@pytest.mark.parametrize("labels", ["frames", "items", "sequences"])
def test_ctc_spells(speech, tmp_path, labels):
    results = run(speech, tmp_path, labels=speech / f"{labels}.txt", method="ctc", epochs=1)
    assert results["labels_of_frames"] == (labels == "frames")
    # Whatever the kind of labels, the same is to be spelled: three phones an utterance.
    assert (results["train_phones"], results["test_phones"]) == (3 * 32, 3 * 8)
    assert results["per"] > 0
    assert results["classes"] == (4 if labels == "frames" else 3)
    assert "phone error rate" in (tmp_path / "run" / "report.html").read_text()


def test_ctc_learns_and_reports_what_is_too_short(speech, tmp_path):
    rows = (speech / "sequences.txt").read_text().splitlines()
    rows[0] += " aa" * 80
    (tmp_path / "labels.txt").write_text("\n".join(rows))
    options = {"labels": tmp_path / "labels.txt", "method": "ctc", "lstm": True}
    results = run(speech, tmp_path, epochs=25, lr=0.02, test_names="[1-9]$", **options)
    assert results["too_short_to_learn_from"] == ["ann/u00"]
    assert results["test_utterances"] == 36
    assert results["per"] < 0.4
    low, high = results["per_interval"]
    assert low <= results["per"] <= high


class Speller:
    """Stands for CTC: right with a beam, but for the first utterance; else always one phone."""

    losses, impossible = torch.ones(1), ()

    def __init__(self, truth):
        self.truth = truth

    def decode(self, rows, width):
        if width is None:
            return [[0]] * len(rows)
        assert width == 7
        return [self.truth.pop(0) for _ in rows]


@pytest.mark.parametrize("standardise", [True, False])
def test_error_rates_are_those_of_the_beam(speech, tmp_path, monkeypatch, standardise):
    """The first test utterance has nine phones and nine errors, the other has three and none."""
    names = ("ann/u00", "ann/u04", "bob/u01")
    rows = ["ann/u00 " + "b k k " * 3, "ann/u04 b k aa", "bob/u01 aa b k"]
    (tmp_path / "labels.txt").write_text("\n".join(rows))
    given = {}

    def train(rows, phones, _, **options):
        given.update(options, rows=len(rows), phones=[row.tolist() for row in phones])
        return Speller([[0] * 9, [1, 2, 0]])

    monkeypatch.setattr(probe_fit, "train_ctc", train)
    options = {"labels": tmp_path / "labels.txt", "method": "ctc", "beam_width": 7, "epochs": 4}
    results = run(
        speech, tmp_path, test_names="ann", lstm=True, lr=0.1, standardise=standardise, seed=5,
        **options,
    )  # fmt: skip
    assert (results["per"], results["per_pooled"]) == (1 / 2, 9 / 12)
    assert results["per_best_path"] == (1 + 2 / 3) / 2
    assert results["per_best_path_pooled"] == 11 / 12
    written = (tmp_path / "run" / "predictions.txt").read_text().splitlines()
    assert written == [f"{names[0]}{' aa' * 9}", f"{names[1]} b k aa"]
    assert (given["rows"], given["phones"]) == (1, [[0, 1, 2]])
    wanted = {"epochs": 4, "lr": 0.1, "lstm": True, "standardise": standardise, "seed": 5}
    assert {name: given[name] for name in wanted} == wanted


@pytest.mark.parametrize("standardise", [True, False])
def test_options_reach_the_linear_layer(speech, tmp_path, monkeypatch, standardise):
    given, train = {}, probe_fit.train_linear

    def spy(*args, **options):
        given.update(options)
        return train(*args, **options)

    monkeypatch.setattr(probe_fit, "train_linear", spy)
    wanted = {"epochs": 2, "lr": 0.1, "standardise": standardise, "seed": 5}
    run(speech, tmp_path, method="linear", **wanted)
    assert {name: given[name] for name in wanted} == wanted


@pytest.mark.parametrize(("by_speaker", "used"), [(True, 2), (False, 5)])
def test_the_ridge_is_chosen_by_what_is_held_out(speech, tmp_path, monkeypatch, by_speaker, used):
    """With two speakers to learn from, each one's frames are a fold."""
    fit, counts = probe_fit.ridge_probe, []

    def spy(folds):
        counts.extend(int(fold.counts.sum()) for fold in folds)
        return fit(folds)

    monkeypatch.setattr(probe_fit, "ridge_probe", spy)
    results = run(speech, tmp_path, by_speaker=by_speaker, test_fraction=0.5)
    assert sum(count > 0 for count in counts) == used
    assert sum(counts) == results["train_labels"]


@pytest.mark.parametrize("seed", range(3))
def test_few_minutes_are_of_all_speakers_in_turn(speech, tmp_path, monkeypatch, seed):
    chosen, choose = [], probe_module.by_minutes

    def spy(*args, **options):
        chosen.append(choose(*args, **options))
        return chosen[0]

    monkeypatch.setattr(probe_module, "by_minutes", spy)
    run(speech, tmp_path, minutes=0.08, seed=seed)
    said = [name.split("/")[0] for name in chosen[0]]
    counts = [said.count(speaker) for speaker in SPEAKERS]
    assert max(counts) - min(counts) <= 1
    assert len(said) >= 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": None}, "give --names with a group"),
        ({"labels": Path("nowhere.txt")}, r"--labels nowhere\.txt: no such file"),
        ({"target": "speaker"}, "leave --labels out"),
        ({"labels": None, "target": "speaker", "by_speaker": True}, "--by-speaker: a speaker who"),
        ({"labels": None, "method": "ctc"}, "--method ctc: spells phones"),
        ({"pool": "mean"}, "--pool: is for labels of whole files"),
        ({"test_names": "zzz"}, "takes 0 of 40 utterances"),
        ({"test_names": "("}, "no regular expression"),
        ({"epochs": 3}, "--epochs: is for --method linear and ctc, not ridge"),
        ({"lstm": True}, "--lstm: is for --method ctc"),
        ({"minutes": 99.0}, "99 minutes of labels"),
        ({"minutes": 1.0, "labels_per_class": 1}, "give one of them"),
        ({"labels_per_class": 0}, "--labels-per-class 0"),
        ({"test_fraction": 1.0}, "--test-fraction 1"),
        ({"frame_rate": float("nan")}, "--frame-rate nan"),
        ({"text": "ann/u00 aa b\n"}, "has 2 labels for"),
        ({"text": "ann/u00 aa\nann/u00 b\n"}, "is there twice"),
        ({"text": "ann/u00\n"}, "has no labels"),
        ({"text": "ann/u00 aa aa\nann/u04 aa\n"}, "labels name 1 class"),
        ({"text": "ann/u00 aa\nnobody b\n"}, "no features of 'nobody'"),
        ({"text": ""}, "holds no labels"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(speech, tmp_path, options, words):
    text = options.pop("text", None)
    if text is not None:
        path = tmp_path / "labels.txt"
        path.write_text(text + ("ann/u04 b aa\n" if "2 labels" in words else ""))
        options["labels"] = path
    with pytest.raises(InputError, match=words) as caught:
        run(speech, tmp_path, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run.partial").exists()


def test_mixed_kinds_of_labels_are_named(speech, tmp_path):
    rows = (speech / "frames.txt").read_text().splitlines()
    rows[7] = "dee/u07 aa b k"
    (tmp_path / "labels.txt").write_text("\n".join(rows))
    with pytest.raises(InputError, match="labels of 'dee/u07' are of another kind"):
        run(speech, tmp_path, labels=tmp_path / "labels.txt", method="ctc")


def test_mfcc_of_recordings(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(8):
        tone = 300 * (1 + i % 2)
        wave = 0.3 * np.sin(2 * np.pi * tone * np.arange(3000) / 8000) * np.hanning(3000)
        wave = np.clip((9 if i == 7 else 1) * (wave + 0.01 * rng.normal(size=3000)), -1, 1)
        soundfile.write(tmp_path / f"{'lh'[i % 2]}_{i}.wav", wave, 8000)
    options = {"audio": str(tmp_path), "names": "(?P<phone>[lh])_", "pool": "frames"}
    results = probe("mfcc", out=tmp_path / "run", test_names="[67]", **options).results
    assert results["test_utterances"] == 2
    assert results["test_minutes"] == pytest.approx(2 * 3000 / 8000 / 60)
    assert results["window_accuracy"] > results["chance"]
    remark = "1 recording is at full scale, and may have been clipped"
    assert results["remarks"] == [remark]
    assert capsys.readouterr().err.count(remark) == 1
    assert remark in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(InputError, match="--pool mean: the mean over time of mfcc is 0"):
        probe("mfcc", out=tmp_path / "b", **options | {"pool": "mean"})


@pytest.mark.slow
@pytest.mark.skipif(not DIGITS.is_dir(), reason="the spoken digits are not beside the repository")
def test_spoken_digits_by_their_mfcc(tmp_path):
    names = r"(?P<phone>[0-9])_(?P<speaker>[a-z]+)_"
    options = {"audio": str(DIGITS / "*_[0-9].wav"), "names": names, "test_names": "_[0-4]$"}
    words = probe("mfcc", out=tmp_path / "words", **options)
    voices = probe("mfcc", out=tmp_path / "voices", target="speaker", pool="frames", **options)
    assert words.results["test_utterances"] == 300
    assert words.results["accuracy"] > 0.75  # chance is 0.1
    assert voices.results["window_accuracy"] > 0.2  # chance is 1/6: the mean is taken out
