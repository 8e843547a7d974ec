"""Voxels at another scale: exact averages when it is coarser, trilinear interpolation when it is finer.

Both are separable: one matrix an axis. A voxel of scale s is s voxels of the volume long; the first of both
begin at the same corner. A voxel cut off by the volume's end averages what lies inside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ucray.grid import Box, Shape3, triple

Scale3 = tuple[float, float, float]
Matrix = npt.NDArray[np.float32]

TILE = 128
"""Voxels of the source that are worked on at once, on each axis; a bound on memory."""


@dataclass(frozen=True)
class Tile:
    """A part of what is wanted: where it goes, the box of the volume it comes from, a matrix an axis."""

    target: Box
    source: Box
    weights: tuple[Matrix, Matrix, Matrix]

    def of(self, voxels: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """The tile's voxels from those of its source box, in their dtype; whole numbers are rounded.

        Of voxels some of which are no finite numbers the others are averaged; of none is NaN.
        """
        if all(len(matrix) == n and (matrix == np.eye(n)).all() for matrix, n in self._axes(voxels)):
            return np.ascontiguousarray(voxels)
        values = voxels.astype(np.float32)
        finite = np.isfinite(values)
        if finite.all():
            values = self._averaged(values)
        else:
            shares = self._averaged(finite.astype(np.float32))
            sums = self._averaged(np.where(finite, values, np.float32(0)))
            values = np.divide(sums, shares, out=np.full_like(sums, np.nan), where=shares > 0)
        if np.issubdtype(voxels.dtype, np.integer):
            limits = np.iinfo(voxels.dtype.name)
            values = np.clip(np.rint(values), limits.min, limits.max)
        return np.ascontiguousarray(values, dtype=voxels.dtype)

    def _axes(self, voxels: npt.NDArray[np.generic]) -> Iterator[tuple[Matrix, int]]:
        return zip(self.weights, voxels.shape, strict=True)

    def _averaged(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        for axis, matrix in enumerate(self.weights):
            values = np.moveaxis(np.tensordot(matrix, values, (1, axis)), 0, axis)
        return values


def scaled_shape(shape: Shape3, scale: Scale3) -> Shape3:
    """Shape of a volume of `shape` at a scale: voxels that lie in it in part are counted."""
    # Of a quotient that is whole but for rounding, the rounding is not counted.
    return triple(max(1, math.ceil(round(n / s, 9))) for n, s in zip(shape, scale, strict=True))


def tiles(box: Box, scale: Scale3, shape: Shape3) -> Iterator[Tile]:
    """The tiles of a box (in voxels of the scale) of a volume of `shape`."""
    steps = [max(1, int(TILE / s)) for s in scale]
    spans = [
        [(a, min(a + step, stop)) for a in range(start, stop, step)]
        for start, stop, step in zip(box.start, box.stop, steps, strict=True)
    ]
    for parts in itertools.product(*spans):
        found = [_axis(a, b, s, n) for (a, b), s, n in zip(parts, scale, shape, strict=True)]
        target = Box(triple(a for a, _ in parts), triple(b for _, b in parts))
        source = Box(triple(first for first, _ in found), triple(f + len(m[0]) for f, m in found))
        z, y, x = (matrix for _, matrix in found)
        yield Tile(target, source, (z, y, x))


def _axis(start: int, stop: int, scale: float, extent: int) -> tuple[int, Matrix]:
    """First voxel of the source, and the share of each from it on in voxels `start` to `stop`."""
    places = np.arange(start, stop)
    if scale >= 1.0:
        low, high = places * scale, np.minimum((places + 1) * scale, extent)
        first, last = math.floor(low[0]), min(math.ceil(round(high[-1], 9)), extent)
        source = np.arange(first, last)
        shared = np.minimum(high[:, None], source + 1) - np.maximum(low[:, None], source)
        return first, (np.maximum(shared, 0.0) / (high - low)[:, None]).astype(np.float32)
    centers = np.clip((places + 0.5) * scale - 0.5, 0.0, extent - 1.0)
    first, last = math.floor(centers[0]), math.ceil(centers[-1]) + 1
    source = np.arange(first, last)
    return first, np.maximum(1.0 - np.abs(centers[:, None] - source), 0.0).astype(np.float32)
