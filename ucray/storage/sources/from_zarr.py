"""zarr v2 and v3 arrays, and scales of OME-Zarr groups."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import aiohttp
import zarr
import zarr.errors
from zarr.abc.store import Store
from zarr.storage import StorePath

from ucray.errors import SourceError, StorageError, UcrayError
from ucray.storage.objects import open_store, translated
from ucray.storage.sources.opened import Opened, axes_of, the_one
from ucray.storage.space import (
    Space,
    attribute_space,
    multiscale_axes,
    multiscale_of,
    multiscale_space,
)

ZarrNode = zarr.Array[Any] | zarr.Group

MOST_BELOW = 2
"""Names of a scale's path below the group that describes it, where that group is looked for."""


def find_zarr(url: str, endpoint_url: str | None) -> ZarrNode | None:
    """The zarr array or group at `url`; None if there is none.

    Raises
    ------
    SourceError
        If its metadata do not parse.
    StorageError, CredentialsError
        If the store does not serve.
    """
    try:
        with translated(url):
            return zarr.open(open_store(url, endpoint_url), mode="r")
    except (FileNotFoundError, zarr.errors.NodeNotFoundError, StorageError) as error:
        if isinstance(error, StorageError) and not isinstance(error.__context__, FileNotFoundError):
            raise
        return None
    except aiohttp.ClientError as error:
        raise StorageError(f"{url} does not answer: {' '.join(str(error).split())}") from None
    except (zarr.errors.BaseZarrError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{url} is no readable zarr: {' '.join(str(error).split())}") from None


def open_zarr(
    node: ZarrNode, url: str, array: str | None, endpoint_url: str | None, *, around: bool = False
) -> Opened:
    """An array, or one of a group: an OME-Zarr group's first scale is the default.

    Where neither an array nor the group at `url` says where its voxels lie, groups `around` it are asked.
    """
    multiscale: dict[str, Any] = {}
    path = ""
    if isinstance(node, zarr.Group):
        multiscale = dict(multiscale_of(node.attrs.asdict()))
        path = array.strip("/") if array is not None else _default_path(url, node, multiscale)
        opened = _open_array(url, path, endpoint_url)
    elif array is not None:
        raise SourceError(f"{url} is an array itself; leave --array out")
    else:
        opened = node
    axes, space = _lies(opened, url, multiscale, path)
    if around and space == Space() and not _lists(multiscale, path):
        found, scale = _around(f"{url.rstrip('/')}/{path}".rstrip("/"), endpoint_url)
        if found:
            axes, space = _lies(opened, url, found, scale)
    fill = opened.metadata.fill_value
    return Opened(
        voxels=opened,
        path=path,
        axes=axes,
        shape=opened.shape,
        dtype=opened.dtype,
        chunks=opened.chunks,
        shards=opened.shards,
        fill_value=0.0 if fill is None or opened.dtype.kind not in "biuf" else float(fill),
        space=space,
        metadata=json.dumps(opened.metadata.to_dict(), sort_keys=True, default=str),
    )


def _lies(
    opened: zarr.Array[Any], url: str, multiscale: Mapping[str, Any], path: str
) -> tuple[tuple[str, ...], Space]:
    """Axes of an array, and where its voxels lie, by a multiscale or by what it says itself."""
    names: Any = multiscale_axes(multiscale) or getattr(opened.metadata, "dimension_names", None)
    axes = axes_of(url, names or cast(Any, opened.attrs.get("_ARRAY_DIMENSIONS")), opened.ndim)
    space = multiscale_space(multiscale, path, axes)
    return axes, attribute_space(opened.attrs.asdict(), axes) if space == Space() else space


def _lists(multiscale: Mapping[str, Any], path: str) -> bool:
    found = multiscale.get("datasets", [])
    return any(isinstance(one, Mapping) and str(one.get("path")).strip("/") == path for one in found)


def _around(place: str, endpoint_url: str | None) -> tuple[dict[str, Any], str]:
    """The multiscale that lists the array at a place, of a group around it, and its path; or nothing."""
    for below in range(1, MOST_BELOW + 1):
        parts = place.rsplit("/", below)
        folder, path = parts[0], "/".join(parts[1:])
        if len(parts) <= below or not folder.strip(".:/") or folder.endswith((":/", ":")):
            break
        try:
            node = find_zarr(folder, endpoint_url)
        except UcrayError:
            # Whoever may read an array need not be allowed to look around it.
            continue
        multiscale = dict(multiscale_of(node.attrs.asdict())) if isinstance(node, zarr.Group) else {}
        if _lists(multiscale, path):
            return multiscale, path
    return {}, ""


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


def _default_path(url: str, group: zarr.Group, multiscale: dict[str, Any]) -> str:
    try:
        return str(multiscale["datasets"][0]["path"])
    except (KeyError, IndexError, TypeError):
        return the_one(url, sorted(name for name, _ in group.arrays()))
