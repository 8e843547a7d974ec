"""Lapping: filters across the borders of cells, before and after a transform of single cells.

A transform of cells knows nothing of what goes on beyond their borders: it codes twice what neighbours
share, and its errors show as blocks. Cheap filters of a whole axis in front of it, and their inverse
behind, make a lapped transform of it (Tran, Liang and Tu 2003, "Lapped transform via time-domain pre- and
post-filtering"; longer overlaps by more stages: de Queiroz, Nguyen and Rao 1996, "The GenLOT").

::

    voxels     |0 1 2 3 4 5 6 7|0 1 2 3 4 5 6 7|0 1 2 3 4 5 6 7|
    stage 0, 2 |---- first ----|---- inner ----|---- last -----|
    stage 1, 3 |first-|---- inner -----|---- inner -----|-last-|

Every stage is a row of small matrices. The first and the last of an axis have numbers of their own: a chunk
stands for itself, and what lies beyond its faces is not known.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from ucray.codec.unlapping import STAGES, block_sizes
from ucray.grid import Shape3


class Stage(nn.Module):
    """One stage of one axis; starts as no change."""

    def __init__(self, cell: int, stage: int) -> None:
        super().__init__()
        first, inner, last = block_sizes(cell, stage)
        self.first = nn.Parameter(torch.eye(first))
        self.inner = nn.Parameter(torch.eye(inner))
        self.last = nn.Parameter(torch.eye(last))

    def forward(self, size: int) -> Tensor:
        """The stage of an axis of `size` voxels as a matrix (size, size)."""
        inside = (size - len(self.first) - len(self.last)) // len(self.inner)
        return torch.block_diag(self.first, *[self.inner] * inside, self.last)  # type: ignore[no-untyped-call, no-any-return]


class Axis(nn.ModuleList):
    """All stages of one axis."""

    def __init__(self, cell: int) -> None:
        super().__init__(Stage(cell, stage) for stage in range(STAGES))

    def forward(self, size: int, *, inverse: bool = False) -> Tensor:
        """The stages of an axis of `size` voxels in one matrix: one product instead of many small ones."""
        stages = self.stages[::-1] if inverse else self.stages
        whole = torch.as_tensor(stages[0](size))
        for stage in stages[1:]:
            whole = stage(size) @ whole
        return whole

    @property
    def stages(self) -> list[Stage]:
        """In the order in which they filter."""
        return [stage for stage in self if isinstance(stage, Stage)]


class Lapping(nn.Module):
    """Learned filters of volumes (batch, 1, z, y, x), axis by axis.

    An axis along which a cell is one voxel long has none. The `inverse` has matrices of its own, in the
    opposite order.
    """

    def __init__(self, cell: Shape3, *, inverse: bool = False) -> None:
        super().__init__()
        self.cell = cell
        self.inverse = inverse
        self.axes = nn.ModuleDict(
            {axis: Axis(size) for axis, size in zip("zyx", cell, strict=True) if size > 1}
        )
        self._kept: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def train(self, mode: bool = True) -> Self:
        """As of every module; what was kept while nothing was learned is dropped."""
        self._kept.clear()
        return super().train(mode)

    def forward(self, volume: Tensor) -> Tensor:
        """The volume filtered; each axis a multiple of its cell."""
        shape = volume.shape
        for axis, size, cell in zip("zyx", shape[2:], self.cell, strict=True):
            # Whatever comes first goes last, so that three products of lines turn the volume once around.
            lines = volume.reshape(len(volume), size, -1).mT
            if axis in self.axes and size != cell:
                whole = self._whole(axis, size, volume.dtype).T
                # Of a batch of one, a product that knows no batches copies nothing.
                lines = (lines[0] @ whole)[None] if len(volume) == 1 else lines @ whole
            volume = lines
        return volume.reshape(shape)

    def _whole(self, axis: str, size: int, dtype: torch.dtype) -> Tensor:
        """The matrix of an axis; kept where nothing is learned any more."""
        key = axis, size, dtype
        if key in self._kept:
            return self._kept[key]
        whole = torch.as_tensor(self.axes[axis](size, inverse=self.inverse)).to(dtype)
        if not self.training:
            self._kept[key] = whole
        return whole
