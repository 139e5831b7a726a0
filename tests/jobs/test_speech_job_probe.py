import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from remanence.errors import InputError
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
        a, b = (labels.of_frames(name, count, 100) for labels in (by_frame, by_item))
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
            pair = [labels.of_frames(name, count, 100).tolist() for labels in (found, wanted)]
            assert pair[0] == pair[1]
        assert found.speakers["ann/u00"] == "ann"


def test_speakers_and_held_out_speakers(speech, tmp_path):
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


def test_whole_files_by_name_with_a_list_of_test_names(tmp_path):
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
