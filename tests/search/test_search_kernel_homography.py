import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binom

from remanence.errors import InputError
from remanence.search.kernel_descriptor.edits import edit_type
from remanence.search.kernel_descriptor.homography import (
    jacobian,
    log10_false_alarms,
    transform,
    verify,
)

SIZE = (480, 640)
VIEW = np.array([[0.9, 0.1, 20], [-0.08, 1.1, -10], [1e-4, -5e-5, 1]])


def _points(count, generator, size=SIZE):
    return generator.uniform((0, 0), (size[1], size[0]), (count, 2))


def _scene(right, wrong, seed, H=VIEW, noise=0.7):
    """Right matches of a view, then wrong ones."""
    generator = np.random.default_rng(seed)
    x = _points(right + wrong, generator)
    y = _points(right + wrong, generator)
    y[:right] = transform(H, x[:right]) + generator.normal(0, noise, (right, 2))
    return x, y


def _corner_error(H, wanted, size=SIZE):
    corners = np.array([[0, 0], [size[1], 0], [size[1], size[0]], [0, size[0]]])
    return np.hypot(*(transform(H, corners) - transform(wanted, corners)).T).max()


# --- the number of false alarms


def test_false_alarms_are_a_binomial_tail_times_the_samples():
    """Against whole-number fractions, and scipy's tail where it does not underflow."""
    for n, k, p in ((10, 6, 0.01), (100, 20, 0.001), (50, 50, 0.3), (300, 9, 0.02), (8, 4, 0.5)):
        q = Fraction(p)
        tail = sum(math.comb(n - 4, i) * q**i * (1 - q) ** (n - 4 - i) for i in range(k - 4, n - 3))
        exact = 2 * math.comb(n, 4) * tail
        wanted = (math.log(exact.numerator) - math.log(exact.denominator)) / math.log(10)
        assert log10_false_alarms(k, n, p) == pytest.approx(wanted, abs=1e-9)
        scipys = math.log10(2 * math.comb(n, 4)) + binom.logsf(k - 5, n - 4, p) / math.log(10)
        assert log10_false_alarms(k, n, p) == pytest.approx(scipys, abs=1e-6)


def test_false_alarms_do_not_underflow():
    # Nearly all of it is p^(n - 4): 9996 factors of 1e-4.
    found = log10_false_alarms(10_000, 10_000, 1e-4)
    assert found == pytest.approx(-4 * 9996 + math.log10(2 * math.comb(10_000, 4)), rel=1e-9)
    assert log10_false_alarms(4, 10, 0.1) == pytest.approx(math.log10(2 * math.comb(10, 4)))
    assert log10_false_alarms(10, 10, 1.0) == pytest.approx(math.log10(2 * math.comb(10, 4)))


def test_false_alarms_fall_with_inliers_and_rise_with_chance():
    by_inliers = [log10_false_alarms(k, 100, 0.001) for k in range(5, 100)]
    assert (np.diff(by_inliers) < 0).all()
    by_chance = [log10_false_alarms(20, 100, p) for p in np.geomspace(1e-5, 0.5, 30)]
    assert (np.diff(by_chance) > 0).all()


# --- unrelated images


def test_random_matches_are_called_unrelated():
    """None of 360 pairs; a share of false alarms of 1 % would leave one with 97 % probability."""
    highest = -math.inf
    for count in (8, 15, 30, 60, 120, 300):
        for seed in range(60):
            generator = np.random.default_rng(seed)
            found = verify(_points(count, generator), _points(count, generator), SIZE, SIZE)
            assert not found.matched
            assert found.reason
            highest = max(highest, found.score)
    assert highest < 0  # the number of false alarms is above 1


def test_random_matches_between_crowded_points_are_called_unrelated():
    """Points in few places, as on a sign in a blank picture: the uniform chance is far too low."""
    for seed in range(60):
        generator = np.random.default_rng(seed)
        places = [_points(4, generator), _points(4, generator)]
        x, y = (p[generator.integers(0, 4, 100)] + generator.normal(0, 8, (100, 2)) for p in places)
        found = verify(x, y, SIZE, SIZE)
        assert not found.matched
        assert found.score < 0


def test_many_matches_to_one_place_are_no_scene():
    generator = np.random.default_rng(0)
    x, y = _points(200, generator), _points(200, generator)
    y[:150] = generator.normal((300, 200), 1, (150, 2))
    assert not verify(x, y, SIZE, SIZE).matched
    assert not verify(y, x, SIZE, SIZE).matched
    y[:] = (300, 200)
    assert not verify(x, y, SIZE, SIZE).matched


def test_one_chance_match_many_times_is_counted_once():
    generator = np.random.default_rng(0)
    x, y = _points(30, generator), _points(30, generator)
    for chosen in range(5):
        y[chosen] = x[chosen] + 5
    single = verify(x, y, SIZE, SIZE).score
    again = np.r_[np.arange(30), np.repeat(np.arange(5), 40)]
    repeated = verify(x[again], y[again], SIZE, SIZE)
    assert repeated.score == pytest.approx(single, abs=0.5)
    assert not repeated.matched


def test_matches_along_a_line_are_no_scene():
    generator = np.random.default_rng(0)
    x, y = _points(60, generator), _points(60, generator)
    t = generator.uniform(0, 600, 40)
    x[:40], y[:40] = np.c_[t, 0 * t + 100], np.c_[t, 0 * t + 250]
    found = verify(x, y, SIZE, SIZE)
    assert not found.matched


def test_a_small_logo_is_no_scene():
    x, y = _scene(40, 40, 0, np.array([[1.0, 0, 50], [0, 1, 30], [0, 0, 1]]), noise=0.3)
    generator = np.random.default_rng(1)
    x[:40] = 200 + generator.uniform(0, 40, (40, 2))
    y[:40] = x[:40] + np.array([50, 30])
    found = verify(x, y, SIZE, SIZE)
    assert not found.matched
    assert "cover too little" in found.reason


# --- the same scene


@pytest.mark.parametrize("right", [20, 40, 100])
def test_one_right_match_in_five_is_enough(right):
    for seed in range(20):
        x, y = _scene(right, 4 * right, seed)
        found = verify(x, y, SIZE, SIZE)
        assert found.matched, found.reason
        assert found.inliers[:right].mean() > 0.95
        assert found.inliers[right:].mean() < 0.05
        assert _corner_error(found.homography, VIEW) < 4
        assert found.score > 10


def test_ten_right_matches_alone_are_enough_and_five_are_not():
    for seed in range(20):
        assert verify(*_scene(10, 0, seed), SIZE, SIZE).matched
        assert not verify(*_scene(5, 30, seed), SIZE, SIZE).matched


def test_exchanging_the_images_inverts_the_answer():
    x, y = _scene(60, 60, 0)
    one, other = verify(x, y, SIZE, SIZE), verify(y, x, SIZE, SIZE)
    assert one.matched
    assert other.matched
    assert _corner_error(other.homography, np.linalg.inv(VIEW) / np.linalg.inv(VIEW)[2, 2]) < 2
    assert (one.inliers == other.inliers).mean() > 0.98


def test_a_small_copy_is_found_either_way():
    """Noise is that of a detector in both images: a pixel of the copy is five of the original."""
    for seed in range(10):
        generator = np.random.default_rng(seed)
        x = _points(60, generator, (2400, 3200)) + generator.normal(0, 0.7, (60, 2))
        y = x / 5 + generator.normal(0, 0.7, (60, 2))
        y[30:] = _points(30, generator)
        for found in (
            verify(x, y, (2400, 3200), SIZE),
            verify(y, x, SIZE, (2400, 3200)),
        ):
            assert found.matched
            assert found.inliers[:30].mean() > 0.9


def test_a_mirrored_pair_matches_only_when_it_is_looked_for():
    mirror = np.array([[-1.0, 0, SIZE[1] - 1], [0, 1, 0], [0, 0, 1]])
    x, y = _scene(40, 40, 0, mirror)
    plain, looked = verify(x, y, SIZE, SIZE), verify(x, y, SIZE, SIZE, mirrored=True)
    assert not plain.matched
    assert looked.matched
    assert _corner_error(looked.homography, mirror) < 2
    assert edit_type(looked.homography, SIZE, SIZE).parts == ("flip",)
    assert not verify(*_scene(40, 40, 0), SIZE, SIZE, mirrored=True).matched


def test_the_answer_is_that_of_the_seed():
    x, y = _scene(30, 120, 0)
    one, other = (verify(x, y, SIZE, SIZE, seed=3) for _ in range(2))
    assert np.array_equal(one.homography, other.homography)
    assert one.score == other.score


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_too_few_matches(count):
    found = verify(*_scene(count, 0, 0), SIZE, SIZE)
    assert (found.homography, found.matched, found.reason) == (None, False, "too few matches")
    assert found.inliers.shape == (count,)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"xy_first": np.ones((3, 3))}, r"give \(K, 2\) twice"),
        ({"xy_first": np.ones((3, 2))}, r"give \(K, 2\) twice"),
        ({"xy_first": np.full((9, 2), np.nan)}, "NaN"),
        ({"size_first": (0, 5)}, "0 x 5 pixels"),
        ({"tolerance": 0.0}, "tolerance 0.0"),
        ({"confidence": 1.0}, "confidence 1.0"),
        ({"alarms": 0.0}, "alarms 0.0"),
    ],
)
def test_bad_points(changed, message):
    given = {
        "xy_first": np.ones((9, 2)),
        "xy_second": np.ones((9, 2)),
        "size_first": SIZE,
        "size_second": SIZE,
    }
    with pytest.raises(InputError, match=message):
        verify(**(given | changed))


# --- maps


def test_the_jacobian_is_that_of_finite_differences():
    xy = _points(20, np.random.default_rng(0))
    step = 1e-4
    columns = [
        (transform(VIEW, xy + d) - transform(VIEW, xy - d)) / (2 * step) for d in step * np.eye(2)
    ]
    np.testing.assert_allclose(jacobian(VIEW, xy), np.stack(columns, axis=2), atol=1e-6)


# --- edits


def _about_centre(linear, size=SIZE, to=SIZE):
    """A linear map that takes the centre of the first image to that of the second."""
    c = np.array([(size[1] - 1) / 2, (size[0] - 1) / 2])
    d = np.array([(to[1] - 1) / 2, (to[0] - 1) / 2])
    H = np.eye(3)
    H[:2, :2] = linear
    H[:2, 2] = d - H[:2, :2] @ c
    return H


def _turn(degrees):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, -s], [s, c]])


def _moved(x, y):
    return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])


FLIP = _about_centre(np.diag([-1.0, 1]))
TILT = np.array([[1.0, 0, 0], [0, 1, 0], [1e-4, 0, 1]])

EDITS = {
    "identity": (np.eye(3), SIZE),
    "shift": (_moved(12, -5), SIZE),
    "scale": (_about_centre(0.5 * np.eye(2), to=(240, 320)), (240, 320)),
    "scale crop": (_about_centre(2 * np.eye(2)), SIZE),  # zoomed in, the frame stays
    "scale border": (_about_centre(0.5 * np.eye(2)), SIZE),
    "rotation": (_about_centre(_turn(10)), SIZE),
    "rotation ": (_about_centre(_turn(90), to=SIZE[::-1]), SIZE[::-1]),
    "crop": (_moved(-100, -40), (300, 400)),
    "border": (_moved(50, 50), (580, 740)),
    "flip": (FLIP, SIZE),
    "flip rotation": (_about_centre(np.diag([1.0, -1])), SIZE),  # upside down
    "flip scale crop": (_about_centre(2 * np.eye(2)) @ FLIP, SIZE),
    "affine scale": (_about_centre(np.diag([0.5, 1.0]), to=(480, 320)), (480, 320)),
    "rotation scale": (_about_centre(0.8 * _turn(-30), to=(700, 700)), (700, 700)),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_are_named(name):
    H, size = EDITS[name]
    assert set(edit_type(H, SIZE, size).parts) == set(name.split())
    # A factor and an error far below the tolerance change nothing.
    noise = np.random.default_rng(0).normal(0, 1, (3, 3)) * [[3e-4, 3e-4, 0.2]] * 2 + [
        [0],
        [0],
        [0],
    ]
    noise[2] = 0
    assert set(edit_type(3 * (H + noise), SIZE, size).parts) == set(name.split())


def test_edits_in_numbers():
    found = edit_type(_moved(7, -3) @ _about_centre(1.5 * _turn(25)), SIZE, SIZE)
    assert found.scale == pytest.approx(1.5)
    assert found.rotation == pytest.approx(25)
    assert found.shift == pytest.approx((7, -3))
    assert found.stretch == pytest.approx(1)
    assert found.perspective == pytest.approx(0, abs=1e-9)
    found = edit_type(_moved(-100, -40), SIZE, (300, 400))
    assert found.kept == pytest.approx(300 * 400 / (480 * 640), rel=1e-5)
    assert found.covered == pytest.approx(1)
    found = edit_type(_about_centre(np.diag([2.0, 0.5])), SIZE, SIZE)
    assert (found.scale, found.stretch) == pytest.approx((1, 4))
    assert edit_type(FLIP, SIZE, SIZE).mirrored
    assert edit_type(_about_centre(_turn(25)) @ FLIP, SIZE, SIZE).rotation == pytest.approx(25)


def test_perspective_is_measured_at_the_corners():
    found = edit_type(TILT, SIZE, SIZE)
    assert "perspective" in found.parts
    corners = np.array([[0, 0], [640, 0], [640, 480], [0, 480]]) - 0.5
    centre = np.array([[319.5, 239.5]])
    affine = transform(TILT, centre) + (corners - centre) @ jacobian(TILT, centre)[0].T
    assert found.perspective == pytest.approx(
        np.hypot(*(transform(TILT, corners) - affine).T).max()
    )


@pytest.mark.parametrize(
    ("H", "message"),
    [
        (np.eye(2), "no edit|finite"),
        (np.diag([1.0, 1, 0]), "not 0"),
        (np.full((3, 3), np.nan), "finite"),
        (np.array([[1.0, 0, 0], [0, 1, 0], [-0.01, 0, 1]]), "infinity"),
        (np.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]), "infinity"),
    ],
)
def test_bad_homographies(H, message):
    with pytest.raises(InputError, match=message):
        edit_type(H, SIZE, SIZE)
