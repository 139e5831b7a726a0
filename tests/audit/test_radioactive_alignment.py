"""The streamed least squares against the textbook ones, and what it carries back."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from remanence.audit.radioactive.alignment import AlignmentSums, class_centred, solve_alignment
from remanence.errors import InputError

N, D, T, K = 900, 24, 30, 10


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def relu_features(rng, n=N, d=D):
    """Like a network's: rectified, with a large mean, a constant and a dead feature."""
    phi0 = torch.relu(torch.randn(n, d, generator=rng, dtype=torch.float64) + 0.7)
    phi0[:, 3] = 0
    phi0[:, 5] = 4
    return phi0


def test_equals_least_squares_with_and_without_a_constant(rng):
    phi0, y = relu_features(rng), torch.randn(N, T, generator=rng, dtype=torch.float64)
    y += phi0 @ torch.randn(D, T, generator=rng, dtype=torch.float64) + 3
    sums = AlignmentSums.of(phi0, y)
    plain = np.linalg.lstsq(phi0.numpy(), y.numpy(), rcond=1e-10)[0]
    np.testing.assert_allclose(solve_alignment(sums, intercept=False).map, plain, atol=1e-9)
    a, b = phi0.numpy() - phi0.numpy().mean(0), y.numpy() - y.numpy().mean(0)
    fitted = solve_alignment(sums)
    with_constant = np.linalg.lstsq(a, b, rcond=1e-10)[0]
    np.testing.assert_allclose(fitted.map, with_constant, atol=1e-9)
    assert fitted.rank == D - 2
    left = ((b - a @ with_constant) ** 2).sum() / (b**2).sum()
    assert fitted.explained == pytest.approx(1 - left, rel=1e-9)


def test_ridge_equals_scikit_learn_and_serves_fewer_images_than_features(rng):
    phi0 = torch.randn(15, D, generator=rng, dtype=torch.float64)
    y = torch.randn(15, T, generator=rng, dtype=torch.float64)
    sums = AlignmentSums.of(phi0, y)
    with pytest.raises(InputError, match=f"15 images cannot align {D} features: give at least 120"):
        solve_alignment(sums)
    spread = ((phi0 - phi0.mean(0)) ** 2).sum().item() / D
    expected = Ridge(alpha=0.1 * spread).fit(phi0.numpy(), y.numpy()).coef_.T
    # The alive directions carry all the energy, dead ones get nothing from either.
    np.testing.assert_allclose(solve_alignment(sums, ridge=0.1).map, expected, atol=1e-9)


def test_parts_add_up_in_any_order_and_precision(rng):
    phi0, y = relu_features(rng).float(), torch.randn(N, T, generator=rng).float()
    whole = AlignmentSums.of(phi0, y)
    cuts = (slice(0, 100), slice(100, 101), slice(101, N))
    parts = [AlignmentSums.of(phi0[cut], y[cut]) for cut in cuts]
    for a, b, c in zip(
        whole.tensors(), (parts[2] + parts[0] + parts[1]).tensors(), whole.tensors(), strict=True
    ):
        assert a.dtype == torch.float64
        assert a.data_ptr() == c.data_ptr()  # the sums themselves: an all-reduce in place serves
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-9)
    assert whole.num_images == N


def test_a_planted_map_is_recovered_and_heads_come_back_through_it(rng):
    phi0 = torch.randn(N, D, generator=rng, dtype=torch.float64) + 2
    planted = torch.randn(D, T, generator=rng, dtype=torch.float64)
    weight = torch.randn(K, T, generator=rng, dtype=torch.float64)
    for intercept in (True, False):
        fitted = solve_alignment(AlignmentSums.of(phi0, phi0 @ planted), intercept=intercept)
        torch.testing.assert_close(fitted.map, planted, rtol=0, atol=1e-8)
        torch.testing.assert_close(fitted.align(weight), weight @ planted.T, rtol=0, atol=1e-8)
        assert fitted.explained == pytest.approx(1)


@pytest.mark.parametrize("intercept", [True, False])
def test_logits_alone_give_the_head_that_weights_give(rng, intercept):
    phi0, phit = relu_features(rng), relu_features(rng, d=T)
    phit += phi0 @ torch.randn(D, T, generator=rng, dtype=torch.float64)
    weight = torch.randn(K, T, generator=rng, dtype=torch.float64)
    bias = torch.randn(K, generator=rng, dtype=torch.float64) * intercept
    by_weight = solve_alignment(AlignmentSums.of(phi0, phit), intercept=intercept).align(weight)
    logits = phit @ weight.T + bias
    by_logits = solve_alignment(AlignmentSums.of(phi0, logits), intercept=intercept)
    torch.testing.assert_close(by_logits.head, by_weight, rtol=0, atol=1e-10)
    assert not by_logits.log_probs


def test_class_centring_undoes_what_an_image_adds_to_all_its_logits(rng):
    phi0 = relu_features(rng)
    logits = phi0 @ torch.randn(D, K, generator=rng, dtype=torch.float64)
    logits += torch.randn(N, K, generator=rng, dtype=torch.float64)
    raw = solve_alignment(AlignmentSums.of(phi0, logits))
    normalised = solve_alignment(AlignmentSums.of(phi0, logits.log_softmax(1)))
    assert not raw.log_probs
    assert normalised.log_probs
    assert (raw.head - normalised.head).abs().max() > 1e-3
    torch.testing.assert_close(
        class_centred(raw.head), class_centred(normalised.head), rtol=0, atol=1e-10
    )


def test_log_probabilities_are_recognised_in_half_precision(rng):
    phi0, logits = relu_features(rng), 5 * torch.randn(N, 100, generator=rng)
    for dtype in (torch.float16, torch.bfloat16):
        sums = AlignmentSums.of(phi0, logits.log_softmax(1).to(dtype))
        assert solve_alignment(sums).log_probs
        assert not solve_alignment(AlignmentSums.of(phi0, logits.to(dtype))).log_probs


def test_too_few_images_leave_the_check_open_and_enough_close_it(rng):
    def check(n):
        phi0 = torch.randn(n, D, generator=rng)
        return solve_alignment(AlignmentSums.of(phi0, phi0)).check_images()

    assert check(5 * D).holds is True
    assert check(5 * D - 1).holds is None
    assert "119 images for 24 features" in check(5 * D - 1).finding


def test_bad_input_is_named(rng):
    phi0 = torch.randn(N, D, generator=rng)
    with pytest.raises(InputError, match="do not match"):
        AlignmentSums.of(phi0, phi0[1:])
    with pytest.raises(InputError, match="targets hold NaN"):
        AlignmentSums.of(phi0, phi0 / 0)
    sums = AlignmentSums.of(phi0, phi0)
    with pytest.raises(InputError, match="do not add up"):
        sums + AlignmentSums.of(phi0, phi0[:, :5])
    with pytest.raises(InputError, match="negative"):
        solve_alignment(sums, ridge=-1.0)
    with pytest.raises(InputError, match="do not vary"):
        solve_alignment(AlignmentSums.of(torch.ones(N, D), phi0))
    with pytest.raises(InputError, match="does not fit 24"):
        solve_alignment(sums).align(torch.ones(K, T))
