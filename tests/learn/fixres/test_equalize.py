import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import genextreme
from torch import Tensor, nn

from remanence.errors import InputError
from remanence.learn.fixres.activations import activation_statistics, moments
from remanence.learn.fixres.equalize import (
    Affine,
    Equalizer,
    EqualizerKind,
    fit_equalizer,
    fold_into_head_,
)
from remanence.learn.fixres.frechet import FitMethod, Frechet, fit_frechet

KINDS: list[EqualizerKind] = ["frechet", "moments", "channel"]
LAWS = st.tuples(st.floats(-1.0, 1.0), st.floats(0.05, 2.0))


def activations(n: int, mu: float, sigma: float, seed: int = 0, channels: int = 1) -> Tensor:
    """Rectified draws of the law, by scipy."""
    rng = np.random.default_rng(seed)
    x = genextreme(-0.3, loc=mu, scale=sigma).rvs((n, channels), random_state=rng)
    return torch.from_numpy(x).clamp(min=0)


@given(law=LAWS, xi=st.floats(0.05, 1.0))
def test_cdf_and_quantile_are_scipys(law: tuple[float, float], xi: float) -> None:
    mu, sigma = law
    ours, theirs = Frechet(mu, sigma, xi), genextreme(-xi, loc=mu, scale=sigma)
    p = np.linspace(0.01, 0.99, 50)
    x = np.linspace(mu - 2 * sigma / xi, mu + 8 * sigma, 50)  # from outside the support
    np.testing.assert_allclose(ours.cdf(torch.from_numpy(x)), theirs.cdf(x), rtol=0, atol=1e-12)
    quantiles = ours.quantile(torch.from_numpy(p))
    np.testing.assert_allclose(quantiles, theirs.ppf(p), rtol=1e-12, atol=1e-12)


def test_predicted_share_of_zeros() -> None:
    share = Frechet(0.2, 0.4).cdf(torch.zeros(1, dtype=torch.float64)).item()
    assert share == pytest.approx(0.179, abs=5e-4)


@pytest.mark.parametrize("method", ["likelihood", "cdf"])
@pytest.mark.parametrize(("mu", "sigma"), [(0.15, 0.30), (-0.1, 0.4), (1.0, 0.2)])
def test_fit_recovers_the_law(method: FitMethod, mu: float, sigma: float) -> None:
    z = activations(200_000, mu, sigma)
    fitted = fit_frechet(z, method=method)
    assert (fitted.mu, fitted.sigma) == pytest.approx((mu, sigma), abs=0.005)


def test_fit_maximises_the_censored_likelihood() -> None:
    z = activations(5_000, -0.05, 0.3)
    x = z.flatten().numpy()

    def likelihood(mu: float, sigma: float) -> float:
        law = genextreme(-0.3, loc=mu, scale=sigma)
        return float((x == 0).sum() * law.logcdf(0) + law.logpdf(x[x > 0]).sum())

    fitted = fit_frechet(z)
    best = likelihood(fitted.mu, fitted.sigma)
    step = 2e-3
    for d_mu in (-step, 0, step):
        for d_sigma in (-step, 0, step):
            assert likelihood(fitted.mu + d_mu, fitted.sigma + d_sigma) <= best + 1e-6


def test_zeros_are_censored_not_observed() -> None:
    # Half the values are cut off; reading the zeros as values would pull sigma far down.
    z = activations(100_000, -0.1, 0.5)
    assert (z == 0).double().mean() > 0.4
    assert fit_frechet(z).sigma == pytest.approx(0.5, abs=0.01)


def test_without_a_rectifier_nothing_is_censored() -> None:
    rng = np.random.default_rng(0)
    x = genextreme(-0.3, loc=-0.2, scale=0.3).rvs(100_000, random_state=rng)
    fitted = fit_frechet(torch.from_numpy(x))
    assert (fitted.mu, fitted.sigma) == pytest.approx((-0.2, 0.3), abs=0.005)


@settings(deadline=None, max_examples=25)
@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 9))
def test_fit_scales_with_the_activations(factor: float, seed: int) -> None:
    z = activations(2_000, 0.1, 0.3, seed)
    one, scaled = fit_frechet(z), fit_frechet(z * factor)
    expected = (one.mu * factor, one.sigma * factor)
    assert (scaled.mu, scaled.sigma) == pytest.approx(expected, rel=1e-3, abs=1e-4 * factor)


def test_large_inputs_are_sampled() -> None:
    z = activations(50_000, 0.15, 0.3)
    some = fit_frechet(z, max_values=5_000, seed=1)
    assert some == fit_frechet(z, max_values=5_000, seed=1)
    assert some != fit_frechet(z, max_values=5_000, seed=2)
    assert some.sigma == pytest.approx(0.3, abs=0.03)


def test_frechet_map_is_the_quantile_map() -> None:
    z_train, z_test = activations(20_000, 0.2, 0.4), activations(20_000, 0.25, 0.3, seed=1)
    affine = fit_equalizer(z_train, z_test)
    train, test = fit_frechet(z_train), fit_frechet(z_test)
    x = test.quantile(torch.linspace(0.01, 0.99, 99, dtype=torch.float64))
    assert torch.allclose(affine(x), train.quantile(test.cdf(x)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_statistics_give_the_identity(kind: EqualizerKind) -> None:
    z = activations(500, 0.2, 0.4, channels=6)
    affine = fit_equalizer(z, z, kind)
    assert torch.allclose(affine(z), z, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["likelihood", "cdf"])
def test_frechet_map_is_that_of_the_true_laws(method: FitMethod) -> None:
    z_train, z_test = activations(200_000, 0.1, 0.45), activations(200_000, 0.25, 0.3, seed=1)
    affine = fit_equalizer(z_train, z_test, method=method)
    assert affine.scale.item() == pytest.approx(1.5, abs=0.02)
    assert affine.shift.item() == pytest.approx(0.1 - 1.5 * 0.25, abs=0.01)


def test_pooled_moments_match_exactly() -> None:
    z_test, z_train = activations(300, 0.3, 0.3, channels=4), activations(200, 0.1, 0.5, 1, 4)
    mapped = fit_equalizer(z_train, z_test, "moments")(z_test)
    assert mapped.mean().item() == pytest.approx(z_train.mean().item(), rel=1e-12)
    assert mapped.std(correction=0).item() == pytest.approx(z_train.std(correction=0).item())


def channel_data(n: int, spread: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test activations whose true map per channel is known."""
    g = torch.Generator().manual_seed(seed)
    C = 64
    a = 1.3 * (spread * torch.randn(C, generator=g, dtype=torch.float64)).exp()
    c = 0.2 + spread * torch.randn(C, generator=g, dtype=torch.float64)
    law = torch.rand(C, generator=g, dtype=torch.float64) + 0.5
    draw = [torch.randn(n, C, generator=g, dtype=torch.float64) * law + 1 for _ in range(2)]
    return a * draw[0] + c, draw[1], a, c


def test_channel_map_follows_channels_that_truly_differ() -> None:
    z_train, z_test, a, c = channel_data(20_000, 0.3, 0)
    affine = fit_equalizer(z_train, z_test, "channel")
    assert affine.scale.shape == (64,)
    assert torch.allclose(affine.scale, a, rtol=0.04)
    assert torch.allclose(affine.shift, c, atol=0.06)


def test_channel_map_shrinks_where_only_noise_differs() -> None:
    # 12 images a channel and one true map: matching each channel fits noise.
    errors = []
    for seed in range(8):
        z_train, z_test, a, _ = channel_data(12, 0.0, seed)
        train, test = moments(z_train), moments(z_test)
        raw = (train.var / test.var).sqrt() - a
        shrunk = fit_equalizer(z_train, z_test, "channel").scale - a
        errors.append((shrunk.square().mean() / raw.square().mean()).item())
    assert np.mean(errors) < 0.4


def test_channel_map_beats_both_extremes_in_between() -> None:
    raw_error, pooled_error, shrunk_error = 0.0, 0.0, 0.0
    for seed in range(8):
        z_train, z_test, a, _ = channel_data(30, 0.15, seed)
        train, test = moments(z_train), moments(z_test)
        raw_error += ((train.var / test.var).sqrt() / a).log().square().sum().item()
        pooled = fit_equalizer(z_train, z_test, "moments").scale
        pooled_error += (pooled / a).log().square().sum().item()
        shrunk = fit_equalizer(z_train, z_test, "channel").scale
        shrunk_error += (shrunk / a).log().square().sum().item()
    assert shrunk_error < 0.9 * min(raw_error, pooled_error)


def test_dead_channels_keep_the_pooled_map() -> None:
    z_train, z_test, _, _ = channel_data(500, 0.3, 0)
    z_train[:, 3], z_test[:, 5] = 0, 0
    affine = fit_equalizer(z_train, z_test, "channel")
    pooled = fit_equalizer(z_train, z_test, "moments")
    assert bool(affine.scale.isfinite().all())
    for dead in (3, 5):
        assert affine.scale[dead].item() == pytest.approx(pooled.scale.item())
        assert affine.shift[dead].item() == pytest.approx(pooled.shift.item())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_folding_changes_no_logit(kind: EqualizerKind, bias: bool) -> None:
    torch.manual_seed(0)
    z_train, z_test, _, _ = channel_data(200, 0.3, 1)
    affine = fit_equalizer(z_train.clamp(min=0), z_test.clamp(min=0), kind)
    z = z_test.float()
    for head, x in (
        (nn.Linear(64, 10, bias=bias), z),
        (nn.Conv2d(64, 10, 1, bias=bias), z[:, :, None, None]),
    ):
        expected = copy.deepcopy(head)(affine(x))
        fold_into_head_(head, affine)
        assert torch.allclose(head(x), expected, rtol=0, atol=1e-5)
        assert all(p.dtype == torch.float32 and p.requires_grad for p in head.parameters())


def test_a_shiftless_map_adds_no_bias() -> None:
    head = nn.Linear(4, 2, bias=False)
    fold_into_head_(head, Affine(torch.tensor(2.0), torch.tensor(0.0)))
    assert head.bias is None


def test_clamped_map_stays_a_module() -> None:
    z_train, z_test = activations(500, 0.0, 0.4, 0, 4), activations(500, 0.3, 0.3, 1, 4)
    affine = fit_equalizer(z_train, z_test, clamp=True)
    module = Equalizer(affine)
    z = z_test.float()
    assert module(z).min() == 0
    assert torch.allclose(module(z), affine(z))
    assert module(z[:, :, None, None]).shape == (500, 4, 1, 1)
    assert set(module.state_dict()) == {"scale", "shift"}
    with pytest.raises(InputError, match="Equalizer"):
        fold_into_head_(nn.Linear(4, 2), affine)


def test_map_keeps_dtype() -> None:
    affine = Affine(torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    assert affine(torch.zeros(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_activation_statistics_by_hand() -> None:
    z = torch.tensor([[0.0, 2.0], [4.0, 2.0], [0.0, 5.0]])
    stats = activation_statistics(z)
    assert stats.zero_fraction == pytest.approx(2 / 6)
    assert stats.std == pytest.approx(z.std(dim=0, correction=0).mean().item())
    assert stats.mean == pytest.approx(13 / 6)


def test_moments_do_not_depend_on_blocks() -> None:
    z = activations(2_500, 0.1, 0.3, channels=2_000).float()  # two blocks of at most 2^22 values
    got = moments(z)
    assert torch.allclose(got.mean, z.double().mean(dim=0))
    assert torch.allclose(got.var, z.double().var(dim=0, correction=0))
    assert torch.allclose(got.fourth, ((z.double() - got.mean) ** 4).mean(dim=0))
    assert got.pooled_var.item() == pytest.approx(z.double().var(correction=0).item())


def test_bad_activations_are_named() -> None:
    good = activations(50, 0.2, 0.3, channels=2)
    broken = good.clone()
    broken[3, 1] = torch.nan
    for kind in KINDS:
        with pytest.raises(InputError, match="NaN"):
            fit_equalizer(good, broken, kind)
        with pytest.raises(InputError, match="channels"):
            fit_equalizer(good, good[:, :1], kind)
        with pytest.raises(InputError, match="shape"):
            fit_equalizer(good, good.flatten(), kind)
        with pytest.raises(InputError, match="activations"):
            fit_equalizer(good, torch.zeros(50, 2), kind)
    with pytest.raises(InputError, match="kind"):
        fit_equalizer(good, good, "mean")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(InputError, match="method"):
        fit_frechet(good, method="guess")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(InputError, match="xi"):
        fit_frechet(good, xi=0.0)
    with pytest.raises(InputError, match="spread"):
        fit_frechet(good * 1e-8)
    for constant in (torch.full((50,), 2.0), torch.zeros(50), torch.zeros(0)):
        with pytest.raises(InputError, match="distinct"):
            fit_frechet(constant)
    with pytest.raises(InputError, match="activations"):
        activation_statistics(torch.zeros(0, 3))


def test_heads_that_cannot_take_the_map_are_named() -> None:
    scalar = Affine(torch.tensor(2.0), torch.tensor(1.0))
    for head in (nn.Conv2d(4, 2, 3), nn.Conv2d(4, 2, 1, groups=2), nn.Identity()):
        with pytest.raises(InputError, match="head"):
            fold_into_head_(head, scalar)
    with pytest.raises(InputError, match="channels"):
        fold_into_head_(nn.Linear(4, 2), Affine(torch.ones(3), torch.ones(3)))
