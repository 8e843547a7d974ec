"""The encoder's half of the trellis: the path of least squared error + slope * bits (Viterbi 1967)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ucray.codec.context import TABLES
from ucray.codec.frequencies import FrequencyTables
from ucray.codec.trellis import NEXT, SPACING, STATES, Layout

Floats = npt.NDArray[np.float64]
Costs = npt.NDArray[np.float32]
Whole = npt.NDArray[np.int64]

_HALF = STATES // 2

_BEFORE = np.add.outer([0, _HALF], np.arange(STATES) // 2)
"""The two states that lead to each state: (2, states)."""

_BRANCH = 2 * (_BEFORE % 2) + (NEXT[1, _BEFORE] == np.arange(STATES))
"""How they do: 2 * quantiser + parity of the symbol (2, states)."""

_WAYS = _BRANCH.reshape(-1)


def best_symbols(
    frequencies: FrequencyTables, layout: Layout, scaled: Floats, slope: Floats
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.bool_]]:
    """Symbols on all paths of a pass, and which are of the second quantiser; both in the layout's order.

    Parameters
    ----------
    scaled, slope
        What is coded, in quantisation steps, and the squared error in squared steps that a bit is worth:
        float64, of the symbols on paths, in the layout's order.
    """
    tables = layout.tables[layout.alone :]
    symbols, costs = _branches(frequencies, tables, np.abs(scaled), slope)
    paths, count = layout.paths, len(tables)
    steps = -(-count // paths)
    # What is missing on the last step costs nothing.
    costs = np.pad(costs, ((0, 0), (0, steps * paths - count))).reshape(4, steps, paths)
    branch = _best_branches(costs).reshape(-1)[:count]
    chosen = symbols[branch, np.arange(count)]
    return np.copysign(chosen, scaled).astype(np.int16), branch >= 2


def _branches(
    frequencies: FrequencyTables, tables: Whole, size: Floats, slope: Floats
) -> tuple[Floats, Costs]:
    """For each quantiser and parity the best symbol's size, and its cost: both (4, symbols)."""
    bits, shift = frequencies.size_bits, TABLES - frequencies.first_dependent
    largest = bits.shape[1] - 1
    symbols, costs = np.empty((4, len(tables))), np.empty((4, len(tables)), dtype=np.float32)
    for branch in range(4):
        second, parity = divmod(branch, 2)
        row = (tables + second * shift) * bits.shape[1]
        # The two symbols of this parity between which the value lies.
        lower = 2.0 * np.floor(((size + second) / SPACING - parity) / 2.0) + parity
        np.maximum(lower, parity, out=lower)
        both = []
        for symbol in (lower, lower + 2.0):
            # As `points_of` has it; of the second quantiser zero is zero.
            error = size - np.maximum(SPACING * symbol - second, 0.0)
            letter = row + np.minimum(symbol, largest).astype(np.int64)
            both.append(error * error + slope * bits.take(letter))
        symbols[branch] = lower + 2.0 * (both[1] < both[0])
        costs[branch] = np.minimum(*both)
    return symbols, costs


def _best_branches(costs: Costs) -> npt.NDArray[np.intp]:
    """The branches of the cheapest paths: costs (branches, steps, paths) to (steps, paths)."""
    _, steps, paths = costs.shape
    total = np.full((2, _HALF, 1, paths), np.inf, dtype=costs.dtype)
    total[0, 0] = 0.0
    # Ways into the states: from the lower states and from the upper ones, two from each.
    ways = np.empty((2, _HALF, 2, paths), dtype=costs.dtype)
    lower, upper = ways
    best = np.empty((_HALF, 2, paths), dtype=costs.dtype)
    from_upper = np.empty((steps, _HALF, 2, paths), dtype=bool)
    # Steps are many and short: nothing is made in them that could be made once.
    for cost, chosen in zip(np.ascontiguousarray(costs.transpose(1, 0, 2)), from_upper, strict=True):
        cost.take(_WAYS, axis=0, out=ways.reshape(len(_WAYS), paths), mode="clip")
        np.add(ways, total, out=ways)
        np.less(upper, lower, out=chosen)
        np.minimum(lower, upper, out=best)
        total = best.reshape(2, _HALF, 1, paths)
    state = total.reshape(STATES, paths).argmin(axis=0)
    place, at = np.arange(paths), np.empty(paths, dtype=np.intp)
    states = np.empty((steps, paths), dtype=np.intp)
    uppers = np.empty((steps, paths), dtype=bool)
    for step in reversed(range(steps)):
        states[step] = state
        np.multiply(state, paths, out=at)
        np.add(at, place, out=at)
        from_upper[step].reshape(-1).take(at, out=uppers[step], mode="clip")
        # As _BEFORE has it.
        np.right_shift(state, 1, out=state)
        np.add(state, _HALF, out=state, where=uppers[step])
    return np.asarray(_BRANCH[uppers.view(np.uint8), states])
