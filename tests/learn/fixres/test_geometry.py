import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from remanence.errors import InputError
from remanence.learn.fixres.geometry import (
    RatioReport,
    apparent_size_ratio,
    equalising_test_size,
    eval_scale_factors,
    recommend_test_size,
    sample_crop_boxes,
    sigma_moments,
)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_default_sigma_is_the_papers() -> None:
    moments = sigma_moments()
    assert moments.arithmetic == pytest.approx(0.708241, abs=1e-6)
    assert moments.arithmetic * 256 / 224 == pytest.approx(0.809418, abs=1e-6)
    assert moments.inverse == pytest.approx(1.559038, abs=1e-6)
    assert moments.geometric == pytest.approx(0.676931, abs=1e-6)
    assert moments.minimum == pytest.approx(0.282843, abs=1e-6)
    assert moments.harmonic == pytest.approx(1 / 1.559038, abs=1e-6)


@pytest.mark.parametrize(
    ("a", "mean"), [(0.2, 0.7588), (0.25, 0.7778), (0.35, 0.8133), (0.5, 0.8619)]
)
def test_sigma_of_other_ranges(a: float, mean: float) -> None:
    assert sigma_moments((a, 1.0)).arithmetic == pytest.approx(mean, abs=5e-5)


@settings(max_examples=30, deadline=None)
@given(a=st.floats(0.0, 1.0), width=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_sigma_agrees_with_monte_carlo(a: float, width: float, seed: int) -> None:
    b = a + width
    square = torch.rand(100_000, generator=gen(seed), dtype=torch.float64) * width + a
    sigma = square.sqrt()
    moments = sigma_moments((a, b))
    # Five standard errors: 30 examples of three statistics must not fail by chance.
    for sample, closed in (
        (sigma, moments.arithmetic),
        (sigma.log(), math.log(moments.geometric)),
        (1 / sigma, moments.inverse),
    ):
        error = sample.std().item() / math.sqrt(len(sample))
        if a > 1e-3:  # below, 1 / sigma has no usable standard error
            assert abs(sample.mean().item() - closed) < 5 * error
    assert moments.arithmetic == pytest.approx(2 / 3 * (b**1.5 - a**1.5) / (b - a), rel=1e-9)


@given(a=st.floats(0.01, 2.0))
def test_sigma_of_a_single_area_is_its_root(a: float) -> None:
    moments = sigma_moments((a, a))
    for value in (moments.arithmetic, moments.geometric, moments.harmonic, moments.minimum):
        assert value == pytest.approx(math.sqrt(a), rel=1e-12)


@pytest.mark.parametrize("hw", [(400, 400), (300, 400), (600, 200)])
def test_sampler_is_torchvisions(hw: tuple[int, int]) -> None:
    n = 30_000
    ours = sample_crop_boxes(torch.tensor([hw]).expand(n, 2), generator=gen()).double()
    torch.manual_seed(1)
    photo = torch.empty(3, *hw, device="meta")
    draw = RandomResizedCrop.get_params
    theirs = torch.tensor(
        [draw(photo, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)], dtype=torch.float64
    )
    for column in range(4):
        assert ks_2samp(ours[:, column].numpy(), theirs[:, column].numpy()).pvalue > 0.01
    sigma = [(boxes[:, 2] * boxes[:, 3]).sqrt().numpy() for boxes in (ours, theirs)]
    assert ks_2samp(*sigma).pvalue > 0.01


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=40),
    a=st.floats(0.01, 1.0),
    seed=st.integers(0, 99),
)
def test_boxes_lie_inside_their_photos(sizes: list[tuple[int, int]], a: float, seed: int) -> None:
    HW = torch.tensor(sizes)
    top, left, h, w = sample_crop_boxes(HW, scale=(a, 1.0), generator=gen(seed)).unbind(1)
    assert bool((top >= 0).all())
    assert bool((left >= 0).all())
    assert bool((h >= 1).all())
    assert bool((w >= 1).all())
    assert bool((top + h <= HW[:, 0]).all())
    assert bool((left + w <= HW[:, 1]).all())


def test_boxes_fall_back_as_torchvision_does() -> None:
    # Areas above the photo's never fit: only the central fallback is left.
    sizes = [(100, 1000), (1000, 100), (100, 110)]
    boxes = sample_crop_boxes(torch.tensor(sizes), scale=(5.0, 6.0), generator=gen())
    for hw, box in zip(sizes, boxes.tolist(), strict=True):
        photo = torch.empty(3, *hw, device="meta")
        expected = RandomResizedCrop.get_params(photo, [5.0, 6.0], [3 / 4, 4 / 3])
        assert box == list(expected)


@pytest.mark.parametrize(
    ("hw", "means"),
    [
        ((500, 500), (0.761, 0.730, 0.695)),
        ((375, 500), (0.840, 0.805, 0.767)),
        ((500, 375), (0.840, 0.805, 0.767)),
        ((400, 600), (0.847, 0.814, 0.779)),
        ((360, 640), (0.857, 0.829, 0.799)),
        ((400, 800), (0.868, 0.841, 0.813)),
    ],
)
def test_ratio_at_224(hw: tuple[int, int], means: tuple[float, float, float]) -> None:
    report = apparent_size_ratio(torch.tensor([hw]), 224, 224, generator=gen())
    assert (report.arithmetic, report.geometric, report.harmonic) == pytest.approx(means, abs=0.005)
    assert report.quantiles[0.05] < report.quantiles[0.5] < report.quantiles[0.95]


def test_ratio_uses_the_integer_resize_and_the_exact_crop() -> None:
    # One area, one aspect, one shape: rho is a single number that can be written down.
    report = apparent_size_ratio(
        torch.tensor([[400, 600]]), 96, 96, scale=(0.5, 0.5), aspect=(1.0, 1.0), draws=50
    )
    side = round(math.sqrt(0.5 * 400 * 600))
    expected = 109 / 96 * side / 400  # 96 / 0.875 = 109.7: the transform resizes to 109
    assert report.arithmetic == pytest.approx(expected, rel=1e-12)
    assert report.harmonic == pytest.approx(expected, rel=1e-12)
    assert report.quantiles[0.5] == pytest.approx(expected, rel=1e-12)


def test_more_draws_than_photos_count_every_photo_alike() -> None:
    sizes = torch.tensor([[400, 400], [100, 400]])
    report = apparent_size_ratio(
        sizes, 224, 224, scale=(0.25, 0.25), aspect=(1.0, 1.0), draws=1000, generator=gen()
    )
    square, wide = 256 / 224 * 200 / 400, 256 / 224 * 100 / 100
    assert report.arithmetic == pytest.approx((square + wide) / 2, rel=1e-12)


def test_eval_scale_factors_by_crop_mode() -> None:
    sizes = torch.tensor([[300, 400], [400, 300]])
    expected = {
        "center": [256 / 300, 256 / 300],
        "border": [256 / 400, 256 / 400],
        "squash": [256 / math.sqrt(120_000)] * 2,
        "fixres_height": [256 / 300, 256 / 400],
    }
    for mode, factors in expected.items():
        got = eval_scale_factors(sizes, 224, crop_mode=mode)  # type: ignore[arg-type]  # a literal
        assert got.tolist() == pytest.approx(factors)


def test_recommended_size_of_the_paper() -> None:
    assert equalising_test_size(224, stat="arithmetic") == pytest.approx(224 / 0.809418, abs=1e-3)
    assert recommend_test_size(224, stat="arithmetic") == 288
    assert recommend_test_size(224) == 288
    # The 280 of the paper, from a ratio of 0.80, rounds to the same.
    assert recommend_test_size(224, multiple_of=8, stat="arithmetic") in {272, 280}


def test_recommended_size_equalises_on_photos() -> None:
    sizes = torch.tensor([[375, 500], [500, 375], [333, 500]])
    exact = equalising_test_size(224, sizes=sizes, generator=gen())
    assert exact == pytest.approx(279, abs=2)
    report = apparent_size_ratio(sizes, 224, round(exact), generator=gen(1))
    assert report.geometric == pytest.approx(1, abs=0.005)
    assert recommend_test_size(224, sizes=sizes, generator=gen()) == 288
    # Resizing to more and cropping less away shrinks objects: the size must grow.
    whole = equalising_test_size(224, sizes=sizes, crop_pct=1.0, generator=gen())
    assert whole == pytest.approx(exact / 0.875, rel=1e-9)


def test_recommended_size_is_at_least_one_stride() -> None:
    assert recommend_test_size(4) == 32


def test_report_of_known_ratios() -> None:
    report = RatioReport.of(torch.tensor([0.5, 2.0]))
    assert report.arithmetic == 1.25
    assert report.geometric == pytest.approx(1)
    assert report.harmonic == pytest.approx(0.8)


def test_bad_input_is_named() -> None:
    sizes = torch.tensor([[10, 10]])
    with pytest.raises(InputError, match="sizes"):
        sample_crop_boxes(torch.tensor([[10.0, 10.0]]))
    with pytest.raises(InputError, match="below 1"):
        sample_crop_boxes(torch.tensor([[0, 10]]))
    with pytest.raises(InputError, match="scale"):
        sample_crop_boxes(sizes, scale=(1.0, 0.5))
    with pytest.raises(InputError, match="aspect"):
        sample_crop_boxes(sizes, aspect=(0.0, 0.5))
    with pytest.raises(InputError, match="scale"):
        sigma_moments((math.nan, 1.0))
    with pytest.raises(InputError, match="crop_pct"):
        eval_scale_factors(sizes, 224, crop_pct=0.0)
    with pytest.raises(InputError, match="crop_mode"):
        eval_scale_factors(sizes, 224, crop_mode="middle")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(InputError, match="draws"):
        apparent_size_ratio(sizes, 224, 224, draws=0)
    with pytest.raises(InputError, match="train size"):
        apparent_size_ratio(sizes, 0, 224)
    with pytest.raises(InputError, match="stat"):
        equalising_test_size(224, stat="median")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(InputError, match="multiple_of"):
        recommend_test_size(224, multiple_of=0)
    with pytest.raises(InputError, match="ratios"):
        RatioReport.of(torch.tensor([]))
