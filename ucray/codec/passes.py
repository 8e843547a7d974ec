"""The order in which latents are coded: groups of channels, and cells by colour.

Every pass codes some channels at some cells, and its context network looks at some neighbours of each. The
second half of a checkerboard sees six neighbours of each of its cells, and is cheaper than the first, which
sees none. Where the first group is interlaced, as pictures are that come into view step by step, its first
half is coded in five passes, each over cells that lie between those of the passes before it. This module
imports no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ucray.grid import Shape3, triple

Whole = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

NEIGHBOURS: tuple[Shape3, ...] = (
    (0, 0, 0), (-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1)
)  # fmt: skip
"""Offsets (z, y, x) on the latent grid that most context networks look at."""

SECOND_NEIGHBOURS: tuple[Shape3, ...] = tuple(triple(2 * n for n in offset) for offset in NEIGHBOURS[1:])
"""Next but one along each axis."""

DIAGONALS: tuple[Shape3, ...] = tuple(
    triple(iter(offset)) for offset in itertools.product((-1, 0, 1), repeat=3) if sum(map(abs, offset)) == 2
)
"""The twelve cells that share an edge."""

QUALITY_FEATURES = 2
"""The quality's share of its range, and its square."""


class Colour(Enum):
    """Which cells a pass codes, by their places (z, y, x) on the latent grid."""

    ALL = "all of them"
    EVEN = "z + y + x even"
    ODD = "z + y + x odd"
    FIRST = "z, y, x even, half their sum too"
    SECOND = "z, y, x even, half their sum odd"
    LAYER_X = "z, y odd, x even"
    LAYER_Y = "z, x odd, y even"
    LAYER_Z = "y, x odd, z even"

    def cells(self, shape: Shape3) -> Mask:
        """True where a cell is coded: bool (z, y, x)."""
        places = np.indices(shape)
        total = places.sum(axis=0)
        odd = places % 2 == 1
        if self is Colour.ALL:
            return np.ones(shape, dtype=bool)
        if self in (Colour.EVEN, Colour.ODD):
            return np.asarray(total % 2 == (self is Colour.ODD))
        if self in (Colour.FIRST, Colour.SECOND):
            return np.asarray(~odd.any(axis=0) & (total // 2 % 2 == (self is Colour.SECOND)))
        axis = {Colour.LAYER_Z: 0, Colour.LAYER_Y: 1, Colour.LAYER_X: 2}[self]
        return np.asarray((odd.sum(axis=0) == 2) & ~odd[axis])

    @property
    def offsets(self) -> tuple[Shape3, ...]:
        """What a context network looks at around each cell."""
        if self is Colour.SECOND:
            return SECOND_NEIGHBOURS
        return DIAGONALS if self in (Colour.LAYER_X, Colour.LAYER_Y, Colour.LAYER_Z) else NEIGHBOURS

    @property
    def begins(self) -> bool:
        """Whether nothing of a group is coded yet."""
        return self in (Colour.ALL, Colour.EVEN, Colour.FIRST)


CHECKERBOARD = (Colour.EVEN, Colour.ODD)
INTERLACED = (
    Colour.FIRST, Colour.SECOND, Colour.LAYER_X, Colour.LAYER_Y, Colour.LAYER_Z, Colour.ODD
)  # fmt: skip


@dataclass(frozen=True)
class Pass:
    """One step of coding: channels `first` to `last`, at cells of one colour.

    `known` channels stand in the context; behind the first pass of a group these include its own, at the
    cells coded so far.
    """

    first: int
    last: int
    colour: Colour

    @property
    def channels(self) -> int:
        return self.last - self.first

    @property
    def known(self) -> int:
        return self.first if self.colour.begins else self.last

    def inputs(self, code_width: int) -> int:
        """Inputs of its context network, where codebook vectors are so wide."""
        return code_width + QUALITY_FEATURES + (len(self.colour.offsets) + 1) * self.known


def coding_passes(groups: Sequence[int], checkered: int, *, interlaced: bool = False) -> tuple[Pass, ...]:
    """The passes over all latents, in order.

    The first `checkered` groups are coded as the two halves of a checkerboard; the very first of them in six
    passes where it is `interlaced`.
    """
    passes = []
    first = 0
    for number, channels in enumerate(groups):
        colours: tuple[Colour, ...] = CHECKERBOARD if number < checkered else (Colour.ALL,)
        if interlaced and number == 0:
            colours = INTERLACED
        passes += [Pass(first, first + channels, colour) for colour in colours]
        first += channels
    return tuple(passes)


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the cells of a chunk lie, by colour.

    `cells` are places in the grid, `places` and `around` (the neighbours of a cell) in the grid with one cell
    of zeros on every side, which stands for what lies beyond the chunk; `padded` is the size of that grid.
    """

    padded: int
    cells: dict[Colour, Whole]
    places: dict[Colour, Whole]
    around: dict[Colour, Whole]

    @staticmethod
    @lru_cache(maxsize=16)
    def of(shape: Shape3) -> Geometry:
        """Geometry of a latent grid."""
        padded = triple(n + 2 for n in shape)
        cells, places, around = {}, {}, {}
        for colour in Colour:
            inside = np.argwhere(colour.cells(shape))
            cells[colour] = _places(inside, shape)
            places[colour] = _places(inside + 1, padded)
            around[colour] = _places(inside[:, None] + np.array(colour.offsets) + 1, padded)
        return Geometry(math.prod(padded), cells, places, around)


def _places(cells: Whole, shape: Shape3) -> Whole:
    """Places in a grid, row-major, of cells (..., 3)."""
    # One beyond the border of zeros is as good as on it.
    return np.asarray(np.ravel_multi_index(tuple(np.moveaxis(cells, -1, 0)), shape, mode="clip"))
