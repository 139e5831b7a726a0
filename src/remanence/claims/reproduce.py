"""`remanence reproduce`: every claim that is built, small, in one report."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from remanence.errors import InputError
from remanence.kit.progress import console, say, track
from remanence.kit.report import Cell, Report
from remanence.kit.run import run_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from remanence.claims.claim import Claim
    from remanence.kit.run import RunFolder

# system -> the function that measures its claim
CLAIMS = {
    "fixres": "remanence.claims.fixres:fixres_claim",
    "fixefficientnet": "remanence.claims.fixres:fixefficientnet_claim",
    "compress": "remanence.claims.compress:compress_claim",
    "spreading": "remanence.claims.spreading:spreading_claim",
    "kernel-descriptor": "remanence.claims.kernel_descriptor:kernel_descriptor_claim",
    "wavaugment": "remanence.claims.wavaugment:wavaugment_claim",
    "cpc": "remanence.claims.cpc:cpc_claim",
    "membership": "remanence.claims.membership:membership_claim",
    "dejavu": "remanence.claims.dejavu:dejavu_claim",
    "radioactive": "remanence.claims.radioactive:radioactive_claim",
}

PROCESSES = 4  # at most; each holds a copy of torch and of its claim's data


@dataclass(frozen=True)
class Reproduced:
    """What `reproduce` found.

    Attributes:
        out: Run folder with the report.
        claims: The claims, in the order asked for.
    """

    out: Path
    claims: list[Claim]

    @property
    def exit_status(self) -> int:
        """1 if a claim does not hold, else 0."""
        return 0 if all(claim.holds for claim in self.claims) else 1


def reproduce(*systems: str, out: Path | None = None) -> Reproduced:
    """Run every paper's claim, small, with its control, and write one report.

    Needs no data and no network: claims are measured on images that come with scikit-learn, on
    what remanence synthesises from them, and on synthetic speech. The exit status is 1 if a claim
    does not hold.

    Args:
        systems: Which systems; all that are built if none is given.
        out: Run folder to create; by default remanence-report, or the first free name
            remanence-report-2, -3 and so on.
    """
    for name in systems:
        if name not in CLAIMS:
            raise InputError(f"{name}: no such system; choose from {', '.join(CLAIMS)}")
    chosen = list(dict.fromkeys(systems)) or list(CLAIMS)
    out = out or _free_name(Path("remanence-report"))
    claims = []
    seconds = []
    with run_folder(out, "reproduce", {"systems": tuple(chosen)}) as run:
        for claim, spent in _measured(chosen):
            seconds.append(spent)
            claims.append(claim)
            say(f"{claim.system}: {'holds' if claim.holds else 'does not hold'}. {claim.measured}")
        run.write_results(
            {
                claim.system: {
                    "holds": claim.holds,
                    "measured": claim.measured,
                    "control": claim.control,
                    "data": claim.data,
                    "seconds": round(spent, 1),
                }
                for claim, spent in zip(claims, seconds, strict=True)
            }
        )
        _report(run, claims, seconds)
    say(f"report: {out / 'report.html'}")
    return Reproduced(out, claims)


def _measured(systems: list[str]) -> Iterator[tuple[Claim, float]]:
    """Measure claims, in their order, in as many processes as there are cores for.

    Claims work on small tensors, which a second core speeds up little.
    """
    threads = torch.get_num_threads()
    processes = min(len(systems), threads, PROCESSES)
    if processes == 1:
        for number, name in enumerate(systems, start=1):
            say(f"[{number}/{len(systems)}] {name}")
            yield _measure(CLAIMS[name])
        return
    with ProcessPoolExecutor(
        processes,
        mp_context=get_context("spawn"),
        initializer=_worker,
        initargs=(threads // processes,),
    ) as pool:
        waiting = [pool.submit(_measure, CLAIMS[name]) for name in systems]
        try:
            for result in track(waiting, f"{len(systems)} claims, {processes} at a time"):
                yield result.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _worker(threads: int) -> None:
    torch.set_num_threads(threads)
    console.quiet = True  # bars of several processes would overwrite each other


def _measure(target: str) -> tuple[Claim, float]:
    """Measure one claim and write its details, so that it can pass between processes."""
    started = time.perf_counter()
    module, _, function = target.partition(":")
    claim: Claim = getattr(import_module(module), function)()
    details = Report(claim.system, mark=f"{claim.system}-")
    claim.details(details)
    written = replace(claim, details=partial(Report.include, other=details))
    return written, time.perf_counter() - started


def _free_name(path: Path) -> Path:
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _report(run: RunFolder, claims: list[Claim], seconds: list[float]) -> None:
    held = sum(claim.holds for claim in claims)
    report = Report("remanence reproduce", f"{held} of {len(claims)} claims hold")
    report.table(
        ["paper", "claim", "measured here", "control", "holds", "seconds"],
        [
            [
                claim.paper,
                claim.sentence,
                claim.measured,
                claim.control,
                Cell("holds", "best") if claim.holds else Cell("does not hold", "bad"),
                round(spent),
            ]
            for claim, spent in zip(claims, seconds, strict=True)
        ],
        "Each claim is measured small, on this machine, with a control that must come out as it "
        "does for the claim to mean anything.",
    )
    for claim in claims:
        report.section(claim.system)
        report.text(claim.sentence)
        report.verdict(claim.holds, f"{claim.measured} Control: {claim.control}")
        report.text(f"Measured on {claim.data}.")
        claim.details(report)
    report.section("Run")
    report.facts(run.summary())
    report.write(run.path("report.html"))
