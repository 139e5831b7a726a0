"""Windows against torchvision's transforms and Pillow's resize."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from remanence.audit.radioactive.augment import (
    CenterCrop,
    Identity,
    PadCropFlip,
    RandomResizedCropFlip,
    Windows,
    apply,
    image_generator,
)
from remanence.errors import InputError


def generators(n: int, seed: int = 0) -> list[torch.Generator]:
    return [image_generator(seed, i) for i in range(n)]


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_batch(image: np.ndarray, n: int = 1) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).double().expand(n, -1, -1, -1)


def boxes(windows: Windows) -> list[tuple[int, int, int, int]]:
    top, left = windows.low.long().T.tolist()
    height, width = (windows.high - windows.low).long().T.tolist()
    return list(zip(top, left, height, width, strict=True))


def by_pillow(image: np.ndarray, box: tuple[int, int, int, int], size: int, *, flip: bool):
    crop = v2.functional.resized_crop(Image.fromarray(image), *box, [size, size])
    return torch.from_numpy(np.array(v2.functional.hflip(crop) if flip else crop)).permute(2, 0, 1)


@pytest.mark.parametrize("size", [24, 96])
def test_crops_are_pillows_to_one_grey_level(size: int) -> None:
    image = photo(75, 110)
    windows = RandomResizedCropFlip(size).sample((75, 110), generators(24))
    ours = apply(as_batch(image, 24), windows)
    theirs = torch.stack(
        [
            by_pillow(image, box, size, flip=bool(flip))
            for box, flip in zip(boxes(windows), windows.flip, strict=True)
        ]
    )
    assert windows.flip.any()
    assert not windows.flip.all()
    # Pillow rounds after each of its two passes, and its weights have 22 bits.
    assert (ours - theirs).abs().max() <= 1.0001


def test_without_antialiasing_crops_are_far_from_pillows() -> None:
    image = photo(75, 110)
    windows = RandomResizedCropFlip(24, (0.9, 1), antialias=False).sample((75, 110), generators(1))
    theirs = by_pillow(image, boxes(windows)[0], 24, flip=bool(windows.flip[0]))
    assert (apply(as_batch(image), windows) - theirs).abs().max() > 6


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [13, 90])
def test_weights_are_those_of_interpolate(size: int, *, antialias: bool) -> None:
    image = as_batch(photo(40, 61), 6)
    augment = RandomResizedCropFlip(size, antialias=antialias)
    windows = augment.sample((40, 61), generators(6))
    for i, (top, left, height, width) in enumerate(boxes(windows)):
        crop = image[i : i + 1, :, top : top + height, left : left + width]
        theirs = interpolate(crop, (size, size), mode="bilinear", antialias=antialias)
        theirs = theirs.flip(3) if windows.flip[i] else theirs
        torch.testing.assert_close(apply(image, windows)[i], theirs[0], atol=1e-9, rtol=0)


def test_boxes_are_drawn_like_torchvisions() -> None:
    shape, n = (40, 75), 3000
    ours = np.array(boxes(RandomResizedCropFlip(32).sample(shape, generators(n))), dtype=float)
    torch.manual_seed(0)
    blank = torch.zeros(3, *shape)
    draw = v2.RandomResizedCrop(32)
    made = [draw.make_params([blank]) for _ in range(n)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in made], dtype=float)
    for f in (
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0] + b[:, 2],
    ):
        assert ks_2samp(f(ours), f(theirs)).pvalue > 1e-3


@pytest.mark.parametrize("shape", [(33, 500), (500, 33), (34, 467)])
def test_where_no_box_fits_the_central_one_is_torchvisions(shape: tuple[int, int]) -> None:
    # Shares near 1 of a narrow image fit no ratio in range, so that every draw falls back.
    augment = RandomResizedCropFlip(32, (0.99, 1.0))
    params = v2.RandomResizedCrop(32, scale=(0.99, 1.0)).make_params([torch.zeros(3, *shape)])
    theirs = (params["top"], params["left"], params["height"], params["width"])
    assert set(boxes(augment.sample(shape, generators(8)))) == {theirs}


@pytest.mark.parametrize("shape", [(50, 71), (71, 50), (37, 113), (40, 40)])
def test_centre_is_torchvisions(shape: tuple[int, int]) -> None:
    image = photo(*shape)
    theirs = v2.Compose([v2.Resize(36), v2.CenterCrop(31)])(Image.fromarray(image))
    ours = apply(as_batch(image), CenterCrop(31, 36).plain(shape, 1))[0]
    assert (ours - torch.from_numpy(np.array(theirs)).permute(2, 0, 1)).abs().max() <= 1.0001


def test_padded_crops_are_shifts_with_a_zero_border() -> None:
    image = as_batch(photo(32, 32), 400)
    windows = PadCropFlip(32, 4).sample((32, 32), generators(400))
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    ours = apply(image, windows)
    for i in range(400):
        top, left = (windows.start[i] + 4).long().tolist()
        shift = padded[i, :, top : top + 32, left : left + 32]
        assert torch.equal(ours[i], shift.flip(2) if windows.flip[i] else shift)
    # 9 x 9 shifts and a coin, each met; the corners as often as the rest.
    shifts = (windows.start + 4).long()
    counts = torch.bincount(shifts[:, 0] * 9 + shifts[:, 1], minlength=81)
    assert shifts.min() == 0
    assert shifts.max() == 8
    assert counts.max() < 20
    assert 150 < windows.flip.sum() < 250


def test_identity_and_plain_views_change_nothing() -> None:
    image = as_batch(photo(32, 32), 2)
    assert torch.equal(apply(image, Identity().sample((32, 32), generators(2))), image)
    assert torch.equal(apply(image, PadCropFlip(32, 2).plain((32, 32), 2)), image)
    taller = as_batch(photo(40, 36), 1)
    assert torch.equal(
        apply(taller, PadCropFlip(32, 2).plain((40, 36), 1)), taller[:, :, 4:36, 2:34]
    )


@pytest.mark.parametrize(
    "augment",
    [
        RandomResizedCropFlip(5),
        RandomResizedCropFlip(5, antialias=False),
        CenterCrop(5, 6),
        PadCropFlip(7, 2),
    ],
    ids=["crop", "aliased", "centre", "pad"],
)
def test_gradient(augment) -> None:
    windows = augment.sample((9, 11), generators(2, seed=3))
    images = torch.rand(2, 1, 9, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply(x, windows), (images,))


@pytest.mark.parametrize("augment", [RandomResizedCropFlip(32), PadCropFlip(32)])
def test_an_image_draws_the_same_alone_and_in_a_batch(augment) -> None:
    together, alone = generators(5), [image_generator(0, 3)]
    for _ in range(4):
        batch = augment.sample((40, 60), together)
        single = augment.sample((40, 60), alone)
        assert torch.equal(batch.start[3], single.start[0])
        assert torch.equal(batch.high[3], single.high[0])
        assert batch.flip[3] == single.flip[0]
        # Nor do all images, or all iterations, share one crop.
        assert len(torch.unique(batch.start, dim=0)) > 1
    assert not torch.equal(augment.sample((40, 60), alone).start[0], single.start[0])


def test_streams_seeds_and_names_are_told_apart() -> None:
    seeds = {
        image_generator(*key).initial_seed()
        for key in [(0, 1), (1, 0), (0, "a"), (0, "b"), (11, 1), (1, 11), (0, 1, "fresh")]
    }
    assert len(seeds) == 7


def test_ranges_are_checked() -> None:
    with pytest.raises(InputError, match="resize of at least size"):
        CenterCrop(224, 200)
    with pytest.raises(InputError, match="shares"):
        RandomResizedCropFlip(32, (0.5, 2.0))
    with pytest.raises(InputError, match="positive"):
        RandomResizedCropFlip(32, ratio=(0.0, 2.0))
    with pytest.raises(InputError, match="size 1"):
        PadCropFlip(32, -1)
