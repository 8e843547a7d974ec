"""The encoder's half of the trellis: the path of least squared error + slope * bits (Viterbi 1967)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ucray.codec.context import TABLES
from ucray.codec.frequencies import FrequencyTables
from ucray.codec.kernels import compiled
from ucray.codec.trellis import Layout

Floats = npt.NDArray[np.float64]


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
    sizes, second = np.empty(len(tables), np.int32), np.empty(len(tables), np.bool_)
    shift = TABLES - frequencies.first_dependent
    trellis = frequencies.trellis
    paths = trellis.paths_for(len(tables))
    compiled().cheapest_paths(
        np.abs(scaled), slope, tables, frequencies.size_bits, shift, trellis.before, paths, sizes, second
    )
    return np.copysign(sizes, scaled).astype(np.int16), second
