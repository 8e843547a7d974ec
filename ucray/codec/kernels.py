"""Loops that no array operation can express, for numba to compile: a coder's letters.

Every step of them needs the one before. They are plain Python, as those of `ucray.codec.rounding` and
`ucray.codec.arithmetic` are; `compiled` gives them as machine code, which
numba keeps on disk where it may. Readers can do without (`ucray.codec.entropy`), so that a process that
reads a chunk or two need not load a compiler. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt

from ucray.codec.arithmetic import BY_LOOPS, Arithmetic
from ucray.codec.context import TABLES
from ucray.codec.rounding import cheapest_paths, in_steps, largest_gain, points_worth, round_alone

Words = npt.NDArray[np.uint32]
Whole = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Loop = TypeVar("Loop", bound=Callable[..., Any])

EXHAUSTED = -1
"""What `pull` gives for words left where the escapes do not suffice."""

WORTH_LOADING = 2_000_000
"""Symbols that are read one by one in the time that loading the loops takes."""


class Kernels(NamedTuple):
    """The compiled loops; what they do stands at the functions they are made from."""

    intervals_of: Callable[..., tuple[int, int]]
    push: Callable[[Whole, Whole], Words]
    pull: Callable[..., tuple[int, int]]
    largest_gain: Callable[..., float]
    in_steps: Callable[..., tuple[Floats, Floats]]
    round_alone: Callable[..., None]
    cheapest_paths: Callable[..., None]
    points_worth: Callable[..., tuple[Whole, float]]
    arithmetic: Arithmetic


def intervals_of(
    tables: npt.NDArray[np.uint8],
    symbols: npt.NDArray[np.integer],
    shift: int,
    intervals: Whole,
    starts: Whole,
    left: Whole,
    width: Whole,
    escapes: npt.NDArray[np.int32],
) -> tuple[int, int]:
    """Intervals of the symbols of one pass, in the layout's order: how many, and how many escape.

    Parameters
    ----------
    tables, symbols
        In the order of the cells; tables of the second quantiser, from TABLES on, are `shift` above those of
        the first that say as much.
    intervals, starts
        Left ends of all tables' letters and 2^24, table behind table, and where each starts.
    left, width, escapes
        Where left ends, widths, and symbols that no table holds go.
    """
    # Sorted by table as `ucray.codec.trellis.Layout` is; table 0 is not coded.
    following = np.zeros(TABLES + 1, np.int64)
    for table in tables:
        own = table - shift if table >= TABLES else np.int64(table)
        following[own + 1] += 1
    coded = len(tables) - following[1]
    following[1] = 0
    for table in range(TABLES):
        following[table + 1] += following[table]
    order = np.empty(coded, np.int64)
    for place in range(len(tables)):
        table = tables[place]
        own = table - shift if table >= TABLES else np.int64(table)
        if own > 0:
            order[following[own]] = place
            following[own] += 1
    escaped = 0
    for number in range(coded):
        table, symbol = tables[order[number]], np.int64(symbols[order[number]])
        start = starts[table]
        reach = (starts[table + 1] - start - 3) // 2
        letter = start + reach + symbol
        if abs(symbol) > reach:
            letter = start + 2 * reach + 1
            escapes[escaped] = symbol
            escaped += 1
        left[number] = intervals[letter]
        width[number] = intervals[letter + 1] - intervals[letter]
    return coded, escaped


def push(left: Whole, width: Whole) -> Words:
    """Words of the ANS coder for intervals of 2^24, int64 (letters,), the first one decoded first."""
    words = np.empty(len(left) + 2, np.uint32)
    state, count = np.uint64(0), 0
    for number in range(len(left) - 1, -1, -1):
        wide = np.uint64(width[number])
        if state >> np.uint64(40) >= wide:
            words[count] = state & np.uint64(0xFFFFFFFF)
            state >>= np.uint64(32)
            count += 1
        state = ((state // wide) << np.uint64(24)) | (np.uint64(left[number]) + state % wide)
    while state > np.uint64(0):
        words[count] = state & np.uint64(0xFFFFFFFF)
        state >>= np.uint64(32)
        count += 1
    return words[:count].copy()


def pull(
    words: Words,
    escapes: npt.NDArray[np.int32],
    taken: int,
    intervals: Whole,
    starts: Whole,
    tables: Whole,
    alone: int,
    shift: int,
    following: Whole,
    states: Whole,
    symbols: Whole,
    second: npt.NDArray[np.bool_],
) -> tuple[int, int]:
    """Read the symbols of one pass: words left, or EXHAUSTED, and escapes taken.

    Parameters
    ----------
    words
        Of the coder; those that are left, with its state, are written back.
    escapes, taken
        Symbols that no table holds, and how many of them were read before.
    intervals, starts
        Left ends of all tables' letters and 2^24, table behind table, and where each starts.
    tables, alone, shift
        Of the first quantiser, in the layout's order, the first `alone` of which are on no path; those of the
        second are `shift` on.
    following
        Of the trellis.
    states
        Zeros: the state of every path.
    symbols, second
        Where symbols and quantisers go, in the layout's order.
    """
    count, state, paths = len(words), np.uint64(0), len(states)
    for number in range(len(tables)):
        while state >> np.uint64(32) == np.uint64(0) and count > 0:
            count -= 1
            state = (state << np.uint64(32)) | np.uint64(words[count])
        path = (number - alone) % paths
        quantiser = states[path] & 1 if number >= alone else 0
        table = tables[number] + quantiser * shift
        start, low, high = starts[table], starts[table], starts[table + 1] - 1
        reach = (high - low) // 2 - 1
        place = np.int64(state & np.uint64(0xFFFFFF))
        while high - low > 1:
            middle = (low + high) // 2
            if intervals[middle] <= place:
                low = middle
            else:
                high = middle
        width = np.uint64(intervals[low + 1] - intervals[low])
        state = (state >> np.uint64(24)) * width + np.uint64(place - intervals[low])
        symbol = low - start - reach
        if symbol > reach:
            if taken == len(escapes):
                return EXHAUSTED, taken
            symbol = np.int64(escapes[taken])
            taken += 1
        symbols[number] = symbol
        second[number] = quantiser == 1
        if number >= alone:
            states[path] = following[symbol & 1, states[path]]
    while state > np.uint64(0):
        words[count] = state & np.uint64(0xFFFFFFFF)
        state >>= np.uint64(32)
        count += 1
    return count, taken


@cache
def compiled() -> Kernels:
    """The loops as machine code: under a second where it is kept on disk, some seconds where it is not."""
    import numba

    def to_machine_code(loop: Loop) -> Loop:
        try:
            return cast(Loop, numba.njit(loop, cache=True, nogil=True))
        except RuntimeError:
            # There is no folder to keep it in.
            return cast(Loop, numba.njit(loop, nogil=True))

    return Kernels(
        to_machine_code(intervals_of),
        to_machine_code(push),
        to_machine_code(pull),
        to_machine_code(largest_gain),
        to_machine_code(in_steps),
        to_machine_code(round_alone),
        to_machine_code(cheapest_paths),
        to_machine_code(points_worth),
        Arithmetic(
            to_machine_code(BY_LOOPS.finish),
            to_machine_code(BY_LOOPS.read_off),
            to_machine_code(BY_LOOPS.take_in),
        ),
    )


class Reading:
    """How much this process has read without the loops."""

    def __init__(self) -> None:
        self._symbols = 0

    def kernels(self, symbols: int) -> Kernels | None:
        """The loops for so many symbols more, once they are loaded or would have been worth it."""
        if self._symbols >= WORTH_LOADING or compiled.cache_info().currsize:
            return _at_hand()
        self._symbols += symbols
        return None


_READING = Reading()
compiled_where_worth_it = _READING.kernels


@cache
def _at_hand() -> Kernels | None:
    try:
        return compiled()
    except ImportError:
        return None
