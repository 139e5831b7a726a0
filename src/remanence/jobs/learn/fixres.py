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
from remanence.kit.batches import AugmentedImages, Batches, CachedViews
from remanence.kit.devices import Precision, launch
from remanence.kit.evaluate import Normalise, evaluate
from remanence.kit.fit import Recipe, fit
from remanence.kit.images import Images, open_images, open_splits
from remanence.kit.models import Network, open_network, save_network
from remanence.kit.predictions import (
    Predictions,
    check_class_order,
    read_real_labels,
    real_accuracy,
)
from remanence.kit.progress import say
from remanence.kit.run import RunFolder, run_folder
from remanence.kit.statistics import mcnemar, paired_bootstrap, proportion_interval
from remanence.learn.fixres import (
    SCOPES,
    Adaptation,
    Candidate,
    Cost,
    EvalTransform,
    FinetuneTransform,
    MultiResolution,
    apparent_size_ratio,
    check_batch,
    choose,
    equalising_test_size,
    find_head,
    fit_equalizer,
    fixed_input_size,
    fold_into_head_,
    forward_embedding,
    hash_state,
    measure_cost,
    pareto,
    recalibrate_bn_,
    set_input_size_,
    total_stride,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lightning_fabric import Fabric

    from remanence.kit.batches import Batch


@dataclass(frozen=True)
class Fixed:
    """What `fixres` leaves behind.

    Attributes:
        out: Run folder; the chosen network lies in `out / "model"`.
        size: Its test size, pixels.
        scope: What was adapted.
        results: The figures of `results.json`.
    """

    out: Path
    size: int
    scope: str
    results: dict[str, Any]


@dataclass(frozen=True)
class _Setting:
    """A way to serve one of the networks: what `Candidate` judges."""

    network: int
    scope: str
    size: int
    crop_pct: float


@dataclass
class _Session:
    """What every step of the job needs."""

    fabric: Fabric
    run: RunFolder
    networks: list[Network]
    train: Images
    recipe: Recipe
    batch_size: int
    smoothing: float
    flip: float
    shift: bool
    jitter: float
    statistics_images: int
    workers: int


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
    extra = _check(scopes, epochs=epochs, batch_size=batch_size, lr=lr, also=also or [], fuse=fuse)
    fabric = launch(devices, precision)
    with run_folder(
        out, "learn fixres", options, seed=seed, resume=resume, rank=fabric.global_rank
    ) as run:
        show = fabric.is_global_zero
        networks = [open_network(m, size=train_size) for m in model]
        train, selection, held_out = open_splits(
            data, skip_broken=skip_broken, limit=limit, show=show
        )
        if held_out is None:
            selection, held_out = selection.halves(seed)
        others = {name: open_images(source, show=show) for name, source in extra.items()}
        for network in networks:
            for images in (train, *others.values()):
                _check_classes(network, images)
        recipe = Recipe(
            epochs=epochs,
            lr=lr,
            weight_decay=weight_decay,
            ema=ema,
            seed=seed,
            checkpoint_steps=checkpoint_steps,
        )
        session = _Session(
            fabric,
            run,
            networks,
            train,
            recipe,
            batch_size,
            smoothing,
            flip,
            shift,
            jitter,
            statistics_images,
            workers,
        )
        for network in networks:
            network.model.to(fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks (device, memory_format)

        geometry = [_geometry(network, train, train_scale, seed) for network in networks]
        swept = [
            _swept_sizes(n, sizes, g["recommended"]) for n, g in zip(networks, geometry, strict=True)
        ]
        tuned_sizes = [
            _tuned_sizes(n, tune_sizes, s) for n, s in zip(networks, swept, strict=True)
        ]
        settings = [
            _Setting(i, "none", size, pct)
            for i, network in enumerate(networks)
            for size in sorted({*swept[i], *tuned_sizes[i]})
            for pct in dict.fromkeys([network.test.crop_pct, *(crop_pct or [])])
        ]
        adapted: dict[_Setting, nn.Module] = {}
        for i, network in enumerate(networks):
            for name in scopes:
                for size in tuned_sizes[i] if name != "none" else ():
                    setting = _Setting(i, name, size, network.test.crop_pct)
                    adapted[setting] = _adapt(session, network, setting)
        settings += list(adapted)

        served = {s: adapted.get(s) or _at_size(networks[s.network], s.size) for s in settings}
        costs = {(s.network, s.size): Cost(0.0, 0.0, 0.0) for s in settings}
        for key in costs:
            setting = next(s for s in settings if (s.network, s.size) == key)
            costs[key] = measure_cost(served[setting], setting.size)
        chosen_on = _predict(session, served, selection, "select")
        candidates = {
            s: Candidate(
                s.network,
                networks[s.network].train.size,
                s.size,
                s.crop_pct,
                s.scope,
                costs[s.network, s.size],
                chosen_on[s].correct,
            )
            for s in settings
        }
        best = choose(
            list(candidates.values()), budget_gmacs=budget_gmacs, budget_ms=budget_ms
        )
        choice = next(s for s, c in candidates.items() if c is best)
        first = networks[0]
        base = _Setting(0, "none", first.train.size, first.test.crop_pct)

        found = _predict(session, served, held_out, "report")
        results = _results(found, candidates, base, choice, networks, geometry, selection)
        results["skipped"] = train.skipped + selection.skipped + held_out.skipped
        front = pareto(list(candidates.values()))
        results["pareto"] = [list(candidates.values()).index(c) for c in front]
        if fuse is not None:
            results["fused"] = _fused(session, adapted, served, held_out, fuse, found[base])
        if real is not None:
            results["real"] = _real(real, {"base": found[base], "chosen": found[choice]})
        for name, images in others.items():
            pair = _predict(session, {s: served[s] for s in (base, choice)}, images, name)
            check_class_order(pair[base], images.classes)
            results.setdefault("also", {})[name] = _compared(pair[choice], pair[base])
        if paired_with is not None:
            other = Predictions.read(paired_with)
            results["paired_with"] = _compared(found[choice], found[choice].aligned(other))
        if run.first:
            found[base].write(run.path("predictions_base.parquet"))
            found[choice].write(run.path("predictions.parquet"))
            _save(run, networks[choice.network], served[choice], choice)
            run.write_results(results)
            fixres_report.write(run, results)
    return Fixed(out, choice.size, choice.scope, results)


def _check(
    scopes: Sequence[str],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    also: Sequence[str],
    fuse: str | None,
) -> dict[str, str]:
    for name in scopes:
        if name not in SCOPES:
            raise InputError(f"--scope {name}: unknown; choose from {', '.join(SCOPES)}")
    if epochs < 1 or batch_size < 1 or lr <= 0:
        raise InputError("--epochs and --batch-size must be at least 1, and --lr positive")
    if fuse not in (None, "logits", "prob", "embedding"):
        raise InputError(f"--fuse {fuse}: choose from logits, prob, embedding")
    extra = {}
    for text in also:
        name, equals, source = text.partition("=")
        if not (name and equals and source):
            raise InputError(f"--also {text}: write NAME=SOURCE, for example v2=imagenetv2")
        extra[name] = source
    return extra


def _check_classes(network: Network, images: Images) -> None:
    _, head = find_head(network.model, None, torch.zeros(1, 3, network.train.size, network.train.size))
    count = getattr(head, "out_features", getattr(head, "out_channels", None))
    if count != len(images.classes):
        raise InputError(
            f"{images.source}: has {len(images.classes)} classes but the head of {network.name} "
            f"has {count} outputs; give the data that the network was trained on"
        )
    if (
        network.classes
        and network.classes != images.classes
        and set(network.classes) == set(images.classes)
    ):
        raise InputError(
            f"{images.source}: has the classes of {network.name} in another order; "
            "sort them as the network's label_names"
        )


def _geometry(
    network: Network, train: Images, scale: tuple[float, float], seed: int
) -> dict[str, Any]:
    pre = network.test
    shapes = torch.from_numpy(train.sizes())
    generator = torch.Generator().manual_seed(seed)
    known = {"scale": scale, "crop_pct": pre.crop_pct, "crop_mode": pre.crop_mode}
    ratio = apparent_size_ratio(
        shapes, network.train.size, network.train.size, **known, generator=generator
    )
    exact = equalising_test_size(network.train.size, sizes=shapes, **known, generator=generator)
    stride = _stride(network)
    return {
        "train_size": network.train.size,
        "stride": stride,
        "ratio_geometric": ratio.geometric,
        "ratio_arithmetic": ratio.arithmetic,
        "ratio_harmonic": ratio.harmonic,
        "equalising_size": exact,
        "recommended": max(1, round(exact / stride)) * stride,
        "median_short_side": float(shapes.min(dim=1).values.double().median()),
    }


def _stride(network: Network) -> int:
    side = network.train.size
    example = torch.zeros(1, 3, side, side, device=next(network.model.parameters()).device)
    return total_stride(network.model, example)


def _swept_sizes(network: Network, asked: list[int] | None, recommended: int) -> list[int]:
    stride, trained = _stride(network), network.train.size
    if asked is None:
        multiples = range(-(-2 * trained // 3 // stride) * stride, 2 * trained + 1, stride)
        thinned = np.linspace(0, len(multiples) - 1, min(8, len(multiples))).round().astype(int)
        picked = {multiples[i] for i in thinned} | {trained, recommended}
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


def _tuned_sizes(network: Network, asked: list[int] | None, swept: list[int]) -> list[int]:
    if asked is not None:
        return sorted(set(asked))
    trained = network.train.size
    larger = [size for size in swept if trained <= size <= 1.7 * trained]
    return larger[:: max(1, -(-len(larger) // 4))]


def _at_size(network: Network, size: int) -> nn.Module:
    device = next(network.model.parameters()).device
    trained = network.train.size
    if not fixed_input_size(network.model, torch.zeros(1, 3, trained, trained, device=device)):
        set_input_size_(network.model, size)  # refuses what the network cannot take
        return network.model
    resized = copy.deepcopy(network.model)
    set_input_size_(resized, size)
    return resized


def _transform(network: Network, setting: _Setting) -> EvalTransform:
    pre = network.test
    return EvalTransform(setting.size, setting.crop_pct, pre.crop_mode, pre.interpolation)  # type: ignore[arg-type]  # checked by EvalTransform


def _predict(
    session: _Session, served: dict[_Setting, nn.Module], images: Images, what: str
) -> dict[_Setting, Predictions]:
    """Predict every image in every setting, decoding it once."""

    def function(setting: _Setting) -> Callable[[Tensor], Tensor]:
        pre = session.networks[setting.network].test
        model, normalise = served[setting].eval(), Normalise(pre.mean, pre.std)
        return lambda x: model(normalise(x))

    logits = evaluate(
        session.fabric,
        {s: function(s) for s in served},
        {s: _transform(session.networks[s.network], s) for s in served},
        images,
        batch_size=session.batch_size,
        workers=session.workers,
        what=what,
    )
    labels = torch.from_numpy(images.labels)
    return {s: Predictions.from_logits(list(images.ids), labels, logits[s]) for s in served}


def _adapt(session: _Session, network: Network, setting: _Setting) -> nn.Module:
    """Return a copy of a network with one scope adapted to one size."""
    fabric, size = session.fabric, setting.size
    model = copy.deepcopy(network.model)
    set_input_size_(model, size)
    example = torch.zeros(1, 3, size, size, device=fabric.device)
    before = hash_state(model)
    adaptation = Adaptation(model, setting.scope, example, len(session.train.classes))
    normalise = Normalise(network.test.mean, network.test.std)
    stage = f"{setting.scope}@{size}" + (f"#{setting.network}" if setting.network else "")
    if setting.scope == "bn_stats":
        views = _statistics_views(session, network, setting, normalise)
        recalibrate_bn_(
            model, views, reduce=lambda t: session.fabric.all_reduce(t, reduce_op="sum")
        )
    elif setting.scope == "equalize":
        images = _spread(session.train, session.statistics_images)
        head = {"train": find_head(network.model, None, example)[1], "test": _head(adaptation)}
        models = {"train": network.model, "test": model}
        at_train = replace(setting, size=network.train.size)
        z = evaluate(
            fabric,
            {k: lambda x, k=k: forward_embedding(models[k], normalise(x), head[k]) for k in head},  # type: ignore[misc]  # mypy cannot type a default in a lambda
            {"train": _transform(network, at_train), "test": _transform(network, setting)},
            images,
            what=stage,
        )
        fold_into_head_(_head(adaptation), fit_equalizer(z["train"], z["test"]))
    elif setting.scope == "classifier":
        _tune_head(session, network, setting, adaptation, normalise, stage)
    else:
        if adaptation.cells is not None:
            check_batch(session.batch_size // fabric.world_size, adaptation.cells)
        transform = FinetuneTransform(
            size,
            setting.crop_pct,
            network.test.crop_mode,  # type: ignore[arg-type]  # checked by FinetuneTransform
            network.test.interpolation,
            shift=session.shift,
            hflip=session.flip,
            jitter=session.jitter,
        )
        batches = Batches(
            AugmentedImages(session.train, transform, session.recipe.seed),
            session.batch_size,
            seed=session.recipe.seed,
            rank=fabric.global_rank,
            world=fabric.world_size,
        )

        def loss(tuned: nn.Module, batch: Batch) -> Tensor:
            logits = tuned(normalise(batch.inputs)).float()
            return nn.functional.cross_entropy(
                logits, batch.labels, label_smoothing=session.smoothing
            )

        tuned = fit(fabric, adaptation, batches, session.recipe, loss, run=session.run, stage=stage)
        assert isinstance(tuned, Adaptation)
        adaptation = tuned
    adaptation.check(before)
    return adaptation.model.eval()


def _head(adaptation: Adaptation) -> nn.Module:
    return adaptation.model.get_submodule(adaptation.head)


def _tune_head(
    session: _Session,
    network: Network,
    setting: _Setting,
    adaptation: Adaptation,
    normalise: Normalise,
    stage: str,
) -> None:
    """Train the head on features that are computed once: nothing before it moves."""
    fabric, head = session.fabric, _head(adaptation)
    pre = network.test
    views = FinetuneTransform(
        setting.size,
        setting.crop_pct,
        pre.crop_mode,  # type: ignore[arg-type]  # checked by FinetuneTransform
        pre.interpolation,
        shift=session.shift,
        hflip=session.flip,
        jitter=0.0,
    ).variants(3)

    def embed(x: Tensor) -> Tensor:
        return forward_embedding(adaptation.model, normalise(x), head)

    adaptation.eval()
    features = evaluate(
        fabric,
        dict.fromkeys(range(len(views)), embed),
        dict(enumerate(views)),
        session.train,
        batch_size=session.batch_size,
        workers=session.workers,
        what=f"features {stage}",
    )
    batches = CachedViews(
        torch.stack([features[v] for v in range(len(views))]),
        torch.from_numpy(session.train.labels),
        session.batch_size,
        seed=session.recipe.seed,
        rank=fabric.global_rank,
        world=fabric.world_size,
    )
    pointwise = isinstance(head, nn.Conv2d)

    def loss(tuned: nn.Module, batch: Batch) -> Tensor:
        z = batch.inputs[:, :, None, None] if pointwise else batch.inputs
        return nn.functional.cross_entropy(
            tuned(z).flatten(1), batch.labels, label_smoothing=session.smoothing
        )

    tuned = fit(
        fabric, copy.deepcopy(head), batches, session.recipe, loss, run=session.run, stage=stage
    )
    head.load_state_dict(tuned.state_dict())


def _statistics_views(
    session: _Session, network: Network, setting: _Setting, normalise: Normalise
) -> _Views:
    fabric = session.fabric
    images = _spread(session.train, session.statistics_images)
    mine = images.subset(np.arange(fabric.global_rank, len(images), fabric.world_size))
    return _Views(mine, _transform(network, setting), normalise, fabric, session.batch_size)


@dataclass(frozen=True)
class _Views:
    """Normalised test views of some images, batch by batch, as often as they are asked for."""

    images: Images
    transform: EvalTransform
    normalise: Normalise
    fabric: Fabric
    batch_size: int

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.images), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(self.images)))
            views = torch.stack([self.transform(self.images.image(row)) for row in rows])
            yield self.normalise(self.fabric.to_device(views))


def _spread(images: Images, count: int) -> Images:
    """Pick up to `count` images at random (seed 0)."""
    if len(images) <= count:
        return images
    return images.subset(np.sort(np.random.default_rng(0).permutation(len(images))[:count]))


def _compared(a: Predictions, b: Predictions) -> dict[str, Any]:
    """Compare predictions of the same images: accuracies, McNemar's test, paired bootstrap."""
    test = mcnemar(a.correct, b.correct)
    _, low, high = paired_bootstrap(a.correct.astype(float), b.correct.astype(float))
    return {
        "images": len(a.ids),
        "accuracy": a.accuracy,
        "accuracy_base": b.accuracy,
        "difference": test.difference,
        "difference_interval_95": list(test.interval),
        "difference_bootstrap_95": [low, high],
        "only_this_right": test.b,
        "only_base_right": test.c,
        "mcnemar_p": test.p_value,
    }


def _results(
    found: dict[_Setting, Predictions],
    candidates: dict[_Setting, Candidate],
    base: _Setting,
    choice: _Setting,
    networks: list[Network],
    geometry: list[dict[str, Any]],
    selection: Images,
) -> dict[str, Any]:
    rows = []
    for setting, predictions in found.items():
        hits = int(predictions.correct.sum())
        candidate = candidates[setting]
        rows.append(
            {
                "network": networks[setting.network].name,
                "train_size": networks[setting.network].train.size,
                "size": setting.size,
                "crop_pct": setting.crop_pct,
                "scope": setting.scope,
                "accuracy": predictions.accuracy,
                "interval_95": list(proportion_interval(hits, len(predictions.ids))),
                "accuracy_selection": candidate.accuracy,
                "calibration_error": predictions.calibration_error(),
                "gmacs": candidate.cost.gmacs,
                "latency_ms": candidate.cost.latency_ms,
                "activation_mib": candidate.cost.activation_mib,
            }
        )
    order = list(found)
    return {
        "geometry": geometry,
        "images": len(found[base].ids),
        "selection_images": len(selection),
        "candidates": rows,
        "base": order.index(base),
        "chosen": order.index(choice),
        "comparison": _compared(found[choice], found[base]),
    }


def _fused(
    session: _Session,
    adapted: dict[_Setting, nn.Module],
    served: dict[_Setting, nn.Module],
    images: Images,
    fuse: str,
    base: Predictions,
) -> dict[str, Any]:
    """Evaluate all tuned sizes of the first network together, and write the bank."""
    first = [s for s in adapted if s.network == 0]
    scope = first[0].scope if first else ""
    members = [s for s in first if s.scope == scope]
    if len(members) < 2:
        raise InputError(f"--fuse {fuse}: needs at least two --tune-sizes")
    network = session.networks[0]
    bank = {s.size: served[s].state_dict() for s in members}
    together = MultiResolution(copy.deepcopy(network.model), bank, fuse=fuse).eval()  # type: ignore[arg-type]  # checked at the start
    transforms = [_transform(network, s) for s in members]
    normalise = Normalise(network.test.mean, network.test.std)
    lengths = [3 * s.size**2 for s in members]

    def forward(packed: Tensor) -> Tensor:
        views = packed.split(lengths, dim=1)
        return together(  # type: ignore[no-any-return]  # nn.Module returns Any
            {
                s.size: normalise(view.reshape(-1, 3, s.size, s.size))
                for s, view in zip(members, views, strict=True)
            }
        )

    logits = evaluate(
        session.fabric,
        {0: forward},
        {0: lambda image: torch.cat([t(image).flatten() for t in transforms])},
        images,
        batch_size=session.batch_size,
        what="fuse",
    )[0]
    fused = Predictions.from_logits(list(images.ids), torch.from_numpy(images.labels), logits)
    if session.run.first:
        together.save(session.run.path("bank.safetensors"))
    return {
        "sizes": [s.size for s in members],
        "scope": scope,
        "fuse": fuse,
        **_compared(fused, base),
    }


def _real(path: Path, predictions: dict[str, Predictions]) -> dict[str, Any]:
    sets = read_real_labels(path)
    found: dict[str, Any] = {}
    for name, predicted in predictions.items():
        hits, counted = real_accuracy(predicted, sets)
        found[name] = {
            "accuracy": hits / counted,
            "images": counted,
            "interval_95": list(proportion_interval(hits, counted)),
        }
    return found


def _save(run: RunFolder, network: Network, model: nn.Module, choice: _Setting) -> None:
    test = replace(network.test, size=choice.size, crop_pct=choice.crop_pct)
    arguments = dict(network.arguments)
    if "img_size" in arguments:
        arguments["img_size"] = choice.size
    saved = replace(network, model=model, test=test, arguments=arguments)
    save_network(saved, run.path("model"))
