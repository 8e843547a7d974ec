"""What a benchmark codes: a volume as 8-bit samples, and its blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes3 = npt.NDArray[np.uint8]
"""A volume (z, y, x) of 8-bit samples."""


@dataclass(frozen=True)
class Samples:
    """A volume as the picture and video codecs take it.

    Parameters
    ----------
    values
        uint8 (z, y, x). Other dtypes are mapped to it linearly from their span, which caps what a
        picture codec can reach at about 59 dB of that span.
    low, step
        A voxel is `low + step * value`.
    """

    values: Bytes3
    low: float
    step: float

    @classmethod
    def of(cls, volume: npt.NDArray[np.generic]) -> Samples:
        """Samples of a volume (z, y, x) of any real dtype."""
        if volume.dtype == np.uint8:
            return cls(np.ascontiguousarray(volume.view(np.uint8)), 0.0, 1.0)
        values = volume.astype(np.float64)
        low, high = float(values.min()), float(values.max())
        step = (high - low) / 255.0 or 1.0
        return cls(np.rint((values - low) / step).astype(np.uint8), low, step)

    def back(self, values: Bytes3) -> npt.NDArray[np.float64]:
        """Voxel values of decoded samples."""
        return self.low + self.step * values.astype(np.float64)
