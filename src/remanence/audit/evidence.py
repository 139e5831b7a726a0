"""The evidence that every audit gives: what was asked, what was assumed, the answer, how sure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["detected", "not detected", "not interpretable"]


@dataclass(frozen=True)
class Check:
    """One assumption of a test, looked at in the data.

    Attributes:
        assumption: What must be true for the answer to mean anything, as a sentence.
        holds: Whether it was found to hold; None where the data at hand cannot tell.
        finding: What was found, with figures.
    """

    assumption: str
    holds: bool | None
    finding: str


@dataclass(frozen=True)
class Estimate:
    """A figure with its confidence interval.

    Attributes:
        name: What is estimated, for example "AUC" or "leaked fraction".
        value: Point estimate.
        low: Lower end of the interval.
        high: Upper end of the interval.
        confidence: Level of the interval, in (0, 1).
    """

    name: str
    value: float
    low: float
    high: float
    confidence: float = 0.95

    def __str__(self) -> str:
        return (
            f"{self.name} {self.value:.3f} ({self.confidence:.0%} interval "
            f"{self.low:.3f} to {self.high:.3f})"
        )


@dataclass(frozen=True)
class Evidence:
    """One test and what may be concluded from it.

    The verdict is never stored, so that no audit can announce a finding that its own p-value or
    its own checks contradict.

    Attributes:
        question: What was asked, as a question.
        statistic: Name of the test statistic.
        value: Its value.
        null: The null hypothesis in words.
        log10_p: Decimal logarithm of the p-value (never -inf: it is computed in log space).
        method: How the p-value was computed, for example "exact" or "2,000 permutations".
        would_change: What would change the verdict, as a sentence.
        level: Significance level that was fixed before the data were seen.
        estimates: Effect sizes with their intervals.
        checks: The assumptions and whether they were found to hold.
        corrected_log10_p: The same after correction for several tests; equals `log10_p` for one.
    """

    question: str
    statistic: str
    value: float
    null: str
    log10_p: float
    method: str
    would_change: str
    level: float = 0.05
    estimates: tuple[Estimate, ...] = ()
    checks: tuple[Check, ...] = ()
    corrected_log10_p: float | None = None

    @property
    def p(self) -> float:
        """The p-value, corrected where several tests were made; 0.0 below 1e-308."""
        return float(10.0**self._deciding)

    @property
    def _deciding(self) -> float:
        return self.log10_p if self.corrected_log10_p is None else self.corrected_log10_p

    @property
    def failed(self) -> tuple[Check, ...]:
        """The assumptions that were found not to hold."""
        return tuple(check for check in self.checks if check.holds is False)

    @property
    def verdict(self) -> Verdict:
        """Not interpretable when a check failed, whatever the p-value; else by the level."""
        if self.failed or math.isnan(self._deciding):
            return "not interpretable"
        return "detected" if self._deciding <= math.log10(self.level) else "not detected"

    @property
    def answer(self) -> str:
        """The verdict as one sentence with its figures."""
        figures = f"{self.statistic} {self.value:.4g}, p {self.p_text} ({self.method})"
        if self.verdict == "not interpretable":
            why = "; ".join(check.finding for check in self.failed) or "the p-value is undefined"
            return f"Not interpretable: {why}. Without that: {figures}."
        found = "Detected" if self.verdict == "detected" else "Not detected"
        return f"{found} at level {self.level:g}: {figures}."

    @property
    def p_text(self) -> str:
        """The p-value for a reader: `= 0.031`, `= 10^-412.3`."""
        if self._deciding > -4:
            return f"= {self.p:.2g}"
        return f"= 10^{self._deciding:.1f}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        return {
            "question": self.question,
            "verdict": self.verdict,
            "answer": self.answer,
            "statistic": self.statistic,
            "value": self.value,
            "null": self.null,
            "log10_p": self.log10_p,
            "corrected_log10_p": self._deciding,
            "level": self.level,
            "method": self.method,
            "estimates": [vars(estimate) for estimate in self.estimates],
            "checks": [vars(check) for check in self.checks],
            "would_change": self.would_change,
        }
