r"""What it takes for a catalyzer and a lattice to find neighbours: one setting changed at a time.

    python benchmarks/evidence_spreading.py --data ../shared/data
    python benchmarks/evidence_spreading.py --only "lambda 0" "published network"

Trains on the 100,000 learn vectors of the SIFT set, codes its 200,000 base vectors, and prints
1-recall@1, @10 and @100 of its 2,000 queries against the exact ground truth, before and after
rounding, with the KoLeo loss beside that of a uniform spread and the processor time. No setting is
chosen here: `remanence search train` chooses on held-out vectors.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from remanence.kit.vectors import open_ids, open_vectors
from remanence.search.catalyzer.network import Catalyzer
from remanence.search.catalyzer.training import Settings, Training
from remanence.search.choice import code_for_bytes, new_catalyzer
from remanence.search.exact import recall_at
from remanence.search.heldout import RANKS, HeldOut

BASE = Settings(epochs=12, pool=25_000)


@dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
        name: What differs from the first row.
        settings: Of the training.
        nbytes: Bytes of the code, which give its dimension.
        hidden: Width of the network.
        shortcut: Whether the network has the linear map that starts from principal components.
        finetune: Epochs of training end to end after the others.
    """

    name: str
    settings: Settings = BASE
    nbytes: int = 8
    hidden: int = 512
    shortcut: bool = True
    finetune: int = 0


ROWS = (
    Row("8 bytes, lambda 0.02, width 512, 12 epochs"),
    Row("lambda 0", replace(BASE, koleo=0.0)),
    Row("lambda 0.005", replace(BASE, koleo=0.005)),
    Row("lambda 0.05", replace(BASE, koleo=0.05)),
    Row("published network", shortcut=False),
    Row("width 256", hidden=256),
    Row("width 1024", hidden=1024),
    Row("40 epochs", replace(BASE, epochs=40)),
    Row("4 more epochs end to end", finetune=4),
    Row("4 bytes", nbytes=4),
    Row("4 bytes, 4 more epochs end to end", nbytes=4, finetune=4),
)


def measure(row: Row, learn: torch.Tensor, held_out: HeldOut, neighbours: torch.Tensor) -> None:
    """Train and print."""
    code = code_for_bytes(row.nbytes)
    started = time.process_time()
    if row.shortcut:
        catalyzer = new_catalyzer(learn.shape[1], [code.dim], hidden=row.hidden)
    else:
        torch.manual_seed(0)
        catalyzer = Catalyzer(learn.shape[1], [code.dim], hidden=row.hidden, shortcut=False)
    stages = [Training(catalyzer, learn, row.settings)]
    if row.finetune:
        tuned = replace(row.settings, epochs=row.finetune, lr=row.settings.lr / 10)
        stages.append(Training(catalyzer, learn, tuned, codes={code.dim: code}, seed=1))
    for stage in stages:
        stage.neighbours = neighbours
        *_, last = stage.epochs()
    spent = time.process_time() - started
    print(f"\n{row.name}")
    print(f"  KoLeo {last.koleo:.3f}, uniform {last.koleo_of_uniform:.3f}, {spent:.0f} s of CPU")
    for name, rounded in (("not rounded", None), ("lattice", code)):
        recall = recall_at(held_out.found(catalyzer.at(code.dim), rounded), held_out.truth, RANKS)
        print(f"  {name:12}" + "  ".join(f"@{rank} {100 * recall[rank]:.1f}" for rank in RANKS))


def main() -> None:
    """Measure the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", nargs="*", default=[], help="names of rows")
    options = parser.parse_args()
    folder = options.data / "sift"
    learn, base, queries = (
        torch.from_numpy(open_vectors(str(folder / f"{name}.bvecs")).array())
        for name in ("learn", "base", "query")
    )
    held_out = HeldOut(base, queries, open_ids(str(folder / "groundtruth.ivecs"))[:, 0])
    first = Training(new_catalyzer(learn.shape[1], [16], hidden=8), learn, BASE)
    first.find_neighbours()
    assert first.neighbours is not None
    for row in ROWS:
        if not options.only or row.name in options.only:
            measure(row, learn, held_out, first.neighbours)


if __name__ == "__main__":
    main()
