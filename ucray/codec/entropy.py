"""Entropy coding by whole numbers only: which table codes which symbol, and the coder itself.

The table of a latent is the sum of integers that stand in the weights, chosen by integers that
stand in the stream: the codes of the codebook cell it lies in, and the quality. No float computed
by a network decides how a stream is parsed, so bytes written on one machine parse on every other.
The coder is constriction's ANS coder; its fixed-point models follow from the integer frequencies
by the law written down in FORMAT.md. This module imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import constriction
import numpy as np
import numpy.typing as npt

from ucray.errors import ChunkError

SCALE_UNITS = 16
"""Units of an octave in the integer tables of scales and gains."""

TABLE_UNITS = 2
"""Scale units from one frequency table to the next: eight tables an octave."""

TABLE_OCTAVES = (-4.5, 6.0)
"""log2 of the logistic scale of the first and the last frequency table."""

TOTAL = 1 << 16
"""Sum of the frequencies of every table."""

Codes = npt.NDArray[np.uint8]
Symbols = npt.NDArray[np.int32]
AnySymbols = npt.NDArray[np.int16] | Symbols


@dataclass(frozen=True)
class StreamTables:
    """All integers that fix the stream, and the steps that turn symbols into latents.

    Parameters
    ----------
    mean, scale
        int8 (stages, codes, cells, latents): addends of a code to the mean of a latent, in steps of
        `mean_step`, and to its log2 scale, in units of 1 / SCALE_UNITS.
    mean_step
        float32 (latents,).
    base
        int16 (latents,): log2 scale before any code, in the same units.
    gain
        int16 (qualities, latents): log2 of the quality gain, in the same units.
    reach
        int16 (tables,): table t codes the symbols from -reach[t] to reach[t], and an escape.
    frequencies
        uint16, all tables behind one another, each 2 * reach[t] + 2 long with a sum of TOTAL.
    code_frequencies
        uint16 (stages, codes): each row with a sum of TOTAL.
    code_stride
        Latent cells per code (z, y, x).
    """

    mean: npt.NDArray[np.int8]
    mean_step: npt.NDArray[np.float32]
    scale: npt.NDArray[np.int8]
    base: npt.NDArray[np.int16]
    gain: npt.NDArray[np.int16]
    reach: npt.NDArray[np.int16]
    frequencies: npt.NDArray[np.uint16]
    code_frequencies: npt.NDArray[np.uint16]
    code_stride: tuple[int, int, int]

    def table_indices(self, codes: Codes, quality: int) -> npt.NDArray[np.uint8]:
        """Frequency table of every latent: codes (stages, z, y, x) to (latents, Z, Y, X)."""
        units = self._spread(self.scale, codes)
        units += (self.base.astype(np.int32) + self.gain[quality])[:, None, None, None]
        first = int(TABLE_OCTAVES[0] * SCALE_UNITS)
        tables = (units - first + TABLE_UNITS // 2) // TABLE_UNITS
        return np.clip(tables, 0, len(self.reach) - 1).astype(np.uint8)

    def means(self, codes: Codes) -> npt.NDArray[np.float32]:
        """Mean of every latent before the gain: (latents, Z, Y, X)."""
        means = self._spread(self.mean, codes).astype(np.float32) * self.mean_step[:, None, None, None]
        return np.asarray(means, dtype=np.float32)

    def log_gain(self, quality: int) -> npt.NDArray[np.float32]:
        """log2 of the gain of each latent at `quality`: (latents,)."""
        return np.asarray(self.gain[quality] / SCALE_UNITS, dtype=np.float32)

    def _spread(self, table: npt.NDArray[np.int8], codes: Codes) -> npt.NDArray[np.int32]:
        chosen = table[0][codes[0]].astype(np.int32)
        for entries, code in zip(table[1:], codes[1:], strict=True):
            chosen += entries[code]
        z, y, x = codes.shape[1:]
        a, b, c = self.code_stride
        cells = chosen.reshape(z, y, x, a, b, c, -1).transpose(6, 0, 3, 1, 4, 2, 5)
        return np.ascontiguousarray(cells).reshape(-1, z * a, y * b, x * c)

    @cached_property
    def symbol_models(self) -> list[constriction.stream.model.Categorical]:
        """One coder model per frequency table."""
        ends = np.cumsum(2 * self.reach.astype(np.int64) + 2)
        return [_model(part) for part in np.split(self.frequencies, ends[:-1])]

    @cached_property
    def code_models(self) -> list[constriction.stream.model.Categorical]:
        """One coder model per stage of the codebook."""
        return [_model(row) for row in self.code_frequencies]


def encode(
    tables: StreamTables, codes: Codes, symbols: AnySymbols, quality: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int32]]:
    """Code one chunk: (words of the coder, escaped symbols in coding order).

    Parameters
    ----------
    codes
        uint8 (stages, z, y, x).
    symbols
        int32 (latents, Z, Y, X) on the latent grid.
    """
    indices = tables.table_indices(codes, quality).reshape(-1)
    order = np.argsort(indices, kind="stable")
    used, starts = np.unique(indices[order], return_index=True)
    sorted_symbols = symbols.reshape(-1)[order].astype(np.int32)
    reach = tables.reach.astype(np.int32)[indices[order]]
    escaped = np.abs(sorted_symbols) > reach
    letters = np.where(escaped, 2 * reach + 1, sorted_symbols + reach).astype(np.int32)
    coder = constriction.stream.stack.AnsCoder()
    # The coder is a stack: what the decoder needs first is pushed last.
    for table, part in reversed(list(zip(used, np.split(letters, starts[1:]), strict=True))):
        coder.encode_reverse(part, tables.symbol_models[table])
    for model, row in reversed(list(zip(tables.code_models, codes, strict=True))):
        coder.encode_reverse(row.reshape(-1).astype(np.int32), model)
    return coder.get_compressed(), sorted_symbols[escaped]


def decode(
    tables: StreamTables,
    words: npt.NDArray[np.uint32],
    escapes: npt.NDArray[np.int32],
    grid: tuple[int, int, int],
    quality: int,
) -> tuple[Codes, Symbols]:
    """Undo `encode` for a chunk of `grid` codes (z, y, x).

    Raises
    ------
    ChunkError
        If the words end early, are left over, or the escapes do not fit them.
    """
    try:
        coder = constriction.stream.stack.AnsCoder(words)
    except ValueError as error:
        raise ChunkError(f"the coded symbols are damaged: {error}") from None
    count = math.prod(grid)
    codes = np.stack(
        [coder.decode(model, count).astype(np.uint8).reshape(grid) for model in tables.code_models]
    )
    indices = tables.table_indices(codes, quality)
    shape = indices.shape
    order = np.argsort(indices.reshape(-1), kind="stable")
    used, counts = np.unique(indices, return_counts=True)
    letters = np.concatenate(
        [coder.decode(tables.symbol_models[table], int(n)) for table, n in zip(used, counts, strict=True)]
    )
    reach = np.repeat(tables.reach.astype(np.int32)[used], counts)
    escaped = letters == 2 * reach + 1
    if not coder.is_empty() or int(escaped.sum()) != len(escapes):
        raise ChunkError("the coded symbols do not fill the chunk exactly")
    values = letters.astype(np.int32) - reach
    values[escaped] = escapes
    symbols = np.empty(len(values), dtype=np.int32)
    symbols[order] = values
    return codes, symbols.reshape(shape)


def logistic_weights() -> list[npt.NDArray[np.float64]]:
    """Weights of all tables under logistic priors: per table its symbols and, last, the escape."""
    low, high = TABLE_OCTAVES
    count = int((high - low) * SCALE_UNITS / TABLE_UNITS) + 1
    weights = []
    for table in range(count):
        scale = 2.0 ** (low + table * TABLE_UNITS / SCALE_UNITS)
        reach = max(2, math.ceil(6.0 * scale))
        edges = (np.arange(2 * reach + 2) - reach - 0.5) / scale
        mass = np.diff(1.0 / (1.0 + np.exp(-np.clip(edges, -700, 700))))
        weights.append(np.append(mass, max(1.0 - mass.sum(), 1e-7)))
    return weights


def to_frequencies(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    """Whole frequencies of at least 1 with a sum of TOTAL, close to `weights` (any scale)."""
    share = weights / weights.sum() * (TOTAL - len(weights))
    frequencies = np.floor(share).astype(np.int64) + 1
    missing = TOTAL - int(frequencies.sum())
    frequencies[np.argsort(-(share - np.floor(share)), kind="stable")[:missing]] += 1
    return np.asarray(frequencies, dtype=np.uint16)


def _model(frequencies: npt.NDArray[np.uint16]) -> constriction.stream.model.Categorical:
    # Multiples of 2**-16 are exact in float64, and so is constriction's conversion of them to its
    # 24-bit models: no rounding is left to differ between machines.
    return constriction.stream.model.Categorical(
        frequencies.astype(np.float64) / TOTAL, lazy=False, perfect=False
    )
