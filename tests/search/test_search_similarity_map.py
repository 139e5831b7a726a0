import math

import numpy as np
import pytest
import torch

from remanence.errors import InputError
from remanence.search.kernel_descriptor.descriptor import KernelDescriptor
from remanence.search.kernel_descriptor.gradients import gradient_fields, smooth
from remanence.search.kernel_descriptor.moments import Moments
from remanence.search.kernel_descriptor.similarity_map import pixel_embedding, similarity_map
from remanence.search.kernel_descriptor.spatial_encoding import ExplicitSpatialEncoding
from remanence.search.kernel_descriptor.von_mises import feature_map, von_mises_coefficients
from remanence.search.kernel_descriptor.whitening import Whitening

S = 8


def _random(count, size=S):
    rng = torch.Generator().manual_seed(0)
    return torch.rand(count, size, size, dtype=torch.float64, generator=rng)


def _gradients(patch):
    weight, cos, sin = gradient_fields(smooth(patch[None]), 1).squeeze(1).flatten(1)
    return weight, torch.atan2(sin, cos)


def _whitening(descriptor):
    moments = Moments(descriptor.dim)
    moments.add(torch.randn(1000, descriptor.dim, generator=torch.Generator().manual_seed(1)))
    return Whitening.fit(moments, dim=40, convention=descriptor.convention)


def _kernel(difference, kappa, order):
    coefficients = von_mises_coefficients(kappa, order)
    i = torch.arange(order + 1, dtype=torch.float64)
    return (coefficients * torch.cos(i * difference[..., None])).sum(-1)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("kind", ["polar", "cartesian", "concat"])
def test_the_sum_over_all_pairs_of_pixels_is_the_inner_product(kind, whiten):
    descriptor = KernelDescriptor(kind, normalise=False)
    whitening = _whitening(descriptor) if whiten else None
    first, second = _random(2)
    (w1, theta1), (w2, theta2) = _gradients(first), _gradients(second)
    total = 0.0
    for p in range(0, S * S, 7):
        for q in range(0, S * S, 11):
            row = similarity_map(
                descriptor,
                S,
                divmod(p, S),
                float(theta2[q] - theta1[p]),
                direction=float(theta1[p]),
                whitening=whitening,
            )
            total += float(w1[p] * w2[q] * row.flatten()[q])
    a, b = torch.zeros(2, S * S, dtype=torch.float64)
    a[::7], b[::11] = w1[::7], w2[::11]
    ours = pixel_embedding(descriptor, theta1.reshape(S, S)) @ a
    theirs = pixel_embedding(descriptor, theta2.reshape(S, S)) @ b
    if whitening is not None:
        ours, theirs = ours @ whitening.projection, theirs @ whitening.projection
    assert total == pytest.approx(float(ours @ theirs), rel=1e-9)


@pytest.mark.parametrize("kind", ["polar", "cartesian", "concat"])
def test_weighted_pixel_embeddings_sum_to_the_descriptor(kind):
    descriptor = KernelDescriptor(kind, theta=(5.0, 4), polar=(6.0, 3), normalise=False)
    patch = _random(1, 9)[0]
    weight, theta = _gradients(patch)
    summed = pixel_embedding(descriptor, theta.reshape(9, 9)) @ weight
    torch.testing.assert_close(summed, descriptor(patch[None]).vectors[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("centrality", [1.0, None])
def test_the_raw_map_is_the_product_of_the_kernels(centrality):
    steps = torch.linspace(-1, 1, S, dtype=torch.float64)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    rho, phi = torch.hypot(x, y) / math.sqrt(2), torch.atan2(y, x)
    g = torch.ones_like(rho) if centrality is None else torch.exp(-(rho**2))
    p, offset = (1, 6), 0.7
    theta = _kernel(torch.tensor(offset), 8, 3)
    cartesian = _kernel(math.pi / 2 * (x - x[p]), 1, 1) * _kernel(math.pi / 2 * (y - y[p]), 1, 1)
    found = similarity_map(KernelDescriptor("cartesian", centrality=centrality), S, p, offset)
    torch.testing.assert_close(found, g[p] * g * theta * cartesian)
    turned = _kernel(offset - (phi - phi[p]), 8, 3)
    polar = turned * _kernel(phi - phi[p], 8, 2) * _kernel(math.pi * (rho - rho[p]), 8, 2)
    found = similarity_map(
        KernelDescriptor("polar", centrality=centrality), S, p, offset, direction=1.9
    )
    torch.testing.assert_close(found, g[p] * g * polar)


def test_bad_maps_are_refused():
    descriptor = KernelDescriptor()
    with pytest.raises(InputError, match="inside"):
        similarity_map(descriptor, S, (0, S))
    with pytest.raises(InputError, match="learn one with these"):
        similarity_map(descriptor, S, (0, 0), whitening=_whitening(KernelDescriptor("polar")))


# ------------------------------------------------------------------- spatial encoding


@pytest.mark.parametrize("shape", [(5, 5), (4, 7)])
@pytest.mark.parametrize(("kind", "positions"), [("polar", 25), ("cartesian", 9), ("concat", 34)])
def test_encodings_compare_activations_at_all_pairs_of_places(kind, positions, shape):
    rng = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 6, *shape, dtype=torch.float64, generator=rng)
    layer = ExplicitSpatialEncoding(6, kind)
    first, second = layer(maps)
    assert first.shape == (6 * positions,) == (layer.features,)
    y, x = (
        v.flatten()
        for v in torch.meshgrid(
            *(torch.linspace(-1, 1, n, dtype=torch.float64) for n in shape), indexing="ij"
        )
    )
    rho, phi = torch.hypot(x, y) / math.sqrt(2), torch.atan2(y, x)

    def less(v):
        return v[:, None] - v

    polar = _kernel(less(phi), 8, 2) * _kernel(math.pi * less(rho), 8, 2)
    cartesian = _kernel(math.pi / 2 * less(x), 1, 1) * _kernel(math.pi / 2 * less(y), 1, 1)
    kernel = {"polar": polar, "cartesian": cartesian, "concat": polar + cartesian}[kind]
    g = torch.exp(-(rho**2))
    activations = maps[0].flatten(1).mT @ maps[1].flatten(1)
    assert float(first @ second) == pytest.approx(float(g @ (kernel * activations) @ g), rel=1e-9)


def test_the_encoding_of_gradient_fields_is_the_cartesian_descriptor():
    descriptor = KernelDescriptor("cartesian", normalise=False)
    patch = _random(1, 12)
    weight, theta = _gradients(patch[0])
    psi = weight * feature_map(theta, von_mises_coefficients(8.0, 3))
    found = ExplicitSpatialEncoding(7, "cartesian")(psi.reshape(1, 7, 12, 12))
    torch.testing.assert_close(found, descriptor(patch).vectors)


def test_encodings_of_small_maps_are_finite_and_have_gradients():
    layer = ExplicitSpatialEncoding(3)
    assert not list(layer.parameters())
    maps = torch.rand(2, 3, 1, 4, requires_grad=True)
    layer(maps).square().sum().backward()
    assert bool(maps.grad.isfinite().all())
    assert layer(torch.zeros(0, 3, 4, 4)).shape == (0, 102)


def test_bad_encodings_are_refused():
    with pytest.raises(InputError, match=r"\(B, 3, h, w\)"):
        ExplicitSpatialEncoding(3)(torch.rand(1, 4, 5, 5))
    with pytest.raises(InputError, match="concat, polar or cartesian"):
        ExplicitSpatialEncoding(3, "square")
    with pytest.raises(InputError, match="sigma above 0"):
        ExplicitSpatialEncoding(3, centrality=0)
    assert np.isfinite(ExplicitSpatialEncoding(3, centrality=None).features)
