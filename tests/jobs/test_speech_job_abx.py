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
    alike = abx(
        str(made / "good"), out=made / "alike", names=NAMES, compare=str(made / "good"),
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
    with pytest.raises(InputError, match=r"1 items have no frame: .*--drop-empty"):
        abx(str(made / "good"), out=tmp_path / "x", items=tmp_path / "a.item")
    found = abx(
        str(made / "good"), out=tmp_path / "run", items=tmp_path / "a.item", drop_empty=True
    )
    for side in ("within", "across"):
        row = found.results["first"][side]
        assert (row["items"], row["items_without_frames"], row["items_in_no_cell"]) == (29, 1, 1)


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
        ("does not match", good, {"names": "(?P<phone>[0-9])"}),
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
