"""`remanence audit layers` on a network that was trained, by plain torch and timm, to overfit."""

import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score

from remanence import cli
from remanence.errors import InputError
from remanence.jobs.audit.layers import layers

SIZE = 16
CENTRES = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def draw(n, seed):
    """Blobs around four faint centres: classes can be learnt, and each image remembered."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    coarse = 0.35 * CENTRES[labels] + 0.65 * torch.rand(n, 3, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear").mul(255).byte(), labels


def write(path, images, labels):
    def png(image):
        stream = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, "PNG")
        return {"bytes": stream.getvalue(), "path": None}

    table = {"image": [png(image) for image in images], "label": labels.tolist()}
    pq.write_table(pa.table(table), path)
    return str(path)


def train(folder, images, labels, steps=60):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    x = (images / 255 - 0.5) / 0.25
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randperm(len(x))[:100]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[rows]), labels[rows]).backward()
        optimizer.step()
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    pretrained = {
        "input_size": [3, SIZE, SIZE],
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "num_classes": 4,
    }
    config = {"architecture": "test_resnet", "num_classes": 4, "pretrained_cfg": pretrained}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    sets = {
        name: draw(150, seed)
        for seed, name in enumerate(
            ("members", "nonmembers", "public", "shadow_members", "shadow_nonmembers"), start=10
        )
    }
    return {
        "model": train(root / "net", *sets["members"]),
        "shadow": train(root / "shadow_net", *sets["shadow_members"], steps=25),
        **{name: write(root / f"{name}.parquet", *given) for name, given in sets.items()},
        "sets": sets,
        "root": root,
    }


def usual(world):
    return {name: world[name] for name in ("model", "members", "nonmembers", "public")}


@pytest.fixture(scope="module")
def found(world):
    return layers(out=world["root"] / "found", **usual(world))


def test_depth_reveals_what_the_input_does_not(found):
    aucs = [each["auc"] for each in found.results["layers"]]
    assert found.results["layers"][0]["layer"] == "input"
    assert aucs[0]["low"] < 0.5 < aucs[0]["high"]
    assert aucs[-1]["low"] > 0.5
    assert found.evidence.verdict == "detected"
    control = found.evidence.checks[0]
    assert control.holds is True
    assert "input" in control.assumption
    assert any(
        "blind classifier tells members from non-members" in c.finding
        for c in found.evidence.checks
    )


def test_the_head_is_left_out_unless_it_is_named(world, found, tmp_path):
    names = [each["layer"] for each in found.results["layers"]]
    assert "fc" not in names
    assert names[-1].startswith("layer4")
    named = layers(out=tmp_path / "x", **usual(world), layer=["layer1", "fc"], float16=True)
    assert [each["layer"] for each in named.results["layers"]] == ["input", "layer1", "fc"]
    assert "layer fc" in named.evidence.question


def test_the_scores_give_the_figures(found):
    table = pq.read_table(found.out / "scores.parquet").to_pydict()
    member = np.array(table["set"]) == "member"
    assert member.sum() == 150
    for each in found.results["layers"]:
        auc = roc_auc_score(member, table[f"score_{each['layer']}"])
        assert auc == pytest.approx(each["auc"]["value"])


def test_the_folder_is_whole(found):
    names = {p.name for p in found.out.iterdir()}
    assert names == {"run.json", "results.json", "report.html", "scores.parquet"}
    html = (found.out / "report.html").read_text()
    for words in ("Depth profile", "depth (0 is the input)", "Does it grow with depth?"):
        assert words in html
    assert "andidates and references" not in html


@pytest.mark.parametrize("protocol", ["classifier", "transfer"])
def test_the_other_protocols_run(world, tmp_path, protocol):
    shadow = {n: world[n] for n in ("shadow", "shadow_members", "shadow_nonmembers")}
    result = layers(
        out=tmp_path / "x",
        **usual(world),
        protocol=protocol,
        **(shadow if protocol == "transfer" else {}),
        layer=["layer1", "layer4"],
        shadow_layer=["layer1", "layer4"] if protocol == "transfer" else None,
    )
    assert result.profile.protocol == protocol
    assert len(result.results["layers"]) == 3


def test_members_of_another_source_give_no_verdict(world, tmp_path):
    images, labels = world["sets"]["members"]
    dark = write(tmp_path / "dark.parquet", (images * 0.6).byte(), labels)
    result = layers(out=tmp_path / "x", **(usual(world) | {"members": dark}))
    assert result.evidence.verdict == "not interpretable"


def test_images_in_two_sets_are_refused_and_counted(world, tmp_path):
    images, labels = world["sets"]["members"]
    public = world["sets"]["public"]
    mixed = write(
        tmp_path / "mixed.parquet",
        torch.cat((public[0], images[:5])),
        torch.cat((public[1], labels[:5])),
    )
    with pytest.raises(InputError, match="5 of 150 members images are also public images"):
        layers(out=tmp_path / "x", **(usual(world) | {"public": mixed}))
    assert [p.name for p in tmp_path.iterdir()] == ["mixed.parquet"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": ["layer5"]}, "layer 'layer5' is not in the backbone: give one of ['layer"),
        ({"layer": ["fc", "fc"]}, "--layer: give each name once"),
        ({"protocol": "transfer"}, "--protocol transfer: give --shadow, --shadow-members"),
        ({"shadow": "x"}, "--shadow: is for --protocol transfer"),
        ({"limit": 12}, "give at least 30 images of members; there are 12"),
        ({"model": "nowhere"}, "nowhere"),
        ({"members": "nowhere"}, "nowhere: no such file or folder"),
    ],
)
def test_bad_options_are_refused_in_one_line(world, tmp_path, options, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        layers(out=tmp_path / "x", **(usual(world) | options))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_single_public_class_is_refused(world, tmp_path):
    images, _ = world["sets"]["public"]
    public = write(tmp_path / "one.parquet", images, torch.zeros(len(images), dtype=torch.int64))
    with pytest.raises(InputError, match="the public images are all of one class"):
        layers(out=tmp_path / "x", **(usual(world) | {"public": public}))


def test_sets_of_other_classes_are_refused(world, tmp_path):
    images, labels = world["sets"]["public"]
    for kind, names in (("a", ("cat", "dog")), ("b", ("cat", "fox"))):
        for i, (image, label) in enumerate(zip(images[:80], labels, strict=False)):
            place = tmp_path / kind / names[int(label) % 2]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{kind}{i}.png")
    sets = {"public": str(tmp_path / "a"), "members": str(tmp_path / "b")}
    with pytest.raises(InputError, match=r"have different classes \(dog, fox\)"):
        layers(out=tmp_path / "x", **(usual(world) | sets))


def test_the_command_has_the_options_of_the_function(world, tmp_path, monkeypatch, capsys):
    job = ("remanence.jobs.audit.layers:layers", "help")
    monkeypatch.setitem(cli.COMMANDS, ("audit", "layers"), job)
    words = f"--model {world['model']} --members {world['members']} --nonmembers"
    words += f" {world['members']} --public {world['public']} --layer layer1"
    assert cli.main(["audit", "layers", *words.split(), "--out", str(tmp_path / "x")]) == 2
    assert "150 of 150 members images are also nonmembers" in capsys.readouterr().err
