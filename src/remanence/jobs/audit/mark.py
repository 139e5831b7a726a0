"""`remanence audit mark`: mark images so that training on them can be proved."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from remanence.audit import radioactive as ra
from remanence.errors import InputError
from remanence.jobs.audit.mark_key import key_of_run, key_path
from remanence.jobs.audit.mark_manifest import write_manifest, write_public
from remanence.jobs.audit.mark_network import (
    choose_preset,
    config_to_json,
    marking_config,
    open_marker,
)
from remanence.jobs.audit.mark_report import mark_report, pictures, summary
from remanence.jobs.audit.mark_shards import (
    Marking,
    Shard,
    choose_images,
    image_paths,
    split_into_shards,
)
from remanence.jobs.options import check_options
from remanence.kit.devices import launch
from remanence.kit.images import Images, open_images
from remanence.kit.progress import bar, say
from remanence.kit.run import RunFolder, run_folder


@dataclass(frozen=True)
class MarkedData:
    """What `mark` leaves behind.

    Attributes:
        out: Run folder; the images lie in `out / "images"`.
        key: The secret key's file.
        results: The figures of `results.json`.
    """

    out: Path
    key: Path
    results: dict[str, Any]


def mark(
    data: str,
    *,
    model: str,
    out: Path,
    fraction: float = 0.1,
    key: Path | None = None,
    preset: Literal["paper", "fast", "small"] | None = None,
    psnr: float | None = None,
    radius: float | None = None,
    iterations: int | None = None,
    recipient: str | None = None,
    per_class: bool = False,
    only_marked: bool = False,
    layer: str = "penultimate",
    precision: Literal["float32", "float64", "bfloat16"] = "float32",
    batch_size: int = 64,
    devices: int = 1,
    limit: int | None = None,
    skip_broken: bool = False,
    seed: int = 0,
    resume: bool = False,
) -> MarkedData:
    """Mark images so that training on them can be proved.

    A fraction of the images is changed, hardly visibly, so that their features move along secret
    directions, one a class; labels stay. `remanence audit detect` later tests whether a network
    was trained on them. OUT/images holds all images as PNG, marked or not, to be published with
    OUT/public.json; OUT/manifest.parquet and the key stay with the owner.

    Args:
        data: Image source: a folder of class folders, parquet, tar, digits, or a timm dataset
            name; SOURCE@split picks a split.
        model: Trained network whose features carry the marks: a model folder or hf-hub:OWNER/NAME.
        out: Run folder to create.
        fraction: Share of the images to mark, chosen at random.
        key: The secret key's file; made if there is none. OUT.key beside OUT if not given.
        preset: How to mark: paper as published, fast for photographs at 42 dB, small for
            32-pixel images at 34 dB; by the images' size if not given.
        psnr: Least PSNR of a marked image, dB.
        radius: Largest change of a pixel, grey levels.
        iterations: Optimiser steps an image.
        recipient: Who gets this copy; other names give independent carriers.
        per_class: Mark the same share of every class.
        only_marked: Write the marked images only.
        layer: Module of the network whose output is taken as features; by default what its last
            linear layer reads.
        precision: What the network computes in.
        batch_size: Images marked at once on each device.
        devices: Devices on this machine; under torchrun the processes it started.
        limit: Use only so many images.
        skip_broken: Leave unreadable images out and count them.
        seed: Seed.
        resume: Go on with the interrupted run in OUT.partial.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("out", "resume")}
    check_options(options)
    if not 0 < fraction <= 1:
        raise InputError(f"--fraction {fraction:g}: give a share above 0 and at most 1")
    key_file = key_path(out, key)
    fabric = launch(devices, "32-true")
    with (
        run_folder(
            out, "audit mark", options, seed=seed, resume=resume, rank=fabric.global_rank
        ) as run,
        ExitStack() as stack,
    ):
        show = fabric.is_global_zero
        images = open_images(data, skip_broken=skip_broken, limit=limit, show=show)
        marker = open_marker(model, layer)
        marker.extractor.to(fabric.device)
        config = marking_config(
            choose_preset(preset, marker, images),
            marker,
            target_psnr=psnr,
            radius=radius,
            iterations=iterations,
            precision=precision,
        )
        written = ""
        if run.first:
            kept = key_of_run(
                key_file,
                given=key is not None,
                resume=resume,
                keep=lambda: any(run.partial.glob("*.ckpt")),
            )
            written = stack.enter_context(kept).to_hex()
        secret = ra.SecretKey.from_hex(fabric.broadcast(written, src=0))
        chosen = choose_images(images.labels, fraction, secret, seed, per_class=per_class)
        _refuse_small(images.subset(chosen), config.augment.smallest)
        marking = Marking(
            images,
            image_paths(images),
            run.partial,
            marker,
            torch.from_numpy(ra.carriers(secret, len(images.classes), marker.dim, recipient)),
            config,
            secret.commitment(b"remanence radioactive run"),
            seed,
            resume,
        )
        shards = split_into_shards(chosen, len(images), batch_size, copies=not only_marked)
        mine = shards[fabric.global_rank :: fabric.world_size]
        with bar("mark", sum(len(s.rows) for s in mine if s.marked), show=show) as progress:
            for shard in mine:
                marking.do(shard, fabric.device)
                progress.advance(len(shard.rows) if shard.marked else 0)
        fabric.barrier()
        results: dict[str, Any] = {}
        if run.first:
            results = _write(run, marking, shards, secret, key_file, recipient)
    return MarkedData(out, key_file, results)


def _refuse_small(images: Images, least: int) -> None:
    sizes = images.sizes(len(images))
    small = np.flatnonzero(sizes.min(axis=1) < least)
    if len(small):
        height, width = sizes[small[0]]
        raise InputError(
            f"{images.ids[small[0]]}: an image of {height} x {width} is smaller than the marking "
            f"network's crop of {least}; leave it out, or mark with a network of smaller input"
        )


def _write(
    run: RunFolder,
    marking: Marking,
    shards: Sequence[Shard],
    secret: ra.SecretKey,
    key_file: Path,
    recipient: str | None,
) -> dict[str, Any]:
    images, marker, config = marking.images, marking.marker, marking.config
    rows = marking.all_rows(shards)
    manifest = run.path("manifest.parquet")
    write_manifest(manifest, rows, classes=images.classes, recipient=recipient, config=config)
    commitment = write_public(
        run.path("public.json"),
        secret,
        manifest,
        marker_sha256=marker.fingerprint,
        dim=marker.dim,
        classes=images.classes,
        config=config,
    )
    present = {row["class"] for row in rows if row["marked"]}
    results = summary(rows) | {
        "skipped": images.skipped,
        "classes": len(images.classes),
        "marked_classes": len(present),
        "dim": marker.dim,
        "config": config_to_json(config),
        "commitment": commitment,
        "key": str(key_file),
    }
    run.write_results(results)
    feasible = results["cosine_median"] >= ra.LEAST_COSINE
    if not feasible:
        say(
            f"the median cosine between feature change and carrier is "
            f"{results['cosine_median']:.2f}: training on these marks will hardly show; mark "
            "larger images, allow a lower --psnr, or use features with fewer dimensions"
        )
    missing = [name for name in images.classes if name not in present]
    if missing:
        say(
            f"{len(missing)} of {len(images.classes)} classes have no marked image (first "
            f"{missing[0]}) and will not be tested; --per-class marks every class"
        )
    pictured = pictures(images, rows, run.path("images"))
    report = mark_report(images.source, results, pictured, config, feasible=feasible)
    report.facts(run.summary())
    report.write(run.path("report.html"))
    return results
