"""Loops that choose the symbols of a chunk: latents rounded one by one, or along the paths of a trellis.

They are plain Python; `ucray.codec.kernels` gives them as machine code. Array operations would go some
twenty times over a few thousand numbers. This module imports no torch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ucray.codec.context import TABLES
from ucray.codec.passes import Whole
from ucray.codec.rate import LARGEST_THRESHOLD
from ucray.codec.trellis import SPACING

Floats = npt.NDArray[np.float64]

LARGEST_SYMBOL = 32767

LARGEST_SCALED = 2.0 * (LARGEST_SYMBOL - 2)
"""Quantisation steps that a symbol on a path can stand for."""


def in_steps(
    latents: npt.NDArray[np.floating], mean: Whole, step: npt.NDArray[np.integer]
) -> tuple[Floats, Floats]:
    """Latents in quantisation steps, and how far they are from their means: flat, (cells * channels,).

    Latents and means are (cells, channels), steps (channels,), in one unit.
    """
    cells, channels = mean.shape
    values, apart = np.empty(cells * channels), np.empty(cells * channels)
    for cell in range(cells):
        for n in range(channels):
            place = cell * channels + n
            values[place] = latents[cell, n] / step[n]
            apart[place] = values[place] - mean[cell, n] / step[n]
    return values, apart


def largest_gain(
    latents: npt.NDArray[np.floating], step: npt.NDArray[np.integer], smallest: float, slope: float
) -> float:
    """About the squared error, in squared steps, that coding a pass saves beyond what its bits are worth.

    Latents (cells, channels) and steps (channels,) are in one unit; those of fewer than `smallest` steps
    are taken for zeros. `slope` is the squared error that a bit is worth.
    """
    found = 0
    for cell in range(len(latents)):
        for n in range(len(step)):
            found += abs(latents[cell, n]) > smallest * step[n]
    if found == 0:
        return 0.0
    # Where few latents are not zero, which ones takes most of the bits; and a bit is their sign.
    bits = np.log2(latents.size / found) + np.log2(np.e) + 1.0
    gain = 0.0
    for cell in range(len(latents)):
        for n in range(len(step)):
            if abs(latents[cell, n]) > smallest * step[n]:
                value = latents[cell, n] / step[n]
                gain += max(value * value - slope * bits, 0.0)
    return gain


def round_alone(
    scaled: Floats,
    weight: Floats,
    slope: float,
    places: Whole,
    tables: npt.NDArray[np.uint8],
    extra_bits: npt.NDArray[np.float32],
    spacing: float,
    symbols: npt.NDArray[np.int16],
) -> None:
    """Of two neighbouring symbols the one with the lower weight * squared error + slope * bits, one by one.

    Parameters
    ----------
    scaled, weight
        What is coded, in quantisation steps, and what squared errors of it weigh.
    slope
        Squared error, in squared steps of weight 1, that a bit is worth.
    places
        Which of them.
    tables, extra_bits
        Tables of all of them, and bits (tables, 2) that symbol 1 costs beyond 0, and 2 beyond 1.
    spacing
        Quantisation steps from one symbol to the next.
    symbols
        Where symbols go.
    """
    for place in places:
        value = scaled[place] / spacing
        size = min(abs(value), LARGEST_SYMBOL)
        lower = np.floor(size)
        extra = extra_bits[tables[place], 1 if lower > 0.0 else 0]
        threshold = min(max(0.5 + slope / weight[place] / spacing**2 / 2.0 * extra, 0.5), LARGEST_THRESHOLD)
        found = min(lower + 1.0, LARGEST_SYMBOL) if size - lower > threshold else lower
        symbols[place] = found if value >= 0.0 else -found


def cheapest_paths(
    scaled: Floats,
    weight: Floats,
    slope: float,
    places: Whole,
    tables: npt.NDArray[np.uint8],
    bits: npt.NDArray[np.float32],
    shift: int,
    before: Whole,
    paths: int,
    symbols: npt.NDArray[np.int16],
) -> None:
    """Find the symbols of least weight * squared error + slope * bits (Viterbi 1967), and their quantisers.

    Parameters
    ----------
    scaled, weight
        What is coded, in quantisation steps, and what squared errors of it weigh: latents share a path, and
        the lighter give way.
    slope
        Squared error, in squared steps of weight 1, that a bit is worth.
    places
        Which of them lie on the paths, in the layout's order.
    tables
        Tables of all of them; those of symbols of the second quantiser become its own, `shift` on.
    bits
        (tables, sizes) of a symbol's size.
    before, paths
        Of the trellis, and how many paths there are.
    symbols
        Where symbols go.
    """
    count, largest, states = len(places), bits.shape[1] - 1, before.shape[1]
    steps = -(-count // paths)
    choices, odd = np.empty((steps, 4), np.int32), np.empty((steps, states), np.bool_)
    of_second = (before[0] & 1).astype(np.bool_)
    total, cost = np.empty(states, np.float32), np.empty(4, np.float32)
    by_even, by_odd = np.empty(states, np.float32), np.empty(states, np.float32)
    for path in range(paths):
        total[:] = np.inf
        total[0] = 0.0
        length = (count - path + paths - 1) // paths
        for step in range(length):
            place = places[step * paths + path]
            size, heavy = min(abs(scaled[place]), LARGEST_SCALED), weight[place]
            for branch in range(4):
                quantiser, parity = branch // 2, branch % 2
                # The two symbols of this parity between which the value lies.
                lower = 2 * np.int64(np.floor(((size + quantiser) / SPACING - parity) / 2)) + parity
                lower = max(lower, np.int64(parity))
                row = np.int64(tables[place]) + quantiser * shift
                near = size - max(SPACING * lower - quantiser, 0)
                far = size - max(SPACING * (lower + 2) - quantiser, 0)
                near = heavy * near * near + slope * bits[row, min(lower, largest)]
                far = heavy * far * far + slope * bits[row, min(lower + 2, largest)]
                choices[step, branch] = lower + 2 if far < near else lower
                cost[branch] = np.float32(min(near, far))
            # Apart from what follows, which a processor does for several states at a time.
            for state in range(states):
                by_even[state] = total[before[0, state]]
                by_odd[state] = total[before[1, state]]
            even_first, odd_first, even_second, odd_second = cost[0], cost[1], cost[2], cost[3]
            for state in range(states):
                one = by_even[state] + (even_second if of_second[state] else even_first)
                two = by_odd[state] + (odd_second if of_second[state] else odd_first)
                odd[step, state] = two < one
                total[state] = min(one, two)
        state = int(np.argmin(total))
        for step in range(length - 1, -1, -1):
            parity = int(odd[step, state])
            state = before[parity, state]
            place = places[step * paths + path]
            found = choices[step, 2 * (state & 1) + parity]
            symbols[place] = found if scaled[place] >= 0.0 else -found
            tables[place] += shift * (state & 1)


def points_worth(
    values: Floats,
    scaled: Floats,
    weight: Floats,
    slope: float,
    tables: npt.NDArray[np.uint8],
    symbols: npt.NDArray[np.int16],
    spacing: int,
) -> tuple[Whole, float]:
    """Quantisation steps that symbols stand for, and how many bits it is worth that they are coded.

    Parameters
    ----------
    values, scaled, weight
        In quantisation steps, from zero, where a latent that is not coded stands, and from the mean; and what
        squared errors weigh.
    slope
        Squared error, in squared steps of weight 1, that a bit is worth.
    tables, symbols
        Those from TABLES on are of the second quantiser.
    spacing
        Quantisation steps from one symbol to the next.
    """
    points, worth = np.empty(len(symbols), np.int64), 0.0
    for place in range(len(symbols)):
        symbol = np.int64(symbols[place])
        point = spacing * symbol
        if tables[place] >= TABLES:
            point -= np.sign(symbol)
        points[place] = point
        left = scaled[place] - point
        worth += weight[place] * (values[place] * values[place] - left * left)
    return points, worth / slope
