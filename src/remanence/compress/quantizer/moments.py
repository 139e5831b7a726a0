"""What a layer's products see, as second moments (arXiv 1907.05686, section 3.2).

The activations enter the method only through H = E[x x^T], for x a row that the weight's rows are
multiplied with: an unfolded patch for a convolution. The paper's metric sums the diagonal blocks
of H; the error of the layer's output needs all of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from remanence.errors import InputError
from remanence.modes import exact_products

if TYPE_CHECKING:
    from collections.abc import Sequence

    from remanence.compress.layout import Layout

LONGEST = 8192  # longer rows keep only pieces of H along its diagonal,
PIECE = 4096  # each at most this long
CHUNK = 4096  # rows to a product, which bounds both memory and single-precision error
TILE = 1024  # H is symmetric: its products run over the tiles on and above the diagonal


class Moments:
    """Running moments of the rows that a layer multiplies; no row is kept.

    Sums are float64 on the rows' device. A row longer than 8,192 keeps only diagonal pieces of its
    second moment, of at most 4,096.

    Attributes:
        layout: The layer's layout: G groups, rows of length R.
        pieces: The parts of a row whose second moments are kept; one part unless R is above 8,192.
        count: Rows seen, over all groups' common positions.
    """

    def __init__(self, layout: Layout, block: int | None = None) -> None:
        """Start from nothing.

        Args:
            layout: The layer's layout.
            block: Block size d, a multiple of which each piece is; without it pieces suit blocks of
                `taps` times a power of two up to 16. Matters only above R = 8,192.
        """
        self.layout = layout
        self.pieces = _pieces(layout.row_length, block or math.lcm(layout.taps, 16))
        self.count = 0
        self._sum: Tensor | None = None  # (G, R)
        self._teacher_sum: Tensor | None = None  # (G, R)
        self._products: list[Tensor] = []  # of a piece: (G, r, r), see `_mirrored`
        self._cross_products: list[Tensor] = []  # of a piece: teacher x student (G, r, r)

    @classmethod
    def identity(cls, layout: Layout, block: int | None = None) -> Moments:
        """Return moments of white rows: for an embedding, or a layer that no signal reaches.

        Args:
            layout: The layer's layout.
            block: As for a new one.
        """
        moments = cls(layout, block)
        moments.count = 1
        moments._sum = torch.zeros(layout.groups, layout.row_length, dtype=torch.float64)
        for piece in moments.pieces:
            eye = torch.eye(piece.stop - piece.start, dtype=torch.float64)
            moments._products.append(eye.repeat(layout.groups, 1, 1))
        return moments

    def add(self, rows: Tensor, teacher_rows: Tensor | None = None) -> None:
        """Add rows.

        Args:
            rows: The student's rows (N, G, R), any floating type; computed in float32 or better.
            teacher_rows: The teacher's rows at the same places, for `cross`; give them at every
                call or at none.

        Raises:
            InputError: The shapes do not fit, a value is not finite, or teacher rows came with only
                some of the calls.
        """
        wanted = (self.layout.groups, self.layout.row_length)
        for given in (rows,) if teacher_rows is None else (rows, teacher_rows):
            if given.ndim != 3 or given.shape[1:] != wanted or len(given) != len(rows):
                raise InputError(
                    f"rows of shape {tuple(given.shape)} for a layer with (groups, row length) "
                    f"{wanted}: give (number, groups, row length), as many from the teacher"
                )
        if self.count and (teacher_rows is None) != (self._teacher_sum is None):
            raise InputError("teacher rows at some calls only: give them at every call or at none")
        if len(rows) == 0:
            return
        if self._sum is None:
            self._start(rows.device, with_teacher=teacher_rows is not None)
        assert self._sum is not None
        sums = self._sum.clone()
        for start in range(0, len(rows), CHUNK):
            sums += rows[start : start + CHUNK].sum(0, dtype=torch.float64)
        if not bool(sums.isfinite().all()):
            raise InputError("a layer's input holds NaN or infinity: check the calibration images")
        self._sum = sums
        with exact_products():
            for start in range(0, len(rows), CHUNK):
                chunk = _by_group(rows[start : start + CHUNK])  # (G, n, R)
                for piece, products in zip(self.pieces, self._products, strict=True):
                    _add_upper(products, chunk[..., piece])
                if teacher_rows is not None:
                    self._add_teacher(chunk, _by_group(teacher_rows[start : start + CHUNK]))
        self.count += len(rows)

    @property
    def mean(self) -> Tensor:
        """Mean row (G, R), float64."""
        return self._seen(self._sum) / self.count

    @property
    def teacher_mean(self) -> Tensor | None:
        """Mean row of the teacher (G, R), float64; None where no teacher rows were given."""
        return None if self._teacher_sum is None else self._teacher_sum / self.count

    @property
    def seconds(self) -> tuple[Tensor, ...]:
        """Second moment E[x x^T] of each piece (G, r, r), float64."""
        self._seen(self._sum)
        return tuple(_mirrored(products).div_(self.count) for products in self._products)

    @property
    def second(self) -> Tensor:
        """Second moment E[x x^T] (G, R, R), float64."""
        self._whole()
        return self.seconds[0]

    @property
    def crosses(self) -> tuple[Tensor, ...]:
        """E[x_teacher x_student^T] of each piece (G, r, r), float64; empty without a teacher."""
        return tuple(p / self.count for p in self._cross_products)

    @property
    def cross(self) -> Tensor | None:
        """E[x_teacher x_student^T] (G, R, R), float64; None without a teacher."""
        self._whole()
        return self.crosses[0] if self._cross_products else None

    def blocks(self, block: int) -> Tensor:
        """Return the diagonal blocks of the second moment.

        Args:
            block: Block size d, a divisor of R (and of each piece).

        Returns:
            H_bb (G, m, d, d), float64.

        Raises:
            InputError: The block size does not divide, or no rows were added.
        """
        self.layout.check_block(block, "moments")
        self.check_pieces(block)
        self._seen(self._sum)
        cut = [p.unfold(1, block, block).unfold(2, block, block) for p in self._products]
        upper = torch.cat([c.diagonal(dim1=1, dim2=2).permute(0, 3, 1, 2) for c in cut], dim=1)
        return (upper.triu() + upper.triu(1).mT) / self.count

    def shared(self, block: int) -> Tensor:
        """Return the paper's metric: the diagonal blocks summed, and averaged over groups.

        Args:
            block: Block size d.

        Returns:
            G (d, d), float64; that of `x~^T x~` divided by the number of rows (section 3.2).
        """
        return self.blocks(block).sum(1).mean(0)

    def centred(self) -> Moments:
        """Return the moments of the rows less their mean, the student's and the teacher's each.

        By them is measured what is left of a layer's error once the bias has taken its mean.
        """
        total = self._seen(self._sum)
        moments = Moments(self.layout)
        moments.pieces, moments.count = self.pieces, self.count
        moments._sum = torch.zeros_like(total)
        for piece, products in zip(self.pieces, self._products, strict=True):
            outer = total[:, piece, None] * total[:, None, piece]
            moments._products.append(products - outer / self.count)
        if self._teacher_sum is not None:
            moments._teacher_sum = torch.zeros_like(total)
            for piece, products in zip(self.pieces, self._cross_products, strict=True):
                outer = self._teacher_sum[:, piece, None] * total[:, None, piece]
                moments._cross_products.append(products - outer / self.count)
        return moments

    def check_pieces(self, block: int) -> None:
        """Refuse a block size that a boundary between pieces would cut.

        Args:
            block: Block size d.

        Raises:
            InputError: A piece is not a whole number of blocks.
        """
        if any(piece.stop % block for piece in self.pieces):
            raise InputError(
                f"moments kept in pieces of {self.pieces[0].stop} cannot be cut into blocks of "
                f"{block}: start them as Moments(layout, block={block})"
            )

    def merge(self, other: Moments) -> None:
        """Add the rows that another one saw.

        Args:
            other: Moments of the same layout.

        Raises:
            InputError: The layouts or pieces differ, or only one of the two has seen a teacher.
        """
        if (self.layout, self.pieces) != (other.layout, other.pieces):
            raise InputError("moments of two different layers cannot be merged")
        if other._sum is None:
            return
        if self._sum is None:
            self._start(other._sum.device, with_teacher=other._teacher_sum is not None)
        assert self._sum is not None
        if (self._teacher_sum is None) != (other._teacher_sum is None):
            raise InputError("moments with and without teacher rows cannot be merged")
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.add_(theirs.to(mine.device))
        self.count += other.count

    def all_reduce(self) -> None:
        """Sum over the processes of `torch.distributed`, where it runs; each must have rows."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        total = self._seen(self._sum).new_tensor([self.count], dtype=torch.int64)
        for tensor in (total, *self._tensors()):
            dist.all_reduce(tensor)
        self.count = int(total)

    def _start(self, device: torch.device, *, with_teacher: bool) -> None:
        g, r = self.layout.groups, self.layout.row_length

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(g, *shape, dtype=torch.float64, device=device)

        lengths = [piece.stop - piece.start for piece in self.pieces]
        self._sum = zeros(r)
        self._products = [zeros(n, n) for n in lengths]
        if with_teacher:
            self._teacher_sum = zeros(r)
            self._cross_products = [zeros(n, n) for n in lengths]

    def _add_teacher(self, student: Tensor, teacher: Tensor) -> None:
        assert self._teacher_sum is not None
        self._teacher_sum += teacher.sum(1, dtype=torch.float64)
        for piece, products in zip(self.pieces, self._cross_products, strict=True):
            products.add_(teacher[..., piece].mT @ student[..., piece])

    def _tensors(self) -> list[Tensor]:
        sums = [s for s in (self._sum, self._teacher_sum) if s is not None]
        return [*sums, *self._products, *self._cross_products]

    def _seen(self, tensor: Tensor | None) -> Tensor:
        if tensor is None or self.count == 0:
            raise InputError("no rows were added to the moments: give at least one image")
        return tensor

    def _whole(self) -> None:
        if len(self.pieces) > 1:
            raise InputError(
                f"a row of {self.layout.row_length} is above {LONGEST}: its second moment is kept "
                f"in {len(self.pieces)} pieces, read `seconds` and `crosses`"
            )


def input_rows(
    x: Tensor,
    *,
    layout: Layout,
    kernel_size: Sequence[int] = (),
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    transposed: bool = False,
    positions: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Unfold a layer's input into the rows that its weight's rows are multiplied with.

    Args:
        x: Input of a convolution (N, C, *spatial), or of a linear layer (..., R).
        layout: Layout of the weight.
        kernel_size: Spatial shape of a convolution's kernel; that of the layout where left out.
        stride: Of a convolution, for all axes or one for each.
        padding: Zeros on both sides of an axis, likewise.
        dilation: Likewise.
        transposed: The layer is a transposed convolution; its rows are the input's pixels.
        positions: Draw this many positions, without replacement, where there are more.
        generator: For that draw, on the CPU.

    Returns:
        Rows (positions, G, R), of the input's type. A convolution's output at a position is
        `rows[:, g] @ W_g.T`; position runs over images, then outputs in row-major order.

    Raises:
        InputError: The input does not fit the layer.
    """
    if layout.kind == "embedding":
        raise InputError("an embedding multiplies nothing: use Moments.identity(layout)")
    axes = len(layout.shape) - 2
    channels = layout.shape[0] if transposed else layout.shape[1] * layout.groups
    feature_axis = x.ndim - 1 if layout.kind == "linear" else 1
    if x.ndim < 1 or (axes and x.ndim != axes + 2) or x.shape[feature_axis] != channels:
        raise InputError(
            f"input of shape {tuple(x.shape)} does not fit a {layout.kind} weight of shape "
            f"{layout.shape}: {channels} channels are needed"
        )
    if layout.kind == "linear":
        rows = x.reshape(-1, 1, channels)
        picked = _draw(len(rows), positions, generator, x.device)
        return rows if picked is None else rows[picked]
    if transposed:
        kernel_size, stride, padding, dilation = (1,) * axes, 1, 0, 1
    sizes = tuple(kernel_size) or layout.shape[2:]
    steps, margins, gaps = (_each(v, axes) for v in (stride, padding, dilation))
    windows = pad(x, [m for margin in reversed(margins) for m in (margin, margin)])
    for axis, (size, step, gap) in enumerate(zip(sizes, steps, gaps, strict=True), start=2):
        span = (size - 1) * gap + 1
        if windows.shape[axis] < span:
            raise InputError(f"input of shape {tuple(x.shape)} is smaller than the kernel {sizes}")
        windows = windows.unfold(axis, span, step)[..., ::gap]  # a view: (N, C, *out, *taps)
    windows = windows.movedim(1, 1 + axes)  # (N, *out, C, *taps)
    places = windows.shape[: 1 + axes]
    picked = _draw(math.prod(places), positions, generator, x.device)
    if picked is not None:
        windows = windows[torch.unravel_index(picked, places)]
    return windows.reshape(-1, layout.groups, layout.row_length)


def _draw(
    count: int, positions: int | None, generator: torch.Generator | None, device: torch.device
) -> Tensor | None:
    if positions is None or positions >= count:
        return None
    return torch.randperm(count, generator=generator)[:positions].sort().values.to(device)


def _each(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * axes
    return tuple(value) if len(value) == axes else tuple(value) * axes


def _pieces(length: int, unit: int) -> tuple[slice, ...]:
    if length <= LONGEST:
        return (slice(0, length),)
    step = max(PIECE // unit, 1) * unit
    return tuple(slice(s, min(s + step, length)) for s in range(0, length, step))


def _by_group(rows: Tensor) -> Tensor:
    """(n, G, R) as (G, n, R), in float32 or better."""
    return rows.detach().to(torch.promote_types(rows.dtype, torch.float32)).transpose(0, 1)


def _add_upper(products: Tensor, rows: Tensor) -> None:
    length = rows.shape[-1]
    for start in range(0, length, TILE):
        tile = slice(start, min(start + TILE, length))
        products[:, tile, start:] += rows[..., tile].mT @ rows[..., start:]


def _mirrored(products: Tensor) -> Tensor:
    """Fill in what `_add_upper` left out: the tiles below the diagonal."""
    full = products.clone()
    for start in range(0, products.shape[-1], TILE):
        tile, rest = slice(start, start + TILE), slice(start + TILE, None)
        full[:, rest, tile] = full[:, tile, rest].mT
    return full
