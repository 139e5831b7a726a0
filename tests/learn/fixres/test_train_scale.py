import random

import pytest
import torch
from timm.data.transforms_factory import create_transform
from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import v2

from remanence.errors import InputError
from remanence.learn.fixres.geometry import RatioReport, apparent_size_ratio, eval_scale_factors
from remanence.learn.fixres.train_scale import train_scale_factors
from remanence.learn.fixres.transforms import CropMode, FinetuneTransform

HW = (375, 500)

COLOURS = [v1.ColorJitter(0.3, 0.3, 0.3), v1.RandomHorizontalFlip()]
PIPELINES = {
    "v1": v1.Compose([v1.RandomResizedCrop(224), *COLOURS, v1.ToTensor(), v1.Normalize(0.5, 0.5)]),
    "v2": v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(224),
            v2.RandomApply([v2.ColorJitter(0.3)], p=0.5),
            v2.ToDtype(torch.float32, scale=True),
        ]
    ),
    "nested": v1.Compose([nn.Sequential(v1.RandomResizedCrop(224), v1.RandomHorizontalFlip())]),
    "timm": create_transform(224, is_training=True, auto_augment="rand-m9", re_prob=0.2),
    "timm in three": create_transform(224, is_training=True, separate=True),
    "timm for the prefetcher": create_transform(224, is_training=True, use_prefetcher=True),
    "lanczos": create_transform(224, is_training=True, interpolation="lanczos"),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_random_resized_crop_agrees_with_the_sampler(name: str) -> None:
    factors = train_scale_factors(PIPELINES[name], HW, draws=1500, seed=3)
    report = RatioReport.of(eval_scale_factors(torch.tensor([HW]), 224) / factors)
    expected = apparent_size_ratio(
        torch.tensor([HW]), 224, 224, generator=torch.Generator().manual_seed(0)
    )
    # 1500 draws of a spread of 0.24: four standard errors.
    assert report.arithmetic == pytest.approx(expected.arithmetic, abs=0.025)
    assert report.geometric == pytest.approx(expected.geometric, abs=0.03)


def test_resize_and_random_crop_has_no_mismatch() -> None:
    # The training of facebookresearch/FixRes#19: objects are as large as at test.
    pipeline = v1.Compose([v1.Resize(256), v1.RandomCrop(224), v1.ToTensor()])
    factors = train_scale_factors(pipeline, HW, draws=5)
    # 256 x 341 pixels: the longer side is cut to an integer.
    assert factors.tolist() == pytest.approx([(256 / 375 * 341 / 500) ** 0.5] * 5)
    ratio = eval_scale_factors(torch.tensor([HW]), 224) / factors
    assert ratio.tolist() == pytest.approx([1.0] * 5, abs=0.002)


@pytest.mark.parametrize("mode", ["center", "border", "squash", "fixres_height"])
@pytest.mark.parametrize("hw", [(375, 500), (500, 375)])
def test_test_like_fine_tuning_keeps_the_test_size(mode: CropMode, hw: tuple[int, int]) -> None:
    factors = train_scale_factors(FinetuneTransform(288, crop_mode=mode), hw, draws=3)
    ratio = eval_scale_factors(torch.tensor([hw]), 288, crop_mode=mode) / factors
    assert ratio.tolist() == pytest.approx([1.0] * 3, abs=0.003)


def test_crop_padding_and_flip_do_not_scale() -> None:
    pipeline = v2.Compose([v2.Pad(4, fill=(1, 2, 3)), v2.RandomCrop(32), v2.RandomVerticalFlip()])
    assert train_scale_factors(pipeline, (32, 32), draws=4).tolist() == [1.0] * 4
    small = create_transform(224, is_training=True, train_crop_mode="rkrc")
    assert train_scale_factors(small, (100, 900), draws=4).shape == (4,)


def test_a_chance_of_resizing_gives_both_outcomes() -> None:
    pipeline = v2.RandomApply([v2.Resize((50, 50))], p=0.5)
    assert set(train_scale_factors(pipeline, (100, 100), draws=64).tolist()) == {0.5, 1.0}


def test_seed_decides_and_global_generators_stay() -> None:
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    pipeline = create_transform(224, is_training=True)
    first = train_scale_factors(pipeline, HW, draws=20, seed=1)
    assert torch.equal(first, train_scale_factors(pipeline, HW, draws=20, seed=1))
    assert not torch.equal(first, train_scale_factors(pipeline, HW, draws=20, seed=2))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


@pytest.mark.parametrize(
    ("member", "name"),
    [
        (v1.RandomPerspective(p=1.0), "RandomPerspective"),
        (v1.RandomAffine(0, scale=(0.5, 1.0)), "RandomAffine"),
        (v1.Lambda(lambda photo: photo.convert("RGB")), "Lambda"),
        (v1.TenCrop(10), "TenCrop"),
        (v1.RandomApply([v1.RandomCrop(8), v1.ColorJitter(0.1)]), "RandomApply"),
        (3, "int"),
    ],
)
def test_member_that_cannot_be_analysed_is_named(member: object, name: str) -> None:
    pipeline = [v1.Resize(32), member]
    with pytest.raises(InputError, match=name) as caught:
        train_scale_factors(pipeline, (32, 40), draws=2)
    assert "\n" not in str(caught.value)


def test_bad_counts_are_named() -> None:
    with pytest.raises(InputError, match="draws"):
        train_scale_factors(v1.Resize(8), (8, 8), draws=0)
