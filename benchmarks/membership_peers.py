"""The definitions of LiRA and RMIA as plain loops, and the libraries that score them.

Every contestant is a function that lays out the answers as its library takes them, which is not
timed, and returns a function that scores. The libraries divide a variance by n where ours divides
by n - 1: for LiRA they get the same margins, stretched around the mean of each sample and side by
sqrt(n / (n - 1)), with which the definitions agree. RMIA's agree as they are.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
from scipy.special import expit
from scipy.stats import norm

from remanence.audit.membership import References, Signals, balanced_design

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Scorer = Callable[[], Floats]


@dataclass(frozen=True)
class Answers:
    """Log-odds of the label from a target (N,) and from its references (K, N).

    Attributes:
        target: (N,) float64.
        references: (K, N) float64.
        inside: (K, N) bool, True where a reference was trained on the sample; K / 2 a sample.
        member: (N,) bool, the truth of the target.
    """

    target: Floats
    references: Floats
    inside: NDArray[np.bool_]
    member: NDArray[np.bool_]

    @classmethod
    def draw(cls, count: int, models: int, seed: int) -> Answers:
        """Draw samples of differing difficulty, on which training has a differing effect."""
        rng = np.random.default_rng(seed)
        easy, memorised = rng.normal(2, 2, count), rng.gamma(2, 0.5, count)
        spread = rng.uniform(0.5, 1.5, count)
        inside = balanced_design(models, count, seed)
        member = rng.random(count) < 0.5
        target = easy + memorised * member + spread * rng.normal(size=count)
        noise = spread * rng.normal(size=(models, count))
        return cls(target, easy + memorised * inside + noise, inside, member)

    def first(self, count: int) -> Answers:
        """Return the first samples."""
        return Answers(
            self.target[:count],
            self.references[:, :count],
            self.inside[:, :count],
            self.member[:count],
        )

    def stretched(self) -> Answers:
        """Return margins whose variance over n is that of these over n - 1, on either side."""
        n = len(self.references) // 2
        references = self.references.copy()
        for side in (self.inside, ~self.inside):
            mean = np.where(side, self.references, 0).sum(axis=0) / n
            away = (self.references - mean) * np.sqrt(n / (n - 1))
            references[side] = (mean + away)[side]
        return Answers(self.target, references, self.inside, self.member)

    def signals(self) -> Signals:
        """Return the target's answers as ours reads them."""
        correct = np.full(len(self.target), np.nan)
        return Signals(
            np.logaddexp(0, -self.target),
            self.target,
            expit(self.target),
            correct,
            correct,
            np.zeros(len(self.target), dtype=np.int64),
        )

    def pool(self) -> References:
        """Return the references' answers as ours reads them."""
        loss = np.logaddexp(0, -self.references)
        return References(loss, self.references, expit(self.references), self.inside)


def lira_loop(answers: Answers) -> Scorer:
    """Score sample by sample, with SciPy's normal law (arXiv 2112.03570, Algorithm 1)."""

    def score() -> Floats:
        scores = np.empty(len(answers.target))
        for i, margin in enumerate(answers.target):
            side = answers.inside[:, i]
            inside, outside = answers.references[side, i], answers.references[~side, i]
            log_in = norm.logpdf(margin, inside.mean(), inside.std(ddof=1))
            log_out = norm.logpdf(margin, outside.mean(), outside.std(ddof=1))
            scores[i] = log_in - log_out
        return scores

    return score


def rmia_loop(answers: Answers, population: Answers) -> Scorer:
    """Score sample by sample, each against the whole population (arXiv 2312.03262, eq. 2)."""
    parts = [(expit(some.target), expit(some.references)) for some in (answers, population)]

    def score() -> Floats:
        x, z = (target / references.mean(axis=0) for target, references in parts)
        return np.array([np.mean(ratio / z > 1) for ratio in x])

    return score


def privacyguard_lira(stretched: Answers) -> Scorer:
    """Score with PrivacyGuard's `prepare_lira_data` and `LiraAttack`, online."""
    prepare = import_module("privacy_guard.shadow_model_training.training").prepare_lira_data
    lira = import_module("privacy_guard.attacks.lira_attack")
    references = stretched.references[:, :, None]
    shadows = [(None, inside) for inside in stretched.inside]

    def score() -> Floats:
        target = (None, stretched.member)
        train, test, _, _ = prepare(stretched.target, references, target, shadows)
        for frame in (train, test):  # it adds 1e-8, which would show in the ninth place
            frame[["score_std_in", "score_std_out"]] -= 1e-8
        attack = lira.LiraAttack(train, test, lira.AggregationType.NONE, online_attack=True)
        return _of_frames(attack.run_attack(), stretched.member)

    return score


def privacyguard_rmia(answers: Answers, population: Answers) -> Scorer:
    """Score with PrivacyGuard's `RmiaAttack`, online."""
    rmia = import_module("privacy_guard.attacks.rmia_attack")
    pandas = import_module("pandas")

    def frame(some: Answers, rows: NDArray[np.bool_]) -> Any:
        columns = {"user_id": np.flatnonzero(rows), "score_orig": expit(some.target[rows])}
        for k, (values, inside) in enumerate(zip(some.references, some.inside, strict=True)):
            columns[f"score_ref_{k}"] = expit(values[rows])
            columns[f"member_ref_{k}"] = inside[rows]
        return pandas.DataFrame(columns)

    everyone = np.ones(len(population.target), dtype=bool)
    frames = [frame(answers, answers.member), frame(answers, ~answers.member)]
    frames.append(frame(population, everyone))

    def score() -> Floats:
        attack = rmia.RmiaAttack(
            *frames,
            rmia.AggregationType.NONE,
            num_reference_models=len(answers.references),
            online=True,
        )
        return _of_frames(attack.run_attack(), answers.member)

    return score


def leakpro_lira(stretched: Answers) -> Scorer:
    """Score with LeakPro's `AttackLiRA.run_attack`, online, without its report."""
    module = import_module("leakpro.attacks.mia_attacks.lira")
    attack = _leakpro(module.AttackLiRA, stretched)
    attack.num_shadow_models, attack.fix_var_threshold = len(stretched.references), 32
    attack.var_calculation = "carlini"
    attack.shadow_models_logits, attack.target_logits = stretched.references, stretched.target

    def score() -> Floats:
        no_bar = patch.object(module, "tqdm", lambda values, **_: values)
        with patch.object(module, "MIAResult"), no_bar:
            attack.run_attack()
        return _of_sides(attack, stretched.member)

    return score


def leakpro_rmia(answers: Answers, population: Answers) -> Scorer:
    """Score with LeakPro's `AttackRMIA.run_attack`, online, without its report."""
    module = import_module("leakpro.attacks.mia_attacks.rmia")
    logging.disable(logging.INFO)
    attack = _leakpro(module.AttackRMIA, answers)
    attack.temperature, attack.gamma, attack.epsilon = 1.0, 1.0, 0.0
    attack.ground_truth_indices = np.zeros(len(answers.target), dtype=np.int64)
    attack.logits_theta = expit(answers.target)[:, None]
    attack.logits_shadow_models = list(expit(answers.references)[:, :, None])
    target, references = expit(population.target)[None], expit(population.references)

    def score() -> Floats:
        # Its `prepare_attack`, which asks for models, comes to this.
        attack.ratio_z = target / references.mean(axis=0)
        confidences = patch.object(module, "softmax_logits", lambda values, _: values)
        with patch.object(module, "MIAResult"), confidences:
            attack.run_attack()
        return _of_sides(attack, answers.member)

    return score


def _leakpro(attack_class: Any, answers: Answers) -> Any:
    members = {"in_members": answers.member, "out_members": ~answers.member}
    audit = {name: np.flatnonzero(rows) for name, rows in members.items()}
    # Its constructor asks for a model and a data set: what scoring reads is put in place instead.
    attack: Any = object.__new__(type("Attack", (attack_class,), {"audit_dataset": audit}))
    attack.configs, attack.online = attack_class.AttackConfig(), True
    attack.out_indices = ~answers.inside
    return attack


def _of_sides(attack: Any, member: NDArray[np.bool_]) -> Floats:
    scores = np.empty(len(member))
    scores[member] = attack.in_member_signals[:, 0]
    scores[~member] = attack.out_member_signals[:, 0]
    return scores


def _of_frames(result: Any, member: NDArray[np.bool_]) -> Floats:
    scores = np.empty(len(member))
    scores[member] = result.df_train_merge["score"]
    scores[~member] = result.df_test_merge["score"]
    return scores
