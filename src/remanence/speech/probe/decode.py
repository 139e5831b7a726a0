"""From the outputs of CTC to sequences: the best path, and prefix beam search.

A path gives each frame a symbol or the blank; repeats are joined, then blanks left out (Graves et
al., ICML 2006). Prefix beam search adds up all paths of a sequence (Hannun et al., arXiv 1408.2873,
without a language model).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from remanence.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

WIDTH = 20


def collapse(path: Tensor, blank: int) -> list[int]:
    """Join the repeats of a path (T,), then leave blanks out."""
    joined = torch.unique_consecutive(path)
    return [int(symbol) for symbol in joined[joined != blank].tolist()]


def best_path(log_probs: Tensor, lengths: Tensor | None = None) -> list[list[int]]:
    """Return the sequence of the best path of each utterance.

    Args:
        log_probs: (B, T, C), the blank last.
        lengths: Frames of each (B,); T if None.
    """
    paths = log_probs.argmax(-1).cpu()
    ends = [paths.shape[1]] * len(paths) if lengths is None else lengths.tolist()
    blank = log_probs.shape[-1] - 1
    return [collapse(path[:end], blank) for path, end in zip(paths, ends, strict=True)]


def prefix_beam_search(log_probs: Tensor, width: int = WIDTH) -> list[tuple[list[int], float]]:
    """Return the likeliest sequences of one utterance.

    At each frame the `width` likeliest prefixes are kept; a prefix's probability is that of all its
    paths through kept prefixes, those that end in a blank and those that do not apart. With a width
    that no prefix is dropped for, the probabilities are exact.

    Args:
        log_probs: (T, C), the blank last.
        width: Prefixes kept.

    Returns:
        At most `width` pairs of a sequence and its log-probability, the best first.

    Raises:
        InputError: The shape or the width is wrong, or there is NaN.
    """
    if log_probs.ndim != 2 or log_probs.shape[1] < 2:
        raise InputError(f"log_probs {tuple(log_probs.shape)}: give (T, C), C at least 2")
    if width < 1:
        raise InputError(f"width {width}: keep at least 1 prefix; 20 is usual")
    table: NDArray[np.float64] = log_probs.detach().double().cpu().numpy()
    if np.isnan(table).any():
        raise InputError("log_probs hold NaN: check the network")
    symbols = table.shape[1] - 1
    # Prefixes are nodes of a tree: 0 is the empty one, a node has its parent and its last symbol.
    parents, lasts, children = [-1], [-1], dict[tuple[int, int], int]()
    nodes = np.array([0])
    in_blank, in_symbol = np.array([0.0]), np.array([-np.inf])
    for row in table:
        last = np.array([lasts[node] for node in nodes])
        parent = np.array([parents[node] for node in nodes])
        total = np.logaddexp(in_blank, in_symbol)
        stay_blank = total + row[symbols]
        stay_symbol = np.where(last >= 0, in_symbol + row[last], -np.inf)
        longer = total[:, None] + row[:symbols]  # (prefixes, symbols)
        repeats = np.flatnonzero(last >= 0)
        # A symbol follows itself only behind a blank: without one it is a repeat.
        longer[repeats, last[repeats]] = in_blank[repeats] + row[last[repeats]]
        # A prefix that is kept already also grows out of its parent.
        child, mother = np.nonzero(parent[:, None] == nodes)
        stay_symbol[child] = np.logaddexp(stay_symbol[child], longer[mother, last[child]])
        longer[mother, last[child]] = -np.inf
        scores = np.concatenate([np.logaddexp(stay_blank, stay_symbol), longer.ravel()])
        kept = np.flatnonzero(scores > -np.inf)
        if len(kept) > width:
            kept = kept[np.argpartition(-scores[kept], width - 1)[:width]]
        n = len(nodes)
        stays, grows = kept[kept < n], kept[kept >= n] - n
        fresh = []
        for place, symbol in zip(*np.divmod(grows, symbols), strict=True):
            key = int(nodes[place]), int(symbol)
            if key not in children:
                children[key] = len(parents)
                parents.append(key[0])
                lasts.append(key[1])
            fresh.append(children[key])
        nodes = np.concatenate([nodes[stays], np.array(fresh, dtype=np.int64)])
        in_blank = np.concatenate([stay_blank[stays], np.full(len(grows), -np.inf)])
        in_symbol = np.concatenate([stay_symbol[stays], longer.ravel()[grows]])
    total = np.logaddexp(in_blank, in_symbol)
    found = []
    for i in np.argsort(-total, kind="stable"):
        sequence, node = [], int(nodes[i])
        while node:
            sequence.append(lasts[node])
            node = parents[node]
        found.append((sequence[::-1], float(total[i])))
    return found
