"""The stages of a compression: search layer by layer, resumable, then tuning; and its controls."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from remanence.compress.network.finetune import CurvePoint, finetune
from remanence.compress.network.pipeline import Compressed, FinishedLayer, LayerReport, compress
from remanence.compress.quantised import Quantised
from remanence.compress.quantizer.rows import Metric
from remanence.jobs.compress.inputs import Inputs
from remanence.kit.progress import bar

if TYPE_CHECKING:
    from remanence.compress.network.pipeline import Target
    from remanence.compress.planning.plan import Plan
    from remanence.kit.run import RunFolder


@dataclass(frozen=True)
class Settings:
    """What all searches of a run share.

    Attributes:
        positions: Most positions of a layer's input that are looked at.
        layer_steps: Steps of tuning after each layer.
        steps: Steps of tuning at the end.
        lr: Its learning rate.
        seed: Seed.
        show: Whether this process shows progress.
    """

    positions: int
    layer_steps: int
    steps: int
    lr: float
    seed: int
    show: bool


def search(
    model: nn.Module,
    plan: Plan,
    inputs: Inputs,
    settings: Settings,
    metric: Metric,
    target: Target,
    run: RunFolder,
) -> Compressed:
    """Quantise a network layer by layer; every finished layer is kept for `--resume`."""
    state = run.load_state("layers") or {}
    run.keep_metrics({"quantise": len(state)})
    layouts = {layer.name: layer.layout for layer in plan.layers}
    done = {
        name: FinishedLayer(
            Quantised(
                layouts[name], kept["codes"].long(), kept["codebook"].float(), kept["exponent"]
            ),
            kept["shift"],
            LayerReport(**kept["report"]),
        )
        for name, kept in state.items()
    }
    with bar("quantise", len(plan.layers), done=len(done), show=settings.show) as progress:

        def finished(layer: FinishedLayer) -> None:
            quantised, report = layer.quantised, asdict(layer.report)
            state[layer.report.name] = {
                "codes": quantised.codes.int().cpu(),
                "codebook": quantised.codebook.cpu(),
                "exponent": quantised.exponent,
                "shift": layer.shift,
                "report": report,
            }
            # Logged first: a line too many is dropped when the run goes on, one too few is lost.
            run.log(stage="quantise", step=len(state), **report)
            run.save_state("layers", state)
            progress.note(f"{layer.report.name}: output error {layer.report.output_error:.2%}")
            progress.advance()

        return compress(
            model,
            plan,
            inputs.calibration,
            metric=metric,
            target=target,
            positions=settings.positions,
            layer_steps=settings.layer_steps,
            seed=settings.seed,
            on_layer=finished,
            done=done,
        )


def tune(
    model: nn.Module, teacher: nn.Module, inputs: Inputs, settings: Settings, what: str
) -> tuple[CurvePoint, ...]:
    """Train the codewords to repeat the float network's answers; in place."""
    if not settings.steps:
        return ()
    with bar(what, settings.steps, show=settings.show) as progress:

        def stepped(_step: int, loss: float) -> None:
            progress.note(f"KL {loss:.4f}")
            progress.advance()

        return finetune(
            model,
            teacher,
            inputs.tuning(),
            holdout=inputs.holdout,
            steps=settings.steps,
            lr=settings.lr,
            seed=settings.seed,
            on_step=stepped,
        )


def control(
    model: nn.Module, plan: Plan, inputs: Inputs, settings: Settings, metric: Metric
) -> tuple[Compressed, nn.Module]:
    """Quantise as others do, to the same bytes: aimed at the weights, nothing corrected.

    Args:
        model: The float network.
        plan: Blocks and codewords, the same.
        inputs: The data.
        settings: The same.
        metric: `plain`, k-means of the weights; `shared`, the paper's.

    Returns:
        What the search leaves, and the network tuned.
    """
    words: dict[str, str] = {"plain": "plain k-means", "shared": "the paper's metric"}
    what = words[metric]
    with bar(what, len(plan.layers), show=settings.show) as progress:

        def finished(_layer: Any) -> None:
            progress.advance()

        found = compress(
            model,
            plan,
            inputs.calibration,
            metric=metric,
            target="weights",
            bias=False,
            norms="keep",
            positions=settings.positions,
            seed=settings.seed,
            on_layer=finished,
        )
    tuned = copy.deepcopy(found.model)
    tune(tuned, model, inputs, settings, f"tune, {what}")
    return found, tuned
