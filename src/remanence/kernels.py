"""Functions compiled for the processor, and rows shared among threads.

Import this only where a kernel is about to run: numba takes time to import.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from zlib import crc32

import numba
import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    Function = TypeVar("Function", bound=Callable[..., Any])
    Result = TypeVar("Result")


def kernel(function: Function) -> Function:
    """Compile a function when it is first called, to run without the interpreter's lock.

    What is compiled is kept on disk, beside the code or where NUMBA_CACHE_DIR says, so that the
    next process need not wait for it. Only the function's own file and this one are looked at to
    tell whether that is still true: constants of other files go in as arguments.
    """
    return _compiled(function, set())


def fused_kernel(function: Function) -> Function:
    """Compile likewise, and let a * b + c round once."""
    return _compiled(function, {"contract"})


def reordered_kernel(function: Function) -> Function:
    """Compile likewise, and let a sum be taken in any order as well."""
    return _compiled(function, {"contract", "reassoc"})


def _compiled(function: Function, fastmath: set[str]) -> Function:
    compile_ = numba.njit(nogil=True, error_model="numpy", fastmath=fastmath)
    compiled = compile_(function)
    chosen = numba.config.CACHE_DIR
    try:
        numba.config.CACHE_DIR = chosen or _place(function)
        compiled.enable_caching()
    except (OSError, RuntimeError):
        # No folder can be written to: each process compiles for itself.
        return cast("Function", compile_(function))
    finally:
        numba.config.CACHE_DIR = chosen
    return cast("Function", compiled)


def _place(function: Callable[..., Any]) -> str:
    """Return a folder beside the code for these very versions of it and of what compiles it.

    By itself numba names files alike for all versions, and says which there are before they are
    written: two at once could run what the other compiled.
    """
    code = Path(function.__code__.co_filename)
    versions = f"{numba.__version__} {np.__version__}".encode()
    made_of = code.read_bytes() + Path(__file__).read_bytes() + versions
    return str(code.parent / "__pycache__" / f"kernels-{crc32(made_of):08x}")


def in_threads(run: Callable[[int, int], Result], rows: int, worth: int) -> list[Result]:
    """Run on stretches of rows, in as many threads as torch uses.

    Args:
        run: takes the first row of a stretch and the one after its last.
        rows: how many there are.
        worth: how many threads the work is worth at most.

    Returns:
        What each stretch returned, in their order.
    """
    parts = max(min(torch.get_num_threads(), rows, worth), 1)
    if parts == 1:
        return [run(0, rows)]
    edges = [rows * i // parts for i in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        return list(pool.map(run, edges[:-1], edges[1:]))
