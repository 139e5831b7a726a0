"""`remanence reproduce`: every claim that is built, small, in one report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from remanence.errors import InputError
from remanence.kit.progress import say
from remanence.kit.report import Cell, Report
from remanence.kit.run import run_folder

if TYPE_CHECKING:
    from remanence.claims.claim import Claim
    from remanence.kit.run import RunFolder

# system -> the function that measures its claim
CLAIMS = {
    "fixres": "remanence.claims.fixres:fixres_claim",
    "fixefficientnet": "remanence.claims.fixres:fixefficientnet_claim",
    "compress": "remanence.claims.compress:compress_claim",
    "membership": "remanence.claims.membership:membership_claim",
    "dejavu": "remanence.claims.dejavu:dejavu_claim",
    "radioactive": "remanence.claims.radioactive:radioactive_claim",
}


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

    Needs no data and no network: claims are measured on images that come with scikit-learn and on
    what remanence synthesises from them. The exit status is 1 if a claim does not hold.

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
    with run_folder(out, "reproduce", {"systems": " ".join(chosen)}) as run:
        for number, name in enumerate(chosen, start=1):
            say(f"[{number}/{len(chosen)}] {name}")
            started = time.perf_counter()
            module, _, function = CLAIMS[name].partition(":")
            claim: Claim = getattr(import_module(module), function)()
            seconds.append(time.perf_counter() - started)
            claims.append(claim)
            say(f"{name}: {'holds' if claim.holds else 'does not hold'}. {claim.measured}")
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
