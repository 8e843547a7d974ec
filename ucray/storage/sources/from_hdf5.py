"""Datasets of HDF5 files, local or remote."""

from __future__ import annotations

import json
from typing import Any

from ucray.errors import SourceError
from ucray.storage.objects import local_path, open_file, translated
from ucray.storage.sources.opened import Opened, axes_of, required, the_one
from ucray.storage.space import attribute_space

SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5")


def open_hdf5(url: str, array: str | None, endpoint_url: str | None) -> Opened:
    """A dataset of a file; the only one that could be a volume is the default.

    Raises
    ------
    SourceError
        If the file is missing or no HDF5, or has no such dataset.
    """
    h5py = required("h5py", url)
    with translated(url):
        # The library opens local files better than Python does for it.
        source = local_path(url) or open_file(url, endpoint_url)
    try:
        file = h5py.File(source, "r")
    except OSError as error:
        raise SourceError(f"{url} is no readable HDF5 file: {' '.join(str(error).split())}") from None
    found: list[str] = []

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.ndim >= 3:
            found.append(name)

    if array is None:
        file.visititems(visit)
        array = the_one(url, found)
    node = file.get(array)
    if not isinstance(node, h5py.Dataset):
        raise SourceError(f"{url} holds no array {array!r}")
    axes = axes_of(url, [dimension.label for dimension in node.dims], node.ndim)
    attributes = {name: _plain(value) for name, value in node.attrs.items()}
    described = [array, node.shape, node.dtype.str, node.chunks, attributes, file.id.get_filesize()]
    return Opened(
        voxels=node,
        path=array,
        axes=axes,
        shape=node.shape,
        dtype=node.dtype,
        chunks=node.chunks or node.shape,
        shards=None,
        fill_value=float(node.fillvalue) if node.dtype.kind in "biuf" else 0.0,
        space=attribute_space(attributes, axes),
        metadata=json.dumps(described, sort_keys=True, default=str),
    )


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
