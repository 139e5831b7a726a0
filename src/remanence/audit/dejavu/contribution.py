"""How much each candidate adds to what a rank test sees."""

import numpy as np
from numpy.typing import ArrayLike

from remanence.audit.dejavu.scores import Floats, as_scores


def contributions(candidate: ArrayLike, reference: ArrayLike) -> Floats:
    """Share of references that each candidate scores above, less one half.

    Their mean is AUC - 1/2, so that they say where a finding comes from. They are no verdicts on
    single images: half of all candidates that were never seen contribute above 0.

    Args:
        candidate: Scores (n,), higher = more member-like.
        reference: Scores (m,).

    Returns:
        (n,) in [-1/2, 1/2]; ties count half.

    Raises:
        InputError: Scores are empty or not finite.
    """
    a, b = as_scores(candidate, "candidate"), np.sort(as_scores(reference, "reference"))
    below, up_to = (np.searchsorted(b, a, side) for side in ("left", "right"))
    shares: Floats = (below + up_to) / (2 * len(b)) - 0.5
    return shares
