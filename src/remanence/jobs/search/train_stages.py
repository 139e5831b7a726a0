"""The long parts of `remanence search train`, each of which goes on after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remanence.errors import InputError
from remanence.jobs.search.train_report import CURVE, Measured
from remanence.kit.progress import bar
from remanence.kit.run import RunFolder
from remanence.search.catalyzer.training import Settings, Training
from remanence.search.choice import Trial, shortened, tune
from remanence.search.exact import recall_hits
from remanence.search.heldout import RANKS, HeldOut, Score, mean_recall, merit, score, telling_rank
from remanence.search.lattice.code import SphericalCode
from remanence.search.rivals import Rival, run_rival

if TYPE_CHECKING:
    from lightning_fabric import Fabric

POINTS = 20  # times that a training is measured, at least


@dataclass(frozen=True, eq=False)
class Data:
    """What a run works on.

    Attributes:
        train: Training vectors (n, d), float32, on the device.
        choosing: Held-out vectors that choices are made by.
        reporting: Held-out vectors that nothing is chosen by.
    """

    train: Tensor
    choosing: HeldOut
    reporting: HeldOut


@dataclass(frozen=True, eq=False)
class Best:
    """The best epoch so far, by recall at one rank.

    Attributes:
        rank: R of that recall.
        stage: "train" or "finetune".
        epoch: From 1.
        scores: On the queries to choose by.
        weights: State of the catalyzer.
    """

    rank: int
    stage: str
    epoch: int
    scores: tuple[Score, ...]
    weights: dict[str, Tensor]

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Best:
        """Rebuild one from `dataclasses.asdict`."""
        scores = tuple(Score.from_dict(each) for each in plain["scores"])
        return cls(plain["rank"], plain["stage"], plain["epoch"], scores, dict(plain["weights"]))

    def plain(self) -> dict[str, Any]:
        """Return what `from_dict` takes."""
        names = ("rank", "stage", "epoch", "weights")
        scores = {"scores": [asdict(each) for each in self.scores]}
        return {name: getattr(self, name) for name in names} | scores


def try_all(
    data: Data,
    candidates: Sequence[Sequence[SphericalCode]],
    koleos: Sequence[float],
    settings: Settings,
    hidden: int,
    seed: int,
    run: RunFolder,
    fabric: Fabric,
) -> list[Trial]:
    """Make all short trainings; nothing where there is a single choice."""
    count = len(candidates) * len(koleos)
    if count == 1:
        return []
    saved = run.load_state("tune") or {"trials": []}
    trials = [Trial.from_dict(each) for each in saved["trials"]]
    if run.resumed:
        run.keep_metrics({"tune": len(trials)})
    short, n = shortened(settings, len(data.train))
    steps = short.epochs * (n // fabric.world_size // short.batch_size)
    with bar("tune", count * steps, done=len(trials) * steps, show=run.first) as progress:
        for trial in tune(
            data.train,
            data.choosing,
            candidates,
            koleos,
            settings=settings,
            hidden=hidden,
            seed=seed,
            done=tuple(trials),
            step=progress.advance,
        ):
            trials.append(trial)
            progress.note(f"lambda {trial.koleo:g} {_said(trial.scores)}")
            run.log(
                stage="tune",
                step=len(trials),
                weight=trial.koleo,
                koleo=trial.spread,
                koleo_of_uniform=trial.uniform,
                **_flat(trial.scores),
            )
            run.save_state("tune", {"trials": [asdict(each) for each in trials]})
    return trials


def fit(
    stage: str,
    training: Training,
    codes: Sequence[SphericalCode],
    data: Data,
    run: RunFolder,
    fabric: Fabric,
    bests: Sequence[Best],
) -> tuple[Best, ...]:
    """Train to the end, and return the best epochs of this stage and those before.

    One has the highest recall@10 in codes, the mean over the codes, and of equal ones the highest
    recall@1; the other is the other way round. Of equal ones again it is the first. Which of the
    two is wanted, `best_of` knows when all is done.
    """
    saved = run.load_state(stage)
    if saved is not None:
        training.load_state_dict(saved["training"])
        bests = [Best.from_dict(each) for each in saved["bests"]]
    if run.resumed:
        run.keep_metrics({stage: training.done})
    epochs = training.settings.epochs
    if training.done == epochs:
        return tuple(bests)
    every = max(epochs // POINTS, 1)
    done = training.done * training.steps
    if training.neighbours is None:
        with bar("neighbours", len(training.own), show=run.first) as progress:
            training.find_neighbours(progress.advance)
    with bar(stage, epochs * training.steps, done=done, show=run.first) as progress:
        for shown in training.epochs(progress.advance):
            row: dict[str, float] = asdict(shown)
            row.pop("number")
            said = f"rank loss {shown.rank_loss:.4f} koleo {shown.koleo:.3f}"
            # The last epoch is always measured, and the first, so that there is a best.
            if shown.number % every == 0 or shown.number in {1, epochs}:
                mine = score(training.catalyzer, codes, data.choosing) if run.first else ()
                scores: tuple[Score, ...] = fabric.broadcast(mine)
                row |= _flat(scores)
                said += f" {_said(scores)}"
                state = training.catalyzer.state_dict()
                weights = {name: value.cpu().clone() for name, value in state.items()}
                before = {best.rank: best for best in bests}
                now = [Best(rank, stage, shown.number, scores, weights) for rank in (10, 1)]
                bests = [_better(before.get(each.rank), each) for each in now]
            progress.note(said)
            run.log(stage=stage, step=shown.number, **row)
            plain = [best.plain() for best in bests]
            run.save_state(stage, {"training": training.state_dict(), "bests": plain})
    return tuple(bests)


def best_of(bests: Sequence[Best]) -> Best:
    """Return the best epoch by recall at the rank that tells."""
    by_rank = {best.rank: best for best in bests}
    return by_rank[telling_rank(mean_recall(by_rank[10].scores, 10))]


def _better(before: Best | None, now: Best) -> Best:
    if before is None or merit(now.scores, now.rank) > merit(before.scores, now.rank):
        return now
    return before


def _said(scores: Sequence[Score]) -> str:
    return f"recall@1 {mean_recall(scores, 1):.3f} recall@10 {mean_recall(scores, 10):.3f}"


def race(
    entries: Sequence[tuple[int, Rival]], data: Data, run: RunFolder
) -> tuple[list[Measured], dict[str, str]]:
    """Run what else there is at the same bytes; also return why some could not be run."""
    saved = run.load_state("rivals") or {"hits": {}, "failed": {}}
    hits: dict[str, Tensor] = dict(saved["hits"])
    failed: dict[str, str] = dict(saved["failed"])
    train = data.train.cpu().numpy()
    base, queries = data.reporting.base.numpy(), data.reporting.queries.numpy()
    with bar("compare", len(entries), done=len(hits) + len(failed)) as progress:
        for nbytes, rival in entries:
            if rival.key in hits or rival.key in failed:
                continue
            try:
                found = run_rival(
                    rival.key,
                    train,
                    base,
                    queries,
                    max(RANKS),
                    threads=torch.get_num_threads(),
                    progress=_teller(progress.note, f"{rival.name}, {nbytes} bytes"),
                )
                hits[rival.key] = torch.from_numpy(_hits(found.ids, data.reporting))
            except InputError as error:
                failed[rival.key] = str(error)
            progress.advance()
            run.save_state("rivals", {"hits": hits, "failed": failed})
    measured = [
        Measured(rival.name, nbytes, hits[rival.key].numpy())
        for nbytes, rival in entries
        if rival.key in hits
    ]
    names = {rival.key: f"{rival.name}, {nbytes} bytes" for nbytes, rival in entries}
    return measured, {names[key]: why for key, why in failed.items()}


def measure(name: str, nbytes: int, ids: NDArray[np.int64], data: Data) -> Measured:
    """Compare what a search found with the truth of the queries to report by."""
    return Measured(name, nbytes, _hits(ids, data.reporting))


def _hits(ids: NDArray[np.int64], held_out: HeldOut) -> NDArray[np.bool_]:
    return np.stack(list(recall_hits(ids, held_out.truth, CURVE).values()), axis=1)


def _teller(note: Callable[[str], None], name: str) -> Callable[[str, int, int], None]:
    return lambda stage, done, total: note(f"{name}: {stage} {done:,} of {total:,}")


def _flat(scores: Sequence[Score]) -> dict[str, float]:
    return {
        f"recall_at_{rank}_{each.nbytes}_bytes{kind}": recalls[place]
        for each in scores
        for kind, recalls in (("", each.quantised), ("_floats", each.floats))
        for place, rank in enumerate(RANKS)
    }
