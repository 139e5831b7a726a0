"""`remanence learn fixres`: find and fix the train-test resolution discrepancy of a classifier."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from remanence.errors import InputError
from remanence.jobs.learn import fixres_report
from remanence.jobs.learn.fixres_adapt import Adapter, Setting, Tuning
from remanence.jobs.learn.fixres_figures import candidate_rows, compared, reassessed
from remanence.jobs.learn.fixres_predict import Predictor
from remanence.jobs.options import check_options
from remanence.kit.devices import Precision, launch
from remanence.kit.fit import Recipe
from remanence.kit.images import Images, open_images, open_splits
from remanence.kit.models import Network, open_network, save_network
from remanence.kit.predictions import Predictions, check_class_order, read_real_labels
from remanence.kit.progress import say
from remanence.kit.run import run_folder
from remanence.learn.fixres import (
    SCOPES,
    Candidate,
    MultiResolution,
    apparent_size_ratio,
    choose,
    equalising_test_size,
    find_head,
    fixed_input_size,
    measure_cost,
    set_input_size_,
    total_stride,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy.typing as npt


@dataclass(frozen=True)
class Fixed:
    """What `fixres` leaves behind.

    Attributes:
        out: Run folder; the chosen network lies in `out / "model"`.
        size: Its test size, pixels.
        scope: What was adapted.
        results: The figures of `results.json`.
        correct: For each of its candidates, whether each reported image is predicted right, (N,).
    """

    out: Path
    size: int
    scope: str
    results: dict[str, Any]
    correct: list[npt.NDArray[np.bool_]]


def fixres(
    data: str,
    *,
    model: list[str | nn.Module],
    out: Path,
    sizes: list[int] | None = None,
    tune_sizes: list[int] | None = None,
    scope: list[str] | None = None,
    crop_pct: list[float] | None = None,
    train_size: int | None = None,
    train_scale: tuple[float, float] = (0.08, 1.0),
    epochs: int = 3,
    lr: float = 0.01,
    batch_size: int = 64,
    weight_decay: float = 1e-4,
    smoothing: float = 0.0,
    ema: float | None = None,
    flip: float = 0.5,
    shift: bool = True,
    jitter: float = 0.05,
    statistics_images: int = 2048,
    budget_gmacs: float | None = None,
    budget_ms: float | None = None,
    fuse: str | None = None,
    real: Path | None = None,
    also: list[str] | None = None,
    paired_with: Path | None = None,
    precision: Precision = "auto",
    devices: int = 1,
    workers: int = 0,
    limit: int | None = None,
    checkpoint_steps: int | None = None,
    skip_broken: bool = False,
    seed: int = 0,
    resume: bool = False,
) -> Fixed:
    """Fix the train-test resolution discrepancy of a trained classifier (arXiv 1906.06423).

    Random resized crops make objects look larger in training than in testing, so a classifier is
    best tested at a larger size than it was trained at, and better still when its last layers are
    tuned there. This measures how large objects look in your images, sweeps test sizes, tunes the
    last layers at some of them, chooses on one set of images, reports on another, and writes the
    chosen network with its test size. Give several models, trained at several sizes, to search
    train size, test size and crop together under a budget.

    Args:
        data: Image source with the images that the network was trained on.
        model: Model folder or hf-hub:OWNER/NAME; may be given several times.
        out: Run folder to create.
        sizes: Test sizes to sweep, pixels; by default multiples of the network's stride.
        tune_sizes: Test sizes to adapt at; by default up to four, from the train size up.
        scope: What to adapt: none, bn_stats, equalize, classifier, released, classifier+last_bn
            (default), head_block, last_stage or full; may be given several times.
        crop_pct: Crops to sweep, as fractions of the resized image; by default the network's own.
        train_size: Train size of a module without a timm configuration.
        train_scale: Area range of the random resized crops in training.
        epochs: Passes over the training images at each size.
        lr: Peak learning rate of the tuning.
        batch_size: Images a step, over all devices.
        weight_decay: Weight decay; biases and norms have none.
        smoothing: Label smoothing; FixEfficientNet (arXiv 2003.08237) tunes with it.
        ema: Decay of the averaged weights, for example 0.999; off if not given.
        flip: Probability of a horizontal flip while tuning.
        shift: Shift the crop at random along the longer side while tuning.
        jitter: Strength of colour jitter while tuning; the scope classifier, whose features are
            computed once, has none.
        statistics_images: Training images for bn_stats and equalize.
        budget_gmacs: Most multiply-adds a prediction may cost, in units of 1e9.
        budget_ms: Longest latency of a prediction, milliseconds.
        fuse: Also evaluate all tuned sizes together: logits, prob or embedding.
        real: Reassessed labels of the evaluation images: a JSON list of lists of class numbers.
        also: Other test sets, as NAME=SOURCE; may be given several times.
        paired_with: predictions.parquet of another network, to compare with on the same images.
        precision: Number format; auto is bf16-mixed on a GPU that has it.
        devices: Devices on this machine; under torchrun the processes it started.
        workers: Image loading processes for evaluation.
        limit: Use only so many images of each split.
        checkpoint_steps: Steps between checkpoints beside the one of each epoch.
        skip_broken: Leave unreadable images out and count them.
        seed: Seed.
        resume: Go on with the interrupted run in OUT.partial.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("out", "resume")}
    scopes = scope or ["classifier+last_bn"]
    elsewhere = _check(scopes, also or [], fuse, options)
    fabric = launch(devices, precision)
    with run_folder(
        out, "learn fixres", options, seed=seed, resume=resume, rank=fabric.global_rank
    ) as run:
        opening: dict[str, Any] = {"skip_broken": skip_broken, "show": fabric.is_global_zero}
        networks = [open_network(m, size=train_size) for m in model]
        train, selection, reported = open_splits(data, limit=limit, **opening)
        if reported is None:
            selection, reported = selection.halves(seed)
        others = {name: open_images(source, **opening) for name, source in elsewhere.items()}
        label_sets = None if real is None else read_real_labels(real)
        peer = None if paired_with is None else Predictions.read(paired_with)
        if peer is not None and sorted(peer.ids) != sorted(reported.ids):
            raise InputError(
                f"--paired-with {paired_with}: its {len(peer.ids)} images are not the "
                f"{len(reported)} that this run reports on; predict the same images"
            )
        for network in networks:
            network.model.to(fabric.device).to(memory_format=torch.channels_last)
            for images in (train, *others.values()):
                _check_classes(network, images)

        geometry = [_geometry(network, train, train_scale, seed) for network in networks]
        swept = [_swept(n, g, sizes) for n, g in zip(networks, geometry, strict=True)]
        tuned = [_tuned(n, s, tune_sizes) for n, s in zip(networks, swept, strict=True)]
        if fuse is not None and (scopes[0] == "none" or len(tuned[0]) < 2):
            raise InputError(
                f"--fuse {fuse}: needs a scope that adapts and two --tune-sizes or more"
            )
        served: dict[Setting, nn.Module] = {}
        for i, network in enumerate(networks):
            crops = dict.fromkeys([network.test.crop_pct, *(crop_pct or [])])
            for size in sorted({*swept[i], *tuned[i]}):
                resized = _at_size(network, size)
                served |= {Setting(i, "none", size, crop): resized for crop in crops}
        recipe = Recipe(
            epochs=epochs,
            lr=lr,
            weight_decay=weight_decay,
            ema=ema,
            seed=seed,
            checkpoint_steps=checkpoint_steps,
        )
        tuning = Tuning(
            recipe, batch_size, smoothing, flip, shift, jitter, statistics_images, workers
        )
        adapt = Adapter(fabric, run, tuning, train)
        for i, network in enumerate(networks):
            for name in scopes:
                for size in tuned[i] if name != "none" else ():
                    setting = Setting(i, name, size, network.test.crop_pct)
                    served[setting] = adapt(network, setting)

        predict = Predictor(fabric, networks, batch_size, workers)
        candidates = _judge(served, networks, predict(served, selection, "select"))
        best = choose(list(candidates.values()), budget_gmacs=budget_gmacs, budget_ms=budget_ms)
        chosen = next(setting for setting, candidate in candidates.items() if candidate is best)
        first = networks[0]
        base = Setting(0, "none", first.train.size, first.test.crop_pct)

        found = predict(served, reported, "report")
        results: dict[str, Any] = {
            "geometry": geometry,
            "activations": predict.activations(
                {s: m for s, m in served.items() if s.network == 0 and s.scope == "none"}, selection
            ),
            "images": len(reported),
            "selection_images": len(selection),
            "skipped": train.skipped + selection.skipped + reported.skipped,
            "candidates": candidate_rows(found, candidates, networks),
            "base": list(found).index(base),
            "chosen": list(found).index(chosen),
            "comparison": compared(found[chosen], found[base]),
        }
        if fuse is not None:
            members = [s for s in served if s.network == 0 and s.scope == scopes[0]]
            bank = {s.size: served[s].state_dict() for s in members}
            fused = MultiResolution(copy.deepcopy(first.model), bank, fuse=fuse).eval()
            predictions = predict.fused(fused, members, reported)
            sizes_fused = [s.size for s in members]
            results["fused"] = {"sizes": sizes_fused, "scope": scopes[0], "fuse": fuse}
            results["fused"] |= compared(predictions, found[base])
            if run.first:
                fused.save(run.path("bank.safetensors"))
        if label_sets is not None:
            pair = {"as trained": found[base], "chosen": found[chosen]}
            results["real"] = reassessed(label_sets, pair)
        for name, images in others.items():
            both = predict({s: served[s] for s in (base, chosen)}, images, name)
            check_class_order(both[base], images.classes)
            results.setdefault("also", {})[name] = compared(both[chosen], both[base])
        if peer is not None:
            results["paired_with"] = compared(found[chosen], found[chosen].aligned(peer))
        if run.first:
            found[base].write(run.path("predictions_base.parquet"))
            found[chosen].write(run.path("predictions.parquet"))
            save_network(_as_chosen(networks, chosen, served[chosen]), run.path("model"))
            run.write_results(results)
            fixres_report.write(run, results)
    correct = [predictions.correct for predictions in found.values()]
    return Fixed(out, chosen.size, chosen.scope, results, correct)


def _check(
    scopes: Iterable[str], also: Iterable[str], fuse: str | None, options: Mapping[str, Any]
) -> dict[str, str]:
    """Refuse what cannot work before anything is opened; return the other test sets by name."""
    check_options(options)
    for name in scopes:
        if name not in SCOPES:
            raise InputError(f"--scope {name}: unknown; choose from {', '.join(SCOPES)}")
    if fuse not in (None, "logits", "prob", "embedding"):
        raise InputError(f"--fuse {fuse}: choose from logits, prob, embedding")
    elsewhere = {}
    for text in also:
        name, equals, source = text.partition("=")
        if not (name and equals and source):
            raise InputError(f"--also {text}: write NAME=SOURCE, for example v2=imagenetv2")
        elsewhere[name] = source
    return elsewhere


def _check_classes(network: Network, images: Images) -> None:
    head = find_head(network.model, None, _blank(network))[1]
    count = getattr(head, "out_features", getattr(head, "out_channels", None))
    if count != len(images.classes):
        raise InputError(
            f"{images.source}: has {len(images.classes)} classes but the head of {network.name} "
            f"has {count} outputs; give the data that the network was trained on"
        )
    same = set(network.classes) == set(images.classes)
    if same and network.classes != images.classes:
        raise InputError(
            f"{images.source}: has the classes of {network.name} in another order; "
            "sort them as the network's label_names"
        )


def _blank(network: Network) -> Tensor:
    side = network.train.size
    return torch.zeros(1, 3, side, side, device=next(network.model.parameters()).device)


def _geometry(
    network: Network, train: Images, scale: tuple[float, float], seed: int
) -> dict[str, Any]:
    """Measure how large objects look in testing, and at which size they look as in training."""
    trained, pre = network.train.size, network.test
    shapes = torch.from_numpy(train.sizes())
    generator = torch.Generator().manual_seed(seed)
    ratio = apparent_size_ratio(
        shapes,
        trained,
        trained,
        scale=scale,
        crop_pct=pre.crop_pct,
        crop_mode=pre.crop_mode,
        generator=generator,
    )
    exact = equalising_test_size(
        trained,
        sizes=shapes,
        scale=scale,
        crop_pct=pre.crop_pct,
        crop_mode=pre.crop_mode,
        generator=generator,
    )
    stride = total_stride(network.model, _blank(network))
    return {
        "train_size": trained,
        "stride": stride,
        "ratio_geometric": ratio.geometric,
        "ratio_arithmetic": ratio.arithmetic,
        "ratio_harmonic": ratio.harmonic,
        "equalising_size": exact,
        "recommended": max(1, round(exact / stride)) * stride,
        "median_short_side": float(shapes.min(dim=1).values.double().median()),
    }


def _swept(network: Network, geometry: dict[str, Any], asked: list[int] | None) -> list[int]:
    """Return the test sizes to sweep, the train size among them."""
    stride, trained = geometry["stride"], network.train.size
    if asked is None:
        multiples = range(-(-2 * trained // 3 // stride) * stride, 2 * trained + 1, stride)
        thinned = np.linspace(0, len(multiples) - 1, min(8, len(multiples))).round().astype(int)
        picked = {multiples[i] for i in thinned} | {trained, geometry["recommended"]}
        return sorted(size for size in picked if size > 0)
    for size in asked:
        if size < stride:
            raise InputError(
                f"--sizes {size}: below the stride of {network.name}, {stride} pixels, so that "
                "nothing is left to pool; choose a larger size"
            )
        if size % stride:
            near = max(1, round(size / stride)) * stride
            say(f"--sizes {size} is no multiple of the stride {stride}: accuracy dips; try {near}")
    return sorted({*asked, trained})


def _tuned(network: Network, swept: list[int], asked: list[int] | None) -> list[int]:
    """Return the test sizes to adapt at: by default up to four of those swept, no smaller ones."""
    if asked is not None:
        return sorted(set(asked))
    trained = network.train.size
    larger = [size for size in swept if trained <= size <= 1.7 * trained]
    return larger[:: max(1, -(-len(larger) // 4))]


def _at_size(network: Network, size: int) -> nn.Module:
    """Return the network itself where it takes any size, else a copy resized to this one."""
    if fixed_input_size(network.model, _blank(network)):
        resized = copy.deepcopy(network.model)
        set_input_size_(resized, size)
        return resized
    set_input_size_(network.model, size)  # refuses what the network cannot take
    return network.model


def _judge(
    served: Mapping[Setting, nn.Module],
    networks: list[Network],
    found: Mapping[Setting, Predictions],
) -> dict[Setting, Candidate]:
    """Put accuracy on the selection images beside cost; adaptation does not change the cost."""
    costs = {}
    for setting, model in served.items():
        key = (setting.network, setting.size)
        if key not in costs:
            costs[key] = measure_cost(model, setting.size)
    return {
        s: Candidate(
            network=s.network,
            train_size=networks[s.network].train.size,
            size=s.size,
            crop_pct=s.crop_pct,
            scope=s.scope,
            cost=costs[s.network, s.size],
            correct=found[s].correct,
        )
        for s in served
    }


def _as_chosen(networks: list[Network], chosen: Setting, model: nn.Module) -> Network:
    """Return the chosen network with its evaluation size, to be written."""
    network = networks[chosen.network]
    test = replace(network.test, size=chosen.size, crop_pct=chosen.crop_pct)
    return replace(network, model=model, test=test)
