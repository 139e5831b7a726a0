"""Whitening of kernel descriptors on the Oxford affine sequences, learned on others. Slow."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from remanence.search.kernel_descriptor.descriptor import KernelDescriptor
from remanence.search.kernel_descriptor.evaluation import fpr95, matching_map
from remanence.search.kernel_descriptor.moments import Moments
from remanence.search.kernel_descriptor.views import View, patch_pairs
from remanence.search.kernel_descriptor.whitening import Whitening

OXFORD = Path(__file__).parents[1] / "../shared/data/oxford_affine"
SEQUENCES = ("bikes", "boat", "leuven", "wall")
SEEDS = (0, 1, 2)
KINDS = ("pcaw", "pcaws")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not OXFORD.exists(), reason="needs ../shared/data/oxford_affine"),
]


def _described(name, seed):
    """Descriptors (V + 1, N, D) of 700 places, and which of them are inside their image."""
    folder = OXFORD / name
    images = [
        torch.from_numpy(cv2.imread(str(folder / f"img{k}.png"), cv2.IMREAD_GRAYSCALE))
        for k in range(1, 7)
    ]
    views = [
        View(image, torch.from_numpy(np.loadtxt(folder / f"H1to{k}p")))
        for k, image in enumerate(images[1:], start=2)
    ]
    patches, valid = patch_pairs(images[0], views, most=700, size=64, seed=seed)
    return KernelDescriptor()(patches.flatten(0, 1)).vectors.unflatten(0, valid.shape), valid


def _measure(vectors, valid):
    """Mean matching AP, and FPR95 on as many strangers as pairs; in percent."""
    precisions, similarity, label = [], [], []
    for number, (view, seen) in enumerate(zip(vectors[1:], valid[1:], strict=True)):
        first, second = vectors[0][seen], view[seen]
        precisions.append(matching_map(first, second))
        for other, same in ((second, True), (second.roll(number + 1, dims=0), False)):
            similarity.append(-(first - other).norm(dim=1))
            label.append(torch.full((len(first),), same))
    return 100 * np.mean(precisions), 100 * fpr95(torch.cat(similarity), torch.cat(label))


@pytest.fixture(scope="module")
def figures():
    """(seed, sequence, mAP or FPR95) of each kind."""
    found = {kind: [] for kind in ("raw", *KINDS)}
    for seed in SEEDS:
        described = {name: _described(name, seed) for name in SEQUENCES}
        rows = {kind: [] for kind in found}
        for name, (vectors, valid) in described.items():
            moments = Moments(vectors.shape[-1])
            for other, (theirs, shown) in described.items():
                if other != name:
                    moments.add(theirs[shown])
            rows["raw"].append(_measure(vectors, valid))
            for kind in KINDS:
                whitened = Whitening.fit(moments, kind)(vectors.flatten(0, 1))
                rows[kind].append(_measure(whitened.unflatten(0, valid.shape), valid))
        for kind, values in rows.items():
            found[kind].append(values)
            precision, false = np.mean(values, axis=0)
            print(f"seed {seed}, {kind}: mAP {precision:.1f}, FPR95 {false:.1f}")
    return {kind: np.array(values) for kind, values in found.items()}


def test_shrunk_whitening_matches_better_than_raw(figures):
    gain = figures["pcaws"][..., 0].mean(axis=1) - figures["raw"][..., 0].mean(axis=1)
    assert (gain >= 7).all()


def test_shrunk_whitening_takes_fewer_strangers_than_raw(figures):
    gain = figures["raw"][..., 1].mean(axis=1) - figures["pcaws"][..., 1].mean(axis=1)
    assert (gain >= 5).all()


def test_full_whitening_takes_more_strangers_than_shrunk(figures):
    worse = figures["pcaw"][..., 1].mean(axis=1) - figures["pcaws"][..., 1].mean(axis=1)
    assert (worse > 0).all()
