"""Entropy coding by whole numbers only: symbols to words and back.

The coder is constriction's ANS coder; its fixed-point models follow from the integer frequencies by the
law written down in FORMAT.md, by which `ucray.codec.kernels` encodes. This module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import constriction
import numpy as np
import numpy.typing as npt

from ucray.codec.context import TABLES, Codes, Tables
from ucray.codec.frequencies import FrequencyTables, Symbols
from ucray.codec.kernels import EXHAUSTED, Kernels, compiled, compiled_where_worth_it
from ucray.codec.trellis import Layout, points_of
from ucray.errors import ChunkError


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
    kernels = compiled()
    planes = [] if codes is None else list(zip(frequencies.code_intervals, codes, strict=True))
    symbols_given = sum(len(tables) for tables, _ in parts)
    letters = symbols_given + sum(plane.size for _, plane in planes)
    left, width = np.empty(letters, np.int64), np.empty(letters, np.int64)
    escapes = np.empty(symbols_given, np.int32)
    taken, escaped = 0, 0
    for ends, plane in planes:
        here, chosen = slice(taken, taken + plane.size), plane.reshape(-1).astype(np.int64)
        left[here] = ends[chosen]
        width[here] = ends[chosen + 1] - ends[chosen]
        taken += plane.size
    for tables, symbols in parts:
        found, beyond = kernels.intervals_of(
            tables,
            symbols,
            TABLES - first_dependent,
            frequencies.intervals,
            frequencies.interval_starts,
            left[taken:],
            width[taken:],
            escapes[escaped:],
        )
        taken, escaped = taken + found, escaped + beyond
    return kernels.push(left[:taken], width[:taken]), escapes[:escaped].copy()


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

    def points(self, tables: Tables) -> npt.NDArray[np.int64]:
        """Quantisation steps that the symbols of one pass stand for, on paths, from its tables, flat."""
        layout = Layout.of(tables, self._frequencies.first_dependent)
        symbols = np.empty(len(layout.order), dtype=np.int64)
        second = np.zeros(len(layout.order), dtype=bool)
        kernels = compiled_where_worth_it(len(layout.order) - layout.alone)
        if kernels is None:
            symbols[: layout.alone] = self._in_runs(layout.tables[: layout.alone])
            symbols[layout.alone :], second[layout.alone :] = self._on_paths(layout)
        else:
            self._pull(kernels, layout, symbols, second)
        points = np.zeros(len(tables), dtype=np.int64)
        points[layout.order] = points_of(symbols, second)
        return points

    def _on_paths(self, layout: Layout) -> tuple[list[int], list[int]]:
        """The next symbols on the paths of a pass, and which quantiser each is of.

        One by one: only the last symbol says which table is next.
        """
        decode, kinds = self._coder.decode, self._frequencies.quantisers
        tables, trellis = layout.tables[layout.alone :].tolist(), self._frequencies.trellis
        paths, following = trellis.paths_for(len(tables)), trellis.following.tolist()
        symbols, quantisers, states = [], [], [0] * paths
        for number, table in enumerate(tables):
            path = number % paths
            state = states[path]
            quantiser = state & 1
            model, reach = kinds[quantiser][table]
            symbol = decode(model) - reach
            if symbol > reach:
                symbol = self._next_escape()
            symbols.append(symbol)
            quantisers.append(quantiser)
            states[path] = following[symbol & 1][state]
        return symbols, quantisers

    def _pull(
        self,
        kernels: Kernels,
        layout: Layout,
        symbols: npt.NDArray[np.int64],
        second: npt.NDArray[np.bool_],
    ) -> None:
        """All symbols of a pass, compiled: into `symbols` and `second`."""
        words, tables = self._coder.get_compressed(), self._frequencies
        paths = tables.trellis.paths_for(len(layout.tables) - layout.alone)
        left, self._taken = kernels.pull(
            words,
            self._escapes,
            self._taken,
            tables.intervals,
            tables.interval_starts,
            layout.tables,
            layout.alone,
            TABLES - tables.first_dependent,
            tables.trellis.following,
            np.zeros(paths, np.int64),
            symbols,
            second,
        )
        if left == EXHAUSTED:
            raise ChunkError("the coded symbols do not fill the chunk exactly")
        self._coder = constriction.stream.stack.AnsCoder(words[:left])

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


def _runs(tables: npt.NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """Runs of the same table: table, start, end."""
    if len(tables):
        ends = [*(np.flatnonzero(tables[1:] != tables[:-1]) + 1).tolist(), len(tables)]
        starts = [0, *ends[:-1]]
        yield from zip(tables[starts].tolist(), starts, ends, strict=True)
