"""`remanence audit membership`: was this sample in the training set (arXiv 1908.11229)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remanence.audit.evidence import Evidence
from remanence.audit.membership import References, power_statement
from remanence.errors import InputError
from remanence.jobs.audit import membership_report
from remanence.jobs.audit.membership_attacks import (
    Given,
    WhiteBox,
    check_attacks,
    check_samples,
    score_attacks,
    usual_attacks,
)
from remanence.jobs.audit.membership_evidence import (
    count_units,
    declared,
    evidence_of,
    measure,
)
from remanence.jobs.audit.membership_references import (
    ReferenceRecipe,
    pool_signals,
    read_references,
    reused,
    trained,
)
from remanence.jobs.audit.membership_results import (
    about_references,
    per_sample,
    results_of,
    write_scores,
)
from remanence.jobs.audit.membership_samples import (
    exchangeable,
    open_array_samples,
    open_image_samples,
    read_groups,
)
from remanence.jobs.audit.outputs import is_array
from remanence.jobs.options import check_options
from remanence.kit.devices import Precision, launch
from remanence.kit.models import open_network
from remanence.kit.progress import say
from remanence.kit.run import run_folder

FPRS = (1e-3, 1e-2, 1e-1)


@dataclass(frozen=True, eq=False)
class Audited:
    """What `membership` leaves behind; members first, then non-members, N samples.

    Attributes:
        out: Run folder.
        evidence: Of the primary attack.
        member: (N,) True for members.
        scores: (N,) of each attack, higher = more member-like; NaN for samples that the quantile
            attack was fitted on.
        posterior: (N,) P(member); NaN where it could not be calibrated.
        results: What `results.json` holds.
    """

    out: Path
    evidence: Evidence
    member: NDArray[np.bool_]
    scores: dict[str, NDArray[np.float64]]
    posterior: NDArray[np.float64]
    results: dict[str, Any]


def membership(
    *,
    members: str,
    nonmembers: str,
    out: Path,
    model: str | None = None,
    attack: list[str] | None = None,
    references: int | None = None,
    reference_epochs: int = 30,
    reference_batch_size: int = 64,
    reference_lr: float = 0.05,
    reference_weight_decay: float = 5e-4,
    reference_together: int | None = None,
    flip: float = 0.0,
    shift: int = 0,
    reference_pool: Path | None = None,
    reference_logits: Path | None = None,
    reference_members: Path | None = None,
    member_labels: Path | None = None,
    nonmember_labels: Path | None = None,
    probabilities: bool = False,
    unlabelled: bool = False,
    member_groups: Path | None = None,
    nonmember_groups: Path | None = None,
    pretrained: str | None = None,
    level: float = 0.05,
    fpr: list[float] | None = None,
    prior: float = 0.5,
    precision: Precision = "32-true",
    devices: int = 1,
    workers: int = 0,
    limit: int | None = None,
    skip_broken: bool = False,
    seed: int = 0,
    resume: bool = False,
) -> Audited:
    """Ask whether a model was trained on samples, and how well its outputs tell.

    Compares samples that may have been trained on (members) with samples of the same source that
    were not (non-members). The first attack decides, by a rank test at a level fixed beforehand;
    the others are explored. The folder OUT holds the evidence, scores of every sample and a report.

    Args:
        members: Image source, or .npy logits (N, classes) of the audited model.
        nonmembers: Image source, or .npy logits, of the same kind.
        out: Run folder to create.
        model: Folder of the audited model in timm's hub layout; not with .npy logits.
        attack: Attack to run; may be given several times, and the first one decides: malt, mast,
            lira, rmia, bavaria, zero-one, matt, quantile, iha and more. By default mast and others
            with references, malt and zero-one without.
        references: Train so many reference models on random halves of all samples, an even number
            such as 16.
        reference_epochs: Passes of each reference over its half.
        reference_batch_size: Images a step and reference.
        reference_lr: Peak learning rate of the references; iha takes it for the audited model's.
        reference_weight_decay: Weight decay of the references; likewise.
        reference_together: At most so many references at once, where memory is short.
        flip: Probability of a horizontal flip in training references.
        shift: Largest random shift in training references, pixels.
        reference_pool: Run folder of an audit of the same samples, whose references are used again.
        reference_logits: .npy logits (K, samples, classes) of your own references, members first.
        reference_members: .npy Booleans (K, samples), True where it was trained on the sample.
        member_labels: .npy classes of .npy members.
        nonmember_labels: .npy classes of .npy non-members.
        probabilities: The .npy files hold probabilities, not logits.
        unlabelled: Ignore the images' labels: the predicted class takes their place.
        member_groups: .npy name of the person, patient or document of each member: groups are then
            counted, not samples.
        nonmember_groups: .npy name of the group of each non-member.
        pretrained: Folder of the checkpoint that the model was fine-tuned from; adds the attack
            matt.
        level: Significance level, fixed before the data are seen.
        fpr: False positive rate to report the true positive rate at; may be given several times.
            By default 0.001, 0.01 and 0.1.
        prior: Share of members that the posterior of a sample assumes.
        precision: Number format; 16 bits blur the scores.
        devices: Devices on this machine; under torchrun the processes it started.
        workers: Image loading processes.
        limit: Use only so many images of each side.
        skip_broken: Leave unreadable images out and count them.
        seed: Seed.
        resume: Go on with the interrupted run in OUT.partial.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("out", "resume")}
    given = _check(options)
    fabric = launch(devices, precision)
    with run_folder(
        out, "audit membership", options, seed=seed, resume=resume, rank=fabric.global_rank
    ) as run:
        notes: list[str] = []
        groups = read_groups((member_groups, nonmember_groups))
        if model is None:
            samples = open_array_samples(
                members,
                nonmembers,
                (member_labels, nonmember_labels),
                groups,
                notes,
                probabilities=probabilities,
            )
        else:
            samples = open_image_samples(
                fabric,
                open_network(model),
                members,
                nonmembers,
                groups,
                notes,
                unlabelled=unlabelled,
                limit=limit,
                skip_broken=skip_broken,
                workers=workers,
            )
        before = None if pretrained is None else open_network(pretrained)
        check_samples(attack or (), samples, before)
        checks = exchangeable(samples, level, seed)
        own = references is not None or reference_pool is not None
        white = {"matt", "iha"}.intersection(attack or ()) or pretrained is not None
        views = samples.pixels() if own or white else None
        found: References | None = None
        how = ""
        if reference_logits is not None and reference_members is not None:
            found = read_references(
                reference_logits, reference_members, samples, notes, probabilities=probabilities
            )
            how = f"read from {reference_logits}"
        elif views is not None and own:
            if reference_pool is not None:
                pool, how = reused(fabric, samples, reference_pool), f"trained in {reference_pool}"
            else:
                recipe = ReferenceRecipe(
                    count=references or 0,
                    epochs=reference_epochs,
                    batch_size=reference_batch_size,
                    lr=reference_lr,
                    weight_decay=reference_weight_decay,
                    flip=flip,
                    shift=shift,
                    together=reference_together,
                    seed=seed,
                )
                pool = trained(run, fabric, samples, views, recipe)
                how = f"trained here for {reference_epochs} epochs"
            found = pool_signals(fabric, samples, pool, views)
        attacks = list(attack or usual_attacks(given, found))
        if pretrained is not None and "matt" not in attacks:
            attacks.append("matt")
        box = WhiteBox(
            views,
            before,
            reference_lr,
            reference_weight_decay,
            seed,
        )
        scores, evaluated = score_attacks(attacks, samples, found, box, notes)
        units = count_units(samples, evaluated)
        measured = [
            measure(
                name,
                values,
                units,
                found,
                notes,
                fprs=sorted(fpr or FPRS),
                prior=prior,
                seed=seed,
            )
            for name, values in scores.items()
        ]
        primary = measured[0]
        n, k = int(units.member.sum()), int((~units.member).sum())
        power = power_statement(n, k, sorted(fpr or FPRS), level=level)
        assumed = (*declared(samples, primary), *checks)
        evidence = evidence_of(primary, samples, units, level, assumed)
        explored = [evidence_of(one, samples, units, level) for one in measured[1:]]
        results = results_of(
            samples,
            options,
            None if found is None else about_references(found, how, samples, notes),
            [evidence, *explored],
            measured,
            units,
            power,
            notes,
        )
        posterior = per_sample(samples, units, primary.posterior)
        if run.first:
            write_scores(run, samples, scores, posterior)
            run.write_results(results)
            for note in notes:
                say(f"note: {note}")
            names = samples.ids if units.groups is None else tuple(np.unique(units.groups))
            names = names if units.groups is not None else tuple(names[i] for i in units.rows)
            membership_report.write(run, results, evidence, explored, measured, units, power, names)
    return Audited(out, evidence, samples.member, scores, posterior, results)


def _check(options: Mapping[str, Any]) -> Given:
    """Refuse options that cannot work, before anything is opened."""
    check_options(options)
    for rate in options["fpr"] or ():
        if not 0 < rate < 1:
            raise InputError(f"--fpr {rate:g}: give a rate between 0 and 1, such as 0.01")
    arrays = [is_array(options[side]) for side in ("members", "nonmembers")]
    if any(arrays) and not all(arrays):
        raise InputError("--members, --nonmembers: give two .npy files or two image sources")
    if arrays[0]:
        for name in ("model", "references", "reference_pool", "pretrained", "limit"):
            if options[name] is not None:
                raise InputError(f"--{name.replace('_', '-')}: has no use with .npy logits")
        if options["unlabelled"]:
            raise InputError("--unlabelled: is for images; leave out the label files instead")
    else:
        if options["model"] is None:
            raise InputError(
                "--model: give the audited model's folder, or .npy logits as --members and "
                "--nonmembers"
            )
        for name in ("member_labels", "nonmember_labels"):
            if options[name] is not None:
                raise InputError(f"--{name.replace('_', '-')}: images have their own labels")
        if options["probabilities"]:
            raise InputError("--probabilities: is for .npy files; a model gives logits")
        own = options["references"], options["reference_pool"]
        if options["unlabelled"] and own != (None, None):
            raise InputError("--unlabelled: references are trained with labels; leave one out")
    for first, second in (
        ("member_labels", "nonmember_labels"),
        ("member_groups", "nonmember_groups"),
        ("reference_logits", "reference_members"),
    ):
        if (options[first] is None) != (options[second] is None):
            flags = [f"--{name.replace('_', '-')}" for name in (first, second)]
            raise InputError(f"{flags[0]}, {flags[1]}: give both or none")
    count, sources = options["references"], ("references", "reference_pool", "reference_logits")
    several = [f"--{name.replace('_', '-')}" for name in sources if options[name] is not None]
    if len(several) > 1:
        raise InputError(f"{' and '.join(several)}: give one of them")
    if count is not None and count % 2:
        raise InputError(f"--references {count}: give an even number, so that halves are equal")
    given = Given(
        references=bool(several),
        labels=not options["unlabelled"]
        and (not arrays[0] or options["member_labels"] is not None),
        images=not arrays[0],
        pretrained=options["pretrained"] is not None,
    )
    check_attacks(options["attack"] or (), given)
    return given
