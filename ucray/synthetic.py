"""Synthetic electron microscopy: cells, membranes, mitochondria and vesicles drawn from random fields.

Everything but the vesicles is a function of smooth random fields, so a slab of slices can be drawn
without its neighbours. Lengths are in voxels and follow FIB-SEM of Drosophila neuropil at 10 nm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ucray.errors import SettingsError
from ucray.grid import Shape3, format_shape, triple

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

CELL_GREYS = (163, 192, 184, 153, 194, 179, 142, 188, 173, 182, 157, 192)
"""Mean grey of the cytoplasm of each family of cells; one random field draws one family."""
CELL_SPACING = (16.0, 46.0)
MEMBRANE_GREY = 91.0
MITOCHONDRION_GREY = 94.0
VESICLE_FAMILIES = (0, 3, 5, 8, 10)
VESICLE_PITCH = 11
VESICLE_RADIUS = (2.8, 4.4)
VESICLE_RIM = 1.4
NOISE = 9.0
"""Standard deviation of the detector's noise, in greys."""
SLAB_VOXELS = 1 << 22


def synthetic_volume(shape: Shape3, seed: int = 0, *, padding: int | None = None) -> npt.NDArray[np.uint8]:
    """Draw a volume that looks like FIB-SEM of nerve tissue in an aligned stack.

    Tissue lies in a border of zeros, as aligned stacks do: one face is tilted (low x, along y) and
    one is stepped (high y, along z), so the border is thicker there, at most twice.

    Parameters
    ----------
    shape
        Voxels on each of (z, y, x).
    seed
        Whole number of at least 0. The same shape, seed and padding give the same voxels on one
        machine; another machine may round a few voxels to the next grey.
    padding
        Voxels of the border on each face. Without it, 5 % of each axis and at least one voxel, but
        none on an axis of fewer than three. 0 gives tissue everywhere.

    Returns
    -------
    numpy.ndarray
        uint8 of `shape`, axes (z, y, x). Border voxels are exactly 0, tissue voxels 1 to 255. From
        128 voxels an axis on, the tissue's mean is 125 to 150 and its standard deviation 30 to 42,
        white Gaussian noise of standard deviation 9 included.

    Raises
    ------
    SettingsError
        The shape holds no voxels, the padding leaves no tissue, or the seed is negative.

    Notes
    -----
    Besides the result and a field of float32 at a third of its resolution, memory holds about a
    dozen float32 arrays of one slab, 4 Mi voxels or one slice, whichever is more.
    """
    if min(shape) < 1:
        raise SettingsError(f"a volume of shape {format_shape(shape)} holds no voxels")
    if seed < 0:
        raise SettingsError(f"seed {seed} must not be negative")
    margins, rng = _margins(shape, padding), np.random.default_rng(seed)
    tissue = _Tissue.random(rng, shape)
    rows, columns = _outline(rng, shape, margins)
    volume = np.zeros(shape, np.uint8)
    depth = max(1, SLAB_VOXELS // (shape[1] * shape[2]))
    for first in range(margins[0], shape[0] - margins[0], depth):
        last = min(first + depth, shape[0] - margins[0])
        grey = tissue.draw(first, last)
        grey += NOISE * rng.standard_normal(grey.shape, dtype=np.float32)
        # 0 means "no tissue" to everything downstream, so the darkest tissue is 1.
        volume[first:last] = np.clip(np.rint(grey), 1, 255) * (rows[first:last] & columns)
    return volume


def _margins(shape: Shape3, padding: int | None) -> Shape3:
    """Thickness of the border on both faces of each axis."""
    if padding is None:
        return triple(min(max(1, round(0.05 * n)), (n - 1) // 2) for n in shape)
    if padding < 0 or 2 * padding >= min(shape):
        raise SettingsError(f"padding {padding} leaves no tissue in a volume of {format_shape(shape)}")
    return padding, padding, padding


def _outline(rng: np.random.Generator, shape: Shape3, margins: Shape3) -> tuple[BoolArray, BoolArray]:
    """Where tissue is but for the margins in z: in both masks, one (z, y, 1), one (y, x)."""
    z, y, x = (np.arange(n) for n in shape)
    # Never more than is left, so that even the narrowest row keeps a voxel of tissue.
    _, room_y, room_x = (min(m, n - 2 * m - 1) for m, n in zip(margins, shape, strict=True))
    tilt = np.rint(np.linspace(0, room_x, shape[1]))[:, None]
    # One alignment step every dozen slices.
    steps = rng.integers(0, room_y + 1, len(z) // 12 + 1)[z // 12, None]
    rows = (y >= margins[1]) & (y < shape[1] - margins[1] - steps)
    return rows[:, :, None], (x >= margins[2] + tilt) & (x < shape[2] - margins[2])


@dataclass(frozen=True)
class _Field:
    """A smooth random field of mean 0 and variance 1: a cubic B-spline over white noise.

    `knots` holds the noise, one value every `spacing` voxels, with a margin that lets the field be
    sampled one voxel outside the volume.
    """

    knots: FloatArray
    spacing: tuple[float, float, float]

    @classmethod
    def random(cls, rng: np.random.Generator, shape: Shape3, spacing: tuple[float, float, float]) -> _Field:
        knots = triple(int((n + 1) / s) + 5 for n, s in zip(shape, spacing, strict=True))
        # A cubic B-spline over white noise of variance 1 has variance 0.479 on each axis.
        return cls(rng.standard_normal(knots, dtype=np.float32) * np.float32(0.479**-1.5), spacing)

    def sample(self, start: Shape3, stop: Shape3) -> FloatArray:
        """The field at the voxels of the box from `start` to `stop`, float32 (z, y, x)."""
        along_z, along_y, along_x = (
            _spline_weights(a, b, s, n)
            for a, b, s, n in zip(start, stop, self.spacing, self.knots.shape, strict=True)
        )
        planes = np.tensordot(along_z, self.knots, axes=1)
        sampled: FloatArray = np.matmul(np.matmul(along_y, planes), along_x.T)
        return sampled


def _spline_weights(first: int, last: int, spacing: float, knots: int) -> FloatArray:
    """Cubic B-spline weights (voxel, knot) of the voxels `first` to `last`; knot 2 is at voxel 0."""
    position = np.arange(first, last)[:, None] / spacing + 2.0
    distance = np.abs(position - np.arange(knots))
    near = 2.0 / 3.0 - distance**2 * (1.0 - distance / 2.0)
    far = np.clip(2.0 - distance, 0.0, None) ** 3 / 6.0
    return np.where(distance < 1.0, near, far).astype(np.float32)


@dataclass(frozen=True)
class _Tissue:
    """All random choices of one volume but the detector's noise; `draw` is a pure function of them."""

    shape: Shape3
    cells: tuple[_Field, ...]
    mitochondria: _Field
    cristae: _Field
    shade: _Field
    clumps: _Field
    texture: _Field
    vesicles: FloatArray
    """(n, 4): centre (z, y, x) and radius of each vesicle, in voxels."""

    @classmethod
    def random(cls, rng: np.random.Generator, shape: Shape3) -> _Tissue:
        def field(z: float, y: float, x: float) -> _Field:
            return _Field.random(rng, shape, (z, y, x))

        return cls(
            shape=shape,
            cells=tuple(field(*rng.uniform(*CELL_SPACING, size=3)) for _ in CELL_GREYS),
            mitochondria=field(20.0, 20.0, 24.0),
            cristae=field(10.0, 7.0, 10.0),
            shade=field(50.0, 50.0, 50.0),
            clumps=field(5.0, 5.0, 5.0),
            texture=field(3.0, 3.0, 3.0),
            vesicles=_vesicles(rng, shape),
        )

    def draw(self, first: int, last: int) -> FloatArray:
        """Greys of the slices `first` to `last` before noise, float32 (z, y, x)."""
        start, stop = (first, 0, 0), (last, self.shape[1], self.shape[2])
        family, depth = self._cells(first, last)
        shade = self.shade.sample(start, stop)

        grey = np.array(CELL_GREYS, np.float32)[family]
        grey += 7.0 * shade
        # Ribosomes, tubules and filaments: only the dark side of a rough field.
        grey -= 24.0 * np.clip(self.clumps.sample(start, stop) - 0.2, 0.0, 2.0)

        shell = _vesicle_shells(self.vesicles, first, grey.shape) * np.isin(family, VESICLE_FAMILIES)
        grey -= 45.0 * np.clip(shell, 0.0, 1.0) + 22.0 * np.clip(shell, -1.0, 0.0)

        # A mitochondrion keeps clear of the membrane of its cell, and bends around it.
        crowded = 3.0 / np.clip(depth, 0.5, None)
        body = 6.0 * (self.mitochondria.sample(start, stop) - 0.6 - crowded)
        cristae = np.sin(7.0 * self.cristae.sample(start, stop))
        inner = MITOCHONDRION_GREY + 4.0 * shade + 7.0 * cristae - 10.0 * (np.abs(body - 1.0) < 1.0)
        grey += np.clip(body, 0.0, 1.0) * (inner - grey)

        # Where `shade` is high the membrane is thick, as at synapses.
        width = 0.3 + 0.7 * np.clip(shade, 0.0, 2.0)
        grey += np.clip(1.0 + (width - depth) / 3.0, 0.0, 1.0) * (MEMBRANE_GREY - grey)
        grey += 4.0 * self.texture.sample(start, stop)
        return grey

    def _cells(self, first: int, last: int) -> tuple[npt.NDArray[np.uint8], FloatArray]:
        """The family of the cell that each voxel lies in, and its distance to the membrane in voxels.

        A voxel belongs to the largest field. The gap to the second largest, over that gap's slope,
        is the distance to where the two are equal, to first order.
        """
        start, stop = (first - 1, -1, -1), (last + 1, self.shape[1] + 1, self.shape[2] + 1)
        largest = self.cells[0].sample(start, stop)
        second = np.full_like(largest, -np.inf)
        family = np.zeros(largest.shape, np.uint8)
        for index, cell in enumerate(self.cells[1:], start=1):
            value = cell.sample(start, stop)
            np.maximum(second, np.minimum(value, largest), out=second)
            family[value > largest] = index
            np.maximum(largest, value, out=largest)
        gap = largest - second
        inner = (slice(1, -1),) * 3
        slope = np.full_like(gap[inner], 1e-6)
        for axis in range(3):
            # The gap is V-shaped across a membrane, where a central difference would vanish.
            step = np.abs(np.diff(np.moveaxis(gap, axis, 0), axis=0))[:, 1:-1, 1:-1]
            slope += np.moveaxis(np.maximum(step[1:], step[:-1]), 0, axis) ** 2
        return family[inner], np.divide(gap[inner], np.sqrt(slope))


def _vesicles(rng: np.random.Generator, shape: Shape3) -> FloatArray:
    """Centres and radii (n, 4) of vesicles in clusters, at most one centre in each cube of a lattice."""
    lattice = triple(-(-n // VESICLE_PITCH) for n in shape)
    crowding = _Field.random(rng, lattice, (3.5, 3.5, 3.5)).sample((0, 0, 0), lattice)
    corners = np.argwhere((crowding > 0.3) & (rng.random(lattice) < 0.6)) * VESICLE_PITCH
    centres = corners + VESICLE_PITCH * rng.random(corners.shape)
    radii = rng.uniform(*VESICLE_RADIUS, size=(len(corners), 1))
    return np.hstack([centres, radii]).astype(np.float32)


def _vesicle_shells(vesicles: FloatArray, first: int, shape: Shape3) -> FloatArray:
    """Vesicles in a slab from slice `first` on: 1 on a rim, down to -1 in a lumen, 0 elsewhere."""
    reach = int(VESICLE_RADIUS[1] + VESICLE_RIM) + 1
    height = vesicles[:, 0] - first
    vesicles = vesicles[(height > -reach) & (height < shape[0] + reach)]
    stamp = np.indices((2 * reach + 1,) * 3, np.int32).reshape(3, -1).T - reach
    voxels = np.rint(vesicles[:, None, :3]).astype(np.int32) + stamp
    distance = np.linalg.norm(voxels - vesicles[:, None, :3], axis=-1) - vesicles[:, 3:]
    voxels[..., 0] -= first
    drawn = ((voxels >= 0) & (voxels < shape)).all(axis=-1)
    nearest = np.full(shape, VESICLE_RIM, np.float32)
    # Vesicles that touch merge into one, whatever the order they come in.
    np.minimum.at(nearest, tuple(voxels[drawn].T), distance[drawn].astype(np.float32))
    return np.clip(1.0 - np.abs(nearest) / VESICLE_RIM, -(nearest < 0.0).astype(np.float32), 1.0)
