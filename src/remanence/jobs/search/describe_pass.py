"""The pass over pictures or patches that `search describe` makes, one after the other."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.jobs.search.descriptors_file import Rows
from remanence.jobs.search.keypoint_file import read_keypoints
from remanence.jobs.search.patch_files import PatchFile
from remanence.jobs.search.pictures import describe_picture, in_picture, look, upright_image
from remanence.kit.images import Images
from remanence.kit.progress import bar
from remanence.search.kernel_descriptor.descriptor import KernelDescriptor
from remanence.search.kernel_descriptor.keypoints import Keypoints
from remanence.search.kernel_descriptor.moments import Moments
from remanence.search.kernel_descriptor.spectrum import RANK, spectrum

SHOWN = 8  # patches a picture, of as many pictures, that the report shows


@dataclass
class Seen:
    """What a pass over the pictures leaves.

    Attributes:
        moments: Of the raw descriptors, by whether their picture is held out.
        counts: Descriptors of each picture.
        names: Of the pictures.
        rows: Numbers of the pictures in the source.
        flat: Flat patches.
        shown: A few patches of the first pictures, (n, s, s) each.
        skipped: Names of the pictures that could not be read.
    """

    moments: tuple[Moments, Moments]
    counts: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    flat: int = 0
    shown: list[Tensor] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def add(self, name: str, row: int, patches: Tensor, valid: Tensor) -> None:
        """Count one more picture."""
        self.names.append(name)
        self.rows.append(row)
        self.counts.append(len(valid))
        self.flat += int((~valid).sum())
        kept = patches[valid][:SHOWN]
        if len(kept) and len(self.shown) < SHOWN:
            self.shown.append(kept)

    def spectrum(self) -> Tensor | None:
        """Eigenvalues of the raw descriptors' covariance over the largest, where they vary."""
        total = Moments(self.moments[0].dim)
        for part in self.moments:
            total.merge(part)
        if total.count == 0:
            return None
        scatter = total.scatter(total.total / total.count)
        return spectrum(scatter)[0] if float(scatter.trace()) > RANK else None


def describe_images(
    opened: Images,
    descriptor: KernelDescriptor,
    options: Mapping[str, Any],
    held: Container[int],
    rows: Rows,
    seen: Seen,
    device: torch.device,
) -> None:
    """Describe pictures, one after the other.

    Args:
        opened: The pictures.
        descriptor: Of patches.
        options: Those of the command.
        held: Numbers of the pictures that are held out.
        rows: Where the descriptors go.
        seen: What is counted.
        device: Where patches are cut and described.

    Raises:
        InputError: A picture is broken and not to be skipped, all are, or the file of key points
            does not fit.
    """
    file = options["keypoint_file"]
    if file is not None and len(opened) != 1:
        raise InputError(f"--keypoint-file: is for a single image; {opened.source} has more")
    with bar("describe", len(opened)) as progress:
        for number in range(len(opened)):
            progress.advance()
            try:
                picture = look(upright_image(opened, number), options["longest"])
            except InputError:
                if not options["skip_broken"]:
                    raise
                seen.skipped.append(opened.ids[number])
                continue
            read: Keypoints | None = None
            if file is not None:
                read = read_keypoints(file, picture)
            local = describe_picture(
                picture,
                descriptor,
                most=options["keypoints"],
                size=options["patch_size"],
                magnification=options["magnification"],
                upright=options["upright"],
                keypoints=read,
                device=device,
            )
            seen.add(opened.ids[number], number, local.patches, local.valid)
            seen.moments[number in held].add(local.vectors)
            xy, scale = in_picture(picture, local.keypoints)
            rows.add(
                vectors=local.vectors,
                image=torch.full((len(local.valid),), len(seen.names) - 1),
                valid=local.valid,
                xy=xy,
                scale=scale,
                angle=local.keypoints.angle,
            )
    if not seen.names:
        raise InputError(f"{opened.source}: none of its {len(opened)} images can be read")


def describe_patches(
    files: Sequence[PatchFile],
    descriptor: KernelDescriptor,
    rows: Rows,
    seen: Seen,
    device: torch.device,
) -> None:
    """Describe patches that are already cut.

    Args:
        files: Theirs.
        descriptor: Of patches.
        rows: Where the descriptors go.
        seen: What is counted.
        device: Where they are described.

    Raises:
        InputError: A file holds none, or what are no grey patches in [0, 1].
    """
    with bar("describe", sum(len(file.patches) for file in files)) as progress:
        for number, file in enumerate(files):
            shown, valid = [], []
            for chunk in file.chunks():
                try:
                    found = descriptor(chunk.to(device))
                except InputError as error:
                    raise InputError(f"{file.name}: {error}") from error
                vectors, good = found.vectors.float().cpu(), found.valid.cpu()
                seen.moments[0].add(vectors)
                rows.add(vectors=vectors, image=torch.full((len(chunk),), number), valid=good)
                valid.append(good)
                grey = chunk.flatten(0, -3)[: SHOWN**2].float()
                shown.append(grey / 255 if chunk.dtype == torch.uint8 else grey)
                progress.advance(len(chunk))
            if not valid:
                raise InputError(f"{file.name}: holds no patches")
            first = valid[0][: len(shown[0])]
            seen.add(file.name, number, shown[0], first)
            seen.counts[-1] = sum(len(part) for part in valid)
            seen.flat += sum(int((~part).sum()) for part in valid) - int((~first).sum())
