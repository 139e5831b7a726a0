"""Race of membership scores, LiRA and RMIA: ours, plain loops, PrivacyGuard and LeakPro.

All score the same samples from the same answers of one target and its references, drawn at random,
and must agree to 1e-9: a lap that does not stops the race. A library that is not installed is left
out. What loops over samples scores the first of them only: its time grows with their number, so
that its samples a second hold for all.
"""

from __future__ import annotations

import time
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

import harness
from membership_peers import (
    Answers,
    leakpro_lira,
    leakpro_rmia,
    lira_loop,
    privacyguard_lira,
    privacyguard_rmia,
    rmia_loop,
)
from remanence.audit.membership import RMIA, LiRA, rmia_score

if TYPE_CHECKING:
    import argparse

    from membership_peers import Floats, Scorer

LIBRARIES = {"privacy_guard": "privacyguard-platform", "leakpro": "leakpro"}
TOLERANCE = 1e-9


def ours_lira(answers: Answers) -> Scorer:
    """Score with remanence, each sample with variances of its own, as from 32 references a side."""
    return partial(LiRA(variance="per_sample").score, answers.signals(), answers.pool())


def ours_rmia(answers: Answers, population: Answers) -> Scorer:
    """Score with remanence; the ratios of the population are part of it, as for the others."""
    signals, pool = answers.signals(), answers.pool()
    others, their_pool = population.signals(), population.pool()
    return lambda: RMIA(online=True).with_population(others, their_pool).score(signals, pool)


def ratios(answers: Answers) -> Floats:
    """Return log p(x | theta) / p(x), (N,), from which a score is counted."""
    return RMIA(online=True).log_ratio(answers.signals(), answers.pool())


def count_loop(x: Floats, z: Floats) -> Floats:
    """Count sample by sample."""
    return np.array([np.mean(ratio - z > 0) for ratio in x])


def count_dense(x: Floats, z: Floats) -> Floats:
    """Count over the matrix of all pairs."""
    counts: Floats = (x[:, None] - z > 0).mean(axis=1)
    return counts


def lap(name: str, score: Scorer, expected: Floats) -> harness.Lap:
    """Time one scoring and compare it with ours."""
    began = time.perf_counter()
    scores = score()
    seconds = time.perf_counter() - began
    difference = float(np.abs(scores - expected[: len(scores)]).max())
    if difference > TOLERANCE:
        raise SystemExit(f"{name} differs from ours by {difference:.3g}: not the same definition")
    return harness.Lap(len(scores), seconds, {"samples": len(scores), "difference": difference})


def main() -> None:
    """Run the races."""
    options = _options()
    found = {module: package for module, package in LIBRARIES.items() if find_spec(module)}
    facts = harness.environment(["numpy", "scipy", *found.values()], options.threads)
    for module in LIBRARIES.keys() - found.keys():
        print(f"{LIBRARIES[module]}: not installed, left out")
    answers = Answers.draw(options.samples, options.models, seed=0)
    population = Answers.draw(options.population, options.models, seed=1)
    few, stretched = answers.first(options.loop_samples), answers.stretched()
    x, z = ratios(answers), ratios(population)

    lira = {"remanence": ours_lira(answers), "plain loop": lira_loop(few)}
    rmia = {"remanence": ours_rmia(answers, population), "plain loop": rmia_loop(few, population)}
    if "privacy_guard" in found:
        lira["PrivacyGuard"] = privacyguard_lira(stretched)
        rmia["PrivacyGuard"] = privacyguard_rmia(answers, population)
    if "leakpro" in found:
        lira["LeakPro"] = leakpro_lira(stretched.first(options.loop_samples))
        rmia["LeakPro"] = leakpro_rmia(few, population)
    counting: dict[str, Scorer] = {
        "remanence": partial(rmia_score, x, z),
        "plain loop": partial(count_loop, x[: options.loop_samples], z),
        "dense matrix": partial(count_dense, x[: options.loop_samples], z),
    }
    against = f"population of {options.population:,}"
    courses = {
        f"LiRA online, {options.models} references": lira,
        f"RMIA online, {options.models} references, {against}": rmia,
        f"RMIA, the counting alone, {against}": counting,
    }
    races = []
    for title, scorers in courses.items():
        expected = scorers["remanence"]()
        laps = {name: partial(lap, name, score, expected) for name, score in scorers.items()}
        races.append(harness.race(title, laps, options, unit="samples/s"))
    harness.finish(races, facts, options)


def _options() -> argparse.Namespace:
    options = harness.parser(__doc__)
    add = options.add_argument
    add("--samples", type=int, default=50_000)
    add("--models", type=int, default=64, help="references, an even number")
    add("--population", type=int, default=10_000, help="samples that RMIA compares with")
    add("--loop-samples", type=int, default=5_000, help="samples of what loops over samples")
    return options.parse_args()


if __name__ == "__main__":
    main()
