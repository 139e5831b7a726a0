"""`remanence audit layers`: does a backbone, without its head, reveal its training images?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remanence.audit.dejavu import DepthProfile, LayerProbe, Pool, Protocol, Shadow
from remanence.audit.dejavu.depth_profile import profile
from remanence.audit.dejavu.features import DepthReader
from remanence.audit.duplicates import clusters, perceptual_hash
from remanence.audit.evidence import Check, Evidence
from remanence.audit.guard import ImageSet, guard
from remanence.errors import InputError
from remanence.jobs.audit.image_sets import image_sets, refuse_shared
from remanence.jobs.audit.layers_report import build_report, write_scores
from remanence.jobs.audit.outputs import pixels
from remanence.jobs.options import check_options
from remanence.kit.devices import launch
from remanence.kit.evaluate import Normalise
from remanence.kit.images import Images, open_images
from remanence.kit.models import Network, open_network
from remanence.kit.run import run_folder
from remanence.learn.fixres import find_head

FEWEST = 30  # images a set
SHADOW = ("shadow", "shadow_members", "shadow_nonmembers")
WITHOUT_SHADOW = ("members", "nonmembers", "public")


@dataclass(frozen=True)
class Layers:
    """What `layers` leaves behind.

    Attributes:
        out: Run folder.
        profile: AUC of every depth; its evidence holds no check but that of the input.
        evidence: The evidence of the deepest layer, with all checks.
        results: What `results.json` holds.
    """

    out: Path
    profile: DepthProfile
    evidence: Evidence
    results: dict[str, Any]


def layers(
    *,
    out: Path,
    model: str,
    members: str,
    nonmembers: str,
    public: str,
    layer: list[str] | None = None,
    protocol: Protocol = "head",
    pool: Pool = "avgmax",
    shadow: str | None = None,
    shadow_members: str | None = None,
    shadow_nonmembers: str | None = None,
    shadow_layer: list[str] | None = None,
    float16: bool = False,
    batch_size: int = 256,
    limit: int | None = None,
    skip_broken: bool = False,
    seed: int = 0,
) -> Layers:
    """Measure how well each layer of a network tells its training images from others.

    The head may be gone or tuned to another task: only the layers are read. What the deepest layer
    reveals is the test, declared by naming it; the other depths show where membership arises. At
    depth 0, the input, nothing may be revealed: where it is, the sets differ by themselves, and
    there is no verdict. The folder OUT holds the depth profile, all scores and a report.

    Args:
        out: Run folder to create.
        model: Folder of the network.
        members: Images that the network was trained on.
        nonmembers: Images of the same source that it was not trained on.
        public: Labelled images of the same source, other than both; they train the heads.
        layer: Name of a layer, from shallow to deep; may be given several times. If not given, all
            blocks with weights but the head.
        protocol: head: a new head on public images; classifier: some members are known; transfer:
            from a shadow network.
        pool: How maps become features: mean and maximum, or means over two by two cells.
        shadow: Folder of a network of your own, for the transfer protocol.
        shadow_members: Images that the shadow was trained on.
        shadow_nonmembers: Images that it was not trained on.
        shadow_layer: Name of a layer of the shadow, as many as there are of the network.
        float16: Keep features in half the memory.
        batch_size: Images a forward pass.
        limit: Use only so many images of each set.
        skip_broken: Leave unreadable images out and count them.
        seed: Seed of folds and samples.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k != "out"}
    check_options(options)
    _check(options)
    fabric = launch(1, "32-true")
    with run_folder(out, "audit layers", options, seed=seed, rank=fabric.global_rank) as run:
        network = open_network(model)
        network.model.to(fabric.device).eval()
        preprocess = Normalise(network.test.mean, network.test.std)
        # What is wrong with the layers' names is said before any image is read.
        example = torch.zeros(2, 3, network.test.size, network.test.size, dtype=torch.uint8)
        named = DepthReader(network.model, layer or "auto", pool, example, preprocess).layers
        named = named if layer else _without_head(network, named)
        sources = {
            "members": members,
            "nonmembers": nonmembers,
            "public": public,
            "shadow members": shadow_members,
            "shadow nonmembers": shadow_nonmembers,
        }
        images = {
            name: open_images(source, skip_broken=skip_broken, limit=limit)
            for name, source in sources.items()
            if source is not None
        }
        _check_images(images)
        sets = dict(zip(images, image_sets(list(images.values())), strict=True))
        refuse_shared({f"{name} images": (images[name].ids, sets[name]) for name in WITHOUT_SHADOW})
        checks = tuple(map(_in_our_words, guard(sets["members"], sets["nonmembers"], seed=seed)))
        views = {
            name: (pixels(network, given, name), torch.from_numpy(given.labels))
            for name, given in images.items()
        }
        probe = LayerProbe(
            network.model,
            named,
            pool,
            protocol,
            shadow=None if shadow is None else _shadow(shadow, network, views, shadow_layer, pool),
            batch_size=batch_size,
            preprocess=preprocess,
            dtype=torch.float16 if float16 else torch.float32,
            seed=seed,
        )
        together = _clusters(sets["members"], sets["nonmembers"])
        names, dims, scores = probe.scores(
            views["public"], views["members"], views["nonmembers"], together
        )
        m = len(images["members"])
        found = profile(
            protocol, names, dims, scores[:, :m], scores[:, m:], public=len(images["public"])
        )
        evidence = replace(found.membership, checks=(*found.membership.checks, *checks))
        results = {
            "protocol": protocol,
            **{name: len(given) for name, given in images.items()},
            "layers": [asdict(each) for each in found.layers],
            **evidence.to_dict(),
            "trend": found.trend.to_dict(),
        }
        if run.first:
            run.write_results(results)
            write_scores(names, scores, images, run.path("scores.parquet"))
            report = build_report(found, evidence, network.name)
            report.section("Run")
            report.facts(run.summary())
            report.write(run.path("report.html"))
    return Layers(out, found, evidence, results)


def _check(options: Mapping[str, Any]) -> None:
    given = [options[name] is not None for name in SHADOW]
    if options["protocol"] == "transfer" and not all(given):
        raise InputError(
            "--protocol transfer: give --shadow, --shadow-members and --shadow-nonmembers"
        )
    for name in (*SHADOW, "shadow_layer"):
        if options["protocol"] != "transfer" and options[name] is not None:
            raise InputError(f"--{name.replace('_', '-')}: is for --protocol transfer")
    if options["layer"] is not None and len(set(options["layer"])) < len(options["layer"]):
        raise InputError("--layer: give each name once")


def _check_images(images: Mapping[str, Images]) -> None:
    for name, given in images.items():
        if len(given) < FEWEST:
            raise InputError(
                f"{given.source}: give at least {FEWEST} images of {name}; there are {len(given)}"
            )
    if len(np.unique(images["public"].labels)) < 2:
        raise InputError(
            f"{images['public'].source}: the public images are all of one class; the heads need "
            "at least two"
        )
    # Without class names, a set knows only the labels that it happens to hold.
    named = {
        given.classes: given.source
        for given in images.values()
        if given.classes != tuple(map(str, range(len(given.classes))))
    }
    if len(named) > 1:
        (one, first), (other, second) = list(named.items())[:2]
        odd = sorted(set(one) ^ set(other)) or list(one)
        raise InputError(
            f"{first} and {second} have different classes ({', '.join(odd[:5])}); give all sets "
            "the same class folders or label names"
        )


def _without_head(network: Network, layers: tuple[str, ...]) -> tuple[str, ...]:
    try:
        head, _ = find_head(network.model, example=torch.zeros(1, 3, *[network.test.size] * 2))
    except InputError:  # it has none any more
        return layers
    kept = tuple(layer for layer in layers if layer != head and not layer.startswith(f"{head}."))
    return kept or layers


def _shadow(
    source: str,
    network: Network,
    views: Mapping[str, tuple[Tensor, Tensor]],
    layer: Sequence[str] | None,
    pool: Pool,
) -> Shadow:
    other = open_network(source)
    if other.test != network.test:
        raise InputError(
            f"{source}: the shadow prepares images otherwise ({other.test}) than the network "
            f"({network.test}); train it in the same way"
        )
    device = next(network.model.parameters()).device
    example, preprocess = views["public"][0][:2], Normalise(other.test.mean, other.test.std)
    auto = DepthReader(other.model.to(device).eval(), "auto", pool, example, preprocess).layers
    return Shadow(
        other.model,
        views["shadow members"],
        views["shadow nonmembers"],
        layer or _without_head(other, auto),
    )


def _clusters(members: ImageSet, nonmembers: ImageSet) -> Tensor:
    """Cluster of near duplicates of each candidate, members first: they share a fold."""
    sets = (members, nonmembers)
    hashes = [perceptual_hash(s.images) for s in sets if s.images is not None]
    digests = [np.asarray(s.digests) for s in sets]
    return torch.from_numpy(clusters(np.concatenate(hashes), same=[np.concatenate(digests)]))


def _in_our_words(check: Check) -> Check:
    def words(text: str) -> str:
        for theirs, ours in (("andidates", "embers"), ("references", "non-members")):
            text = text.replace(f"C{theirs}", f"M{ours}").replace(f"c{theirs}", f"m{ours}")
            text = text.replace(theirs, ours)
        return text

    return Check(words(check.assumption), check.holds, words(check.finding))
