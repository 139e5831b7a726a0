import json
import math

import pytest
import timm
import torch
from torch import nn
from torchvision.models import resnet18, resnet50
from torchvision.models.detection import maskrcnn_resnet50_fpn

from remanence.compress.planning.plan import LayerPlan, Plan, plan
from remanence.compress.planning.recipe import RECIPES
from remanence.compress.planning.size import size
from remanence.errors import InputError

# Parameters, then MiB: float32, small blocks as the paper counts and as filed, large blocks.
TIMM = {
    "resnet18": (11_689_512, 44.59, 1.54, 1.50, 1.01, 0.98),
    "resnet34": (21_797_672, 83.15, 2.71, 2.66, 1.72, 1.67),
    "resnet50": (25_557_032, 97.49, 5.09, 4.97, 3.19, 3.06),
    "resnet101": (44_549_160, 169.94, 8.62, 8.40, 5.26, 5.04),
    "resnet152": (60_192_808, 229.62, 11.56, 11.25, 7.03, 6.72),
    "resnext50_32x4d": (25_028_904, 95.48, 6.32, 6.17, 3.82, 3.67),
    "wide_resnet50_2": (68_883_240, 262.77, 10.98, 10.83, 6.16, 6.01),
    "vgg16_bn": (138_365_992, 527.82, 8.96, 8.91, 5.26, 5.21),
    "densenet121": (7_978_856, 30.44, 2.40, 2.22, 2.10, 1.92),
    "regnety_016": (11_202_430, 42.73, 3.09, 2.96, 2.32, 2.20),
    "mobilenetv2_100": (3_504_872, 13.37, 1.34, 1.15, 1.13, 0.93),
    "mobilenetv3_large_100": (5_483_032, 20.92, 1.91, 1.67, 1.48, 1.24),
    "efficientnet_b0": (5_288_548, 20.17, 2.29, 1.84, 1.92, 1.48),
    "efficientnet_b3": (12_233_232, 46.67, 5.04, 4.13, 4.03, 3.11),
    "convnext_tiny": (28_589_128, 109.06, 8.36, 7.60, 5.16, 4.41),
    "convnext_base": (88_591_464, 337.95, 25.13, 23.11, 14.96, 12.94),
    "deit_tiny_patch16_224": (5_717_416, 21.81, 2.25, 1.84, 1.71, 1.30),
    "deit_small_patch16_224": (22_050_664, 84.12, 6.93, 6.10, 4.49, 3.67),
    "vit_base_patch16_224": (86_567_656, 330.23, 23.88, 22.23, 13.85, 12.20),
    "swin_tiny_patch4_window7_224": (28_288_354, 107.91, 7.23, 7.05, 4.06, 3.88),
}
MIB = 2**20


def on_meta(build, *args, **kwargs):
    with torch.device("meta"):
        return build(*args, **kwargs).eval()


@pytest.mark.parametrize("name", TIMM)
def test_every_standard_network_has_its_tabled_size(name):
    model = on_meta(timm.create_model, name)
    sizes = []
    for recipe in ("small", "large"):
        # The table gives the two basic ResNets the paper's 2,048 codewords for the classifier.
        head = {"head": {"codewords": 2048}} if name in {"resnet18", "resnet34"} else {}
        planned = plan(model, {"base": recipe} | head)
        assert len(planned.layers) + len(planned.kept) > 10
        sizes += [size(model, planned, "paper").total, size(model, planned, "file").tensors]
    assert sum(p.numel() for p in model.parameters()) == TIMM[name][0]
    found = [4 * TIMM[name][0] / MIB, *(s / MIB for s in sizes)]
    assert found == pytest.approx(TIMM[name][1:], abs=0.0051)


@pytest.mark.parametrize(
    ("build", "recipe", "clamp", "total"),
    [
        (resnet18, "resnet18-small", "paper", 1_615_904),
        (resnet18, "resnet18-small", "official", 1_615_904),
        (resnet18, "resnet18-large", "paper", 1_079_328),
        (resnet50, "resnet50-small", "paper", 5_339_296),
        (resnet50, "resnet50-small", "official", 5_338_144),
        (resnet50, "resnet50-large", "paper", 3_339_872),
        (resnet50, "resnet50-large", "official", 3_338_784),
        (resnet50, "resnet50-semisupervised", "paper", 5_458_080),
        (resnet50, "resnet50-semisupervised", "official", 5_456_928),
    ],
)
def test_the_papers_networks_have_the_papers_bytes(build, recipe, clamp, total):
    model = on_meta(build)
    assert size(model, plan(model, recipe, clamp=clamp), "paper").total == total


def test_the_parts_of_the_papers_resnet18():
    model = on_meta(resnet18)
    counted = size(model, plan(model, "resnet18-small"), "paper")
    assert (counted.codes, counted.codebooks, counted.other) == (1_439_616, 96_256, 80_032)
    assert counted.ratio == pytest.approx(28.94, abs=0.005)


def test_mask_rcnn_is_the_papers_6_65_megabytes():
    model = on_meta(maskrcnn_resnet50_fpn, weights=None, weights_backbone=None)
    counted = size(model, plan(model, "mask-rcnn", clamp="official"), "paper")
    assert counted.total / MIB == pytest.approx(6.645, abs=0.0005)
    assert counted.ratio == pytest.approx(25.5, abs=0.05)
    counted = size(model, plan(model, "mask-rcnn"), "paper")
    assert counted.total / MIB == pytest.approx(6.646, abs=0.0005)


def test_the_authors_worked_example():
    layer = nn.Sequential(nn.Conv2d(3, 128, 3), nn.Conv2d(128, 128, 3))
    (planned,) = plan(layer).layers
    assert (planned.code_bytes, planned.codebook_bytes) == (16 * 1024, 4.5 * 1024)


def blocks_of(model, recipe="small", **options):
    return {layer.name: layer.block for layer in plan(model, recipe, **options).layers}


def test_first_head_and_roles_come_from_the_network_not_from_names():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.zz = nn.Conv2d(3, 64, 3)
            self.deep = nn.Conv2d(64, 64, 3, groups=64)
            self.point = nn.Conv2d(64, 128, 1)
            self.up = nn.ConvTranspose2d(128, 64, 2)
            self.mid = nn.Linear(64, 64)
            self.aa = nn.Linear(64, 1000)
            self.words = nn.Embedding(100, 16)

    planned = plan(Backwards(), "large")
    assert {layer.name: (layer.block, layer.codewords) for layer in planned.layers} == {
        "point": (8, 256),
        "up": (8, 256),
        "mid": (8, 128),
        "aa": (4, 1024),
    }
    assert {kept.name: kept.reason for kept in planned.kept} == {
        "zz": "first",
        "deep": "depthwise",
        "words": "embedding",
    }


def test_timms_names_win_and_follow_a_replaced_head():
    model = on_meta(timm.create_model, "resnet18")
    model.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 2000, device="meta"))
    model.extra = nn.Linear(512, 512, device="meta")
    codewords = {layer.name: layer.codewords for layer in plan(model).layers}
    assert codewords["fc.1"] == 1024
    assert codewords["extra"] == 256
    headless = on_meta(timm.create_model, "vit_tiny_patch16_224", num_classes=0)
    assert {layer.codewords for layer in plan(headless).layers} == {256}


@pytest.mark.parametrize(
    ("channels", "small", "large"), [(5, 5, 5), (10, 2, 2), (9, 3, 9), (49, 7, 7), (1009, 1, 1)]
)
def test_an_odd_row_gets_the_nearest_block_and_says_so(channels, small, large):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(channels, 512, 1), nn.Linear(4, 4))
    for recipe, expected in (("small", small), ("large", large)):
        layer = plan(model, recipe).layers[0]
        assert (layer.name, layer.block) == ("1", expected)
        assert "do not divide" in layer.note
    model[1] = nn.Conv2d(5, 64, 3)
    assert blocks_of(model, "large") == {"1": 9}


def test_nothing_is_dropped_and_tiny_layers_say_why():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(4, 7), nn.Linear(64, 64), nn.Linear(8, 8))
    planned = plan(model)
    assert {kept.name: kept.reason for kept in planned.kept} == {
        "0": "first",
        "1": "7 blocks are too few for two codewords",
    }
    assert {layer.name for layer in planned.layers} == {"2", "3"}
    assert {row["layer"] for row in planned.table()} == {"0", "1", "2", "3"}


def test_table_rows_add_up_to_the_papers_accounting():
    model = on_meta(resnet18)
    planned = plan(model)
    rows = {row["layer"]: row for row in planned.table()}
    counted = size(model, planned, "paper")
    quantised = [rows[layer.name]["bytes"] for layer in planned.layers]
    assert sum(quantised) == counted.codes + counted.codebooks
    assert rows["conv1"]["bytes"] == 2 * 64 * 3 * 49
    assert rows["layer1.0.conv1"]["bits_per_weight"] == pytest.approx(
        8 * (64 * 64 + 256 * 9 * 2) / (64 * 64 * 9)
    )


def test_keep_takes_names_modules_and_patterns():
    model = on_meta(resnet18)
    everything = set(blocks_of(model))
    assert set(blocks_of(model, keep=["layer1.0.conv1"])) == everything - {"layer1.0.conv1"}
    assert not any(name.startswith("layer4.") for name in blocks_of(model, keep=["layer4"]))
    left = blocks_of(model, keep=[r"re:.*\.conv2"])
    assert left
    assert not any(name.endswith("conv2") for name in left)
    with pytest.raises(InputError, match="no layer is called 'layer9'; there are"):
        plan(model, keep=["layer9"])
    with pytest.raises(InputError, match="no layer is called 'layer'"):
        plan(model, keep=["layer"])
    with pytest.raises(InputError, match="not a regular expression"):
        plan(model, keep=["re:("])


def test_a_recipe_is_plain_data_and_a_plan_gives_its_recipe():
    model = on_meta(resnet18)
    recipe = {
        "base": "large",
        "depthwise": {"channels": 1, "codewords": 16},
        "layers": {"conv1": {"codewords": 64}, r"re:layer4\..*": {"channels": 4}, "fc": "keep"},
    }
    planned = plan(model, json.loads(json.dumps(recipe)))
    by_name = {layer.name: layer for layer in planned.layers}
    assert (by_name["conv1"].block, by_name["conv1"].codewords) == (49, 32)
    assert by_name["layer4.0.conv1"].block == 36
    assert by_name["layer3.0.conv1"].block == 18
    assert [kept.name for kept in planned.kept] == ["fc"]
    again = plan(model, json.loads(json.dumps(planned.recipe())))
    stripped = [(layer.name, layer.block, layer.codewords) for layer in planned.layers]
    assert [(layer.name, layer.block, layer.codewords) for layer in again.layers] == stripped


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("tiny", "recipe 'tiny' is unknown: give one of small, large"),
        ({"base": "tiny"}, "recipe 'tiny' is unknown"),
        ({"heads": "keep"}, "'heads' is unknown; it may hold base, layers, first"),
        ({"head": "drop"}, 'give "keep" or'),
        ({"head": {"d": 4}}, 'give "keep" or'),
        ({"head": {}}, 'give "keep" or'),
        ({"head": {"channels": 2.5}}, "whole numbers"),
        ({"head": {"channels": 0}}, "whole numbers"),
        ({"head": {"codewords": 100}}, "power of two"),
        ({"head": {"codewords": 2**17}}, "power of two"),
        ({"layers": ["conv1"]}, "layers as a mapping"),
        ({"layers": {"conv9": "keep"}}, "no layer is called 'conv9'"),
        ({"layers": {"re:.*": "keep"}}, "keeps every layer"),
    ],
)
def test_a_bad_recipe_is_refused_in_one_line(recipe, message):
    with pytest.raises(InputError, match=message) as error:
        plan(on_meta(resnet18), recipe)
    assert "\n" not in str(error.value)


def test_other_bad_input():
    with pytest.raises(InputError, match="no convolution"):
        plan(nn.ReLU())
    with pytest.raises(InputError, match="clamp 'loose'"):
        plan(on_meta(resnet18), clamp="loose")
    planned = plan(on_meta(resnet18))
    with pytest.raises(InputError, match="the plan is for another network"):
        size(on_meta(resnet50), planned)
    with pytest.raises(InputError, match="accounting 'disk'"):
        size(on_meta(resnet18), planned, "disk")


def test_shared_weights_are_planned_and_counted_once():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False))
    model[2].weight = model[0].weight
    planned = plan(model)
    assert [layer.name for layer in planned.layers] == ["0"]
    counted = size(model, planned, "paper")
    assert counted.other == 0
    assert counted.uncompressed == 4 * 64 * 64


def test_every_recipe_names_blocks_of_several_weights():
    for name in RECIPES:
        model = on_meta(maskrcnn_resnet50_fpn, weights=None, weights_backbone=None)
        if "resnet" in name:
            model = on_meta(resnet18 if "18" in name else resnet50)
        assert all(layer.block > 1 for layer in plan(model, name).layers)


def test_codes_of_odd_widths_are_rounded_up_once():
    model = nn.Sequential(nn.Linear(12, 11))
    layer = plan(model, {"linear": {"channels": 4, "codewords": 8}, "head": {"codewords": 8}})
    (planned,) = layer.layers
    assert (planned.blocks, planned.bits) == (33, 3)
    assert planned.code_bytes == math.ceil(99 / 8)
    assert isinstance(layer, Plan)
    assert isinstance(planned, LayerPlan)
