"""Testing by betting: candidates against fresh held-out images, with a verdict at any time.

Pairs (c_t, r_t) are streamed, and B_t = 1 where the candidate scores higher. Under the null the
two are exchangeable, so B_t is a fair coin whatever came before, and the wealth of a gambler,

    W_t = prod_s (1 + nu_s (2 B_s - 1)),    nu_s = clip(2 (k_{s-1} + 1/2) / s - 1, 0, 0.99),

with k_{s-1} the successes so far, is a martingale of mean 1: by Ville's inequality it ever reaches
1/alpha with probability at most alpha. So one may look after every pair, and stop at will.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from remanence.audit.dejavu.scores import as_scores
from remanence.errors import InputError


class PairedBettingTest:
    """One-sided, anytime-valid test of candidates against references.

    Every held-out image may be used once only, and pairs must not depend on one another: give one
    image of every group of duplicates.

    Args:
        alpha: Level; the test decides once the wealth reaches 1 / alpha.
        seed: For breaking ties.

    Attributes:
        pairs: Pairs seen.
        wins: Pairs in which the candidate scored higher.
        log_wealth: Natural logarithm of the wealth now.
        decided_at: The number of the pair at which the wealth first reached 1 / alpha, else None.

    Raises:
        InputError: `alpha` is out of range.
    """

    def __init__(self, alpha: float = 0.05, *, seed: int = 0) -> None:
        if not 0 < alpha < 1:
            raise InputError(f"alpha {alpha} is not a level: give a number between 0 and 1")
        self.alpha = alpha
        self.pairs = 0
        self.wins = 0
        self.log_wealth = 0.0
        self.decided_at: int | None = None
        self._highest = 0.0
        self._generator = np.random.default_rng(seed)

    def update(self, candidate: ArrayLike, reference: ArrayLike) -> float:
        """Bet on a batch of pairs, in order.

        Args:
            candidate: Scores (B,), higher = more member-like.
            reference: Scores (B,) of fresh held-out images.

        Returns:
            The e-value, which is the wealth after this batch; at most 1e308.

        Raises:
            InputError: The lengths differ, or scores are empty or not finite.
        """
        candidate, reference = as_scores(candidate, "candidate"), as_scores(reference, "reference")
        if len(candidate) != len(reference):
            raise InputError(
                f"{len(candidate)} candidates and {len(reference)} references do not pair up: "
                "give as many of each"
            )
        coin = self._generator.random(len(candidate)) < 0.5
        won = np.where(candidate == reference, coin, candidate > reference)
        before = self.wins + np.cumsum(won) - won
        s = self.pairs + np.arange(1, len(won) + 1)
        bet = np.clip(2 * (before + 0.5) / s - 1, 0, 0.99)
        path = self.log_wealth + np.cumsum(np.log1p(np.where(won, bet, -bet)))
        reached = path >= -math.log(self.alpha)
        if self.decided_at is None and reached.any():
            self.decided_at = self.pairs + int(reached.argmax()) + 1
        self._highest = max(self._highest, float(path.max()))
        self.log_wealth = float(path[-1])
        self.wins += int(won.sum())
        self.pairs += len(won)
        return self.e_value

    @property
    def e_value(self) -> float:
        """The wealth now; at most 1e308."""
        return math.exp(min(self.log_wealth, 709.0))

    @property
    def decided(self) -> bool:
        """Whether the null was rejected at any pair so far; it stays rejected."""
        return self.decided_at is not None

    @property
    def log10_p(self) -> float:
        """Decimal logarithm of the anytime-valid p-value, 1 / the highest wealth so far."""
        return -self._highest / math.log(10)
