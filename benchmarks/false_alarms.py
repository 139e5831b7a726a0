"""False alarms of the three audits: networks that are innocent, audited 200 times at level 0.05.

Candidates and references are random halves of images that the audited network never saw; carriers
come from keys that nobody used to mark anything. Beside every count stands what the same audit
finds where there is something to find. Then the guard: are candidates that were changed, or come
from another source, reported as such?
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from harness import SHARED
from remanence.audit.dejavu import PairedBettingTest, run_test, top_margin
from remanence.audit.guard import ImageSet, guard
from remanence.audit.membership import (
    ATTACKS,
    ReferencePool,
    balanced_design,
    mann_whitney_log10_p,
    references_from_logits,
    signals_from_logits,
    train_references,
)
from remanence.audit.radioactive import (
    AlignmentSums,
    FeatureExtractor,
    SecretKey,
    carriers,
    detect_whitebox,
    solve_alignment,
)
from remanence.claims.scenes import draw_scenes
from remanence.kit.images import open_images

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Audit = Callable[[NDArray[np.int64], NDArray[np.int64], int], bool]

LEVEL = 0.05
SIDE = 16
SAME = "unseen"
CIFAR10 = SHARED / "cifar10"


@dataclass(frozen=True)
class Study:
    """Networks trained on halves of a pool of images, and the images beyond the pool.

    Attributes:
        pixels: (N, 3, h, w) uint8, the pool first.
        inputs: (N, 3, 16, 16), as the networks get them.
        labels: (N,).
        networks: K trained networks; `networks.design` is (K, pool).
        logits: (K, N, C).
        rng: For every draw.
    """

    pixels: Tensor
    inputs: Tensor
    labels: Tensor
    networks: ReferencePool
    logits: Tensor
    rng: np.random.Generator

    @property
    def members(self) -> list[NDArray[np.int64]]:
        """What each network was trained on."""
        return [np.flatnonzero(row) for row in self.networks.design]

    @property
    def beyond(self) -> NDArray[np.int64]:
        """Images that no network was trained on."""
        return np.arange(self.networks.design.shape[1], len(self.labels))

    def halves(self, pool: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
        """Two random disjoint sets."""
        return np.split(self.rng.choice(pool, 2 * size, replace=False), 2)


def network(classes: int) -> nn.Module:
    """Return a small convolutional network that overfits a few thousand images."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    width = 64 * (SIDE // 4) ** 2
    head = [nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, classes)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


def shrunk(pixels: Tensor, like: Tensor) -> Tensor:
    """Resize to 16 pixels and normalise with the statistics of `like`."""

    def small(x: Tensor) -> Tensor:
        parts = [
            nn.functional.interpolate(p.float(), SIDE, mode="area") for p in torch.split(x, 5000)
        ]
        return torch.cat(parts)

    reference = small(like)
    mean, std = (f((0, 2, 3), keepdim=True) for f in (reference.mean, reference.std))
    return (small(pixels) - mean) / std


def prepare(options: argparse.Namespace) -> Study:
    """Open the images, train the networks."""
    images = open_images(options.data, split="train", limit=options.limit, show=False)
    rng = np.random.default_rng(options.seed)
    order = rng.permutation(len(images))
    decoded = np.stack([np.asarray(images.image(int(i))) for i in order])
    pixels = torch.from_numpy(decoded).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(images.labels[order])
    inputs = shrunk(pixels, pixels)
    pool = min(options.pool, len(images) // 3)
    design = balanced_design(options.networks, pool, seed=options.seed)
    networks = train_references(
        partial(network, len(images.classes)),
        inputs[:pool],
        labels[:pool],
        design,
        epochs=options.epochs,
        batch_size=64,
        lr=0.05,
        vectorize=False,
        seed=options.seed,
    )
    return Study(pixels, inputs, labels, networks, networks.logits(inputs), rng)


def membership_audits(study: Study, attack: str) -> tuple[Audit, list[NDArray[np.int64]]]:
    """Attack with references; half of the other networks were trained on each image of the pool."""
    pool = study.networks.design.shape[1]
    references = references_from_logits(
        study.logits[:, :pool], study.labels[:pool], study.networks.design
    )
    scores, unseen = [], []
    for k in range(len(study.networks)):
        target, others, member = references.leave_out(k)
        scores.append(ATTACKS[attack]().score(target, others))
        unseen.append(np.flatnonzero(~member))

    def audit(called: NDArray[np.int64], others: NDArray[np.int64], k: int) -> bool:
        rows = np.concatenate((called, others))
        log10_p = mann_whitney_log10_p(scores[k][rows], np.arange(len(rows)) < len(called))
        return log10_p <= math.log10(LEVEL)

    return audit, unseen


def dejavu_audits(study: Study, test: str) -> Audit:
    """One test of Deja Vu, with labels or without."""
    label_free = [top_margin(logits) for logits in study.logits]
    labelled = [signals_from_logits(logits, study.labels).margin[:, 0] for logits in study.logits]

    def audit(candidate: NDArray[np.int64], reference: NDArray[np.int64], k: int) -> bool:
        if test == "betting":
            bets = PairedBettingTest(LEVEL, seed=int(study.rng.integers(2**31)))
            bets.update(labelled[k][candidate], labelled[k][reference])
            return bets.decided
        scores = label_free[k] if test == "ks1" else labelled[k]
        outcome = run_test(test, scores[candidate], scores[reference])  # type: ignore[arg-type]  # named in main
        return outcome.log10_p <= math.log10(LEVEL)

    return audit


def count(
    study: Study,
    audit: Audit,
    unseen: list[NDArray[np.int64]],
    audits: int,
    largest: int,
) -> tuple[int, int, int]:
    """Images a side, alarms on unseen candidates, and on trained ones."""
    size = min(largest, *(len(p) // 2 for p in unseen), *(len(m) for m in study.members))
    alarms = found = 0
    for number in range(audits):
        k = number % len(unseen)
        candidate, reference = study.halves(unseen[k], size)
        alarms += audit(candidate, reference, k)
        members = study.rng.choice(study.members[k], size, replace=False)
        found += audit(members, reference, k)
    return size, alarms, found


def radioactive_audits(study: Study, audits: int, *, projected: bool) -> tuple[int, int]:
    """Alarms of random secret keys on clean networks, and on heads with planted marks.

    Networks take turns as the marking network and as the suspect, whose head is aligned to it on
    images that neither saw; two others serve as clean references where `projected`.
    """
    extractors = [
        FeatureExtractor(study.networks.model(k), input_size=(3, SIDE, SIDE))
        for k in range(len(study.networks))
    ]
    clean = study.beyond[:4000]
    labels = study.labels[clean].numpy()
    with torch.no_grad():
        features = [
            torch.cat([e(x) for x in torch.split(study.inputs[clean], 1000)]) for e in extractors
        ]
    alarms = found = 0
    for _ in range(audits):
        marker, *others = study.rng.permutation(len(extractors))[: 4 if projected else 2]
        key = SecretKey.from_bytes(study.rng.bytes(32))
        secret = carriers(key, study.logits.shape[2], extractors[marker].dim)
        aligned = []
        for other in others:
            alignment = solve_alignment(AlignmentSums.of(features[marker], features[other]))
            head = extractors[other].head
            assert head is not None
            aligned.append(alignment.align(head.weight))
        suspect, *references = aligned
        innocent = detect_whitebox(suspect, None, secret, reference=references, level=LEVEL)
        alarms += innocent.evidence.verdict == "detected"
        x = features[marker].double().numpy()
        planted, rest = planted_heads(x, labels, secret, study.rng)
        references = [rest] if projected else []
        guilty = detect_whitebox(planted, None, secret, reference=references, level=LEVEL)
        found += guilty.evidence.verdict == "detected"
    return alarms, found


def planted_heads(
    x: NDArray[np.float64],
    labels: NDArray[np.int64],
    secret: NDArray[np.float64],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Ridge regression: with a tenth of the features moved along carriers, and without these."""
    marked, rest = np.split(rng.permutation(len(x)), [len(x) // 10])
    moved = x - x.mean(0)
    moved[marked] += 0.5 * math.sqrt(moved.var(0).sum()) * secret[labels[marked]]
    targets = np.eye(len(secret))[labels]

    def head(rows: NDArray[np.int64]) -> Tensor:
        gram = moved[rows].T @ moved[rows]
        ridge = 0.01 * np.trace(gram) / len(gram) * np.eye(len(gram))
        return torch.from_numpy(np.linalg.solve(gram + ridge, moved[rows].T @ targets[rows]).T)

    return head(np.arange(len(x))), head(rest)


def shifts(study: Study) -> dict[str, Tensor]:
    """Return versions of the images beyond the pool, and images of another source."""
    pixels = study.pixels[study.beyond]
    scenes = torch.from_numpy(draw_scenes(1)[0])[:, None].float()
    other = nn.functional.interpolate(scenes, pixels.shape[2:], mode="area").round().byte()
    return {
        SAME: pixels,
        "brightness +20": (pixels.short() + 20).clamp(0, 255).byte(),
        "blur, 1 pixel": gaussian_blur(pixels, [5, 5], [1.0, 1.0]),
        "another source": other.expand(-1, 3, -1, -1),
    }


def guarded(
    study: Study, name: str, changed: Tensor, comparisons: int, audits: int, largest: int
) -> list[str]:
    """How often the guard reports a shift, and how often KS alone, two- or one-sided, alarms.

    The networks are less sure of changed images, which a careless auditor takes as references.
    """
    beyond = study.pixels[study.beyond]
    size = min(largest, len(beyond) // 2, len(changed))

    def draw() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        candidate, reference = study.halves(np.arange(len(beyond)), size)
        if name != SAME:
            reference = study.rng.choice(len(changed), size, replace=False)
        return candidate, reference

    reported = 0
    for number in range(comparisons):
        candidate, reference = draw()
        sides = ImageSet(images=beyond[candidate]), ImageSet(images=changed[reference])
        checks = guard(*sides, level=LEVEL, seed=number)
        reported += any(check.holds is False for check in checks)
    alarms = {"ks": 0, "ks1": 0}
    inputs = shrunk(changed, study.pixels)
    for k in (0, 1):
        model = study.networks.model(k)
        with torch.no_grad():
            logits = torch.cat([model(x) for x in torch.split(inputs, 1000)])
        margins = top_margin(study.logits[k][study.beyond]), top_margin(logits)
        for _ in range(audits // 2):
            candidate, reference = draw()
            scores = margins[0][candidate], margins[1][reference]
            alarms["ks"] += run_test("ks", *scores).log10_p <= math.log10(LEVEL)
            alarms["ks1"] += run_test("ks1", *scores).log10_p <= math.log10(LEVEL)
    return [f"{reported} of {comparisons}", *(f"{n} of {audits}" for n in alarms.values())]


def main() -> None:
    """Train, audit, print two tables."""
    options = _options()
    torch.set_num_threads(1)
    console = Console()
    if not console.is_terminal:
        console.width = 110
    study = prepare(options)
    right = (study.logits.argmax(2) == study.labels).numpy()
    pool = study.networks.design.shape[1]
    seen = float(right[:, :pool][study.networks.design].mean())
    unseen = float(right[:, pool:].mean())
    print(
        f"{options.data}: {len(study.networks)} networks, each trained on "
        f"{len(study.members[0]):,} of {len(study.labels):,} images; accuracy {seen:.1%} on these, "
        f"{unseen:.1%} on images that no network saw"
    )
    audits = options.audits
    limit = int(stats.binom.ppf(0.975, audits, LEVEL))
    rows = []
    for attack, name in (("mast", "MAST, references"), ("malt", "MALT, one threshold")):
        audit, pools = membership_audits(study, attack)
        found = count(study, audit, pools, audits, options.size)
        rows.append(["membership", name, *found])
    for test, name in (
        ("ks1", "KS, one-sided, no labels"),
        ("mw_loss", "rank test, labels"),
        ("betting", "betting, labels"),
    ):
        everywhere = [study.beyond] * len(study.networks)
        found = count(study, dejavu_audits(study, test), everywhere, audits, options.size)
        rows.append(["dejavu", name, *found])
    for projected, name in ((False, "white-box"), (True, "white-box, references out")):
        rows.append(
            ["radioactive", name, "", *radioactive_audits(study, audits, projected=projected)]
        )
    show(
        console,
        f"{audits} audits at level {LEVEL:g}",
        ["audit", "test", "images a side", "alarms, innocent", "limit", "alarms, guilty"],
        [[*row[:4], limit, row[4]] for row in rows],
    )
    print(
        "A test that keeps its level exceeds the limit with a chance below 2.5 %; one of seven "
        "does so about once in seven studies. Guilty: candidates are training images; heads of "
        "features of which a tenth was marked."
    )
    show(
        console,
        "references of the same and of other sources",
        ["candidates", "references", "guard reports a shift", "KS alarms", "one-sided KS alarms"],
        [
            ["unseen", name, *guarded(study, name, changed, options.guarded, audits, options.size)]
            for name, changed in shifts(study).items()
        ],
    )


def show(console: Console, title: str, columns: list[str], rows: list[list[object]]) -> None:
    """Print a table; the first two columns are words."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)


def _options() -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("--data", default=str(CIFAR10) if CIFAR10.exists() else "digits", help="image source")
    add("--limit", type=int, default=30_000, help="images to read")
    add("--pool", type=int, default=6000, help="images that networks are trained on halves of")
    add("--networks", type=int, default=8)
    add("--epochs", type=int, default=12)
    add("--audits", type=int, default=200, help="of each test")
    add("--guarded", type=int, default=20, help="comparisons under the guard for each shift")
    add("--size", type=int, default=500, help="images a side, at most")
    add("--seed", type=int, default=0)
    return options.parse_args()


if __name__ == "__main__":
    main()
