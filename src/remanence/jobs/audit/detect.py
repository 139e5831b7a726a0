"""`remanence audit detect`: was a network trained on marked images?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remanence.audit import radioactive as ra
from remanence.audit.evidence import Evidence
from remanence.errors import InputError
from remanence.jobs.audit.detect_classes import ClassMap, match, owner_labels
from remanence.jobs.audit.detect_decoys import decoy_losses
from remanence.jobs.audit.detect_owner import Owner, open_owner
from remanence.jobs.audit.detect_report import class_rows, detect_report
from remanence.jobs.audit.detect_suspect import Seen, Suspect, look, open_suspect
from remanence.jobs.audit.mark_manifest import check_published
from remanence.jobs.audit.mark_network import choose_preset, marking_config, open_marker
from remanence.jobs.audit.outputs import is_array
from remanence.jobs.options import check_options
from remanence.kit.devices import launch
from remanence.kit.images import open_images
from remanence.kit.progress import say
from remanence.kit.run import run_folder


@dataclass(frozen=True)
class DetectionRun:
    """What `detect` found.

    Attributes:
        out: Run folder.
        evidence: The test that decides; of the strongest recipient where there are several.
        decoys: The decoy test, where it was asked for.
        results: The figures of `results.json`.
    """

    out: Path
    evidence: Evidence
    decoys: Evidence | None
    results: dict[str, Any]


def detect(
    data: str,
    *,
    suspect: str,
    marker: str,
    out: Path,
    key: Path | None = None,
    public: list[Path] | None = None,
    manifest: list[Path] | None = None,
    marked_data: str | None = None,
    recipient: str | None = None,
    recipients: list[str] | None = None,
    reference: list[str] | None = None,
    classes: str | None = None,
    decoys: int | None = None,
    decoy_images: int = 100,
    calibrate: int = 1000,
    level: float = 0.05,
    ridge: float = 0.0,
    layer: str = "penultimate",
    batch_size: int = 64,
    devices: int = 1,
    limit: int | None = None,
    skip_broken: bool = False,
    seed: int = 0,
) -> DetectionRun:
    """Test whether a network was trained on images that `remanence audit mark` marked.

    The suspect's last layer is compared with the secret carriers, through clean images that align
    it with the marking network. For a network that never saw the marks the p-value is exact,
    whatever the architecture. Outputs alone serve as well as weights.

    Args:
        data: Clean, unmarked images that the networks were not trained on: any image source.
        suspect: Network in question: a model folder, or its logits (or logarithms of
            probabilities) for DATA in DATA's order as a .npy file (N, C).
        marker: The marking network's model folder.
        out: Run folder to create.
        key: The secret key's file.
        public: The published public.json; one of each where there are several recipients.
        manifest: The manifest.parquet; one of each where there are several recipients.
        marked_data: The images as published, to verify the manifest against.
        recipient: Who the marked copy was made for, where no manifest says.
        recipients: NAME=KEYFILE of one recipient; given for each, in place of --key.
        reference: Clean network that never saw the marked images, chosen beforehand: a model
            folder or a .npy file. What the suspect has in common with it is taken out.
        classes: JSON file from the owner's class names to the suspect's, or match to match them
            by its answers; by name if not given.
        decoys: Also run the decoy test with so many decoy sets, at least 1/level - 1.
        decoy_images: Images that are marked with each decoy set.
        calibrate: Random carrier sets on which the test is tried out.
        level: Significance level.
        ridge: Penalty of the alignment, for where there are fewer images than features.
        layer: Module of the marking network whose output was taken as features.
        batch_size: Images marked at once in the decoy test.
        devices: Devices on this machine; under torchrun the processes it started.
        limit: Use only so many images.
        skip_broken: Leave unreadable images out and count them.
        seed: Seed of the calibration and the decoy test.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k != "out"}
    check_options(options)
    _check_decoys(decoys, level, suspect, recipients)
    owner = open_owner(key, recipient, recipients, public, manifest)
    if marked_data is not None and not owner.manifests:
        raise InputError(f"--marked-data {marked_data}: there is no --manifest to compare it with")
    fabric = launch(devices, "32-true")
    with run_folder(out, "audit detect", options, seed=seed, rank=fabric.global_rank) as run:
        show = fabric.is_global_zero
        images = open_images(data, skip_broken=skip_broken, limit=limit, show=show)
        network = open_marker(marker, layer)
        names = owner.classes(images, network)
        owner_labels(images, names)
        sources = [suspect, *(reference or [])]
        opened = [open_suspect(source, len(images), data) for source in sources]
        measured = {"published images compared": "none"}
        if marked_data is not None:
            found = check_published(open_images(marked_data, show=show), owner.manifests)
            measured["published images compared"] = f"pixels as in the manifest; {found:,} marked"
        clean = owner.unmarked(images)
        measured["clean images"] = f"{len(clean):,} of {data}; {images.skipped} unreadable left out"
        measured["marked images left out"] = (
            f"{len(images) - len(clean):,}" if owner.compared else "not known: no manifest"
        )
        images = images.subset(clean)
        opened = [one.subset(clean) for one in opened]
        labels = owner_labels(images, names)

        seen = look(fabric, network, opened[0], opened[1:], images)
        matched = match(classes, names, opened[0].classes, seen.outputs, labels)
        matched = replace(matched, map=np.where(owner.marked_classes(names), matched.map, -1))
        heads, alignment = _heads(opened[0], seen, matched, owner, ridge)
        (access, head), *others = heads.items()
        calibration = ra.calibrate(head, draws=calibrate, seed=seed)

        def test(carriers: NDArray[np.float64]) -> ra.Detection:
            found = ra.detect(head, carriers, level=level)
            checks = (*found.evidence.checks, matched.check, calibration.check)
            return replace(found, evidence=replace(found.evidence, checks=checks))

        results: dict[str, Any] = {}
        if recipients:
            keys = {str(name): one for name, one in owner.keys.items()}
            everyone = ra.recipient_carriers(keys, len(names), network.dim)
            told = ra.detect_recipients(test, everyone)
            results["recipients"] = _recipient_rows(told.detections)
            strongest = min(everyone, key=lambda name: told.detections[name].log10_p)
            carriers, detection = everyone[strongest], told.detections[strongest]
        else:
            ((whose, secret),) = owner.keys.items()
            carriers = ra.carriers(secret, len(names), network.dim, whose)
            detection = test(carriers)
        evidence = detection.evidence
        explored = [
            replace(ra.detect(other, carriers, level=level).evidence, statistic=name)
            for name, other in others
        ]
        decoy_evidence = None
        if decoys is not None:
            # A class that nobody marked, or that the suspect lacks, says nothing.
            rows = np.flatnonzero(matched.map[labels] >= 0)
            rows = np.sort(np.random.default_rng(seed).permutation(rows)[:decoy_images])
            config = owner.config() or marking_config(choose_preset(None, network, images), network)
            losses = decoy_losses(
                fabric,
                network,
                opened[0],
                images.subset(rows),
                labels[rows],
                matched.map[labels[rows]],
                secret,
                num_classes=len(names),
                recipient=whose,
                decoys=decoys,
                config=config,
                batch_size=batch_size,
                seed=seed,
            )
            decoy_evidence = ra.detect_blackbox(
                float(losses[0]), losses[1:], committed=owner.committed, level=level
            ).evidence
            results["decoy_losses"] = losses.tolist()
        if run.first:
            measured |= _measured(access, opened, seen, alignment, matched, labels)
            results = {
                "evidence": evidence.to_dict(),
                "decoys": None if decoy_evidence is None else decoy_evidence.to_dict(),
                "explored": [one.to_dict() for one in explored],
                "per_class": class_rows(detection, names, opened[0].classes, matched.map.tolist()),
                "dim": network.dim,
                "dim_tested": detection.d_eff,
                "mean_cosine": detection.mean_cosine,
                "stouffer_log10_p_approximate": detection.stouffer_log10_p,
                "power": asdict(ra.plan(len(detection.classes), detection.d_eff, p=level)),
                "calibration": {
                    "draws": calibrate,
                    "ks_p": calibration.ks_p,
                    "rejection_rates": calibration.rejection_rates,
                },
                "measured": measured,
                **results,
            }
            run.write_results(results)
            report = detect_report(suspect, evidence, detection, results, explored, decoy_evidence)
            report.facts(run.summary())
            report.write(run.path("report.html"))
            say(evidence.answer)
    return DetectionRun(out, evidence, decoy_evidence, results)


def _check_decoys(
    decoys: int | None, level: float, suspect: str, recipients: Sequence[str] | None
) -> None:
    if decoys is None:
        return
    least = math.ceil(1 / level - 1e-9) - 1
    if decoys < least:
        raise InputError(f"--decoys {decoys}: cannot reach level {level:g}; give at least {least}")
    if is_array(suspect):
        raise InputError("--decoys: marks images for the suspect to answer; give its model folder")
    if recipients:
        raise InputError("--decoys: tests one key; give --key in place of --recipients")


def _heads(
    suspect: Suspect, seen: Seen, matched: ClassMap, owner: Owner, ridge: float
) -> tuple[dict[str, ra.PreparedHead], ra.Alignment | None]:
    """Return heads by what they rest on, the one that decides first, and its alignment."""
    known = ra.Provenance(committed=owner.committed, images_unmarked=owner.compared)
    weight = suspect.weight
    if weight is not None and seen.features is not None:
        alignment = None
        if not seen.same_features:
            alignment = ra.solve_alignment(seen.features, ridge=ridge)
        head = weight.double().cpu() if alignment is None else alignment.align(weight.cpu())
        access, center = "the weights of its last layer", False
    else:
        alignment = ra.solve_alignment(seen.logits, ridge=ridge)
        head, center = alignment.head, alignment.log_probs
        access = "its logits" if not center else "the logarithms of its probabilities"
    reference = [ra.solve_alignment(sums, ridge=ridge).head for sums in seen.references]

    def prepare(head: Any, alignment: Any, reference: Any, *, center: bool) -> ra.PreparedHead:
        return ra.prepare_head(
            head,
            alignment=alignment,
            reference=reference,
            class_map=matched.map,
            center=center,
            provenance=known,
        )

    heads = {access: prepare(head, alignment, reference, center=center)}
    if reference:
        heads["without references"] = prepare(head, alignment, (), center=center)
    if weight is not None and alignment is not None:
        from_logits = ra.solve_alignment(seen.logits, ridge=ridge)
        heads["from its logits instead of its weights"] = prepare(
            from_logits.head, from_logits, reference, center=False
        )
    return heads, alignment


def _recipient_rows(detections: Mapping[str, ra.Detection]) -> list[dict[str, Any]]:
    return [
        {
            "recipient": name,
            "mean_cosine": one.mean_cosine,
            "log10_p": one.log10_p,
            "log10_p_corrected": one.evidence.corrected_log10_p,
            "verdict": one.evidence.verdict,
        }
        for name, one in sorted(detections.items(), key=lambda item: item[1].log10_p)
    ]


def _measured(
    access: str,
    opened: Sequence[Suspect],
    seen: Seen,
    alignment: ra.Alignment | None,
    matched: ClassMap,
    labels: NDArray[np.int64],
) -> dict[str, str]:
    answers = matched.map[labels]
    asked = answers >= 0
    right = (seen.outputs.argmax(dim=1).numpy() == answers)[asked].mean()
    aligned = "not needed: the suspect has the marking network's features"
    if alignment is not None:
        aligned = (
            f"{alignment.rank} of {alignment.dim} directions vary; the marking network's features "
            f"explain {100 * alignment.explained:.1f} % of the suspect's"
        )
    return {
        "suspect": f"{opened[0].source}, by {access}",
        "suspect's accuracy on the clean images": f"{100 * right:.1f} %",
        "alignment": aligned,
        "references": ", ".join(one.source for one in opened[1:]) or "none",
        "classes": matched.check.finding,
    }
