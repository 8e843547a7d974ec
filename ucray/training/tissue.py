"""Which tiles of a volume teach anything. No torch in here: what reads tiles asks it."""

import numpy as np
import numpy.typing as npt

from ucray.codec.fill import fill_mask

LARGEST_FILL_SHARE = 0.5
"""Tiles with more fill than this teach nothing about tissue and are left out."""


def is_tissue(tile: npt.NDArray[np.generic], fill_value: float) -> bool:
    """Whether a tile can teach: not mostly fill, and every voxel a number."""
    mask = fill_mask(tile, fill_value)
    return bool(mask.mean() <= LARGEST_FILL_SHARE and np.isfinite(tile[~mask].astype(np.float64)).all())
