"""The run folder: everything a command leaves behind, whole or not at all."""

from __future__ import annotations

import datetime as dt
import errno
import json
import math
import re
import shlex
import shutil
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from remanence.errors import InputError
from remanence.kit.devices import device_name, versions
from remanence.kit.progress import say

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


FULL = "cannot be written; is the disk full?"
NUMPY_FULL = re.compile(r"\d+ requested and \d+ written")  # numpy's word for it, without a number


@dataclass
class RunFolder:
    """An open run folder; written under `NAME.partial` and renamed when the job is done.

    Attributes:
        out: The folder's final path.
        partial: Where it lies until then.
        resumed: Whether an interrupted run goes on.
        first: Whether this process is the one that writes.
        typed: The command line that does the same again.
        facts: What `run.json` will hold.
    """

    out: Path
    partial: Path
    resumed: bool
    first: bool
    typed: str
    facts: dict[str, Any] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Return the path of an artefact inside the folder."""
        return self.partial / name

    def log(self, **metrics: float | str) -> None:
        """Append one line to `metrics.jsonl`."""
        if self.first:
            with self.path("metrics.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(metrics) + "\n")

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """Return the lines of one stage of `metrics.jsonl`."""
        path = self.path("metrics.jsonl")
        return [row for row in _rows(path) if row.get("stage") == stage]

    def summary(self) -> dict[str, str]:
        """Return what a report says about how it came to be."""
        seed = self.facts["seed"]
        return {
            "command": self.typed,
            **({} if seed is None else {"seed": str(seed)}),
            "device": self.facts["device"],
            "versions": ", ".join(f"{k} {v}" for k, v in self.facts["versions"].items()),
            "started": self.facts["started"],
        }

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write the final figures to `results.json`."""
        if self.first:
            write_json(self.path("results.json"), results)

    def save_state(self, name: str, state: dict[str, Any]) -> None:
        """Write a checkpoint of tensors and plain values; the last one stays until then."""
        if self.first:
            target = self.path(f"{name}.ckpt")
            part = target.with_suffix(".part")
            try:
                torch.save(state, part)
            except RuntimeError as error:  # torch's word for a full disk is "unexpected pos"
                raise OSError(errno.EIO, FULL, part) from error
            part.replace(target)

    def load_state(self, name: str) -> dict[str, Any] | None:
        """Return the checkpoint of an interrupted run, or None.

        Raises:
            InputError: The checkpoint is damaged.
        """
        target = self.path(f"{name}.ckpt")
        if not (self.resumed and target.exists()):
            return None
        try:
            state: dict[str, Any] = torch.load(target, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever the broken bytes lead to
            raise InputError(
                f"{target}: damaged checkpoint; delete {self.partial} and start again"
            ) from error
        return state

    def keep_metrics(self, steps: Mapping[str, int]) -> None:
        """Drop metrics of a stage that were logged after its checkpoint, when a run goes on.

        Args:
            steps: Last step to keep, by stage.
        """
        path = self.path("metrics.jsonl")
        if not (self.first and path.exists()):
            return
        kept = [
            json.dumps(row) + "\n"
            for row in _rows(path)
            if row.get("step", 0) <= steps.get(row.get("stage", ""), float("inf"))
        ]
        path.write_text("".join(kept), encoding="utf-8")


def _typed(command: str, out: Path, options: Mapping[str, Any]) -> str:
    """Write a command as one types it: lists repeat their option, True and False are flags."""
    words, flags = ["remanence", *command.split()], []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, tuple) and all(isinstance(one, int | float) for one in value):
            flags += [flag, *map(str, value)] if value else []
        elif isinstance(value, tuple):  # words without an option, such as the files of search index
            words += map(str, value)
        elif value is not None:
            for one in map(str, value if isinstance(value, list) else [value]):
                flags += [f"{flag}={one}"] if one.startswith("-") else [flag, one]
    share = f"-{options.get('rank')}-of-{options.get('world_size')}"  # the job adds it to OUT
    return shlex.join([*words, *flags, "--out", str(out).removesuffix(share)])


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):  # a kill may have cut the last line
            rows.append(json.loads(line))
    return rows


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, indented and in the order given; NaN, which JSON has not, as null."""
    text = json.dumps(_without_nan(value), indent=1, default=str)
    path.write_text(text + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


@contextmanager
def run_folder(
    out: Path,
    command: str,
    options: Mapping[str, Any],
    *,
    seed: int | None = None,
    resume: bool = False,
    rank: int = 0,
) -> Iterator[RunFolder]:
    """Open a run folder for the block and make it whole at the end.

    An error removes what was begun, unless a checkpoint is there: then `NAME.partial` stays, and
    `resume` takes it up again.

    Args:
        out: Folder to create.
        command: The command, for `run.json`.
        options: Its options; a resumed run must have the same.
        seed: Seed, for `run.json`.
        resume: Go on with an interrupted run.
        rank: Rank of this process; only rank 0 writes.

    Yields:
        The open folder.

    Raises:
        InputError: The folder exists, cannot be written, or there is nothing to resume.
    """
    out = out.expanduser()
    partial = out.parent / f"{out.name}.partial"
    plain = json.loads(json.dumps(dict(options), default=str))
    run = RunFolder(out, partial, resume, first=rank == 0, typed=_typed(command, out, options))
    if run.first:
        _open(run, plain)
    run.facts |= {"command": command, "options": plain, "seed": seed, "versions": versions()}
    run.facts |= {"device": device_name(), "threads": torch.get_num_threads()}
    run.facts["started"] = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    started = time.perf_counter()
    try:
        if run.first:
            write_json(partial / "run.json", run.facts)
        yield run
        run.facts["seconds"] = round(time.perf_counter() - started, 2)
        if run.first:
            write_json(partial / "run.json", run.facts)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            error.filename = str(partial)
        if run.first:
            _abandon(run)
        if isinstance(error, OSError) and NUMPY_FULL.fullmatch(str(error)):
            raise OSError(errno.EIO, FULL, partial) from error
        raise
    if run.first:
        for checkpoint in partial.glob("*.ckpt"):
            checkpoint.unlink()
        partial.replace(out)


def _open(run: RunFolder, options: dict[str, Any]) -> None:
    if run.out.exists():
        raise InputError(f"{run.out}: already exists; choose another --out or remove it")
    if run.resumed:
        if not (run.partial / "run.json").exists():
            raise InputError(f"{run.partial}: no interrupted run to resume; leave out --resume")
        try:
            before = json.loads((run.partial / "run.json").read_text(encoding="utf-8"))["options"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{run.partial / 'run.json'}: damaged; remove {run.partial} and start again"
            ) from error
        for name in sorted(before.keys() | options.keys()):
            if before.get(name) != options.get(name):
                raise InputError(
                    f"--{name.replace('_', '-')}: the interrupted run in {run.partial} had "
                    f"{before.get(name)!r}, not {options.get(name)!r}; give the same to resume"
                )
        return
    if run.partial.exists():
        if any(run.partial.glob("*.ckpt")):
            raise InputError(
                f"{run.partial}: an interrupted run lies here; pass --resume to go on with it, "
                "or remove it"
            )
        if any(run.partial.iterdir()) and not (run.partial / "run.json").exists():
            raise InputError(f"{run.partial}: not a run of ours; move it, or choose another --out")
        shutil.rmtree(run.partial)
    try:
        run.partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"{run.out}: cannot be created ({error.strerror}); choose a folder you can write to"
        ) from error


def _abandon(run: RunFolder) -> None:
    if any(run.partial.glob("*.ckpt")):
        for part in run.partial.glob("*.part"):
            part.unlink()
        say(f"interrupted: {run.partial} is kept; the same command with --resume goes on")
    else:
        shutil.rmtree(run.partial, ignore_errors=True)
