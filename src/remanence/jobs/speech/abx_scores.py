"""Errors of `remanence speech abx`: within and across, over draws and shards, and their tables."""

from __future__ import annotations

import csv
import math
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.jobs.speech.abx_items import without_frames
from remanence.kit.progress import bar
from remanence.speech.abx.cells import Context, Speaker, context_names, fixed_subsample
from remanence.speech.abx.items import Items
from remanence.speech.abx.score import AbxResult, Comparison, merge, run
from remanence.speech.abx.statistics import Cells

COLUMNS = ("context", "speaker", "x_speaker", "phone", "other", "wrong", "triplets")
NAMES = ("contexts", "speakers", "phones")
TABLES = ("pair", "phone", "speaker")

Group = tuple[str, str, str]  # context, speaker, phone
Gather = Callable[[AbxResult], list[AbxResult]]


@dataclass(frozen=True, eq=False)
class Scored:
    """An error within or across speakers.

    Attributes:
        draws: The error and its cells, of each draw; one where nothing was drawn.
        items: How many items were to be scored.
        groups: How many of them, those with frames, are of a context, speaker and phone.
    """

    draws: tuple[AbxResult, ...]
    items: int
    groups: Counter[Group]

    @property
    def result(self) -> AbxResult:
        """Of the first draw."""
        return self.draws[0]

    @property
    def unused(self) -> int:
        """Items with frames of which no cell speaks, for want of others to compare them with."""
        cells = self.result.cells
        contexts, speakers, phones = (np.array(getattr(cells, name)) for name in NAMES)
        used: set[Group] = set()
        for who, what in (
            (cells.speaker, cells.phone),
            (cells.speaker, cells.other),
            (cells.x_speaker, cells.phone),
        ):
            used |= set(zip(contexts[cells.context], speakers[who], phones[what], strict=True))
        return sum(count for group, count in self.groups.items() if group not in used)

    @property
    def draw_stderr(self) -> float:
        """Standard deviation of an error over draws; NaN with one draw."""
        errors = [result.error for result in self.draws]
        return float(np.std(errors, ddof=1)) if len(errors) > 1 else math.nan


BySide = Mapping[Speaker, Scored]


def sides(speaker: str) -> tuple[Speaker, ...]:
    """Return what is scored."""
    return ("within", "across") if speaker == "both" else (speaker,)  # type: ignore[return-value]  # checked by the command line


def chosen(items: Items, side: Speaker, options: Mapping[str, Any]) -> Items:
    """Return the items to score, or a fixed subsample of them."""
    most = options["subsample"]
    if most is None or len(items) <= most:
        return items
    return fixed_subsample(
        items, most, speaker=side, context=options["context"], seed=options["seed"]
    )


def score(
    features: Mapping[str, Tensor],
    when: Mapping[str, Any],
    items: Items,
    side: Speaker,
    options: Mapping[str, Any],
    *,
    device: torch.device,
    shard: tuple[int, int],
    gather: Gather,
    show: bool,
    what: str,
) -> Scored:
    """Score items on one side.

    Args:
        features: Features of each file.
        when: `frame_rate` or `times`, as of `Features.when`.
        items: The items.
        side: `within` or `across`.
        options: Options of the command.
        device: Where to compute.
        shard: Which shard of how many.
        gather: From this process's result to all processes'.
        show: Whether to show progress.
        what: What is scored, for the progress bar.
    """
    drawn = options["max_group"] is not None or (
        side == "across" and options["max_x_speakers"] is not None
    )
    results = []
    for draw in range(options["draws"] if drawn else 1):
        with bar(f"{what}, {side} speakers, %", 100, show=show) as progress:
            seen = 0

            def tell(done: int, total: int) -> None:
                nonlocal seen
                now = 100 * done // total
                progress.advance(now - seen)
                seen = now

            own = run(
                features,
                items,
                speaker=side,
                seed=options["seed"] + draw,
                device=device,
                shard=shard,
                tell=tell,
                **when,
                **{name: options[name] for name in ("distance", "context", "slicing", "aggregate",
                                                    "max_group", "max_x_speakers", "bootstrap",
                                                    "drop_empty")},
            )  # fmt: skip
        results += [own] if shard[1] == 1 else _merged(gather(own), options)
    kept = items[~without_frames(items, features, when, options["slicing"])]
    return Scored(tuple(results), len(items), _groups(kept, options["context"]))


def _merged(parts: list[AbxResult], options: Mapping[str, Any]) -> list[AbxResult]:
    # A single shard of several stays as it is: another run adds them.
    if len(parts) == 1:
        return parts
    return [merge(parts, bootstrap=options["bootstrap"], seed=options["seed"])]


def _groups(items: Items, context: Context) -> Counter[Group]:
    """Count items of one context, speaker and phone."""
    return Counter(zip(context_names(items, context), items.speaker, items.phone, strict=True))


def figures(scored: Scored) -> dict[str, Any]:
    """Return the figures of `results.json`; errors in per cent.

    Where no error was seen speakers do not differ, and nothing says how much others would.
    """
    result = scored.result
    stderr, (low, high) = 100 * result.stderr, (100 * min(max(e, 0), 1) for e in result.interval)
    if not result.error:
        stderr = low = high = math.nan
    return {
        "error": 100 * result.error,
        "stderr": stderr,
        "low": low,
        "high": high,
        "draw_stderr": 100 * scored.draw_stderr,
        "draws": len(scored.draws),
        "speakers": len(np.union1d(result.cells.speaker, result.cells.x_speaker)),
        "cells": len(result.cells),
        "triplets": int(result.cells.triplets.sum()),
        "items": scored.items,
        "items_without_frames": result.dropped,
        "items_in_no_cell": scored.unused,
    }


def of_what(side: str, name: str, scored: Mapping[str, BySide]) -> str:
    """Name a side, and of features to compare with others which they are."""
    return f"{side} speakers" + (f", {name} features" if len(scored) > 1 else "")


def how_sure(row: Mapping[str, Any]) -> str:
    """Return what follows an error of `figures`: its interval, or why there is none."""
    if not row["error"]:
        return f": {no_error(row)}"
    return "" if math.isnan(row["low"]) else f", {row['low']:.2f} to {row['high']:.2f}"


def no_error(row: Mapping[str, Any]) -> str:
    """Say what figures without an error leave open."""
    return f"no error in {row['triplets']:,} triplets; how many others would make is unknown"


def compared(found: Comparison) -> dict[str, Any]:
    """Return the figures of a comparison, in points of per cent."""
    stderr, (low, high) = 100 * found.stderr, (100 * end for end in found.interval)
    if not found.difference and not found.stderr:
        stderr = low = high = math.nan
    return {
        "difference": 100 * found.difference,
        "stderr": stderr,
        "low": low,
        "high": high,
        "p": found.p_value,
        "cells": found.cells,
        "speakers": found.speakers,
        "verdict": _verdict(found),
    }


def _verdict(found: Comparison) -> str:
    size = f"{abs(100 * found.difference):.2f} points"
    if math.isnan(found.p_value):
        return f"The difference is {size}; with one speaker nothing says how sure it is."
    if not found.difference and not found.stderr:
        return "No difference was seen: these items do not tell the features apart."
    better = "first" if found.difference < 0 else "second"
    if found.p_value < 0.05:
        return (
            f"The {better} features are better by {size}, more than what the {found.speakers} "
            f"speakers alone explain (p = {found.p_value:.2g})."
        )
    return (
        f"The difference of {size} is within what the {found.speakers} speakers alone explain "
        f"(p = {found.p_value:.2g})."
    )


def cells_file(name: str, side: Speaker, draw: int) -> str:
    """Return the name of the counts of features on a side; draws are numbered from 0."""
    return f"cells-{name}-{side}{f'-{draw + 1}' if draw else ''}.npz"


def save_cells(folder: Callable[[str], Path], scored: Mapping[str, BySide]) -> None:
    """Write the counts of every draw, so that shards can be added and means be taken anew.

    Args:
        folder: From a name to its path.
        scored: By features, then by side.
    """
    for name, found in scored.items():
        for side, one in found.items():
            groups: dict[str, Any] = {
                "groups": np.array(list(one.groups), dtype=str).reshape(-1, 3),
                "group_items": np.array(list(one.groups.values()), dtype=np.int64),
            }
            for draw, result in enumerate(one.draws):
                cells = result.cells
                columns: dict[str, Any] = {key: getattr(cells, key) for key in COLUMNS}
                columns |= {key: np.array(getattr(cells, key), dtype=str) for key in NAMES}
                columns["items"] = np.array([one.items, result.dropped])
                np.savez_compressed(folder(cells_file(name, side, draw)), **columns, **groups)


def load_shards(
    shards: Sequence[Path], name: str, side: Speaker, draws: int, options: Mapping[str, Any]
) -> Scored:
    """Return the sum of shards.

    Args:
        shards: Their folders.
        name: Of the features.
        side: `within` or `across`.
        draws: How many there are.
        options: Options of the shards.

    Raises:
        InputError: A file is damaged, or shards are of different items.
    """
    added = []
    for draw in range(draws):
        parts = [_load(shard / cells_file(name, side, draw), options) for shard in shards]
        added += _merged([part.result for part in parts], options)
    return Scored(tuple(added), parts[0].items, parts[0].groups)


def _load(path: Path, options: Mapping[str, Any]) -> Scored:
    """Read a draw of a shard, whose error is not known before shards are added."""
    try:
        with np.load(path, allow_pickle=False) as given:
            columns = {name: given[name] for name in COLUMNS}
            contexts, speakers, phones = (tuple(given[name].tolist()) for name in NAMES)
            items, dropped = given["items"].tolist()
            rows = zip(map(tuple, given["groups"].tolist()), given["group_items"].tolist(),
                       strict=True)  # fmt: skip
            groups: Counter[Group] = Counter(dict(rows))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: missing or damaged; run that shard again") from error
    nothing = (math.nan, math.nan)
    cells = Cells(**columns, contexts=contexts, speakers=speakers, phones=phones)
    result = AbxResult(
        math.nan, math.nan, nothing, cells, options["aggregate"], options["slicing"], dropped
    )
    return Scored((result,), items, groups)


def write_tables(folder: Callable[[str], Path], scored: Mapping[str, BySide]) -> None:
    """Write per_pair.csv, per_phone.csv and per_speaker.csv.

    Args:
        folder: From a name to its path.
        scored: By features, then by side.
    """
    heads = {"pair": ("phone", "other"), "phone": ("phone",), "speaker": ("speaker",)}
    for by in TABLES:
        with folder(f"per_{by}.csv").open("w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream)
            table.writerow(["features", "side", *heads[by], "error_percent", "cells", "triplets"])
            for name, found in scored.items():
                for side, one in found.items():
                    for row in _rows(one.result, by):
                        table.writerow([name, side, *row])


def _rows(result: AbxResult, by: str) -> Iterator[Sequence[Any]]:
    cells = result.cells
    columns = {"pair": (cells.phone, cells.other), "phone": (cells.phone,),
               "speaker": (cells.speaker,)}[by]  # fmt: skip
    names = cells.speakers if by == "speaker" else cells.phones
    rows, place = np.unique(np.stack(columns, 1), axis=0, return_inverse=True)
    counts = np.bincount(place.ravel())
    triplets = np.zeros(len(rows), np.int64)
    np.add.at(triplets, place.ravel(), cells.triplets)
    errors = result.table(by)
    for i, row in enumerate(rows.tolist()):
        key = tuple(names[j] for j in row)
        yield [*key, f"{100 * errors[key]:.6f}", int(counts[i]), int(triplets[i])]
