"""The tests of `remanence audit dejavu`, run, and what they found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remanence.audit.dejavu import (
    KSResult,
    PairedBettingTest,
    Power,
    Test,
    contributions,
    detect,
    detect_many,
    detectable,
    fraction_equivalence,
    ks_two_sample,
    null_rejections,
    run_test,
)
from remanence.audit.dejavu.detect import NULL, QUESTION, UNMENDED, sentence
from remanence.audit.evidence import Check, Estimate, Evidence
from remanence.jobs.audit.dejavu_scores import Scorer
from remanence.jobs.audit.dejavu_sets import Compared
from remanence.kit.progress import bar

Scores = NDArray[np.float64]

NULL_SIDE = 200  # images a side when held-out images are tested against held-out images


@dataclass(frozen=True, eq=False)
class Found:
    """What was found; mappings are by hypothesis, "" where there is only one.

    Attributes:
        test: The declared test.
        evidence: Its evidence.
        sets: The sets as they were tested.
        scores: Scores of candidates and references.
        distance: One-sided Kolmogorov-Smirnov distance of these scores.
        contribution: Of each candidate.
        exploratory: Further tests.
        members: Scores of known training images.
        power: What the test could find.
        absence: The equivalence test.
        alarms: How often held-out images accuse held-out images.
        wealth: Pairs and logarithm of the wealth after each batch.
        decided_at: The pair that decided the bets.
    """

    test: Test
    evidence: Mapping[str, Evidence]
    sets: Mapping[str, Compared]
    scores: Mapping[str, tuple[Scores, Scores]]
    distance: Mapping[str, KSResult]
    contribution: Mapping[str, Scores]
    exploratory: tuple[Evidence, ...] = ()
    members: Scores | None = None
    power: Power | None = None
    absence: Evidence | None = None
    alarms: Estimate | None = None
    wealth: tuple[tuple[int, float], ...] = ()
    decided_at: int | None = None

    @property
    def fraction(self) -> Estimate | None:
        """The leaked fraction, where it could be estimated."""
        estimates = next(iter(self.evidence.values())).estimates
        return next((e for e in estimates if e.name == "leaked fraction"), None)

    def results(self) -> dict[str, Any]:
        """Return plain values for `results.json`."""
        each = {
            name: {
                **evidence.to_dict(),
                "distance": self.distance[name].d,
                "distance_at_score": self.distance[name].location,
                "tested": [len(self.sets[name].candidate), len(self.sets[name].reference)],
                **self.sets[name].counts,
            }
            for name, evidence in self.evidence.items()
        }
        if "" not in each:
            detected = [n for n, e in self.evidence.items() if e.verdict == "detected"]
            return {"test": self.test, "detected": detected, "hypotheses": each}
        return {
            "test": self.test,
            **each[""],
            "leaked_fraction": None if self.fraction is None else vars(self.fraction),
            "power": None if self.power is None else asdict(self.power),
            "exploratory": [evidence.to_dict() for evidence in self.exploratory],
            "equivalence": None if self.absence is None else self.absence.to_dict(),
            "false_alarms": None if self.alarms is None else vars(self.alarms),
            "wealth": [list(point) for point in self.wealth],
            "decided_at": self.decided_at,
        }


def one(scorer: Scorer, sets: Compared, options: Mapping[str, Any], tests: Sequence[Test]) -> Found:
    """Run the declared test on one pair of sets, and all that was asked besides.

    Args:
        scorer: Gives the scores.
        sets: Candidates and references.
        options: The command's.
        tests: The declared test, then those to explore.

    Raises:
        InputError: As `detect`, `null_rejections` and `fraction_equivalence`.
    """
    level, permutations, seed = options["level"], options["permutations"], options["seed"]
    test, groups = tests[0], sets.groups
    scores = {
        name: (scorer.scores(name, sets.candidate), scorer.scores(name, sets.reference))
        for name in tests
    }
    members = None if sets.known is None else scorer.scores(test, sets.known)
    checks, alarms = sets.checks, None
    if options["null_check"]:
        alone = sets.one_of_each()
        alarms = null_rejections(
            scorer.scores(test, alone.reference),
            lambda a, b: run_test(test, a, b, permutations=min(permutations, 499)).log10_p,
            options["null_check"],
            min(NULL_SIDE, len(alone.reference) // 2),
            level,
            seed,
        )
        checks = (
            *checks,
            Check(
                "Held-out images against held-out images are accused no more often than agreed.",
                alarms.low <= level,
                f"{alarms} at level {level:g}, {options['null_check']:,} draws",
            ),
        )
    detection = detect(
        *scores[test],
        test=test,
        exploratory={name: scores[name] for name in tests[1:]},
        known_members=members,
        groups=groups,
        checks=checks,
        level=level,
        permutations=permutations,
        seed=seed,
    )
    power, absence = None, None
    if members is not None:
        sizes = [len(np.unique(g)) for g in groups] if groups else [*map(len, scores[test])]
        power = detectable(test, sizes[0], sizes[1], members, scores[test][1], level=level)
    if members is not None and options["equivalence"]:
        absence = fraction_equivalence(
            *scores[test],
            members,
            margin=options["equivalence"],
            level=level,
            groups=(None, None, None) if groups is None else (*groups, None),
            checks=checks,
            seed=seed,
        )
    told = scores[test]
    if test == "learned":
        # The scores out of fold do not depend on the permutations.
        told = run_test(test, *told, groups=groups, permutations=1, seed=seed).scores
    return Found(
        test,
        {"": detection.primary},
        {"": sets},
        {"": told},
        {"": ks_two_sample(*told, "greater", "asymptotic")},
        {"": contributions(*told)},
        exploratory=detection.exploratory,
        members=members,
        power=power,
        absence=absence,
        alarms=alarms,
    )


def several(
    scorer: Scorer,
    compared: Mapping[str, Compared],
    test: Test,
    level: float,
    permutations: int,
    seed: int,
) -> Found:
    """Run the declared test on several pairs of sets, corrected for their number.

    Raises:
        InputError: As `detect_many`.
    """
    sets = {name: each.one_of_each() for name, each in compared.items()}
    scores = {
        name: (scorer.scores(test, each.candidate), scorer.scores(test, each.reference))
        for name, each in sets.items()
    }
    evidence = detect_many(
        [(name, *pair) for name, pair in scores.items()],
        test=test,
        checks={name: each.checks for name, each in sets.items()},
        level=level,
        permutations=permutations,
        seed=seed,
    )
    if test == "learned":
        scores = {
            name: run_test(test, *pair, permutations=1, seed=seed).scores
            for name, pair in scores.items()
        }
    return Found(
        test,
        evidence,
        sets,
        scores,
        {name: ks_two_sample(*pair, "greater", "asymptotic") for name, pair in scores.items()},
        {name: contributions(*pair) for name, pair in scores.items()},
    )


def bet(scorer: Scorer, sets: Compared, test: Test, level: float, batch: int, seed: int) -> Found:
    """Bet on pairs in random order, batch by batch, until the level is reached or none is left."""
    random = np.random.default_rng(seed)
    pairs = min(len(sets.candidate), len(sets.reference))
    order = [random.permutation(len(s))[:pairs] for s in (sets.candidate, sets.reference)]
    bets, wealth = PairedBettingTest(level, seed=seed), [(0, 0.0)]
    seen: list[tuple[Any, Any]] = []
    with bar("bet", pairs, show=scorer.fabric.is_global_zero) as progress:
        for start in range(0, pairs, batch):
            rows = [own[start : start + batch] for own in order]
            pair = (
                scorer.scores(test, sets.candidate.subset(rows[0])),
                scorer.scores(test, sets.reference.subset(rows[1])),
            )
            bets.update(*pair)
            seen.append(pair)
            wealth.append((bets.pairs, bets.log_wealth))
            progress.advance(len(rows[0]))
            if bets.decided:
                break
    used = replace(
        sets,
        candidate=sets.candidate.subset(order[0][: bets.pairs]),
        reference=sets.reference.subset(order[1][: bets.pairs]),
    )
    scores = np.concatenate([a for a, _ in seen]), np.concatenate([b for _, b in seen])
    highest = 10.0 ** min(-bets.log10_p, 300.0)
    evidence = Evidence(
        question=QUESTION,
        statistic="highest wealth of the bets",
        value=highest,
        null=NULL,
        log10_p=bets.log10_p,
        method=f"betting on {bets.pairs:,} of {pairs:,} pairs, valid whenever it is stopped",
        would_change=sentence("more pairs may yet decide an open question", UNMENDED),
        level=level,
        checks=sets.checks,
    )
    return Found(
        test,
        {"": evidence},
        {"": used},
        {"": scores},
        {"": ks_two_sample(*scores, "greater", "asymptotic")},
        {"": contributions(*scores)},
        wealth=tuple(wealth),
        decided_at=bets.decided_at,
    )
