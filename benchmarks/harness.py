"""A small harness for races: ours and its peers on the same data, in turns, in one process.

A contestant is a function that runs one lap and says how much it did in how many seconds. Laps are
run A B A B ..., so that what else the machine does falls on all alike, and a ratio is taken round
by round before its median and spread are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from remanence.kit import progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclass(frozen=True)
class Lap:
    """One timed run: how much was done, in how long, and figures that show it was the same work."""

    amount: float
    seconds: float
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Amount per second."""
        return self.amount / self.seconds


class Stopwatch:
    """Time the steps of a loop from the `start`-th finished one to the `stop`-th."""

    def __init__(self, start: int, stop: int, device: torch.device) -> None:
        self._start, self._stop, self._device = start, stop, device
        self._ticks, self._began, self.seconds = 0, float("nan"), float("nan")
        self.tick(0)

    def tick(self, steps: int = 1) -> None:
        """Count a finished step; the device is waited for only at both ends."""
        self._ticks += steps
        if self._ticks not in (self._start, self._stop):
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._ticks == self._stop:
            self.seconds = time.perf_counter() - self._began
        else:
            self._began = time.perf_counter()


@dataclass
class Race:
    """The laps of every contestant on one course; the first contestant is ours."""

    title: str
    unit: str
    laps: dict[str, list[Lap]]

    def ratios(self, name: str) -> list[float]:
        """Our rate over a contestant's, round by round."""
        ours = next(iter(self.laps.values()))
        return [a.rate / b.rate for a, b in zip(ours, self.laps[name], strict=True)]

    def table(self) -> Table:
        """Rates, figures beside them, and last the ratio."""
        facts = dict.fromkeys(name for laps in self.laps.values() for name in laps[0].facts)
        columns = ["", self.unit, "min..max", *facts, "ours / this (min..max)"]
        table = Table(title=self.title, title_justify="left")
        for column in columns:
            table.add_column(column, justify="right" if column else "left")
        for name, laps in self.laps.items():
            rates, ratios = [lap.rate for lap in laps], self.ratios(name)
            known = [[lap.facts[f] for lap in laps if f in lap.facts] for f in facts]
            table.add_row(
                name,
                f"{median(rates):,.4g}",
                f"{min(rates):,.4g}..{max(rates):,.4g}",
                *(f"{median(values):.4g}" if values else "" for values in known),
                f"{median(ratios):.3f} ({min(ratios):.3f}..{max(ratios):.3f})",
            )
        return table

    def record(self) -> dict[str, Any]:
        """Return every lap and ratio as plain values."""
        contestants = {
            name: {"laps": [asdict(lap) for lap in laps], "ratios": self.ratios(name)}
            for name, laps in self.laps.items()
        }
        return {"title": self.title, "unit": self.unit, "contestants": contestants}


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every race."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--rounds", type=int, default=5, help="timed laps of each contestant")
    options.add_argument("--warmup", type=int, default=1, help="laps of each before, not counted")
    options.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options.add_argument("--accelerator", choices=["auto", "cpu", "cuda"], default="auto")
    options.add_argument("--json", type=Path, help="write every lap to this file")
    return options


def race(
    title: str,
    contestants: Mapping[str, Callable[[], Lap]],
    options: argparse.Namespace,
    *,
    unit: str,
) -> Race:
    """Run the laps in turns and print the table.

    Args:
        title: What is raced.
        contestants: A lap of each, ours first.
        options: Parsed options of `parser`.
        unit: Unit of a rate.

    Returns:
        The laps.
    """
    torch.set_num_threads(options.threads)
    progress.console.quiet = True
    laps: dict[str, list[Lap]] = {name: [] for name in contestants}
    for number in range(options.warmup + options.rounds):
        for name, lap in contestants.items():
            done = lap()
            if number >= options.warmup:
                laps[name].append(done)
    run = Race(title, unit, laps)
    console = Console()
    if not console.is_terminal:  # a log has no width of its own
        console.width = 140
    console.print(run.table())
    return run


def environment(packages: Sequence[str], threads: int) -> dict[str, Any]:
    """Print and return what times depend on: processor, device, threads, versions, other load."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    facts = {
        "processor": (models or [platform.processor()])[0],
        "cores": len(os.sched_getaffinity(0)),
        "torch threads": threads,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "load average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
    } | {package: version(package) for package in packages}
    for name, value in facts.items():
        print(f"{name}: {value}")
    return facts


def finish(races: Sequence[Race], facts: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Write the record of a session where one is asked for."""
    if options.json is not None:
        record = {
            "environment": facts,
            "options": vars(options),
            "races": [run.record() for run in races],
        }
        options.json.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
