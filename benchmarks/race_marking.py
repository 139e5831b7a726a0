"""Race of marking: remanence's `mark` and the loop of the authors' code, image by image.

Both take as many steps on the same images with the same network and carriers; the marks are then
measured in one and the same way. Before that, what detection costs: the memory of the alignment,
which must not grow with the images, and the time of the test itself for 1,000 classes.
"""

from __future__ import annotations

import random
import resource
import time
import warnings
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.optim.swa_utils import update_bn
from torchvision.transforms import RandomResizedCrop

import harness
from remanence.audit.membership import train_references
from remanence.audit.radioactive import (
    AlignmentSums,
    FeatureExtractor,
    MarkConfig,
    MarkingInfeasible,
    RandomResizedCropFlip,
    SecretKey,
    carriers,
    detect,
    mark,
    prepare_head,
    solve_alignment,
)
from remanence.kit.images import open_images

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RADIUS, LAMBDA_IMAGE, LAMBDA_FEATURE = 10.0, 5e-4, 1e-2


@dataclass(frozen=True)
class Course:
    """Images to mark and what to mark them with.

    Attributes:
        images: uint8 (3, H, W) each, on the CPU.
        labels: (N,).
        network: The marking network, on the device.
        carriers: (K, d).
        size: Side of the crop.
        iterations: Steps.
        batch_size: Images that ours takes at once.
        device: Where the network is.
        trained: Whether the network is; with random weights only the speed tells anything.
    """

    images: list[Tensor]
    labels: Tensor
    network: FeatureExtractor
    carriers: Tensor
    size: int
    iterations: int
    batch_size: int
    device: torch.device
    trained: bool

    def lap(self, marked: list[Tensor], seconds: float, steps: int) -> harness.Lap:
        """Measure the marks through the same 16 crops for all, as training would see them."""
        torch.manual_seed(1)
        crop = RandomResizedCrop(self.size, antialias=True)
        dots, psnr = [], []
        for before, after, label in zip(self.images, marked, self.labels, strict=True):
            pair = torch.stack((before, after)).float()
            views = normalised(torch.cat([crop(pair) for _ in range(16)]))
            with torch.no_grad():
                features = self.network(views.to(self.device)).cpu().double()
            dots.append(float(((features[1::2] - features[::2]) @ self.carriers[label]).mean()))
            error = (before.double() - after.double()).square().mean()
            psnr.append(float(20 * np.log10(255) - 10 * torch.log10(error)))
        facts = {"steps": float(steps), "PSNR, dB": median(psnr)}
        if self.trained:
            facts["dot product"] = float(np.mean(dots))
        return harness.Lap(len(marked), seconds, facts)

    def wait(self) -> float:
        """Wait for the device; return the time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def grey(image: Tensor) -> Tensor:
    """Grey levels of a normalised image (3, H, W)."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return 255 * (image * std + mean)


def normalised(image: Tensor) -> Tensor:
    """Normalise grey levels (..., 3, H, W)."""
    mean, std = (torch.tensor(v, device=image.device)[:, None, None] for v in (MEAN, STD))
    return (image.float() / 255 - mean) / std


def centre(image: Tensor, size: int) -> Tensor:
    """Resize the shorter side to 8/7 of the crop, antialiased, and cut the centre."""
    scale = round(size * 256 / 224) / min(image.shape[1:])
    shape = [round(scale * n) for n in image.shape[1:]]
    small = interpolate(image[None].float(), shape, mode="bilinear", antialias=True)
    top, left = ((n - size) // 2 for n in shape)
    return small[0, :, top : top + size, left : left + size]


def ours(course: Course, config: MarkConfig) -> harness.Lap:
    """Mark in batches."""
    began = course.wait()
    with warnings.catch_warnings(action="ignore", category=MarkingInfeasible):
        marked = mark(
            course.images,
            course.labels,
            course.network,
            course.carriers,
            mean=MEAN,
            std=STD,
            config=config,
            batch_size=course.batch_size,
        )
    return course.lap(marked.images, course.wait() - began, config.iterations)


def official(course: Course) -> harness.Lap:
    """Mark as the authors' code does: one image after the other, which stays on the CPU."""
    began = course.wait()
    random.seed(0)
    torch.manual_seed(0)
    marked = [
        official_image(course, image, course.carriers[label].float())
        for image, label in zip(course.images, course.labels, strict=True)
    ]
    return course.lap(marked, course.wait() - began, course.iterations)


def official_image(course: Course, image: Tensor, carrier: Tensor) -> Tensor:
    """SGD at step size 1 on one image; rounded in every tenth step, truncated at the end."""
    original = normalised(image)
    reach = (RADIUS / 255 / torch.tensor(STD))[:, None, None]
    direction = carrier.to(course.device)
    with torch.no_grad():
        view = normalised(centre(image, course.size))
        reference = course.network(view[None].to(course.device))[0]
    marked = original.clone().requires_grad_()
    optimizer = torch.optim.SGD([marked], lr=1.0)
    for step in range(course.iterations):
        seen = random_crop(marked, course.size).to(course.device)
        moved = course.network(seen)[0] - reference
        loss = (
            LAMBDA_FEATURE * moved.norm()
            - moved @ direction
            + LAMBDA_IMAGE * (marked - original).square().sum().to(course.device)
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        with torch.no_grad():
            marked.copy_(torch.clamp(marked, original - reach, original + reach))
            if step % 10 == 0:
                marked.copy_(normalised(grey(marked).round().clamp(0, 255)))
    return grey(marked.detach()).clamp(0, 255).to(torch.uint8)


def random_crop(image: Tensor, size: int) -> Tensor:
    """A random resized crop, not antialiased, and flip: (1, 3, size, size)."""
    box = RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
    top, left, height, width = box
    cut = image[None, :, top : top + height, left : left + width]
    cut = interpolate(cut, (size, size), mode="bilinear", align_corners=False)
    cut = cut.clamp(image.detach().min(), image.detach().max())
    return cut.flip(3) if random.random() < 0.5 else cut  # noqa: S311  # as the authors' code draws


def photographs(options: argparse.Namespace, device: torch.device) -> Course:
    """ResNet-18 with random weights on photographs, or on noise where there are none."""
    source = harness.SHARED / "clothing"
    size, count = options.size, options.photographs
    if source.exists():
        images = open_images(str(source), split="test", limit=count, show=False)
        pixels = [torch.from_numpy(np.array(images.image(i))) for i in range(count)]
        tensors = [x.permute(2, 0, 1).contiguous() for x in pixels]
        labels = torch.from_numpy(images.labels)
    else:
        generator = torch.Generator().manual_seed(0)
        shape = (count, 3, size * 8 // 7, size * 3 // 2)
        tensors = list(torch.randint(256, shape, dtype=torch.uint8, generator=generator))
        labels = torch.arange(count) % 10
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None, num_classes=10)
    # Statistics of real images, without which features hardly depend on them.
    update_bn([torch.stack([normalised(centre(x, size)) for x in tensors])], network)
    extractor = FeatureExtractor(network.to(device), input_size=(3, size, size))
    secret = drawn(extractor.dim)
    return Course(
        tensors, labels, extractor, secret, size, options.iterations, 16, device, trained=False
    )


def small_images(options: argparse.Namespace, device: torch.device) -> Course:
    """A small trained network on images of 32 pixels: CIFAR-10, or digits where there is none."""
    source = harness.SHARED / "cifar10"
    given = str(source) if source.exists() else "digits"
    images = open_images(given, split="train", limit=5000 + options.images, show=False)
    decoded = np.stack([np.asarray(images.image(i)) for i in range(len(images))])
    pixels = torch.from_numpy(decoded).permute(0, 3, 1, 2)
    pixels = interpolate(pixels.float(), (32, 32), mode="bilinear").round().byte()
    labels = torch.from_numpy(images.labels)
    rest = len(images) - options.images
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    trained = train_references(
        lambda: network,
        pixels[:rest],
        labels[:rest],
        np.ones((1, rest), dtype=bool),
        epochs=8,
        batch_size=64,
        lr=0.1,
        prepare=normalised,
        vectorize=False,
        device=device,
    )
    extractor = FeatureExtractor(trained.model(0), input_size=(3, 32, 32))
    chosen, secret = list(pixels[rest:]), drawn(extractor.dim)
    labels = labels[rest:]
    return Course(
        chosen, labels, extractor, secret, 32, options.iterations, 64, device, trained=True
    )


def drawn(dim: int) -> Tensor:
    """Return the carriers of a fixed key for ten classes."""
    return torch.from_numpy(carriers(SecretKey.from_bytes(bytes(32)), 10, dim))


def detection_costs() -> None:
    """Print the memory of a streamed alignment and the times of the test."""
    d, batch = 512, 1000
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(d, d, generator=generator) / d**0.5
    sums = None
    for number in range(100):
        phi0 = torch.randn(batch, d, generator=generator)
        part = AlignmentSums.of(phi0, phi0 @ mixing)
        sums = part if sums is None else sums + part
        if number + 1 in {10, 100}:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            kept = sum(x.numel() * x.element_size() for x in sums.tensors()) / 2**20
            whole = (number + 1) * batch * 2 * d * 4 / 2**20
            print(
                f"alignment of {d} features, {(number + 1) * batch:,} images: {kept:.1f} MiB kept, "
                f"peak of the process {peak:,.0f} MiB (the features alone: {whole:,.0f} MiB)"
            )
    assert sums is not None
    began = time.perf_counter()
    solve_alignment(sums)
    print(f"solving it: {1000 * (time.perf_counter() - began):.0f} ms")
    K, d = 1000, 2048
    weight = torch.randn(K, d, generator=generator).double()
    secret = torch.randn(K, d, generator=generator).double().numpy()
    other = torch.randn(K, d, generator=generator)
    head = prepare_head(weight)
    prepared, projected, tested = (
        1000 * median_time(work)
        for work in (
            lambda: prepare_head(weight),
            lambda: prepare_head(weight, reference=[other]),
            lambda: detect(head, secret),
        )
    )
    print(
        f"test of {K:,} classes in {d:,} dimensions: head prepared in {prepared:.0f} ms "
        f"({projected:,.0f} ms with a reference head of as many classes taken out), then "
        f"{tested:.0f} ms for each key"
    )


def median_time(work: Callable[[], object]) -> float:
    """Median seconds of seven runs, after one to warm up."""
    times = []
    for _ in range(8):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return median(times[1:])


def main() -> None:
    """Measure detection, then race on both courses."""
    options = _options()
    facts = harness.environment(["torch", "torchvision"], options.threads)
    torch.set_num_threads(options.threads)
    detection_costs()  # first: the peak of memory is that of all that came before
    wanted = options.accelerator
    device = torch.device("cuda" if wanted == "cuda" else "cpu")
    if wanted == "auto" and torch.cuda.is_available():
        device = torch.device("cuda")
    races = []
    for name, course in (
        ("small trained network, 32 px", small_images(options, device)),
        (f"ResNet-18, random weights, {options.size} px crops", photographs(options, device)),
    ):
        paper = {"augment": RandomResizedCropFlip(course.size), "iterations": course.iterations}
        same_work = {"reference": "center", "straight_through": False}
        plain = RandomResizedCropFlip(course.size, antialias=False)
        fast = {"augment": RandomResizedCropFlip(course.size), "target_psnr": options.psnr}
        contestants = {
            "remanence, paper": partial(ours, course, MarkConfig.preset("paper", **paper)),
            "remanence, authors' options": partial(
                ours, course, MarkConfig.preset("paper", **paper | same_work | {"augment": plain})
            ),
            f"remanence, fast at {options.psnr:g} dB": partial(
                ours, course, MarkConfig.preset("fast", **fast)
            ),
            "authors' loop": partial(official, course),
        }
        title = f"{name}: {len(course.images)} images, {course.iterations} steps, {device.type}"
        races.append(harness.race(title, contestants, options, unit="images/s"))
    harness.finish(races, facts, options)


def _options() -> argparse.Namespace:
    options = harness.parser(__doc__)
    options.set_defaults(rounds=3, warmup=0)
    add = options.add_argument
    add("--iterations", type=int, default=90, help="steps of all; the paper's number")
    add("--psnr", type=float, default=37.0, help="budget of the fast preset, in dB")
    add("--images", type=int, default=64, help="images of 32 pixels")
    add("--photographs", type=int, default=4, help="photographs")
    add("--size", type=int, default=96, help="crop of a photograph")
    return options.parse_args()


if __name__ == "__main__":
    main()
