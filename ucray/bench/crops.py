"""Crops of a labelled volume as a network is shown them: turned, blurred, noisy and of other contrast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ucray.grid import Shape3, triple

Number = TypeVar("Number", bound=np.generic)

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
    segments: npt.NDArray[np.int32]
    flat: bool
    random: np.random.Generator

    @property
    def size(self) -> Shape3:
        """Of a crop: a cube, or of few sections where these are thick; no larger than the volume."""
        deep = SECTIONS if self.flat else round(CROP ** (1 / 3))
        wide = math.isqrt(CROP // deep)
        return triple(min(n, most) for n, most in zip(self.voxels.shape, (deep, wide, wide), strict=True))

    def drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """One crop (1, z, y, x), targets, and where these are known: bool (1 + offsets, z, y, x)."""
        random = self.random
        starts = [int(random.integers(n - m + 1)) for n, m in zip(self.voxels.shape, self.size, strict=True)]
        here = tuple(slice(start, start + m) for start, m in zip(starts, self.size, strict=True))
        axes = self._order()
        back = tuple(axis for axis in range(3) if random.random() < 0.5)

        def turned(values: npt.NDArray[Number]) -> npt.NDArray[Number]:
            return np.ascontiguousarray(np.flip(values[here].transpose(axes), back))

        voxels, segments = self._changed(turned(self.voxels)), turned(self.segments)
        targets, known = [turned(self.membrane)], [turned(self.known)]
        for axis, distance in offsets(self.flat):
            along = np.moveaxis(segments, axis, 0)
            ahead, behind = along[distance:], along[:-distance]
            differs, both = np.zeros((2, *segments.shape), bool)
            np.moveaxis(differs, axis, 0)[distance:] = ahead != behind
            np.moveaxis(both, axis, 0)[distance:] = (ahead > 0) & (behind > 0)
            targets.append(differs)
            known.append(both)
        return torch.from_numpy(voxels)[None], _stacked(targets), _stacked(known)

    def _order(self) -> list[int]:
        """Axes of the volume in another order, where a crop is as long along all that may be turned."""
        fixed = [0] if self.flat else []
        turned = range(len(fixed), 3)
        if len({self.size[axis] for axis in turned}) > 1:
            return [0, 1, 2]
        return [*fixed, *(len(fixed) + self.random.permutation(len(turned)))]

    def _changed(self, voxels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        from scipy import ndimage

        random = self.random
        if random.random() < BLURRED:
            wide = random.uniform(0.0, LARGEST_BLUR)
            voxels = ndimage.gaussian_filter(voxels, (0.0 if self.flat else wide, wide, wide), truncate=3.0)
        if random.random() < NOISY:
            noise = random.standard_normal(voxels.shape, np.float32)
            voxels = voxels + np.float32(random.uniform(0.0, LARGEST_NOISE)) * noise
        contrast, brightness = random.uniform(-CONTRAST, CONTRAST), random.uniform(-BRIGHTNESS, BRIGHTNESS)
        return np.asarray(voxels * np.float32(1.0 + contrast) + np.float32(brightness), np.float32)


def _stacked(masks: list[npt.NDArray[np.bool_]]) -> Tensor:
    return torch.from_numpy(np.stack(masks))
