"""Entropy coding by whole numbers only: frequency tables and the coder over them.

Which table codes which symbol is decided by `ucray.codec.context`. The coder is constriction's ANS
coder; its fixed-point models follow from the integer frequencies by the law written down in
FORMAT.md. This module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import constriction
import numpy as np
import numpy.typing as npt

from ucray.codec.context import SCALE_UNITS, TABLE_OCTAVES, TABLE_UNITS, TABLES, Codes, Tables
from ucray.errors import ChunkError

TOTAL = 1 << 16
"""Sum of the frequencies of every table."""

SILENT = 0
"""The table that codes nothing: its symbols are zero."""

Symbols = npt.NDArray[np.int16] | npt.NDArray[np.int32]
Model: TypeAlias = constriction.stream.model.Categorical


@dataclass(frozen=True)
class FrequencyTables:
    """How often every letter of every table comes.

    Parameters
    ----------
    reach
        int16 (tables,): table t codes the symbols from -reach[t] to reach[t], and an escape.
    frequencies
        uint16, all tables behind one another, each 2 * reach[t] + 2 long with a sum of TOTAL.
    code_frequencies
        uint16 (stages, codes): each row with a sum of TOTAL.
    """

    reach: npt.NDArray[np.int16]
    frequencies: npt.NDArray[np.uint16]
    code_frequencies: npt.NDArray[np.uint16]

    @cached_property
    def tables(self) -> list[npt.NDArray[np.uint16]]:
        """Frequencies of each table."""
        ends = np.cumsum(2 * self.reach.astype(np.int64) + 2)
        return np.split(self.frequencies, ends[:-1])

    @cached_property
    def symbol_models(self) -> list[Model]:
        """One coder model per frequency table."""
        return [_model(table) for table in self.tables]

    @cached_property
    def code_models(self) -> list[Model]:
        """One coder model per stage of the codebook."""
        return [_model(row) for row in self.code_frequencies]

    @cached_property
    def extra_bits(self) -> npt.NDArray[np.float32]:
        """Bits that symbol 1 costs beyond 0, and 2 beyond 1: (tables, 2)."""
        middle = [table[reach : reach + 3] for table, reach in zip(self.tables, self.reach, strict=True)]
        bits = -np.log2(np.array(middle, dtype=np.float64))
        return np.diff(bits, axis=1).astype(np.float32)

    def bits_of(self, tables: Tables, symbols: Symbols) -> float:
        """About how many bits symbols take with their tables, both flat; an escape counts two bytes more."""
        letters = self.letters_of(tables, symbols)
        escaped = int(np.isin(letters, self._escapes).sum())
        return float(self._letter_bits[letters].sum()) + 16.0 * escaped

    def letters_of(self, tables: Tables, symbols: Symbols) -> npt.NDArray[np.int64]:
        """Places in `frequencies` of symbols that are coded with tables, both flat; none for silent ones."""
        coded = np.flatnonzero(tables != SILENT)
        table, symbol = tables[coded], symbols[coded].astype(np.int64)
        reach = self.reach.astype(np.int64)[table]
        letters = np.where(np.abs(symbol) > reach, 2 * reach + 1, symbol + reach)
        return np.asarray(self._starts[table] + letters)

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        lengths = 2 * self.reach.astype(np.int64) + 2
        return np.asarray(np.cumsum(lengths) - lengths)

    @cached_property
    def _escapes(self) -> npt.NDArray[np.int64]:
        return np.asarray(self._starts + 2 * self.reach.astype(np.int64) + 1)

    @cached_property
    def _letter_bits(self) -> npt.NDArray[np.float32]:
        return (math.log2(TOTAL) - np.log2(self.frequencies.astype(np.float64))).astype(np.float32)


def encode(
    frequencies: FrequencyTables, codes: Codes | None, parts: Sequence[tuple[Tables, Symbols]]
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int32]]:
    """Code one chunk: (words of the coder, escaped symbols in coding order).

    Parameters
    ----------
    codes
        uint8 (stages, z, y, x); None for symbols alone.
    parts
        For each pass the tables and the symbols, flat, in the order of the cells.
    """
    coder = constriction.stream.stack.AnsCoder()
    escapes = []
    # The coder is a stack: what the decoder needs first is pushed last.
    for tables, symbols in reversed(parts):
        order, used, counts = _coding_order(tables)
        values = symbols[order].astype(np.int32)
        reach = np.repeat(frequencies.reach.astype(np.int32)[used], counts)
        escaped = np.abs(values) > reach
        escapes.append(values[escaped])
        letters = np.where(escaped, 2 * reach + 1, values + reach).astype(np.int32)
        end = len(letters)
        for table, count in zip(reversed(used), reversed(counts), strict=True):
            coder.encode_reverse(letters[end - count : end], frequencies.symbol_models[table])
            end -= count
    planes = [] if codes is None else list(zip(frequencies.code_models, codes, strict=True))
    for model, row in reversed(planes):
        coder.encode_reverse(row.reshape(-1).astype(np.int32), model)
    return coder.get_compressed(), np.concatenate([*reversed(escapes), np.empty(0, np.int32)])


class SymbolReader:
    """Undoes `encode`, pass by pass; every method raises ChunkError where the words are damaged."""

    def __init__(
        self,
        frequencies: FrequencyTables,
        words: npt.NDArray[np.uint32],
        escapes: npt.NDArray[np.int32],
    ) -> None:
        self._frequencies = frequencies
        self._escapes = escapes
        self._taken = 0
        try:
            self._coder = constriction.stream.stack.AnsCoder(words)
        except ValueError as error:
            raise ChunkError(f"the coded symbols are damaged: {error}") from None

    def codes(self, grid: tuple[int, int, int]) -> Codes:
        """Codes (stages, z, y, x) of a grid (z, y, x)."""
        count = math.prod(grid)
        planes = [self._coder.decode(model, count) for model in self._frequencies.code_models]
        return np.array(planes, dtype=np.uint8).reshape(len(planes), *grid)

    def symbols(self, tables: Tables) -> npt.NDArray[np.int32]:
        """Symbols of one pass, from its tables, flat."""
        order, used, counts = _coding_order(tables)
        symbols = np.zeros(len(tables), dtype=np.int32)
        if not len(order):
            return symbols
        models = self._frequencies.symbol_models
        letters = np.concatenate(
            [self._coder.decode(models[t], int(n)) for t, n in zip(used, counts, strict=True)]
        )
        reach = np.repeat(self._frequencies.reach.astype(np.int32)[used], counts)
        values = letters.astype(np.int32) - reach
        escaped = letters == 2 * reach + 1
        if count := int(escaped.sum()):
            found = self._escapes[self._taken : self._taken + count]
            if len(found) != count:
                raise ChunkError("the coded symbols do not fill the chunk exactly")
            values[escaped] = found
            self._taken += count
        symbols[order] = values
        return symbols

    def finish(self) -> None:
        """Refuse what is left over."""
        if not self._coder.is_empty() or self._taken != len(self._escapes):
            raise ChunkError("the coded symbols do not fill the chunk exactly")


def logistic_weights() -> list[npt.NDArray[np.float64]]:
    """Weights of all tables under logistic priors: per table its symbols and, last, the escape."""
    weights = []
    for table in range(TABLES):
        scale = 2.0 ** (TABLE_OCTAVES[0] + table * TABLE_UNITS / SCALE_UNITS)
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


def _coding_order(tables: Tables) -> tuple[npt.NDArray[np.int64], Tables, npt.NDArray[np.int64]]:
    """Places by table, without the silent one; tables in use, and their counts."""
    counts = np.bincount(tables, minlength=256)
    order = np.argsort(tables, kind="stable")[counts[SILENT] :]
    counts[SILENT] = 0
    used = np.flatnonzero(counts)
    return order, used.astype(np.uint8), counts[used]


def _model(frequencies: npt.NDArray[np.uint16]) -> Model:
    # Multiples of 2**-16 are exact in float64, and so is constriction's conversion of them to its
    # 24-bit models: no rounding is left to differ between machines.
    return constriction.stream.model.Categorical(
        frequencies.astype(np.float64) / TOTAL, lazy=False, perfect=False
    )
