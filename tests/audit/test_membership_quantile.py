import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn

from remanence.audit.membership.quantile import (
    EXPONENTS,
    Head,
    QuantileModel,
    QuantileNetwork,
    fit_quantiles,
    quantile_loss,
)
from remanence.errors import InputError

N_FIT, N_NULL = 10_000, 40_000
OPTIONS = {"epochs": 12, "lr": 5e-3}


def world(n: int, seed: int) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """Samples with a known heteroscedastic signal: x, t, mu(x), sigma(x)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    mu = 4 + 2 * np.sin(x[:, 0]) + x[:, 1]
    sigma = np.exp(0.6 * x[:, 1] - 0.5)
    return torch.from_numpy(x).float(), rng.normal(mu, sigma), mu, sigma


@pytest.fixture(scope="module")
def fitted() -> dict[str, QuantileModel]:
    x, t, _, _ = world(N_FIT, 0)
    return {head: fit_quantiles(x, t, head=head, **OPTIONS) for head in ("gaussian", "pinball")}


def test_gaussian_head_recovers_the_law(fitted: dict[str, QuantileModel]) -> None:
    x, _, mu, sigma = world(5_000, 1)
    ours = fitted["gaussian"].predict(x)
    assert np.sqrt(np.mean((ours[:, 0] - mu) ** 2)) < 0.1 * mu.std()
    error = np.log(ours[:, 1]) - np.log(sigma)
    assert np.sqrt(np.mean(error**2)) < 0.1
    # A law of one sigma, however good, is off by the spread of the true one.
    assert np.log(sigma).std() > 0.5


def test_pinball_head_recovers_the_quantiles(fitted: dict[str, QuantileModel]) -> None:
    x, _, mu, sigma = world(5_000, 1)
    ours = fitted["pinball"].predict(x)
    assert (np.diff(ours, axis=1) >= 0).all()
    for j in (3, 10, 20):  # levels 0.50, 0.90, 0.99
        true = mu + sigma * norm.ppf(1 - 10 ** -EXPONENTS[j].item())
        assert np.median(np.abs(ours[:, j] - true) / sigma) < 0.25


@pytest.mark.parametrize("head", ["gaussian", "pinball"])
@pytest.mark.parametrize("rate", [0.5, 0.2, 0.1, 0.03, 0.01])
def test_null_false_positive_rate_is_the_asked_one(
    fitted: dict[str, QuantileModel], head: Head, rate: float
) -> None:
    x, t, _, sigma = world(N_NULL, 2)
    model = fitted[head]
    above = model.score(x, t) > model.threshold(rate)
    assert above.mean() == pytest.approx(rate, rel=0.25 if rate > 0.05 else 0.4)
    # And among the noisy and the quiet alike, which one global threshold misses by far.
    if rate >= 0.1:
        noisy = sigma > np.median(sigma)
        for part in (noisy, ~noisy):
            assert above[part].mean() == pytest.approx(rate, rel=0.3)
        flat = t > np.quantile(t, 1 - rate)
        assert flat[noisy].mean() > 1.25 * flat[~noisy].mean()


@pytest.mark.parametrize("head", ["gaussian", "pinball"])
def test_score_rises_with_the_signal_and_finds_members(
    fitted: dict[str, QuantileModel], head: Head
) -> None:
    x, t, _, sigma = world(4_000, 3)
    model = fitted[head]
    ladder = [model.score(x[:200], t[:200] + step) for step in (-50, -5, -1, 0, 1, 5, 50)]
    # Pinball ties only where two neighbouring quantiles crossed.
    assert (np.diff(ladder, axis=0) >= 0).all()
    assert (ladder[-1] > ladder[3]).all()
    member = np.arange(4_000) < 2_000
    scores = model.score(x, t + np.where(member, 1.5 * sigma, 0))
    rate = (scores[member][:, None] > scores[~member]).mean()
    assert rate == pytest.approx(norm.cdf(1.5 / np.sqrt(2)), abs=0.03)
    assert scores.dtype == np.float64


def test_losses_are_the_textbook_ones() -> None:
    t = torch.tensor([1.0, -2.0])
    output = torch.tensor([[0.5, 0.2], [1.0, -0.3]])
    ours = quantile_loss(output, t, "gaussian") + np.log(2 * np.pi) / 2
    law = torch.distributions.Normal(output[:, 0], output[:, 1].exp())
    torch.testing.assert_close(ours, -law.log_prob(t))

    # Along each output, the pinball loss is least at the empirical quantile.
    sample = torch.from_numpy(np.random.default_rng(0).normal(size=2_001)).float()
    grid = torch.linspace(-1, 3, 401)
    for j in (3, 10, 20):
        losses = []
        for q in grid:
            outputs = torch.zeros(41)
            outputs[j] = q
            losses.append(quantile_loss(outputs.expand(2_001, 41), sample, "pinball").mean())
        best = grid[torch.stack(losses).argmin()].item()
        level = 1 - 10 ** -EXPONENTS[j].item()
        assert best == pytest.approx(np.quantile(sample, level), abs=0.02)


def test_the_caller_may_bring_a_network_for_images() -> None:
    x = torch.rand(300, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    t = 3 * x.mean(dim=(1, 2, 3)).numpy()
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    before = [p.clone() for p in network.parameters()]
    calls: list[tuple[int, float]] = []
    runs = [
        fit_quantiles(
            x,
            t,
            network=network,
            validation=0.2,
            epochs=3,
            batch_size=64,
            progress=lambda *call: calls.append(call),
        )
        for _ in range(2)
    ]
    assert [call[0] for call in calls[:3]] == [1, 2, 3]
    np.testing.assert_array_equal(runs[0].predict(x), runs[1].predict(x))
    for p, q in zip(network.parameters(), before, strict=True):
        assert torch.equal(p, q)
    assert isinstance(fit_quantiles(x, t, validation=0.2, epochs=1).network, QuantileNetwork)


def test_bad_input_names_the_mend(fitted: dict[str, QuantileModel]) -> None:
    x, t, _, _ = world(300, 0)
    with pytest.raises(InputError, match="at least 30"):
        fit_quantiles(x[:100], t[:100])
    with pytest.raises(InputError, match="give one each"):
        fit_quantiles(x, t[:-1])
    with pytest.raises(InputError, match="sample 7 is not finite"):
        fit_quantiles(x, np.where(np.arange(300) == 7, np.nan, t))
    with pytest.raises(InputError, match="all the signals are equal"):
        fit_quantiles(x, np.ones(300))
    with pytest.raises(InputError, match="give it 2 outputs"):
        fit_quantiles(x, t, network=nn.Linear(3, 5))
    with pytest.raises(InputError, match="head 'laplace' is unknown"):
        fit_quantiles(x, t, head="laplace")  # type: ignore[arg-type]  # the point
    with pytest.raises(InputError, match="held-out loss is not finite"):
        fit_quantiles(x * torch.nan, t)
    with pytest.raises(InputError, match=r"give 0\.0001 to 1"):
        fitted["pinball"].threshold(1e-5)


def test_a_column_that_is_constant_in_the_fitted_part_counts_for_nothing_elsewhere():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator)
    t = torch.randn(400, generator=generator)
    x[:, 1] = 0.25
    model = fit_quantiles(x, t, epochs=3)
    moved = x.clone()
    moved[:, 1] = 7.0
    assert np.allclose(model.score(moved, t), model.score(x, t))
