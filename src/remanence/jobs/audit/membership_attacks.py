"""The attacks of `remanence audit membership`: which are run, what they need, their scores."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from remanence.audit.guard import image_features
from remanence.audit.membership import (
    ATTACKS,
    MIN_SIDE,
    References,
    fit_quantiles,
    inverse_hessian_attack,
    lineage,
    matt,
)
from remanence.errors import InputError
from remanence.jobs.audit.membership_samples import Samples, noted
from remanence.kit.evaluate import Normalise
from remanence.kit.models import Network

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# What the attacks on images or parameters are; those on signals describe themselves.
FURTHER = {
    "matt": "Sablayrolles et al. 2019, 1908.11229: knows the parameters and the checkpoint that "
    "they were fine-tuned from",
    "quantile": "Bertran et al. 2023, 2307.03694: sees the logits and the sample, and holds "
    "non-members",
    "iha": "Suri et al. 2024, 2406.11544: knows the parameters and every other training sample; a "
    "bound for auditors, because membership enters the score",
}
IHA_PARAMETERS = 10_000
QUANTILE_NONMEMBERS = 400  # half of them are fitted on, 15 % of these held out, at least 30


@dataclass(frozen=True)
class Given:
    """What the user gave that attacks may need."""

    references: bool
    labels: bool
    images: bool
    pretrained: bool


def describe_attack(name: str) -> str:
    """Source and threat model of an attack, in one line."""
    return FURTHER[name] if name in FURTHER else ATTACKS[name]().paper


def check_attacks(attacks: Sequence[str], given: Given) -> None:
    """Refuse attacks that are unknown, come twice, or lack what they need.

    Raises:
        InputError: Names the attack and the option that would serve it.
    """
    known = [*ATTACKS, *FURTHER]
    for name in attacks:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, cutoff=0.4) or known
            raise InputError(f"--attack {name}: unknown; give one of {', '.join(near)}")
        if attacks.count(name) > 1:
            raise InputError(f"--attack {name}: given twice; give it once")
        needs = {"matt": "pretrained", "quantile": "images", "iha": "images"}.get(name)
        if needs == "pretrained" and not given.pretrained:
            raise InputError(
                "--attack matt: needs --pretrained, the checkpoint that the model was fine-tuned "
                "from"
            )
        if needs == "images" and not given.images:
            raise InputError(f"--attack {name}: needs --model and images, not arrays")
        if name in FURTHER:
            continue
        if "references" in ATTACKS[name]().needs and not given.references:
            raise InputError(
                f"--attack {name}: needs reference models; give --references 16, "
                "--reference-pool or --reference-logits"
            )
        if "labels" in ATTACKS[name]().needs and not given.labels:
            raise InputError(
                f"--attack {name}: needs true labels; give --member-labels and --nonmember-labels"
            )
    if attacks and attacks[0] == "iha":
        raise InputError(
            "--attack iha: cannot come first; it knows who is a member, so no test can rest on it"
        )


def check_samples(attacks: Sequence[str], samples: Samples, pretrained: Network | None) -> None:
    """Refuse samples or a network that an attack cannot work with, before anything long.

    Raises:
        InputError: Names the attack and what it needs.
    """
    if pretrained is not None:
        model, start, _ = _start(samples, pretrained)
        lineage(model, start)  # refuses another architecture
    n, groups = int((~samples.member).sum()), samples.groups
    n_groups = n if groups is None else len(np.unique(groups[~samples.member]))
    if "quantile" in attacks and (n < QUANTILE_NONMEMBERS or n_groups < 2 * MIN_SIDE):
        raise InputError(
            f"--attack quantile: {n} non-members in {n_groups} groups; give at least "
            f"{QUANTILE_NONMEMBERS} in {2 * MIN_SIDE}, half of them to fit the quantiles"
        )
    if "iha" in attacks and samples.network is not None:
        count = sum(parameter.numel() for parameter in samples.network.model.parameters())
        if count > IHA_PARAMETERS:
            raise InputError(
                f"--attack iha: forms the exact Hessian, of up to {IHA_PARAMETERS:,} parameters; "
                f"{samples.network.name} has {count:,}"
            )


def usual_attacks(given: Given, references: References | None) -> list[str]:
    """The attacks where the user names none; the first is the primary one."""
    names = ["malt"]
    if references is not None:
        sides = references.member.any()
        names = ["mast", "lira" if sides else "lira-offline", "rmia", "malt"]
    if given.labels:
        names.append("zero-one")
    return names


@dataclass(frozen=True, eq=False)
class WhiteBox:
    """What attacks on parameters and images work with.

    Attributes:
        views: Pixels of the samples, uint8 (N, 3, K, K); None where no attack asks for them.
        pretrained: The checkpoint before fine-tuning.
        learning_rate: Of the audited model's training, for `iha`.
        weight_decay: Likewise.
        seed: Seed.
    """

    views: Tensor | None
    pretrained: Network | None
    learning_rate: float
    weight_decay: float
    seed: int


def score_attacks(
    attacks: Sequence[str],
    samples: Samples,
    references: References | None,
    box: WhiteBox,
    notes: list[str],
) -> tuple[dict[str, Floats], Bools]:
    """Score all samples.

    Returns:
        Scores (N,) of each attack, higher = more member-like, and which samples may be evaluated
        (N,): the quantile attack is fitted on half of the non-members, and no attack is judged on
        those.
    """
    further: dict[str, Callable[[], Floats]] = {
        "matt": lambda: _matt(samples, box, notes),
        "iha": lambda: _iha(samples, box),
    }
    evaluated = np.ones(len(samples), dtype=bool)
    scores = {}
    for name in attacks:
        if name == "quantile":
            scores[name], evaluated = _quantile(samples, box, notes)
        elif name in further:
            with noted(notes):
                scores[name] = further[name]()
        else:
            scores[name] = ATTACKS[name]().score(samples.signals, references)
    return scores, evaluated


@dataclass(frozen=True, eq=False)
class _Batches:
    """Normalised inputs and labels, 64 at a time; floats are made when they are read."""

    views: Tensor
    labels: Tensor
    normalise: Normalise

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(torch.split(self.views, 64), torch.split(self.labels, 64), strict=True):
            yield self.normalise(x), y


def _batches(samples: Samples, box: WhiteBox, rows: Bools | None = None) -> _Batches:
    assert samples.network is not None
    assert box.views is not None
    chosen = torch.from_numpy(np.flatnonzero(np.ones(len(samples)) if rows is None else rows))
    return _Batches(
        box.views if rows is None else box.views[chosen],
        torch.from_numpy(samples.signals.labels)[chosen],
        Normalise(samples.network.test.mean, samples.network.test.std),
    )


def _start(
    samples: Samples, pretrained: Network
) -> tuple[nn.Module, dict[str, Tensor], frozenset[str]]:
    """The audited model, the state it started from, and names that were not in it: a new head."""
    assert samples.network is not None
    model, before = samples.network.model, pretrained.model.state_dict()
    own = model.state_dict()
    fixed = {name for name in own if _in_head(name, samples.network)}
    fixed = {n for n in fixed if n not in before or before[n].shape != own[n].shape}
    start = {n: v for n, v in before.items() if not (fixed and _in_head(n, samples.network))}
    start |= {n: own[n] for n in own if fixed and _in_head(n, samples.network)}
    device = next(model.parameters()).device
    return model, {n: value.to(device) for n, value in start.items()}, frozenset(fixed)


def _matt(samples: Samples, box: WhiteBox, notes: list[str]) -> Floats:
    assert box.pretrained is not None
    model, start, fixed = _start(samples, box.pretrained)
    if fixed:
        notes.append(
            f"matt: the checkpoint has another head ({', '.join(sorted(fixed))}); the audited "
            "model's stands in its place and takes no part."
        )
    chosen = (lambda name: name not in fixed) if fixed else None
    found = lineage(model, start, parameters=chosen)
    notes.append(
        f"matt: the audited model lies {found.norm_ratio:.3g} times its own norm away from the "
        "checkpoint."
    )
    return matt(model, start, _batches(samples, box), parameters=chosen)


def _in_head(name: str, network: Network) -> bool:
    config = getattr(network.model, "pretrained_cfg", None) or {}
    heads = config.get("classifier") or ("fc", "head", "classifier")
    heads = (heads,) if isinstance(heads, str) else heads
    return any(name.startswith(f"{head}.") for head in heads)


def _iha(samples: Samples, box: WhiteBox) -> Floats:
    assert samples.network is not None
    return inverse_hessian_attack(
        samples.network.model,
        _batches(samples, box, samples.member),
        _batches(samples, box),
        samples.member,
        learning_rate=box.learning_rate,
        weight_decay=box.weight_decay,
    )


def _quantile(samples: Samples, box: WhiteBox, notes: list[str]) -> tuple[Floats, Bools]:
    # The network's own features would not do: the hinge is a function of them and the label.
    images = [look.images for look in samples.looks if look.images is not None]
    labels = samples.signals.labels
    classes = np.eye(max(2, samples.classes))[labels]
    x = torch.from_numpy(np.hstack([image_features(torch.cat(images)), classes])).float()
    hinge = samples.signals.hinge.mean(1)
    units = np.arange(len(samples)).astype(str) if samples.groups is None else samples.groups
    others = np.unique(units[~samples.member])
    drawn = np.random.default_rng(box.seed).permutation(others)[: len(others) // 2]
    fitted = np.isin(units, drawn) & ~samples.member
    # A column that hardly varies there says nothing, and would be far out of range elsewhere.
    x = x[:, x[torch.from_numpy(fitted)].std(0) > 1e-3]
    model = fit_quantiles(x[torch.from_numpy(fitted)], hinge[fitted], seed=box.seed)
    notes.append(
        f"quantile: fitted on {int(fitted.sum())} non-members by thumbnails and labels; every "
        "attack is judged without these."
    )
    return np.where(fitted, np.nan, model.score(x, hinge)), ~fitted
