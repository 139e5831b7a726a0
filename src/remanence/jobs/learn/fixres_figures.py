"""The figures of `remanence learn fixres`: what goes to `results.json`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from remanence.kit.predictions import Predictions, real_accuracy
from remanence.kit.statistics import mcnemar, paired_bootstrap, proportion_interval
from remanence.learn.fixres import pareto

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from remanence.jobs.learn.fixres_adapt import Setting
    from remanence.kit.models import Network
    from remanence.learn.fixres import Candidate


def candidate_rows(
    found: Mapping[Setting, Predictions],
    candidates: Mapping[Setting, Candidate],
    networks: Sequence[Network],
) -> list[dict[str, Any]]:
    """Describe every setting: accuracy on the reported and the selection images, and cost."""
    front = {id(c) for c in pareto(list(candidates.values()))}
    rows = []
    for setting, predictions in found.items():
        candidate = candidates[setting]
        hits = int(predictions.correct.sum())
        rows.append(
            {
                "network": networks[setting.network].name,
                "train_size": candidate.train_size,
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
                "pareto": id(candidate) in front,
            }
        )
    return rows


def compared(this: Predictions, base: Predictions) -> dict[str, Any]:
    """Compare predictions of the same images: accuracies, McNemar's test, paired bootstrap."""
    test = mcnemar(this.correct, base.correct)
    _, low, high = paired_bootstrap(this.correct.astype(float), base.correct.astype(float))
    return {
        "images": len(this.ids),
        "accuracy": this.accuracy,
        "accuracy_base": base.accuracy,
        "difference": test.difference,
        "difference_interval_95": list(test.interval),
        "difference_bootstrap_95": [low, high],
        "only_this_right": test.b,
        "only_base_right": test.c,
        "mcnemar_p": test.p_value,
    }


def reassessed(
    sets: Sequence[Sequence[int]], predictions: Mapping[str, Predictions]
) -> dict[str, Any]:
    """Measure accuracy against reassessed labels: right is any of an image's labels."""
    found: dict[str, Any] = {}
    for name, predicted in predictions.items():
        hits, counted = real_accuracy(predicted, sets)
        found[name] = {
            "accuracy": hits / counted,
            "images": counted,
            "interval_95": list(proportion_interval(hits, counted)),
        }
    return found
