"""Frequency tables: how often every symbol comes, in whole numbers that sum to a power of two.

Which table codes which symbol is decided by `ucray.codec.context`; `ucray.codec.entropy` codes with them.
This module imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import constriction
import numpy as np
import numpy.typing as npt

from ucray.codec.context import SCALE_UNITS, TABLE_OCTAVES, TABLE_UNITS, TABLES, Tables
from ucray.codec.trellis import Trellis, trellis_of
from ucray.config import TrellisStates

TOTAL = 1 << 16
"""Sum of the frequencies of every table."""

INTERVALS = 1 << 24
"""What the coder divides among the letters of a table."""

SILENT = 0
"""The table that codes nothing: its symbols are zero."""

ESCAPE_BITS = 16.0
"""Of a symbol that no table holds, beside its letter: about two bytes."""

Symbols = npt.NDArray[np.int16] | npt.NDArray[np.int32]
Model: TypeAlias = constriction.stream.model.Categorical


@dataclass(frozen=True)
class FrequencyTables:
    """How often every letter of every table comes.

    Where latents lie on the paths of a trellis, tables from `first_dependent` on are there twice: behind the
    TABLES of the first quantiser stand those of the second.

    Parameters
    ----------
    reach
        int16 (tables,): table t codes the symbols from -reach[t] to reach[t], and an escape.
    frequencies
        uint16, all tables behind one another, each 2 * reach[t] + 2 long with a sum of TOTAL.
    code_frequencies
        uint16 (stages, codes): each row with a sum of TOTAL.
    states
        Of the trellis.
    """

    reach: npt.NDArray[np.int16]
    frequencies: npt.NDArray[np.uint16]
    code_frequencies: npt.NDArray[np.uint16]
    states: TrellisStates = 8

    @property
    def trellis(self) -> Trellis:
        """Where symbols lie on paths, what leads where."""
        return trellis_of(self.states)

    @property
    def first_dependent(self) -> int:
        """The first table whose symbols lie on paths; TABLES where none do."""
        return 2 * TABLES - len(self.reach)

    @cached_property
    def tables(self) -> list[npt.NDArray[np.uint16]]:
        """Frequencies of each table."""
        return np.split(self.frequencies, self._starts[1:])

    @cached_property
    def symbol_models(self) -> list[Model]:
        """One coder model per frequency table."""
        return [_model(table) for table in self.tables]

    @cached_property
    def quantisers(self) -> tuple[list[tuple[Model, int]], list[tuple[Model, int]]]:
        """Model and reach of each table in the first quantiser and in the second, where it is in both."""
        both = list(zip(self.symbol_models, self.reach.tolist(), strict=True))
        first = self.first_dependent
        return both[:TABLES], [*both[:first], *both[TABLES:]]

    @cached_property
    def code_models(self) -> list[Model]:
        """One coder model per stage of the codebook."""
        return [_model(row) for row in self.code_frequencies]

    @cached_property
    def intervals(self) -> npt.NDArray[np.int64]:
        """The coder's intervals: left ends of all letters of a table and INTERVALS, table behind table."""
        return np.concatenate([_intervals(table) for table in self.tables])

    @cached_property
    def interval_starts(self) -> npt.NDArray[np.int64]:
        """Where each table starts in `intervals`, and where the last one ends: (tables + 1,)."""
        return np.concatenate([[0], np.cumsum(2 * self._reach + 3)])

    @cached_property
    def code_intervals(self) -> list[npt.NDArray[np.int64]]:
        """The same of each stage of the codebook."""
        return [_intervals(row) for row in self.code_frequencies]

    @cached_property
    def extra_bits(self) -> npt.NDArray[np.float32]:
        """Bits that symbol 1 costs beyond 0, and 2 beyond 1: (tables, 2)."""
        middle = [table[reach : reach + 3] for table, reach in zip(self.tables, self.reach, strict=True)]
        bits = -np.log2(np.array(middle, dtype=np.float64))
        return np.diff(bits, axis=1).astype(np.float32)

    def bits_of(self, tables: Tables, symbols: Symbols) -> float:
        """About how many bits symbols take with their tables, both flat."""
        letters = self.letters_of(tables, symbols)
        escaped = int(np.isin(letters, self._starts + 2 * self._reach + 1).sum())
        return float(self._letter_bits[letters].sum()) + ESCAPE_BITS * escaped

    @cached_property
    def size_bits(self) -> npt.NDArray[np.float32]:
        """About how many bits a symbol of a size takes with each table: (tables, sizes).

        Sizes go one beyond the largest reach: what is larger takes as much.
        """
        sizes = np.arange(int(self._reach.max()) + 2)
        reach = self._reach[:, None]
        letters = self._starts[:, None] + reach + np.minimum(sizes, reach + 1)
        return np.asarray(self._letter_bits[letters] + np.float32(ESCAPE_BITS) * (sizes > reach))

    def letters_of(self, tables: Tables, symbols: Symbols) -> npt.NDArray[np.int64]:
        """Places in `frequencies` of symbols that are coded with tables, both flat; none for silent ones."""
        coded = np.flatnonzero(tables != SILENT)
        table, symbol = tables[coded], symbols[coded].astype(np.int64)
        reach = self._reach[table]
        letters = np.where(np.abs(symbol) > reach, 2 * reach + 1, symbol + reach)
        return np.asarray(self._starts[table] + letters)

    @cached_property
    def _reach(self) -> npt.NDArray[np.int64]:
        return self.reach.astype(np.int64)

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        lengths = 2 * self._reach + 2
        return np.asarray(np.cumsum(lengths) - lengths)

    @cached_property
    def _letter_bits(self) -> npt.NDArray[np.float32]:
        return (math.log2(TOTAL) - np.log2(self.frequencies.astype(np.float64))).astype(np.float32)


def logistic_weights(first_dependent: int = TABLES) -> list[npt.NDArray[np.float64]]:
    """Weights of all tables under logistic priors: per table its symbols and, last, the escape.

    Those of the second quantiser follow, from `first_dependent` on.
    """
    first = [_logistic(table, second=False) for table in range(TABLES)]
    return first + [_logistic(table, second=True) for table in range(first_dependent, TABLES)]


def _logistic(table: int, *, second: bool) -> npt.NDArray[np.float64]:
    scale = 2.0 ** (TABLE_OCTAVES[0] + table * TABLE_UNITS / SCALE_UNITS)
    reach = max(2, math.ceil(6.0 * scale))
    # Points of the second quantiser lie half a space nearer to zero; letters end half way between points.
    points = np.arange(reach + 2) - 0.5 * second * (np.arange(reach + 2) > 0)
    ends = (points[1:] + points[:-1]) / 2
    edges = np.concatenate([-ends[::-1], ends]) / scale
    mass = np.diff(1.0 / (1.0 + np.exp(-np.clip(edges, -700, 700))))
    return np.append(mass, max(1.0 - mass.sum(), 1e-7))


def to_frequencies(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    """Whole frequencies of at least 1 with a sum of TOTAL, close to `weights` (any scale)."""
    share = weights / weights.sum() * (TOTAL - len(weights))
    frequencies = np.floor(share).astype(np.int64) + 1
    missing = TOTAL - int(frequencies.sum())
    frequencies[np.argsort(-(share - np.floor(share)), kind="stable")[:missing]] += 1
    return np.asarray(frequencies, dtype=np.uint16)


def _intervals(frequencies: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
    """Left ends of the letters, and INTERVALS: constriction's own, in whole numbers."""
    letters = len(frequencies)
    ends = np.concatenate([[0], np.cumsum(frequencies.astype(np.int64))])
    left = ends * (INTERVALS - letters) // TOTAL + np.arange(letters + 1)
    return np.asarray(left, dtype=np.int64)


def _model(frequencies: npt.NDArray[np.uint16]) -> Model:
    # Multiples of 2**-16 are exact in float64, and so is constriction's conversion of them to its
    # 24-bit models: no rounding is left to differ between machines.
    return constriction.stream.model.Categorical(
        frequencies.astype(np.float64) / TOTAL, lazy=False, perfect=False
    )
