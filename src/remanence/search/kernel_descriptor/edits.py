"""Which edits lead from a picture to its near duplicate, by the homography between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from remanence.errors import InputError
from remanence.search.kernel_descriptor.homography import jacobian, transform

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Edit:
    """A homography in words and numbers, at the centre of the first image.

    Attributes:
        parts: What it consists of, of `flip`, `perspective`, `affine` (stretched or sheared),
            `rotation`, `scale`, `crop`, `border` and `shift`; only `identity` if nothing.
        scale: Factor of lengths, the root of that of areas.
        rotation: Degrees, -180 to 180, clockwise as displayed; after the flip, if there is one.
        shift: From the centre of the second image to where that of the first one went, pixels
            right and down.
        stretch: Largest over smallest factor of lengths, at least 1.
        perspective: Farthest that a corner lies from where the affine map would put it, pixels.
        mirrored: Left and right of the first image are exchanged before all else.
        kept: Share of the first image's area that the second one shows.
        covered: Share of the second image's area that shows the first one.
    """

    parts: tuple[str, ...]
    scale: float
    rotation: float
    shift: tuple[float, float]
    stretch: float
    perspective: float
    mirrored: bool
    kept: float
    covered: float


def edit_type(
    homography: NDArray[Any],
    size_first: tuple[int, int],
    size_second: tuple[int, int],
    tolerance: float = 3.0,
) -> Edit:
    """Describe a homography between near duplicates.

    A part is named where leaving it out would move a corner, or the centre, by more than the
    tolerance: scale and rotation in pixels of the second image at half the diagonal. A crop shows
    only a part of the first image and nothing else; a border adds to it. A shift is what neither
    explains.

    Args:
        homography: (3, 3), from pixels of the first to pixels of the second image.
        size_first: Height and width of the first image.
        size_second: Height and width of the second image.
        tolerance: Pixels of the second image.

    Returns:
        The parts and numbers.

    Raises:
        InputError: The matrix is no homography that shows the whole first image, or a setting is
            out of range.
    """
    H = np.asarray(homography, dtype=np.float64)
    if H.shape != (3, 3) or not np.isfinite(H).all() or H[2, 2] == 0:
        raise InputError(f"a homography of shape {H.shape}: give finite (3, 3), H[2, 2] not 0")
    if min(*size_first, *size_second) < 1 or not tolerance > 0:
        raise InputError("give heights, widths and a tolerance above 0")
    H = H / H[2, 2]
    height, width = size_first
    centre = np.array([[(width - 1) / 2, (height - 1) / 2]])
    mirrored = bool(np.linalg.det(jacobian(H, centre)[0]) < 0)
    if mirrored:
        H = H @ np.array([[-1.0, 0, width - 1], [0, 1, 0], [0, 0, 1]])
        H /= H[2, 2]
    corners = _corners(size_first)
    mapped = transform(H, corners)
    J, middle = jacobian(H, centre)[0], transform(H, centre)[0]
    if not np.isfinite(mapped).all() or abs(np.linalg.det(J)) < 1e-12:
        raise InputError("the homography sends a part of the image to infinity: it is no edit")
    U, factors, Vt = np.linalg.svd(J)
    turn = U @ Vt
    scale = math.sqrt(factors[0] * factors[1])
    angle = math.atan2(turn[1, 0] - turn[0, 1], turn[0, 0] + turn[1, 1])
    arms = corners - centre
    perspective = _farthest(mapped - middle - arms @ J.T)
    shift = middle - _corners(size_second).mean(axis=0)
    radius = scale * float(np.hypot(*arms[0]))  # half the diagonal, in the second image
    kept, covered = _overlap(mapped, size_second)

    turned = radius * abs(angle) > tolerance
    edges = tolerance * sum(size_second) / math.prod(size_second)  # a strip along two sides
    cropped = kept < 1 - edges * math.prod(size_second) / (scale**2 * height * width)
    bordered = covered < 1 - edges
    # A turned image leaves corners blank, as a moved one leaves a strip.
    quarter = abs(math.remainder(angle, math.pi / 2)) * radius <= tolerance
    found = {
        "flip": mirrored,
        "perspective": perspective > tolerance,
        "affine": _farthest(arms @ (J - scale * turn).T) > tolerance,
        "rotation": turned,
        "scale": abs(scale - 1) * radius / scale > tolerance,
        "crop": cropped and not bordered,
        "border": bordered and not cropped and quarter,
        "shift": float(np.hypot(*shift)) > tolerance and cropped == bordered,
    }
    parts = tuple(name for name, there in found.items() if there) or ("identity",)
    return Edit(
        parts=parts,
        scale=scale,
        rotation=math.degrees(angle),
        shift=(float(shift[0]), float(shift[1])),
        stretch=float(factors[0] / factors[1]),
        perspective=perspective,
        mirrored=mirrored,
        kept=kept,
        covered=covered,
    )


def _corners(size: tuple[int, int]) -> NDArray[np.float64]:
    """Outer corners in order (4, 2): the image spans -0.5 to width - 0.5."""
    height, width = size
    return np.array([[0, 0], [width, 0], [width, height], [0, height]]) - 0.5


def _overlap(mapped: NDArray[np.float64], size: tuple[int, int]) -> tuple[float, float]:
    """Shares of the mapped first and of the second image that both cover."""
    frame = _corners(size).astype(np.float32)
    polygon = mapped.astype(np.float32)
    common, _ = cv2.intersectConvexConvex(polygon, frame)
    areas = (cv2.contourArea(polygon), cv2.contourArea(frame))
    return min(1.0, common / areas[0]), min(1.0, common / areas[1])


def _farthest(offsets: NDArray[np.float64]) -> float:
    return float(np.hypot(*offsets.T).max())
