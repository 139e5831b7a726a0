"""The betting test against enumeration of its martingale, a plain loop and measured power."""

import itertools
import math

import numpy as np
import pytest

from remanence.audit.dejavu.betting import PairedBettingTest
from remanence.errors import InputError


def wealth_of(wins: tuple[int, ...]) -> float:
    test = PairedBettingTest()
    return test.update(np.array(wins, dtype=float), np.full(len(wins), 0.5))


def plain(wins: np.ndarray) -> list[float]:
    """The recursion of the method, one pair at a time."""
    wealth, successes, path = 1.0, 0, []
    for s, won in enumerate(wins, start=1):
        bet = min(max(2 * (successes + 0.5) / s - 1, 0.0), 0.99)
        wealth *= 1 + bet * (2 * won - 1)
        successes += won
        path.append(wealth)
    return path


@pytest.mark.parametrize("pairs", [1, 2, 7, 10])
def test_wealth_has_mean_one_over_all_coin_sequences(pairs: int) -> None:
    wealths = [wealth_of(wins) for wins in itertools.product((0, 1), repeat=pairs)]
    assert np.mean(wealths) == pytest.approx(1, abs=1e-12)
    assert pairs == 1 or max(wealths) >= 1.5


def test_batches_of_any_size_follow_the_plain_recursion() -> None:
    rng = np.random.default_rng(0)
    candidate, reference = np.round(rng.normal(0.3, 1, 300), 1), np.round(rng.normal(size=300), 1)
    coins = np.random.default_rng(5).random(300) < 0.5
    wins = np.where(candidate == reference, coins, candidate > reference).astype(int)
    path = plain(wins)
    for size in (1, 7, 300):
        test = PairedBettingTest(seed=5)
        for start in range(0, 300, size):
            stop = min(start + size, 300)
            e = test.update(candidate[start:stop], reference[start:stop])
            assert e == pytest.approx(path[stop - 1], rel=1e-9)
        reached = [t for t, w in enumerate(path, start=1) if w >= 20]
        assert test.decided_at == (reached[0] if reached else None)
        assert test.log10_p == pytest.approx(-math.log10(max(1.0, *path)), abs=1e-9)
        assert test.pairs == 300
        assert test.wins == wins.sum()


def test_a_decision_stands_though_the_wealth_falls() -> None:
    test = PairedBettingTest()
    test.update(np.ones(30), np.zeros(30))
    assert test.decided
    decided_at, log10_p = test.decided_at, test.log10_p
    test.update(np.zeros(500), np.ones(500))
    assert test.e_value < 1
    assert test.decided
    assert test.decided_at == decided_at
    assert test.log10_p == log10_p


def test_ties_are_fair_coins_not_wins() -> None:
    decided = 0
    for seed in range(300):
        test = PairedBettingTest(seed=seed)
        test.update(np.ones(500), np.ones(500))
        decided += test.decided
    assert decided / 300 <= 0.08


# P(B) and what the method's text states: detection rate and median pairs among 2,000.
@pytest.mark.parametrize(
    ("p", "power", "pairs"), [(0.55, 0.914, 778), (0.60, 1.0, 185), (0.70, 1.0, 48)]
)
def test_power_and_stopping_time(p: float, power: float, pairs: int) -> None:
    rng = np.random.default_rng(1)
    stops = []
    for _ in range(400):
        test = PairedBettingTest()
        test.update((rng.random(2000) < p).astype(float), np.full(2000, 0.5))
        stops.append(test.decided_at or math.inf)
    stops = np.array(stops)
    assert np.isfinite(stops).mean() == pytest.approx(power, abs=0.04)
    assert np.median(stops) == pytest.approx(pairs, rel=0.15)


def test_false_alarms_though_one_looks_after_every_pair() -> None:
    rng = np.random.default_rng(2)
    decided = 0
    for _ in range(2000):
        test = PairedBettingTest()
        test.update(rng.normal(size=2000), rng.normal(size=2000))
        decided += test.decided
    assert 0.02 <= decided / 2000 <= 0.05


def test_a_million_wins_do_not_overflow() -> None:
    test = PairedBettingTest()
    assert math.isfinite(test.update(np.ones(1_000_000), np.zeros(1_000_000)))
    assert test.log_wealth > 600_000
    assert test.log10_p < -200_000


def test_unusable_input_is_named() -> None:
    with pytest.raises(InputError, match="3 candidates and 2 references do not pair up"):
        PairedBettingTest().update(np.ones(3), np.ones(2))
    with pytest.raises(InputError, match="reference scores hold NaN"):
        PairedBettingTest().update(np.ones(2), np.array([1, np.nan]))
    with pytest.raises(InputError, match="alpha 1"):
        PairedBettingTest(alpha=1)
