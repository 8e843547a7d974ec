"""Write an archive out as a plain zarr v3 volume, shard by shard; what is there already is not done again.

A shard is one object here too, put whole where none stands. One that holds nothing but fill has no object,
and is decoded again by a job that goes on where another ended.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from ucray.cluster.plan import worker_memory
from ucray.cluster.pool import over_shards
from ucray.cluster.telemetry import Event, Listener
from ucray.errors import DestinationError
from ucray.grid import Box, Shape3
from ucray.storage.archive import ARRAY_KEY, GROUP_KEY, Archive, ArchiveSettings, open_archive
from ucray.storage.index import ARRAY, shard_key
from ucray.storage.objects import Objects, open_objects, open_writable_store, translated
from ucray.storage.volume import Voxels, open_volume

MARK = "ucray-decompressed"
"""Attribute of what is written out: the fingerprint of its archive."""


@dataclass(frozen=True)
class Decompressed:
    """A volume that was written out."""

    destination: str
    shape: Shape3
    dtype: str
    bytes_out: int


def decompress_archive(
    url: str,
    destination: str,
    *,
    endpoint_url: str | None = None,
    serial: bool = False,
    workers: int | None = None,
    worker_cpus: float | None = None,
    listener: Listener,
) -> Decompressed:
    """Decode an archive into an OME-Zarr group at `destination`, lossless from there on.

    The same again goes on where a job ended.

    Raises
    ------
    ArchiveError, ChunkError
        If the archive is missing or damaged.
    DestinationError
        If anything else stands at the destination.
    """
    archive = open_archive(url, endpoint_url)
    _ = archive.codec
    objects = open_objects(destination, endpoint_url)
    objects.check_place()
    there = objects.sizes("")
    _begin(archive, url, objects, there, endpoint_url)
    settings = archive.settings
    missing = [index for index in settings.grid.shard_indices() if shard_key(index) not in there]
    build = partial(_Decoder, url, destination, endpoint_url)
    size = np.dtype(settings.dtype).itemsize
    done = settings.bytes_in - sum(settings.grid.shard_box(index).voxels for index in missing) * size
    memory = worker_memory(settings.shard, size)
    for written in over_shards(
        build, missing, serial=serial, memory=memory, workers=workers, worker_cpus=worker_cpus
    ):
        done += written
        listener(Event("decompress", done, settings.bytes_in))
    return Decompressed(destination, settings.shape, settings.dtype, done)


def _begin(
    archive: Archive, url: str, objects: Objects, there: Mapping[str, int], endpoint_url: str | None
) -> None:
    """Write the metadata of a volume, unless they are there; raise DestinationError if something else is."""
    mark = {MARK: archive.settings.fingerprint}
    if there and not mark.items() <= _attributes(objects).items():
        raise DestinationError(
            f"{objects.url} is not empty, and not what this archive was written out to; "
            "give a destination of its own"
        )
    if ARRAY_KEY in there:
        return
    space = open_volume(url, endpoint_url=endpoint_url).space
    name = objects.url.rstrip("/").rsplit("/", 1)[-1].removesuffix(".zarr")
    store = open_writable_store(objects.url, endpoint_url)
    with translated(objects.url):
        if not there:
            zarr.create_group(store, attributes=space.to_ome(name) | mark)
        zarr.create_array(store, name=ARRAY, **_layout(archive.settings))


def _attributes(objects: Objects) -> Mapping[str, Any]:
    """Attributes of a zarr group; none where there is none."""
    try:
        found = json.loads(objects.get(GROUP_KEY) or b"{}").get("attributes")
    except (ValueError, AttributeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _layout(settings: ArchiveSettings) -> dict[str, Any]:
    """Of the array that is written out: chunks and shards are the archive's."""
    return {
        "shape": settings.shape,
        "dtype": settings.dtype,
        "chunks": settings.chunk,
        "shards": settings.shard,
        "compressors": BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle"),
        "fill_value": settings.stored_fill,
        "dimension_names": ("z", "y", "x"),
    }


class _Decoder:
    """Decodes shards of one archive into one destination; both have the same shards."""

    def __init__(self, url: str, destination: str, endpoint_url: str | None) -> None:
        self._archive = open_archive(url, endpoint_url)
        self._source = open_volume(url, endpoint_url=endpoint_url)
        self._objects = open_objects(destination, endpoint_url)

    def shard(self, index: Shape3) -> int:
        """Decode and write one shard; the bytes of its voxels."""
        box: Box = self._archive.settings.grid.shard_box(index)
        # A missing shard must not pass for fill, which is what zarr would make of it.
        self._archive.shard(index)
        voxels = self._source.read(box)
        if (data := self._encoded(voxels, box, shard_key(index))) is not None:
            self._objects.put_new(shard_key(index), data)
        return int(voxels.nbytes)

    def _encoded(self, voxels: Voxels, box: Box, key: str) -> bytes | None:
        """The object of a shard, as zarr writes it; None if there is nothing but fill."""
        store = MemoryStore()
        array = zarr.create_array(store, name=ARRAY, **_layout(self._archive.settings))
        array[box.slices] = voxels
        found = sync(store.get(key, default_buffer_prototype()))
        return None if found is None else found.to_bytes()
