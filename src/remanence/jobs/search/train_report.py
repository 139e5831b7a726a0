"""The report of `remanence search train`: how well few bytes do, beside others of the same size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from remanence.kit.report import Report, curve_figure
from remanence.kit.statistics import mcnemar, proportion_interval
from remanence.search.choice import (
    SHORT,
    Advice,
    Comparison,
    Trial,
    advise,
    best_trial,
    trial_rank,
)
from remanence.search.heldout import RANKS, SATURATED, Score, mean_recall, telling_rank
from remanence.search.index.file import describe
from remanence.search.lattice.code import SphericalCode

CURVE = (1, 2, 5, 10, 20, 50, 100)  # R of recall@R
KINDS = {"SphereLattice": "lattice", "E8Shell": "E8", "SignCode": "signs"}


@dataclass(frozen=True, eq=False)
class Measured:
    """One method on the queries to report by.

    Attributes:
        name: For the table.
        nbytes: Bytes a vector, or those of the code that it is shown beside.
        hits: For each query and each R of `CURVE`, whether the true nearest neighbour is among the
            first R (q, 7).
    """

    name: str
    nbytes: int
    hits: NDArray[np.bool_]

    def recall(self, rank: int) -> float:
        """Return recall@R."""
        return float(self.hits[:, CURVE.index(rank)].mean())

    def interval(self, rank: int) -> tuple[float, float]:
        """Return its interval of 95 %."""
        hits = self.hits[:, CURVE.index(rank)]
        return proportion_interval(int(hits.sum()), len(hits))

    def plain(self) -> dict[str, Any]:
        """Return the figures for `results.json`."""
        recalls = {str(rank): [self.recall(rank), *self.interval(rank)] for rank in CURVE}
        return {"name": self.name, "nbytes": self.nbytes, "recall": recalls}


@dataclass(frozen=True)
class Finding:
    """All that a run found.

    Attributes:
        source: The vectors, as the user wrote them.
        in_dim: Their dimension.
        hidden: Width of the network.
        n_train: Vectors to learn from.
        n_base: Vectors to search among.
        n_learned: How many of them were learned from; the others were held out.
        n_choosing: Vectors that the queries which choose are searched for among.
        n_queries: Held-out queries to report by; as many others chose.
        codes: The codes, by rising bytes.
        koleo: lambda.
        trials: The short trainings, if there were any.
        best_rank: R of the recall that the epoch was chosen by.
        best_stage: "train" or "finetune".
        best_epoch: The epoch of it that was kept.
        best_scores: Its recall on the queries to choose by.
        rows: `metrics.jsonl` of both stages.
        measured: By code: ours, ours in floats, rivals.
        advice: By bytes a vector.
        failed: Why a rival could not be run.
        notes: What must be said of a rival.
        warning: What the user was warned of.
    """

    source: str
    in_dim: int
    hidden: int
    n_train: int
    n_base: int
    n_learned: int
    n_choosing: int
    n_queries: int
    codes: tuple[SphericalCode, ...]
    koleo: float
    trials: tuple[Trial, ...]
    best_rank: int
    best_stage: str
    best_epoch: int
    best_scores: tuple[Score, ...]
    rows: tuple[dict[str, Any], ...]
    measured: tuple[Measured, ...]
    advice: Mapping[int, Advice]
    failed: Mapping[str, str]
    notes: tuple[str, ...]
    warning: str

    def results(self) -> dict[str, Any]:
        """Return the figures for `results.json`."""
        return {
            "n_train": self.n_train,
            "n_base": self.n_base,
            "n_base_learned": self.n_learned,
            "n_base_choosing": self.n_choosing,
            "n_queries": self.n_queries,
            "in_dim": self.in_dim,
            "codes": {str(code.nbytes): _described(code) for code in self.codes},
            "koleo": self.koleo,
            "best": {"rank": self.best_rank, "stage": self.best_stage, "epoch": self.best_epoch},
            "validation": [asdict(each) for each in self.best_scores],
            "measured": [each.plain() for each in self.measured],
            "advice": {str(size): asdict(each) for size, each in self.advice.items()},
            "trials": [asdict(each) for each in self.trials],
            "failed": dict(self.failed),
            "notes": list(self.notes),
            "warning": self.warning,
        }


def code_name(code: SphericalCode) -> str:
    """Return a code's name: its bytes, kind and parameters."""
    kind, plural = KINDS[type(code).__name__], "s" * (code.nbytes > 1)
    return f"{code.nbytes} byte{plural}, {kind} of dimension {code.dim}, squared norm {code.r2}"


def method_name(code: SphericalCode) -> str:
    """Return the name of our method with a code."""
    return f"catalyzer + {KINDS[type(code).__name__]}"


def advice_of(
    ours: Measured, theirs: Sequence[Measured], *, trained_on: int, in_dim: int
) -> Advice:
    """Compare recall query by query at the rank that tells; intervals hold together at 95 %."""
    rank = telling_rank(max(each.recall(10) for each in (ours, *theirs)))
    at = CURVE.index(rank)
    rows = []
    for each in theirs:
        found = mcnemar(ours.hits[:, at], each.hits[:, at], confidence=1 - 0.05 / len(theirs))
        rows.append(Comparison(each.name, ours.recall(rank), each.recall(rank), *found.interval))
    return advise(
        rows,
        rank=rank,
        nbytes=ours.nbytes,
        queries=len(ours.hits),
        trained_on=trained_on,
        in_dim=in_dim,
        method=ours.name,
    )


def build_report(finding: Finding) -> Report:
    """Write the report, but for the facts of the run."""
    sizes = " and ".join(str(code.nbytes) for code in finding.codes)
    report = Report(
        f"Neighbours of {finding.source} in {sizes} bytes a vector",
        f"{finding.n_train:,} vectors of dimension {finding.in_dim} to learn from",
    )
    for code in finding.codes:
        advice = finding.advice[code.nbytes]
        surely = {method_name(code): True, "no difference": None, "not compared": None}
        words = f"{code.nbytes} B: {advice.choice}"
        report.verdict(surely.get(advice.choice, False), advice.sentence, words)
    if finding.warning:
        report.text(f"Warning: {finding.warning}.")
    for code in finding.codes:
        _recall(report, finding, code)
    _training(report, finding)
    if finding.trials:
        _trials(report, finding)
    report.section("How it was done")
    report.text(
        f"A network of two hidden layers of {finding.hidden:,}, beside a linear map that begins as "
        "principal components, maps vectors to the unit sphere. It learned from triplets "
        "that what is near among the inputs stays near (positives from the "
        "nearest neighbours by Euclidean distance, negatives found anew each epoch among the "
        f"outputs), and from the KoLeo loss, weight {finding.koleo:g}, to spread vectors evenly. A "
        "code without a codebook rounds what comes out; queries are not rounded."
    )
    report.text(
        f"Held out were two sets of {finding.n_queries:,} queries and "
        f"{finding.n_base - finding.n_learned:,} of the vectors to search among; the other "
        f"{finding.n_learned:,} of these were learned from, by all methods alike, as few vectors "
        "are found too easily for methods to differ. The first set of queries, searched for among "
        f"{finding.n_choosing:,} vectors, chose the weight, the dimension and the epoch; the "
        "second was looked at once, for the tables above. Among more vectors every recall is "
        "lower, and among vectors that nothing learned from it may be: these figures compare "
        "methods and do not foretell the recall in another collection, which remanence search "
        "bench measures."
    )
    report.text(
        "Methods, weights and epochs are compared by recall@10, or, where the best finds "
        f"{100 * SATURATED:.0f} % or more of the neighbours among the first ten, by recall@1."
    )
    for name, why in finding.failed.items():
        report.text(f"{name} could not be run: {why}.")
    for note in finding.notes:
        report.text(f"Take care: {note}.")
    return report


def _recall(report: Report, finding: Finding, code: SphericalCode) -> None:
    rows = [each for each in finding.measured if each.nbytes == code.nbytes]
    report.section(f"Recall at {code.nbytes} byte{'s' * (code.nbytes > 1)}")
    header = ["method", *(word for r in RANKS for word in (f"recall@{r}, %", "95 %"))]
    report.table(
        header,
        [
            [each.name, *(cell for rank in RANKS for cell in _with_interval(each, rank))]
            for each in rows
        ],
        f"Share of {finding.n_queries:,} held-out queries whose true nearest neighbour, by "
        f"Euclidean distance of the inputs, is among the first R of {finding.n_base:,} vectors, "
        f"{finding.n_learned:,} of which were learned from. "
        f"The code: {code_name(code)}. What is not quantised takes {4 * code.dim} bytes a vector; "
        f"the rest takes {code.nbytes}, and learned from the same {finding.n_train:,} vectors.",
    )
    figure = curve_figure(
        {
            each.name: (
                CURVE,
                [100 * each.recall(rank) for rank in CURVE],
                [100 * each.interval(rank)[0] for rank in CURVE],
                [100 * each.interval(rank)[1] for rank in CURVE],
            )
            for each in rows
        },
        "R",
        "recall@R, %",
    )
    figure.axes[0].set_xscale("log")
    figure.axes[0].set_xticks(CURVE, [str(rank) for rank in CURVE], minor=False)
    figure.axes[0].set_xticks([], minor=True)
    report.figure(
        figure,
        "Recall against the length of the list, with intervals of 95 %.",
        f"recall at R of all methods at {code.nbytes} bytes",
    )


def _with_interval(each: Measured, rank: int) -> tuple[float, str]:
    low, high = (100 * value for value in each.interval(rank))
    return 100 * each.recall(rank), f"{low:.1f} to {high:.1f}"


def _training(report: Report, finding: Finding) -> None:
    report.section("Training")
    before = sum(row["stage"] == "train" for row in finding.rows)
    epochs = [row["step"] + before * (row["stage"] == "finetune") for row in finding.rows]
    kept = finding.best_epoch + before * (finding.best_stage == "finetune")
    rank = finding.best_rank
    where = {"kept": float(kept)}
    if before < len(finding.rows):
        where["end to end from here"] = before + 0.5
    report.text(
        f"Epoch {kept} was kept, which has the highest recall@{rank} in codes on the queries that "
        f"choose ({100 * mean_recall(finding.best_scores, rank):.1f} %"
        + (", the mean of the codes)." if len(finding.codes) > 1 else ").")
    )
    seen = [row for row in finding.rows if any(key.startswith("recall") for key in row)]
    at = [row["step"] + before * (row["stage"] == "finetune") for row in seen]
    series: dict[str, Any] = {}
    for code in finding.codes:
        for name, end in (("", ""), (", not quantised", "_floats")):
            key = f"recall_at_{rank}_{code.nbytes}_bytes{end}"
            series[f"{code.nbytes} B{name}"] = (at, [100 * row[key] for row in seen], None, None)
    report.figure(
        curve_figure(series, "epoch", f"recall@{rank}, %", where),
        "Recall on the queries that choose. The gap between the two curves is what rounding costs.",
        f"recall at {rank} by epoch, in codes and not quantised",
    )
    report.figure(
        curve_figure(
            {
                "KoLeo": (epochs, [row["koleo"] for row in finding.rows], None, None),
                "even spread": (
                    epochs,
                    [row["koleo_of_uniform"] for row in finding.rows],
                    None,
                    None,
                ),
            },
            "epoch",
            "KoLeo loss",
            where,
        ),
        "The KoLeo loss beside that of as many vectors spread evenly at random. It depends on the "
        "batch size and may be negative; far above the line, vectors crowd and codes are wasted.",
        "KoLeo loss by epoch beside its value for an even spread",
    )
    report.figure(
        curve_figure(
            {"rank loss": (epochs, [row["rank_loss"] for row in finding.rows], None, None)},
            "epoch",
            "rank loss",
            where,
        ),
        "Mean of what triplets cost. Negatives get harder as the network gets better, so it need "
        f"not fall; in the last epoch {100 * finding.rows[-1]['satisfied']:.1f} % cost nothing.",
        "rank loss by epoch",
    )


def _trials(report: Report, finding: Finding) -> None:
    report.section("Choice")
    chosen, rank = best_trial(finding.trials), trial_rank(finding.trials)
    at = RANKS.index(rank)
    report.table(
        ["code", "KoLeo weight", "KoLeo", "even spread", f"floats, recall@{rank}, %",
         "recall@1, %", "recall@10, %", "chosen"],
        [
            [
                f"{each.nbytes} B of {each.dim}",
                f"{trial.koleo:g}",
                trial.spread,
                trial.uniform,
                100 * each.floats[at],
                100 * each.quantised[0],
                100 * each.quantised[1],
                "yes" if number == chosen else "",
            ]
            for number, trial in enumerate(finding.trials)
            for each in trial.scores
        ],
        "Codes by bytes and dimension. Short trainings, of a quarter of the epochs on half of the "
        "vectors, at most "
        f"{SHORT:,}, measured on the queries that choose, by recall@{rank}.",
    )  # fmt: skip
    report.figure(
        _weights(finding.trials, rank),
        f"Recall@{rank} against the weight of KoLeo, in codes (solid) and not quantised (dashed): "
        "too small a weight leaves vectors crowded and rounding destroys them, too large a one "
        "scatters neighbours.",
        f"recall at {rank} by weight of KoLeo",
    )


def _weights(trials: Sequence[Trial], rank: int) -> Figure:
    at = RANKS.index(rank)
    figure = Figure(figsize=(5, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    weights = sorted({trial.koleo for trial in trials})
    names = dict.fromkeys((each.nbytes, each.dim) for trial in trials for each in trial.scores)
    for place, (nbytes, dim) in enumerate(names):
        rows = sorted(
            (weights.index(trial.koleo), 100 * each.quantised[at], 100 * each.floats[at])
            for trial in trials
            for each in trial.scores
            if (each.nbytes, each.dim) == (nbytes, dim)
        )
        x, rounded, plain = zip(*rows, strict=True)
        axes.plot(x, rounded, "o-", color=f"C{place}", label=f"{nbytes} B, dimension {dim}")
        axes.plot(x, plain, "o--", color=f"C{place}", alpha=0.5)
    axes.set_xticks(range(len(weights)), [f"{weight:g}" for weight in weights])
    axes.set_xlabel("weight of KoLeo")
    axes.set_ylabel(f"recall@{rank}, %")
    axes.legend(frameon=False)
    return figure


def _described(code: SphericalCode) -> dict[str, Any]:
    return describe(code) | {"bits": code.bits}
