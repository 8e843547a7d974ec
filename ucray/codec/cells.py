"""Cells of voxels laid out side by side, and back.

Copies go number by number. Where nothing is learned, the voxels of a cell that lie in a row are taken as one
number as wide as all of them, if there is one: that takes a fraction of the time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ucray.grid import Shape3

BY_BYTES = {4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""Numbers by their bytes; what they stand for does not matter where they are copied."""


def cells_to_volume(values: Tensor, cell: Shape3) -> Tensor:
    """Lay values (batch, z, y, x, voxels of a cell) out as a volume (batch, 1, Z, Y, X)."""
    batch, z, y, x, _ = values.shape
    a, b, _ = cell
    wide = _wide(values, cell)
    rows = values if wide is None else values.view(wide)
    laid = rows.reshape(batch, z, y, x, a, b, -1).permute(0, 1, 4, 2, 5, 3, 6)
    return _narrow(laid, values.dtype).reshape(batch, 1, z * a, y * b, -1)


def volume_to_cells(volume: Tensor, cell: Shape3) -> Tensor:
    """Undo `cells_to_volume`: (batch, 1, Z, Y, X) to (batch, z, y, x, voxels of a cell)."""
    batch, _, z, y, x = volume.shape
    a, b, c = cell
    wide = _wide(volume, cell)
    rows = volume if wide is None else volume.view(wide)
    laid = rows.reshape(batch, z // a, a, y // b, b, x // c, -1).permute(0, 1, 3, 5, 2, 4, 6)
    return _narrow(laid, volume.dtype).reshape(batch, z // a, y // b, x // c, -1)


def volume_to_channels(volume: Tensor, cell: Shape3) -> Tensor:
    """Volumes (batch, 1, Z, Y, X) as channels (batch, voxels of a cell, z, y, x), last in memory."""
    if _wide(volume, cell) in (torch.int64, torch.complex128):
        return volume_to_cells(volume, cell).permute(0, 4, 1, 2, 3)
    # Cells first and then their voxels: in one go, rows this short take several times as long.
    batch, _, z, y, x = volume.shape
    a, b, c = cell
    laid = volume.reshape(batch, z // a, a, y // b, b, x // c, c).permute(0, 2, 4, 6, 1, 3, 5)
    channels = laid.reshape(batch, a * b * c, z // a, y // b, x // c)
    return channels.contiguous(memory_format=torch.channels_last_3d)


def channels_to_volume(channels: Tensor, cell: Shape3) -> Tensor:
    """Undo `volume_to_channels`."""
    return cells_to_volume(channels.permute(0, 2, 3, 4, 1), cell)


def _wide(values: Tensor, cell: Shape3) -> torch.dtype | None:
    """The number as wide as a row of a cell's voxels; None where there is none, or gradients are wanted."""
    if torch.is_grad_enabled() or not values.is_contiguous():
        return None
    return BY_BYTES.get(cell[2] * values.element_size())


def _narrow(laid: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in their order, as those that they stand for."""
    if laid.dtype == dtype:
        # A view of another type, be it the same, has no gradient.
        return laid
    # Where nothing has to move, a row of one number keeps a stride that no narrower number may have.
    return laid.reshape(-1).view(dtype)
