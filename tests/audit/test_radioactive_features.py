"""What the last linear layer reads, against the same network cut by hand."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import relu

from remanence.audit.radioactive.features import FeatureExtractor
from remanence.errors import InputError


def tiny(classes: int = 10) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


@pytest.mark.parametrize(
    ("build", "dim", "head"),
    [
        (torchvision.models.resnet18, 512, "fc"),
        (lambda: timm.create_model("resnet18"), 512, "fc"),
        # Their first and their other linear layers are traps: taking off `fc` leaves logits.
        (torchvision.models.vgg11, 4096, "classifier.6"),
        (torchvision.models.densenet121, 1024, "classifier"),
        (lambda: timm.create_model("vit_tiny_patch16_224"), 192, "head"),
    ],
    ids=["torchvision resnet", "timm resnet", "vgg", "densenet", "vit"],
)
def test_head_times_features_are_the_logits(build, dim: int, head: str) -> None:
    extractor = FeatureExtractor(build())
    features, logits = extractor.features_and_logits(torch.rand(2, 3, 224, 224))
    assert features.shape == (2, dim)
    assert extractor.dim == dim
    assert features.dtype == torch.float32
    assert extractor.head is extractor.model.get_submodule(head)
    torch.testing.assert_close(extractor.head(features), logits)


def test_vgg_features_are_what_the_last_layer_reads() -> None:
    vgg = torchvision.models.vgg11().eval()
    images = torch.rand(1, 3, 64, 64)
    by_hand = vgg.classifier[:6](vgg.avgpool(vgg.features(images)).flatten(1))
    torch.testing.assert_close(FeatureExtractor(vgg, input_size=(3, 64, 64))(images), by_hand)


def test_last_linear_is_found_by_what_runs_not_by_registration_order() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, 4)
            self.body = nn.Linear(12, 5)
            self.unused = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(relu(self.body(x.flatten(1))))

    model = Crossed()
    extractor = FeatureExtractor(model, input_size=(3, 2, 2))
    assert extractor.head is model.head
    assert extractor.dim == 5


def test_a_batch_does_not_change_its_images_features_even_after_train() -> None:
    model = tiny().train()
    extractor = FeatureExtractor(model)
    assert not model.training
    extractor.train()
    model.train()
    images = torch.rand(4, 3, 16, 16)
    before = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(extractor(images)[:1], extractor(images[:1]))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_gradients_flow_to_the_images_and_not_to_the_network() -> None:
    extractor = FeatureExtractor(tiny())
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    extractor(images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in extractor.parameters())


def test_nothing_stays_hooked_to_the_model() -> None:
    model = tiny()
    FeatureExtractor(model)(torch.rand(2, 3, 16, 16))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_named_layer_is_read_before_what_follows_works_in_place() -> None:
    model = tiny()
    extractor = FeatureExtractor(model, layer="1")
    images = torch.rand(2, 3, 16, 16) - 0.5
    torch.testing.assert_close(extractor(images), model[:2](images).mean((2, 3)))
    assert extractor.head is None
    assert extractor.dim == 8


def test_half_precision_networks_give_float32_and_double_stays() -> None:
    images = torch.rand(2, 3, 16, 16)
    assert FeatureExtractor(tiny().bfloat16())(images.bfloat16()).dtype == torch.float32
    assert FeatureExtractor(tiny().double())(images.double()).dtype == torch.float64


def test_copies_read_their_own_head() -> None:
    extractor = FeatureExtractor(tiny())
    twin = copy.deepcopy(extractor)
    assert twin.head is not extractor.head
    assert set(twin.state_dict()) == {f"model.{name}" for name in extractor.model.state_dict()}


@pytest.mark.parametrize(
    ("model", "layer", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), None, "layer="),
        (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.Flatten()),
            None,
            "'1' is a 1x1 convolution",
        ),
        (tiny(), "fc", "'fc' is no module"),
        (nn.Sequential(nn.Flatten(), nn.Linear(5, 4)), None, "give input_size"),
        (nn.Sequential(nn.Flatten(2)), "0", "not features"),
    ],
    ids=["no linear", "convolution", "no module", "size", "tokens"],
)
def test_what_cannot_be_read_is_refused_with_the_mend(
    model: nn.Module, layer: str | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        FeatureExtractor(model, layer or "penultimate")
