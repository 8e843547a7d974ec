"""Fill voxels: padding outside the tissue, which must come back exactly and cost next to nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ucray.codec.frames import pack, unpack_exactly
from ucray.errors import ChunkError

Mask = npt.NDArray[np.bool_]
Voxels = npt.NDArray[np.generic]

LEVEL = 9
"""zstd level of packed masks; they are small."""


def fill_mask(voxels: Voxels, fill_value: float) -> Mask:
    """True where a voxel is the fill value; a fill value of NaN matches NaN, and no whole number."""
    if np.isnan(fill_value):
        whole = np.issubdtype(voxels.dtype, np.integer)
        return np.zeros(voxels.shape, bool) if whole else np.isnan(voxels)
    return np.asarray(voxels == voxels.dtype.type(fill_value))


def pack_mask(mask: Mask) -> bytes:
    """Pack a mask (z, y, x): the shorter of its bits, and of where they change along all axes."""
    changes = mask.copy()
    for axis in range(mask.ndim):
        changes ^= _delayed(changes, axis)
    candidates = (_packed(mask), _packed(changes))
    best = min(range(2), key=lambda i: len(candidates[i]))
    return bytes([best]) + candidates[best]


def unpack_mask(data: bytes, shape: tuple[int, int, int]) -> Mask:
    """Undo `pack_mask`.

    Raises
    ------
    ChunkError
        If `data` is no packed mask of that shape.
    """
    count = math.prod(shape)
    packed = np.empty(-(-count // 8), dtype=np.uint8)
    if not unpack_exactly(data[1:], packed):
        raise ChunkError("the mask of fill voxels is damaged")
    mask = np.unpackbits(packed, count=count).astype(bool).reshape(shape)
    if data[0] == 1:
        for axis in range(mask.ndim):
            mask = np.logical_xor.accumulate(mask, axis=axis)
    elif data[0] != 0:
        raise ChunkError("the mask of fill voxels has an unknown form")
    return mask


def keep_off_fill(decoded: Voxels, mask: Mask, fill_value: float) -> Voxels:
    """Set masked voxels to the fill value, and move any other that met it to the next value."""
    if np.isnan(fill_value) and np.issubdtype(decoded.dtype, np.integer):
        return decoded
    fill = decoded.dtype.type(fill_value)
    collided = fill_mask(decoded, fill_value) & ~mask
    if mask.any():
        decoded = np.where(mask, fill, decoded)
    if collided.any() and not np.isnan(fill_value):
        decoded = np.where(collided, _next_value(fill), decoded)
    return decoded


def _next_value(fill: Any) -> Any:
    if np.issubdtype(fill.dtype, np.floating):
        return np.nextafter(fill, fill.dtype.type(np.inf))
    top = np.iinfo(fill.dtype).max
    return fill.dtype.type(int(fill) + 1 if int(fill) < top else top - 1)


def _delayed(mask: Mask, axis: int) -> Mask:
    delayed = np.zeros_like(mask)
    ahead = [slice(None)] * mask.ndim
    behind = [slice(None)] * mask.ndim
    ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
    delayed[tuple(ahead)] = mask[tuple(behind)]
    return delayed


def _packed(mask: Mask) -> bytes:
    return pack(np.packbits(mask).tobytes(), LEVEL)
