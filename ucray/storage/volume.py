"""Open any source: a zarr v2 or v3 array, or the scale of an OME-Zarr group, as one volume."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt
import zarr
import zarr.errors
from zarr.abc.store import Store
from zarr.storage import StorePath

from ucray.codec.chunk import DTYPES
from ucray.errors import DtypeError, SourceError, StorageError, UcrayError
from ucray.grid import Box, Shape3, triple
from ucray.storage.objects import open_store, translated

Voxels = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Space:
    """Where the voxels lie: edge lengths and first corner (z, y, x), in `unit` (None: unknown)."""

    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    translation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    unit: str | None = None

    def within(self, start: Shape3) -> Space:
        """The space of a region whose first voxel is `start`."""
        moved = [t + s * n for t, s, n in zip(self.translation, self.scale, start, strict=True)]
        return Space(self.scale, (moved[0], moved[1], moved[2]), self.unit)

    def to_ome(self, name: str) -> dict[str, Any]:
        """OME-Zarr 0.5 attributes of a group whose one scale is the array "0"."""
        axes = [{"name": axis, "type": "space"} for axis in "zyx"]
        if self.unit is not None:
            axes = [axis | {"unit": self.unit} for axis in axes]
        transforms: list[dict[str, Any]] = [{"type": "scale", "scale": list(self.scale)}]
        if any(self.translation):
            transforms.append({"type": "translation", "translation": list(self.translation)})
        scale = {"path": "0", "coordinateTransformations": transforms}
        return {"ome": {"version": "0.5", "multiscales": [{"name": name, "axes": axes, "datasets": [scale]}]}}


@dataclass(frozen=True)
class Volume:
    """An opened source volume; voxels are read box by box.

    Pickles as its address: a worker opens its own connection.
    """

    url: str
    path: str
    endpoint_url: str | None
    shape: Shape3
    dtype: str
    fill_value: float
    space: Space
    identity: str

    @cached_property
    def array(self) -> zarr.Array[Any]:
        """The zarr array behind the volume."""
        return _open_array(self.url, self.path, self.endpoint_url)

    def read(self, box: Box) -> Voxels:
        """Voxels of a box, in the source's dtype.

        Raises
        ------
        SourceError
            If the stored bytes cannot be read or decoded.
        """
        try:
            with translated(self.url):
                return np.asarray(self.array[box.slices]).astype(self.dtype, copy=False)
        except UcrayError:
            raise
        except Exception as error:
            # Codecs raise what they like on damaged bytes; ours keeps its name.
            raise SourceError(
                f"{self.url}: voxels {box} cannot be read: {' '.join(str(error).split())}"
            ) from error

    def without_fill(self) -> Volume:
        """The same volume, its fill value one like any other: whole numbers then have none."""
        if np.issubdtype(np.dtype(self.dtype), np.floating):
            return self
        identity = hashlib.sha256(f"{self.identity}\nwithout fill".encode()).hexdigest()
        return replace(self, fill_value=math.nan, identity=identity)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "array"}


def open_volume(url: str, array: str | None = None, endpoint_url: str | None = None) -> Volume:
    """Open the volume at `url`.

    Parameters
    ----------
    url
        Local path, s3:// or http(s):// URL of an array or a group.
    array
        Path of the array within a group; an OME-Zarr group's first scale is the default.

    Raises
    ------
    SourceError, DtypeError
        If there is nothing, no array, another number of axes than three, or another dtype.
    StorageError, CredentialsError
        If the store does not serve.
    """
    node = _open_node(url, endpoint_url)
    space = Space()
    path = ""
    if isinstance(node, zarr.Group):
        multiscale = _multiscale(node.attrs.asdict())
        path = array if array is not None else _default_path(url, node, multiscale)
        space = _space(multiscale, path)
    elif array is not None:
        raise SourceError(f"{url} is an array itself; leave --array out")
    opened = _open_array(url, path, endpoint_url)
    if len(opened.shape) != 3:
        raise SourceError(f"{url} has {len(opened.shape)} axes; a volume of three, (z, y, x), is wanted")
    if min(opened.shape) < 1:
        raise SourceError(f"{url} has shape {opened.shape} and holds no voxels")
    dtype = np.dtype(opened.dtype).name
    if dtype not in DTYPES:
        raise DtypeError(f"{url} holds voxels of type {dtype}; {', '.join(DTYPES)} are served")
    fill = opened.metadata.fill_value
    metadata = json.dumps(opened.metadata.to_dict(), sort_keys=True, default=str)
    return Volume(
        url=url,
        path=path,
        endpoint_url=endpoint_url,
        shape=triple(iter(opened.shape)),
        dtype=dtype,
        fill_value=0.0 if fill is None else float(fill),
        space=space,
        identity=hashlib.sha256(f"{url}\n{path}\n{metadata}".encode()).hexdigest(),
    )


def _open_node(url: str, endpoint_url: str | None) -> zarr.Array[Any] | zarr.Group:
    try:
        with translated(url):
            return zarr.open(open_store(url, endpoint_url), mode="r")
    except (FileNotFoundError, zarr.errors.NodeNotFoundError, StorageError) as error:
        if isinstance(error, StorageError) and not isinstance(error.__context__, FileNotFoundError):
            raise
        raise SourceError(f"{url} holds no zarr array or group, or does not exist") from None
    except aiohttp.ClientError as error:
        raise StorageError(f"{url} does not answer: {' '.join(str(error).split())}") from None
    except (zarr.errors.BaseZarrError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{url} is no readable zarr: {' '.join(str(error).split())}") from None


def _open_array(url: str, path: str, endpoint_url: str | None) -> zarr.Array[Any]:
    store: Store | StorePath = open_store(url, endpoint_url)
    try:
        with translated(url):
            node = zarr.open(store, path=path, mode="r") if path else zarr.open(store, mode="r")
    except (FileNotFoundError, zarr.errors.BaseZarrError, StorageError) as error:
        if isinstance(error, StorageError) and not isinstance(error.__context__, FileNotFoundError):
            raise
        raise SourceError(f"{url} holds no array {path!r}") from None
    if not isinstance(node, zarr.Array):
        raise SourceError(f"{url} holds a group at {path!r}, no array; name one with --array")
    return node


def _multiscale(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first multiscale of OME-Zarr 0.5 or 0.4 attributes; empty if there is none."""
    ome = attributes.get("ome", attributes)
    found = ome.get("multiscales") if isinstance(ome, Mapping) else None
    if isinstance(found, Sequence) and found and isinstance(found[0], Mapping):
        return found[0]
    return {}


def _default_path(url: str, group: zarr.Group, multiscale: Mapping[str, Any]) -> str:
    try:
        return str(multiscale["datasets"][0]["path"])
    except (KeyError, IndexError, TypeError):
        names = sorted(name for name, _ in group.arrays())
    if len(names) == 1:
        return names[0]
    listed = ", ".join(names) if names else "none"
    raise SourceError(
        f"{url} is a group without OME-Zarr scales; name an array with --array (there are: {listed})"
    )


def _space(multiscale: Mapping[str, Any], path: str) -> Space:
    """Voxel size, first corner and unit of one scale; axes that are not three give an unknown space."""
    axes = multiscale.get("axes", [])
    datasets = [d for d in multiscale.get("datasets", []) if d.get("path") == path]
    if len(axes) != 3 or not datasets:
        return Space()
    scale, translation = [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]
    for transforms in (
        datasets[0].get("coordinateTransformations", []),
        multiscale.get("coordinateTransformations", []),
    ):
        for transform in transforms:
            if transform.get("type") == "scale":
                factors = [float(v) for v in transform["scale"]]
                scale = [a * b for a, b in zip(scale, factors, strict=True)]
                translation = [a * b for a, b in zip(translation, factors, strict=True)]
            elif transform.get("type") == "translation":
                translation = [
                    a + float(b) for a, b in zip(translation, transform["translation"], strict=True)
                ]
    units = {axis.get("unit") for axis in axes if isinstance(axis, Mapping)}
    unit = units.pop() if len(units) == 1 else None
    return Space((scale[0], scale[1], scale[2]), (translation[0], translation[1], translation[2]), unit)
