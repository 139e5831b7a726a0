"""How much any training pipeline magnifies its photos, by running its geometry without pixels.

For pipelines that are not a plain RandomResizedCrop, whose geometry has no closed form
(arXiv 1906.06423, Section 3, writes s for the factor). Every member that moves pixels is run as it
stands on a tensor that has a shape but no storage (torch's `meta` device), while a dispatch mode
watches for resampling: crops, padding and flips keep the scale, a resize multiplies it.
"""

import copy
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode

from remanence.errors import InputError
from remanence.learn.fixres.transforms import EvalTransform, FinetuneTransform

Step = Callable[[Any], Any]

# Classes of torchvision (v1 and v2) and timm that keep areas: they change colours or the type, or
# rotate and shear by a map of determinant 1, as the automatic augmentations do.
AREA_PRESERVING = frozenset(
    {
        "AugMix",
        "AugMixAugment",
        "AutoAugment",
        "ColorJitter",
        "ConvertImageDtype",
        "GaussianBlur",
        "GaussianNoise",
        "Grayscale",
        "Identity",
        "JPEG",
        "LinearTransformation",
        "MaybePILToTensor",
        "MaybeToTensor",
        "Normalize",
        "PILToTensor",
        "RGB",
        "RandAugment",
        "RandomAdjustSharpness",
        "RandomAutocontrast",
        "RandomChannelPermutation",
        "RandomEqualize",
        "RandomErasing",
        "RandomGrayscale",
        "RandomInvert",
        "RandomPhotometricDistort",
        "RandomPosterize",
        "RandomRotation",
        "RandomSolarize",
        "ToDtype",
        "ToImage",
        "ToNumpy",
        "ToPILImage",
        "ToPureTensor",
        "ToTensor",
        "TrivialAugmentWide",
    }
)
CHANCE = frozenset({"RandomApply", "RandomChoice", "RandomOrder"})


def train_scale_factors(
    transform: object, size_hw: tuple[int, int], *, draws: int = 1000, seed: int = 0
) -> Tensor:
    """Draws of the magnification s of a torchvision (v1, v2) or timm training pipeline.

    `eval_scale_factors(...) / train_scale_factors(...)` are draws of the apparent-size ratio, to be
    summarised by `RatioReport.of`.

    Args:
        transform: a transform, `Compose`, `nn.Sequential` or nested sequence of them, as
            `timm.data.create_transform` returns it; `EvalTransform` and `FinetuneTransform` too.
        size_hw: height and width of the photo in pixels.
        draws: number of runs, of about 0.1 ms for each member that moves pixels.
        seed: for torch's and Python's global generators, which are put back afterwards.

    Returns:
        float64 (draws,): output pixels per input pixel, the geometric mean of both axes.

    Raises:
        InputError: a member cannot be analysed (the message names it), or an argument is malformed.
    """
    height, width = size_hw
    if min(height, width) < 1 or draws < 1:
        raise InputError(f"size {tuple(size_hw)} or draws {draws} is too small: give at least 1")
    steps = _geometric_steps(transform)
    with _seeded(seed):
        factors = [_scale_factor(steps, height, width) for _ in range(draws)]
    return torch.tensor(factors, dtype=torch.float64)


def _geometric_steps(transform: object) -> list[Step]:
    """The members that move pixels, in order."""
    names = {base.__name__ for base in type(transform).__mro__}
    if isinstance(transform, list | tuple | nn.Sequential):
        return [step for member in transform for step in _geometric_steps(member)]
    if "Compose" in names:
        return _geometric_steps(list(transform.transforms))  # type: ignore[attr-defined]  # v1 and v2 share no base that mypy knows
    if names & AREA_PRESERVING:
        return []
    if isinstance(transform, EvalTransform | FinetuneTransform):
        return [transform.resize]
    if names & CHANCE:
        moves = [bool(_geometric_steps(member)) for member in transform.transforms]  # type: ignore[attr-defined]  # as above
        if not any(moves):
            return []
        if not all(moves):
            raise InputError(
                f"{_name(transform)} mixes colours and geometry and can't be analysed: "
                "leave its colour members out"
            )
    if not callable(transform):
        raise InputError(f"{_name(transform)} is not a transform: give a callable")
    # Neither moves a pixel, and on tensors torchvision takes no colours and fewer filters.
    neutral = {"fill": 0, "interpolation": InterpolationMode.BILINEAR}
    member = copy.copy(transform)
    for name in neutral.keys() & getattr(transform, "__dict__", {}).keys():
        setattr(member, name, neutral[name])
    return [member]


def _scale_factor(steps: list[Step], height: int, width: int) -> float:
    image: object = torch.empty(3, height, width, device="meta")
    with _Resampling() as resampling:
        for step in steps:
            try:
                image = step(image)
            except InputError:
                raise
            except Exception as error:  # a member may raise anything: it is someone else's code
                raise _unreadable(step, str(error)) from error
            if not isinstance(image, Tensor) or resampling.warped:
                raise _unreadable(step, "it is no crop, padding, flip or resize")
    return float(resampling.factor)


class _Resampling(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Multiplies up the scale of every resize of an image that happens under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.factor = 1.0
        self.warped = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name  # noqa: SLF001  # an operator has no public name
        if "upsample" in name:
            (h, w), (new_h, new_w) = args[0].shape[-2:], out.shape[-2:]
            self.factor *= math.sqrt(new_h * new_w / (h * w))
        self.warped |= "grid_sampler" in name
        return out


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed what transforms draw from: torch's CPU generator (torchvision) and Python's (timm)."""
    python_state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)


def _unreadable(step: Step, why: str) -> InputError:
    reason = (why.splitlines() or ["it failed"])[0]
    return InputError(
        f"{_name(step)} can't be analysed ({reason}): leave it out if it keeps the object size"
    )


def _name(member: object) -> str:
    return getattr(member, "__name__", type(member).__name__)
