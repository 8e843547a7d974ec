"""Crops of a labelled volume as a network is shown them: turned, blurred, noisy and of other contrast."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from ucray.bench.tissue import Labels
from ucray.grid import Shape3, triple

APART = (1, 3, 9)
"""Voxels between those that may belong to one neuron."""

CROP = 64**3
"""Voxels of a crop."""

SECTIONS = 8
"""Of a crop where they are thick."""

BLURRED, LARGEST_BLUR = 0.7, 1.5
"""Share of the crops, and deviation in voxels."""

NOISY, LARGEST_NOISE = 0.5, 0.5
"""Share of the crops, and deviation in those of the volume."""

CONTRAST, BRIGHTNESS = 0.2, 0.2
"""Largest change of a crop's deviation, and of its mean, in deviations of the volume."""


def offsets(flat: bool) -> list[tuple[int, int]]:
    """Axes, and voxels along them, across which neurons are compared."""
    return [(axis, distance) for distance in APART for axis in ((1, 2) if flat else (0, 1, 2))]


@dataclass(frozen=True)
class Crops:
    """What a network is shown: normalised voxels with what is known of them (z, y, x)."""

    voxels: npt.NDArray[np.float32]
    membrane: npt.NDArray[np.bool_]
    known: npt.NDArray[np.bool_]
    segments: Labels
    flat: bool
    random: np.random.Generator

    @property
    def size(self) -> Shape3:
        """Of a crop: a cube, or of few sections where these are thick; no larger than the volume."""
        deep = SECTIONS if self.flat else round(CROP ** (1 / 3))
        wide = math.isqrt(CROP // deep)
        return triple(min(n, most) for n, most in zip(self.voxels.shape, (deep, wide, wide), strict=True))

    def drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """One crop (1, z, y, x), with targets and where these are known (1 + offsets, z, y, x)."""
        random = self.random
        starts = [int(random.integers(n - m + 1)) for n, m in zip(self.voxels.shape, self.size, strict=True)]
        here = tuple(slice(start, start + m) for start, m in zip(starts, self.size, strict=True))
        axes = self._order()
        back = tuple(axis for axis in range(3) if random.random() < 0.5)

        def turned(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
            return np.ascontiguousarray(np.flip(values[here].transpose(axes), back))

        voxels = self._changed(turned(self.voxels).astype(np.float32))
        segments = torch.from_numpy(turned(self.segments).astype(np.int64))
        targets = [torch.from_numpy(turned(self.membrane).astype(np.float32))]
        known = [torch.from_numpy(turned(self.known).astype(np.float32))]
        for axis, distance in offsets(self.flat):
            far = segments.roll(distance, axis)
            both = (far > 0) & (segments > 0)
            both.narrow(axis, 0, min(distance, both.shape[axis])).zero_()
            targets.append((far != segments).float())
            known.append(both.float())
        return torch.from_numpy(voxels)[None], torch.stack(targets), torch.stack(known)

    def _order(self) -> list[int]:
        """Axes of the volume in another order, where a crop is as long along all that may be turned."""
        fixed = [0] if self.flat else []
        turned = range(len(fixed), 3)
        if len({self.size[axis] for axis in turned}) > 1:
            return [0, 1, 2]
        return [*fixed, *(len(fixed) + self.random.permutation(len(turned)))]

    def _changed(self, voxels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        random = self.random
        if random.random() < BLURRED:
            wide = random.uniform(0.0, LARGEST_BLUR)
            voxels = ndimage.gaussian_filter(voxels, (0.0 if self.flat else wide, wide, wide), truncate=3.0)
        if random.random() < NOISY:
            noise = random.standard_normal(voxels.shape, np.float32)
            voxels = voxels + np.float32(random.uniform(0.0, LARGEST_NOISE)) * noise
        contrast, brightness = random.uniform(-CONTRAST, CONTRAST), random.uniform(-BRIGHTNESS, BRIGHTNESS)
        return np.asarray(voxels * np.float32(1.0 + contrast) + np.float32(brightness), np.float32)
