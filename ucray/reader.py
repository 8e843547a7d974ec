"""`ucray.open`: an archive as an array, at its own scale or any other, and a picture of it in a notebook.

Imports what decoding takes and nothing of what makes archives: numpy, torch, and zarr for what is not on this
machine's disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ucray.codec.chunk import Voxels
from ucray.errors import ArchiveError, SettingsError, StorageError
from ucray.grid import Box, Grid, Shape3, triple
from ucray.loading import nothing_collected
from ucray.notebook import shown
from ucray.resample import Scale3, scaled_shape, tiles
from ucray.selection import box_of
from ucray.storage.index import ARRAY, shard_key
from ucray.storage.local import LocalArchive
from ucray.storage.space import SPATIAL, multiscale_of, multiscale_space

if TYPE_CHECKING:
    import zarr

THUMBNAIL = 192
"""Voxels of a thumbnail's slice, on each axis: a few chunks to decode."""


def open(url: str, storage_options: Mapping[str, Any] | None = None) -> Reader:
    """Open an archive for reading.

    Parameters
    ----------
    url
        Local path, s3:// or http(s):// URL.
    storage_options
        For remote stores, as zarr takes them.

    Raises
    ------
    ArchiveError
        If there is no archive.
    StorageError, CredentialsError
        If the store does not serve.
    """
    options = dict(storage_options or {})
    with nothing_collected():
        opened = Reader(url, options, None if options else LocalArchive.of(url))
        # What is no archive is found out now, and not by the first cutout.
        _ = opened.settings, opened.shape
    return opened


@contextmanager
def _answered(url: str) -> Iterator[None]:
    """Turn what a store raises into one of ours, in one line."""
    if url.startswith("s3://"):
        # Whoever reads from S3 has loaded what this loads.
        from ucray.storage.objects import translated

        with translated(url):
            yield
        return
    failures: tuple[type[Exception], ...] = (OSError,)
    if url.startswith(("http://", "https://")):
        import aiohttp

        failures = (OSError, aiohttp.ClientError)
    try:
        yield
    except failures as error:
        raise StorageError(f"{url} cannot be read: {' '.join(str(error).split())}") from None


def no_archive(url: str) -> ArchiveError:
    """What is said where there is none."""
    return ArchiveError(f"{url} holds no ucray archive, or does not exist")


@dataclass(frozen=True)
class View:
    """An archive at one scale: voxels (z, y, x) are decoded when they are sliced.

    Parameters
    ----------
    archive
        Where the voxels come from.
    scale
        Edge of a voxel on each axis, in voxels of the archive. Above 1 a voxel is the average of those it
        covers; below, values between voxels' centres are interpolated.
    """

    archive: Reader
    scale: Scale3

    @property
    def shape(self) -> Shape3:
        return scaled_shape(self.archive.shape, self.scale)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.archive.dtype

    @property
    def ndim(self) -> int:
        return 3

    def __getitem__(self, selection: Any) -> Any:
        """Voxels of slices and places; steps and negative places as in numpy."""
        box, within = box_of(selection, self.shape)
        found = np.empty(box.shape, self.dtype)
        for tile in tiles(box, self.scale, self.archive.shape):
            found[tile.target.relative_to(box).slices] = tile.of(self.archive.read(tile.source))
        return found[within]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Voxels:
        return np.asarray(self[...], dtype=dtype)


@dataclass(frozen=True)
class Reader:
    """An opened archive; sliced, it gives voxels (z, y, x) as numpy does.

    Parameters
    ----------
    url, storage_options
        Where it is.
    local
        The archive, where it lies on this machine's disk; others are read through zarr.
    """

    url: str
    storage_options: Mapping[str, Any] = field(repr=False)
    local: LocalArchive | None = field(repr=False)

    @cached_property
    def group(self) -> zarr.Group:
        """The zarr group; raises ArchiveError if there is none."""
        # Whoever reads from a disk does not wait for zarr.
        import zarr
        import zarr.errors

        with _answered(self.url):
            try:
                return zarr.open_group(self.url, mode="r", storage_options=dict(self.storage_options) or None)
            except (FileNotFoundError, zarr.errors.BaseZarrError, ValueError, TypeError):
                raise no_archive(self.url) from None

    @cached_property
    def array(self) -> zarr.Array[Any]:
        """The zarr array of the volume; raises ArchiveError if there is none."""
        import zarr
        import zarr.errors

        with _answered(self.url):
            try:
                # zarr loads the codec when it meets its name.
                array = self.group[ARRAY]
            except (FileNotFoundError, zarr.errors.BaseZarrError, KeyError, ValueError, TypeError):
                raise no_archive(self.url) from None
        if not isinstance(array, zarr.Array):
            raise no_archive(self.url)
        return array

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Those of the group: what is known of the volume's space, and of the archive's making."""
        return self.group.attrs.asdict() if self.local is None else self.local.attributes

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the archive records of its making; raises ArchiveError if it is none."""
        found = self.attributes.get("ucray")
        if not isinstance(found, Mapping):
            raise no_archive(self.url)
        return found

    @property
    def shape(self) -> Shape3:
        return triple(iter(self.array.shape)) if self.local is None else self.local.grid.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.array.dtype) if self.local is None else self.local.dtype

    @property
    def ndim(self) -> int:
        return 3

    @property
    def nbytes(self) -> int:
        """Bytes of all voxels, before compression."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def levels(self) -> list[Shape3]:
        """Factors (z, y, x) of the archive's scales, from its own on."""
        return [(1, 1, 1), *(triple(iter(factors)) for factors in self.settings.get("levels", []))]

    @cached_property
    def voxel_size(self) -> tuple[list[float], str | None]:
        """Edges (z, y, x) of a voxel, and their unit; None where it is unknown."""
        space = multiscale_space(multiscale_of(self.attributes), ARRAY, SPATIAL)
        return list(space.scale), space.unit

    def __getitem__(self, selection: Any) -> Any:
        """Voxels of slices and places; steps and negative places as in numpy, lists and arrays as in zarr."""
        parts = selection if isinstance(selection, tuple) else (selection,)
        if any(isinstance(part, list | np.ndarray) for part in parts):
            return self.array[selection]
        box, within = box_of(selection, self.shape)
        return self.read(box)[within]

    def read(self, box: Box) -> Voxels:
        """Voxels of a box that lies in the volume; what is in a missing shard is fill, as zarr has it.

        Raises
        ------
        ArchiveError
            If a shard or a chunk is damaged.
        StorageError, CredentialsError
            If the store does not serve.
        """
        if self.local is not None:
            return self.local.read(box)
        with _answered(self.url):
            return np.asarray(self.array[box.slices])

    def check(self, box: Box) -> None:
        """Raise ArchiveError if a shard that a box touches is missing; none is asked for twice."""
        for shard in {shard for shard, *_ in self._grid.chunks_of(box)} - self._present:
            key = shard_key(shard)
            if not self._holds(key):
                raise ArchiveError(f"{self.url} lacks {key}: it was not written yet, or was lost")
            self._present.add(shard)

    def _holds(self, key: str) -> bool:
        if self.local is not None:
            return (self.local.folder / key).exists()
        from zarr.core.sync import sync

        place = self.group.store_path
        with _answered(self.url):
            return sync((place / key).exists())

    @cached_property
    def _present(self) -> set[Shape3]:
        """Shards that were there."""
        return set()

    @cached_property
    def _grid(self) -> Grid:
        if self.local is not None:
            return self.local.grid
        chunks, shards = triple(iter(self.array.chunks)), self.array.shards
        return Grid(self.shape, chunks, chunks if shards is None else triple(iter(shards)))

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Voxels:
        return np.asarray(self[...], dtype=dtype)

    def at(self, scale: float | Scale3) -> View:
        """The archive with voxels `scale` times as long, on each axis or all alike.

        Raises
        ------
        SettingsError
            If a scale is not above zero.
        """
        each: Scale3 = (scale, scale, scale) if isinstance(scale, int | float) else scale
        if len(each) != 3 or not all(0.0 < s < float("inf") for s in each):
            raise SettingsError(f"a scale of {scale}: one number above zero is wanted, or one an axis")
        z, y, x = (float(s) for s in each)
        return View(self, (z, y, x))

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.shape))
        return f"<ucray archive {self.url}: {size} {self.dtype}, {self.target}>"

    def _repr_html_(self) -> str:
        """A table of figures and a slice through the middle, in the colours of the notebook."""
        edges, unit = self.voxel_size
        settings = self.settings
        rows = {
            "shape (z, y, x)": " x ".join(map(str, self.shape)),
            "voxels": str(self.dtype),
            "voxel size": " x ".join(f"{edge:g}" for edge in edges) + (f" {unit}" if unit else ""),
            "before compression": f"{self.nbytes / 1e6:,.1f} MB",
            "asked for": self.target,
            "levels": ", ".join("x".join(map(str, factors)) for factors in self.levels),
            "chunk, shard": " and ".join("x".join(map(str, settings[name])) for name in ("chunk", "shard")),
            "source": f"{settings['source']} {settings['source_array']}".strip(),
            "weights": str(settings["weights_digest"])[:12],
        }
        return shown(rows, self._middle, f"middle of slice {self.shape[0] // 2}")

    @property
    def target(self) -> str:
        """What the archive was asked to meet."""
        asked = self.settings["target"].items()
        return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in asked)

    def _middle(self) -> Voxels:
        """The middle of the middle slice."""
        z, y, x = self.shape
        rows, columns = (slice(max(0, (n - THUMBNAIL) // 2), (n + THUMBNAIL) // 2) for n in (y, x))
        return np.asarray(self[z // 2, rows, columns])
