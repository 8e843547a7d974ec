"""Importance as an array beside a volume: how much the squared error of each voxel weighs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ucray.codec.importance import Weights, cell_means
from ucray.errors import SettingsError, SourceError
from ucray.grid import Box, Shape3, format_shape, triple
from ucray.storage.volume import LABEL_DTYPES, Volume, open_volume

DTYPES = (*LABEL_DTYPES, "float16", "float32", "float64")


@dataclass(frozen=True)
class ImportanceMap:
    """Weights of a volume's voxels, from 0 on; only how they stand to each other matters.

    Parameters
    ----------
    weights
        The array: of the volume's shape, or coarser by whole factors.
    factor
        Voxels of the volume (z, y, x) that a weight stands for.
    cell
        Voxels of a cell; weights are read as means over these.
    """

    weights: Volume
    factor: Shape3
    cell: Shape3

    @classmethod
    def open(cls, url: str, shape: Shape3, cell: Shape3, endpoint_url: str | None) -> ImportanceMap:
        """The map at `url` of a volume of `shape`.

        Raises
        ------
        SettingsError
            If its shape is neither the volume's nor that of a coarser level of it.
        SourceError, DtypeError, StorageError, CredentialsError
            As `open_volume` does.
        """
        weights = open_volume(url, None, endpoint_url, dtypes=DTYPES)
        factor = _factors(shape, weights.shape)
        if factor is None:
            raise SettingsError(
                f"--importance {url} has shape {format_shape(weights.shape)}, the volume "
                f"{format_shape(shape)}: it must be as large, or coarser by whole factors"
            )
        return cls(weights, factor, cell)

    def cells(self, box: Box) -> Weights:
        """Mean weights (z, y, x) of the cells of a box of the volume, counted from its corner.

        Raises
        ------
        SourceError
            If weights cannot be read, are negative, or no numbers.
        """
        # Which weights the voxels of the box take, an axis at a time; the last serves beyond the map's end.
        places = [
            np.minimum(np.arange(start, stop) // factor, length - 1)
            for start, stop, factor, length in zip(
                box.start, box.stop, self.factor, self.weights.shape, strict=True
            )
        ]
        corner = triple(int(axis[0]) for axis in places)
        found = self.weights.read(Box(corner, triple(int(axis[-1]) + 1 for axis in places)))
        z, y, x = (axis - start for axis, start in zip(places, corner, strict=True))
        try:
            # A layer of cells at a time: as numbers that can be averaged they take several times the room.
            return np.concatenate(
                [
                    cell_means(found[np.ix_(z[at : at + self.cell[0]], y, x)], self.cell)
                    for at in range(0, len(z), self.cell[0])
                ]
            )
        except SettingsError as error:
            raise SourceError(f"{self.weights.url}: {error} ({box})") from None


def _factors(shape: Shape3, weights: Shape3) -> Shape3 | None:
    """Voxels of each axis that a weight stands for; None if that is no whole number.

    A map may cover the volume's end or stop short of it, so that several may fit: one that fits all axes is
    taken before others, then one that covers the end.
    """
    fitting = [_fitting(n, m) for n, m in zip(shape, weights, strict=True)]
    if not all(fitting):
        return None
    shared = [factor for factor in fitting[0] if all(factor in others for others in fitting)]
    return triple((shared or own)[0] for own in fitting)


def _fitting(voxels: int, weights: int) -> list[int]:
    """Factors between two lengths: those of a map that covers all voxels, then those of one that stops."""
    around = range(max(1, voxels // (weights + 1)), -(-voxels // max(1, weights - 1)) + 1)
    covering = [factor for factor in around if -(-voxels // factor) == weights]
    return covering + [f for f in around if voxels // f == weights and f not in covering]
