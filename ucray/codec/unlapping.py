"""Lapping undone in whole numbers, for reconstructions that are the same to the bit on every machine.

Stages of small matrices in units of 2**-SHIFT are multiplied out for a whole axis, and rounded after every
product. Whole numbers below 2**53 are exact in float64 in any order. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ucray.grid import Shape3

STAGES = 4
"""Stages of an axis; odd ones are shifted by half a cell."""

SHIFT = 13
"""Of the matrices' whole numbers."""

VALUE_SHIFT = 12
"""Values are whole numbers of 2**-VALUE_SHIFT deviations ..."""

LARGEST_VALUE = 1 << 28
"""... and no larger than this before each axis ..."""

LARGEST_ENTRY = (1 << 15) - 1
"""... nor a matrix' entries than this. Cells have at most 128 voxels an axis, so rows at most 512 entries:
sums stay within 2**52."""

Blocks = tuple[npt.NDArray[np.int16], npt.NDArray[np.int16], npt.NDArray[np.int16]]
Values = npt.NDArray[np.float64]


def block_sizes(cell: int, stage: int) -> tuple[int, int, int]:
    """Voxels of the first, inner and last matrices of a stage."""
    return (cell // 2, cell, cell - cell // 2) if stage % 2 else (cell, cell, cell)


@dataclass(frozen=True)
class Unlapping:
    """The inverse of lapping.

    Parameters
    ----------
    cell
        Voxels of a latent cell (z, y, x).
    axes
        Stages of each axis ("z", "y", "x") whose cells are longer than one voxel, the last one first:
        first, inner and last matrices, int16.
    """

    cell: Shape3
    axes: Mapping[str, Sequence[Blocks]]

    def __call__(self, values: Values) -> Values:
        """Volumes (z, y, x), in units of 2**-VALUE_SHIFT, rounded before and after each axis."""
        values = _whole(values)
        for axis, (name, cell) in enumerate(zip("zyx", self.cell, strict=True)):
            size = values.shape[axis]
            if name in self.axes and size > cell:
                mixed = np.tensordot(self._matrix(name, size), values, axes=(1, axis))
                values = _whole(np.moveaxis(mixed, 0, axis) * 0.5**SHIFT)
        return values

    def _matrix(self, name: str, size: int) -> Values:
        """That of a whole axis, made once."""
        found = self._made.get((name, size))
        if found is None:
            found = self._made[name, size] = whole_axis(self.axes[name], size).astype(np.float64)
        return found

    @cached_property
    def _made(self) -> dict[tuple[str, int], Values]:
        return {}


def whole_axis(stages: Sequence[Blocks], size: int) -> npt.NDArray[np.int64]:
    """The stages of an axis of `size` voxels in one matrix (size, size), in units of 2**-SHIFT."""
    whole = np.eye(size, dtype=np.int64) << SHIFT
    for stage in stages:
        mixed, start = np.zeros((size, size), np.int64), 0
        inside = (size - len(stage[0]) - len(stage[2])) // len(stage[1])
        for block in (stage[0], *[stage[1]] * inside, stage[2]):
            # Blocks lie along the diagonal: each mixes rows of its own.
            places = slice(start, start + len(block))
            mixed[places] = block.astype(np.int64) @ whole[places]
            start = places.stop
        whole = np.clip((mixed + (1 << (SHIFT - 1))) >> SHIFT, -LARGEST_ENTRY, LARGEST_ENTRY)
    return whole


def _whole(values: Values) -> Values:
    return np.clip(np.rint(values), -LARGEST_VALUE, LARGEST_VALUE)
