import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from remanence.audit.radioactive.null import (
    cosine_logp,
    expected_log10_p,
    fisher_logp,
    holm_logp,
    min_mean_cosine,
    plan,
    stouffer_logp,
)
from remanence.errors import InputError

COSINES = np.concatenate([np.linspace(-0.999, 0.999, 401), [0.0, 1e-9, -1e-9]])
LN10 = math.log(10)


def test_closed_forms_in_two_and_three_dimensions():
    np.testing.assert_allclose(
        np.exp(cosine_logp(COSINES, 2)), np.arccos(COSINES) / np.pi, rtol=0, atol=1e-12
    )
    np.testing.assert_allclose(
        np.exp(cosine_logp(COSINES, 3)), (1 - COSINES) / 2, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("d", [2, 5, 64, 512])
def test_equals_student_t_with_one_degree_of_freedom_fewer(d):
    # Without the cosines of 1e-9: there scipy's own t.sf rounds 1 + t^2 to 1.
    c = COSINES[(np.abs(COSINES) > 1e-6) | (COSINES == 0)]
    t = c * np.sqrt((d - 1) / (1 - c**2))
    exact = stats.t.sf(t, d - 1)
    np.testing.assert_allclose(np.exp(cosine_logp(c, d)), exact, rtol=0, atol=1e-12)
    seen = exact > 1e-290
    np.testing.assert_allclose(cosine_logp(c, d)[seen], np.log(exact[seen]), rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize(
    ("d", "c", "log10_p"),
    [(512, 0.99, -436.3922), (2048, 0.9, -740.2047), (2048, 0.999, -2764.6724)],
)
def test_reference_values_where_scipy_gives_zero(d, c, log10_p):
    assert stats.t.sf(c * math.sqrt((d - 1) / (1 - c * c)), d - 1) == 0.0
    assert float(cosine_logp(c, d)) / LN10 == pytest.approx(log10_p, abs=5e-5)


@pytest.mark.parametrize("d", [3, 64, 512, 2048])
def test_far_tail_equals_an_integral_in_log_space(d):
    # P(cosine >= c) = B^-1 int_c^1 (1 - s^2)^((d-3)/2) ds, by quadrature on s = c + (1 - c) v.
    nodes, weights = np.polynomial.legendre.leggauss(2000)
    v, w = (nodes + 1) / 2, weights / 2
    for c in (0.05, 0.3, 0.9, 0.99, 0.999999):
        s = c + (1 - c) * v
        # (1 - s)(1 + s), with 1 - s = (1 - c)(1 - v)
        log_f = (d - 3) / 2 * (math.log1p(-c) + np.log1p(-v) + np.log1p(s))
        norm = math.lgamma((d - 1) / 2) + math.lgamma(0.5) - math.lgamma(d / 2)
        top = log_f.max()
        expected = top + math.log(w @ np.exp(log_f - top)) + math.log1p(-c) - norm
        assert float(cosine_logp(c, d)) == pytest.approx(expected, rel=1e-9)


def test_near_one_the_logarithm_keeps_its_digits():
    # P(cosine < -0.9) is about 1e-740 at d = 2048: ln p is minus that, so 0 and never above.
    assert float(cosine_logp(-0.9, 2048)) == 0.0
    upper = math.exp(float(cosine_logp(0.3, 512)))
    assert 0 < upper < 1e-9
    assert float(cosine_logp(-0.3, 512)) == pytest.approx(-upper, rel=1e-12)


@given(st.floats(-1, 1), st.floats(-1, 1), st.integers(2, 5000))
def test_monotone_and_finite_everywhere(a, b, d):
    low, high = cosine_logp([min(a, b), max(a, b)], d)
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert high <= low + 1e-12 * abs(low)
    assert low <= 0


def test_a_perfect_cosine_has_a_finite_p():
    assert -4e4 < float(cosine_logp(1.0, 2048)) < float(cosine_logp(0.999999, 2048))
    assert float(cosine_logp(-1.0, 2048)) == 0.0


def test_fisher_equals_scipy_where_scipy_is_finite():
    rng = np.random.default_rng(0)
    for K in (1, 2, 10, 200):
        p = rng.random(K) ** 3
        expected = stats.combine_pvalues(p, method="fisher").pvalue
        assert math.exp(fisher_logp(np.log(p))) == pytest.approx(expected, rel=1e-10)
    assert fisher_logp(np.zeros(1000)) == 0.0
    batch = np.log(rng.random((7, 5)))
    np.testing.assert_allclose(fisher_logp(batch), [fisher_logp(row) for row in batch])


def test_fisher_stays_finite_where_scipy_underflows():
    assert stats.combine_pvalues([1e-200] * 10).pvalue == 0.0
    assert fisher_logp(np.full(10, -200 * LN10)) / LN10 == pytest.approx(-1972.5897, abs=5e-5)
    assert math.isfinite(fisher_logp(np.full(1000, -7000.0)))


def test_stouffer_is_close_and_only_close():
    exact = math.exp(float(cosine_logp(0.4, 64)))
    assert exact == pytest.approx(4.8e-4, rel=0.05)
    assert math.exp(stouffer_logp([0.4], 64)) == pytest.approx(6.9e-4, rel=0.01)


def test_holm_against_its_definition():
    p = np.array([0.01, 0.04, 0.03, 0.005])
    # Sorted .005 .01 .03 .04, times 4 3 2 1, then never falling.
    np.testing.assert_allclose(np.exp(holm_logp(np.log(p))), [0.03, 0.06, 0.06, 0.02])
    assert np.all(holm_logp(np.log([0.9, 0.8])) <= 0)


@pytest.mark.parametrize(
    ("K", "d", "cosine"),
    [(10, 64, 0.147), (10, 512, 0.052), (100, 512, 0.0164), (1000, 512, 0.0052)],
)
def test_the_planner_knows_the_effect_sizes_of_the_paper_s_settings(K, d, cosine):
    assert min_mean_cosine(K, d, 1e-4) == pytest.approx(cosine, rel=0.01)
    # The sum statistic at that mean cosine has exactly this p.
    assert stouffer_logp(np.full(K, min_mean_cosine(K, d, 1e-4)), d) == pytest.approx(
        math.log(1e-4)
    )


@pytest.mark.parametrize("cosine", [0.0, 0.02, 0.06, 0.1])
def test_the_expected_p_is_the_typical_p_of_simulated_heads(cosine):
    K, d = 20, 256
    rng = np.random.default_rng(1)
    u = rng.standard_normal((400, K, d))
    u /= np.linalg.norm(u, axis=-1, keepdims=True)
    # A head with this expected cosine: the carrier plus noise of unit length.
    noise = rng.standard_normal((400, K, d)) / math.sqrt(d)
    head = cosine / math.sqrt(1 - cosine**2) * u + noise
    c = (head * u).sum(-1) / np.linalg.norm(head, axis=-1)
    seen = np.median(fisher_logp(cosine_logp(c, d))) / LN10
    assert expected_log10_p(cosine, K, d) == pytest.approx(seen, abs=max(0.15, 0.08 * abs(seen)))


def test_the_plan_is_consistent_with_itself():
    made = plan(10, 64, p=1e-4, mean_cosine=0.05)
    assert made.classes_needed is not None
    assert made.dim_needed is not None
    assert min_mean_cosine(made.classes_needed, 64, 1e-4) <= 0.05
    assert min_mean_cosine(made.classes_needed - 1, 64, 1e-4) > 0.05
    assert min_mean_cosine(10, made.dim_needed, 1e-4) <= 0.05 + 1e-12
    assert made.detectable > made.min_mean_cosine == min_mean_cosine(10, 64, 1e-4)
    hopeless = plan(10, 64, mean_cosine=-0.01)
    assert hopeless.classes_needed is None
    assert plan(10, 64).expected_log10_p is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cosine_logp(0.1, 1), "at least 2"),
        (lambda: cosine_logp([0.1, float("nan")], 8), "NaN"),
        (lambda: cosine_logp(1.1, 8), "outside"),
        (lambda: fisher_logp([]), "at least one"),
        (lambda: fisher_logp([0.3]), "exceed 0"),
        (lambda: min_mean_cosine(10, 64, 0.0), "p-value"),
        (lambda: plan(0, 64), "K >= 1"),
        (lambda: plan(10, 64, mean_cosine=1.5), "between -1 and 1"),
        (lambda: plan(10, 64, power=1.0), "power"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(InputError, match=words):
        call()
