"""Published whitening models, as ours (arXiv 1811.11147).

Both collections were learned on Photo Tourism's (and HPatches') patches of 64 pixels, with the
default kernels.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from torch import Tensor

from remanence.errors import InputError
from remanence.search.kernel_descriptor.descriptor import KernelDescriptor
from remanence.search.kernel_descriptor.whitening import Kind, Whitening

DESCRIPTORS = {
    part.dim: part
    for part in (KernelDescriptor(), KernelDescriptor("polar"), KernelDescriptor("cartesian"))
}
ODD = (1, 3, 4, 6)  # cos 1, cos 3, sin 1, sin 3 of theta: they change sign with the gradient


def whitening_from_mkd_pytorch(
    file: str | Path,
    training_set: Literal["liberty", "notredame", "yosemite"] = "liberty",
    kind: Kind = "pcawt",
    *,
    dim: int = 128,
    t: float = 0.7,
    keval: int = 40,
) -> Whitening:
    """Read a model of mkd_pytorch, which kornia uses too.

    Their descriptors are ours, component by component. The file says by its length which part it
    is for: 63 Cartesian, 175 polar, 238 both.

    Args:
        file: A .pth of {training set: {"pca" and "lw": {mean, eigvecs, eigvals}}}; read without
            running any code that it may hold.
        training_set: What the model was learned on.
        kind: Any but lws, for which nothing was published.
        dim: Length of whitened vectors; the whole for a shorter descriptor.
        t: Attenuation of pcawt.
        keval: Index of the eigenvalue that sets the shrinkage of pcaws.

    Returns:
        The whitening, with its descriptors' convention.

    Raises:
        InputError: There is no such file or training set, it is not of this layout, or a setting is
            out of range.
    """
    if not Path(file).is_file():
        raise InputError(f"there is no whitening {file}: give a .pth of mkd_pytorch or kornia")
    try:
        models = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{file} is no .pth of tensors: give one of mkd_pytorch's") from error
    if not isinstance(models, dict) or training_set not in models:
        known = ", ".join(map(str, models)) if isinstance(models, dict) else "none"
        raise InputError(f"{file} has no training set {training_set!r}: it holds {known}")
    try:
        model = models[training_set]["lw" if kind == "lw" else "pca"]
        mean, vectors, values = (model[name] for name in ("mean", "eigvecs", "eigvals"))
        convention = DESCRIPTORS[len(mean)].convention
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{file} is not of mkd_pytorch's layout: it wants mean, eigvecs and eigvals of length "
            f"{', '.join(map(str, sorted(DESCRIPTORS)))} under pca and lw"
        ) from error
    dim = min(dim, len(mean))
    return Whitening.from_eigen(
        mean, vectors, values, kind, dim=dim, t=t, keval=keval, convention=convention
    )


def whitening_from_matlab(source: str | Path | Mapping[str, Any], *, dim: int = 128) -> Whitening:
    """Read a supervised model of the authors' Matlab code, gtolias/mkd.

    Their descriptors have the other sign of the gradient and theta as the fastest index, which
    the mean and the projection are converted from.

    Args:
        source: A .mat file up to version 7, or what `scipy.io.loadmat` read from it with
            `simplify_cells=True`: the struct `cmkd`, with the projection `lw.P` (238, 238), a
            direction a row, and the mean `lw.m`.
        dim: Length of whitened vectors, at most the rows of P.

    Returns:
        The whitening, of kind lw.

    Raises:
        InputError: There is no such file, it is not of this layout, or `dim` is out of range.
    """
    name = "the struct" if isinstance(source, Mapping) else str(source)
    if not isinstance(source, Mapping) and not Path(source).is_file():
        raise InputError(f"there is no whitening {name}: give a .mat of gtolias/mkd")
    try:
        read = source if isinstance(source, Mapping) else loadmat(source, simplify_cells=True)
        model = read["cmkd"]["lw"]
        P, m = (torch.from_numpy(np.asarray(model[k], dtype=np.float64)) for k in ("P", "m"))
    except NotImplementedError as error:
        raise InputError(f"{name} is of Matlab 7.3: save it again with -v7") from error
    except (MatReadError, ValueError, TypeError, KeyError, IndexError) as error:
        raise InputError(f"{name} holds no cmkd.lw.P and cmkd.lw.m: give one of mkd's") from error
    m = m.flatten()
    whole = KernelDescriptor()
    if m.shape != (whole.dim,) or P.ndim != 2 or P.shape[1] != whole.dim:
        raise InputError(
            f"cmkd.lw.P {tuple(P.shape)} and cmkd.lw.m {tuple(m.shape)} of {name}: give "
            f"(.., {whole.dim}) and ({whole.dim},)"
        )
    if not 1 <= dim <= len(P):
        raise InputError(f"dim {dim} of whitened vectors: give 1 to {len(P)}")
    projection = _from_matlab(P[:dim]).mT.contiguous()
    return Whitening("lw", _from_matlab(m), projection, convention=whole.convention)


def _from_matlab(vectors: Tensor) -> Tensor:
    """Components in Matlab's order and sign (.., 238), to ours."""
    whole = KernelDescriptor()
    terms = 2 * whole.theta[1] + 1
    sign = torch.ones(terms, dtype=vectors.dtype)
    sign[list(ODD)] = -1
    lengths = [KernelDescriptor(part).dim for part in ("polar", "cartesian")]
    parts = torch.split(vectors, lengths, dim=-1)
    # Position slow and theta fast, to theta slow and position fast.
    turned = [
        (p.reshape(*p.shape[:-1], -1, terms) * sign).transpose(-1, -2).flatten(-2) for p in parts
    ]
    return torch.cat(turned, dim=-1)
