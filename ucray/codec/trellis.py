"""Dependent quantisation: which of two quantisers a symbol is of, by the parities of those before it.

Both quantisers have every second point of a finer one, and zero. What a symbol may say so depends on the
path through a trellis, and the paths together lie denser in space than any grid of symbols rounded one by
one: with eight states at most 1.1 dB less error at equal rate, with 256 at most 1.33 (Marcellin and Fischer
1990, "Trellis coded quantization"; with zero in both, Schwarz, Nguyen, Marpe and Wiegand 2019, "Hybrid
video coding with trellis-coded quantization"). States cost an encoder time, a decoder none.
`ucray.codec.rounding` finds the path. This module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt

from ucray.codec.context import TABLES, Tables
from ucray.config import TrellisStates

LONGEST_PATH = 128
"""Symbols of a path through eight states, at most."""

FEWEST_PATHS = 8
"""Of a pass through them: an encoder can go along all of them together."""

LARGE_CODE = (0o515, 0o362)
"""Parity checks of 256 states, h0 and h1 (Ungerboeck 1987, "Trellis-coded modulation", part II, table I)."""

SPACING = 2
"""Quantisation steps from one point of a quantiser to the next."""

WIDENING = 2.0**0.25
"""That space against the step of a rounding one by one that makes about as large an error."""


@dataclass(frozen=True, eq=False)
class Trellis:
    """States and the ways between them; an odd state is of the second quantiser.

    Parameters
    ----------
    following
        State after a symbol, int64 (parity of the symbol, state).
    one_path
        Whether all symbols of a pass lie on one path.
    """

    following: npt.NDArray[np.int64]
    one_path: bool

    def paths_for(self, count: int) -> int:
        """How many paths so many symbols are laid on."""
        return 1 if self.one_path else max(FEWEST_PATHS, -(-count // LONGEST_PATH))

    @cached_property
    def before(self) -> npt.NDArray[np.int64]:
        """The state from which a symbol leads to each: (parity of the symbol, state)."""
        return np.argsort(self.following, axis=1)


@cache
def trellis_of(states: TrellisStates) -> Trellis:
    """The trellis of so many states; FORMAT.md has its law."""
    state = np.arange(states)
    if states == 8:
        ones = state ^ state >> 1 ^ state >> 2
        following = [(2 * state + (symbol ^ ones & 1)) % 8 for symbol in (0, 1)]
        return Trellis(np.array(following, np.int64), one_path=False)
    quantiser, symbol = (code >> 1 for code in LARGE_CODE)
    even = state >> 1 ^ (state & 1) * quantiser
    return Trellis(np.array([even, even ^ symbol], np.int64), one_path=True)


def points_of(symbols: npt.NDArray[np.integer], second: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Quantisation steps that symbols stand for, of the first quantiser or the second."""
    wide = symbols.astype(np.int64)
    points: npt.NDArray[np.int64] = SPACING * wide - np.sign(wide) * second
    return points


@dataclass(frozen=True)
class Layout:
    """Order of the symbols of one pass.

    Those of table 0 are not coded. The others go by table, then by place; those of table `first` and later
    ones are laid on paths in that order, one on each path and then from the first path on again.

    Parameters
    ----------
    order
        Places of all coded symbols, in their order.
    alone
        How many of them are on no path.
    tables
        In that order.
    """

    order: npt.NDArray[np.int64]
    alone: int
    tables: npt.NDArray[np.int64]

    @staticmethod
    def of(tables: Tables, first: int) -> Layout:
        """Layout of tables, flat."""
        counts = np.bincount(tables, minlength=TABLES)
        order = np.argsort(tables, kind="stable")[counts[0] :]
        return Layout(order, int(counts[1:first].sum()), tables[order].astype(np.int64))
