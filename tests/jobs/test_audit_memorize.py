"""`remanence audit memorize` on embedded digits with a tiny network."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from remanence import cli
from remanence.audit.dejavu import stored_bits
from remanence.errors import InputError
from remanence.jobs.audit import memorize as job
from remanence.jobs.audit.memorize import memorize

SMALL = {
    "model": "cifar_convnet5",
    "size": 8,
    "images": 400,
    "steps": 60,
    "batch_size": 32,
    "positives": [10, 40],
    "transform": ["none", "flip+shift"],
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return memorize("digits", out=tmp_path_factory.mktemp("runs") / "m", **SMALL)


def row_of(found, transform, n):
    return next(r for r in found.settings if (r["transform"], r["n"]) == (transform, n))


def test_a_small_set_is_stored_and_a_large_one_under_shifts_is_not(found):
    assert len(found.settings) == 4
    accuracies = [
        row_of(found, *key)["clean"]["balanced_accuracy"]["value"]
        for key in (("none", 10), ("flip+shift", 40))
    ]
    assert accuracies[0] > 0.9
    assert accuracies[0] > accuracies[1] + 0.1


def test_the_bits_follow_from_the_rates(found):
    row = row_of(found, "none", 10)
    bits = stored_bits(
        10, row["pool"], row["clean"]["tpr"]["value"], 1 - row["clean"]["tnr_seen"]["value"]
    )
    assert row["stored_bits"] == pytest.approx(min(bits, row["yardsticks"]["set_bits"]))
    assert row["bits_per_parameter"] == row["stored_bits"] / found.results["parameters"]
    # One logit as the difference of two outputs: the classifier has two rows of weights.
    assert found.results["parameters"] == row["parameters"]


def test_what_is_never_shown_is_a_quarter(found):
    assert found.results["unseen"] == found.results["pool"] // 4
    assert all(row["unseen"] == found.results["unseen"] for row in found.settings)
    assert all(row["pool"] <= 300 for row in found.settings)


def test_the_folder_is_whole(found):
    names = {p.name for p in found.out.iterdir()}
    assert names == {"run.json", "results.json", "metrics.jsonl", "report.html"}
    assert json.loads((found.out / "results.json").read_text()) == json.loads(
        json.dumps(found.results)
    )
    html = (found.out / "report.html").read_text()
    for words in ("unseen out", "Bloom filter", "perceptron", "Transformed images", "<svg"):
        assert words in html


def test_an_interrupted_run_goes_on_behind_the_last_setting(found, tmp_path, monkeypatch):
    calls, fit = [], job.fit_memorizer

    def counted(*args, **kwargs):
        calls.append(kwargs["seed"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr(job, "fit_memorizer", counted)
    with pytest.raises(KeyboardInterrupt):
        memorize("digits", out=tmp_path / "x", **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["x.partial"]
    again = memorize("digits", out=tmp_path / "x", resume=True, **SMALL)
    assert len(calls) == 5  # 2 done, the third twice, the fourth
    assert again.settings == found.settings


def test_seeds_draw_other_sets_and_weights():
    torch.manual_seed(0)
    weights = [next(job._OneLogit("cifar_convnet5", 8).parameters()) for _ in range(2)]
    assert not torch.equal(*weights)
    torch.manual_seed(0)
    assert torch.equal(next(job._OneLogit("cifar_convnet5", 8).parameters()), weights[0])


def test_the_capacity_is_searched_where_asked(tmp_path):
    found = memorize(
        "digits",
        out=tmp_path / "x",
        model="cifar_convnet5",
        size=8,
        images=200,
        positives=[10],
        steps=2,
        batch_size=16,
        seeds=2,
        capacity=True,
        target=0.99,
    )
    assert {row["seed"] for row in found.settings} == {0, 1}
    curve = found.results["capacity"]["none"]
    assert curve["largest_held"] == 0  # two steps store nothing
    assert len(curve["points"][0]["balanced_accuracies"]) == 2
    assert "Capacity" in (tmp_path / "x" / "report.html").read_text()


def test_images_that_repeat_are_left_out(tmp_path):
    random = np.random.default_rng(0)
    shades = [int(v) for v in random.integers(0, 255, 60)] * 2
    from io import BytesIO

    from PIL import Image

    def png(shade, place):
        image, stream = Image.new("RGB", (8, 8)), BytesIO()
        image.putpixel((place % 8, place // 8), (shade, 9, 9))
        image.save(stream, "PNG")
        return {"bytes": stream.getvalue(), "path": None}

    table = {"image": [png(s, i % 60) for i, s in enumerate(shades)], "label": [0] * 120}
    pq.write_table(pa.table(table), tmp_path / "pool.parquet")
    found = memorize(
        str(tmp_path / "pool.parquet"),
        out=tmp_path / "x",
        size=8,
        positives=[5],
        steps=1,
        batch_size=4,
    )
    assert found.results["pool"] == 60
    assert found.results["repeated_images_left_out"] == 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positives": [10, 150]}, "--positives 150: the pool shows 300 different images"),
        ({"positives": [0]}, "--positives 0"),
        ({"positives": [10, 10]}, "--positives: give each value once"),
        ({"batch_size": 31}, "--batch-size 31: give an even number"),
        ({"transform": ["spin"]}, "--transform spin: unknown; give one of none, flip"),
        ({"target": 0.5}, "--target 0.5"),
        ({"seeds": 0}, "--seeds 0: must be at least 1"),
        ({"steps": 0}, "--steps 0"),
        ({"model": "cifar_convnet6"}, "did you mean cifar_convnet5"),
        ({"unseen": 400}, "the pool shows 0 different images"),
        ({"size": 2}, "--size 2: below the stride"),
    ],
)
def test_bad_options_are_refused_before_any_training(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(job, "fit_memorizer", None)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        memorize("digits", out=tmp_path / "x", **(SMALL | options))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_command_has_the_options_of_the_function(tmp_path, monkeypatch, capsys):
    target = ("remanence.jobs.audit.memorize:memorize", "help")
    monkeypatch.setitem(cli.COMMANDS, ("audit", "memorize"), target)
    words = "digits --positives 900 --positives 5 --transform flip --size 8"
    assert cli.main(["audit", "memorize", *words.split(), "--out", str(tmp_path / "x")]) == 2
    assert "--positives 900: the pool shows" in capsys.readouterr().err
    assert cli.main(["audit", "memorize", "--help"]) == 0
    assert "--capacity" in capsys.readouterr().out
