"""N5 and neuroglancer's precomputed format, by way of tensorstore."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from ucray.errors import CredentialsError, SourceError, StorageError
from ucray.storage.sources.opened import Opened, Selection, required
from ucray.storage.space import SPATIAL, Space, attribute_space, axis_names

N5, PRECOMPUTED = "n5", "precomputed"


def open_n5(url: str, array: str | None, endpoint_url: str | None) -> Opened:
    """A dataset of an N5 container; its axes stand in the order x, y, z unless `axes` names them."""
    place = url if array is None else f"{url.rstrip('/')}/{array}"
    store = _open({"driver": "n5", "kvstore": _kvstore(place, endpoint_url)}, place)
    attributes = json.loads(store.kvstore.read("attributes.json").result().value)
    # Without names the order is that of axis_names, the other way round.
    named = axis_names(attributes.get("axes"), store.rank)
    default = axis_names(None, store.rank)
    if default is None:
        raise SourceError(f"{place} has {store.rank} axes; a volume of three, (z, y, x), is wanted")
    axes = named if named is not None and "axes" in attributes else default[::-1]
    space = attribute_space(attributes, axes)
    if space == Space():
        space = _n5_space(attributes, axes)
    return _opened(store, array or "", axes, space, attributes)


def open_precomputed(url: str, array: str | None, endpoint_url: str | None) -> Opened:
    """A scale of a precomputed volume, by its key; the first is the default."""
    spec: dict[str, Any] = {"driver": "neuroglancer_precomputed", "kvstore": _kvstore(url, endpoint_url)}
    if array is not None:
        spec["scale_metadata"] = {"key": array}
    store = _open(spec, url)
    metadata = store.spec().to_json()["scale_metadata"]
    axes = ("x", "y", "z", "c")
    # The format counts in nanometers; where a volume begins, it says in voxels.
    size = metadata["resolution"]
    first = [float(n) * s for n, s in zip(store.domain.inclusive_min[:3], size, strict=True)]
    space = Space.of_axes(axes, size, first, ["nanometer"] * 3)
    return _opened(store, metadata["key"], axes, space, metadata)


@dataclass(frozen=True)
class _Voxels:
    """Voxels of an opened store, counted from its first on."""

    store: Any

    def __getitem__(self, selection: Selection) -> Any:
        return np.asarray(self.store[selection].read().result())


def _opened(
    store: Any, path: str, axes: tuple[str, ...], space: Space, metadata: Mapping[str, Any]
) -> Opened:
    tensorstore = required("tensorstore", path)
    fill = store.fill_value
    layout = store.chunk_layout
    read, write = tuple(layout.read_chunk.shape), tuple(layout.write_chunk.shape)
    return Opened(
        voxels=_Voxels(store[tensorstore.d[:].translate_to[0]]),
        path=path,
        axes=axes,
        shape=tuple(store.shape),
        dtype=np.dtype(store.dtype.numpy_dtype),
        chunks=read,
        shards=None if write == read else write,
        fill_value=0.0 if fill is None else float(fill),
        space=space,
        metadata=json.dumps([metadata, list(store.shape), store.dtype.name], sort_keys=True, default=str),
    )


def _n5_space(attributes: Mapping[str, Any], axes: tuple[str, ...]) -> Space:
    """The space in `pixelResolution` (of the dataset's order) or `transform` (with axes of its own)."""
    try:
        transform = attributes["transform"]
        named = tuple(str(axis).lower() for axis in transform["axes"])
        return Space.of_axes(named, transform["scale"], transform.get("translate"), transform["units"])
    except (KeyError, TypeError, ValueError, IndexError):
        pixels = attributes.get("pixelResolution")
    if isinstance(pixels, Mapping):
        size, unit = pixels.get("dimensions", []), pixels.get("unit")
    else:
        size, unit = pixels or [], None
    spatial = [axis for axis in axes if axis in SPATIAL]
    return Space.of_axes(spatial, size, units=[unit] * 3) if len(size) == 3 else Space()


def _open(spec: dict[str, Any], url: str) -> Any:
    tensorstore = required("tensorstore", url)
    try:
        return tensorstore.open(spec, open=True, read=True).result()
    except ValueError as error:
        text = " ".join(str(error).partition(" [")[0].split())
        if "PERMISSION_DENIED" in text or "UNAUTHENTICATED" in text:
            raise CredentialsError(f"access to {url} was refused: {text}") from None
        if "UNAVAILABLE" in text or "DEADLINE_EXCEEDED" in text:
            raise StorageError(f"{url} does not answer: {text}") from None
        raise SourceError(f"{url} cannot be opened: {text}") from None


def _kvstore(url: str, endpoint_url: str | None) -> dict[str, Any] | str:
    parts = urlsplit(url)
    path = parts.path.strip("/") + "/"
    if parts.scheme == "s3":
        store = {"driver": "s3", "bucket": parts.netloc, "path": path}
        if endpoint_url is not None:
            store |= {"endpoint": endpoint_url, "aws_region": os.environ.get("AWS_REGION", "us-east-1")}
        return store
    if parts.scheme == "gs":
        return {"driver": "gcs", "bucket": parts.netloc, "path": path}
    if parts.scheme in ("http", "https"):
        return url.rstrip("/") + "/"
    local = parts.netloc + parts.path if parts.scheme == "file" else url
    return {"driver": "file", "path": f"{Path(local).absolute()}/"}
