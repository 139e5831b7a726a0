"""`remanence speech probe`: what frozen features tell of phones and speakers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from remanence.errors import InputError
from remanence.jobs.options import check_options
from remanence.jobs.speech.abx_words import in_options
from remanence.jobs.speech.features import Features, open_features
from remanence.jobs.speech.probe_fit import Fitted, Method, Spelled, Task, fit_classifier, fit_ctc
from remanence.jobs.speech.probe_labels import divide, open_labels
from remanence.jobs.speech.probe_report import build_report, sentence
from remanence.kit.devices import launch
from remanence.kit.progress import say
from remanence.kit.run import run_folder
from remanence.speech.probe.accuracy import Accuracy
from remanence.speech.probe.linear import Pool
from remanence.speech.probe.splits import by_minutes, per_class

EPOCHS = {"linear": 10, "ctc": 30}
LR = 2e-4


@dataclass(frozen=True, eq=False)
class Probed:
    """What `probe` leaves behind.

    Attributes:
        out: Run folder.
        results: What `results.json` holds: `accuracy` and its `interval`, or `per` and its
            `per_interval`, and what they rest on.
    """

    out: Path
    results: dict[str, Any]


def probe(
    features: str,
    *,
    out: Path,
    target: Literal["phone", "speaker"] = "phone",
    labels: Path | None = None,
    names: str | None = None,
    method: Method = "ridge",
    pool: Pool | None = None,
    test_names: str | None = None,
    test_fraction: float = 0.2,
    by_speaker: bool = False,
    labels_per_class: int | None = None,
    minutes: float | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    lstm: bool = False,
    beam_width: int = 20,
    standardise: bool = True,
    tier: str = "phones",
    audio: str | None = None,
    frame_rate: float | None = None,
    sample_rate: int | None = None,
    layer: str = "context",
    chunk: float | None = None,
    strict: bool = False,
    seq_norm: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    seed: int = 0,
) -> Probed:
    """How well do frozen features tell phones or speakers, with many labels or few?

    A linear classifier, or CTC for phone error rates, is fitted on some utterances and tested on
    others. OUT/predictions.txt holds what it says of each test utterance.

    Args:
        features: A folder of .npy, .npz, .pt or .txt files, or a run of speech extract; or, with
            --audio, a run of speech cpc, mfcc, or FILE.py:FUNCTION.
        out: Run folder to create.
        target: What to tell.
        labels: Phones: a file with 'name label label ...' a line, one label a frame (for ctc also
            phones without times); an item file as for speech abx; or a folder of .TextGrid or .phn
            files. By default what --names tells of a whole file, such as the word spoken.
        names: Regular expression for the beginning of a file's name, with groups phone and speaker:
            `(?P<phone>[0-9])_(?P<speaker>[a-z]+)_`. By default the first folder of a name is its
            speaker.
        method: ridge, least squares, in one pass over any number of frames, its ridge chosen by
            held-out utterances; logistic, by L-BFGS; linear, a layer trained by Adam as published;
            ctc, for sequences of phones.
        pool: Where labels are of whole files: classify segments, the means of five equal stretches
            side by side (taken for words); the mean of each window of 1.28 s (taken for speakers);
            its last frame, as published for speakers; or all frames. Windows vote.
        test_names: Regular expression found in the names of the utterances to test on, or a .txt
            list of names.
        test_fraction: Share of utterances, drawn, to test on, without --test-names.
        by_speaker: Draw whole speakers to test on, and resample speakers for intervals.
        labels_per_class: Learn from so many utterances of each phone or speaker only. With one seed
            the fewer lie among the more.
        minutes: Learn from so many minutes only, of all speakers in turn.
        epochs: Of linear, 10 if not given, and ctc, 30.
        lr: Learning rate of linear and ctc, 2e-4 if not given; more where labels are few.
        lstm: Put an LSTM before the convolution of ctc.
        beam_width: Prefixes that ctc's beam search keeps.
        standardise: Bring each dimension to mean 0 and deviation 1 before linear and ctc; as
            published they do not.
        tier: Tier of TextGrids that holds the phones.
        audio: Recordings: a folder, a file, a quoted glob or a .txt list. With a folder of features
            their durations are checked.
        frame_rate: Frames a second of the features in a folder or of FILE.py:FUNCTION; by default
            the times in .npz files, what speech extract wrote down, else 100.
        sample_rate: Sample rate that FILE.py:FUNCTION takes.
        layer: Of a CPC network: context, encoder, or the number of a context layer.
        chunk: See speech extract.
        strict: See speech extract.
        seq_norm: See speech extract.
        device: Where to compute.
        seed: Of the split, the choice of few labels, training and intervals.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k != "out"}
    _check(options)
    fabric = launch(1, "32-true", device)
    with run_folder(out, "speech probe", options, seed=seed) as run, in_options():
        opened = open_features(
            features,
            audio=audio,
            frame_rate=frame_rate,
            sample_rate=sample_rate,
            layer=layer,
            chunk=chunk,
            strict=strict,
            seq_norm=seq_norm,
            device=fabric.device,
        )
        told = open_labels(opened, labels, names, target, tier)
        if pool is not None and not told.whole:
            raise InputError("--pool: is for labels of whole files; these are of frames")
        train, test = divide(
            told,
            test_names=test_names,
            test_fraction=test_fraction,
            by_speaker=by_speaker,
            seed=seed,
        )
        there = len(train)
        if labels_per_class is not None:
            occurring = {name: {i for i in told.rows[name] if i >= 0} for name in train}
            train = per_class(occurring, labels_per_class, seed=seed)
        if minutes is not None:
            seconds = {name: _seconds(opened, name) for name in train}
            train = by_minutes(seconds, minutes, groups=told.speakers, seed=seed)
        opened.prepare([*train, *test])
        default_pool: Pool = "frames"
        if told.whole:
            default_pool = "segments" if target == "phone" else "mean"
        groups = None
        if by_speaker and told.speakers is not None:
            groups = [told.speakers[name] for name in test]
        task = Task(
            opened, told, train, test, groups, pool or default_pool,
            fabric.device, seed,
        )  # fmt: skip
        found: Fitted | Spelled
        if method == "ctc":
            found = fit_ctc(
                task,
                epochs=epochs or EPOCHS["ctc"],
                lr=lr or LR,
                lstm=lstm,
                width=beam_width,
                standardise=standardise,
            )
        else:
            found = fit_classifier(
                task,
                method,
                epochs=epochs or EPOCHS["linear"],
                lr=lr or LR,
                standardise=standardise,
            )
        for epoch, loss in enumerate(found.losses, 1):
            run.log(stage="train", step=epoch, loss=loss)
        unlabelled = len(opened) - len(told.rows)
        results = {
            "target": target,
            "method": method,
            "features": opened.description,
            "frame_rate": opened.rate,
            **(_spelled(found) if isinstance(found, Spelled) else _classified(found, told.classes)),
            "classes": len(told.classes),
            "train_utterances": len(train),
            "train_utterances_there": there,
            "train_minutes": _minutes(task, train),
            "test_utterances": len(test),
            "test_minutes": _minutes(task, test),
            "files_without_labels": unlabelled,
            "remarks": opened.remarks,
            "interval_over": "utterances" if groups is None else "speakers",
            **found.facts,
        }
        run.write_results(results)
        written = (
            " ".join((name, *(told.classes[i] for i in answer)))
            for name, answer in zip(test, found.answers, strict=True)
        )
        run.path("predictions.txt").write_text("\n".join(written) + "\n", encoding="utf-8")
        report = build_report(results, found, told.classes, features)
        report.section("Run")
        report.facts(run.summary())
        report.write(run.path("report.html"))
        say(sentence(results))
    return Probed(out, results)


def _check(options: dict[str, Any]) -> None:
    """Refuse options that cannot work, before anything is opened."""
    check_options(options)
    method, target, labels = options["method"], options["target"], options["labels"]
    if method == "ctc" and (labels is None or target == "speaker"):
        raise InputError("--method ctc: spells phones; give them with --labels")
    if target == "speaker" and labels is not None:
        raise InputError("--target speaker: names tell who speaks; leave --labels out")
    if target == "speaker" and options["by_speaker"]:
        raise InputError("--by-speaker: a speaker who is not learned from cannot be told")
    if labels is not None and not labels.expanduser().exists():
        raise InputError(f"--labels {labels}: no such file or folder")
    if options["test_names"] is not None and options["by_speaker"]:
        raise InputError("--test-names and --by-speaker: give one of them")
    if not 0 < options["test_fraction"] < 1:
        raise InputError(
            f"--test-fraction {options['test_fraction']:g}: give more than 0 and less than 1"
        )
    trained = ("linear", "ctc")
    for name, methods in {"epochs": trained, "lr": trained, "lstm": ("ctc",)}.items():
        if options[name] and method not in methods:
            raise InputError(f"--{name}: is for --method {' and '.join(methods)}, not {method}")
    if options["minutes"] is not None and not options["minutes"] > 0:
        raise InputError(f"--minutes {options['minutes']:g}: give more than 0")
    if options["minutes"] is not None and options["labels_per_class"] is not None:
        raise InputError("--minutes and --labels-per-class: give one of them")


def _classified(found: Fitted, classes: Sequence[str]) -> dict[str, Any]:
    head = found.files or found.frames
    results: dict[str, Any] = {
        "accuracy": head.accuracy,
        "interval": list(head.interval),
        "chance": head.chance,
        "balanced_accuracy": head.balanced,
        "per_class": _recalls(head, classes),
        "counted": "files" if found.files is not None else "frames",
    }
    if found.files is not None:
        results["window_accuracy"] = found.frames.accuracy
        results["window_interval"] = list(found.frames.interval)
    results["test_labels"] = int(found.frames.counts.sum())
    return results


def _recalls(found: Accuracy, classes: Sequence[str]) -> dict[str, float]:
    seen = found.confusion.sum(1)
    right = found.confusion.diagonal()
    return {name: float(r / n) for name, r, n in zip(classes, right, seen, strict=True) if n}


def _spelled(found: Spelled) -> dict[str, Any]:
    return {
        "per": found.beam.mean,
        "per_interval": list(found.beam.mean_interval),
        "per_pooled": found.beam.pooled,
        "per_pooled_interval": list(found.beam.pooled_interval),
        "per_best_path": found.greedy.mean,
        "per_best_path_pooled": found.greedy.pooled,
        "chance": None,
    }


def _seconds(features: Features, name: str) -> float:
    known = features.seconds.get(name)
    return len(features[name]) / features.rate if known is None else known


def _minutes(task: Task, names: Sequence[str]) -> float:
    return sum(_seconds(task.features, name) for name in names) / 60
