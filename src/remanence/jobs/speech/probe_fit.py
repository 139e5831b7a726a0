"""Fitting and scoring the probes of `remanence speech probe`, on utterances by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.jobs.speech.features import Features
from remanence.jobs.speech.probe_labels import Labels
from remanence.kit.progress import bar, track
from remanence.speech.abx.items import most_common
from remanence.speech.probe.accuracy import Accuracy, accuracy
from remanence.speech.probe.closed_form import RidgeSums, logistic_probe, ridge_probe
from remanence.speech.probe.ctc import frames_needed, frames_out, train_ctc
from remanence.speech.probe.error_rate import ErrorRate, error_rate
from remanence.speech.probe.linear import LinearClassifier, Pool, train_linear, vote, windows
from remanence.speech.probe.splits import shuffled

Method = Literal["ridge", "logistic", "linear", "ctc"]
SECONDS = 1.28  # of a window
FOLDS = 5  # by which the ridge is chosen
LOOKED_AT, NOTHING = 20, 1e-4  # utterances whose means are looked at; a mean that is rounding


@dataclass(frozen=True, eq=False)
class Task:
    """What is learned, from what, and what it is tested on.

    Attributes:
        features: Of all utterances.
        labels: Of all utterances.
        train: Names to learn from.
        test: Names to test on.
        groups: What is resampled for intervals, of each name of `test`; None for utterances.
        pool: What of a window is classified.
        device: Where to compute.
        seed: For everything random.
    """

    features: Features
    labels: Labels
    train: Sequence[str]
    test: Sequence[str]
    groups: Sequence[str] | None
    pool: Pool
    device: torch.device
    seed: int

    def load(self, name: str) -> Tensor:
        """Return the features (S, D) of an utterance."""
        frames = self.features[name]
        if not frames.is_floating_point():
            raise InputError(f"features of {name!r} are integers: a probe needs vectors of floats")
        return frames

    def examples(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Return features (n, D) and labels (n,) of each window of an utterance."""
        frames = self.load(name)
        window = max(1, round(SECONDS * self.features.rate))
        if self.labels.whole:
            label = self.labels.rows[name][0]
            cut = windows(frames, self.pool, window)
            return [(part, torch.full((len(part),), label)) for part in cut]
        labels = self.labels.of_frames(name, len(frames), self.features.when([name]))
        return list(
            zip(windows(frames, "frames", window), torch.split(labels, window), strict=True)
        )


@dataclass(frozen=True, eq=False)
class Fitted:
    """What a linear probe found.

    Attributes:
        frames: Accuracy of frames or windows.
        files: Accuracy of whole files, by the vote of their windows, where labels are of files.
        answers: What it said of each test utterance, one a frame or one a file.
        facts: What there is to say of the fit.
        losses: Of each epoch, where there are epochs.
    """

    frames: Accuracy
    files: Accuracy | None
    answers: list[list[int]]
    facts: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)


def fit_classifier(
    task: Task, method: Method, *, epochs: int, lr: float, standardise: bool
) -> Fitted:
    """Fit a linear probe and count what it gets right."""
    if task.labels.whole and task.pool == "mean":
        _check_mean(task)
    classes = len(task.labels.classes)
    prior = torch.zeros(classes, dtype=torch.int64)
    facts: dict[str, Any] = {}
    losses: list[float] = []
    if method == "ridge":
        order = shuffled(task.train, task.seed)
        owners: Sequence[str] = order
        if task.labels.speakers is not None and task.groups is not None:
            owners = [task.labels.speakers[name] for name in order]
        fold_of = {owner: i % FOLDS for i, owner in enumerate(dict.fromkeys(owners))}
        dim = task.examples(order[0])[0][0].shape[1]
        folds = [RidgeSums.empty(dim, classes, task.device) for _ in range(FOLDS)]
        for name, owner in zip(track(order, "learn"), owners, strict=True):
            for x, y in task.examples(name):
                folds[fold_of[owner]].add(x.to(task.device), y)
        prior = sum((fold.counts for fold in folds), torch.zeros(classes, device=task.device)).cpu()
        classifier, ridge = ridge_probe(folds)
        facts["ridge"] = ridge
    else:
        pairs = [pair for name in track(task.train, "features") for pair in task.examples(name)]
        xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
        known = torch.cat(ys)
        prior = torch.bincount(known[known >= 0], minlength=classes)
        if method == "logistic":
            classifier, reached = logistic_probe(xs, ys, classes, device=task.device)
            facts["converged"] = reached
        else:
            with bar("epochs", epochs) as progress:
                classifier, curve = train_linear(
                    xs,
                    ys,
                    classes,
                    epochs=epochs,
                    lr=lr,
                    standardise=standardise,
                    seed=task.seed,
                    device=task.device,
                    step=progress.advance,
                )
            losses = curve.tolist()
            facts |= {"epochs": epochs, "lr": lr, "loss": losses[-1]}
    facts["train_labels"] = int(prior.sum())
    facts["classes_not_in_training"] = [
        name for name, count in zip(task.labels.classes, prior.tolist(), strict=True) if not count
    ]
    return _score(task, classifier, facts, losses)


def _check_mean(task: Task) -> None:
    """Refuse features whose mean over time was taken out: there is nothing left to classify."""
    for name in task.train[:LOOKED_AT]:
        means = torch.cat([x for x, _ in task.examples(name)])
        if float(means.abs().max()) > NOTHING * float(task.load(name).abs().max()):
            return
    raise InputError(
        f"--pool mean: the mean over time of {task.features.description} is 0, since it was taken "
        "out; take segments, last or frames"
    )


def _score(
    task: Task,
    classifier: LinearClassifier,
    facts: dict[str, Any],
    losses: list[float],
) -> Fitted:
    classes = len(task.labels.classes)
    said, truth, together, answers = [], [], [], []
    for name in track(task.test, "test"):
        pairs = task.examples(name)
        scores = classifier.scores(torch.cat([x for x, _ in pairs])).cpu()
        said.append(scores.argmax(1))
        truth.append(torch.cat([y for _, y in pairs]))
        together.append(vote(scores).view(1))
        answers.append((together if task.labels.whole else said)[-1].tolist())
    frames = accuracy(said, truth, classes, groups=task.groups, seed=task.seed)
    files = None
    if task.labels.whole:
        own = [row[:1] for row in truth]
        files = accuracy(together, own, classes, groups=task.groups, seed=task.seed)
    return Fitted(frames, files, answers, facts, losses)


@dataclass(frozen=True, eq=False)
class Spelled:
    """What CTC found.

    Attributes:
        beam: Error rate of the prefix beam search.
        greedy: Error rate of the best path.
        answers: Phones of each test utterance, of the beam search.
        facts: What there is to say of the fit.
        losses: Of each epoch.
    """

    beam: ErrorRate
    greedy: ErrorRate
    answers: list[list[int]]
    facts: dict[str, Any]
    losses: list[float]


def fit_ctc(
    task: Task, *, epochs: int, lr: float, lstm: bool, width: int, standardise: bool
) -> Spelled:
    """Train a head with CTC, spell the test utterances, and count the errors."""
    loaded = {name: task.load(name) for name in track([*task.train, *task.test], "features")}
    aligned = task.labels.aligned({name: len(x) for name, x in loaded.items()})
    spelled = {
        name: torch.tensor(task.labels.sequence(name, aligned=aligned), dtype=torch.int64)
        for name in loaded
    }
    empty = [name for name in loaded if not len(spelled[name])]
    if empty:
        raise InputError(f"no phones in {most_common(empty)}: leave these utterances out")
    with bar("epochs", epochs) as progress:
        probe = train_ctc(
            [loaded[name] for name in task.train],
            [spelled[name] for name in task.train],
            len(task.labels.classes),
            lstm=lstm,
            epochs=epochs,
            lr=lr,
            standardise=standardise,
            seed=task.seed,
            device=task.device,
            step=progress.advance,
        )
    rows = [loaded[name] for name in task.test]
    wanted = [spelled[name].tolist() for name in task.test]
    answers = [probe.decode([row], width)[0] for row in track(rows, "spell")]
    greedy = probe.decode(rows, None)
    ends = frames_out(torch.tensor([len(row) for row in rows]))
    short = [
        name
        for name, end in zip(task.test, ends.tolist(), strict=True)
        if end < frames_needed(spelled[name])
    ]
    return Spelled(
        error_rate(wanted, answers, task.groups, seed=task.seed),
        error_rate(wanted, greedy, task.groups, seed=task.seed),
        answers,
        {
            "epochs": epochs,
            "lr": lr,
            "lstm": lstm,
            "beam_width": width,
            "loss": float(probe.losses[-1]),
            "labels_of_frames": aligned,
            "train_phones": sum(len(spelled[name]) for name in task.train),
            "test_phones": sum(len(spelled[name]) for name in task.test),
            "too_short_to_learn_from": [task.train[i] for i in probe.impossible],
            "too_short_to_spell": short,
        },
        probe.losses.tolist(),
    )
