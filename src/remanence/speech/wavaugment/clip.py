"""Clipping: a wave is cut off at a share of its own extremes."""

from torch import Tensor

from remanence.speech.wavaugment.waves import as_waves, per_example


def clip(
    wave: Tensor,
    factor: float | Tensor,
    *,
    keep_peak: bool = False,
    lengths: Tensor | None = None,
) -> Tensor:
    """Cut each example off at `factor` times its least and largest valid sample.

    Args:
        wave: floats (T,), (C, T) or (B, C, T); the extremes are over all channels of an example.
        factor: 0..1; a number or (B,). 1 leaves the wave as it is.
        keep_peak: divide by `factor` again, so that a largest sample above 0 and a least one below
            0 stay as they were; a factor of 0 gives silence.
        lengths: valid samples of each row, (B,).

    Returns:
        The wave's shape, dtype and device. Differentiable.

    Raises:
        InputError: a factor is out of range.
    """
    waves = as_waves(wave, lengths)
    rows = waves.wave
    share = per_example("factor", factor, len(rows), rows.device, low=0, high=1)[:, None, None]
    share = share.to(rows.dtype)
    # Samples past a length are 0 here, which moves no bound that a wave could reach.
    low = share * rows.amin((1, 2), keepdim=True)
    high = share * rows.amax((1, 2), keepdim=True)
    cut = rows.clamp(low, high)
    if keep_peak:
        cut = cut / share.where(share > 0, 1)
    return waves.restore(cut)
