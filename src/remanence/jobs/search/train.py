"""`remanence search train`: a catalyzer, and codes of a few bytes that need no training."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from remanence.errors import InputError
from remanence.jobs.options import check_options
from remanence.jobs.search.folder import CATALYZER, CODES
from remanence.jobs.search.train_report import (
    Finding,
    Measured,
    advice_of,
    build_report,
    code_name,
    method_name,
)
from remanence.jobs.search.train_stages import Data, best_of, fit, measure, race, try_all
from remanence.kit.devices import launch
from remanence.kit.progress import say
from remanence.kit.run import run_folder, write_json
from remanence.kit.vectors import check_varies, open_vectors
from remanence.search.catalyzer.network import Catalyzer
from remanence.search.catalyzer.training import Settings, Training
from remanence.search.choice import Advice, Kind, best_trial, code_for_bytes, new_catalyzer
from remanence.search.heldout import split
from remanence.search.index.file import describe
from remanence.search.lattice.code import SphericalCode
from remanence.search.rivals import Rival, caveat, rivals

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Precision = Literal["32-true", "bf16-mixed"]
KOLEO = (0.01, 0.02, 0.05)
SHARE, LEAST, MOST_SHARE = 0.05, 4000, 0.2  # held out by default
FINETUNE = 0.1  # of the learning rate


@dataclass(frozen=True)
class Trained:
    """What `train` leaves behind.

    Attributes:
        out: Run folder, which `search index` opens.
        catalyzer: The network of the best epoch, as read back from its file.
        codes: Its codes by bytes a vector, rising.
        koleo: lambda.
        best_epoch: Which epoch was kept.
        measured: Recall on held-out queries: ours first for each byte count, then rivals; empty on
            processes other than the first.
        advice: By bytes a vector; as `measured`.
    """

    out: Path
    catalyzer: Catalyzer
    codes: Mapping[int, SphericalCode]
    koleo: float
    best_epoch: int
    measured: tuple[Measured, ...]
    advice: Mapping[int, Advice]


def train(
    vectors: str,
    *,
    out: Path,
    nbytes: list[int] | None = None,
    kind: Kind = "lattice",
    dim: list[int] | None = None,
    koleo: list[float] | None = None,
    epochs: int = 40,
    hidden: int = 1024,
    batch_size: int = 256,
    lr: float = 2e-3,
    positives: int = 10,
    negative: int = 50,
    pool: int = 25_000,
    finetune_epochs: int = 0,
    validation: float | None = None,
    against: list[Literal["opq", "pq", "rq", "lsq", "itq", "pca", "none"]] | None = None,
    precision: Precision = "32-true",
    devices: int = 1,
    seed: int = 0,
    resume: bool = False,
) -> Trained:
    """Train a catalyzer: a small network that lets a few bytes a vector find its neighbours.

    The network spreads vectors on a sphere so that neighbours stay neighbours, and a fixed code
    rounds what comes out. Part of the vectors is held out, and the report compares how well these
    find their neighbours among all others with OPQ of the same bytes that learned from the same
    vectors. The folder OUT serves
    `search index`.

    Args:
        vectors: Vectors to learn from, by Euclidean distance: digits, .fvecs, .bvecs, .npy,
            .npz@NAME, .fbin, .u8bin, .i8bin, .safetensors@NAME or .parquet@COLUMN; @START:STOP
            behind it takes some rows. 50,000 are useful, 500,000 better.
        out: Run folder to create.
        nbytes: Bytes a vector, 8 if not given; may be given several times: one network then serves
            codes of all these sizes.
        kind: lattice (integer points of a sphere), sign (a bit a dimension) or e8 (Gosset).
        dim: Output dimension, for 8 bytes 24; may be given several times: with one --nbytes the
            best is chosen, with several give one for each.
        koleo: Weight of the KoLeo loss, which spreads; may be given several times: the best is
            then chosen by short trainings, by default of 0.01, 0.02 and 0.05.
        epochs: Passes over the training vectors.
        hidden: Width of the two hidden layers.
        batch_size: Anchors a step, on each device.
        lr: Peak learning rate of Adam; it falls along a cosine.
        positives: A positive is drawn from so many nearest neighbours.
        negative: Rank of the negative among the neighbours in the output space.
        pool: Vectors among which negatives are sought, drawn anew each epoch; 0 for all.
        finetune_epochs: Epochs of training end to end, through the rounding, at a tenth of the
            learning rate, after the others.
        validation: Share of the vectors to hold out; by default a twentieth, or 4,000 vectors where
            these are more but no more than a fifth. A third of them, at most 5,000, are queries
            that choose, and as many report.
        against: What to compare with: opq, pq, rq, lsq, itq, pca (with a lattice) or none; may be
            given several times; opq if not given.
        precision: Number format of the hidden layers in training; bf16-mixed is quicker on a GPU.
        devices: Devices on this machine; under torchrun the processes it started.
        seed: Seed.
        resume: Go on with the interrupted run in OUT.partial, after its last whole epoch.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("out", "resume")}
    check_options({k: v for k, v in options.items() if not isinstance(v, list)})
    if precision not in get_args(Precision):
        raise InputError(f"--precision {precision}: give one of {', '.join(get_args(Precision))}")
    candidates = _candidates(nbytes or [8], kind, dim or [])
    sizes = [code.nbytes for code in candidates[0]]
    if finetune_epochs and any(len({c.dim for c in some}) < len(some) for some in candidates):
        raise InputError("--finetune-epochs: two codes of one dimension; give each its own --dim")
    weights = _weights(koleo)
    families = _families(against)
    settings = Settings(
        koleo=weights[0],
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        positives=positives,
        negative=negative,
        pool=pool or None,
        bfloat16=precision == "bf16-mixed",
    )
    fabric = launch(devices, "32-true")
    with (
        warnings.catch_warnings(),
        run_folder(
            out, "search train", options, seed=seed, resume=resume, rank=fabric.global_rank
        ) as run,
    ):
        warnings.filterwarnings("ignore", "a catalyzer from")  # said once, below
        opened = open_vectors(vectors)
        check_varies(opened)
        n, in_dim = opened.shape
        share = max(SHARE, min(LEAST / n, MOST_SHARE)) if validation is None else validation
        learn, choosing, reporting = split(torch.from_numpy(opened.array()), share, seed=seed)
        data = Data(learn.to(fabric.device), choosing, reporting)
        warning = _warn(candidates, in_dim)
        if warning and run.first:
            say(f"warning: {warning}")
        trials = try_all(data, candidates, weights, settings, hidden, seed, run, fabric)
        codes, weight = candidates[0], weights[0]
        if trials:
            place = best_trial(trials)
            codes, weight = candidates[place // len(weights)], trials[place].koleo
        settings = replace(settings, koleo=weight)
        catalyzer = new_catalyzer(
            in_dim, sorted({code.dim for code in codes}), hidden=hidden, seed=seed
        ).to(fabric.device)
        training = Training(catalyzer, data.train, settings, seed=seed)
        bests = fit("train", training, codes, data, run, fabric, ())
        if finetune_epochs:
            catalyzer.load_state_dict(best_of(bests).weights)
            tuned = Training(
                catalyzer,
                data.train,
                replace(settings, epochs=finetune_epochs, lr=FINETUNE * lr),
                codes={code.dim: code for code in codes},
                seed=seed + 1,
            )
            tuned.neighbours = training.neighbours
            bests = fit("finetune", tuned, codes, data, run, fabric, bests)
        best = best_of(bests)
        catalyzer.load_state_dict(best.weights)
        catalyzer.eval()

        measured: list[Measured] = []
        advice: dict[int, Advice] = {}
        if run.first:
            catalyzer.save(run.path(CATALYZER))
            write_json(run.path(CODES), {str(code.nbytes): describe(code) for code in codes})
            # What is measured is what was written.
            catalyzer = Catalyzer.load(run.path(CATALYZER)).to(fabric.device)
            entries = [
                (size, rival)
                for size in sizes
                for rival in rivals(in_dim, size)
                if _family(rival) in families
            ]
            others, failed = race(entries, data, run)
            for code in codes:
                embedding, size = catalyzer.at(code.dim), code.nbytes
                ours = measure(method_name(code), size, reporting.found(embedding, code), data)
                plain = measure(
                    f"catalyzer in {code.dim}, not quantised",
                    size,
                    reporting.found(embedding, None),
                    data,
                )
                theirs = [each for each in others if each.nbytes == size]
                measured += [ours, plain, *theirs]
                advice[size] = advice_of(ours, theirs, trained_on=len(learn), in_dim=in_dim)
            finding = Finding(
                source=opened.source,
                in_dim=in_dim,
                hidden=hidden,
                n_train=len(learn),
                n_base=len(reporting.base),
                n_learned=reporting.learned,
                n_choosing=len(choosing.base),
                n_queries=len(reporting.queries),
                codes=tuple(codes),
                koleo=weight,
                trials=tuple(trials),
                best_rank=best.rank,
                best_stage=best.stage,
                best_epoch=best.epoch,
                best_scores=best.scores,
                rows=tuple(run.metrics("train") + run.metrics("finetune")),
                measured=tuple(measured),
                advice=advice,
                failed=failed,
                notes=tuple(note for _, each in entries if (note := caveat(each.key, len(learn)))),
                warning=warning,
            )
            run.write_results(finding.results())
            report = build_report(finding)
            report.section("Run")
            report.facts(run.summary())
            report.write(run.path("report.html"))
            for size, said in advice.items():
                mine = next(each for each in measured if each.nbytes == size)
                shares = f"recall@1 {mine.recall(1):.3f}, recall@10 {mine.recall(10):.3f}"
                say(f"{code_name(codes[sizes.index(size)])}: {shares}")
                say(said.sentence)
    by_bytes = {code.nbytes: code for code in codes}
    return Trained(out, catalyzer, by_bytes, weight, best.epoch, tuple(measured), advice)


def _candidates(
    nbytes: Sequence[int], kind: Kind, dims: Sequence[int]
) -> list[list[SphericalCode]]:
    """Return the choices of codes, each by rising bytes."""
    if len(set(nbytes)) < len(nbytes):
        raise InputError(f"--nbytes {' '.join(map(str, nbytes))}: give each once")
    if len(set(dims)) < len(dims) and len(nbytes) == 1:
        raise InputError(f"--dim {' '.join(map(str, dims))}: give each once")
    wanted: Sequence[int | None] = dims or [None] * len(nbytes)
    if len(nbytes) == 1:
        return [[code_for_bytes(nbytes[0], kind, dim)] for dim in wanted]
    if len(wanted) != len(nbytes):
        raise InputError(
            f"--dim: {len(dims)} for {len(nbytes)} --nbytes; give one for each, or none"
        )
    pairs = zip(nbytes, wanted, strict=True)
    codes = [code_for_bytes(size, kind, dim) for size, dim in pairs]
    return [sorted(codes, key=lambda code: code.nbytes)]


def _weights(koleo: list[float] | None) -> Sequence[float]:
    for weight in koleo or ():
        if not 0 <= weight < math.inf:
            raise InputError(f"--koleo {weight:g}: must be at least 0")
    if koleo and len(set(koleo)) < len(koleo):
        raise InputError(f"--koleo {' '.join(f'{weight:g}' for weight in koleo)}: give each once")
    return koleo or KOLEO


def _families(against: Sequence[str] | None) -> set[str]:
    families = set(against or ["opq"])
    if "none" in families and len(families) > 1:
        raise InputError("--against none: leave it out, or the others")
    return families


def _family(rival: Rival) -> str:
    """Return the letters that a rival's key begins with: opq of OPQ8_32,PQ8."""
    return "".join(takewhile(str.isalpha, rival.key)).lower()


def _warn(candidates: Sequence[Sequence[SphericalCode]], in_dim: int) -> str:
    largest = max(code.dim for codes in candidates for code in codes)
    if largest <= in_dim:
        return ""
    return (
        f"the output has {largest} dimensions and the vectors have {in_dim}; more than they have "
        "cannot help; give fewer with --dim or --nbytes"
    )
