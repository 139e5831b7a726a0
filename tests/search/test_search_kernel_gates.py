"""The spec of the kernel descriptor at desk scale: two photographs, each learned on the other."""

import functools

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates, maximum_filter
from sklearn.datasets import load_sample_image
from torch.nn.functional import normalize

from remanence.errors import InputError
from remanence.search.kernel_descriptor.descriptor import KernelDescriptor
from remanence.search.kernel_descriptor.evaluation import fpr95, matching_map
from remanence.search.kernel_descriptor.frames import frames_from_keypoints
from remanence.search.kernel_descriptor.homography import transform, verify
from remanence.search.kernel_descriptor.keypoints import Keypoints, detect_keypoints
from remanence.search.kernel_descriptor.matching import match
from remanence.search.kernel_descriptor.moments import Moments
from remanence.search.kernel_descriptor.patches import extract_patches
from remanence.search.kernel_descriptor.views import (
    patch_pairs,
    spaced,
    synthetic_views,
)
from remanence.search.kernel_descriptor.whitening import Whitening

NAMES = ("china", "flower")
PEER = "RootSIFT"
RAW, POLAR, CARTESIAN = "raw", "polar", "cartesian"
UNSUPERVISED = ("pca", "pcawt", "pcaws")
SUPERVISED = ("lw", "lws")


@functools.cache
def _image(name):
    return torch.from_numpy(load_sample_image(f"{name}.jpg").copy()).permute(2, 0, 1)


@functools.cache
def _hessian_keypoints(name):
    """Maxima of the determinant of the Hessian at 7 scales, which find more than SIFT does."""
    grey = _image(name).double().mean(0).numpy() / 255
    rows = []
    for sigma in 2 * 2 ** (np.arange(7) / 2):
        yy, xx, xy = (
            sigma**2 * gaussian_filter(grey, sigma, order) for order in ((2, 0), (0, 2), (1, 1))
        )
        response = xx * yy - xy**2
        y, x = np.nonzero((response == maximum_filter(response, 3)) & (response > 0))
        rows.append(np.stack([x, y, np.full(len(x), sigma), response[y, x]], axis=1))
    table = torch.from_numpy(np.concatenate(rows)).float()
    table = table[table[:, 3].argsort(descending=True, stable=True)]
    return Keypoints(table[:, :2], table[:, 2], torch.zeros(len(table)), table[:, 3])


@functools.cache
def _groups(name, seed):
    image = _image(name)
    keypoints = _hessian_keypoints(name)
    return patch_pairs(image, synthetic_views(image, seed=seed), keypoints=keypoints, seed=seed)


def rootsift(patches):
    """RootSIFT of patches (N, s, s): 4 x 4 cells of 8 directions, bilinear (Lowe 2004)."""
    size = patches.shape[-1]
    padded = torch.nn.functional.pad(patches[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    gx = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    gy = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    place = (torch.arange(size) + 0.5) / size * 2 - 1
    window = torch.exp(-(place**2)[:, None] / 4 - place**2 / 4)  # sigma is 1.4 half sides
    centres = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    across = (1 - (place - centres[:, None]).abs() / 0.375).clamp_min(0)  # (4, s)
    angle = torch.atan2(gy, gx) * (8 / (2 * torch.pi)) % 8
    turns = (angle[:, None] - torch.arange(8)[:, None, None]).abs()
    share = (1 - torch.minimum(turns, 8 - turns)).clamp_min(0)  # (N, 8, s, s)
    weighted = share * (torch.hypot(gx, gy) * window)[:, None]
    cells = torch.einsum("noyx,ay,bx->noab", weighted, across, across).flatten(1)
    clipped = normalize(normalize(cells, dim=1).clamp_max(0.2), dim=1)
    return normalize(clipped, p=1, dim=1).sqrt()


def _moments(vectors, valid):
    """Of all patches singly, and of each reference with its views."""
    moments = Moments(vectors.shape[-1])
    for view, seen in zip(vectors, valid, strict=True):
        moments.add(view[seen])
    for view, seen in zip(vectors[1:], valid[1:], strict=True):
        moments.add_pairs(vectors[0][seen], view[seen])
    return moments


def _measure(vectors, valid):
    """Mean matching AP over the views, and FPR95 on as many strangers as pairs; in percent."""
    precisions, similarity, label = [], [], []
    for number, (view, seen) in enumerate(zip(vectors[1:], valid[1:], strict=True)):
        first, second = vectors[0][seen], view[seen]
        precisions.append(matching_map(first, second))
        strangers = second.roll(number + 1, dims=0)
        for other, same in ((second, True), (strangers, False)):
            similarity.append(-(first - other).norm(dim=1))
            label.append(torch.full((len(first),), same))
    return 100 * np.mean(precisions), 100 * fpr95(torch.cat(similarity), torch.cat(label))


@functools.cache
def _figures(seed):
    """(mAP, FPR95) by image and descriptor; whitening learned on the other image."""
    raw, figures = {}, {}
    for name in NAMES:
        patches, valid = _groups(name, seed)
        flat = patches.flatten(0, 1)
        vectors = {
            PEER: rootsift(flat),
            RAW: KernelDescriptor()(flat).vectors,
            POLAR: KernelDescriptor("polar")(flat).vectors,
            CARTESIAN: KernelDescriptor("cartesian")(flat).vectors,
        }
        for key, each in vectors.items():
            figures[name, key] = _measure(each.unflatten(0, valid.shape), valid)
        raw[name] = vectors[RAW].unflatten(0, valid.shape), valid
    for name, other in zip(NAMES, reversed(NAMES), strict=True):
        moments = _moments(*raw[other])
        vectors, valid = raw[name]
        for kind in (*UNSUPERVISED, *SUPERVISED):
            white = Whitening.fit(moments, kind)(vectors.flatten(0, 1)).unflatten(0, valid.shape)
            figures[name, kind] = _measure(white, valid)
    return figures


def _assert_gates(figures):
    gains = []
    for name in NAMES:
        precision = {key: pair[0] for (image, key), pair in figures.items() if image == name}
        unsupervised = max(precision[kind] for kind in UNSUPERVISED)
        assert precision[RAW] >= precision[PEER] + 1
        assert unsupervised >= precision[RAW] + 2
        assert unsupervised >= precision[PEER] + 3  # 3.7 was the least of four seeds
        assert precision[POLAR] > precision[CARTESIAN]
        gains.append(unsupervised - precision[PEER])
    assert np.mean(gains) >= 4


def test_gates():
    _assert_gates(_figures(0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_gates_of_more_seeds(seed):
    _assert_gates(_figures(seed))


def test_shuffled_answers_are_near_nothing():
    patches, valid = _groups("flower", 0)
    vectors = KernelDescriptor()(patches.flatten(0, 1)).vectors.unflatten(0, valid.shape).clone()
    order = torch.randperm(valid.shape[1], generator=torch.Generator().manual_seed(0))
    vectors[1:] = vectors[1:, order]
    precision, false = _measure(vectors, torch.ones_like(valid))
    assert precision < 1
    assert false > 85


def test_rootsift_is_that_of_a_peer():
    kornia = pytest.importorskip("kornia")
    patches, valid = _groups("china", 0)
    theirs = kornia.feature.SIFTDescriptor(32, rootsift=True)
    with torch.no_grad():
        vectors = theirs(patches.flatten(0, 1)[:, None]).unflatten(0, valid.shape)
    assert _figures(0)["china", PEER] == pytest.approx(_measure(vectors, valid), abs=0.1)


# --- two images end to end


def _matched(first, second, whitening):
    """The decision on two images, as a user would ask for it."""
    found = []
    for image in (first, second):
        keypoints = detect_keypoints(image, 800)
        frames = frames_from_keypoints(keypoints.xy, keypoints.scale, keypoints.angle)
        vectors = KernelDescriptor()(extract_patches(image, frames).patches).vectors
        found.append((keypoints.xy, whitening(vectors)))
    (xy, ours), (uv, theirs) = found
    pairs = match(ours, theirs).indices
    x, y = xy[pairs[:, 0]].numpy(), uv[pairs[:, 1]].numpy()
    sizes = [tuple(image.shape[-2:]) for image in (first, second)]
    return verify(x, y, *sizes), sizes


def test_two_photographs_and_their_views():
    images = {name: _image(name) for name in NAMES}
    whitening = {}
    for name in NAMES:
        patches, valid = _groups(name, 0)
        vectors = KernelDescriptor()(patches.flatten(0, 1)).vectors
        whitening[name] = Whitening.fit(_moments(vectors.unflatten(0, valid.shape), valid))
    for name, other in zip(NAMES, reversed(NAMES), strict=True):
        for view in synthetic_views(images[name], views=3, seed=7):
            found, (size, _) = _matched(images[name], view.image, whitening[other])
            assert found.matched, found.reason
            corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * (size[1], size[0])
            wanted = transform(view.homography.numpy(), corners)
            assert np.abs(transform(found.homography, corners) - wanted).max() < 3
            stranger, _ = _matched(images[other], view.image, whitening[other])
            assert not stranger.matched
            assert stranger.score < 1


# --- the patches


def test_a_view_is_where_its_homography_says():
    image = _image("china")
    grey = (image.double() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0) / 255
    view = synthetic_views(image, views=1)[0]  # the first has no blur, and a gamma of 1
    generator = np.random.default_rng(0)
    x = generator.uniform((150, 100), (490, 330), (3000, 2))
    y = x @ view.homography[:2, :2].numpy().T + view.homography[:2, 2].numpy()
    y /= (x @ view.homography[2, :2].numpy() + 1)[:, None]
    was = map_coordinates(grey.numpy(), x.T[::-1], order=1)
    now = map_coordinates(view.image.numpy(), y.T[::-1], order=1)
    assert np.corrcoef(was, now)[0, 1] > 0.98
    beside = map_coordinates(view.image.numpy(), y.T[::-1] + 1.5, order=1)
    assert np.abs(beside - was).mean() > 1.5 * np.abs(now - was).mean()


def test_corners_move_by_at_most_12_percent():
    image = torch.zeros(100, 200)
    for view in synthetic_views(image, views=20):
        corners = torch.tensor([[-0.5, -0.5], [199.5, -0.5], [199.5, 99.5], [-0.5, 99.5]]).double()
        mapped = corners @ view.homography[:, :2].mT + view.homography[:, 2]
        moved = (mapped[:, :2] / mapped[:, 2:] - corners).abs()
        assert (moved <= torch.tensor([24.01, 12.01])).all()
        assert moved.max() > 1


def test_patches_of_a_place_agree_and_depend_on_the_seed_alone():
    patches, valid = _groups("china", 0)
    assert patches.shape[0] == 6
    assert patches.shape[2:] == (32, 32)
    assert patches.shape[1] == 500
    assert valid[0].all()
    assert valid.float().mean() > 0.8
    image = _image("china")
    keypoints, views = _hessian_keypoints("china"), synthetic_views(image, seed=0)
    again = patch_pairs(image, views, keypoints=keypoints, seed=0)
    assert torch.equal(again.patches, patches)
    exact = patch_pairs(image, views, keypoints=keypoints, jitter=None)

    def agreement(groups):
        a, b = (groups.patches[v][groups.valid[1]].flatten(1) for v in (0, 1))
        a, b = (normalize(v - v.mean(1, keepdim=True), dim=1) for v in (a, b))
        return float((a * b).sum(1).median())

    assert agreement(exact) > 0.95
    assert agreement(exact) > agreement(_groups("china", 0)) + 0.02


def test_chosen_key_points_are_spaced():
    generator = torch.Generator().manual_seed(0)
    xy, scale = (
        60 * torch.rand(400, 2, generator=generator),
        2 + 6 * torch.rand(400, generator=generator),
    )
    chosen = spaced(Keypoints(xy, scale, scale, scale))

    def clash(i, j):
        ratio = max(float(scale[i] / scale[j]), float(scale[j] / scale[i]))
        near = float((xy[i] - xy[j]).norm()) < 1.5 * max(float(scale[i]), float(scale[j]))
        return near and ratio < 1.5

    kept = []
    for i in range(400):
        if not any(clash(i, j) for j in kept):
            kept.append(i)
    assert chosen.tolist() == kept
    assert 20 < len(kept) < 300


def test_an_image_without_key_points_gives_no_patches():
    blank = torch.full((64, 64), 0.5)
    groups = patch_pairs(blank, synthetic_views(blank, views=2))
    assert groups.patches.shape == (3, 0, 32, 32)
    assert groups.valid.shape == (3, 0)


def test_bad_input():
    image = torch.zeros(40, 40)
    with pytest.raises(InputError, match="0 views"):
        synthetic_views(image, views=0)
    with pytest.raises(InputError, match="at most 0 places"):
        patch_pairs(image, [], most=0)
