"""The layers that spec and paper name, and networks built so that a simpler rule picks wrongly."""

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from remanence.errors import InputError
from remanence.learn.fixres.layers import (
    find_head,
    find_last_norms,
    fixed_input_size,
    forward_embedding,
    set_input_size_,
    total_stride,
)

INCEPTION = [
    f"Mixed_7c.{branch}.bn"
    for branch in (
        *("branch1x1", "branch3x3_2a", "branch3x3_2b"),
        *("branch3x3dbl_3a", "branch3x3dbl_3b", "branch_pool"),
    )
]
# Cell 11 joins five sums: 0 left + pooled x_left, 1 left + pooled x_right, 2 left + right, 3 left
# (of sum 2) + pooled x_right, 4 left (of x_left) + x_right. Only in sum 4 is conv_1x1 (x_right) on
# another path than the norm it is added to; in sum 0, conv_prev_1x1 comes before its partner.
PNASNET = [
    "cell_11.conv_1x1.bn",
    *(f"cell_11.comb_iter_{i}_left.bn_sep_2" for i in (0, 1, 2)),
    "cell_11.comb_iter_2_right.bn_sep_2",
    *(f"cell_11.comb_iter_{i}_left.bn_sep_2" for i in (3, 4)),
]


def image(side: int) -> Tensor:
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


def make(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("torchvision:"):
        options.setdefault("num_classes", 7)
        model = torchvision.models.get_model(name.partition(":")[2], **options)
    else:
        model = timm.create_model(name, num_classes=7, **options)
    assert isinstance(model, nn.Module)
    return model


@pytest.mark.parametrize(
    ("name", "side", "head", "norms", "stride"),
    [
        ("resnet18", 64, "fc", ["layer4.1.bn2"], 32),
        ("resnet50", 64, "fc", ["layer4.2.bn3"], 32),
        ("resnet18", 32, "fc", ["layer4.1.bn2"], None),  # leaves a 1x1 map
        ("efficientnet_b0", 64, "classifier", ["bn2"], 32),
        ("densenet121", 64, "classifier", ["features.norm5"], 32),
        ("regnety_002", 64, "head.fc", ["s4.b7.conv3.bn"], 32),
        ("mobilenetv2_050", 64, "classifier", ["bn2"], 32),
        ("mobilenetv3_small_050", 64, "classifier", ["blocks.5.0.bn1"], 32),
        ("mobilenetv4_conv_small_035", 64, "classifier", ["blocks.4.0.bn1"], 32),  # norm_head: 1x1
        ("inception_v3", 160, "fc", INCEPTION, 32),
        ("pnasnet5large", 96, "last_linear", PNASNET, 32),
        ("convnext_atto", 64, "head.fc", ["head.norm"], 32),
        ("test_vit", 160, "head", ["norm"], 16),
        ("resnet50_gn", 64, "fc", ["layer4.2.bn3"], 32),
        ("torchvision:resnet50", 64, "fc", ["layer4.2.bn3"], 32),
        ("torchvision:efficientnet_b0", 64, "classifier.1", ["features.8.1"], 32),
        ("torchvision:densenet121", 64, "classifier", ["features.norm5"], 32),
        ("torchvision:mobilenet_v2", 64, "classifier.1", ["features.18.1"], 32),
        ("torchvision:mobilenet_v3_small", 64, "classifier.3", ["features.12.1"], 32),
        (
            "torchvision:regnet_y_400mf",
            64,
            "fc",
            ["trunk_output.block4.block4-5.f.c.1"],
            32,
        ),
    ],
)
def test_named_models(
    name: str, side: int, head: str, norms: list[str], stride: int | None
) -> None:
    model = make(name)
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    x = image(side)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_last_norms(model, x) == norms
    found, module = find_head(model, 7, x)
    assert found == head
    assert module is model.get_submodule(head)
    if stride is not None:
        assert total_stride(model, x) == stride
        if not name.startswith("torchvision:"):
            declared: Any = model.feature_info
            assert stride == declared[-1]["reduction"]
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(tensor, state[n]) for n, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Gated(nn.Module):
    """Dead ReLU, zero weights, a norm inside a gate, an unused norm and one called first."""

    def __init__(self, *, concat: bool) -> None:
        super().__init__()
        self.concat = concat
        self.unused = nn.BatchNorm2d(4)
        self.last = nn.BatchNorm2d(4)  # registered before, runs after
        self.first = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(3, 4, 1)
        self.mix = nn.Conv2d(4, 4, 1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.fc = nn.Linear(8 if concat else 4, 7)
        for norm in (self.last, self.first):
            nn.init.zeros_(norm.weight)
            nn.init.constant_(norm.bias, -1)  # nothing passes the ReLU, and no gradient either

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(self.conv(x)).relu_()
        b = self.last(self.mix(a)).relu_()
        b = b * self.gate(b).sigmoid()
        z = torch.cat([a, b], 1) if self.concat else a + b
        logits: Tensor = self.fc(z.mean((2, 3)))
        return logits


def test_sum_keeps_the_newest_and_concatenation_keeps_all() -> None:
    assert find_last_norms(Gated(concat=False), image(8)) == ["last"]
    assert find_last_norms(Gated(concat=True), image(8)) == ["first", "last"]


def test_works_where_gradients_are_off() -> None:
    model = make("resnet18").requires_grad_(requires_grad=False)
    with torch.no_grad():
        assert find_last_norms(model, image(64)) == ["layer4.1.bn2"]


def test_no_norm_is_a_warning() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7)
    )
    with pytest.warns(UserWarning, match="no norm"):
        assert find_last_norms(model, image(8)) == []


def test_head_without_help_of_timm() -> None:
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    square = nn.Sequential(nn.Conv2d(3, 7, 1), *pool, nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 7))
    assert find_head(square, example=image(8))[0] == "5"
    conv = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 7, 1), nn.Softmax(1), nn.Flatten())
    assert find_head(conv, 7, image(8))[0] == "1"
    assert forward_embedding(conv, image(8)).shape == (1, 3)


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 7), nn.Linear(3, 7)

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean((2, 3))
        out: Tensor = self.a(z) + self.b(z)
        return out


def test_heads_that_cannot_be_found() -> None:
    for model, classes, example, message in [
        (Ensemble(), None, image(8), r"several layers.*a \(7 outputs\), b \(7 outputs\)"),
        (Ensemble(), 9, image(8), r"no layer has 9 outputs.*b \(7 outputs\)"),
        (Ensemble(), 7, None, "pass an example"),
        (make("resnet18"), 9, None, "'fc' has 7 outputs but the data has 9 classes"),
        (timm.create_model("test_resnet", num_classes=0), None, None, "no single classifier"),
        (timm.create_model("levit_128s", num_classes=7), None, None, "head_dist"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            find_head(model, classes, example)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "side"),
    [("resnet18", 64), ("mobilenetv3_small_050", 64), ("convnext_atto", 64), ("test_vit", 160)],
)
def test_embedding_is_timms_pre_logits(name: str, side: int) -> None:
    model: Any = make(name).eval()
    x = image(side).repeat(2, 1, 1, 1)
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    z = forward_embedding(model, x)
    assert torch.equal(z, expected)
    assert torch.equal(model.get_classifier()(z), model(x))


def test_embedding_of_an_unpooled_head_is_refused() -> None:
    model = make("torchvision:squeezenet1_1")
    with pytest.raises(InputError, match="pools before"):
        forward_embedding(model, image(64))


def test_strides_of_other_designs() -> None:
    assert total_stride(make("swin_tiny_patch4_window7_224"), image(224)) == 32  # NHWC, Linear
    assert total_stride(make("inception_v3"), image(299)) == 32  # unpadded: 299 -> 8
    patches = nn.Sequential(nn.Conv2d(3, 4, 14, 14), nn.AdaptiveAvgPool2d(1))
    assert total_stride(patches, image(112)) == 14


def test_input_sizes() -> None:
    vit: Any = make("test_vit", dynamic_img_size=False).eval()
    assert fixed_input_size(vit, image(160))
    assert not fixed_input_size(make("test_resnet"), image(64))
    assert not fixed_input_size(make("test_vit", dynamic_img_size=True), image(160))

    before = copy.deepcopy(vit.state_dict())
    logits = vit(image(160))
    set_input_size_(vit, 160)  # the size it has
    assert torch.equal(vit(image(160)), logits)
    set_input_size_(vit, 224)
    expected = resample_abs_pos_embed(
        before["pos_embed"], new_size=(14, 14), interpolation="bicubic"
    )
    torch.testing.assert_close(vit.pos_embed.data, expected)
    for name, tensor in vit.state_dict().items():
        assert name == "pos_embed" or torch.equal(tensor, before[name])
    assert vit(image(224)).shape == (1, 7)

    resnet = make("test_resnet")
    set_input_size_(resnet, 97)
    flat = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Flatten(), nn.Linear(64, 7))
    for model, side in [(vit, 10), (flat, 9), (make("inception_v3"), 40)]:
        with pytest.raises(InputError, match=f"cannot take {side} px") as error:
            set_input_size_(model, side)
        assert "\n" not in str(error.value)
