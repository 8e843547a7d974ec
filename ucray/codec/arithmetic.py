"""What a walk computes beside its matrix products, in whole numbers: by array operations, or compiled.

Both do the same, to the unit. Arrays go several times over a few thousand numbers, which takes longer than
the products themselves; loops for numba to compile go over them once. They are plain Python here;
`ucray.codec.kernels` gives them as machine code. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ucray.codec.context import (
    FEATURE_UNITS,
    HIDDEN_UNITS,
    LARGEST_FEATURE,
    LARGEST_LATENT,
    SCALE_UNITS,
    TABLE_OCTAVES,
    TABLE_UNITS,
    TABLES,
    WIDE,
    Floats,
    Inputs,
    Tables,
)
from ucray.codec.passes import Whole

HALF = 1 << WIDE - 1
"""Of a unit, WIDE bits behind the point."""

OUTPUT_UNITS = HIDDEN_UNITS // SCALE_UNITS
"""Units of a layer's output in one of a scale."""

FIRST_TABLE = int(TABLE_OCTAVES[0] * SCALE_UNITS)
"""Scale of the first table, in units."""


class Arithmetic(NamedTuple):
    """The same three steps, by arrays or compiled; what they do stands at `finish`, `read_off`, `take_in`."""

    finish: Callable[[Inputs | Floats, Floats, float, int, int], Floats]
    read_off: Callable[[Floats, Whole, Whole], tuple[Whole, Tables]]
    take_in: Callable[..., None]


def finish(products: Inputs | Floats, bias: Floats, factor: float, low: int, high: int) -> Floats:
    """Whole outputs (cells, outputs) of a layer from its products, within limits."""
    sums = products.astype(np.float64, copy=False)
    sums += bias
    sums *= factor
    sums += 0.5
    np.floor(sums, out=sums)
    np.maximum(sums, low, out=sums)
    return np.minimum(sums, high, out=sums)


def read_off(output: Floats, outward: Whole, scale: Whole) -> tuple[Whole, Tables]:
    """Means, in units of the latents, and tables from a network's output: both (cells, channels).

    Parameters
    ----------
    output
        Means, then scales (cells, 2 * channels).
    outward, scale
        Of the channels (channels,): from an output's units to those of a latent, WIDE bits behind the point,
        and the units that a scale is counted from.
    """
    whole, channels = output.astype(np.int64), len(outward)
    mean = (whole[:, :channels] * outward + HALF) >> WIDE
    units = (whole[:, channels:] + OUTPUT_UNITS // 2) // OUTPUT_UNITS + scale
    tables = (units - FIRST_TABLE + TABLE_UNITS // 2) // TABLE_UNITS
    return mean, np.clip(tables, 0, TABLES - 1).astype(np.uint8)


def take_in(
    mean: Whole,
    points: Whole,
    step: Whole,
    inward: Whole,
    cells: Whole,
    places: Whole,
    latents: Whole,
    values: Inputs,
    roots: Inputs,
) -> None:
    """Put a pass's latents where the next ones look for them.

    Parameters
    ----------
    mean, points
        Of what is coded (cells, channels), in units of the latents and in quantisation steps from there.
    step, inward
        Of the channels (channels,): units of a step, and from these to a feature's, WIDE bits behind the
        point.
    cells, places
        Where the cells lie on the grid, and on the grid with a border (cells,).
    latents, values, roots
        Of these channels, to be written: latents on the grid, features and roots of their sizes on that with
        a border, all (places, channels).
    """
    found = np.clip(mean + points * step, -LARGEST_LATENT, LARGEST_LATENT)
    latents[cells] = found
    inner = np.clip((found * inward + HALF) >> WIDE, -LARGEST_FEATURE, LARGEST_FEATURE)
    values[places] = inner
    roots[places] = np.floor(np.sqrt(np.abs(inner) * float(FEATURE_UNITS)) + 0.5)


BY_ARRAYS = Arithmetic(finish, read_off, take_in)


def finish_loop(products: Inputs | Floats, bias: Floats, factor: float, low: int, high: int) -> Floats:
    """As `finish`."""
    cells, outputs = products.shape
    sums = np.empty((cells, outputs), np.float64)
    least, most = float(low), float(high)
    for cell in range(cells):
        for n in range(outputs):
            value = np.floor((products[cell, n] + bias[n]) * factor + 0.5)
            sums[cell, n] = min(max(value, least), most)
    return sums


def read_off_loop(output: Floats, outward: Whole, scale: Whole) -> tuple[Whole, Tables]:
    """As `read_off`."""
    cells, channels = len(output), len(outward)
    mean = np.empty((cells, channels), np.int64)
    tables = np.empty((cells, channels), np.uint8)
    for cell in range(cells):
        for n in range(channels):
            mean[cell, n] = (np.int64(output[cell, n]) * outward[n] + HALF) >> WIDE
            units = (np.int64(output[cell, channels + n]) + OUTPUT_UNITS // 2) // OUTPUT_UNITS + scale[n]
            table = (units - FIRST_TABLE + TABLE_UNITS // 2) // TABLE_UNITS
            tables[cell, n] = min(max(table, 0), TABLES - 1)
    return mean, tables


def take_in_loop(
    mean: Whole,
    points: Whole,
    step: Whole,
    inward: Whole,
    cells: Whole,
    places: Whole,
    latents: Whole,
    values: Inputs,
    roots: Inputs,
) -> None:
    """As `take_in`."""
    for cell in range(len(cells)):
        row, place = cells[cell], places[cell]
        for n in range(len(step)):
            found = mean[cell, n] + points[cell, n] * step[n]
            found = min(max(found, -LARGEST_LATENT), LARGEST_LATENT)
            latents[row, n] = found
            inner = (found * inward[n] + HALF) >> WIDE
            inner = min(max(inner, -LARGEST_FEATURE), LARGEST_FEATURE)
            values[place, n] = inner
            roots[place, n] = np.floor(np.sqrt(abs(inner) * float(FEATURE_UNITS)) + 0.5)


BY_LOOPS = Arithmetic(finish_loop, read_off_loop, take_in_loop)
