"""Write an archive out as a plain zarr v3 volume, shard by shard."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import zarr
from zarr.codecs import BloscCodec

from ucray.cluster.plan import worker_memory
from ucray.cluster.pool import over_shards
from ucray.cluster.telemetry import Event, Listener
from ucray.errors import DestinationError
from ucray.grid import Box, Shape3
from ucray.storage.archive import Archive, open_archive
from ucray.storage.objects import open_objects, open_writable_store, translated
from ucray.storage.volume import open_volume


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
    """Decode an archive into a new OME-Zarr group at `destination`, lossless from there on.

    Raises
    ------
    ArchiveError, ChunkError
        If the archive is missing or damaged.
    DestinationError
        If anything stands at the destination.
    """
    archive = open_archive(url, endpoint_url)
    _ = archive.codec
    objects = open_objects(destination, endpoint_url)
    objects.check_place()
    if objects.sizes(""):
        raise DestinationError(f"{destination} is not empty; give a destination of its own")
    _create(archive, url, destination, endpoint_url)
    settings = archive.settings
    indices = list(settings.grid.shard_indices())
    build = partial(_Decoder, url, destination, endpoint_url)
    done = 0
    memory = worker_memory(settings.shard, np.dtype(settings.dtype).itemsize)
    for written in over_shards(
        build, indices, serial=serial, memory=memory, workers=workers, worker_cpus=worker_cpus
    ):
        done += written
        listener(Event("decompress", done, settings.bytes_in))
    return Decompressed(destination, settings.shape, settings.dtype, done)


def _create(archive: Archive, url: str, destination: str, endpoint_url: str | None) -> None:
    settings = archive.settings
    space = open_volume(url, endpoint_url=endpoint_url).space
    name = destination.rstrip("/").rsplit("/", 1)[-1].removesuffix(".zarr")
    with translated(destination):
        group = zarr.create_group(
            open_writable_store(destination, endpoint_url), attributes=space.to_ome(name)
        )
        group.create_array(
            "0",
            shape=settings.shape,
            dtype=settings.dtype,
            chunks=settings.chunk,
            shards=settings.shard,
            compressors=BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle"),
            fill_value=settings.stored_fill,
            dimension_names=("z", "y", "x"),
        )


class _Decoder:
    """Decodes shards of one archive into one destination; both have the same shards."""

    def __init__(self, url: str, destination: str, endpoint_url: str | None) -> None:
        self._archive = open_archive(url, endpoint_url)
        self._source = open_volume(url, endpoint_url=endpoint_url)
        self._destination = destination
        store = open_writable_store(destination, endpoint_url)
        with translated(destination):
            self._target = zarr.open_array(store, path="0", mode="r+")

    def shard(self, index: Shape3) -> int:
        """Decode and write one shard; the bytes of its voxels."""
        box: Box = self._archive.settings.grid.shard_box(index)
        # A missing shard must not pass for fill, which is what zarr would make of it.
        self._archive.shard(index)
        voxels = self._source.read(box)
        with translated(self._destination):
            self._target[box.slices] = voxels
        return int(voxels.nbytes)
