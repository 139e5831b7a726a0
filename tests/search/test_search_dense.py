import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from sklearn.datasets import load_sample_image

from remanence.errors import InputError
from remanence.search.kernel_descriptor import dense as module
from remanence.search.kernel_descriptor.dense import dense_descriptors, dense_frames
from remanence.search.kernel_descriptor.descriptor import KernelDescriptor
from remanence.search.kernel_descriptor.grey import grey_image
from remanence.search.kernel_descriptor.patches import extract_patches
from remanence.search.kernel_descriptor.similarity_map import pixel_embedding


def _random(height, width, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    return torch.rand(height, width, dtype=dtype, generator=rng)


def _photo():
    return torch.from_numpy(load_sample_image("china.jpg")[100:260, 100:300].copy()).permute(
        2, 0, 1
    )


def _fields(image, patch):
    """Weights and directions of a whole image, by scipy and atan2."""
    sigma = 1.4 * patch / 64
    radius = 2 if patch <= 65 else int(np.ceil(3 * sigma))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    blurred = correlate1d(correlate1d(image, taps, 0, mode="nearest"), taps, 1, mode="nearest")
    padded = np.pad(blurred, 1, mode="edge")
    gx = padded[1:-1, :-2] - padded[1:-1, 2:]
    gy = padded[:-2, 1:-1] - padded[2:, 1:-1]
    return np.sqrt(np.hypot(gx, gy)), np.arctan2(gy, gx)


def _by_hand(image, descriptor, patch, stride):
    """Descriptors of windows of the whole image's fields, one by one."""
    weight, theta = (torch.from_numpy(v) for v in _fields(image.double().numpy(), patch))
    rows = []
    for i in range(0, image.shape[0] - patch + 1, stride):
        for j in range(0, image.shape[1] - patch + 1, stride):
            cut = slice(i, i + patch), slice(j, j + patch)
            vector = pixel_embedding(descriptor, theta[cut]) @ weight[cut].flatten()
            parts = [vector] if descriptor.kind != "concat" else torch.split(vector, [175, 63])
            rows.append(torch.cat([p / p.norm() for p in parts]) / len(parts) ** 0.5)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["polar", "cartesian", "concat"])
@pytest.mark.parametrize(
    ("patch", "stride", "shape"),
    [(8, 1, (13, 11)), (9, 4, (30, 23)), (12, 5, (27, 43)), (8, 11, (31, 20)), (70, 7, (80, 95))],
)
def test_descriptors_are_those_of_windows_of_the_whole_images_fields(kind, patch, stride, shape):
    image, descriptor = _random(*shape), KernelDescriptor(kind)
    found = dense_descriptors(image, descriptor, patch, stride)
    grid = tuple((n - patch) // stride + 1 for n in shape)
    assert found.vectors.shape == (descriptor.dim, *grid)
    assert found.valid.shape == grid
    assert bool(found.valid.all())
    wanted = _by_hand(image, descriptor, patch, stride)
    torch.testing.assert_close(found.vectors.flatten(1).mT, wanted, rtol=0, atol=1e-9)
    single = dense_descriptors(image.float(), descriptor, patch, stride).vectors
    torch.testing.assert_close(single.double(), found.vectors, rtol=0, atol=1e-5)


@pytest.mark.parametrize("normalise", [True, False])
def test_an_image_of_one_patch_is_that_patch(normalise):
    image, descriptor = _random(32, 32), KernelDescriptor(normalise=normalise)
    found = dense_descriptors(image, descriptor, 32).vectors
    assert found.shape == (238, 1, 1)
    torch.testing.assert_close(found[:, 0, 0], descriptor(image[None]).vectors[0])


def test_frames_cut_the_patches_pixel_by_pixel():
    image = _random(45, 52)
    frames = dense_frames(45, 52, patch=16, stride=5)
    patches, inside = extract_patches(image, frames, size=16)
    assert bool(inside.all())
    wanted = image.unfold(0, 16, 5).unfold(1, 16, 5).flatten(0, 1)
    torch.testing.assert_close(patches, wanted)
    assert len(frames) == dense_descriptors(image, KernelDescriptor(), 16, 5).valid.numel()


def test_descriptors_are_close_to_those_of_cut_patches():
    image, descriptor = _photo(), KernelDescriptor()
    found = dense_descriptors(image, descriptor, 32, 8)
    cut = extract_patches(image, dense_frames(*image.shape[1:], 32, 8)).patches
    plain = descriptor(cut)
    both = plain.valid & found.valid.flatten()
    cosine = (found.vectors.flatten(1).mT * plain.vectors).sum(1)[both]
    assert float(both.float().mean()) > 0.9
    assert float(cosine.median()) > 0.997
    assert float(cosine.quantile(0.05)) > 0.99
    # Not so its neighbours, eight pixels off.
    shifted = (found.vectors[:, :, 1:] * found.vectors[:, :, :-1]).sum(0)
    assert float(shifted.median()) < 0.96


def test_flat_places_are_zero_and_marked():
    image = torch.full((40, 100), 0.5)
    image[:, 70:] = _random(40, 30, torch.float32)
    found = dense_descriptors(image, KernelDescriptor(), 16, 4)
    edge = (70 - 16 - 2) // 4  # the last places that do not see the texture, nor its blur
    assert not bool(found.valid[:, :edge].any())
    assert not bool(found.vectors[:, :, :edge].any())
    assert bool(found.valid[:, -7:].all())
    torch.testing.assert_close(found.vectors.norm(dim=0), found.valid.float())
    sums = dense_descriptors(image, KernelDescriptor(normalise=False), 16, 4)
    assert not bool(sums.vectors[:, :, :edge].any())


def test_chunks_do_not_matter(monkeypatch):
    image = grey_image(_photo())
    whole = dense_descriptors(image, KernelDescriptor(), 16, 8)
    monkeypatch.setattr(module, "CPU_PLACES", 3)
    parts = dense_descriptors(image, KernelDescriptor(), 16, 8)
    torch.testing.assert_close(parts.vectors, whole.vectors, rtol=0, atol=1e-6)
    assert torch.equal(parts.valid, whole.valid)


def test_precision_of_convolutions_is_given_back():
    before = torch.backends.cudnn.conv.fp32_precision
    dense_descriptors(_random(20, 20), KernelDescriptor(), 16)
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_bad_inputs_are_refused():
    with pytest.raises(InputError, match="at least 8"):
        dense_descriptors(_random(20, 20), KernelDescriptor(), 7)
    with pytest.raises(InputError, match="stride"):
        dense_descriptors(_random(20, 20), KernelDescriptor(), 8, 0)
    with pytest.raises(InputError, match="larger image"):
        dense_descriptors(_random(20, 31), KernelDescriptor(), 24)
