"""`remanence speech abx`: how well features tell phones apart, without training (2007.00991)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.jobs.options import check_options
from remanence.jobs.speech.abx_items import Listed, check_slices, check_sources, open_items
from remanence.jobs.speech.abx_report import build_report
from remanence.jobs.speech.abx_scores import (
    BySide,
    chosen,
    compared,
    figures,
    how_sure,
    load_shards,
    of_what,
    save_cells,
    score,
    sides,
    write_tables,
)
from remanence.jobs.speech.abx_words import in_options
from remanence.jobs.speech.features import Features, open_features, rate_doubt
from remanence.kit.devices import launch
from remanence.kit.progress import say, track
from remanence.kit.run import RunFolder, run_folder
from remanence.speech.abx.cells import Context, Speaker, check_cells
from remanence.speech.abx.distances import Distance, check_features
from remanence.speech.abx.items import Span
from remanence.speech.abx.score import AbxResult, Comparison
from remanence.speech.abx.slicing import Slicing
from remanence.speech.abx.statistics import Aggregate

if TYPE_CHECKING:
    from lightning_fabric import Fabric

CHANCE = 50.0


@dataclass(frozen=True, eq=False)
class Scores:
    """What `abx` leaves behind.

    Attributes:
        out: Run folder.
        within: Within speakers; None where it was not asked for.
        across: Across speakers; likewise.
        comparison: First less second features, by side.
        results: What `results.json` holds; errors in per cent.
    """

    out: Path
    within: AbxResult | None
    across: AbxResult | None
    comparison: dict[Speaker, Comparison]
    results: dict[str, Any]


def abx(
    features: str,
    *,
    out: Path,
    items: Path | None = None,
    names: str | None = None,
    textgrid: Path | None = None,
    phn: Path | None = None,
    frame_labels: Path | None = None,
    audio: str | None = None,
    frame_rate: float | None = None,
    compare: str | None = None,
    compare_frame_rate: float | None = None,
    compare_layer: str | None = None,
    speaker: Literal["both", "within", "across"] = "both",
    context: Context = "within",
    distance: Distance = "angular",
    slicing: Slicing = "inclusive",
    aggregate: Aggregate = "librilight",
    max_group: int | None = None,
    max_x_speakers: int | None = None,
    draws: int = 3,
    subsample: int | None = None,
    bootstrap: int = 0,
    drop_empty: bool = False,
    tier: str = "phones",
    span: Span = "phone",
    label_rate: int | None = None,
    without_stress: bool = False,
    layer: str = "context",
    chunk: float | None = None,
    strict: bool = False,
    seq_norm: bool = False,
    sample_rate: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    rank: int = 0,
    world_size: int = 1,
    merge: bool = False,
    seed: int = 0,
) -> Scores:
    """How well do features tell phones, words or units apart? ABX errors, no classifier trained.

    Args:
        features: A folder of .npy, .npz, .pt or .txt files, or a run of speech extract; or, with
            --audio, a run of speech cpc, mfcc, or FILE.py:FUNCTION. With --merge, the folder that
            holds the shards' runs.
        out: Run folder to create.
        items: Item file with a header and 'file onset offset phone prev next speaker' a line, in
            seconds; or a .csv or .tsv with those columns, of which file and phone must be there.
        names: Regular expression for the beginning of a file's name, with groups phone, speaker,
            prev and next: '(?P<phone>[0-9])_(?P<speaker>[a-z]+)_'. Alone it makes an item of each
            file that it matches; with alignments, or a table without speakers, it tells who speaks,
            by default the first folder of a name.
        textgrid: Folder of .TextGrid files.
        phn: Folder of .phn files, as of TIMIT.
        frame_labels: File with 'name label label ...' a line, a label a frame.
        audio: Recordings: a folder, a file, a quoted glob or a .txt list. With a folder of features
            their durations are checked.
        frame_rate: Frames a second of the features in a folder or of FILE.py:FUNCTION; by default
            the times in .npz files, what speech extract wrote down, else 100.
        compare: Other features, to be compared on the same items.
        compare_frame_rate: Their frames a second, where it is another.
        compare_layer: Their layer, where it is another.
        speaker: within: A, B and X of one speaker; across: X of another speaker; or both.
        context: Phones with the same neighbours, or any.
        distance: Between frames. kl and kl_symmetric are for probabilities, identical for ids.
        slicing: Frames of an item: all whose centres lie in it; librilight leaves the last out.
        aggregate: Mean over cells: librilight (ZeroSpeech 2021), zerospeech2017, or weighted by
            triplets.
        max_group: At most so many drawn items of each phone, context and speaker.
        max_x_speakers: Across, at most so many drawn speakers of X for each context, speaker and
            phone.
        draws: Draws to score with these two, for the standard error of the draw.
        subsample: At most about so many items, the same in every run, for an error in seconds.
        bootstrap: Resamples of speakers for intervals; 0 for the jackknife and Student's t.
        drop_empty: Leave out items shorter than a frame, as the official codes do, and count them.
        tier: Tier of TextGrids that holds the phones.
        span: Alignments give items of the phone, or of the triphone around it.
        label_rate: Labels a second of --frame-labels (100 if not given); samples a second of the
            times in .phn files (16000).
        without_stress: Take AH0, AH1 and AH2 for one phone.
        layer: Of a CPC network: context, encoder, or the number of a context layer.
        chunk: See speech extract.
        strict: See speech extract.
        seq_norm: See speech extract.
        sample_rate: Sample rate that FILE.py:FUNCTION takes.
        device: Where to compute. torchrun shares the work among processes.
        rank: Which shard this run is, from 0; without torchrun. OUT is taken as it is: give each
            shard its own, all in one folder for --merge.
        world_size: Number of shards, each a run of its own.
        merge: Add the shards' runs in the folder FEATURES; exact. No other option is needed.
        seed: Of what is drawn.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k != "out"}
    if merge:
        return _merge(Path(features), out)
    _check(options)
    fabric = launch(1, "32-true", device)
    shard = (rank, world_size) if world_size > 1 else (fabric.global_rank, fabric.world_size)
    if world_size > 1 and fabric.world_size > 1:
        raise InputError("--world-size: torchrun shares the work already; leave it out")
    with (
        run_folder(out, "speech abx", options, seed=seed, rank=fabric.global_rank) as run,
        in_options(),
    ):
        opened = {"first": _open(options, fabric.device)}
        if compare is not None:
            opened["second"] = _open(_of_second(options), fabric.device)
        listed = open_items(opened["first"], options)
        some = {side: chosen(listed.items, side, options) for side in sides(speaker)}
        for side, own in some.items():
            check_cells(own, side, context)
        wanted = dict.fromkeys(file for own in some.values() for file in own.file)
        used = listed.items[np.array([file in wanted for file in listed.items.file])]
        matrices: dict[str, dict[str, Tensor]] = {}
        when: dict[str, dict[str, Any]] = {}
        doubts: list[str] = []
        for name, source in opened.items():
            matrices[name] = _matrices(source, wanted, show=run.first)
            when[name] = source.when(wanted)
            check_features(matrices[name], distance)
            if doubt := rate_doubt(used, source):
                doubts.append(doubt if compare is None else f"the {name} {doubt}")
            for own in some.values():
                check_slices(own, matrices[name], when[name], slicing, drop_empty=drop_empty)
        for remark in [*listed.remarks, *doubts] if run.first else []:
            say(remark)
        scored: dict[str, BySide] = {}
        for name in opened:
            scored[name] = {
                side: score(
                    matrices[name],
                    when[name],
                    own,
                    side,
                    options,
                    device=fabric.device,
                    shard=shard,
                    gather=lambda result: _gather(result, fabric),
                    show=run.first,
                    what="ABX" if len(opened) == 1 else f"ABX of the {name} features",
                )
                for side, own in some.items()
            }
        about = _about(listed, opened, options, doubts)
        if world_size > 1:
            return _leave_shard(run, about, scored, out)
        return _leave(run, about, scored, out)


def _check(options: Mapping[str, Any]) -> None:
    """Refuse options that cannot work, before anything is opened."""
    check_options(options)
    check_sources(options)
    if options["rank"] >= options["world_size"]:
        raise InputError(
            f"--rank {options['rank']}: give 0 to {options['world_size'] - 1} of --world-size"
        )
    if options["compare"] is None:
        for name in ("compare_frame_rate", "compare_layer"):
            if options[name] is not None:
                raise InputError(f"--{name.replace('_', '-')}: give --compare as well")
    if options["max_x_speakers"] is not None and options["speaker"] == "within":
        raise InputError("--max-x-speakers: is for --speaker across or both")


def _of_second(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options under which the features to compare with are opened."""
    second = dict(options) | {"features": options["compare"]}
    for name in ("frame_rate", "layer"):
        given = options[f"compare_{name}"]
        if given is not None:
            second[name] = given
    return second


def _open(options: Mapping[str, Any], device: torch.device) -> Features:
    return open_features(
        options["features"],
        device=device,
        **{name: options[name] for name in ("audio", "frame_rate", "sample_rate", "layer", "chunk",
                                            "strict", "seq_norm")},
    )  # fmt: skip


def _matrices(source: Features, files: Mapping[str, None], *, show: bool) -> dict[str, Tensor]:
    """Read or compute the features of files."""
    source.require(files)
    source.prepare(files, show=show)
    return {name: source[name] for name in track(list(files), "read features", show=show)}


def _gather(result: AbxResult, fabric: Fabric) -> list[AbxResult]:
    """Return the results of all processes, in each."""
    if fabric.world_size == 1:
        return [result]
    parts: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(parts, result)
    return parts


def _about(
    listed: Listed,
    opened: Mapping[str, Features],
    options: Mapping[str, Any],
    doubts: list[str],
) -> dict[str, Any]:
    """Return what results say of features, items and options."""
    named = {name: one.description for name, one in opened.items()}
    if len(set(named.values())) < len(named):
        layers = options["layer"], options["compare_layer"] or options["layer"]
        named = {
            name: f"{text}, layer {layer}"
            for (name, text), layer in zip(named.items(), layers, strict=True)
        }
    items = listed.items
    return {
        "features": named,
        "frame_rate": {name: one.rate for name, one in opened.items()},
        "items": {
            "source": listed.source,
            "listed": len(items),
            "files": len(set(items.file)),
            "phones": len(set(items.phone)),
            "speakers": len(set(items.speaker)),
            "files_without_items": len(set(opened["first"].names) - set(items.file)),
        },
        **{name: options[name] for name in ("distance", "context", "slicing", "aggregate")},
        "unit": "per cent",
        "chance": CHANCE,
        "doubts": doubts,
        "remarks": [*listed.remarks, *_remarks(opened)],
    }


def _remarks(opened: Mapping[str, Features]) -> list[str]:
    """Return what was done to recordings, and for which features where not for both."""
    said = []
    for remark in dict.fromkeys(r for one in opened.values() for r in one.remarks):
        of = [name for name, one in opened.items() if remark in one.remarks]
        said.append(remark if len(of) == len(opened) else f"{remark} (for the {of[0]} features)")
    return said


def _leave_shard(
    run: RunFolder, about: Mapping[str, Any], scored: Mapping[str, BySide], out: Path
) -> Scores:
    """Write what a merge needs."""
    save_cells(run.path, scored)
    shard = [run.facts["options"]["rank"], run.facts["options"]["world_size"]]
    results = {
        "shard": shard,
        "about": about,
        "draws": {
            name: {side: len(one.draws) for side, one in found.items()}
            for name, found in scored.items()
        },
    }
    run.write_results(results)
    say(f"shard {shard[0]} of {shard[1]} is counted; --merge adds the shards")
    return Scores(out, None, None, {}, dict(results))


def _leave(
    run: RunFolder, about: Mapping[str, Any], scored: Mapping[str, BySide], out: Path
) -> Scores:
    """Write results, tables, counts and the report."""
    first = scored["first"]
    found: dict[Speaker, Comparison] = {}
    if "second" in scored:
        found = {side: first[side].result.compare(scored["second"][side].result) for side in first}
    results: dict[str, Any] = {
        **about,
        **{name: {side: figures(one) for side, one in own.items()} for name, own in scored.items()},
    }
    if found:
        results["comparison"] = {side: compared(one) for side, one in found.items()}
    if run.first:
        run.write_results(results)
        write_tables(run.path, scored)
        save_cells(run.path, scored)
        report = build_report(results, scored)
        report.section("Run")
        report.facts(run.summary())
        report.write(run.path("report.html"))
        for name in scored:
            for side, row in results[name].items():
                say(f"{of_what(side, name, scored)}: {row['error']:.2f} %{how_sure(row)}")
        for side, row in results.get("comparison", {}).items():
            say(f"{side} speakers: {row['verdict']}")
    either = {side: one.result for side, one in first.items()}
    return Scores(out, either.get("within"), either.get("across"), found, results)


def _merge(folder: Path, out: Path) -> Scores:
    """Add the shards in a folder."""
    shards, options = _shards(folder)
    with run_folder(out, "speech abx", options | {"merge": True}, seed=options["seed"]) as run:
        told = [json.loads((p / "results.json").read_text(encoding="utf-8")) for p in shards]
        about = told[0]["about"]
        if any(own["about"] != about for own in told):
            raise InputError(f"{folder}: features or items changed between shards; run all anew")
        scored = {
            name: {side: load_shards(shards, name, side, n, options) for side, n in found.items()}
            for name, found in told[0]["draws"].items()
        }
        return _leave(run, about, scored, out)


def _shards(folder: Path) -> tuple[list[Path], dict[str, Any]]:
    """Return the shards in a folder, in order, and their options.

    Raises:
        InputError: There are none, one is missing or there twice, or they are of different runs.
    """
    found: dict[int, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/run.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        options = facts.get("options", {})
        if facts.get("command") != "speech abx" or options.get("world_size", 1) < 2:
            continue
        if options["rank"] in found:
            raise InputError(f"{folder}: two runs are shard {options['rank']}; move one away")
        found[options["rank"]] = (path.parent, options)
    if not found:
        raise InputError(f"{folder}: holds no runs with --rank and --world-size")
    first = next(iter(found.values()))[1]
    for path, options in found.values():
        differing = [k for k in first if k != "rank" and options.get(k) != first[k]]
        if differing:
            flag, one, other = differing[0], options.get(differing[0]), first[differing[0]]
            raise InputError(
                f"{path}: --{flag.replace('_', '-')} is {one}, in another shard {other}; run it "
                "again"
            )
    lacking = sorted(set(range(first["world_size"])) - found.keys())
    if lacking:
        raise InputError(
            f"{folder}: shard {lacking[0]} of {first['world_size']} is missing; run it first"
        )
    return [found[i][0] for i in sorted(found)], first
