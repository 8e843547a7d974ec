"""Open any source as one volume (z, y, x): zarr, OME-Zarr, N5, precomputed, HDF5, TIFF."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from glob import has_magic
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ucray.codec.chunk import DTYPES
from ucray.errors import DtypeError, SettingsError, SourceError, UcrayError
from ucray.grid import Box, Shape3, triple
from ucray.storage.objects import translated
from ucray.storage.sources import from_hdf5, from_tiff
from ucray.storage.sources.from_hdf5 import open_hdf5
from ucray.storage.sources.from_tensorstore import N5, PRECOMPUTED, open_n5, open_precomputed
from ucray.storage.sources.from_tiff import open_stack, open_tiff, stack_of
from ucray.storage.sources.from_zarr import find_zarr, open_zarr
from ucray.storage.sources.opened import Opened, Selection
from ucray.storage.space import SPATIAL, Space

Voxels = npt.NDArray[np.generic]

LABEL_DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
"""Types of labels."""

FORMATS = "zarr, OME-Zarr, N5, neuroglancer precomputed, HDF5 and TIFF"


@dataclass(frozen=True)
class Volume:
    """An opened source volume; voxels are read box by box.

    Pickles as its address: a worker opens its own connection.

    Parameters
    ----------
    url, path, endpoint_url
        Where it is, and the array in it.
    shape, dtype, fill_value, space
        Of its voxels (z, y, x).
    identity
        SHA-256 of what tells it from other volumes.
    select
        Place on each axis that is not z, y or x.
    axes
        Of the array, in its order; a worker does not look for what names them.
    """

    url: str
    path: str
    endpoint_url: str | None
    shape: Shape3
    dtype: str
    fill_value: float
    space: Space
    identity: str
    select: tuple[tuple[str, int], ...] = ()
    axes: tuple[str, ...] = SPATIAL

    @cached_property
    def array(self) -> Opened:
        """The array behind the volume."""
        return replace(_open(self.url, self.path or None, self.endpoint_url), axes=self.axes)

    @property
    def chunks(self) -> Shape3:
        """Shape of what is read at once."""
        return self._spatial(self.array.chunks)

    @property
    def shards(self) -> Shape3 | None:
        """Shape of what holds several chunks in one object; None where each is one of its own."""
        return None if self.array.shards is None else self._spatial(self.array.shards)

    def read(self, box: Box) -> Voxels:
        """Voxels of a box, in the volume's dtype and the machine's byte order.

        Raises
        ------
        SourceError
            If the stored bytes cannot be read or decoded.
        """
        ranges = dict(zip(SPATIAL, box.slices, strict=True)) | dict(self.select)
        try:
            with translated(self.url):
                selection: Selection = tuple(ranges[axis] for axis in self.array.axes)
                voxels = np.asarray(self.array.voxels[selection])
        except UcrayError:
            raise
        except Exception as error:
            # Libraries raise what they like on damaged bytes; ours keeps its name.
            raise SourceError(
                f"{self.url}: voxels {box} cannot be read: {' '.join(str(error).split())}"
            ) from error
        kept = [axis for axis in self.array.axes if axis in SPATIAL]
        return voxels.transpose([kept.index(axis) for axis in SPATIAL]).astype(self.dtype, copy=False)

    def without_fill(self) -> Volume:
        """The same volume, its fill value one like any other: whole numbers then have none."""
        if np.issubdtype(np.dtype(self.dtype), np.floating):
            return self
        identity = hashlib.sha256(f"{self.identity}\nwithout fill".encode()).hexdigest()
        return replace(self, fill_value=math.nan, identity=identity)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "array"}

    def _spatial(self, values: tuple[int, ...]) -> Shape3:
        return triple(values[self.array.axes.index(axis)] for axis in SPATIAL)


def open_volume(
    url: str,
    array: str | None = None,
    endpoint_url: str | None = None,
    select: str | None = None,
    *,
    dtypes: Sequence[str] = DTYPES,
) -> Volume:
    """Open the volume at `url`.

    Parameters
    ----------
    url
        Local path, s3:// or http(s):// URL of an array, a group, a container, a file, or a folder of
        sections; n5:// or precomputed:// before it says what it is where the place itself does not.
    array
        Path of the array within a group or file, or key of a precomputed scale; an OME-Zarr group's first
        scale is the default.
    select
        One place on each axis that is not z, y or x, as t=0,c=1. Axes of one place need none.
    dtypes
        Types that are served; labels come in others than voxels.

    Raises
    ------
    SourceError, DtypeError
        If there is nothing, no array, an axis too many, or another dtype.
    SettingsError
        If `select` does not parse.
    StorageError, CredentialsError
        If the store does not serve.
    """
    places = {} if select is None else _parse_select(select)
    opened = _open(url, array, endpoint_url, around=True)
    chosen = _chosen(opened, places, url)
    dtype = np.dtype(opened.dtype).name
    if dtype not in dtypes:
        raise DtypeError(f"{url} holds voxels of type {dtype}; {', '.join(dtypes)} are served")
    if min(opened.shape) < 1:
        raise SourceError(f"{url} has shape {opened.shape} and holds no voxels")
    identity = f"{url}\n{opened.path}\n{opened.metadata}"
    if places:
        identity += f"\n{chosen}"
    return Volume(
        url=url,
        path=opened.path,
        endpoint_url=endpoint_url,
        shape=triple(opened.shape[opened.axes.index(axis)] for axis in SPATIAL),
        dtype=dtype,
        fill_value=opened.fill_value,
        space=opened.space,
        identity=hashlib.sha256(identity.encode()).hexdigest(),
        select=chosen,
        axes=opened.axes,
    )


def _open(url: str, array: str | None, endpoint_url: str | None, *, around: bool = False) -> Opened:
    """The array at `url`, whatever its format; groups `around` a zarr array may say where its voxels lie."""
    kind, _, place = url.partition("://")
    if kind == N5:
        return open_n5(place, array, endpoint_url)
    if kind == PRECOMPUTED:
        return open_precomputed(place, array, endpoint_url)
    suffix = Path(url).suffix.lower()
    local = "://" not in url
    if suffix in from_hdf5.SUFFIXES and not (local and Path(url).is_dir()):
        return open_hdf5(url, array, endpoint_url)
    if suffix in from_tiff.SUFFIXES and not has_magic(url) and not (local and Path(url).is_dir()):
        return open_tiff(url, array, endpoint_url)
    if (node := find_zarr(url, endpoint_url)) is not None:
        return open_zarr(node, url, array, endpoint_url, around=around)
    if files := stack_of(url):
        return open_stack(url, files)
    for opener in (open_precomputed, open_n5):
        try:
            return opener(url, array, endpoint_url)
        except SourceError:
            continue
    extra = "" if find_spec("tensorstore") else "; N5 and precomputed with pip install 'ucray[sources]' alone"
    raise SourceError(f"{url} holds no volume, or does not exist; {FORMATS} are read{extra}")


def _parse_select(text: str) -> dict[str, int]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {axis.strip().lower(): int(place) for axis, place in pairs}
    except ValueError:
        raise SettingsError(f"--select {text}: not axes and their places, as t=0,c=1") from None


def _chosen(opened: Opened, places: Mapping[str, int], url: str) -> tuple[tuple[str, int], ...]:
    """A place on every axis that is not spatial; raises SourceError with the choices where one is open."""
    others = {
        axis: extent for axis, extent in zip(opened.axes, opened.shape, strict=True) if axis not in SPATIAL
    }
    choices = ", ".join(f"{axis} (0 to {extent - 1})" for axis, extent in others.items()) or "none"
    for axis, place in places.items():
        if axis not in others or not 0 <= place < others[axis]:
            raise SourceError(f"--select {axis}={place}: {url} has no such place; it has {choices}")
    if unchosen := [axis for axis, extent in others.items() if extent > 1 and axis not in places]:
        raise SourceError(
            f"{url} has {len(opened.axes)} axes ({', '.join(opened.axes)}); choose one place with "
            f"--select {','.join(f'{axis}=0' for axis in unchosen)} of {choices}"
        )
    return tuple((axis, places.get(axis, 0)) for axis in others)
