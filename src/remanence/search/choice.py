"""Which code, which weight of KoLeo, and whether to use the method at all (arXiv 1806.03198)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist

from remanence.errors import InputError
from remanence.search.catalyzer.network import Catalyzer
from remanence.search.catalyzer.training import Settings, Training
from remanence.search.heldout import HeldOut, Score, mean_recall, merit, score, telling_rank
from remanence.search.lattice.counting import LARGEST, radius_for_bits, shell_sizes
from remanence.search.lattice.gosset import E8Shell
from remanence.search.lattice.leaders import MOST, leader_count
from remanence.search.lattice.sign import SignCode
from remanence.search.lattice.sphere import SphereLattice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from remanence.search.lattice.code import SphericalCode

Kind = Literal["lattice", "sign", "e8"]
BITS = 2.6  # a dimension: with more, dimensions are too few; with less, rounding is too coarse
FEW = 50_000  # training vectors from which the method is worth its training
E8_BYTES = 3  # of a shell of E8, at most: with 4, a search would look at too many leaders
SHORT = 50_000  # training vectors of a short training, at most


def code_for_bytes(nbytes: int, kind: Kind = "lattice", dim: int | None = None) -> SphericalCode:
    """Return the largest code of so many bytes.

    Args:
        nbytes: Bytes of a code, at least 1.
        kind: "lattice", "sign" (dimension 8 nbytes) or "e8" (dimension 8).
        dim: Dimension; for a lattice by default the multiple of 8 that comes nearest to 2.6 bits a
            dimension: 16 for 4 bytes, 24 for 8, 40 for 12, 48 for 16.

    Raises:
        InputError: There is no such code; those nearest to it are named.
    """
    if nbytes < 1:
        raise InputError(f"codes of {nbytes} bytes: give at least 1")
    if kind not in get_args(Kind):
        raise InputError(f"code {kind!r}: give one of {', '.join(get_args(Kind))}")
    if kind == "lattice":
        return _lattice(nbytes, dim)
    fixed = 8 * nbytes if kind == "sign" else 8
    if dim not in {None, fixed}:
        raise InputError(f"{kind} codes of {nbytes} bytes have dimension {fixed}, not {dim}")
    return SignCode(fixed) if kind == "sign" else _gosset(nbytes)


@dataclass(frozen=True)
class Trial:
    """A short training.

    Attributes:
        koleo: lambda.
        spread: L_koleo in the last epoch.
        uniform: What as many uniformly random vectors would give.
        scores: Recall on held-out queries, a code at a time.
    """

    koleo: float
    spread: float
    uniform: float
    scores: tuple[Score, ...]

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Trial:
        """Rebuild one from `dataclasses.asdict`, by way of JSON or not."""
        scores = tuple(Score.from_dict(each) for each in plain["scores"])
        return cls(plain["koleo"], plain["spread"], plain["uniform"], scores)


def tune(
    vectors: Tensor,
    held_out: HeldOut,
    candidates: Sequence[Sequence[SphericalCode]],
    koleos: Sequence[float] = (0.005, 0.01, 0.02, 0.05),
    *,
    settings: Settings,
    hidden: int = 1024,
    seed: int = 0,
    done: Sequence[Trial] = (),
    step: Callable[[], None] | None = None,
) -> Iterator[Trial]:
    """Train shortly with each choice of codes and lambda, and measure; `best_trial` then chooses.

    Under `torch.distributed` the processes train together, and the first one's figures count.

    Args:
        vectors: Training vectors (n, in_dim), on the device to train on.
        held_out: What to measure on; none of it may be among `vectors`.
        candidates: Choices of codes; several codes of one choice are nested in one catalyzer.
        koleos: Choices of lambda.
        settings: Of the full training, which `shortened` shortens.
        hidden: Width of the hidden layers.
        seed: Of weights and draws; the same for all trials.
        done: Trials that an interrupted run has finished; they are not repeated.
        step: Called after each step.

    Yields:
        The trials that are left; lambda changes faster than codes.

    Raises:
        InputError: There is no choice, a setting is out of range, or a training broke down.
    """
    grid = [(codes, koleo) for codes in candidates for koleo in koleos]
    if not grid:
        raise InputError("no codes or no lambda to choose from: give at least one of each")
    short, count = shortened(settings, len(vectors))
    drawn = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:count]
    some = vectors[drawn.sort().values.to(vectors.device)]
    neighbours = None
    for codes, koleo in grid[len(done) :]:
        dims = sorted({code.dim for code in codes})
        catalyzer = new_catalyzer(vectors.shape[1], dims, hidden=hidden, seed=seed).to(
            vectors.device
        )
        training = Training(catalyzer, some, replace(short, koleo=koleo), seed=seed)
        training.neighbours = neighbours  # the same for all
        *_, last = training.epochs(step)
        neighbours = training.neighbours
        found = [Trial(koleo, last.koleo, last.koleo_of_uniform, score(catalyzer, codes, held_out))]
        if training.world > 1:
            dist.broadcast_object_list(found, 0)
        yield found[0]


def trial_rank(trials: Sequence[Trial]) -> int:
    """Return the R whose recall tells trials apart."""
    return telling_rank(max(mean_recall(trial.scores, 10) for trial in trials))


def best_trial(trials: Sequence[Trial]) -> int:
    """Return which trial has the most `merit`, at the rank that tells; of equal ones, the first."""
    rank = trial_rank(trials)
    return max(range(len(trials)), key=lambda number: merit(trials[number].scores, rank))


def shortened(settings: Settings, n: int) -> tuple[Settings, int]:
    """Return the settings of a short training, and how many of n vectors it takes.

    A quarter of the epochs, on half of the vectors, at most 50,000: enough to put lambdas in order.
    """
    least = max(10 * settings.negative, 2 * settings.positives, settings.batch_size)
    count = min(max(min(n // 2, SHORT), least), n)
    return replace(settings, epochs=max(round(settings.epochs / 4), 1)), count


def new_catalyzer(
    in_dim: int, dims: Sequence[int], *, hidden: int = 1024, seed: int = 0
) -> Catalyzer:
    """Return an untrained catalyzer with weights drawn from a seed; arguments as `Catalyzer`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Catalyzer(in_dim, dims, hidden=hidden)


@dataclass(frozen=True)
class Comparison:
    """Ours and a rival on the same queries, at the same bytes.

    Attributes:
        rival: Its name.
        ours: Our recall, 0 to 1.
        theirs: Its recall, at the same rank.
        low: Lower end of the paired interval of ours - theirs; with several rivals, of intervals
            that hold together at 95 %.
        high: Its upper end.
    """

    rival: str
    ours: float
    theirs: float
    low: float
    high: float


@dataclass(frozen=True)
class Advice:
    """What to use.

    Attributes:
        choice: The method, the rival that is better, or "no difference".
        sentence: Why.
    """

    choice: str
    sentence: str


def advise(
    rows: Sequence[Comparison],
    *,
    rank: int,
    nbytes: int,
    queries: int,
    trained_on: int,
    in_dim: int,
    method: str = "catalyzer + lattice",
) -> Advice:
    """Say which code to use, from what was measured and no more.

    A rival is advised where one is surely better; ours where it is surely better than all.

    Args:
        rows: The comparisons; none where nothing was compared.
        rank: R of the recall that is compared.
        nbytes: Bytes of a code.
        queries: Queries that they rest on.
        trained_on: Training vectors.
        in_dim: Dimension of the vectors.
        method: Our name.
    """
    at = f"at {nbytes} byte{'s' * (nbytes > 1)}"
    better = [row for row in rows if row.high < 0]
    if not rows:
        choice, said = "not compared", f"Nothing was compared with {method} {at}"
    elif better:
        best = max(better, key=lambda row: row.theirs)
        choice = best.rival
        said = (
            f"Use {best.rival} {at}: its recall@{rank} is {_points(best.theirs - best.ours)} above "
            f"that of {method} (95 % interval {_points(-best.high)} to {_points(-best.low)})"
        )
    else:
        best = max(rows, key=lambda row: row.theirs)
        low, high = (f"{100 * value:+.1f}" for value in (best.low, best.high))
        if all(row.low > 0 for row in rows):
            choice = method
            said = (
                f"Use {method} {at}: its recall@{rank} is {_points(best.ours - best.theirs)} above "
                f"that of {best.rival} (95 % interval {low} to {high})"
            )
        else:
            choice = "no difference"
            said = (
                f"These {queries:,} queries show no difference between {method} and {best.rival} "
                f"{at} (recall@{rank}: {low} to {high} points), and {best.rival} is simpler"
            )
    if trained_on < FEW:
        said += (
            f"; the method wants {FEW:,} training vectors or more, and there were {trained_on:,}"
        )
    if 8 * nbytes >= in_dim:
        said += f"; with a bit or more for each of {in_dim} dimensions, scalar codes are simpler"
    return Advice(choice, f"{said}.")


def _points(difference: float) -> str:
    return f"{100 * difference:.1f} points"


def _lattice(nbytes: int, dim: int | None) -> SphereLattice:
    wanted = dim or max(8 * math.floor(nbytes / BITS + 0.5), 8)
    r2 = _radius(wanted, nbytes)
    if r2 is not None:
        return SphereLattice(wanted, r2)
    near = []
    for other in sorted(range(8, 8 * (nbytes + 8), 8), key=lambda each: abs(each - wanted)):
        found = _radius(other, nbytes)
        near += [] if found is None else [f"{other} (r2 {found})"]
        if len(near) == 3:
            break
    raise InputError(
        f"no lattice code takes {nbytes} bytes in dimension {wanted}: give dimension "
        f"{', '.join(near)}"
    )


def _radius(dim: int, nbytes: int) -> int | None:
    """Return the squared radius of the largest shell; None where none needs all the bytes."""
    bits = 8 * nbytes
    if dim < 2 or 2 * dim > 2**bits:
        return None
    r2 = radius_for_bits(dim, bits)
    needed = (shell_sizes(dim, r2)[r2] - 1).bit_length()
    if needed <= bits - 8 or leader_count(dim, r2) > MOST:
        return None
    return r2


def _gosset(nbytes: int) -> E8Shell:
    sizes = [0, *(240 * _cubes(m) for m in range(1, LARGEST // 8 + 1))]
    m = max(range(1, len(sizes)), key=lambda m: sizes[m] if sizes[m] <= 2 ** (8 * nbytes) else 0)
    if nbytes > E8_BYTES or sizes[m] <= 2 ** (8 * nbytes - 8):
        raise InputError(f"e8 codes take 1 to {E8_BYTES} bytes, not {nbytes}: use a lattice")
    return E8Shell(m)


def _cubes(m: int) -> int:
    """Return sigma_3(m), the sum of the cubes of m's divisors."""
    return sum(k**3 for k in range(1, m + 1) if m % k == 0)
