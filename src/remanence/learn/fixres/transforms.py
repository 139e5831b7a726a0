"""Test-time and test-like fine-tuning transforms of FixRes (arXiv 1906.06423, Section 4).

Both take an RGB PIL image and return a uint8 tensor; mean and std are applied later, to the batch.

`crop_mode` says how a photo of any aspect ratio meets a square of K pixels. `center`, `squash` and
`border` are timm's names and agree with timm pixel for pixel:

* `center`: the shorter side becomes K_img, then the central K x K is cut out (torchvision's way).
* `squash`: both sides become K_img, the aspect ratio is lost, then the central K x K is cut out.
* `border`: the longer side becomes K_img, what is missing to K x K is filled with `fill`.
* `fixres_height`: the *height* becomes K_img, so that portraits come out narrower than K and are
  padded with black. Only for the checkpoints released with the paper, which were tuned that way.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import ColorJitter, InterpolationMode, functional

from remanence.errors import InputError

CropMode = Literal["center", "squash", "border", "fixres_height"]

# An image to torchvision's functional calls: a photo, or a tensor that stands in for one.
ImageLike = TypeVar("ImageLike", Image.Image, Tensor)

_BLACK = (0, 0, 0)


def resize_size(size: int, crop_pct: float = 0.875) -> int:
    """Pixels K_img to which the photo is resized before the crop of `size` pixels.

    `floor(size / crop_pct)`, timm's rule. At 0.875 it equals the `int(256 / 224 * size)` of the
    paper for every size from 1 to 4096.

    Args:
        size: test crop K_test in pixels, at least 1.
        crop_pct: K_test / K_img, in (0, 1].

    Returns:
        K_img in pixels.

    Raises:
        InputError: `size` or `crop_pct` is out of range.
    """
    if size < 1:
        raise InputError(f"size {size} is not a crop: give at least 1 pixel")
    if not 0 < crop_pct <= 1:
        raise InputError(f"crop_pct {crop_pct} is out of range: give a share in (0, 1]")
    return math.floor(size / crop_pct)


@dataclass(frozen=True)
class EvalTransform:
    """The test transform: resize, then one crop (arXiv 1906.06423, Section 2).

    Called on an RGB PIL image of any size, it returns a uint8 tensor (3, size, size); photos
    smaller than the crop are enlarged. `flip` and `shift` are for fixed test-like views of the same
    photo (`FinetuneTransform.variants`); at their defaults this is the plain test transform.

    Attributes:
        size: crop K_test in pixels.
        crop_pct: K_test / K_img, in (0, 1].
        crop_mode: one of `center`, `squash`, `border`, `fixres_height`; see the module.
        interpolation: torchvision's name, such as `bilinear` or `bicubic`.
        fill: RGB of the padding of `border`; ImageNet's mean unless told.
        flip: mirror left to right after the resize.
        shift: place of the crop, from -1 (as far up or left as the margin goes) over 0 (centre)
            to 1; along the longer axis, and horizontally for squares and for `fixres_height`.

    Raises:
        InputError: an attribute is out of range or, on call, the image is not RGB.
    """

    size: int
    crop_pct: float = 0.875
    crop_mode: CropMode = "center"
    interpolation: str = "bilinear"
    fill: tuple[int, int, int] = (124, 116, 104)
    flip: bool = False
    shift: float = 0.0

    def __post_init__(self) -> None:
        resize_size(self.size, self.crop_pct)
        if self.crop_mode not in get_args(CropMode):
            modes = ", ".join(get_args(CropMode))
            raise InputError(f"crop_mode {self.crop_mode!r} is unknown: give one of {modes}")
        names = [mode.value for mode in InterpolationMode]
        if self.interpolation not in names:
            raise InputError(
                f"interpolation {self.interpolation!r} is unknown: give one of {', '.join(names)}"
            )
        if not -1 <= self.shift <= 1:
            raise InputError(f"shift {self.shift} is out of range: give a number in [-1, 1]")

    @property
    def resize_size(self) -> int:
        """K_img in pixels."""
        return resize_size(self.size, self.crop_pct)

    def __call__(self, image: Image.Image) -> Tensor:
        """Photo -> uint8 (3, size, size)."""
        resized = self.resize(_checked(image))
        return self.crop(functional.hflip(resized) if self.flip else resized, self.shift)

    def resize(self, image: ImageLike) -> ImageLike:
        """Resize by the crop mode, before any crop."""
        _, height, width = functional.get_dimensions(image)
        K_img = self.resize_size
        if self.crop_mode == "center":
            target = [K_img]
        elif self.crop_mode == "squash":
            target = [K_img, K_img]
        elif self.crop_mode == "border":
            ratio = max(height / K_img, width / K_img)
            target = [max(1, round(height / ratio)), max(1, round(width / ratio))]
        else:
            target = [K_img, max(1, int(K_img * width / height))]
        resized: ImageLike = functional.resize(image, target, InterpolationMode(self.interpolation))
        return resized

    def margins(self, width: int, height: int) -> tuple[int, int]:
        """Pixels left of and above the central crop in a resized photo, torchvision's rounding."""
        return (
            round((max(width, self.size) - self.size) / 2),
            round((max(height, self.size) - self.size) / 2),
        )

    def shifts_down(self, width: int, height: int) -> bool:
        """Whether a resized photo of this size is shifted vertically, not horizontally."""
        return self.crop_mode != "fixres_height" and height > width

    def crop(self, resized: Image.Image, shift: float) -> Tensor:
        """Cut size x size out of a resized photo, padding where it is too small."""
        K = self.size
        width, height = resized.size
        left, top = self.margins(width, height)
        # With an odd slack the rounded margin is half a pixel too large: stay inside the photo.
        if self.shifts_down(width, height):
            top = min(top + round(shift * top), max(height - K, 0))
        else:
            left = min(left + round(shift * left), max(width - K, 0))
        if width < K or height < K:
            missing_x, missing_y = max(K - width, 0), max(K - height, 0)
            resized = functional.pad(
                resized,
                [missing_x // 2, missing_y // 2, (missing_x + 1) // 2, (missing_y + 1) // 2],
                fill=self.fill if self.crop_mode == "border" else _BLACK,
            )
        pixels: Tensor = functional.pil_to_tensor(functional.crop(resized, top, left, K, K))
        return pixels


@dataclass(frozen=True)
class FinetuneTransform:
    """Test-like augmentation: the test transform with a flip, slight colours and a shifted crop.

    Resize, flip, ColorJitter, shifted crop, in that order; objects keep the size they have at test.
    The crop moves t pixels from the centre, t uniform on 0 .. margin with a random sign, along the
    axis that `EvalTransform.shift` names. All randomness comes from torch's global generator: seed
    it per sample. Called on an RGB PIL image, it returns a uint8 tensor (3, size, size).

    Attributes:
        size: crop K_test in pixels.
        crop_pct: K_test / K_img, in (0, 1].
        crop_mode: as for `EvalTransform`; tune and test with the same one.
        interpolation: as for `EvalTransform`.
        fill: as for `EvalTransform`.
        shift: whether the crop moves.
        hflip: probability of a mirrored photo, in [0, 1].
        jitter: ColorJitter's brightness, contrast and saturation, in [0, 1]; 0 for none.

    Raises:
        InputError: an attribute is out of range or, on call, the image is not RGB.
    """

    size: int
    crop_pct: float = 0.875
    crop_mode: CropMode = "center"
    interpolation: str = "bilinear"
    fill: tuple[int, int, int] = (124, 116, 104)
    shift: bool = True
    hflip: float = 0.5
    jitter: float = 0.05

    def __post_init__(self) -> None:
        self._view()
        for name in ("hflip", "jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} {getattr(self, name)} is out of range: give [0, 1]")

    @property
    def resize_size(self) -> int:
        """K_img in pixels."""
        return resize_size(self.size, self.crop_pct)

    def __call__(self, image: Image.Image) -> Tensor:
        """Photo -> uint8 (3, size, size), another view at every call."""
        view = self._view()
        resized = view.resize(_checked(image))
        if torch.rand(()).item() < self.hflip:
            resized = functional.hflip(resized)
        if self.jitter:
            resized = ColorJitter(self.jitter, self.jitter, self.jitter)(resized)
        return view.crop(resized, self._draw_shift(view, *resized.size))

    def resize(self, image: ImageLike) -> ImageLike:
        """Resize by the crop mode, as the test transform does."""
        return self._view().resize(image)

    def variants(self, shifts: int = 3) -> list[EvalTransform]:
        """The fixed views that stand for this transform where features are cached.

        Without jitter, each is one of the outcomes of a call on any photo. The plain test transform
        comes first, wherever a call can give it (`hflip` below 1).

        Args:
            shifts: odd number of crop places, evenly spaced over the margin; 1 where `shift` is
                off.

        Returns:
            Distinct transforms, always in the same order: unflipped before flipped, the centre
            before the sides.

        Raises:
            InputError: `shifts` is even or not positive.
        """
        if shifts < 1 or shifts % 2 == 0:
            raise InputError(f"shifts {shifts} leaves out the centre: give an odd number")
        half = shifts // 2 if self.shift else 0
        places = [step / half for step in range(-half, half + 1)] if half else [0.0]
        flips = [flip for flip, p in ((False, 1 - self.hflip), (True, self.hflip)) if p > 0]
        return [self._view(flip, place) for flip in flips for place in sorted(places, key=abs)]

    def _view(self, flip: bool = False, shift: float = 0.0) -> EvalTransform:
        return EvalTransform(
            self.size, self.crop_pct, self.crop_mode, self.interpolation, self.fill, flip, shift
        )

    def _draw_shift(self, view: EvalTransform, width: int, height: int) -> float:
        left, top = view.margins(width, height)
        margin = top if view.shifts_down(width, height) else left
        if not (self.shift and margin):
            return 0.0
        t = int(torch.randint(margin + 1, ()))
        sign = 1 if torch.rand(()).item() < 0.5 else -1
        return sign * t / margin


def _checked(image: Image.Image) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise InputError(f"{type(image).__name__} is not a photo: give an RGB PIL image")
    if image.mode != "RGB":
        raise InputError(f"image mode {image.mode!r} is not RGB: call image.convert('RGB') first")
    return image
