"""Work that is shared out by --rank and --world-size, each share with a folder of its own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from remanence.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


def check_share(rank: int | None, world_size: int | None) -> None:
    """Refuse a share that there is not, or one of what torchrun shares already."""
    if rank is None and world_size is None:
        return
    if rank is None or world_size is None:
        raise InputError("--rank and --world-size: give both, or neither")
    if not 0 <= rank < world_size:
        raise InputError(f"--rank {rank}: must be 0 to {world_size - 1}, below --world-size")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--rank: torchrun shares the work already; leave --rank out")


def share_folder(out: Path, rank: int | None, world_size: int | None) -> Path:
    """Return OUT-RANK-of-WORLD_SIZE, or OUT where the work is not shared out."""
    if rank is None or world_size is None:
        return out
    return out.with_name(f"{out.name}-{rank}-of-{world_size}")
