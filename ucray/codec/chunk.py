"""What all chunks of an archive share: shape, dtype, fill value, normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ucray.codec.fill import fill_mask
from ucray.errors import DtypeError, SettingsError
from ucray.grid import Shape3, format_shape

Voxels = npt.NDArray[np.generic]

DTYPES = ("uint8", "uint16", "int16", "float32")
"""Voxel types that are served."""

LONGEST_AXIS = 4096
LARGEST_CHUNK = 1 << 28
"""Voxels of a chunk: what a reader allocates for a few bytes is bounded."""


@dataclass(frozen=True)
class ChunkFormat:
    """What all chunks of an archive share.

    Parameters
    ----------
    shape
        Voxels of a chunk (z, y, x).
    dtype
        One of DTYPES.
    fill_value
        The value that stands for "nothing here". Not a number where whole numbers have no such value.
    offset, scale
        The networks see (voxel - offset) / scale: mean and standard deviation of the volume.
    """

    shape: Shape3
    dtype: str
    fill_value: float
    offset: float
    scale: float

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise DtypeError(f"voxels of type {self.dtype} are not served; {', '.join(DTYPES)} are")
        if not (math.isfinite(self.offset) and math.isfinite(self.scale) and self.scale > 0):
            raise SettingsError(f"a volume scale of {self.scale} and offset of {self.offset} cannot be used")

    @property
    def has_fill(self) -> bool:
        """Whether any voxel can be fill."""
        return not (math.isnan(self.fill_value) and np.issubdtype(np.dtype(self.dtype), np.integer))

    @property
    def voxels(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.voxels * np.dtype(self.dtype).itemsize

    def check_stride(self, stride: Shape3) -> None:
        """Refuse a chunk shape that is too large, or that the networks cannot divide evenly."""
        if max(self.shape) > LONGEST_AXIS or self.voxels > LARGEST_CHUNK:
            raise SettingsError(
                f"chunk shape {format_shape(self.shape)} is too large: {LONGEST_AXIS} voxels an axis and "
                f"{LARGEST_CHUNK} in all are served"
            )
        if any(n % s for n, s in zip(self.shape, stride, strict=True)):
            raise SettingsError(
                f"chunk shape {format_shape(self.shape)} must be a multiple of {format_shape(stride)} "
                "with these weights"
            )


def normalisation(samples: Sequence[Voxels], fill_value: float) -> tuple[float, float]:
    """Offset and scale of a volume from samples of it: mean and standard deviation of tissue.

    Both are rounded to six significant digits, so that they are written and read back exactly.
    """
    kept = np.concatenate([s[~fill_mask(s, fill_value)].astype(np.float64).reshape(-1) for s in samples])
    kept = kept[np.isfinite(kept)]
    if kept.size == 0 or kept.max() == kept.min():
        return float(kept[0]) if kept.size else 0.0, 1.0
    return float(f"{kept.mean():.6g}"), float(f"{kept.std():.6g}")
