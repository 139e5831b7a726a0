"""FixRes on photographs over several seeds: train, fix, print the figures of docs/fixres.md.

Runs `remanence learn classifier` and `remanence learn fixres` for each seed into a folder, skipping
what is there already, then prints accuracy by test size before and after tuning, averaged over
seeds, and the chosen setting against the network as trained.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from remanence.cli import main as remanence
from remanence.kit.predictions import Predictions
from remanence.kit.statistics import paired_bootstrap

TRAIN = (
    "--model cifar_convnet5 --size 96 --epochs 8 --optimizer adamw --lr 2e-3 --weight-decay 0.05 "
    "--precision bf16-mixed"
)
FIX = (
    "--sizes 72 --sizes 96 --sizes 108 --sizes 120 --sizes 132 --sizes 144 --sizes 168 "
    "--tune-sizes 96 --tune-sizes 120 --tune-sizes 132 --epochs 2 --precision bf16-mixed "
    "--fuse logits"
)


def run(data: str, folder: Path, seed: int, train: str, fix: str) -> Path:
    """Train and fix one seed unless its folders are there; return the second folder."""
    base, fixed = folder / f"base{seed}", folder / f"fix{seed}"
    for out, words in (
        (base, f"learn classifier {data} {train}"),
        (fixed, f"learn fixres {data} --model {base / 'model'} {fix}"),
    ):
        if not out.exists():
            status = remanence([*words.split(), "--seed", str(seed), "--out", str(out)])
            if status:
                raise SystemExit(status)
    return fixed


def report(folders: list[Path]) -> None:
    """Print one row a setting and one a seed."""
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    console = Console(width=100)
    rows = [row for found in results for row in found["candidates"]]
    table = Table(title=f"top-1 accuracy, %, mean of {len(results)} seeds")
    sizes = sorted({row["size"] for row in rows})
    table.add_column("scope")
    for size in sizes:
        table.add_column(str(size), justify="right")
    for scope in dict.fromkeys(row["scope"] for row in rows):
        cells = []
        for size in sizes:
            found = [r["accuracy"] for r in rows if (r["scope"], r["size"]) == (scope, size)]
            cells.append(f"{100 * np.mean(found):.1f}" if found else "")
        table.add_row(scope, *cells)
    console.print(table)
    for folder, found in zip(folders, results, strict=True):
        chosen, compared = found["candidates"][found["chosen"]], found["comparison"]
        low, high = compared["difference_interval_95"]
        console.print(
            f"{folder.name}: chosen {chosen['size']} {chosen['scope']}: "
            f"{100 * compared['accuracy']:.1f} against {100 * compared['accuracy_base']:.1f} as "
            f"trained, {100 * compared['difference']:+.1f} ({100 * low:+.1f} to "
            f"{100 * high:+.1f}), McNemar p = {compared['mcnemar_p']:.2g}"
        )
    together = paired_bootstrap(share(folders, "predictions"), share(folders, "predictions_base"))
    difference, low, high = (100 * value for value in together)
    console.print(
        f"all seeds, bootstrap over images: {difference:+.1f} points ({low:+.1f} to {high:+.1f}); "
        f"equal apparent size at {results[0]['geometry'][0]['equalising_size']:.0f} pixels"
    )


def share(folders: list[Path], name: str) -> Any:
    """Return the share of the seeds that are right on each image, (N,)."""
    return np.mean(
        [Predictions.read(folder / f"{name}.parquet").correct for folder in folders], axis=0
    )


def main() -> None:
    """Read the arguments, run what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/clothing")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", default=TRAIN, help="options of learn classifier")
    parser.add_argument("--fix", default=FIX, help="options of learn fixres")
    given = parser.parse_args()
    report(
        [run(given.data, given.runs, seed, given.train, given.fix) for seed in range(given.seeds)]
    )


if __name__ == "__main__":
    main()
