"""`remanence audit dejavu`: was this data set, or a part of it, in training?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remanence.audit.dejavu import Test
from remanence.audit.evidence import Evidence
from remanence.jobs.audit.dejavu_found import bet, one, several
from remanence.jobs.audit.dejavu_options import check_combination, hypotheses
from remanence.jobs.audit.dejavu_report import write_report, write_scores
from remanence.jobs.audit.dejavu_scores import Samples, Scorer, check_labels, open_samples
from remanence.jobs.audit.dejavu_sets import Compared, compare, write_duplicates
from remanence.jobs.options import check_options
from remanence.kit.devices import launch
from remanence.kit.models import open_network
from remanence.kit.run import run_folder


@dataclass(frozen=True)
class DejaVu:
    """What `dejavu` leaves behind.

    Attributes:
        out: Run folder.
        evidence: The declared test of each hypothesis; one where no hypotheses were named.
        exploratory: Tests that were looked at besides.
        results: What `results.json` holds.
    """

    out: Path
    evidence: tuple[Evidence, ...]
    exploratory: tuple[Evidence, ...]
    results: dict[str, Any]


def dejavu(
    *,
    out: Path,
    candidate: str | None = None,
    reference: str | None = None,
    model: str | None = None,
    known_members: str | None = None,
    hypothesis: list[str] | None = None,
    candidate_labels: Path | None = None,
    reference_labels: Path | None = None,
    known_labels: Path | None = None,
    test: Test = "ks1",
    explore: list[Test] | None = None,
    level: float = 0.05,
    permutations: int = 2000,
    reference_model: list[str] | None = None,
    restarts: int = 10,
    equivalence: float | None = None,
    stream: int | None = None,
    null_check: int | None = None,
    limit: int | None = None,
    skip_broken: bool = False,
    devices: int = 1,
    workers: int = 0,
    seed: int = 0,
) -> DejaVu:
    """Test whether a network was trained on a data set, or on a part of it.

    Candidates are compared with references: images of the same source that were certainly not in
    training, nor used to choose anything. First the two sets are checked without the network;
    where they differ by themselves, there is no verdict. Declare --test and --level before you
    look at any result. The folder OUT holds the scores, the duplicates and a report.

    Args:
        out: Run folder to create.
        candidate: The data set in question: an image source, or a .npy file of logits (N, C) or of
            confidences or other scores (N,), higher for what looks more trained on.
        reference: Held-out images of the same source, or a .npy file.
        model: Folder of the network; left out with .npy files.
        known_members: Images of the same source that were certainly in training, or a .npy file:
            they tell the leaked fraction and how small a leak can be found.
        hypothesis: NAME=CANDIDATE,REFERENCE in place of --candidate and --reference; may be given
            several times, and the p-values are corrected for it (Holm).
        candidate_labels: .npy file of the candidates' classes, with arrays.
        reference_labels: .npy file of the references' classes, with arrays.
        known_labels: .npy file of the known members' classes, with arrays.
        test: The declared test. ks1: Kolmogorov-Smirnov on the largest confidence, one-sided; ks:
            two-sided; mw: ranks of it; mw_loss: ranks of the label's margin, finds smaller leaks;
            calibrated: the same less what --reference-model says; learned: dataset inference.
        explore: A further test, reported as exploratory; may be given several times.
        level: Significance level.
        permutations: Permutations, where a test permutes.
        reference_model: Folder of a network that saw neither candidates nor references; may be
            given several times.
        restarts: Noise tensors of each law, for the learned test.
        equivalence: Also test whether the leaked fraction is below this margin, as after
            unlearning; needs --known-members.
        stream: Bet in batches of so many pairs, and stop as soon as the level is reached.
        null_check: Also test references against references so many times, and report how often
            that accuses.
        limit: Use only so many images of each set.
        skip_broken: Leave unreadable images out and count them.
        devices: Devices on this machine; under torchrun the processes it started.
        workers: Image loading processes.
        seed: Seed.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k != "out"}
    check_options(options)
    pairs = hypotheses(candidate, reference, hypothesis)
    tests = [test, *(explore or [])]
    check_combination(options, tests, pairs)
    fabric = launch(devices, "32-true")
    show = fabric.is_global_zero
    with run_folder(out, "audit dejavu", options, seed=seed, rank=fabric.global_rank) as run:
        scorer = Scorer(
            fabric,
            None if model is None else open_network(model),
            [open_network(folder) for folder in reference_model or []],
            restarts,
            workers,
            seed,
        )
        labels = {
            "candidate": candidate_labels,
            "reference": reference_labels,
            "known member": known_labels,
        }

        def opened(role: str, source: str) -> Samples:
            return open_samples(
                role, source, labels[role], limit=limit, skip_broken=skip_broken, show=show
            )

        known = None if known_members is None else opened("known member", known_members)
        compared: dict[str, Compared] = {}
        for name, (theirs, held_out) in pairs.items():
            sets = opened("candidate", theirs), opened("reference", held_out)
            check_labels(scorer, tests, [*sets, *([] if known is None else [known])])
            compared[name] = compare(*sets, known, seed=seed, show=show)
        if hypothesis:
            found = several(scorer, compared, test, level, permutations, seed)
        elif stream:
            found = bet(scorer, compared[""].one_of_each(), test, level, stream, seed)
        else:
            found = one(scorer, compared[""], options, tests)
        results = found.results()
        if run.first:
            run.write_results(results)
            write_scores(found, run.path("scores.parquet"))
            repeated = [row for sets in compared.values() for row in sets.repeated]
            write_duplicates(repeated, run.path("duplicates.parquet"))
            write_report(found, options, run.summary(), run.path("report.html"))
    return DejaVu(out, tuple(found.evidence.values()), found.exploratory, results)
