"""`remanence compress quantize`: a network in a twentieth of its bytes."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from remanence.compress.network.explain import explain
from remanence.compress.network.layers import find_layers
from remanence.compress.network.pipeline import LayerReport, Target
from remanence.compress.permutation.permute import permute as permute_channels
from remanence.compress.planning.allocate import parse_bytes
from remanence.compress.planning.budget import plan_budget
from remanence.compress.planning.plan import plan
from remanence.compress.planning.recipe import RECIPES
from remanence.compress.planning.size import Size
from remanence.compress.planning.size import size as count_bytes
from remanence.compress.quantizer.rows import Metric
from remanence.compress.storage.export import export_onnx
from remanence.compress.storage.file import inspect_file, load, save
from remanence.errors import InputError
from remanence.jobs.compress.inputs import open_inputs
from remanence.jobs.compress.measured import Measured, answers, compare
from remanence.jobs.compress.quantize_report import Finding, build_report
from remanence.jobs.compress.stages import Settings, control, search, tune
from remanence.jobs.compress.subject import open_subject
from remanence.jobs.options import check_options, model_arguments
from remanence.kit.devices import launch
from remanence.kit.progress import bar, say
from remanence.kit.run import run_folder

FILE = "compressed.safetensors"
FLOAT, OURS, UNTUNED = "float", "compressed", "compressed, not tuned"
PLAIN, PAPER, NOT_TUNED = "plain k-means", "the paper's metric", ", not tuned"


@dataclass(frozen=True)
class Outcome:
    """What `quantize` leaves behind.

    Attributes:
        out: Run folder; the network lies in `out / "compressed.safetensors"`.
        model: The network, as read back from that file.
        size: Its bytes.
        measured: The float network, this one and the controls, on the test samples.
        layers: How each layer was quantised: here, and by the controls' searches.
    """

    out: Path
    model: nn.Module
    size: Size
    measured: tuple[Measured, ...]
    layers: dict[str, list[LayerReport]]


def quantize(
    model: str,
    data: str,
    *,
    out: Path,
    weights: Path | None = None,
    model_arg: list[str] | None = None,
    size: int | None = None,
    recipe: str = "small",
    budget: str | None = None,
    keep: list[str] | None = None,
    metric: Metric = "full",
    target: Target | None = None,
    permute: bool = False,
    calibration: int = 512,
    positions: int = 2**17,
    layer_steps: int = 0,
    finetune_steps: int = 300,
    finetune_lr: float = 0.05,
    scale: tuple[float, float] = (0.35, 1.0),
    flip: float = 0.5,
    batch_size: int = 64,
    controls: bool = True,
    sensitivity: bool = False,
    onnx: bool = False,
    devices: int = 1,
    workers: int | None = None,
    limit: int | None = None,
    skip_broken: bool = False,
    seed: int = 0,
    resume: bool = False,
) -> Outcome:
    """Compress a network by quantising what it outputs, with a few hundred images and no labels.

    Each layer's weights become one byte a block and a small codebook, chosen so that the layer's
    output on the images changes least; then the codewords alone are trained to repeat the float
    network's answers. The folder OUT holds the network in one file, exactly as large as the report
    says, and a report of what was lost, layer by layer, beside plain k-means of the same size.

    Args:
        model: Model folder, hf-hub:OWNER/NAME, an architecture (timm's name, or torchvision:NAME,
            detectors too) together with --weights, or FILE.py:FUNCTION that returns a torch module.
        data: Image source: digits, a folder, .parquet, .tar, a timm dataset; labels are used to
            measure, never to compress. For a network of other inputs, a .npy file of them.
        out: Run folder to create.
        weights: Weights of an architecture, .safetensors or .pth.
        model_arg: Argument of the architecture or FUNCTION as NAME=VALUE; may be given several
            times.
        size: Side of the images, for a module that does not say.
        recipe: small, large (bigger blocks), one of the paper's (resnet18-small, resnet18-large,
            resnet50-small, resnet50-large, resnet50-semisupervised, mask-rcnn), or a JSON file.
        budget: Size of the file, for example 5MiB, or 20x for a twentieth of the float weights;
            blocks and codebooks are then chosen layer by layer.
        keep: Layer, or re:PATTERN, that stays in float; may be given several times.
        metric: How an error of the weights is weighed: all alike (plain), by the second moment of
            the inputs that the paper shares among all blocks (shared), by one for each block
            (block), or by the whole of it, which is the error of the layer's output (full).
        target: teacher aims each layer at the float network's outputs, weights at its weights.
            If not given, teacher; weights for a detector.
        permute: Reorder channels first, so that weights that vary together share a block.
        calibration: Images to calibrate on.
        positions: Most positions of a layer's input that are looked at, over all these images.
        layer_steps: Steps of training after each layer; the paper takes 2500.
        finetune_steps: Steps of training at the end; 0 for none.
        finetune_lr: Its learning rate.
        scale: Smallest and largest area of the random crops to train on.
        flip: Probability to mirror them.
        batch_size: Images a step.
        controls: Compress by plain k-means and by the paper's metric, too, to the same size, for
            comparison; takes about as long again for each.
        sensitivity: Measure each layer's share of the loss, by putting its float weights back.
        onnx: Write the network in ONNX, too, its codes in the graph.
        devices: Devices on this machine; under torchrun the processes it started.
        workers: Image loading processes.
        limit: Use only so many images of each split.
        skip_broken: Leave unreadable images out and count them.
        seed: Seed.
        resume: Go on with the interrupted run in OUT.partial, after its last finished layer.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("out", "resume")}
    check_options(options)
    rules = _recipe(recipe)
    if onnx and importlib.util.find_spec("onnx") is None:  # known before hours are spent
        raise InputError("--onnx needs the onnx package: pip install 'remanence[onnx]'")
    arguments = model_arguments(model_arg or [])
    fabric = launch(devices, "32-true")
    with run_folder(
        out, "compress quantize", options, seed=seed, resume=resume, rank=fabric.global_rank
    ) as run:
        subject = open_subject(model, weights, arguments, size)
        inputs = open_inputs(
            data,
            subject,
            fabric,
            calibration=calibration,
            batch_size=batch_size,
            scale=scale,
            flip=flip,
            skip_broken=skip_broken,
            limit=limit,
            workers=workers,
            seed=seed,
        )
        teacher = subject.model.to(fabric.device).eval()
        settings = Settings(
            positions, layer_steps, finetune_steps, finetune_lr, seed, fabric.is_global_zero
        )
        aim: Target = target or ("weights" if subject.detector else "teacher")
        if subject.detector:  # it gives boxes, and no logits to repeat
            if sensitivity or onnx:
                raise InputError(
                    f"{subject.name}: a detector's output holds no logits and its graph branches; "
                    "leave out --sensitivity and --onnx"
                )
            settings = replace(settings, layer_steps=0, steps=0)
        # Neither names nor paths of the user's: the file is made to be given away.
        extra = {"metric": metric, "target": aim, "seed": seed, **inputs.counts}
        if budget is None:
            layout = plan(teacher, rules, keep=keep or ())
        else:
            most = _budget(budget, teacher)
            with bar("weigh", len(find_layers(teacher)), show=settings.show) as progress:
                layout = plan_budget(
                    teacher,
                    most,
                    inputs.calibration,
                    recipe=rules,
                    keep=keep or (),
                    architecture=subject.architecture,
                    reserve=2 * len(json.dumps(extra)) + 64,
                    seed=seed,
                    on_layer=lambda _name: progress.advance(),
                )
        planned = count_bytes(teacher, layout, architecture=subject.architecture, extra=extra)
        if fabric.is_global_zero:
            say(
                f"{len(layout.layers)} layers to quantise, {len(layout.kept)} stay in float: "
                f"{planned.total:,} bytes, {planned.ratio:.1f} times fewer"
            )
        start, notice = teacher, ""
        if permute:
            blocks = {layer.name: layer.block for layer in layout.layers}
            permuted = permute_channels(teacher, blocks, inputs.example)
            start, notice = permuted.model, permuted.notice

        found = search(start, layout, inputs, settings, metric, aim, run)
        networks: dict[str, nn.Module] = {}
        layers = {OURS: found.report}
        if settings.steps:
            networks[UNTUNED] = copy.deepcopy(found.model)
        curve = tune(found.model, teacher, inputs, settings, "tune")
        rivals: dict[Metric, str] = {"plain": PLAIN, "shared": PAPER} if controls else {}
        for rival, name in rivals.items():
            theirs, tuned = control(teacher, layout, inputs, settings, rival)
            layers[name] = theirs.report
            networks[name] = tuned
            if settings.steps:
                networks[f"{name}{NOT_TUNED}"] = theirs.model
        shares = explain(found.model, teacher, inputs.holdout) if sensitivity else []

        path = run.path(FILE)
        if run.first:
            save(found.model, path, architecture=subject.architecture, extra=extra)
            if onnx:
                export_onnx(found.model, run.path("compressed.onnx"), inputs.example[:1])
        fabric.barrier()
        written = inspect_file(path).size
        # What is measured is what was written.
        back = load(path, copy.deepcopy(teacher))
        fabric.barrier()  # every process has read it before the first renames the folder
        reference = answers(teacher, subject, inputs, fabric, "test, float")
        measured = [compare(FLOAT, 4 * _weights(teacher), reference, reference)]
        for name, network in {OURS: back, **networks}.items():
            said = answers(network, subject, inputs, fabric, f"test, {name}")
            measured.append(compare(name, written.total, said, reference))
        if run.first:
            finding = Finding(
                subject,
                inputs,
                layout,
                found,
                written,
                tuple(measured),
                curve,
                tuple(shares),
                notice,
            )
            run.write_results(finding.results())
            report = build_report(finding, count_bytes(teacher, layout, "paper").total)
            report.section("Run")
            report.facts(run.summary())
            report.write(run.path("report.html"))
    return Outcome(out, back, written, tuple(measured), layers)


def _recipe(given: str) -> str | Mapping[str, Any]:
    if given in RECIPES:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise InputError(
            f"--recipe {given}: neither a recipe nor a file; give a JSON file, or one of "
            f"{', '.join(RECIPES)}"
        )
    try:
        rules = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(rules, dict):
        raise InputError(f'{path}: give an object, for example {{"base": "small"}}')
    return rules


def _budget(given: str, model: nn.Module) -> int:
    times = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*x\s*", given)
    if times is None:
        try:
            return parse_bytes(given)
        except InputError:
            pass
    elif float(times[1]) > 1:
        return int(4 * _weights(model) / float(times[1]))
    raise InputError(f"--budget {given}: give a size such as 5MiB or 300kB, or 20x for a twentieth")


def _weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
