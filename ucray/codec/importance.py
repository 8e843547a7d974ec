"""Importance: how much the squared error of a voxel weighs against that of others.

An encoder minimises error + lambda * bits. Where error weighs w times as much, lambda is 1 / w: as much as a
chunk weighs on the whole shifts its quality, and where in it bits go changes how its latents are rounded.
Weights are those of voxels, or of what each latent stands for (`ucray.codec.sensitivity`).
A decoder does not know of it: qualities and symbols are all there is in the stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ucray.codec.rate import COARSEST_LAMBDA, FINEST_LAMBDA
from ucray.config import QUALITIES
from ucray.errors import SettingsError
from ucray.grid import Shape3

Weights = npt.NDArray[np.float32]

LARGEST_WEIGHT = 64.0
"""Weights are used up to this, and down to its inverse, of the mean over the volume."""

LEAST_SEEN = 0.125
"""Least weight of a latent, of the mean: what a tracer hardly sees now it may when all has changed."""

LEADING = 32
"""Latents of which a chunk's level is the mean: others are zero at most qualities."""


@dataclass(frozen=True)
class ChunkImportance:
    """What one chunk's importance changes: its quality by `shift`, and rounding by `weights`.

    These weigh cells of the latent grid (z, y, x, 1), or each of their latents (z, y, x, latents), against
    each other; their mean, over the leading latents, is 1.
    """

    shift: int
    weights: Weights

    @classmethod
    def of(cls, weights: Weights, mean: float, chunk: Shape3, cell: Shape3) -> ChunkImportance:
        """From weights (z, y, x) of those cells of a chunk that are in the volume, and the volume's mean."""
        missing = [(0, c // s - n) for n, c, s in zip(weights.shape, chunk, cell, strict=True)]
        weights = np.pad(weights, missing, mode="edge")
        return cls._relative(weights[..., None], mean, 1.0 / LARGEST_WEIGHT)

    @classmethod
    def of_latents(cls, weights: Weights, mean: float) -> ChunkImportance:
        """From weights (z, y, x, latents) of all cells of a chunk, and the volume's mean."""
        return cls._relative(weights, mean, LEAST_SEEN)

    @classmethod
    def _relative(cls, weights: Weights, mean: float, least: float) -> ChunkImportance:
        relative = np.clip(weights / np.float32(mean), least, LARGEST_WEIGHT)
        level = float(relative[..., :LEADING].mean())
        return cls(quality_shift(level), (relative / np.float32(level)).astype(np.float32))

    def quality(self, quality: int) -> int:
        """The chunk's quality where that of the volume is `quality`."""
        return min(max(quality + self.shift, 0), QUALITIES - 1)


def quality_shift(weight: float) -> int:
    """By how much quality rises where squared error weighs `weight` times as much."""
    return round((QUALITIES - 1) * math.log(weight) / math.log(COARSEST_LAMBDA / FINEST_LAMBDA))


def cell_means(weights: npt.NDArray[np.generic], cell: Shape3) -> Weights:
    """Means of weights (z, y, x) over cells, those at the end over what there is of them.

    Raises
    ------
    SettingsError
        If a weight is negative or no number.
    """
    found = weights.astype(np.float32)
    if not (np.isfinite(found).all() and (found >= 0).all()):
        raise SettingsError("importance must be numbers from 0 on")
    for axis, size in enumerate(cell):
        starts = np.arange(0, found.shape[axis], size)
        counts = np.diff([*starts, found.shape[axis]]).astype(np.float32)
        found = np.add.reduceat(found, starts, axis=axis)
        found /= counts.reshape([-1 if a == axis else 1 for a in range(3)])
    return found
