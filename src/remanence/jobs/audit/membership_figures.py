"""The figures in the report of `remanence audit membership`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from remanence.jobs.audit.membership_evidence import Measured

# Okabe and Ito (2008): told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")


def roc_figure(measured: Sequence[Measured]) -> Figure:
    """Draw the ROC curves of all attacks on logarithmic scales."""
    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    axes = figure.subplots()
    first = measured[0].roc
    least = 1 / max(first.n_nonmember, first.n_member)
    grid = np.geomspace(least, 1, 200)
    for i, one in enumerate(measured):
        at = np.searchsorted(one.roc.fpr, grid, side="right") - 1
        axes.plot(
            grid,
            np.maximum(one.roc.tpr[at], 1e-12),
            label=f"{one.attack} ({one.roc.auc.value:.3f})",
            color=COLOURS[i % len(COLOURS)],
            linestyle=DASHES[i // len(COLOURS) % len(DASHES)],
            linewidth=2.2 if i == 0 else 1.3,
            drawstyle="steps-post",
        )
    axes.plot(grid, grid, color="#888888", linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1.1))
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="attack (AUC)", fontsize=8, title_fontsize=8, frameon=False)
    return figure


def score_figure(one: Measured, bins: int = 40) -> Figure:
    """Draw the scores of members and non-members as two histograms."""
    figure = Figure(figsize=(5.5, 2.8), layout="constrained")
    axes = figure.subplots()
    low, high = np.quantile(one.scores, [0.01, 0.99])
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    member = one.member
    for name, side, colour in (
        ("members", member, COLOURS[0]),
        ("non-members", ~member, COLOURS[1]),
    ):
        counts, _ = np.histogram(one.scores[side].clip(edges[0], edges[-1]), edges)
        axes.stairs(100 * counts / side.sum(), edges, label=name, color=colour, linewidth=1.5)
        axes.stairs(100 * counts / side.sum(), edges, fill=True, color=colour, alpha=0.15)
    axes.set(xlabel=f"score of {one.attack}, higher = more member-like", ylabel="share, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return figure
