r"""CPC on real speech over several seeds: train, score, print the tables of docs/cpc.md.

    python benchmarks/evidence_cpc.py --data ../shared/data --runs runs/cpc

Recordings 5 to 49 of each digit and speaker are learned from; recordings 0 to 4, the data's own
test set, are scored once, whole words by digit: six speakers, ten words, 300 recordings. Every arm
is `remanence speech cpc` with the same settings but the augmentation; `speech abx` scores its
features, those of the network before training, and MFCC. Networks that are there already are not
trained again.

Errors are means over seeds, in per cent, with 95 % intervals over speakers; differences are paired,
cell by cell. Nothing is chosen here: which weights of a run are kept, held-out recordings of the
learned ones decide.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from remanence.jobs.speech.abx import abx
from remanence.jobs.speech.cpc import cpc
from remanence.speech.abx.score import AbxResult, merge
from remanence.speech.cpc.model import CPC
from remanence.speech.cpc.presets import PRESETS

if TYPE_CHECKING:
    from remanence.speech.abx.cells import Speaker

NAMES = r"(?P<phone>[0-9])_(?P<speaker>[a-z]+)_"
ARMS: dict[str, dict[str, str]] = {
    "none": {"augment": "none"},
    "past, pitch": {"augment": "past", "chain": "pitch"},
    "past, pitch and reverb": {"augment": "past", "chain": "pitch,reverb"},
    "both, pitch": {"augment": "both", "chain": "pitch"},
}
SIDES: tuple[Speaker, ...] = ("within", "across")
TEST_TAKES = 5


def write_lists(recordings: Path, runs: Path) -> tuple[Path, Path]:
    """Write which recordings are learned from and which are scored."""
    lists = runs / "learn.txt", runs / "test.txt"
    files: tuple[list[str], list[str]] = [], []
    for path in sorted(recordings.glob("*.wav")):
        files[int(path.stem.split("_")[2]) < TEST_TAKES].append(str(path.resolve()))
    for path, own in zip(lists, files, strict=True):
        path.write_text("\n".join(own) + "\n", encoding="utf-8")
    return lists


def train(arm: str, seed: int, learn: Path, runs: Path, steps: int) -> Path:
    """Return the run of an arm and a seed, trained where it is not there."""
    out = runs / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
    if not out.exists():
        cpc(
            str(learn),
            out=out,
            names=NAMES,
            preset="small",
            sample_rate=8000,
            max_steps=steps,
            seed=seed,
            resume=out.with_name(f"{out.name}.partial").exists(),
            **ARMS[arm],  # type: ignore[arg-type]  # words of the command's own lists
        )
    return out


def untrained(seed: int, runs: Path) -> Path:
    """Return a folder with the network before training."""
    out = runs / f"untrained-{seed}"
    if not out.exists():
        torch.manual_seed(seed)
        out.mkdir()
        CPC(**PRESETS["small"], sample_rate=8000).save(out)
    return out


def score(features: str, test: Path) -> dict[Speaker, AbxResult]:
    """Return the ABX errors of features."""
    with TemporaryDirectory() as folder:
        found = abx(features, out=Path(folder) / "abx", audio=str(test), names=NAMES)
    assert found.within is not None
    assert found.across is not None
    return {"within": found.within, "across": found.across}


def main() -> None:
    """Train what is not there, score it, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/cpc"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.runs.mkdir(parents=True, exist_ok=True)
    learn, test = write_lists(options.data / "spoken_digits" / "recordings", options.runs)

    scored: dict[str, list[dict[Speaker, AbxResult]]] = {
        "MFCC": [score("mfcc", test)],
        "untrained": [score(str(untrained(seed, options.runs)), test) for seed in options.seeds],
    }
    for seed in options.seeds:
        for arm in options.arms:
            out = train(arm, seed, learn, options.runs, options.steps)
            scored.setdefault(arm, []).append(score(str(out), test))
    report(scored)


def report(scored: dict[str, list[dict[Speaker, AbxResult]]]) -> None:
    """Print one row an arm: the mean of its seeds, each seed, and the difference to two others."""
    console = Console(width=150)
    for side in SIDES:
        means = {arm: merge([one[side] for one in own]) for arm, own in scored.items()}
        table = Table(title=f"word ABX error {side} speakers, %")
        for title in ("features", "mean of seeds", "95 % over speakers", "each seed"):
            table.add_column(title)
        for title in ("less none", "less MFCC"):
            table.add_column(title)
        for arm, own in scored.items():
            mean = means[arm]
            table.add_row(
                arm,
                f"{100 * mean.error:.1f}",
                f"{100 * mean.interval[0]:.1f} to {100 * mean.interval[1]:.1f}",
                " ".join(f"{100 * one[side].error:.1f}" for one in own),
                *(less(mean, means.get(other)) for other in ("none", "MFCC")),
            )
        console.print(table)


def less(first: AbxResult, second: AbxResult | None) -> str:
    """Return the paired difference with its interval, in points."""
    if second is None or second is first:
        return ""
    found = first.compare(second)
    low, high = (100 * value for value in found.interval)
    return f"{100 * found.difference:+.1f} ({low:+.1f} to {high:+.1f})"


if __name__ == "__main__":
    main()
