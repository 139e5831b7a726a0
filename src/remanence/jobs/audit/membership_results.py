"""What `remanence audit membership` writes beside its report: results.json, scores.parquet."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from remanence.audit.evidence import Evidence
from remanence.audit.membership import Power, References
from remanence.jobs.audit.membership_attacks import describe_attack
from remanence.jobs.audit.membership_evidence import Measured, Units, grouped_auc
from remanence.jobs.audit.membership_samples import Samples
from remanence.kit.models import Network
from remanence.kit.run import RunFolder

UNLIKE = 0.1  # difference of accuracies that is worth a remark


def results_of(
    samples: Samples,
    options: Mapping[str, Any],
    references: dict[str, Any] | None,
    evidence: Sequence[Evidence],
    measured: Sequence[Measured],
    units: Units,
    power: Power,
    notes: Sequence[str],
) -> dict[str, Any]:
    """Return what `results.json` holds; NaN and infinities become None.

    Args:
        samples: The samples.
        options: The command's options.
        references: What is said of the references, or None.
        evidence: Of every attack, the primary one first.
        measured: Figures of every attack, likewise.
        units: What was counted.
        power: What so many units can show.
        notes: Remarks for the reader.
    """
    primary, n = measured[0], int(units.member.sum())
    found: dict[str, Any] = _plain(
        {
            "verdict": evidence[0].verdict,
            "evidence": evidence[0].to_dict(),
            "exploratory": [one.to_dict() for one in evidence[1:]],
            "samples": _about_samples(samples, options),
            "units": {
                "what": "samples" if units.groups is None else "groups",
                "members": n,
                "nonmembers": len(units) - n,
            },
            "attacks": {one.attack: _figures(one) for one in measured},
            "grouped_auc": grouped_auc(primary, units),
            "classes": _classes(samples, primary),
            "calibration": _calibration(primary, options["prior"]),
            "epsilon": primary.epsilon,
            "power": power,
            "references": references,
            "notes": notes,
        }
    )
    return found


def about_references(
    references: References, how: str, samples: Samples, notes: list[str]
) -> dict[str, Any]:
    """Return what is said of the references: how many, where from, how accurate.

    Args:
        references: The references.
        how: Where they come from.
        samples: The samples.
        notes: Takes up a remark where they are unlike the audited model.
    """
    member, correct = references.member, references.correct
    found: dict[str, Any] = {"count": len(references), "how": how}
    found["trained_on_each_sample"] = [int(member.sum(0).min()), int(member.sum(0).max())]
    for name, use in (("accuracy_in", member), ("accuracy_out", ~member)):
        found[name] = float(correct[use].mean()) if correct is not None and use.any() else None
    audited, likely = _accuracy(samples)["nonmembers"], found["accuracy_out"]
    if samples.labelled and likely is not None and abs(likely - audited) > UNLIKE:
        notes.append(
            f"The references are unlike the audited model: {likely:.1%} of what they were not "
            f"trained on is classified correctly, against {audited:.1%} of the non-members. "
            "Attacks that use them lose power; train them as the model was."
        )
    return found


def per_sample(
    samples: Samples, units: Units, posterior: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """Posterior (N,) of every sample, that of its unit; NaN where there is none."""
    found = np.full(len(samples), np.nan)
    if posterior is not None:
        found[units.rows] = units.spread(posterior)
    return found


def write_scores(
    run: RunFolder,
    samples: Samples,
    scores: Mapping[str, NDArray[np.float64]],
    posterior: NDArray[np.float64],
) -> None:
    """Write `scores.parquet`, one row a sample."""
    signals = samples.signals
    columns: dict[str, Sequence[Any] | NDArray[Any]] = {
        "id": samples.ids,
        "set": np.where(samples.member, "member", "non-member"),
        "label": signals.labels,
        "loss": signals.loss.mean(1),
        "margin": signals.margin.mean(1),
    }
    if samples.groups is not None:
        columns["group"] = samples.groups
    columns |= {**scores, "posterior": posterior}
    table = pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()})
    pq.write_table(table, run.path("scores.parquet"))


def _about_samples(samples: Samples, options: Mapping[str, Any]) -> dict[str, Any]:
    member = samples.member
    skipped = [side.images.skipped if side.images is not None else 0 for side in samples.sides]
    return {
        "model": options["model"] or "outputs of a model",
        "architecture": None if samples.network is None else samples.network.name,
        "members": options["members"],
        "nonmembers": options["nonmembers"],
        "member_count": int(member.sum()),
        "nonmember_count": int((~member).sum()),
        "skipped": sum(skipped),
        "sha256": None if samples.network is None else samples.fingerprint,
        "model_sha256": None if samples.network is None else _hash(samples.network),
        "labels": "true" if samples.labelled else "predicted",
        "accuracy": _accuracy(samples) if samples.labelled else None,
    }


def _accuracy(samples: Samples) -> dict[str, float]:
    right, member = samples.signals.correct.mean(1), samples.member
    return {"members": float(right[member].mean()), "nonmembers": float(right[~member].mean())}


def _hash(network: Network) -> str:
    digest = hashlib.sha256()
    for name, value in network.model.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _figures(one: Measured) -> dict[str, Any]:
    roc = one.roc
    return {
        "source": describe_attack(one.attack),
        "auc": roc.auc,
        "log10_p": one.log10_p,
        "tpr_at_fpr": roc.tpr_at,
        "tnr_at_fnr": roc.tnr_at,
        "threshold_from": one.source,
        "decision": one.transfer,
        "oracle": roc.oracle,
        "ap_member": roc.ap_member,
        "ap_nonmember": roc.ap_nonmember,
    }


def _classes(samples: Samples, primary: Measured) -> list[dict[str, Any]]:
    return [
        {
            "class": samples.class_name(int(row.group)),
            "members": row.n_member,
            "nonmembers": row.n_nonmember,
            "auc": None if row.roc is None else row.roc.auc,
            "tpr_at_fpr": None if row.roc is None else row.roc.tpr_at,
        }
        for row in sorted(primary.roc.groups, key=lambda row: int(row.group))
    ]


def _calibration(primary: Measured, prior: float) -> dict[str, Any]:
    return {
        "fitted_on": primary.source,
        "prior": prior,
        "temperature": [one.temperature for one in primary.calibrators],
        "offset": [one.offset for one in primary.calibrators],
        "reliability": primary.reliability,
    }


def _plain(value: Any) -> Any:
    """Turn results into what JSON can hold: NaN and infinities become None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if hasattr(value, "__dataclass_fields__"):
        return _plain(vars(value))
    return None if isinstance(value, float) and not np.isfinite(value) else value
