import csv
import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from remanence.errors import InputError
from remanence.jobs.speech.abx import abx
from remanence.jobs.speech.features import open_features
from remanence.speech.abx.cells import fixed_subsample
from remanence.speech.abx.items import Items
from remanence.speech.abx.score import run

PHONES, SPEAKERS = ("AA", "B", "S"), ("ann", "bob", "cat")
NAMES = r"(?P<phone>[A-Z]+)_(?P<speaker>[a-z]+)_"
GRID = """File type = "ooTextFile"
Object class = "TextGrid"

0
1
<exists>
1
"IntervalTier"
"phones"
0
1
{n}
{intervals}
"""


def frames(phone, noise, seed, length):
    rng = np.random.default_rng(seed)
    centre = np.random.default_rng(PHONES.index(phone)).normal(size=5)
    return (centre + noise * rng.normal(size=(length, 5))).astype("f4")


def save(folder, noise, first=0):
    """Three tokens of each phone and speaker, a file each."""
    folder.mkdir()
    number = first
    for phone in PHONES:
        for who in SPEAKERS:
            for take in range(3):
                number += 1
                values = frames(phone, noise, number, 3 + number % 4)
                np.save(folder / f"{phone}_{who}_{take}.npy", values)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("abx")
    save(folder / "good", 0.8)
    save(folder / "bad", 4, first=100)
    return folder


@pytest.fixture(scope="module")
def done(made):
    return abx(
        str(made / "good"), out=made / "run", names=NAMES, compare=str(made / "bad"), bootstrap=20
    )


def test_errors_are_those_of_the_method(made, done):
    features = {p.stem: torch.from_numpy(np.load(p)) for p in (made / "good").glob("*.npy")}
    items = Items.from_file_names(sorted(features), NAMES)
    written = json.loads((made / "run" / "results.json").read_text())
    for side in ("within", "across"):
        wanted = run(features, items, frame_rate=100, speaker=side, bootstrap=20)
        found = written["first"][side]
        assert found["error"] == pytest.approx(100 * wanted.error)
        assert (found["low"], found["high"]) == pytest.approx(
            [100 * end for end in np.clip(wanted.interval, 0, 1)]
        )
        assert found["cells"] == len(wanted.cells)
        assert (found["items"], found["items_in_no_cell"]) == (27, 0)
        assert written["second"][side]["error"] > found["error"]
    assert done.within.error < done.across.error + 0.2
    assert (written["chance"], written["slicing"]) == (50, "inclusive")
    assert not list(made.glob("*.partial"))


@pytest.fixture(scope="module")
def uneven(made):
    """Items of unequal numbers in two contexts."""
    rng = np.random.default_rng(0)
    lines = ["#file onset offset #phone prev-phone next-phone speaker"]
    for token in sorted(path.stem for path in (made / "good").glob("*.npy")):
        phone, who, _ = token.split("_")
        lines += [f"{token} 0 0.03 {phone} L R {who}"] if rng.random() < 0.9 else []
        lines += [f"{token} 0.01 0.03 {phone} Q Q {who}"] if rng.random() < 0.7 else []
    path = made / "uneven.item"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"aggregate": "weighted"},
        {"slicing": "librilight"},
        {"distance": "euclidean"},
        {"context": "any"},
        {"max_group": 2},
        {"max_x_speakers": 1},
        {"subsample": 21},
        {"subsample": 21, "context": "any"},
        {"max_group": 2, "subsample": 21, "seed": 3},
    ],
    ids=str,
)
def test_each_option_reaches_the_method(made, uneven, tmp_path, monkeypatch, options):
    monkeypatch.setattr("remanence.kit.report.Report.figure", lambda *_: None)  # drawing is slow
    found = abx(
        str(made / "good"), out=tmp_path / "run", items=uneven, draws=2, **options
    ).results["first"]  # fmt: skip
    features = dict(open_features(str(made / "good")))
    items, seed = Items.read(uneven), options.get("seed", 0)
    for side in ("within", "across"):
        drawing = {"seed": seed, "context": options.get("context", "within")}
        some = fixed_subsample(items, 21, speaker=side, **drawing)
        chosen = some if "subsample" in options else items
        rest = {name: value for name, value in options.items() if name not in ("subsample", "seed")}
        wanted = run(features, chosen, frame_rate=100, speaker=side, seed=seed, **rest)
        other = run(features, items, frame_rate=100, speaker=side)
        assert found[side]["error"] == pytest.approx(100 * wanted.error)
        assert found[side]["triplets"] == wanted.cells.triplets.sum()
        used = options.keys() - ({"max_x_speakers"} if side == "within" else set())
        assert found[side]["draws"] == (2 if used & {"max_group", "max_x_speakers"} else 1)
        assert (wanted.error != other.error) == bool(used)  # the option makes a difference


def test_features_to_compare_with_have_a_layer_and_a_rate_of_their_own(made, tmp_path, monkeypatch):
    opened = []

    def spy(source, **options):
        opened.append((source, options["layer"], options["frame_rate"]))
        return open_features(source)

    monkeypatch.setattr("remanence.jobs.speech.abx.open_features", spy)
    good, bad = str(made / "good"), str(made / "bad")
    options = {"names": NAMES, "compare": bad, "speaker": "within", "layer": "encoder"}
    abx(good, out=tmp_path / "a", frame_rate=100, **options)
    assert opened == [(good, "encoder", 100), (bad, "encoder", 100)]
    opened.clear()
    abx(good, out=tmp_path / "b", compare_layer="2", compare_frame_rate=50, **options)
    assert opened == [(good, "encoder", None), (bad, "2", 50)]


def test_tables_hold_every_pair(made, done):
    rows = list(csv.DictReader((made / "run" / "per_pair.csv").open()))
    assert len(rows) == 2 * 2 * 6
    errors = done.across.table()
    for row in rows:
        if (row["features"], row["side"]) == ("first", "across"):
            wanted = 100 * errors[row["phone"], row["other"]]
            assert float(row["error_percent"]) == pytest.approx(wanted, abs=1e-5)
    own = [row for row in rows if (row["features"], row["side"]) == ("first", "across")]
    assert sum(int(row["triplets"]) for row in own) == done.across.cells.triplets.sum()
    for by, count in (("speaker", 3), ("phone", 3)):
        rows = list(csv.DictReader((made / "run" / f"per_{by}.csv").open()))
        assert len(rows) == 2 * 2 * count


def test_the_comparison_says_what_speakers_explain(made, done):
    found = done.results["comparison"]["across"]
    assert found["difference"] == pytest.approx(100 * done.comparison["across"].difference)
    assert found["difference"] < 0
    assert found["p"] < 0.05
    assert "first features are better" in found["verdict"]
    page = (made / "run" / "report.html").read_text()
    assert "differ" in page
    assert "bob" in page
    save(made / "alike", 0.8, first=400)
    alike = abx(
        str(made / "good"), out=made / "run-alike", names=NAMES, compare=str(made / "alike"),
        speaker="within",
    )  # fmt: skip
    assert (
        "within what the 3 speakers alone explain"
        in (alike.results["comparison"]["within"]["verdict"])
    )


def test_shards_add_to_the_same_run(made, done):
    (made / "shards").mkdir()
    for rank in range(2):
        abx(
            str(made / "good"), out=made / "shards" / str(rank), names=NAMES,
            compare=str(made / "bad"), bootstrap=20, rank=rank, world_size=2,
        )  # fmt: skip
    added = abx(str(made / "shards"), out=made / "added", merge=True)
    once, twice = ((made / run / "results.json").read_text() for run in ("run", "added"))
    assert twice == once
    assert np.array_equal(added.across.cells.wrong, done.across.cells.wrong)
    (made / "shards" / "1").rename(made / "gone")
    with pytest.raises(InputError, match="shard 1 of 2 is missing"):
        abx(str(made / "shards"), out=made / "again", merge=True)


def test_shards_add_every_draw(made, tmp_path):
    options = {"names": NAMES, "max_group": 2, "max_x_speakers": 1, "draws": 2}
    abx(str(made / "good"), out=tmp_path / "once", **options)
    for rank in range(2):
        abx(str(made / "good"), out=tmp_path / "shards" / str(rank), rank=rank, world_size=2,
            **options)  # fmt: skip
    added = abx(str(tmp_path / "shards"), out=tmp_path / "added", merge=True)
    once, twice = ((tmp_path / run / "results.json").read_text() for run in ("once", "added"))
    assert twice == once
    assert added.results["first"]["across"]["draw_stderr"] > 0


def test_shards_of_other_features_or_items_are_not_added(made, tmp_path):
    shards, own = tmp_path / "shards", tmp_path / "own"
    options = {"names": NAMES, "speaker": "within", "max_group": 2, "world_size": 2}
    abx(str(made / "good"), out=shards / "0", rank=0, **options)
    abx(str(made / "bad"), out=shards / "1", rank=1, **options)
    with pytest.raises(InputError, match=r"--features is .*bad, in another shard .*good; run it"):
        abx(str(shards), out=tmp_path / "run", merge=True)
    save(own, 1)
    shards = tmp_path / "changed"
    abx(str(own), out=shards / "0", rank=0, **options)
    (own / "S_cat_2.npy").unlink()
    abx(str(own), out=shards / "1", rank=1, **options)
    with pytest.raises(InputError, match="features or items changed between shards"):
        abx(str(shards), out=tmp_path / "run", merge=True)
    assert not (tmp_path / "run").exists()


def test_alignments_and_lists_give_the_same_items(tmp_path, capsys):
    """One long file a speaker: as TextGrids, .phn, labels of frames, item file and table."""
    rng = np.random.default_rng(0)
    for folder in ("features", "grids", "phn"):
        (tmp_path / folder).mkdir()
    lines, table = ["#file onset offset #phone prev-phone next-phone speaker"], []
    labels = []
    for number, who in enumerate(SPEAKERS):
        row = []
        while len(row) < 24:
            row += [p for p in rng.permutation(PHONES).tolist() if not row or p != row[-1]]
        values = [frames(p, 1, 100 * number + i, 4) for i, p in enumerate(row)]
        np.save(tmp_path / "features" / f"{who}_1.npy", np.concatenate(values))
        edges = [0.04 * i for i in range(len(row) + 1)]
        spans = list(pairwise(edges))
        stressed = ["AA1" if p == "AA" and i % 2 else p for i, p in enumerate(row)]
        text = "\n".join(
            f'{a:.2f}\n{b:.2f}\n"{p}"' for (a, b), p in zip(spans, stressed, strict=True)
        )
        grid = GRID.format(n=len(row), intervals=text)
        encoding = "utf-16" if number else "utf-8"
        (tmp_path / "grids" / f"{who}_1.TextGrid").write_text(grid, encoding=encoding)
        (tmp_path / "phn" / f"{who}_1.phn").write_text(
            "\n".join(f"{i * 640} {i * 640 + 640} {p}" for i, p in enumerate(row))
        )
        labels.append(" ".join([f"{who}_1", *np.repeat(row, 4).tolist()]))
        around = ["SIL", *row, "SIL"]
        for i, (a, b) in enumerate(spans):
            lines.append(f"{who}_1 {a:.2f} {b:.2f} {row[i]} {around[i]} {around[i + 2]} {who}")
            table.append(f"{who}_1,{a:.2f},{b:.2f},{row[i]}")
    (tmp_path / "a.item").write_text("\n".join(lines))
    (tmp_path / "a.csv").write_text("\n".join(["file,onset,offset,phone", *table]))
    (tmp_path / "labels.txt").write_text("\n".join(labels))
    who = "(?P<speaker>[a-z]+)"
    errors = {}
    for name, options in {
        "grid": {"textgrid": tmp_path / "grids", "names": who, "without_stress": True},
        "phn": {"phn": tmp_path / "phn", "names": who},
        "labels": {"frame_labels": tmp_path / "labels.txt", "names": who},
        "item": {"items": tmp_path / "a.item"},
        "csv": {"items": tmp_path / "a.csv", "names": who},
    }.items():
        found = abx(
            str(tmp_path / "features"), out=tmp_path / f"run-{name}", context="any", **options
        )
        errors[name] = [found.results["first"][side]["error"] for side in ("within", "across")]
        assert found.results["items"]["phones"] == 3
    assert all(value == errors["item"] for value in errors.values())
    stressed = abx(
        str(tmp_path / "features"), out=tmp_path / "stressed", textgrid=tmp_path / "grids",
        names=who, context="any", speaker="across", max_group=2, draws=3,
    )  # fmt: skip
    assert stressed.results["items"]["phones"] == 4
    assert stressed.results["first"]["across"]["draw_stderr"] > 0
    with pytest.raises(InputError, match="frames at 50 a second"):
        abx(str(tmp_path / "features"), out=tmp_path / "x", frame_rate=50, names=who,
            frame_labels=tmp_path / "labels.txt")  # fmt: skip
    half = abx(
        str(tmp_path / "features"), out=tmp_path / "half", frame_rate=50, context="any",
        items=tmp_path / "a.item", subsample=30, speaker="across",
    )  # fmt: skip
    assert half.results["first"]["across"]["items"] <= 30
    doubt = "features last 2.0 times as long as the items reach, in every file looked at"
    assert half.results["doubts"] == [f"{doubt}: is a frame rate of 50 a second right?"]
    assert doubt in capsys.readouterr().err
    assert f"Take care: {doubt}" in (tmp_path / "half" / "report.html").read_text()
    beside = abx(
        str(tmp_path / "features"), out=tmp_path / "beside", compare=str(tmp_path / "features"),
        compare_frame_rate=50, context="any", items=tmp_path / "a.item", speaker="across",
    )  # fmt: skip
    assert [text[:18] for text in beside.results["doubts"]] == ["the second feature"]


def test_items_that_cannot_be_used_are_counted(made, tmp_path):
    lines = ["#file onset offset #phone prev-phone next-phone speaker"]
    lines += [f"{p}_{s}_{t} 0 0.03 {p} L R {s}" for p in PHONES for s in SPEAKERS for t in range(3)]
    lines += ["AA_ann_0 0 0.004 AA L R ann", "AA_ann_0 0 0.03 AA Q Q ann"]
    (tmp_path / "a.item").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"1 item has no frame: .*--drop-empty"):
        abx(str(made / "good"), out=tmp_path / "x", items=tmp_path / "a.item")
    found = abx(
        str(made / "good"), out=tmp_path / "run", items=tmp_path / "a.item", drop_empty=True
    )
    for side in ("within", "across"):
        row = found.results["first"][side]
        assert (row["items"], row["items_without_frames"], row["items_in_no_cell"]) == (29, 1, 1)


def test_features_are_compared_where_one_rate_has_no_frame_of_a_context(made, tmp_path):
    (tmp_path / "half").mkdir()
    for path in (made / "good").glob("*.npy"):
        np.save(tmp_path / "half" / path.name, np.load(path)[::2])
    lines = ["#file onset offset #phone prev-phone next-phone speaker"]
    for token in (f"{p}_{s}_{t}" for p in PHONES for s in SPEAKERS for t in range(3)):
        phone, who, _ = token.split("_")
        lines += [f"{token} 0 0.03 {phone} L R {who}", f"{token} 0.012 0.024 {phone} Q Q {who}"]
    (tmp_path / "a.item").write_text("\n".join(lines))
    found = abx(
        str(made / "good"), out=tmp_path / "run", items=tmp_path / "a.item", drop_empty=True,
        compare=str(tmp_path / "half"), compare_frame_rate=50,
    )  # fmt: skip
    for side in ("within", "across"):
        rows = [found.results[name][side] for name in ("first", "second", "comparison")]
        assert [row["items_without_frames"] for row in rows[:2]] == [0, 27]
        assert [row["cells"] for row in rows] == [2 * rows[1]["cells"]] + [rows[1]["cells"]] * 2


def test_contexts_are_told_apart_by_both_neighbours(made, tmp_path):
    lines = ["file,onset,offset,phone,prev,next,speaker"]
    lines += [f"{p}_{s}_{t},0,0.03,{p},L,R,{s}"
              for p in PHONES for s in SPEAKERS for t in range(3)]  # fmt: skip
    lines += [f"AA_ann_{t},0,0.03,AA,x y,z,ann" for t in range(2)]
    lines += ["B_ann_0,0,0.03,B,x,y z,ann"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    found = abx(
        str(made / "good"), out=tmp_path / "run", items=tmp_path / "a.csv", speaker="within"
    )
    assert found.results["first"]["within"]["items_in_no_cell"] == 3


def test_names_that_match_take_some_files_and_the_rest_is_counted(made, tmp_path, capsys):
    some = r"(?P<phone>AA|B)_(?P<speaker>[a-z]+)_"
    found = abx(str(made / "good"), out=tmp_path / "run", names=some, speaker="within")
    assert (found.results["items"]["listed"], found.results["items"]["phones"]) == (18, 2)
    remark = "left out, as --names does not match: 9 of 27 files"
    assert found.results["remarks"] == [remark]
    assert capsys.readouterr().err.count(remark) == 1
    assert remark[1:] in (tmp_path / "run" / "report.html").read_text()


def test_both_errors_of_a_comparison_are_said(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("remanence.kit.report.Report.figure", lambda *_: None)  # drawing is slow
    found = abx(
        str(made / "good"), out=tmp_path / "run", names=NAMES, compare=str(made / "bad")
    ).results  # fmt: skip
    said = capsys.readouterr().err
    for name in ("first", "second"):
        for side, row in found[name].items():
            assert f"{side} speakers, {name} features: {row['error']:.2f} %, " in said
    assert found["comparison"]["within"]["verdict"] in said


def test_no_error_is_no_certainty(tmp_path, capsys):
    save(tmp_path / "clear", 0.01)
    options = {"names": NAMES, "speaker": "within", "out": tmp_path / "run"}
    found = abx(str(tmp_path / "clear"), compare=str(tmp_path / "clear"), **options)
    row, difference = (found.results[name]["within"] for name in ("first", "comparison"))
    assert row["error"] == difference["difference"] == 0
    assert all(np.isnan(own[key]) for own in (row, difference) for key in ("stderr", "low", "high"))
    assert "these items do not tell the features apart" in difference["verdict"]
    seen = f"no error in {row['triplets']:,} triplets; how many others would make is unknown"
    assert f"0.00 %: {seen}" in capsys.readouterr().err
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"Within speakers, first features: {seen}." in page
    assert "0.00 to 0.00" not in page


def test_times_in_files_say_where_frames_are(made, tmp_path):
    """The features of `good`, as if each began 7 s into its recording and had a gap."""
    (tmp_path / "timed").mkdir()
    lines = ["#file onset offset #phone prev-phone next-phone speaker"]
    for path in sorted((made / "good").glob("*.npy")):
        values = np.load(path)
        phone, who, _ = path.stem.split("_")
        values = np.concatenate((values, 9 * np.ones((3, 5), "f4")))
        times = 7 + np.arange(len(values)) / 100
        times[-3:] += 0.5
        np.savez(tmp_path / "timed" / path.stem, features=values, times=times)
        lines.append(f"{path.stem} 6.9 7.2 {phone} L R {who}")
    (tmp_path / "a.item").write_text("\n".join(lines))
    wanted = abx(str(made / "good"), out=tmp_path / "wanted", names=NAMES).results["first"]
    options = {"items": tmp_path / "a.item", "compare": str(tmp_path / "timed")}
    found = abx(str(tmp_path / "timed"), out=tmp_path / "run", **options).results
    for side, row in wanted.items():
        for name in ("first", "second"):
            assert found[name][side] == pytest.approx(row, nan_ok=True)
    assert found["frame_rate"] == {"first": 100, "second": 100}
    assert found["remarks"] == ["frames lie where the times in their files say"]
    with pytest.raises(InputError, match="outside its"):
        abx(str(tmp_path / "timed"), out=tmp_path / "x", frame_rate=100, **options)
    np.savez(tmp_path / "timed" / "AA_ann_0", features=values, times=times[1:])
    with pytest.raises(InputError, match=f"times of 'AA_ann_0' do not fit: give {len(values)}"):
        abx(str(tmp_path / "timed"), out=tmp_path / "x", **options)


def test_recordings_and_what_is_done_to_them(tmp_path, capsys):
    import soundfile

    rng = np.random.default_rng(0)
    (tmp_path / "wav").mkdir()
    for i, pitch in enumerate((300, 900)):
        for who in ("ann", "bob"):
            for take in range(2):
                wave = np.sin(2 * np.pi * pitch * np.arange(1600) / 8000)
                wave += 0.1 * rng.normal(size=1600)
                path = tmp_path / "wav" / f"{i}_{who}_{take}.wav"
                soundfile.write(path, np.clip((9 if i + take == 2 else 0.3) * wave, -1, 1), 8000)
    soundfile.write(tmp_path / "wav" / "1_bob_0.wav", np.zeros((1600, 2)), 8000)
    (tmp_path / "encoder.py").write_text(
        "from torch.nn import Linear, Sequential, Unflatten\n"
        "def network():\n    return Sequential(Unflatten(1, (-1, 160)), Linear(160, 3))\n"
    )
    found = abx(
        "mfcc", audio=str(tmp_path / "wav"), names=r"(?P<phone>\d)_(?P<speaker>[a-z]+)_",
        out=tmp_path / "run", compare=f"{tmp_path / 'encoder.py'}:network", distance="euclidean",
    )  # fmt: skip
    assert found.results["items"]["files"] == 8
    assert found.within.error < 0.5
    remarks = found.results["remarks"]
    assert remarks[:3] == [
        "the channels of 1 recording are averaged",
        "2 recordings are at full scale, and may have been clipped",
        "1 recording is silent",
    ]
    assert remarks[3].startswith("8 recordings of 8,000 Hz are resampled to 16,000 Hz")
    assert remarks[3].endswith("(for the second features)")
    said, page = capsys.readouterr().err, (tmp_path / "run" / "report.html").read_text()
    for text in remarks:
        assert text.split(" (for")[0] in said
        assert text[1:] in page


@pytest.mark.slow
def test_processes_share_the_work(made, done, tmp_path):
    script = tmp_path / "go.py"
    script.write_text(
        "import sys; from pathlib import Path; from remanence.jobs.speech.abx import abx\n"
        f"abx({str(made / 'good')!r}, out=Path({str(tmp_path / 'run')!r}), names={NAMES!r}, "
        f"compare={str(made / 'bad')!r}, bootstrap=20, device='cpu')\n"
    )
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(script)],
        check=True, timeout=300,
    )  # fmt: skip
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written["first"]["across"]["error"] == done.results["first"]["across"]["error"]


def test_bad_input_is_refused_in_one_line(made, tmp_path):
    good = str(made / "good")

    def folder(name, change):
        save(tmp_path / name, 1)
        change(tmp_path / name)
        return str(tmp_path / name)

    def spoil(value):
        return lambda path: np.save(path / "B_bob_1.npy", value)

    whole = folder("ids", lambda path: [np.save(p, np.ones(3, int)) for p in path.glob("*.npy")])
    (tmp_path / "far.item").write_text("head\nB_bob_1 0 9 B L R bob\nS_bob_1 0 9 S L R bob\n"
                                       "B_bob_2 0 9 B L R bob\n")  # fmt: skip
    (tmp_path / "who.csv").write_text("file,phone,speaker\nB_bob_1,B,bob\n")
    (tmp_path / "gone.item").write_text("head\nX 0 1 B L R bob\nY 0 1 S L R bob\n")
    cases = [
        ("give one of --items", good, {}),
        ("--items and --phn", good, {"items": tmp_path / "a", "phn": tmp_path}),
        ("--tier: does not go", good, {"names": NAMES, "tier": "words"}),
        ("--label-rate", good, {"names": NAMES, "label_rate": 50}),
        ("--rank 2", good, {"names": NAMES, "rank": 2, "world_size": 2}),
        ("--compare", good, {"names": NAMES, "compare_layer": "encoder"}),
        ("--max-group 1", good, {"names": NAMES, "max_group": 1}),
        ("--max-x-speakers", good, {"names": NAMES, "max_x_speakers": 2, "speaker": "within"}),
        ("no name matches", good, {"names": "(?P<phone>[0-9])"}),
        ("is no regular expression", good, {"names": "(?P<phone>"}),
        ("--names: .* says who speaks", good, {"names": NAMES, "items": tmp_path / "far.item"}),
        ("--names: .* says who speaks", good, {"names": NAMES, "items": tmp_path / "who.csv"}),
        ("across speakers with one speaker", good, {"names": "(?P<phone>[A-Z]+)"}),
        ("no valid cell", good, {"names": "(?P<phone>.*)$", "speaker": "within"}),
        ("hold NaN", folder("nan", spoil(np.full((3, 5), np.nan, "f4"))), {"names": NAMES}),
        ("dimension|a frame", folder("wide", spoil(np.ones((3, 6), "f4"))), {"names": NAMES}),
        ("give floats", whole, {"names": NAMES}),
        ("no probabilities", good, {"names": NAMES, "distance": "kl"}),
        ("outside its", good, {"items": tmp_path / "far.item", "speaker": "within"}),
        ("no features of 'X', 'Y'", good, {"items": tmp_path / "gone.item"}),
        ("no features of", good,
         {"names": NAMES, "compare": folder("less", lambda p: (p / "B_bob_1.npy").unlink())}),
        ("no such folder", good, {"textgrid": tmp_path / "none"}),
        ("holds no .phn", good, {"phn": made / "good"}),
        ("holds no runs", good, {"merge": True}),
    ]  # fmt: skip
    for message, features, options in cases:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(InputError, match=message) as error:
            abx(features, out=tmp_path / "out", **options)
        assert "\n" not in str(error.value)
        assert sorted(tmp_path.iterdir()) == before
