from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from scipy.special import iv

from remanence.errors import InputError
from remanence.search.kernel_descriptor import descriptor as module
from remanence.search.kernel_descriptor.descriptor import KernelDescriptor
from remanence.search.kernel_descriptor.gradients import gradient_fields, smooth
from remanence.search.kernel_descriptor.rotation import rotation_search
from remanence.search.kernel_descriptor.von_mises import feature_map, von_mises_coefficients

OXFORD = Path(__file__).parents[2] / "../shared/data/oxford_affine"

# The constants of the published codes, to 8 digits.
KAPPA_8 = (0.14343169, 0.26828502, 0.21979234, 0.15838885)
KAPPA_1 = (0.38214156, 0.48090413)

# What the published codes give for `_golden`: the sum of the components, then ten of them.
GOLDEN_PLACES = (0, 1, 5, 25, 75, 100, 175, 176, 184, 237)
# fmt: off
GOLDEN = {
    32: (2.283019, .240677, -.000676, .015843, -.148853, .020094, -.021979, .285198, .217039,
         .064179, -.039086),
    64: (2.175714, .238137, .003198, .015428, -.156813, .021255, -.021222, .285546, .219550,
         .057599, -.039891),
    65: (2.181973, .238109, .003253, .015559, -.156816, .021287, -.021144, .285548, .219587,
         .057477, -.039930),
}
# fmt: on


def _golden(size, dtype=torch.float64):
    u = torch.arange(size, dtype=torch.float64)[None, :] / size
    v = torch.arange(size, dtype=torch.float64)[:, None] / size
    patch = 0.5 + 0.25 * torch.sin(6 * u + 2 * v**2) + 0.2 * torch.cos(5 * u * v + 3 * v)
    return patch[None].to(dtype)


def _random(count, size, seed=0, dtype=torch.float64):
    return torch.rand(count, size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _series(difference, kappa, order):
    """The truncated kernel, from Bessel functions of another library."""
    total = (iv(0, kappa) - np.exp(-kappa)) / (2 * np.sinh(kappa)) + 0 * difference
    for i in range(1, order + 1):
        total += iv(i, kappa) / np.sinh(kappa) * np.cos(i * difference)
    return total


def _pixels(patch):
    """Weights and angles of one patch as vectors over its pixels, by scipy and atan2."""
    s = len(patch)
    taps = np.exp(-0.5 * (np.arange(-2, 3) / (1.4 * s / 64)) ** 2)
    taps /= taps.sum()
    image = correlate1d(correlate1d(patch, taps, 0, mode="nearest"), taps, 1, mode="nearest")
    padded = np.pad(image, 1, mode="edge")
    gx = padded[1:-1, :-2] - padded[1:-1, 2:]
    gy = padded[:-2, 1:-1] - padded[2:, 1:-1]
    x, y = np.meshgrid(np.linspace(-1, 1, s), np.linspace(-1, 1, s))
    rho = np.hypot(x, y) / np.sqrt(2)
    weight = np.sqrt(np.hypot(gx, gy)) * np.exp(-(rho**2))
    found = (weight, np.arctan2(gy, gx), np.arctan2(y, x), rho, x, y)
    return [values.ravel() for values in found]


def _match_kernel(first, second, kind, position=None):
    """Sum over all pairs of pixels; `position` takes the place of the truncated kernels."""
    w1, theta1, phi1, rho1, x1, y1 = _pixels(first)
    w2, theta2, phi2, rho2, x2, y2 = _pixels(second)
    polar = kind == "polar"
    k_theta, k_2, k_1 = position or (
        lambda d: _series(d, 8, 3),
        lambda d: _series(d, 8, 2),
        lambda d: _series(d, 1, 1),
    )

    def less(a, b):
        return a[:, None] - b[None, :]

    if polar:
        kernel = k_theta(less(theta1 - phi1, theta2 - phi2))
        kernel = kernel * k_2(less(phi1, phi2)) * k_2(np.pi * less(rho1, rho2))
    else:
        kernel = k_theta(less(theta1, theta2))
        kernel = kernel * k_1(np.pi / 2 * less(x1, x2)) * k_1(np.pi / 2 * less(y1, y2))
    return w1 @ kernel @ w2


def _von_mises(kappa):
    return lambda d: (np.exp(kappa * np.cos(d)) - np.exp(-kappa)) / (2 * np.sinh(kappa))


def _parts(vectors):
    return vectors[:, :175], vectors[:, 175:]


# ------------------------------------------------------------------- kernels on angles


def test_coefficients_are_the_published_constants():
    for kappa, published in ((8.0, KAPPA_8), (1.0, KAPPA_1)):
        found = von_mises_coefficients(kappa, len(published) - 1)
        torch.testing.assert_close(
            found, torch.tensor(published, dtype=torch.float64), rtol=0, atol=5e-9
        )


def test_a_large_kappa_does_not_overflow():
    found = von_mises_coefficients(2000.0, 3)
    assert bool(found.isfinite().all())
    assert bool((found > 0).all())


@pytest.mark.parametrize(("kappa", "order"), [(8.0, 3), (8.0, 2), (1.0, 1), (3.0, 6)])
def test_inner_product_of_feature_maps_is_the_truncated_kernel(kappa, order):
    a, b = 20 * torch.rand(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    coefficients = von_mises_coefficients(kappa, order)
    products = (feature_map(a, coefficients) * feature_map(b, coefficients)).sum(0)
    np.testing.assert_allclose(products, _series((a - b).numpy(), kappa, order), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kappa", "order", "error"), [(8.0, 2, 0.368), (8.0, 3, 0.210), (1.0, 1, 0.137), (8.0, 20, 0)]
)
def test_truncation_errs_by_the_stated_amount(kappa, order, error):
    d = torch.linspace(-torch.pi, torch.pi, 2001, dtype=torch.float64)
    coefficients = von_mises_coefficients(kappa, order)
    truncated = coefficients.sqrt() @ feature_map(d, coefficients)[: order + 1]
    worst = np.abs(truncated.numpy() - _von_mises(kappa)(d.numpy())).max()
    assert abs(worst - error) < (1e-6 if order == 20 else 5e-4)


# ------------------------------------------------------------------- the match kernel


@pytest.mark.parametrize("size", [8, 9, 12])
@pytest.mark.parametrize("kind", ["polar", "cartesian"])
def test_inner_product_is_the_match_kernel_over_all_pairs_of_pixels(kind, size):
    patches = _random(3, size)
    vectors = KernelDescriptor(kind=kind, normalise=False)(patches).vectors
    for i, j in ((0, 1), (1, 2), (2, 2)):
        wanted = _match_kernel(patches[i].numpy(), patches[j].numpy(), kind)
        assert float(vectors[i] @ vectors[j]) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("kind", ["polar", "cartesian"])
def test_long_series_give_the_untruncated_match_kernel(kind):
    patches = _random(2, 8)
    long = KernelDescriptor(
        kind=kind, theta=(8.0, 20), polar=(8.0, 20), cartesian=(1.0, 12), normalise=False
    )
    vectors = long(patches).vectors
    exact = (_von_mises(8), _von_mises(8), _von_mises(1))
    first, second = patches.numpy()
    wanted = _match_kernel(first, second, kind, exact)
    assert float(vectors[0] @ vectors[1]) == pytest.approx(wanted, rel=1e-6)
    # The short series differ by no more than their stated errors allow.
    short = KernelDescriptor(kind=kind, normalise=False)(patches).vectors
    worst = 3 * 0.368 if kind == "polar" else 0.210 + 2 * 0.137
    bound = worst * 1.1**2 * _pixels(first)[0].sum() * _pixels(second)[0].sum()
    assert 1e-3 * wanted < abs(float(short[0] @ short[1]) - wanted) < bound


def test_without_centrality_every_pixel_weighs_its_gradient():
    patch = _random(1, 8)
    plain = KernelDescriptor(kind="cartesian", centrality=None, normalise=False)
    s = np.linspace(-1, 1, 8)
    w, theta, _, _, x, y = _pixels(patch[0].numpy())
    w = w * np.exp((x**2 + y**2) / 2)
    psi = [
        feature_map(torch.from_numpy(a), von_mises_coefficients(kappa, order)).numpy()
        for a, kappa, order in (
            (theta, 8.0, 3),
            (np.pi / 2 * np.tile(s, 8), 1.0, 1),
            (np.pi / 2 * np.repeat(s, 8), 1.0, 1),
        )
    ]
    wanted = np.einsum("p,tp,xp,yp->txy", w, *psi).ravel()
    np.testing.assert_allclose(plain(patch).vectors[0], wanted, rtol=0, atol=1e-12)


# ------------------------------------------------------------------- golden values


@pytest.mark.parametrize("size", sorted(GOLDEN))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_values_of_the_published_codes(size, dtype):
    vector = KernelDescriptor()(_golden(size, dtype)).vectors[0].double()
    found = [float(vector.sum()), *vector[list(GOLDEN_PLACES)].tolist()]
    np.testing.assert_allclose(found, GOLDEN[size], rtol=0, atol=4e-6)


@pytest.mark.parametrize(
    ("size", "cosines"),
    [
        (32, (0.881459, 0.170347, 0.145096, 0.189813)),
        (64, (0.883781, 0.175360, 0.147332, 0.198512)),
    ],
)
def test_golden_cosines(size, cosines):
    patch = _golden(size)
    changed = (patch.mT, patch.rot90(1, (1, 2)), patch.flip(2), 1 - patch)
    vectors = KernelDescriptor()(torch.cat([patch, *changed])).vectors
    np.testing.assert_allclose(vectors[1:] @ vectors[0], cosines, rtol=0, atol=2e-6)


# ------------------------------------------------------------------- shape of the result


def test_both_parts_weigh_the_same_and_the_whole_has_length_one():
    polar, cartesian = _parts(KernelDescriptor()(_random(5, 24)).vectors)
    half = torch.full((5,), 0.5, dtype=torch.float64).sqrt()
    torch.testing.assert_close(polar.norm(dim=1), half, rtol=0, atol=1e-12)
    torch.testing.assert_close(cartesian.norm(dim=1), half, rtol=0, atol=1e-12)


def test_concatenation_holds_the_two_parts():
    patches = _random(3, 16)
    whole = KernelDescriptor(normalise=False)(patches).vectors
    for kind, part in zip(("polar", "cartesian"), _parts(whole), strict=True):
        alone = KernelDescriptor(kind=kind, normalise=False)
        torch.testing.assert_close(alone(patches).vectors, part, rtol=0, atol=1e-12)
        assert alone.dim == part.shape[1]
    assert KernelDescriptor().dim == 238


@pytest.mark.parametrize("size", [8, 24, 32, 41, 64, 65, 96])
def test_float32_equals_float64(size):
    patches = torch.cat([_random(4, size), _golden(size)])
    double, single = (KernelDescriptor()(p).vectors for p in (patches, patches.float()))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)


def test_sizes_may_alternate_in_one_descriptor():
    describe = KernelDescriptor()
    for size in (32, 41, 32, 8, 41):
        alone = KernelDescriptor()(_golden(size)).vectors
        assert torch.equal(describe(_golden(size)).vectors, alone)


def test_chunks_do_not_show(monkeypatch):
    patches = _random(11, 16)
    whole = KernelDescriptor()(patches)
    monkeypatch.setattr(module, "CPU_PIXELS", 3 * 16 * 16)
    cut = KernelDescriptor()(patches)
    torch.testing.assert_close(cut.vectors, whole.vectors, rtol=0, atol=1e-14)
    assert torch.equal(cut.valid, whole.valid)


def test_large_patches_get_the_whole_gaussian():
    size = 128
    spike = torch.zeros(1, size, size, dtype=torch.float64)
    spike[0, 64, 64] = 1
    row = smooth(spike)[0, 64]
    taps = torch.exp(-0.5 * (torch.arange(-9, 10) / 2.8) ** 2)  # 9 = ceil(3 * 2.8)
    assert int((row > 0).sum()) == 19
    torch.testing.assert_close(row[55:74] / row[64], taps.double(), rtol=0, atol=1e-7)
    assert float(smooth(spike).sum()) == pytest.approx(1)


# ------------------------------------------------------------------- what it forgives


def test_brightness_and_contrast_do_not_matter():
    patch = _golden(32, torch.float32)
    vectors = KernelDescriptor()(torch.cat([patch, 0.05 * patch + 0.9, 0.5 * patch])).vectors
    torch.testing.assert_close(vectors[1:], vectors[:1].expand(2, -1), rtol=0, atol=1e-5)


def test_the_negative_flips_the_odd_frequencies_of_theta():
    patches = _random(2, 20)
    flipped = torch.ones(7, dtype=torch.float64)
    flipped[[1, 3, 4, 6]] = -1  # cos theta, cos 3 theta, sin theta, sin 3 theta
    signs = torch.cat([flipped.repeat_interleave(25), flipped.repeat_interleave(9)])
    describe = KernelDescriptor()
    found, negative = describe(patches).vectors, describe(1 - patches).vectors
    torch.testing.assert_close(negative, found * signs, rtol=0, atol=1e-12)
    assert bool((found - negative).abs().max() > 0.05)


def test_a_slow_rotation_moves_the_descriptor_slowly():
    """Distances for 1, 2, 5, 10 degrees as published codes give them: histograms would jump."""
    size, centre = 32, 15.5
    axis = torch.arange(size, dtype=torch.float64) - centre

    def turned(degrees):
        angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
        x = angle.cos() * axis[None, :] - angle.sin() * axis[:, None] + centre
        y = angle.sin() * axis[None, :] + angle.cos() * axis[:, None] + centre
        u, v = x / size, y / size
        return 0.5 + 0.25 * torch.sin(6 * u + 2 * v**2) + 0.2 * torch.cos(5 * u * v + 3 * v)

    patches = torch.stack([turned(d) for d in (0.0, 1.0, 2.0, 5.0, 10.0)])
    vectors = KernelDescriptor()(patches).vectors
    moved = (vectors[1:] - vectors[0]).norm(dim=1)
    np.testing.assert_allclose(moved, (0.03, 0.05, 0.13, 0.25), rtol=0.2)


def test_a_quarter_turn_rotates_the_phi_pairs_of_the_polar_part():
    patches = _random(3, 18)  # an odd side has a pixel at the centre, whose phi does not turn
    describe = KernelDescriptor(kind="polar")
    grid = describe(patches).vectors.reshape(3, 7, 5, 5)
    turned = describe(patches.rot90(1, (1, 2))).vectors.reshape(3, 7, 5, 5)
    wanted = grid.clone()
    for m in (1, 2):
        angle = torch.tensor(-m * torch.pi / 2, dtype=torch.float64)
        cos, sin = grid[:, :, m], grid[:, :, 2 + m]
        wanted[:, :, m] = angle.cos() * cos - angle.sin() * sin
        wanted[:, :, 2 + m] = angle.sin() * cos + angle.cos() * sin
    torch.testing.assert_close(turned, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["polar", "concat"])
def test_rotation_search_finds_quarter_turns(kind):
    patches = _random(4, 18)
    describe = KernelDescriptor(kind=kind)
    first = describe(patches).vectors
    for turns in range(4):
        second = describe(patches.rot90(turns, (1, 2))).vectors
        found = rotation_search(describe, first, second[1:])
        assert found.similarity.shape == found.angle.shape == (4, 3)
        own = torch.arange(3)
        ones = torch.ones(3, dtype=torch.float64)
        torch.testing.assert_close(found.similarity[own + 1, own], ones, rtol=0, atol=1e-12)
        wanted = ones * (turns * torch.pi / 2)  # back, clockwise as displayed
        torch.testing.assert_close(found.angle[own + 1, own], wanted, rtol=0, atol=1e-12)
        still = rotation_search(describe, first, second, angles=1)
        polar = second[:, :175] / second[:, :175].norm(dim=1, keepdim=True)
        own = first[:, :175] / first[:, :175].norm(dim=1, keepdim=True)
        torch.testing.assert_close(still.similarity, own @ polar.T, rtol=0, atol=1e-12)


def test_rotation_search_keeps_flat_patches_apart_and_refuses_what_cannot_turn():
    describe = KernelDescriptor(kind="polar")
    vectors = describe(torch.cat([_random(1, 8), torch.full((1, 8, 8), 0.5)])).vectors
    found = rotation_search(describe, vectors, vectors)
    assert found.similarity[1].tolist() == found.similarity[:, 1].tolist() == [0, 0]
    with pytest.raises(InputError, match="polar"):
        rotation_search(KernelDescriptor(kind="cartesian"), vectors[:, :63], vectors[:, :63])
    with pytest.raises(InputError, match="175"):
        rotation_search(describe, vectors[:, :128], vectors)
    with pytest.raises(InputError, match="angles"):
        rotation_search(describe, vectors, vectors, angles=0)


def test_transposing_swaps_the_cartesian_axes():
    patches = _random(3, 17)
    describe = KernelDescriptor(kind="cartesian")
    grid = describe(patches).vectors.reshape(3, 7, 3, 3)
    wanted = grid.clone()  # theta -> pi/2 - theta
    wanted[:, 1], wanted[:, 4] = grid[:, 4], grid[:, 1]
    wanted[:, 2] = -grid[:, 2]
    wanted[:, 3], wanted[:, 6] = -grid[:, 6], -grid[:, 3]
    found = describe(patches.mT).vectors.reshape(3, 7, 3, 3)
    torch.testing.assert_close(found, wanted.mT, rtol=0, atol=1e-12)


def test_on_a_photograph_the_polar_part_forgives_turns_and_the_cartesian_part_shifts():
    path = OXFORD / "wall" / "img1.png"
    if not path.exists():
        pytest.skip("needs ../shared/data/oxford_affine")
    from PIL import Image

    image = torch.from_numpy(np.array(Image.open(path).convert("L")))
    half, lattice = 24, torch.linspace(-1, 1, 33)
    y, x = torch.meshgrid(lattice, lattice, indexing="ij")
    centres = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    centres = centres * (torch.tensor(image.T.shape) - 120) + 60

    def cut(turn, shift):
        turn = torch.tensor(turn).deg2rad()
        gx = half * (turn.cos() * x - turn.sin() * y + shift)
        gy = half * (turn.sin() * x + turn.cos() * y)
        grid = torch.stack([gx, gy], -1) + centres[:, None, None]
        grid = (2 * grid + 1) / torch.tensor(image.T.shape) - 1
        source = (image.float() / 255).expand(len(centres), 1, -1, -1)
        return torch.nn.functional.grid_sample(source, grid, align_corners=False)

    moved = {}  # as a share of the distance between different patches
    for kind in ("polar", "cartesian"):
        describe = KernelDescriptor(kind=kind)
        at = describe(cut(0.0, 0.0))
        assert bool(at.valid.all())
        for name, patches in (("turn", cut(20.0, 0.0)), ("shift", cut(0.0, 0.15))):
            distances = torch.cdist(at.vectors, describe(patches).vectors)
            moved[kind, name] = float(distances.diagonal().mean() / distances.mean())
    assert moved["polar", "turn"] < moved["cartesian", "turn"] - 0.1
    assert moved["cartesian", "shift"] < moved["polar", "shift"] - 0.1


# ------------------------------------------------------------------- flat patches, gradients


def test_flat_patches_are_zero_and_not_valid():
    patches = _golden(32, torch.float32).repeat(6, 1, 1)
    for i, value in ((1, 0.0), (2, 0.3), (3, 1.0)):
        patches[i] = value
    patches[4] = 0.5
    patches[4, 10, 10] += 1 / 255  # one grey level at one pixel is noise
    for kind in ("concat", "polar", "cartesian"):
        found = KernelDescriptor(kind=kind)(patches)
        assert found.valid.tolist() == [True, False, False, False, False, True]
        assert not bool(found.vectors[1:5].any())
        assert bool(found.vectors.isfinite().all())


def test_a_flat_region_adds_nothing():
    patch = _golden(32)
    patch[:, :, 12:] = 0.3
    fields = gradient_fields(smooth(patch.float()), 3)
    assert not bool(fields[:, :, :, 20:].any())
    double, single = (KernelDescriptor()(p).vectors for p in (patch, patch.float()))
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)


def test_gradients_reach_the_pixels():
    describe = KernelDescriptor()
    patches = _random(2, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: describe(p).vectors, (patches,), fast_mode=True)
    module._embeddings.cache_clear()
    with torch.inference_mode():
        describe(_random(1, 8, dtype=torch.float32))  # its tables must serve the next call, too
    mixed = torch.cat([torch.full((1, 8, 8), 0.5), _random(1, 8, dtype=torch.float32)])
    mixed.requires_grad_()
    describe(mixed).vectors.sum().backward()
    assert bool(mixed.grad.isfinite().all())


# ------------------------------------------------------------------- inputs


def test_bytes_halves_channels_and_autocast_agree():
    describe = KernelDescriptor()
    grey = (255 * _golden(32)).round().to(torch.uint8)
    found = describe(grey).vectors
    torch.testing.assert_close(describe((grey / 255)[:, None]).vectors, found)
    assert describe((grey / 255).half()).vectors.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(describe(grey).vectors, found, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["concat", "polar", "cartesian"])
def test_no_patches_give_no_vectors_of_the_true_width(kind):
    describe = KernelDescriptor(kind=kind)
    found = describe(torch.zeros(0, 1, 32, 32))
    assert found.vectors.shape == (0, describe.dim)
    assert found.valid.shape == (0,)


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        (torch.zeros(2, 3, 32, 32), "grey"),
        (torch.zeros(2, 32, 33), "square"),
        (torch.zeros(32, 32), "shape"),
        (torch.zeros(2, 7, 7), "8"),
        (torch.full((1, 8, 8), float("nan")), "NaN"),
        (torch.full((1, 8, 8), 128.0), "255"),
        (torch.zeros(1, 8, 8, dtype=torch.int64), "uint8"),
    ],
)
def test_bad_patches_are_refused(patches, message):
    with pytest.raises(InputError, match=message):
        KernelDescriptor()(patches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "spiral"}, "concat"),
        ({"theta": (0.0, 3)}, "kappa"),
        ({"polar": (8.0, -1)}, "order"),
        ({"cartesian": (float("nan"), 1)}, "kappa"),
        ({"centrality": 0.0}, "centrality"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        KernelDescriptor(**options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_agrees():
    patches = torch.cat([_random(50, 32), _golden(32)]).float()
    there = KernelDescriptor()(patches.cuda())
    here = KernelDescriptor()(patches.double())
    torch.testing.assert_close(there.vectors.cpu().double(), here.vectors, rtol=0, atol=1e-5)
