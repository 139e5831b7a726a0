r"""Evidence of compression on real images: networks, regimes of blocks, and both controls.

    for s in 0 1 2; do remanence learn classifier CIFAR10 --model cifar_resnet20 --size 32 \
        --epochs 15 --batch-size 128 --lr 0.2 --schedule one-cycle --scale 0.5 1 --seed $s \
        --out base$s; done
    python benchmarks/evidence_compress.py CIFAR10 --models base0 base1 base2 --out runs

Each network is compressed by `remanence compress quantize` in each regime; runs that are there are
read, not repeated. Figures are means over the networks with 95 % intervals of Student's t.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from remanence.jobs.compress.quantize import (
    FLOAT,
    NOT_TUNED,
    OURS,
    PAPER,
    PLAIN,
    UNTUNED,
    quantize,
)
from remanence.kit.statistics import mean_interval

REGIMES = {
    "small blocks, K = 256": {"channels": 1, "codewords": 256},
    "small blocks, K = 64": {"channels": 1, "codewords": 64},
    "large blocks, K = 256": {"channels": 2, "codewords": 256},
}
NETWORKS = (FLOAT, f"{PLAIN}{NOT_TUNED}", f"{PAPER}{NOT_TUNED}", UNTUNED, PLAIN, PAPER, OURS)


def measure(data: str, model: Path, regime: str, steps: int, out: Path) -> dict[str, Any]:
    """Compress one network in one regime, unless that is done, and return the run's results."""
    run = out / f"{model.name}-{'-'.join(regime.replace(',', '').replace(' =', '').split())}"
    if not run.exists():
        recipe = out / f"{run.name}.json"
        recipe.write_text(json.dumps({"base": "small", "spatial": REGIMES[regime]}))
        quantize(
            str(model / "model"),
            data,
            out=run,
            recipe=str(recipe),
            finetune_steps=steps,
        )
    results: dict[str, Any] = json.loads((run / "results.json").read_text())
    return results


def interval(values: list[float]) -> str:
    """Mean with its interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.1f}"
    low, high = mean_interval(np.array(values))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def main() -> None:
    """Run what is missing, and print a table for each regime."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="the images that the networks were trained on")
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=100, help="of tuning")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    for regime in REGIMES:
        found = [
            measure(options.data, model, regime, options.steps, options.out)
            for model in options.models
        ]
        table = Table("network", "right, %", "gain over plain k-means", "KL, nats", title=regime)
        rows = [{each["name"]: each for each in results["measured"]} for results in found]
        for name in NETWORKS:
            right = [100 * row[name]["accuracy"][0] for row in rows]
            rival = f"{PLAIN}{NOT_TUNED}" if NOT_TUNED in name else PLAIN
            gain = [100 * (row[name]["accuracy"][0] - row[rival]["accuracy"][0]) for row in rows]
            kl = np.mean([row[name]["kl"] for row in rows])
            skip = name in (FLOAT, rival)
            table.add_row(name, interval(right), "" if skip else interval(gain), f"{kl:.3f}")
        console.print(table)
        sizes = {results["size"]["total"] for results in found}
        ratio = found[0]["size"]["ratio"]
        console.print(f"files of {sorted(sizes)} bytes, {ratio:.1f} times fewer than in float32\n")


if __name__ == "__main__":
    main()
