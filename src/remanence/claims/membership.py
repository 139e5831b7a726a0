"""Membership inference: a threshold for each sample finds members that one for all does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from remanence.audit.evidence import Estimate
from remanence.audit.membership.attacks import ATTACKS, References, references_from_logits
from remanence.audit.membership.designs import balanced_design
from remanence.audit.membership.references import train_references
from remanence.audit.membership.roc import evaluate, mann_whitney_log10_p
from remanence.claims.claim import Claim
from remanence.kit.report import Report, curve_figure
from remanence.kit.statistics import mean_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

MODELS = 16
SAMPLES = 1200  # in the design; the rest of the digits no model ever sees
NAMES = {
    "zero-one": "wrong or right (0-1)",
    "malt": "one threshold for all (MALT)",
    "mast": "a threshold each (MAST, free energy)",
    "lira": "likelihood ratio (LiRA)",
    "rmia": "pairwise ratios (RMIA)",
}
LEVEL = 0.05


@dataclass(frozen=True)
class _Measured:
    """Figures of every model as the audited one.

    Attributes:
        auc: AUC by attack, (K,).
        caught: Share of the members found at 1 % false positives by attack, (K,).
        unseen: AUC by attack between two halves of the images that no model saw, (K,).
        alarms: How many of these K audits of unseen images the best attack called a leak.
        rates: True positive rate by attack at `fprs`, mean over models.
        fprs: False positive rates.
        accuracy: Mean accuracy on members and on non-members.
    """

    auc: dict[str, NDArray[np.float64]]
    caught: dict[str, NDArray[np.float64]]
    unseen: dict[str, NDArray[np.float64]]
    alarms: int
    rates: dict[str, NDArray[np.float64]]
    fprs: NDArray[np.float64]
    accuracy: tuple[float, float]


def membership_claim() -> Claim:
    """Measure the claim of arXiv 1908.11229 on handwritten digits."""
    measured = _measure(*_digits())
    gain = _average(measured.auc["mast"] - measured.auc["malt"])
    chance = _average(measured.unseen["mast"])
    at_chance = chance.low <= 0.5 <= chance.high and measured.alarms <= 3
    holds = gain.low >= 0.02 and at_chance
    seen, unseen = measured.accuracy
    return Claim(
        system="membership",
        paper="White-box vs black-box: Bayes optimal strategies for membership inference "
        "(1908.11229)",
        sentence="The best attack needs only the loss and a threshold for each sample; with "
        "reference models that threshold finds members that one threshold for all misses.",
        measured=(
            f"Accuracy {seen:.1%} on members, {unseen:.1%} on the rest. AUC "
            f"{measured.auc['malt'].mean():.3f} with one threshold, "
            f"{measured.auc['mast'].mean():.3f} "
            f"with one each: {gain.value:+.3f} (95 % interval {gain.low:+.3f} to "
            f"{gain.high:+.3f}). Members found at 1 % false positives: "
            f"{measured.caught['malt'].mean():.1%} and {measured.caught['mast'].mean():.1%}. "
            f"Mean over {MODELS} audited models, {MODELS - 2} references each."
        ),
        control=(
            f"Images that no model saw, called members: AUC {chance.value:.3f} ({chance.low:.3f} "
            f"to {chance.high:.3f}); {measured.alarms} of {MODELS} audits raised an alarm at "
            f"level {LEVEL:g}."
        ),
        holds=holds,
        data="scikit-learn's 1,797 handwritten digits of 8x8 pixels, a 64-128-10 perceptron",
        details=lambda report: _details(report, measured),
    )


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.tensor(pixels[order] / 16, dtype=torch.float32)
    return x, torch.tensor(labels[order], dtype=torch.int64)


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def _measure(x: torch.Tensor, y: torch.Tensor) -> _Measured:
    design = balanced_design(MODELS, SAMPLES, seed=0)
    pool = train_references(
        _perceptron,
        x[:SAMPLES],
        y[:SAMPLES],
        design,
        epochs=60,
        batch_size=64,
        lr=0.1,
    )
    logits = pool.logits(x)
    references = references_from_logits(logits[:, :SAMPLES], y[:SAMPLES], design)
    # To no reference is an unseen image IN: half of them are called members, at random.
    called = balanced_design(MODELS, len(x) - SAMPLES - (len(x) - SAMPLES) % 2, seed=1)
    strangers = references_from_logits(
        logits[:, SAMPLES : SAMPLES + called.shape[1]], y[SAMPLES:][: called.shape[1]], called
    )
    fprs = np.geomspace(0.002, 1, 40)
    auc: dict[str, list[float]] = {name: [] for name in NAMES}
    caught: dict[str, list[float]] = {name: [] for name in NAMES}
    unseen: dict[str, list[float]] = {name: [] for name in NAMES}
    rates: dict[str, list[Any]] = {name: [] for name in NAMES}
    alarms = 0
    for k in range(MODELS):
        for name in NAMES:
            scores, member = _attack(name, references, k)
            roc = evaluate(scores, member, fprs=(0.01,))
            auc[name].append(roc.auc.value)
            caught[name].append(roc.tpr_at[0].value)
            rates[name].append(np.interp(fprs, roc.fpr, roc.tpr))
            null, stranger = _attack(name, strangers, k)
            unseen[name].append(evaluate(null, stranger).auc.value)
            if name == "mast":
                alarms += mann_whitney_log10_p(null, stranger) <= np.log10(LEVEL)
    right = (logits[:, :SAMPLES].argmax(2) == y[:SAMPLES]).numpy()
    return _Measured(
        auc={name: np.array(v) for name, v in auc.items()},
        caught={name: np.array(v) for name, v in caught.items()},
        unseen={name: np.array(v) for name, v in unseen.items()},
        alarms=int(alarms),
        rates={name: np.mean(v, axis=0) for name, v in rates.items()},
        fprs=fprs,
        accuracy=(float(right[design].mean()), float(right[~design].mean())),
    )


def _attack(name: str, references: References, k: int) -> tuple[Any, Any]:
    target, others, member = references.leave_out(k)
    return ATTACKS[name]().score(target, others), member


def _average(values: NDArray[np.float64]) -> Estimate:
    return Estimate("mean", float(values.mean()), *mean_interval(values))


def _details(report: Report, measured: _Measured) -> None:
    report.figure(
        curve_figure(
            {name: (measured.fprs, rate, None, None) for name, rate in measured.rates.items()},
            "false positive rate",
            "members found",
            {"1 %": 0.01},
        ),
        "Members found against non-members wrongly called members, mean over the audited models.",
        "receiver operating characteristic of five attacks",
    )

    def row(name: str) -> list[Any]:
        found = _average(measured.auc[name])
        chance = _average(measured.unseen[name])
        return [
            NAMES[name],
            found.value,
            found.low,
            found.high,
            100 * float(measured.caught[name].mean()),
            chance.value,
            chance.low,
            chance.high,
        ]

    report.table(
        ["attack", "AUC", "low", "high", "found at 1 %, %", "AUC, unseen", "low", "high"],
        [row(name) for name in NAMES],
        f"95 % intervals over {MODELS} audited models, which share their training images and so "
        "are not fully independent. The last three columns are the control: images that no model "
        "saw, half of them called members.",
    )
