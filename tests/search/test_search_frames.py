import math

import cv2
import numpy as np
import pytest
import torch

from remanence.errors import InputError
from remanence.search.kernel_descriptor.frames import (
    frames_from_keypoints,
    frames_from_lafs,
    frames_from_opencv,
    frames_inside,
    frames_through_homography,
    jitter_frames,
)

H = np.array([[1.1, 0.2, -8.0], [-0.15, 0.9, 12.0], [4e-4, -7e-4, 1.0]])


def _frames(count=6, seed=0):
    rng = torch.Generator().manual_seed(seed)
    A = 12 * torch.randn(count, 2, 2, generator=rng, dtype=torch.float64)
    centre = 300 * torch.rand(count, 2, 1, generator=rng, dtype=torch.float64)
    return torch.cat([A, centre], dim=2)


def _project(points, homography=H):
    mapped = np.concatenate([points, np.ones_like(points[..., :1])], -1) @ homography.T
    return mapped[..., :2] / mapped[..., 2:]


def _noise(level, count=20000):
    """The map that `jitter_frames` puts before frames that are themselves alike."""
    A = torch.tensor([[3.0, 1.0], [-2.0, 4.0]], dtype=torch.float64)
    frames = torch.cat([A, torch.tensor([[5.0], [7.0]])], dim=1).expand(count, 2, 3)
    moved = jitter_frames(frames, level, seed=3)
    inverse = torch.linalg.inv(A)
    return inverse @ moved[:, :, :2], inverse @ (moved - frames)[:, :, 2:]


def test_frame_of_a_keypoint_turns_x_towards_y():
    xy, scale = torch.tensor([[10.0, 20.0], [3.0, 4.0]]), torch.tensor([2.0, 1.5])
    frames = frames_from_keypoints(xy, scale, torch.tensor([math.pi / 2, 0.0]))
    wanted = torch.tensor([[[0, -10, 10], [10, 0, 20]], [[7.5, 0, 3], [0, 7.5, 4]]])
    torch.testing.assert_close(frames, wanted, rtol=0, atol=1e-6)
    upright = frames_from_keypoints(xy, scale, magnification=1)
    torch.testing.assert_close(upright[0], torch.tensor([[2.0, 0, 10], [0, 2, 20]]))


def test_opencv_sizes_are_diameters_and_angles_degrees():
    points = [cv2.KeyPoint(30.5, 40.25, 8.0, 90.0), cv2.KeyPoint(1.0, 2.0, 6.0)]  # angle -1: none
    wanted = frames_from_keypoints(
        torch.tensor([[30.5, 40.25], [1, 2]]),
        torch.tensor([4.0, 3]),
        torch.tensor([math.pi / 2, 0]),
    )
    torch.testing.assert_close(frames_from_opencv(points), wanted)
    upright = frames_from_opencv(points, magnification=1, upright=True)
    torch.testing.assert_close(upright[0, :, :2], 4 * torch.eye(2))
    assert frames_from_opencv([]).shape == (0, 2, 3)
    with pytest.raises(InputError, match="extent"):
        frames_from_opencv([cv2.KeyPoint(1.0, 2.0, 0.0)])


def test_lafs_are_frames():
    frames = _frames()
    torch.testing.assert_close(frames_from_lafs(frames[None]), frames)
    larger = frames_from_lafs(frames, magnification=3)
    torch.testing.assert_close(larger[:, :, 2], frames[:, :, 2])
    torch.testing.assert_close(larger[:, :, :2], 3 * frames[:, :, :2])


@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_shape_through_a_homography_is_its_jacobian_by_finite_differences(factor):
    frames = _frames()
    moved = frames_through_homography(frames, factor * H).numpy()
    centre = frames[:, :, 2].numpy()
    np.testing.assert_allclose(moved[:, :, 2], _project(centre), rtol=1e-12)
    for axis in (0, 1):
        step = 1e-6 * frames[:, :, axis].numpy()
        slope = (_project(centre + step) - _project(centre - step)) / 2e-6
        np.testing.assert_allclose(moved[:, :, axis], slope, rtol=1e-6, atol=1e-6)


def test_a_similarity_gives_a_similarity_frame():
    frames = frames_from_keypoints(
        torch.tensor([[50.0, 60.0]], dtype=torch.float64), torch.tensor([3.0]), torch.tensor([0.4])
    )
    c, s = 1.7 * math.cos(0.3), 1.7 * math.sin(0.3)
    moved = frames_through_homography(frames, torch.tensor([[c, -s, 5], [s, c, -9], [0, 0, 1]]))
    wanted = frames_from_keypoints(
        torch.tensor([[c * 50 - s * 60 + 5, s * 50 + c * 60 - 9]], dtype=torch.float64),
        torch.tensor([1.7 * 3.0]),
        torch.tensor([0.7]),
    )
    torch.testing.assert_close(moved, wanted, rtol=1e-6, atol=1e-5)


def test_there_and_back_is_where_it_was():
    frames = _frames()
    back = frames_through_homography(frames_through_homography(frames, H), np.linalg.inv(H))
    torch.testing.assert_close(back, frames)


def test_a_centre_on_the_horizon_becomes_nan_and_is_not_inside():
    frames = _frames(2).float()
    frames[0, :, 2] = torch.tensor([100.0, 7.0])
    moved = frames_through_homography(
        frames, torch.tensor([[1.0, 0, 0], [0, 1, 0], [-0.01, 0, 1.0]], dtype=torch.float64)
    )
    assert moved.dtype == torch.float32
    # 0.01 as float64 times 100 is 1 to the last bit
    assert bool(moved[0].isnan().all())
    assert not bool(frames_inside(moved, 10**9, 10**9)[0])


def test_inside_is_the_area_of_the_pixels():
    half = 5.0
    centres = [(4.5, 4.5), (14.5, 24.5), (4.4, 9), (9, 4.4), (14.6, 9), (9, 24.6), (math.nan, 9)]
    xy = torch.tensor(centres, dtype=torch.float64)
    frames = frames_from_keypoints(xy, torch.ones(7), magnification=half)
    assert frames_inside(frames, 30, 20).tolist() == [True, True] + 5 * [False]
    turned = frames_from_keypoints(
        torch.tensor([[10.0, 10.0]]), torch.ones(1), torch.tensor([math.pi / 4]), 10.4
    )
    assert not bool(frames_inside(turned, 21, 21))  # its corners are at 10 - 14.7
    assert bool(frames_inside(turned, 26, 26)) is False
    assert bool(frames_inside(turned + torch.tensor([[0, 0, 5.0], [0, 0, 5]]), 31, 31))


@pytest.mark.parametrize(("level", "factor"), [("easy", 0.5), ("medium", 1), ("hard", 2)])
def test_noise_has_the_stated_spread(level, factor):
    M, shift = _noise(level)
    scales = M.square().sum(1).sqrt().log()  # of the columns: R diag(scales)
    angle = torch.atan2(M[:, 1, 0], M[:, 0, 0])
    for values, sigma in (
        (angle, math.radians(10)),
        (scales[:, 0], 0.12),
        (scales[:, 1], 0.12),
        (shift[:, 0, 0], 0.06),
        (shift[:, 1, 0], 0.06),
    ):
        assert float(values.std()) == pytest.approx(factor * sigma, rel=0.03)
        assert abs(float(values.mean())) < 0.03 * factor * sigma
    assert float((M[:, :, 0] * M[:, :, 1]).sum(1).abs().max()) < 1e-9  # no shear


def test_noise_follows_its_seed():
    frames = _frames()
    assert torch.equal(jitter_frames(frames, seed=1), jitter_frames(frames, seed=1))
    assert not torch.equal(jitter_frames(frames, seed=1), jitter_frames(frames, seed=2))


def test_no_frames_stay_none():
    none = torch.zeros(0, 2, 3)
    assert frames_through_homography(none, H).shape == (0, 2, 3)
    assert jitter_frames(none).shape == (0, 2, 3)
    assert frames_inside(none, 5, 5).shape == (0,)
    assert frames_from_keypoints(torch.zeros(0, 2), torch.zeros(0)).shape == (0, 2, 3)


def test_bad_inputs_are_refused():
    with pytest.raises(InputError, match="give \\(N, 2\\) centres"):
        frames_from_keypoints(torch.zeros(3, 2), torch.ones(2))
    with pytest.raises(InputError, match="extent"):
        frames_from_keypoints(torch.zeros(3, 2), torch.tensor([1.0, 0, 1]))
    with pytest.raises(InputError, match=r"\(N, 2, 3\)"):
        frames_inside(torch.zeros(2, 3), 5, 5)
    with pytest.raises(InputError, match=r"\(3, 3\)"):
        frames_through_homography(_frames(), torch.eye(2))
    with pytest.raises(InputError, match="easy, medium, hard"):
        jitter_frames(_frames(), "tough")
