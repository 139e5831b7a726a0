import pickle
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms_factory import create_transform
from torchvision import transforms as v1

from remanence.errors import InputError
from remanence.learn.fixres.transforms import (
    CropMode,
    EvalTransform,
    FinetuneTransform,
    resize_size,
)

MODES = get_args(CropMode)
SIDES = st.integers(1, 160)


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    # No black pixel, so that black is padding.
    return Image.fromarray(rng.integers(1, 256, (height, width, 3), dtype=np.uint8))


PAPER_SIZES = {
    64: 73, 96: 109, 128: 146, 160: 182, 176: 201, 192: 219, 224: 256, 256: 292, 288: 329,
    320: 365, 384: 438, 448: 512, 480: 548, 512: 585, 576: 658, 600: 685, 632: 722, 680: 777,
    800: 914,
}  # fmt: skip


def test_resize_sizes_of_the_paper() -> None:
    assert {K: resize_size(K) for K in PAPER_SIZES} == PAPER_SIZES
    assert all(resize_size(K) == int((256 / 224) * K) for K in range(1, 4097))


def test_resize_size_for_other_crop_pct_is_timms() -> None:
    assert [resize_size(288, pct) for pct in (1.0, 0.95, 0.9)] == [288, 303, 320]
    assert EvalTransform(288, 0.95).resize_size == 303
    assert FinetuneTransform(288, 0.95).resize_size == 303


@settings(max_examples=100, deadline=None)
@given(height=SIDES, width=SIDES, K=st.integers(1, 96), bicubic=st.booleans())
def test_center_is_torchvisions(height: int, width: int, K: int, bicubic: bool) -> None:
    name = "bicubic" if bicubic else "bilinear"
    image = photo(height, width)
    theirs = v1.Compose(
        [
            v1.Resize(int((256 / 224) * K), v1.InterpolationMode(name)),
            v1.CenterCrop(K),
            v1.PILToTensor(),
        ]
    )
    ours = EvalTransform(K, interpolation=name)(image)
    assert ours.dtype == torch.uint8
    assert ours.shape == (3, K, K)
    assert torch.equal(ours, theirs(image))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(8, 160),
    width=st.integers(8, 160),
    K=st.integers(24, 96),
    pct=st.sampled_from([0.875, 0.9, 0.95, 1.0]),
    mode=st.sampled_from(["center", "squash", "border"]),
)
def test_modes_are_timms(height: int, width: int, K: int, pct: float, mode: CropMode) -> None:
    theirs = create_transform(K, crop_pct=pct, crop_mode=mode, normalize=False)
    image = photo(height, width)
    assert torch.equal(EvalTransform(K, pct, mode)(image), theirs(image))


@settings(max_examples=60, deadline=None)
@given(height=st.integers(16, 160), width=st.integers(16, 160), K=st.integers(16, 96))
def test_fixres_height_is_a_height_resize_with_black_padding(
    height: int, width: int, K: int
) -> None:
    K_img = int((256 / 224) * K)
    image = photo(height, width)
    resized = np.asarray(
        image.resize((max(1, int(K_img * width / height)), K_img), Image.Resampling.BILINEAR)
    )
    canvas = np.zeros((K_img, max(K, resized.shape[1]), 3), np.uint8)
    pad = (canvas.shape[1] - resized.shape[1]) // 2
    canvas[:, pad : pad + resized.shape[1]] = resized
    top, left = round((K_img - K) / 2), round((canvas.shape[1] - K) / 2)
    expected = canvas[top : top + K, left : left + K].transpose(2, 0, 1)
    assert np.array_equal(EvalTransform(K, crop_mode="fixres_height")(image).numpy(), expected)


def black_share(pixels: torch.Tensor) -> float:
    return (pixels.sum(dim=0, dtype=torch.int64) == 0).float().mean().item()


def test_only_fixres_height_pads_portraits() -> None:
    portrait = photo(400, 300)
    padded = EvalTransform(224, crop_mode="fixres_height")(portrait)
    assert black_share(padded) == pytest.approx(0.143, abs=5e-4)
    assert black_share(EvalTransform(224)(portrait)) == 0


def test_a_crop_larger_than_the_photo_enlarges_it() -> None:
    for mode in MODES:
        for image in (photo(1, 1), photo(2, 90), photo(90, 2)):
            assert EvalTransform(64, crop_mode=mode)(image).shape == (3, 64, 64)
            assert FinetuneTransform(64, crop_mode=mode)(image).shape == (3, 64, 64)


def columns(height: int, width: int) -> Image.Image:
    """A photo whose red is its column and whose green is its row."""
    rows, cols = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([cols, rows, np.zeros_like(rows)], axis=2))


@pytest.mark.parametrize(
    ("mode", "hw", "axis"),
    [
        ("center", (32, 60), 0),
        ("center", (60, 32), 1),
        ("center", (32, 32), 0),
        ("fixres_height", (32, 60), 0),
    ],
)
def test_shift_runs_along_the_longer_axis(mode: CropMode, hw: tuple[int, int], axis: int) -> None:
    # K_img is 32, so nothing is resampled and pixels tell where they came from.
    image, K = columns(*hw), 28
    ends = {
        shift: EvalTransform(K, crop_mode=mode, shift=shift)(image) for shift in (-1.0, 0.0, 1.0)
    }
    span = hw[1] if axis == 0 else hw[0]
    assert ends[-1.0][axis].min() == 0
    assert ends[0.0][axis].min() == round((span - K) / 2)
    assert ends[1.0][axis].max() == span - 1
    other = 1 - axis
    assert len({tuple(view[other].sum(dim=other).tolist()) for view in ends.values()}) == 1


def test_shift_with_odd_slack_stays_inside() -> None:
    image = columns(32, 31 + 28)  # slack 31: the centre rounds to 16, and 16 + 16 is outside
    view = EvalTransform(28, crop_mode="fixres_height", shift=1.0)(image)
    assert (int(view[0].min()), int(view[0].max())) == (31, 58)


def test_fixed_portraits_have_no_room_to_shift() -> None:
    views = [EvalTransform(64, crop_mode="fixres_height", shift=s) for s in (-1.0, 0.0, 1.0)]
    first, *rest = [view(photo(200, 100)) for view in views]
    assert all(torch.equal(first, other) for other in rest)


def draws(transform: FinetuneTransform, image: Image.Image, n: int) -> set[bytes]:
    torch.manual_seed(0)
    return {transform(image).numpy().tobytes() for _ in range(n)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hw", [(32, 37), (41, 32), (32, 32)])
def test_calls_without_jitter_are_exactly_the_variants(mode: CropMode, hw: tuple[int, int]) -> None:
    image = photo(*hw)
    transform = FinetuneTransform(28, crop_mode=mode, jitter=0)
    outcomes = draws(transform, image, 400)
    for variant in transform.variants():
        assert variant(image).numpy().tobytes() in outcomes
    # As many places as pixels of margin, and the variants are all there is.
    resized = EvalTransform(28, crop_mode=mode).resize(image)
    every = transform.variants(
        2 * max(EvalTransform(28, crop_mode=mode).margins(*resized.size)) + 1
    )
    assert outcomes <= {variant(image).numpy().tobytes() for variant in every}


def test_shift_is_drawn_with_a_uniform_length() -> None:
    image = columns(32, 36)  # margin 4: t = 0 with 1/5, each of +-1 .. +-4 with 1/10
    transform = FinetuneTransform(28, hflip=0, jitter=0)
    torch.manual_seed(0)
    lefts = [int(transform(image)[0].min()) for _ in range(3000)]
    counts = np.bincount(lefts, minlength=9) / 3000
    assert counts == pytest.approx([0.1] * 4 + [0.2] + [0.1] * 4, abs=0.03)


def test_variants_are_listed_from_the_plain_test_transform() -> None:
    transform = FinetuneTransform(64, 0.9, "border", "bicubic", fill=(1, 2, 3))
    plain = EvalTransform(64, 0.9, "border", "bicubic", fill=(1, 2, 3))
    listed = transform.variants()
    assert listed[0] == plain
    assert [(view.flip, view.shift) for view in listed] == [
        (flip, shift) for flip in (False, True) for shift in (0.0, -1.0, 1.0)
    ]
    assert len(transform.variants(5)) == 10
    assert FinetuneTransform(64, shift=False).variants() == [
        EvalTransform(64), EvalTransform(64, flip=True)
    ]  # fmt: skip
    assert FinetuneTransform(64, shift=False, hflip=0).variants() == [EvalTransform(64)]
    assert [view.flip for view in FinetuneTransform(64, hflip=1).variants(1)] == [True]


def test_flip_mirrors_the_resized_photo() -> None:
    image = columns(32, 32)
    plain, flipped = EvalTransform(28)(image), EvalTransform(28, flip=True)(image)
    assert torch.equal(flipped, plain.flip(2))


def test_jitter_changes_colours_and_follows_the_global_seed() -> None:
    image = photo(40, 50)
    transform = FinetuneTransform(28, shift=False, hflip=0)
    torch.manual_seed(5)
    first = transform(image)
    second = transform(image)
    torch.manual_seed(5)
    assert torch.equal(first, transform(image))
    assert not torch.equal(first, second)
    plain = EvalTransform(28)(image)
    assert not torch.equal(first, plain)
    # At 5 % the photo stays the same photo: three factors within [0.95, 1.05] of 255.
    assert (first.int() - plain.int()).abs().max() <= 40


def test_transforms_travel_to_workers() -> None:
    for transform in (EvalTransform(64), FinetuneTransform(64)):
        assert pickle.loads(pickle.dumps(transform)) == transform  # noqa: S301  # our own bytes


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_other_image_modes_are_named(mode: str) -> None:
    image = photo(8, 8).convert(mode)
    for transform in (EvalTransform(8), FinetuneTransform(8)):
        with pytest.raises(InputError, match=f"'{mode}'.*convert"):
            transform(image)


def test_bad_options_are_named() -> None:
    with pytest.raises(InputError, match="Tensor"):
        EvalTransform(8)(torch.zeros(3, 8, 8))  # type: ignore[arg-type]  # on purpose
    with pytest.raises(InputError, match="size"):
        EvalTransform(0)
    for pct in (0.0, 1.1, float("nan")):
        with pytest.raises(InputError, match="crop_pct"):
            EvalTransform(8, pct)
    with pytest.raises(InputError, match="crop_mode"):
        EvalTransform(8, crop_mode="shorter")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(InputError, match="interpolation"):
        EvalTransform(8, interpolation="smooth")
    with pytest.raises(InputError, match="shift"):
        EvalTransform(8, shift=1.5)
    with pytest.raises(InputError, match="hflip"):
        FinetuneTransform(8, hflip=2)
    with pytest.raises(InputError, match="jitter"):
        FinetuneTransform(8, jitter=-0.1)
    with pytest.raises(InputError, match="shifts"):
        FinetuneTransform(8).variants(2)
