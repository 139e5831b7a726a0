import math

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from sklearn.datasets import load_sample_image

from remanence.errors import InputError
from remanence.search.kernel_descriptor import patches as module
from remanence.search.kernel_descriptor.frames import (
    frames_from_keypoints,
    frames_through_homography,
)
from remanence.search.kernel_descriptor.grey import grey_image
from remanence.search.kernel_descriptor.keypoints import detect_keypoints, dominant_orientation
from remanence.search.kernel_descriptor.patches import extract_patches, halve

FRAME = torch.tensor([[[8.0, 0, 40.5], [0, 8, 32.5]]], dtype=torch.float64)


def _smooth_image(height=200, width=240):
    y, x = np.mgrid[:height, :width]
    wave = np.sin(x / 13 + y / 31) + np.cos(x / 29 - y / 17) + np.sin(x * y / 4000)
    return torch.from_numpy(0.5 + 0.16 * wave)


def _photo(name="china.jpg"):
    return torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)


def _psnr(first, second):
    return -10 * math.log10(float((first - second).square().mean()))


def _points(frame, size):
    """Where the samples of a patch lie, by the definition."""
    u = (2 * np.arange(size) + 1) / size - 1
    v, u = np.meshgrid(u, u, indexing="ij")
    A, c = frame[:, :2], frame[:, 2]
    return (A @ np.stack([u.ravel(), v.ravel()]) + c[:, None]).reshape(2, size, size)


# ------------------------------------------------------------------- grey


def test_grey_is_luma():
    image = torch.tensor([[[255]], [[128]], [[3]]], dtype=torch.uint8)
    wanted = (0.299 * 255 + 0.587 * 128 + 0.114 * 3) / 255
    assert float(grey_image(image)) == pytest.approx(wanted, abs=1e-6)
    assert torch.equal(grey_image(image[:1]), torch.ones(1, 1))
    assert grey_image(torch.rand(4, 5).half()).dtype == torch.float32
    assert grey_image(torch.rand(4, 5).double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(5, 6, 3), "permute"),
        (torch.rand(2, 3, 5, 6), "shape"),
        (torch.rand(0, 6), "shape"),
        (torch.ones(5, 6, dtype=torch.int64), "uint8"),
        (255 * torch.ones(5, 6), "divide by 255"),
        (torch.full((5, 6), math.nan), "NaN"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(InputError, match=message):
        grey_image(image)


# ------------------------------------------------------------------- sampling


def test_an_aligned_frame_is_a_crop():
    image = torch.rand(64, 80, generator=torch.Generator().manual_seed(0))
    patches, inside = extract_patches(image, FRAME.float() - 0, size=16)
    torch.testing.assert_close(patches[0], image[25:41, 33:49])
    assert patches.dtype == torch.float32
    assert inside.tolist() == [True]
    whole = torch.tensor([[[40.0, 0, 39.5], [0, 32, 31.5]]])
    assert bool(extract_patches(image, whole, size=64).inside)


def test_samples_are_bilinear_where_the_frame_says():
    image = _smooth_image()
    frames = torch.tensor([[[9.0, -4.0, 100.3], [5.0, 11.0, 80.9]], [[2.0, 1, 30], [-1, 3, 20]]])
    found = extract_patches(image, frames.double(), size=24).patches
    for patch, frame in zip(found, frames.double().numpy(), strict=True):
        x, y = _points(frame, 24)
        wanted = map_coordinates(image.numpy(), [y, x], order=1)
        np.testing.assert_allclose(patch, wanted, rtol=0, atol=1e-12)


def test_the_pyramid_does_not_drift():
    image = torch.arange(67.0, dtype=torch.float64)[:, None] * 3 + torch.arange(53.0)
    for level in range(1, 4):
        image = halve(image)
        assert image.shape == (math.ceil(67 / 2**level), math.ceil(53 / 2**level))
        y, x = ((torch.arange(n) + 0.5) * 2**level - 0.5 for n in image.shape)
        wanted = 3 * y[:, None] + x
        torch.testing.assert_close(image[2:-2, 2:-2], wanted[2:-2, 2:-2].double())


def test_a_level_adds_the_variance_of_three_quarters_of_a_pixel():
    impulse = torch.zeros(41, 41, dtype=torch.float64)
    impulse[20, 20] = 1
    row = 4 * halve(impulse)
    x = (torch.arange(21) + 0.5) * 2 - 0.5
    assert float(row.sum()) == pytest.approx(1)
    # Of the taps at their distances from the two pixels that see the impulse.
    assert float((row.sum(0) * (x - 20) ** 2).sum()) == pytest.approx(0.75)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_patches_at_any_level_show_the_same_place(factor):
    size = 24
    centre = torch.tensor([[420.3, 390.7]], dtype=torch.float64)
    y, x = np.mgrid[:801, :861]
    image = torch.from_numpy(0.5 + 0.2 * np.sin(x / 70 + 0.3) + 0.2 * np.cos(y / 90))
    frames = frames_from_keypoints(centre, torch.tensor([12.0 * factor]), magnification=1)
    found = extract_patches(image, frames, size).patches[0]
    px, py = _points(frames[0].numpy(), size)
    wanted = 0.5 + 0.2 * np.sin(px / 70 + 0.3) + 0.2 * np.cos(py / 90)
    # A drift of half a pixel of the image would move values by 1e-3.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1.2e-4 * factor**2 + 1e-5)
    slope = 0.2 / 70 * np.cos(px / 70 + 0.3)
    drift = ((found.numpy() - wanted) * slope).sum() / (slope**2).sum()
    assert abs(drift) < 0.05


def test_fine_checks_under_a_large_frame_become_grey():
    y, x = torch.meshgrid(torch.arange(400), torch.arange(400), indexing="ij")
    image = ((x // 2 + y // 2) % 2).double()
    frames = frames_from_keypoints(
        torch.tensor([[200.0, 200.0]], dtype=torch.float64), torch.tensor([150.0]), magnification=1
    )
    grey = extract_patches(image, frames).patches
    moire = extract_patches(image, frames, antialias=False).patches
    assert float((grey - 0.5).abs().max()) < 0.01
    assert float(moire.std()) > 0.2


def test_a_patch_of_a_warped_image_is_the_patch():
    # The homography is an affinity, which a frame follows exactly.
    image = _smooth_image()
    H = np.array([[1.2, 0.25, -20.0], [-0.2, 1.1, 15.0], [0, 0, 1]])
    y, x = np.mgrid[:240, :280]
    sx, sy, _ = np.einsum("ij,jyx->iyx", np.linalg.inv(H), np.stack([x, y, np.ones_like(x)]))
    warped = torch.from_numpy(map_coordinates(image.numpy(), [sy, sx], order=3, mode="nearest"))
    frames = frames_from_keypoints(
        torch.tensor([[110.0, 90.0], [140.0, 120.0]], dtype=torch.float64),
        torch.tensor([4.0, 3.0]),
        torch.tensor([0.3, 2.0]),
    )
    first = extract_patches(image, frames)
    second = extract_patches(warped, frames_through_homography(frames, H))
    assert bool((first.inside & second.inside).all())
    for a, b in zip(first.patches, second.patches, strict=True):
        assert _psnr(a, b) > 45
    # A perspective is followed to first order.
    P = H + np.array([[0, 0, 0], [0, 0, 0], [3e-4, -4e-4, 0]])
    sx, sy, w = np.einsum("ij,jyx->iyx", np.linalg.inv(P), np.stack([x, y, np.ones_like(x)]))
    warped = map_coordinates(image.numpy(), [sy / w, sx / w], order=3, mode="nearest")
    second = extract_patches(torch.from_numpy(warped), frames_through_homography(frames, P))
    for a, b in zip(first.patches, second.patches, strict=True):
        assert _psnr(a, b) > 35


def test_chunks_do_not_matter(monkeypatch):
    frames = frames_from_keypoints(100 * torch.rand(9, 2) + 50, 2 + 12 * torch.rand(9))
    whole = extract_patches(_photo(), frames).patches
    monkeypatch.setattr(module, "PIXELS", 2 * 32**2)
    torch.testing.assert_close(extract_patches(_photo(), frames).patches, whole, rtol=0, atol=1e-6)


def test_no_frame_and_no_finite_frame():
    image = torch.rand(40, 50)
    patches, inside = extract_patches(image, torch.zeros(0, 2, 3), size=16)
    assert patches.shape == (0, 16, 16)
    assert inside.shape == (0,)
    assert inside.dtype == torch.bool
    frames = FRAME.repeat(3, 1, 1)
    frames[0, 0, 0] = math.nan
    frames[1, 1, 2] = math.inf
    frames[2, :, 2] = torch.tensor([-300.0, -300.0])
    patches, inside = extract_patches(image, frames)
    assert not bool(patches[:2].any())
    assert inside.tolist() == [False] * 3
    torch.testing.assert_close(patches[2], image[0, 0].expand(32, 32))  # the border, repeated


def test_bad_inputs_are_refused():
    with pytest.raises(InputError, match="pixels a side"):
        extract_patches(torch.rand(40, 50), FRAME, size=0)
    with pytest.raises(InputError, match=r"\(N, 2, 3\)"):
        extract_patches(torch.rand(40, 50), FRAME[0])


def test_patches_are_kornias_where_both_use_the_image_itself():
    feature = pytest.importorskip("kornia.feature")
    image = grey_image(_photo())
    rng = torch.Generator().manual_seed(0)
    xy = torch.rand(20, 2, generator=rng) * torch.tensor([500.0, 300.0]) + 60
    frames = frames_from_keypoints(xy, torch.ones(20), 6 * torch.rand(20, generator=rng), 15.0)
    theirs = feature.extract_patches_from_pyramid(image[None, None], frames[None], PS=32)[0, :, 0]
    torch.testing.assert_close(extract_patches(image, frames).patches, theirs, rtol=0, atol=1e-4)
    # Further up their pyramid has another filter and a finer level.
    frames = frames_from_keypoints(xy, torch.ones(20), None, 50.0)
    theirs = feature.extract_patches_from_pyramid(image[None, None], frames[None], PS=32)[0, :, 0]
    assert _psnr(extract_patches(image, frames).patches, theirs) > 25


# ------------------------------------------------------------------- key points


@pytest.mark.parametrize("sigma", [3.0, 5.0, 9.0])
def test_a_gaussian_blob_is_found_at_its_place_and_scale(sigma):
    y, x = np.mgrid[:160, :200]
    image = np.exp(-((x - 90.25) ** 2 + (y - 71.5) ** 2) / (2 * sigma**2))
    found = detect_keypoints(torch.from_numpy(0.1 + 0.8 * image), upright=True)
    assert torch.allclose(found.xy[0], torch.tensor([90.25, 71.5]), atol=0.1)
    # A difference of Gaussians is strongest on a blob 2^(1/6) as wide as its narrower one.
    assert float(found.scale[0]) == pytest.approx(sigma / 2 ** (1 / 6), rel=0.06)


def test_keypoints_are_sorted_few_and_repeatable():
    found = detect_keypoints(_photo(), most=300)
    assert [v.shape for v in found] == [(300, 2), (300,), (300,), (300,)]
    assert bool((found.response[:-1] >= found.response[1:]).all())
    again = detect_keypoints(_photo(), most=300)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    fewer = detect_keypoints(_photo(), most=50)
    assert torch.equal(fewer.xy, found.xy[:50])
    upright = detect_keypoints(_photo(), most=300, upright=True)
    assert not bool(upright.angle.any())
    places = torch.column_stack([upright.xy, upright.scale])
    assert len(torch.unique(places, dim=0)) == 300


def test_an_empty_image_has_no_keypoints():
    found = detect_keypoints(torch.full((50, 60), 0.5))
    assert [v.shape for v in found] == [(0, 2), (0,), (0,), (0,)]
    with pytest.raises(InputError, match="most"):
        detect_keypoints(torch.rand(50, 60), most=0)


def test_angle_turns_with_the_image():
    image = _photo()
    quarter = image.rot90(-1, (1, 2))  # clockwise as displayed
    first, second = detect_keypoints(image, 200), detect_keypoints(quarter, 400)
    x, y = first.xy.T
    moved = torch.stack([image.shape[1] - 1 - y, x], dim=1)
    turned = (first.angle + math.pi / 2) % (2 * math.pi)
    gap = (turned[:, None] - second.angle).abs()
    near = (torch.cdist(moved, second.xy) < 0.5) & (
        torch.minimum(gap, 2 * math.pi - gap) < math.radians(5)
    )
    assert float(near.any(dim=1).float().mean()) > 0.9


def test_orientation_turns_with_the_frame():
    image = _smooth_image()
    xy = torch.tensor([[100.0, 90.0]], dtype=torch.float64).expand(24, 2)
    turn = torch.arange(24) * (2 * math.pi / 24)
    frames = frames_from_keypoints(xy, torch.full((24,), 4.0), turn)
    angle = dominant_orientation(extract_patches(image, frames).patches)
    error = (angle + turn - angle[0] + math.pi) % (2 * math.pi) - math.pi
    assert float(error.abs().max()) < math.radians(2)


def test_orientation_of_a_ramp_is_its_direction():
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    angles = torch.tensor([0.0, 0.5, 2.0, 3.1, 4.0, 6.2])
    ramps = angles.cos()[:, None, None] * x + angles.sin()[:, None, None] * y
    found = dominant_orientation(ramps / 100)
    torch.testing.assert_close(found, angles, rtol=0, atol=0.03)
    assert dominant_orientation(torch.full((2, 8, 8), 0.3)).tolist() == [0, 0]
    assert dominant_orientation(torch.zeros(0, 8, 8)).shape == (0,)
    with pytest.raises(InputError, match="orient"):
        dominant_orientation(torch.rand(2, 8, 9))
    with pytest.raises(InputError, match="floating"):
        dominant_orientation(torch.ones(2, 8, 8, dtype=torch.uint8))


def test_orientation_agrees_with_opencvs():
    image = _photo("flower.jpg")
    found = detect_keypoints(image, 400)
    patches, inside = extract_patches(image, frames_from_keypoints(found.xy, found.scale))
    gap = (dominant_orientation(patches) - found.angle).abs()
    gap = torch.minimum(gap, 2 * math.pi - gap)[inside]
    # A point with several orientations comes with each of them.
    assert float((gap < math.radians(15)).float().mean()) > 0.7
