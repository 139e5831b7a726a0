"""The report of `remanence speech cpc`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from remanence.jobs.speech.cpc_finding import Finding
from remanence.jobs.speech.cpc_validation import KINDS
from remanence.kit.report import Report, curve_figure
from remanence.kit.words import counted, duration
from remanence.speech.abx.cells import Speaker

SPEAKERS = 30  # rows of the table


def build_report(finding: Finding) -> Report:
    """Write the report, but for the facts of the run."""
    best, last = finding.best, finding.rows[-1]
    report = Report(
        f"Frames of speech learned from {finding.source}",
        f"{duration(3600 * finding.hours)} without transcripts, {counted(last['step'], 'step')}",
    )
    report.verdict(_learned(finding), sentence(finding), "learned" if _learned(finding) else None)
    ended = ", before the end, as nothing had got better" if finding.stopped else ""
    if finding.by:
        report.text(
            f"The weights kept are those after epoch {best['epoch']} (step {best['step']:,}), "
            f"which have the best {finding.by}. Training ended after epoch {last['epoch']}{ended}."
        )
    else:
        report.text(
            "The weights kept are the last ones: nothing was held out that could be measured to "
            "choose by."
        )
    if finding.items:
        _abx(report, finding)
    _losses(report, finding)
    _speech(report, finding)
    report.section("What the figures mean")
    report.text(
        f"The network hears {finding.window:g} s at a time at {finding.sample_rate:,} Hz and gives "
        f"one vector every 10 ms. From what it has heard it predicts each of the "
        f"{finding.steps_ahead} vectors to come and must find the true one among "
        f"{_negatives(finding)}. {finding.views} Training minimised the sum of the "
        f"{finding.steps_ahead} losses; the tables give their mean."
    )
    report.text(
        "A low loss says that this task is solved, not that the features are good: with easier "
        "negatives (other speakers, other rooms) the loss falls and the features get worse. "
        "Compare losses and accuracies only between runs with the same negatives, batch, window "
        "and steps ahead, on the same recordings. The ABX error and a probe on labels say what the "
        "features are worth: remanence speech abx, remanence speech probe."
    )
    report.facts({name: f"{value}" for name, value in finding.recipe.items() if value is not None})
    if finding.known_speakers:
        report.text(
            f"{finding.known_speakers:,} speakers of the held-out recordings were learned from: "
            "how the network does with new voices, these figures do not say."
        )
    if finding.items:
        report.text(
            "The ABX error that chose the weights is a little too good for that choice; report one "
            "on recordings that chose nothing."
        )
    return report


def _negatives(finding: Finding) -> str:
    places = {
        "speaker": "other frames of the same speaker",
        "sequence": "other frames of the same recording",
        "uniform": "frames of all speakers",
        "sequential": "frames of neighbouring windows",
    }
    count = f"{finding.negatives:,}" if finding.negatives else "all"
    if finding.scope == "global":
        return f"{count} frames of the batches of all processes"
    return f"{count} {places[finding.sampling]} in its batch"


def _learned(finding: Finding) -> bool | None:
    name = "valid_loss" if "valid_loss" in finding.best else "loss"
    return True if finding.best[name] < 0.95 * finding.chance else None


def sentence(finding: Finding) -> str:
    """Say in one sentence how well it went."""
    best, untrained = finding.best, finding.rows[0]
    parts = [
        f"the {kind}-speaker ABX error went from {100 * untrained[f'abx_{kind}']:.1f} to "
        f"{100 * best[f'abx_{kind}']:.1f} % ({_items(finding, kind)})"
        for kind in KINDS
        if f"abx_{kind}" in best and f"abx_{kind}" in untrained
    ]
    where = "held-out" if "valid_loss" in best else "training"
    name = "valid_loss" if "valid_loss" in best else "loss"
    parts.append(
        f"the {where} loss is {best[name]:.3f} a step ahead, that of guessing {finding.chance:.3f}"
    )
    said = "; ".join(parts)
    return f"{said[0].upper()}{said[1:]}."


def _items(finding: Finding, kind: Speaker) -> str:
    dropped = finding.best[f"abx_{kind}_dropped"]
    less = f", {dropped:,} too short for a frame and left out" if dropped else ""
    return f"{counted(finding.items[kind], 'item')}{less}"


def beside_mfcc(finding: Finding) -> str:
    """Say where the network beats the features that cost nothing to learn, and where not."""
    said = []
    for kind in (kind for kind in KINDS if f"abx_{kind}" in finding.best):
        error, theirs = finding.best[f"abx_{kind}"], finding.mfcc[f"abx_{kind}"]
        verdict = "beats" if error < theirs else "does not beat"
        said.append(
            f"{kind} speakers the network {verdict} MFCC "
            f"({100 * error:.1f} against {100 * theirs:.1f} %)"
        )
    text = " and ".join(said)
    return f"{text[0].upper()}{text[1:]}."


def _abx(report: Report, finding: Finding) -> None:
    report.section("ABX error")
    untrained, best = finding.rows[0], finding.best
    report.table(
        [
            *("speakers", "items", "MFCC, %", "untrained, %", "kept, %", "standard error"),
            "best of all epochs, %",
        ],
        [
            [
                kind,
                finding.items[kind],
                100 * finding.mfcc[f"abx_{kind}"],
                100 * untrained[f"abx_{kind}"],
                100 * best[f"abx_{kind}"],
                100 * best[f"abx_{kind}_stderr"] if f"abx_{kind}_stderr" in best else None,
                min(100 * row[f"abx_{kind}"] for row in finding.rows if f"abx_{kind}" in row),
            ]
            for kind in KINDS
            if f"abx_{kind}" in best
        ],
        "How often a token is nearer to one of another kind than to one of its own; guessing has "
        "50 %. On the same items of held-out recordings at every epoch.",
    )
    report.text(beside_mfcc(finding))
    series: dict[str, Any] = {}
    for kind in KINDS:
        seen = [row for row in finding.rows if f"abx_{kind}" in row]
        if seen:
            errors = [100 * row[f"abx_{kind}"] for row in seen]
            series[kind] = ([row["epoch"] for row in seen], errors, None, None)
    report.figure(
        curve_figure(series, "epoch", "ABX error, %", {"kept": float(best["epoch"])}),
        "ABX error by epoch; epoch 0 is the untrained network.",
        "ABX error within and across speakers by epoch",
    )
    for missing, why in finding.without.items():
        report.text(f"There is no error {missing} speakers: {why}.")


def _losses(report: Report, finding: Finding) -> None:
    report.section("Loss and accuracy")
    epochs = [row["epoch"] for row in finding.rows]
    series: dict[str, Any] = {}
    for label, name in (("training", "loss"), ("held out", "valid_loss")):
        seen = [row for row in finding.rows if name in row]
        if seen:
            x = [row["epoch"] for row in seen]
            series[label] = (x, [row[name] for row in seen], None, None)
    series["guessing"] = ([0, epochs[-1]], [finding.chance] * 2, None, None)
    report.figure(
        curve_figure(series, "epoch", "loss a step ahead", {"kept": float(finding.best["epoch"])}),
        "Mean loss over the steps ahead. Training uses dropout and, where asked for, augmented "
        "windows; held-out windows are clean, and always the same with the same negatives.",
        "loss by epoch in training and held out, beside the loss of guessing",
    )
    ahead = list(range(1, finding.steps_ahead + 1))
    curves: dict[str, Any] = {}
    for label, name in (("training", "accuracy"), ("held out", "valid_accuracy")):
        values = finding.of_steps(finding.best, name)
        if values:
            curves[label] = (ahead, [100 * value for value in values], None, None)
    report.figure(
        curve_figure(curves, "steps of 10 ms ahead", "accuracy, %"),
        "How often the true frame scores above all negatives, by how far ahead it lies, with the "
        "weights kept.",
        "accuracy by step ahead",
    )
    columns = [
        (label, [scale * value for value in finding.of_steps(finding.best, name)])
        for label, name, scale in (
            ("loss", "loss", 1),
            ("accuracy, %", "accuracy", 100),
            ("held-out loss", "valid_loss", 1),
            ("held-out accuracy, %", "valid_accuracy", 100),
        )
    ]
    columns = [column for column in columns if column[1]]
    report.table(
        ["steps ahead", *(label for label, _ in columns)],
        [[str(k), *(values[k - 1] for _, values in columns)] for k in ahead],
        f"At epoch {finding.best['epoch']}.",
    )
    report.text(
        f"A negative had the speaker of the frame it stood beside with a chance of "
        f"{100 * finding.best['same_speaker']:.1f} %. The network has {finding.parameters:,} "
        f"parameters; a step took {finding.ms_per_step:.1f} ms, augmentation included."
    )


def _speech(report: Report, finding: Finding) -> None:
    report.section("Recordings")
    shown: Sequence[tuple[str, int, float, int, int]] = sorted(
        finding.speakers, key=lambda row: -row[2]
    )
    more = ""
    if len(shown) > SPEAKERS:
        more = f" The {SPEAKERS} with most speech of {len(shown):,}."
    report.table(
        ["speaker", "recordings", "minutes", "windows an epoch", "held out"],
        [[name or "not known", n, 60 * h, w, v] for name, n, h, w, v in shown[:SPEAKERS]],
        f"{duration(3600 * finding.hours)} to learn from, "
        f"{duration(3600 * finding.held_out_hours)} held out.{more}",
    )
    for remark in finding.preparation:
        report.text(f"{remark[0].upper()}{remark[1:]}.")
