"""Functions compiled for the processor, and rows shared among threads.

Import this only where a kernel is about to run: numba takes time to import.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numba
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    Function = TypeVar("Function", bound=Callable[..., Any])
    Result = TypeVar("Result")


def kernel(function: Function) -> Function:
    """Compile a function when it is first called, to run without the interpreter's lock.

    What is compiled is kept on disk, beside the code or in numba's own folder, so that the next
    process need not wait for it. Only what the function's own file holds is looked at to tell
    whether that is still true: constants of other files go in as arguments.
    """
    return _compiled(function, set())


def fused_kernel(function: Function) -> Function:
    """Compile likewise, and let a * b + c round once."""
    return _compiled(function, {"contract"})


def reordered_kernel(function: Function) -> Function:
    """Compile likewise, and let a sum be taken in any order as well."""
    return _compiled(function, {"contract", "reassoc"})


def _compiled(function: Function, fastmath: set[str]) -> Function:
    compiled = numba.njit(nogil=True, error_model="numpy", fastmath=fastmath)(function)
    try:
        compiled.enable_caching()
    except RuntimeError:
        # No folder can be written to: each process compiles for itself.
        return cast(
            "Function", numba.njit(nogil=True, error_model="numpy", fastmath=fastmath)(function)
        )
    return cast("Function", compiled)


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
