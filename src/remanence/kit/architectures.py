"""Small networks for 32-pixel images, added to timm's registry.

timm's own networks divide the side by 32, which leaves nothing of such an image. After this module
is imported, `timm.create_model("cifar_resnet20")` works like any other name.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "classifier": "fc",
    }


default_cfgs = generate_default_cfgs(
    {
        name: _cfg()
        for name in ("cifar_resnet20", "cifar_resnet56", "cifar_convnet5", "cifar_mobilenet")
    }
)


class _Net(nn.Module):
    """What timm asks of a classifier: features, pooling, head."""

    features: nn.Module
    num_classes: int
    num_features: int
    head_hidden_size: int

    def _finish(self, width: int, num_classes: int) -> None:
        self.num_features = self.head_hidden_size = width
        self.num_classes = num_classes
        self.feature_info = [{"num_chs": width, "reduction": 4, "module": "features"}]
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:  # noqa: ARG002  # timm's signature
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, C, H/4, W/4)
        out: Tensor = self.features(x)
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        z: Tensor = self.pool(x).flatten(1)
        return z if pre_logits else self.fc(z)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class _Block(nn.Module):
    """Basic block with a parameter-free shortcut (option A of arXiv 1512.03385, section 4.2)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.added = width - width_in

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.added:
            before = self.added // 2
            shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, before, self.added - before))
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        result: Tensor = self.act(out + shortcut)
        return result


class CifarResNet(_Net):
    """The residual network for CIFAR-10 of arXiv 1512.03385, section 4.2: depth 6n + 2."""

    def __init__(self, depth: int = 20, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        width_in = 16
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            for number in range((depth - 2) // 6):
                blocks.append(_Block(width_in, width, stride if number == 0 else 1))
                width_in = width
        self.features = nn.Sequential(
            nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            *blocks,
        )
        self._finish(64, num_classes)


class CifarConvNet(_Net):
    """Five 3x3 convolutions with batch norm, total stride 4, global average pooling."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = in_chans
        for after, stride in (
            (width, 1),
            (2 * width, 2),
            (2 * width, 1),
            (4 * width, 2),
            (4 * width, 1),
        ):
            layers += [
                nn.Conv2d(before, after, 3, stride, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
            before = after
        self.features = nn.Sequential(*layers)
        self._finish(before, num_classes)


class CifarMobileNet(_Net):
    """Depthwise-separable convolutions ended by a 1x1 `conv_head`, as EfficientNets are."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(in_chans, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.SiLU(inplace=True),
        ]
        before = width
        for after, stride in ((2 * width, 2), (2 * width, 1), (4 * width, 2), (4 * width, 1)):
            layers += [
                nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False),
                nn.BatchNorm2d(before),
                nn.SiLU(inplace=True),
                nn.Conv2d(before, after, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.SiLU(inplace=True),
            ]
            before = after
        self.features = nn.Sequential(*layers)
        self.conv_head = nn.Conv2d(before, 6 * width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(6 * width)
        self.act2 = nn.SiLU(inplace=True)
        self._finish(6 * width, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:  # noqa: D102  # as above
        out: Tensor = self.act2(self.bn2(self.conv_head(self.features(x))))
        return out


def _build(cls: type[_Net], name: str, pretrained: bool, **kwargs: Any) -> _Net:
    model: _Net = build_model_with_cfg(cls, name, pretrained, **kwargs)
    return model


@register_model  # type: ignore[untyped-decorator]  # timm ships no types
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> _Net:
    """ResNet-20 for 32-pixel images (arXiv 1512.03385, section 4.2), 0.27 M parameters."""
    return _build(CifarResNet, "cifar_resnet20", pretrained, **{"depth": 20, **kwargs})


@register_model  # type: ignore[untyped-decorator]  # timm ships no types
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> _Net:
    """ResNet-56 for 32-pixel images (arXiv 1512.03385, section 4.2), 0.86 M parameters."""
    return _build(CifarResNet, "cifar_resnet56", pretrained, **{"depth": 56, **kwargs})


@register_model  # type: ignore[untyped-decorator]  # timm ships no types
def cifar_convnet5(pretrained: bool = False, **kwargs: Any) -> _Net:
    """Five convolutions with batch norm, total stride 4; quick enough for two CPU cores."""
    return _build(CifarConvNet, "cifar_convnet5", pretrained, **kwargs)


@register_model  # type: ignore[untyped-decorator]  # timm ships no types
def cifar_mobilenet(pretrained: bool = False, **kwargs: Any) -> _Net:
    """Depthwise-separable network with total stride 4, in the manner of an EfficientNet."""
    return _build(CifarMobileNet, "cifar_mobilenet", pretrained, **kwargs)
