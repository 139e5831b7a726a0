"""`remanence search describe`: local descriptors and their whitening (arXiv 1811.11147)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from remanence.errors import InputError
from remanence.jobs.options import check_options
from remanence.jobs.search.describe_pass import Seen, describe_images, describe_patches
from remanence.jobs.search.describe_report import build_report
from remanence.jobs.search.describe_whitening import Learned, learn
from remanence.jobs.search.descriptors_file import FILE, Rows, columns
from remanence.jobs.search.patch_files import open_patches
from remanence.jobs.search.pictures import open_pictures
from remanence.kit.devices import launch
from remanence.kit.progress import say
from remanence.kit.run import run_folder, write_json
from remanence.search.kernel_descriptor.descriptor import KernelDescriptor
from remanence.search.kernel_descriptor.moments import Moments
from remanence.search.kernel_descriptor.spectrum import effective_rank
from remanence.search.kernel_descriptor.whitening import Kind, Whitening

WHITENING, CARD = "whitening.safetensors", "whitening.json"
LEAST_LONGEST = 16


@dataclass(frozen=True, eq=False)
class Described:
    """What `describe` leaves behind.

    Attributes:
        out: Run folder; the descriptors lie in `out / "descriptors.safetensors"`.
        whitening: What was learned, as written to `out / "whitening.safetensors"`.
        results: What `results.json` holds.
    """

    out: Path
    whitening: Whitening | None
    results: dict[str, Any]


def describe(
    images: str,
    *,
    out: Path,
    keypoints: int = 2000,
    keypoint_file: Path | None = None,
    patches: bool = False,
    patch_size: int = 32,
    magnification: float = 5.0,
    upright: bool = False,
    kind: Literal["concat", "polar", "cartesian"] = "concat",
    learn_whitening: Kind | None = None,
    whitening: Path | None = None,
    dim: int | None = None,
    longest: int = 1600,
    skip_broken: bool = False,
    seed: int = 0,
) -> Described:
    """Describe the local patches of images, and learn a whitening from them.

    OUT/descriptors.safetensors holds a row for each key point: vectors, image (its number), xy and
    scale in pixels of the image turned upright as its EXIF data ask, angle in radians clockwise,
    and valid, which is false for a flat patch, whose vector is 0. Names of the images are in its
    metadata. `remanence search index` reads it as descriptors.safetensors@vectors.

    Args:
        images: An image file, a folder of images, or an image source: .parquet, .tar, digits, or a
            timm dataset name; SOURCE@split picks a split.
        out: Run folder to create.
        keypoints: Key points an image, the strongest.
        keypoint_file: Key points of a single image instead of detected ones, .csv or .npy: a row
            has x, y, scale (sigma in pixels) and angle (radians clockwise; may be left out).
        patches: IMAGES holds patches that are already cut: .npy, .npz or .safetensors (N, s, s), a
            folder of Photo Tourism's sheets, or HPatches' columns as .png.
        patch_size: Side of the patches that are cut, pixels.
        magnification: Half the side of a patch over a key point's scale.
        upright: Leave orientations out, for pictures that are never turned.
        kind: Parts of the descriptor: polar forgives errors of orientation, cartesian those of
            place, concat has both.
        learn_whitening: Learn a whitening: pcaws (the safe choice), pca, pcaw or pcawt from the
            descriptors alone; lw or lws from pairs of patches in warped copies of the images.
        whitening: Whitening to use, learned before with the same kind of descriptor.
        dim: Length of descriptors after a whitening that is learned; if not given, 128, or all
            there is where that is less.
        longest: Longer side at which an image is looked at, pixels; larger ones are reduced.
        skip_broken: Leave unreadable images out and count them.
        seed: Seed of the choice of held-out images and of their warped copies.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k != "out"}
    descriptor = KernelDescriptor(kind)
    _check(options, descriptor)
    device = launch(1, "32-true").device
    with run_folder(out, "search describe", options, seed=seed) as run:
        given = None if whitening is None else Whitening.load(whitening, descriptor.convention)
        seen = Seen((Moments(descriptor.dim), Moments(descriptor.dim)))
        learned: Learned | None = None
        started = time.perf_counter()
        with Rows(run.partial, columns(descriptor, places=not patches)) as rows:
            if patches:
                describe_patches(open_patches(images), descriptor, rows, seen, device)
            else:
                opened = open_pictures(images)
                held = _held_out(len(opened), seed) if learn_whitening else set()
                describe_images(opened, descriptor, options, held, rows, seen, device)
            seconds = time.perf_counter() - started
            if learn_whitening is not None:
                learned = learn(
                    None if patches else opened.subset(seen.rows),
                    [row in held for row in seen.rows] if not patches else [],
                    seen.moments,
                    descriptor,
                    learn_whitening,
                    dim=dim or min(128, descriptor.dim),
                    size=patch_size,
                    longest=longest,
                    seed=seed,
                )
                learned.whitening.save(run.path(WHITENING))
                given = learned.whitening
            if given is not None:
                rows.whiten(given)
            rows.join(run.path(FILE), _metadata(descriptor, seen, options, given))
        if not rows.count and not seen.skipped:
            say("no key points in the images: there are 0 descriptors")
        length = descriptor.dim if given is None else given.projection.shape[1]
        values = seen.spectrum()
        results = _results(seen, rows.count, length, seconds, values)
        if learned is not None:
            results["whitening"] = learned.card()
            card = learned.card() | {"effective_rank": results["effective_rank"]}
            write_json(run.path(CARD), card)
        run.write_results(results)
        report = build_report(
            images, results, values, seen.shown, learned, descriptor.convention, patches=patches
        )
        report.section("Run")
        report.facts(run.summary())
        report.write(run.path("report.html"))
        say(
            f"{rows.count:,} descriptors of length {length} from {len(seen.names):,} "
            f"{'files of patches' if patches else 'images'} in {seconds:.1f} s"
        )
    return Described(out, None if learned is None else learned.whitening, results)


def _check(options: Mapping[str, Any], descriptor: KernelDescriptor) -> None:
    """Refuse options that cannot work, before anything is opened."""
    check_options(options)
    check_looking(options)
    dim, learned = options["dim"], options["learn_whitening"]
    if learned is not None and options["whitening"] is not None:
        raise InputError("--learn-whitening and --whitening: give one of them")
    if dim is not None and learned is None:
        raise InputError("--dim: is the length after a whitening; give --learn-whitening as well")
    if dim is not None and not 1 <= dim <= descriptor.dim:
        raise InputError(
            f"--dim {dim}: {descriptor.kind} descriptors have length {descriptor.dim}; give 1 to "
            f"{descriptor.dim}"
        )
    if options["patches"] and options["keypoint_file"] is not None:
        raise InputError("--keypoint-file: patches have no key points; leave it or --patches out")
    if options["patches"] and learned in ("lw", "lws"):
        raise InputError(
            f"--learn-whitening {learned}: warps images to learn, and --patches gives none; take "
            "pcaws"
        )


def check_looking(options: Mapping[str, Any]) -> None:
    """Refuse how pictures are looked at where that cannot work."""
    least = {"keypoints": 1, "patch_size": 8, "longest": LEAST_LONGEST}
    for name, low in least.items():
        value = options.get(name)
        if value is not None and value < low:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {low}")
    magnification = options.get("magnification", 1.0)
    if not 0.1 <= magnification <= 100:  # NaN is in no range
        raise InputError(f"--magnification {magnification:g}: must be 0.1 to 100; 5 is usual")


def _held_out(count: int, seed: int) -> set[int]:
    """A tenth of the images, at least one of two and at most five."""
    held = 0 if count < 2 else min(5, max(1, count // 10))
    return set(np.random.default_rng(seed).permutation(count)[:held].tolist())


def _metadata(
    descriptor: KernelDescriptor,
    seen: Seen,
    options: Mapping[str, Any],
    whitening: Whitening | None,
) -> dict[str, str]:
    how = ("patch_size", "magnification", "upright", "longest", "patches")
    facts = {name: options[name] for name in how}
    facts |= {"convention": descriptor.convention}
    facts |= {"whitening": None if whitening is None else whitening.kind}
    return {"images": json.dumps(seen.names), "settings": json.dumps(facts)}


def _results(
    seen: Seen, count: int, length: int, seconds: float, eigenvalues: Tensor | None
) -> dict[str, Any]:
    return {
        "images": len(seen.names),
        "skipped": seen.skipped,
        "descriptors": count,
        "length": length,
        "flat": seen.flat,
        "without_keypoints": [n for n, c in zip(seen.names, seen.counts, strict=True) if not c],
        "fewest": min(seen.counts),
        "most": max(seen.counts),
        "seconds": round(seconds, 2),
        "effective_rank": None if eigenvalues is None else effective_rank(eigenvalues),
    }
