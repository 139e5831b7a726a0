"""Items of `remanence speech abx`: a list, alignments, labels of frames, or names of files."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from remanence.errors import InputError
from remanence.jobs.speech.features import SLACK, Features
from remanence.jobs.speech.label_files import (
    PHN_RATE,
    alignments,
    known_names,
    read_rows,
    read_text,
)
from remanence.kit.recordings import groups_of
from remanence.kit.words import counted
from remanence.speech.abx.items import Items, most_common
from remanence.speech.abx.slicing import Slicing, slice_frames

LABEL_RATE = 100  # labels a second
STRESS = re.compile(r"^([A-Za-z]+)[012]$")
SOURCES = ("items", "textgrid", "phn", "frame_labels")


@dataclass(frozen=True, eq=False)
class Listed:
    """The items of a run.

    Attributes:
        items: The items, under the names of the features.
        source: Where they come from, in words.
        remarks: What there is to say of them.
    """

    items: Items
    source: str
    remarks: tuple[str, ...] = ()


def check_sources(options: Mapping[str, Any]) -> None:
    """Refuse no source of items, several, or options that do not go with it.

    Raises:
        InputError: Says which.
    """
    given = [name for name in SOURCES if options[name] is not None]
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in SOURCES)
    if len(given) > 1:
        first, second = (name.replace("_", "-") for name in given[:2])
        raise InputError(f"--{first} and --{second}: give one source of items")
    if not given and "(?P<phone>" not in (options["names"] or ""):
        raise InputError(
            f"no items: give one of {flags}, or --names with a group (?P<phone>...) where names "
            "of files tell what they are"
        )
    source = given[0] if given else "names"
    if source == "items" and options["names"] is not None and not _is_table(options["items"]):
        raise InputError(f"--names: {options['items']} says who speaks; leave one of them out")
    aligned = source in {"textgrid", "phn", "frame_labels"}
    for name, good, usual in (
        ("tier", source == "textgrid", "phones"),
        ("span", aligned, "phone"),
        ("label_rate", source in {"phn", "frame_labels"}, None),
    ):
        if options[name] != usual and not good:
            flag, other = name.replace("_", "-"), source.replace("_", "-")
            raise InputError(f"--{flag}: does not go with --{other}; leave it out")


def open_items(features: Features, options: Mapping[str, Any]) -> Listed:
    """Open the items.

    Args:
        features: Whose names they must have.
        options: `items`, `names`, `textgrid`, `phn`, `frame_labels`, `label_rate`, `span`, `tier`
            and `without_stress` of the command.

    Raises:
        InputError: They cannot be read, or lie in files without features.
    """
    source = next((name for name in SOURCES if options[name] is not None), "names")
    names, span = options["names"], options["span"]
    rate = options["label_rate"]
    where = options[source]
    remarks: tuple[str, ...] = ()
    if source == "items":
        items = _table(where, names) if _is_table(where) else Items.read(where)
    elif source == "textgrid":
        texts = _texts(where, ".textgrid")
        items = Items.from_textgrid(texts, _speakers(texts, names), tier=options["tier"], span=span)
    elif source == "phn":
        texts = _texts(where, ".phn")
        items = Items.from_phn(
            texts, _speakers(texts, names), sample_rate=rate or PHN_RATE, span=span
        )
    elif source == "frame_labels":
        labels = read_rows(where)
        items = Items.from_frame_labels(
            labels, _speakers(labels, names), rate=rate or LABEL_RATE, span=span
        )
        if not features.timed:
            _check_lengths(labels, features, rate or LABEL_RATE)
    else:
        matching = _matching(features.names, names)
        items = Items.from_file_names(matching, names)
        if left := len(features) - len(matching):
            remarks = (f"left out, as --names does not match: {left:,} of {len(features):,} files",)
    if options["without_stress"]:
        items = replace(
            items, phone=_plain(items.phone), prev=_plain(items.prev), next=_plain(items.next)
        )
    items = _under_names(items, features)
    said = "names of files" if source == "names" else str(where)
    return Listed(items, said, remarks)


def check_slices(
    items: Items,
    features: Mapping[str, Tensor],
    when: Mapping[str, Any],
    slicing: Slicing,
    *,
    drop_empty: bool,
) -> None:
    """Refuse items that lie outside their features, or have no frame where that is not allowed.

    Args:
        items: The items.
        features: Features of each file.
        when: `frame_rate` or `times`, as of `Features.when`.
        slicing: Which frames items have.
        drop_empty: Whether items may have none.

    Raises:
        InputError: Names the first ones.
    """
    empty = without_frames(items, features, when, slicing)
    if empty.any() and not drop_empty:
        which = [items.describe(i) for i in np.flatnonzero(empty).tolist()]
        raise InputError(
            f"{counted(len(which), 'item')} {'has' if len(which) == 1 else 'have'} no frame: "
            f"{most_common(which)}; check --frame-rate, or leave out what has none by --drop-empty"
        )


def without_frames(
    items: Items, features: Mapping[str, Tensor], when: Mapping[str, Any], slicing: Slicing
) -> NDArray[np.bool_]:
    """Return which items have no frame."""
    lengths = {name: len(frames) for name, frames in features.items()}
    start, stop = slice_frames(items, lengths, slicing=slicing, **when)
    empty: NDArray[np.bool_] = start == stop
    return empty


def _is_table(path: Path) -> bool:
    return path.suffix in {".csv", ".tsv"}


def _matching(files: Sequence[str], names: str) -> list[str]:
    """Return the files that `names` speaks of."""
    groups_of((), names)  # refuses what is no regular expression
    found = [file for file in files if re.match(names, file)]
    if not found:
        raise InputError(f"--names {names!r}: no name matches, as {files[0]!r}; mend the pattern")
    return found


def _plain(labels: NDArray[np.object_]) -> NDArray[np.object_]:
    return np.array([STRESS.sub(r"\1", str(label)) for label in labels], dtype=object)


def _under_names(items: Items, features: Features) -> Items:
    """Name files as features are."""
    known = known_names(features.names)
    features.require(file for file in items.file if file not in known)
    return replace(items, file=np.array([known[file] for file in items.file], dtype=object))


def _speakers(files: Mapping[str, Any], names: str | None) -> dict[str, str]:
    """Tell speakers by name, or by first folder."""
    if names is not None:
        groups = groups_of(files, names)
        if "(?P<speaker>" not in names:
            raise InputError(f"--names {names!r}: add a group (?P<speaker>...)")
        return {name: found["speaker"] for name, found in groups.items()}
    bare = [name for name in files if "/" not in name]
    if bare:
        raise InputError(
            f"no telling who speaks in {bare[0]!r}: put each speaker's files in a folder, or give "
            "--names with a group (?P<speaker>...)"
        )
    return {name: name.split("/")[0] for name in files}


def _texts(folder: Path, suffix: str) -> dict[str, str]:
    """Read the alignments below a folder, by name without suffix."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of {suffix} files")
    found = alignments(folder, suffix)
    if not found:
        raise InputError(f"{folder}: holds no {suffix} files; is it the right folder?")
    return {name: read_text(path) for name, path in found.items()}


def _check_lengths(labels: Mapping[str, Sequence[str]], features: Features, rate: int) -> None:
    for name, row in labels.items():
        wanted, slack = (count / rate * features.rate for count in (len(row), SLACK))
        if name in features and abs(len(features[name]) - wanted) > slack + 1:
            raise InputError(
                f"{name!r} has {len(row):,} labels, which is {wanted:,.0f} frames at "
                f"{features.rate:g} a second, but has {len(features[name]):,}: check --frame-rate "
                "and --label-rate"
            )


def _table(path: Path, names: str | None) -> Items:
    """Read a table with a header; who speaks is a column, or told by names."""
    lines = read_text(path).splitlines()
    rows = list(csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ","))
    if not rows:
        raise InputError(f"{path}: lists no items; write a header and one item a line")
    columns: dict[str, list[str]] = {}
    for name in rows[0]:
        if any(row[name] is None for row in rows) or None in rows[0]:
            raise InputError(f"{path}: a line has more or fewer columns than the header; mend it")
        columns[name.strip().lstrip("#")] = [row[name].strip() for row in rows]
    if "speaker" in columns and names is not None:
        raise InputError(f"--names: {path} says who speaks; leave one of them out")
    if "speaker" not in columns and "file" in columns:
        told = _speakers(dict.fromkeys(columns["file"]), names)
        columns["speaker"] = [told[file] for file in columns["file"]]
    return Items.from_table(columns)
