"""What `remanence speech probe` is to tell: labels of frames, files or sequences, and the split."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.jobs.speech.features import SLACK, Features, rate_doubt
from remanence.jobs.speech.label_files import PHN_RATE, alignments, read_rows, read_text
from remanence.kit.progress import say
from remanence.kit.recordings import groups_of
from remanence.speech.abx.items import SILENCES, Items, most_common
from remanence.speech.abx.slicing import slice_frames
from remanence.speech.probe.splits import hold_out

NOTHING = "-1"  # the label of a frame that is not labelled


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of utterances.

    Attributes:
        classes: Names of the classes, sorted.
        rows: Numbers of each utterance's labels in order: of its frames (-1 for none), its phones,
            or, alone, of the whole file.
        whole: Whether a label is of a whole file.
        items: The phones with their times, by utterance, where labels came with times.
        speakers: Of each utterance, where they are known.
    """

    classes: tuple[str, ...]
    rows: Mapping[str, Sequence[int]]
    whole: bool
    items: Mapping[str, Items] | None = None
    speakers: Mapping[str, str] | None = None

    def of_frames(self, name: str, count: int, when: Mapping[str, Any]) -> Tensor:
        """Return the labels (count,), int64, of an utterance's frames.

        Args:
            name: Of the utterance.
            count: Number of its frames.
            when: `frame_rate` or `times`, as of `Features.when`.

        Raises:
            InputError: There are more or fewer labels than frames, or phones overlap.
        """
        row = self.rows[name]
        labels = torch.full((count,), -1)
        if self.whole:
            return labels.fill_(row[0])
        if self.items is None:
            if abs(len(row) - count) > SLACK:
                raise InputError(
                    f"{name!r} has {len(row):,} labels for {count:,} frames: give one a frame, or "
                    "--method ctc for phones without times"
                )
            given = torch.tensor(row[:count])
            labels[: len(given)] = given
            return labels
        start, stop = slice_frames(self.items[name], {name: count}, **when)
        order = np.argsort(start, kind="stable")
        if (start[order][1:] < stop[order][:-1]).any():
            raise InputError(f"{name!r}: phones overlap; give items of phones, not of triphones")
        for i, (first, end) in enumerate(zip(start.tolist(), stop.tolist(), strict=True)):
            labels[first:end] = row[i]
        return labels

    def aligned(self, lengths: Mapping[str, int]) -> bool:
        """Tell whether labels are of frames, or of phones without times.

        Raises:
            InputError: Some utterances fit one, and some the other.
        """
        if self.items is not None:
            return False
        fits = {n: abs(len(self.rows[n]) - count) <= SLACK for n, count in lengths.items()}
        if len(set(fits.values())) > 1:
            odd = [n for n, fit in fits.items() if fit != (sum(fits.values()) * 2 > len(fits))]
            raise InputError(
                f"labels of {most_common(odd)} are of another kind than the rest: give one a frame "
                "for all, or phones without times for all"
            )
        return all(fits.values())

    def sequence(self, name: str, *, aligned: bool) -> list[int]:
        """Return the phones of an utterance; of labels of frames the runs, silences left out."""
        row = [i for i in self.rows[name] if i >= 0]
        if not aligned:
            return row
        full = self.rows[name]
        runs = [i for j, i in enumerate(full) if i >= 0 and (j == 0 or full[j - 1] != i)]
        return [i for i in runs if self.classes[i] not in SILENCES]


def open_labels(
    features: Features, labels: Path | None, names: str | None, target: str, tier: str
) -> Labels:
    """Open labels.

    Args:
        features: Whose names they are of.
        labels: A file of labels or items, or a folder of alignments; None for what names tell.
        names: Regular expression of names.
        target: `phone` or `speaker`.
        tier: Of TextGrids.

    Raises:
        InputError: There are none, or they do not fit the features.
    """
    if labels is None or target == "speaker":
        speakers = speakers_by_name(features, names)
        told = speakers
        if target == "phone":
            groups = groups_of(features, names) if names and "(?P<phone>" in names else {}
            told = {name: own["phone"] for name, own in groups.items()} or None
        if told is None:
            raise InputError(
                f"no telling the {target} of {features.names[0]!r}: give --names with a group "
                f"(?P<{target}>...)" + (" or --labels" if target == "phone" else "")
            )
        return _numbered({name: [value] for name, value in told.items()}, True, None, speakers)
    if labels.is_dir():
        items = _alignments(labels, speakers_by_name, features, names, tier)
    elif _is_item_file(labels):
        items = Items.read(labels)
    else:
        rows = read_rows(labels)
        features.require(rows)
        return _numbered(rows, False, None, speakers_by_name(features, names))
    features.require(items.file.tolist())
    order = np.lexsort((items.onset, items.file))
    items = items[order]
    if doubt := rate_doubt(items, features):
        features.remarks.append(doubt)
        say(doubt)
    by_file = {name: items[places] for name, places in items.by_file().items()}
    told = {name: str(own.speaker[0]) for name, own in by_file.items()}
    rows = {name: own.phone.tolist() for name, own in by_file.items()}
    return _numbered(rows, False, by_file, told)


def speakers_by_name(features: Iterable[str], names: str | None) -> dict[str, str] | None:
    """Return who speaks in each file, by its name or its first folder; None where neither tells."""
    if names is not None and "(?P<speaker>" in names:
        return {name: groups["speaker"] for name, groups in groups_of(features, names).items()}
    found = {name: name.split("/")[0] for name in features if "/" in name}
    return found if found and all(name in found for name in features) else None


def divide(
    labels: Labels,
    *,
    test_names: str | None,
    test_fraction: float,
    by_speaker: bool,
    seed: int,
) -> tuple[list[str], list[str]]:
    """Return the utterances to learn from and those to test on.

    Args:
        labels: Of all.
        test_names: Regular expression found in the names to test on, or a .txt list of them.
        test_fraction: Share to test on, where there are no names.
        by_speaker: Whether to hold speakers out as a whole.
        seed: For the choice.

    Raises:
        InputError: One of both is empty, or speakers are not known.
    """
    every = sorted(labels.rows)
    if test_names is None:
        if by_speaker and labels.speakers is None:
            raise InputError("--by-speaker: no telling who speaks; give --names with (?P<speaker>)")
        groups = labels.speakers if by_speaker else None
        return hold_out(every, test_fraction, groups=groups, seed=seed)
    chosen = _listed(test_names, every)
    test = [name for name in every if name in chosen]
    train = [name for name in every if name not in chosen]
    if not test or not train:
        raise InputError(
            f"--test-names {test_names}: takes {len(test):,} of {len(every):,} utterances such as "
            f"{every[0]!r}; some must be left on either side"
        )
    return train, test


def _listed(test_names: str, every: Sequence[str]) -> Collection[str]:
    path = Path(test_names).expanduser()
    if path.suffix == ".txt" and path.is_file():
        listed = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        lacking = sorted(set(listed) - set(every))
        if lacking:
            raise InputError(f"{path}: {most_common(lacking)} are no labelled utterances")
        return set(listed)
    try:
        compiled = re.compile(test_names)
    except re.error as error:
        raise InputError(f"--test-names {test_names}: no regular expression: {error}") from None
    return {name for name in every if compiled.search(name)}


def _numbered(
    rows: Mapping[str, Sequence[str]],
    whole: bool,
    items: Mapping[str, Items] | None,
    speakers: Mapping[str, str] | None,
) -> Labels:
    classes = sorted({label for row in rows.values() for label in row} - {NOTHING}, key=_natural)
    number = {label: i for i, label in enumerate(classes)} | {NOTHING: -1}
    numbered = {name: [number[label] for label in row] for name, row in rows.items()}
    if len(classes) < 2:
        raise InputError(f"labels name {len(classes)} class: there must be two to tell apart")
    return Labels(tuple(classes), numbered, whole, items, speakers)


def _natural(label: str) -> tuple[int, int, str]:
    return (0, int(label), "") if label.isdecimal() else (1, 0, label)


def _is_item_file(path: Path) -> bool:
    return read_text(path).startswith("#")


def _alignments(
    folder: Path,
    tell: Callable[[Iterable[str], str | None], dict[str, str] | None],
    features: Features,
    names: str | None,
    tier: str,
) -> Items:
    grids, phns = (alignments(folder, suffix) for suffix in (".textgrid", ".phn"))
    if bool(grids) == bool(phns):
        raise InputError(
            f"{folder}: holds {len(grids)} .TextGrid and {len(phns)} .phn; give one kind"
        )
    found = grids or phns
    features.require(found)
    speakers = tell(found, names) or dict.fromkeys(found, "1")
    texts = {name: read_text(path) for name, path in found.items()}
    if grids:
        return Items.from_textgrid(texts, speakers, tier=tier)
    rates = {r.sample_rate for n, r in features.recordings.items() if n in found} or {PHN_RATE}
    if len(rates) > 1:
        raise InputError(f"{folder}: .phn of recordings of {sorted(rates)} Hz; give one rate")
    return Items.from_phn(texts, speakers, sample_rate=rates.pop())
