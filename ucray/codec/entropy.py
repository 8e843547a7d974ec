"""Entropy coding by whole numbers only: frequency tables and the coder over them.

Which table codes which symbol is decided by `ucray.codec.context`. The coder is constriction's ANS
coder; its fixed-point models follow from the integer frequencies by the law written down in
FORMAT.md. This module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import constriction
import numpy as np
import numpy.typing as npt

from ucray.codec.context import SCALE_UNITS, TABLE_OCTAVES, TABLE_UNITS, TABLES, Codes, Tables
from ucray.codec.trellis import NEXT, Layout, levels_of
from ucray.errors import ChunkError

TOTAL = 1 << 16
"""Sum of the frequencies of every table."""

LARGEST_SEEN = 255
"""Sizes beyond count as this where an encoder chooses between symbols or tables."""

SILENT = 0
"""The table that codes nothing: its symbols are zero."""

_NEXT = NEXT.tolist()

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
    """

    reach: npt.NDArray[np.int16]
    frequencies: npt.NDArray[np.uint16]
    code_frequencies: npt.NDArray[np.uint16]

    @property
    def first_dependent(self) -> int:
        """The first table whose symbols lie on paths; TABLES where none do."""
        return 2 * TABLES - len(self.reach)

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

    def bits_of_size(
        self, tables: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Bits of each symbol of a size, not negative, with its table; an escape counts two bytes more."""
        escaped = sizes > self._reach[tables]
        letters = self._middles[tables] + np.minimum(sizes, self._reach[tables] + 1)
        return np.asarray(self._letter_bits[letters] + np.float32(16.0) * escaped)

    @cached_property
    def size_bits(self) -> npt.NDArray[np.float32]:
        """`bits_of_size` of all tables and of sizes up to LARGEST_SEEN: (tables, sizes)."""
        sizes = np.arange(LARGEST_SEEN + 1)
        tables = np.arange(len(self.reach))
        return self.bits_of_size(tables.repeat(len(sizes)), np.tile(sizes, len(tables))).reshape(
            len(tables), -1
        )

    def letters_of(self, tables: Tables, symbols: Symbols) -> npt.NDArray[np.int64]:
        """Places in `frequencies` of symbols that are coded with tables, both flat; none for silent ones."""
        coded = np.flatnonzero(tables != SILENT)
        table, symbol = tables[coded], symbols[coded].astype(np.int64)
        reach = self.reach.astype(np.int64)[table]
        letters = np.where(np.abs(symbol) > reach, 2 * reach + 1, symbol + reach)
        return np.asarray(self._starts[table] + letters)

    @cached_property
    def _reach(self) -> npt.NDArray[np.int64]:
        return self.reach.astype(np.int64)

    @cached_property
    def _middles(self) -> npt.NDArray[np.int64]:
        return np.asarray(self._starts + self._reach)

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
    frequencies: FrequencyTables,
    codes: Codes | None,
    parts: Sequence[tuple[Tables, Symbols]],
    first_dependent: int = TABLES,
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int32]]:
    """Code one chunk: (words of the coder, escaped symbols in coding order).

    Parameters
    ----------
    codes
        uint8 (stages, z, y, x); None for symbols alone.
    parts
        For each pass the tables, those of the second quantiser for its symbols, and the symbols, flat, in the
        order of the cells.
    first_dependent
        The first table whose symbols lie on paths.
    """
    coder = constriction.stream.stack.AnsCoder()
    escapes = []
    # The coder is a stack: what the decoder needs first is pushed last.
    models = frequencies.symbol_models
    for tables, symbols in reversed(parts):
        own = np.where(tables < TABLES, tables, tables - np.uint8(TABLES - first_dependent))
        layout = Layout.of(own.astype(np.uint8), first_dependent)
        values, used = symbols[layout.order].astype(np.int32), tables[layout.order]
        reach = frequencies.reach.astype(np.int32)[used]
        escaped = np.abs(values) > reach
        escapes.append(values[escaped])
        letters = np.where(escaped, 2 * reach + 1, values + reach).astype(np.int32)
        on_paths = zip(letters[layout.plain :].tolist(), used[layout.plain :].tolist(), strict=True)
        for letter, table in reversed(list(on_paths)):
            coder.encode_reverse(letter, models[table])
        for table, start, end in reversed(list(_runs(layout.tables[: layout.plain]))):
            coder.encode_reverse(letters[start:end], models[table])
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
        self._reach = frequencies.reach.tolist()
        self._models = frequencies.symbol_models
        self._quantisers = frequencies.quantisers
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
        """Symbols of one pass that lie on no path, from its tables, flat."""
        layout = Layout.of(tables, TABLES)
        symbols = np.zeros(len(tables), dtype=np.int32)
        symbols[layout.order] = self._in_runs(layout.tables)
        return symbols

    def levels(self, tables: Tables) -> npt.NDArray[np.int64]:
        """Quantisation steps that the symbols of one pass stand for, on paths, from its tables, flat."""
        layout = Layout.of(tables, self._frequencies.first_dependent)
        symbols = np.empty(len(layout.order), dtype=np.int64)
        second = np.zeros(len(layout.order), dtype=bool)
        symbols[: layout.plain] = self._in_runs(layout.tables[: layout.plain])
        symbols[layout.plain :], second[layout.plain :] = self._on_paths(layout)
        levels = np.zeros(len(tables), dtype=np.int64)
        levels[layout.order] = levels_of(symbols, second)
        return levels

    def _on_paths(self, layout: Layout) -> tuple[list[int], list[int]]:
        """The next symbols on the paths of a pass, and which quantiser each is of.

        One by one: only the last symbol says which table is next.
        """
        decode, kinds = self._coder.decode, self._quantisers
        tables, paths = layout.tables[layout.plain :].tolist(), layout.paths
        symbols, quantisers, states = [], [], [0] * paths
        for start in range(0, len(tables), paths):
            for path, table in enumerate(tables[start : start + paths]):
                state = states[path]
                quantiser = state & 1
                model, reach = kinds[quantiser][table]
                symbol = decode(model) - reach
                if symbol > reach:
                    symbol = self._next_escape()
                symbols.append(symbol)
                quantisers.append(quantiser)
                states[path] = _NEXT[symbol & 1][state]
        return symbols, quantisers

    def finish(self) -> None:
        """Refuse what is left over."""
        if not self._coder.is_empty() or self._taken != len(self._escapes):
            raise ChunkError("the coded symbols do not fill the chunk exactly")

    def _in_runs(self, tables: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """The next symbols, of tables in their order."""
        found = [np.empty(0, np.int32)]
        for table, start, end in _runs(tables):
            reach = self._reach[table]
            symbols = self._coder.decode(self._models[table], end - start) - reach
            for place in np.flatnonzero(symbols > reach):
                symbols[place] = self._next_escape()
            found.append(symbols)
        return np.concatenate(found)

    def _next_escape(self) -> int:
        if self._taken == len(self._escapes):
            raise ChunkError("the coded symbols do not fill the chunk exactly")
        self._taken += 1
        return int(self._escapes[self._taken - 1])


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


def _runs(tables: npt.NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """Runs of the same table: table, start, end."""
    if len(tables):
        ends = [*(np.flatnonzero(tables[1:] != tables[:-1]) + 1).tolist(), len(tables)]
        starts = [0, *ends[:-1]]
        yield from zip(tables[starts].tolist(), starts, ends, strict=True)


def _model(frequencies: npt.NDArray[np.uint16]) -> Model:
    # Multiples of 2**-16 are exact in float64, and so is constriction's conversion of them to its
    # 24-bit models: no rounding is left to differ between machines.
    return constriction.stream.model.Categorical(
        frequencies.astype(np.float64) / TOTAL, lazy=False, perfect=False
    )
