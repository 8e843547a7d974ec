"""What is left of a chunk to a bound on every voxel, against a prediction in whole numbers.

A network's output differs in its last places between machines, so no bound can stand on it. The
prediction here is a matrix product of whole numbers, exact in float64 in any order, and a few single
operations that IEEE 754 defines to the bit. So a bound that held where the chunk was written holds
where it is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ucray.codec import entropy
from ucray.codec.bitstream import ResidualBody
from ucray.codec.chunk import ChunkFormat, Voxels
from ucray.codec.context import TABLES
from ucray.codec.entropy import SymbolReader
from ucray.codec.frames import pack, unpack_exactly
from ucray.codec.frequencies import SILENT, FrequencyTables
from ucray.codec.unlapping import VALUE_SHIFT, Unlapping
from ucray.errors import ChunkError
from ucray.grid import Shape3

LARGEST_LATENT = 1 << 24
"""Latents beyond are cut off before they are summed."""

TABLE_LEVEL = 3
"""zstd level of the tables' numbers."""

LARGEST_SCALE = 16.0
"""Residuals of a larger mean size leave their low bits uncoded."""

LARGEST_SHIFT = 24

LARGEST_STEPS = 2.0**53
"""Steps of a residual that float64 counts one by one."""

LARGEST_HIGH = 1 << 30
"""What is coded of a residual: in zigzag form, a number of a chunk has 31 bits."""

LARGEST_BOUND = 1e30
"""Bounds beyond would overflow where they are multiplied."""

Whole = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Reference:
    """A linear reconstruction in whole numbers.

    Parameters
    ----------
    weight
        int16 (latents, voxels of a latent cell), in units of 2**-shift.
    cell
        Voxels of a latent cell (z, y, x).
    unlapping
        Takes the cells' voxels to the volume's.
    """

    weight: npt.NDArray[np.int16]
    shift: int
    cell: Shape3
    unlapping: Unlapping

    @cached_property
    def _matrix(self) -> npt.NDArray[np.float64]:
        return self.weight.astype(np.float64)

    def predict(self, latents: Whole, chunk: ChunkFormat) -> npt.NDArray[np.float64]:
        """Voxels of whole latents (z, y, x, latents); whole numbers for dtypes of whole numbers."""
        inputs = np.clip(latents, -LARGEST_LATENT, LARGEST_LATENT).reshape(-1, latents.shape[-1])
        sums = (inputs.astype(np.float64) @ self._matrix) * 2.0 ** (VALUE_SHIFT - self.shift)
        values = self.unlapping(to_volume(sums.reshape(*latents.shape[:3], -1), self.cell))
        values = values * 0.5**VALUE_SHIFT * chunk.scale + chunk.offset
        if chunk.dtype == "float32":
            return values
        limits = np.iinfo(chunk.dtype)
        return np.clip(np.rint(values), limits.min, limits.max)


@dataclass(frozen=True)
class Residual:
    """Residuals of one chunk as the entropy coder takes them.

    `tables` uint8 (cells,); `values` int32 (cells, voxels of a cell), without `shift` low bits, which
    stand in `low`, packed.
    """

    max_error: float
    shift: int
    tables: npt.NDArray[np.uint8]
    values: npt.NDArray[np.int32]
    low: bytes


def residual_of(
    voxels: Voxels,
    kept: npt.NDArray[np.bool_],
    predicted: npt.NDArray[np.float64],
    max_error: float,
    cell: Shape3,
    frequencies: FrequencyTables,
) -> Residual | None:
    """Residuals that bring every voxel within `max_error` of itself; zero where `kept` is False.

    Each cell gets the table that codes it in the fewest bits. None where they are too large to be written.
    """
    step = _step(voxels.dtype, max_error)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        steps = np.rint((voxels.astype(np.float64) - predicted) / step)
    steps = np.where(kept, steps, 0.0)
    if not np.abs(steps).max() < LARGEST_STEPS:
        return None
    whole = to_cells(steps, cell).astype(np.int64)
    mean = float(np.abs(whole).mean())
    shift = min(LARGEST_SHIFT, max(0, math.ceil(math.log2(mean / LARGEST_SCALE)))) if mean else 0
    high = whole >> shift
    if np.abs(high).max() >= LARGEST_HIGH:
        return None
    return Residual(
        max_error,
        shift,
        _shortest(np.abs(high), frequencies),
        high.astype(np.int32),
        _packed(whole - (high << shift), shift),
    )


def _shortest(sizes: Whole, frequencies: FrequencyTables) -> npt.NDArray[np.uint8]:
    """The table of fewest bits for each cell, from sizes (cells, voxels); SILENT where all are zero."""
    bits = frequencies.size_bits[1:TABLES]
    cells, seen = len(sizes), bits.shape[1]
    places = np.minimum(sizes, seen - 1) + seen * np.arange(cells)[:, None]
    counts = np.bincount(places.reshape(-1), minlength=cells * seen).reshape(cells, seen)
    tables = 1 + (counts.astype(np.float32) @ bits.T).argmin(axis=1)
    return np.where(counts[:, 0] == sizes.shape[1], SILENT, tables).astype(np.uint8)


def apply_residual(
    predicted: npt.NDArray[np.float64], residual: Residual, dtype: str, cell: Shape3
) -> Voxels:
    """Voxels of a prediction and its residual."""
    low = _unpacked(residual.low, residual.values.size, residual.shift)
    whole = (residual.values.astype(np.int64) << residual.shift) + low.reshape(residual.values.shape)
    cells = tuple(n // c for n, c in zip(predicted.shape, cell, strict=True))
    steps = to_volume(whole.reshape(*cells, -1), cell)
    values = predicted + steps * _step(np.dtype(dtype), residual.max_error)
    if dtype == "float32":
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(values, limits.min, limits.max).astype(dtype)


def encode_residual(residual: Residual, frequencies: FrequencyTables) -> ResidualBody:
    """Code a residual."""
    tables = residual.tables.repeat(residual.values.shape[1])
    words, escapes = entropy.encode(frequencies, None, [(tables, residual.values.reshape(-1))])
    packed = pack(residual.tables.tobytes(), TABLE_LEVEL)
    return ResidualBody(residual.max_error, residual.shift, packed, residual.low, words, escapes)


def decode_residual(body: ResidualBody, frequencies: FrequencyTables, cells: int, voxels: int) -> Residual:
    """Undo `encode_residual` for a chunk of so many cells of so many voxels.

    Raises
    ------
    ChunkError
        If the parts do not fit the chunk or each other.
    """
    tables = np.empty(cells, dtype=np.uint8)
    if not unpack_exactly(body.tables, tables) or tables.max() >= TABLES:
        raise ChunkError("a chunk whose tables of residuals are damaged")
    if body.shift > LARGEST_SHIFT or len(body.low) != (cells * voxels * body.shift + 7) // 8:
        raise ChunkError("a chunk whose low bits do not fill it exactly")
    if not 0.0 <= body.max_error <= LARGEST_BOUND:
        raise ChunkError("a chunk whose bound is no number")
    reader = SymbolReader(frequencies, body.words, body.escapes)
    values = reader.symbols(tables.repeat(voxels)).reshape(cells, voxels)
    reader.finish()
    return Residual(body.max_error, body.shift, tables, values, body.low)


def to_cells(values: npt.NDArray[np.float64], cell: Shape3) -> npt.NDArray[np.float64]:
    """A volume (z, y, x) as (cells, voxels of a cell), both row-major."""
    (z, y, x), (a, b, c) = values.shape, cell
    cells = values.reshape(z // a, a, y // b, b, x // c, c).transpose(0, 2, 4, 1, 3, 5)
    return cells.reshape(-1, a * b * c)


def to_volume(cells: npt.NDArray[np.generic], cell: Shape3) -> npt.NDArray[np.float64]:
    """Undo `to_cells`, from (z, y, x, voxels of a cell)."""
    (z, y, x, _), (a, b, c) = cells.shape, cell
    values = cells.reshape(z, y, x, a, b, c).transpose(0, 3, 1, 4, 2, 5).reshape(z * a, y * b, x * c)
    return np.asarray(values, dtype=np.float64)


def _step(dtype: np.dtype[np.generic], max_error: float) -> float:
    if np.issubdtype(dtype, np.floating):
        # A little less than twice the bound, for the rounding to float32 that follows.
        return 2.0 * max_error * (1.0 - 2.0**-20)
    return 2.0 * math.floor(max_error) + 1.0


def _packed(low: Whole, bits: int) -> bytes:
    if not bits:
        return b""
    planes = (low.reshape(-1, 1) >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(planes.astype(np.uint8).reshape(-1)).tobytes()


def _unpacked(low: bytes, count: int, bits: int) -> Whole:
    if not bits:
        return np.zeros(count, dtype=np.int64)
    planes = np.unpackbits(np.frombuffer(low, np.uint8), count=count * bits).reshape(count, bits)
    found = np.zeros(count, dtype=np.int64)
    for plane in planes.T:
        found <<= 1
        found |= plane
    return found
