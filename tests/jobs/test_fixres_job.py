import json

import numpy as np
import pytest
import timm
import torch
from timm.data import resolve_model_data_config

from remanence.errors import InputError
from remanence.jobs.learn.classifier import classifier
from remanence.jobs.learn.fixres import fixres
from remanence.kit.models import open_network
from remanence.kit.predictions import Predictions
from remanence.learn.fixres import MultiResolution


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "base"
    classifier("digits", out=out, model="cifar_convnet5", size=16, epochs=2, flip=0.0, limit=400)
    return out


@pytest.fixture(scope="module")
def fixed(base):
    real = base.parent / "real.json"
    real.write_text(json.dumps([[i % 10, (i + 1) % 10] if i % 7 else [] for i in range(360)]))
    return fixres(
        "digits",
        model=[str(base / "model")],
        out=base.parent / "fixed",
        sizes=[12, 16, 20],
        tune_sizes=[16, 20],
        scope=["classifier+last_bn", "bn_stats", "equalize", "classifier"],
        crop_pct=[1.0],
        epochs=1,
        flip=0.0,
        limit=400,
        fuse="logits",
        real=real,
        also=["again=digits@test"],
        paired_with=base / "predictions.parquet",
    )


def test_every_setting_is_judged(fixed):
    rows = fixed.results["candidates"]
    settings = {(r["scope"], r["size"], r["crop_pct"]) for r in rows}
    assert len(rows) == len(settings) == 3 * 2 + 4 * 2
    assert fixed.results["images"] == 360
    assert all(r["interval_95"][0] <= r["accuracy"] <= r["interval_95"][1] for r in rows)
    for row, correct in zip(rows, fixed.correct, strict=True):
        assert correct.mean() == pytest.approx(row["accuracy"])


def test_the_choice_is_made_on_the_selection_images_only(fixed):
    rows = fixed.results["candidates"]
    chosen = rows[fixed.results["chosen"]]
    assert chosen["accuracy_selection"] == max(r["accuracy_selection"] for r in rows)
    assert fixed.results["selection_images"] == 40  # a tenth of the 400 training images


def test_scope_none_at_the_train_size_is_the_network_as_it_was(base, fixed):
    # A9 item 8, through the whole job: the same predictions as the classifier made.
    before = Predictions.read(base / "predictions.parquet")
    after = Predictions.read(fixed.out / "predictions_base.parquet")
    assert before.ids == after.ids
    assert np.array_equal(before.top5, after.top5)
    assert np.array_equal(before.p1, after.p1)
    assert fixed.results["paired_with"]["accuracy_base"] == before.accuracy


def test_timm_opens_the_chosen_network_with_its_test_size(fixed):
    model = timm.create_model(f"local-dir:{fixed.out / 'model'}", pretrained=True).eval()
    config = resolve_model_data_config(model, use_test_size=True)
    assert tuple(config["input_size"]) == (3, fixed.size, fixed.size)
    assert tuple(resolve_model_data_config(model)["input_size"]) == (3, 16, 16)
    ours = open_network(str(fixed.out / "model"))
    x = torch.randn(2, 3, fixed.size, fixed.size)
    with torch.no_grad():
        assert torch.equal(model(x), ours.model(x))
    assert ours.test.size == fixed.size
    assert ours.classes == tuple("0123456789")


def test_further_test_sets_and_labels_are_reported(fixed):
    again = fixed.results["also"]["again"]
    assert again["images"] == 360
    assert again["accuracy"] == fixed.results["comparison"]["accuracy"]
    assert fixed.results["real"]["chosen"]["images"] == 360 - 52
    assert fixed.results["fused"]["sizes"] == [16, 20]


def test_the_bank_opens_again(base, fixed):
    network = open_network(str(base / "model"))
    bank = MultiResolution.load(network.model, fixed.out / "bank.safetensors")
    assert bank.sizes.tolist() == [16, 20]
    assert bank(torch.zeros(2, 3, 20, 20)).shape == (2, 10)
    with pytest.raises(InputError, match="no readable bank"):
        MultiResolution.load(network.model, base / "nothing")


def test_the_run_folder_is_whole(fixed):
    names = {p.name for p in fixed.out.iterdir()}
    assert {"run.json", "results.json", "metrics.jsonl", "report.html", "model"} <= names
    assert not [n for n in names if n.endswith((".ckpt", ".part"))]
    assert json.loads((fixed.out / "results.json").read_text()) == json.loads(
        json.dumps(fixed.results)
    )
    html = (fixed.out / "report.html").read_text()
    assert "McNemar" in html
    assert "http-equiv" not in html or "default-src" in html


def test_the_joint_search_keeps_to_the_budget(base, tmp_path):
    smaller = tmp_path / "base12"
    classifier("digits", out=smaller, model="cifar_convnet5", size=12, epochs=1, limit=200)
    common = {
        "model": [str(base / "model"), str(smaller / "model")],
        "sizes": [12, 16, 20],
        "scope": ["bn_stats"],
        "tune_sizes": [16],
        "limit": 200,
        "statistics_images": 64,
    }
    free = fixres("digits", out=tmp_path / "free", **common).results
    assert {r["train_size"] for r in free["candidates"]} == {16, 12}
    costs = sorted({r["gmacs"] for r in free["candidates"]})
    bound = fixres("digits", out=tmp_path / "bound", budget_gmacs=costs[0], **common).results
    assert bound["candidates"][bound["chosen"]]["gmacs"] <= costs[0]
    with pytest.raises(InputError, match="no candidate fits the budget; the cheapest, 12 pixels"):
        fixres("digits", out=tmp_path / "none", budget_gmacs=1e-9, **common)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "torchvision:mobilenet_v3_small", "convnext_atto"]
)
def test_other_networks(name, tmp_path):
    trained = classifier(
        "digits", out=tmp_path / "base", model=name, size=32, epochs=1, lr=0.01, limit=48
    )
    fixed = fixres(
        "digits",
        model=[str(trained.out / "model")],
        out=tmp_path / "fixed",
        sizes=[64],
        tune_sizes=[64],
        scope=["classifier+last_bn"],
        epochs=1,
        limit=48,
    )
    opened = open_network(str(fixed.out / "model"))
    assert opened.test.size == fixed.size
    with torch.no_grad():
        assert opened.model(torch.zeros(1, 3, fixed.size, fixed.size)).shape == (1, 10)


def test_any_module_will_do(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 10),
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fixed = fixres(
        "digits",
        model=[model],
        train_size=12,
        out=tmp_path / "x",
        sizes=[12, 16],
        epochs=1,
        limit=80,
    )
    assert fixed.size in (12, 16)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": ["everything"]}, "unknown; choose from none"),
        ({"sizes": [2]}, "below the stride of cifar_convnet5, 4 pixels"),
        ({"also": ["nothing"]}, "write NAME=SOURCE"),
        ({"fuse": "logits", "tune_sizes": [16]}, "two --tune-sizes or more"),
        ({"fuse": "sum"}, "choose from logits"),
        ({"epochs": 0}, "at least 1"),
        ({"batch_size": 2, "tune_sizes": [16]}, "values per channel"),
    ],
)
def test_what_cannot_work_is_refused(base, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        fixres("digits", model=[str(base / "model")], out=tmp_path / "x", limit=40, **options)
    assert not list(tmp_path.iterdir())


def test_data_of_other_classes_is_refused(base, tmp_path):
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / f"{i}.png")
    with pytest.raises(InputError, match="has 2 classes but the head of cifar_convnet5 has 10"):
        fixres(str(tmp_path / "data"), model=[str(base / "model")], out=tmp_path / "x")
    assert not (tmp_path / "x").exists()
