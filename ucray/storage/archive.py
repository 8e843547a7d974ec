"""The archive: a zarr v3 group (OME-Zarr 0.5) with one array, and what ucray must know of it.

::

    zarr.json                     group: OME-Zarr metadata; "ucray": settings and fingerprint; "provenance"
    0/zarr.json                   array: sharding_indexed around the codec ucray, weights inside
    0/c/Z/Y/X                     shards
    1/zarr.json, 2/zarr.json, ... coarser levels, which have no chunks: averaged from 0 when read
    ucray/statistics/Z.Y.X-CRC.json.gz
    ucray/weights.safetensors     full weights, if they were trained for this archive
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import google_crc32c
import numpy as np
import zarr
from pydantic import Field, ValidationError
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from ucray.codec.chunk import DTYPES, ChunkFormat
from ucray.codec.weights import Weights
from ucray.errors import ArchiveError, DestinationError
from ucray.grid import Box, Grid, Shape3, triple
from ucray.resample import scaled_shape
from ucray.settings import Settings
from ucray.storage.index import ARRAY, shard_key
from ucray.storage.objects import Objects, open_objects
from ucray.storage.shard import STATISTICS, ShardStatistics, present_shards, stored_statistics
from ucray.storage.space import Space
from ucray.zarr_codec import UcrayCodec
from ucray.zarr_level import LevelCodec

GROUP_KEY = "zarr.json"
ARRAY_KEY = f"{ARRAY}/zarr.json"
WEIGHTS_KEY = "ucray/weights.safetensors"


class ArchiveSettings(Settings):
    """What an archive records of itself in the group's attributes, under "ucray"."""

    version: int = 1
    fingerprint: str
    source: str
    source_array: str
    source_select: str = ""
    region: str
    shape: Shape3
    dtype: Annotated[str, Field(pattern=f"^({'|'.join(DTYPES)})$")]
    fill_value: float | Annotated[str, Field(pattern="^(nan|inf|-inf)$")]
    chunk: Shape3
    shard: Shape3
    target: dict[str, float]
    max_error: float | None
    quality: int
    offset: float
    scale: float
    data_range: Annotated[float, Field(gt=0.0)]
    weights_digest: str
    importance: str = ""
    importance_mean: Annotated[float, Field(gt=0.0)] = 1.0
    levels: tuple[Shape3, ...] = ()

    @property
    def grid(self) -> Grid:
        return Grid(self.shape, self.chunk, self.shard)

    @property
    def chunk_format(self) -> ChunkFormat:
        return ChunkFormat(self.chunk, self.dtype, float(self.fill_value), self.offset, self.scale)

    @property
    def exact_fill(self) -> bool:
        """Whether voxels of the fill value come back exactly."""
        return self.chunk_format.has_fill

    def codec_with(self, weights: Weights) -> UcrayCodec:
        """The codec of the archive's array."""
        return UcrayCodec(
            weights, self.offset, self.scale, self.quality, self.max_error, exact_fill=self.exact_fill
        )

    @property
    def stored_fill(self) -> float | int:
        """The array's fill value: what a zarr reader takes for a chunk that is not there."""
        if np.issubdtype(np.dtype(self.dtype), np.floating):
            return float(self.fill_value)
        return int(float(self.fill_value)) if self.exact_fill else 0

    @property
    def bytes_in(self) -> int:
        """Bytes of the voxels before compression."""
        return Box((0, 0, 0), self.shape).voxels * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Archive:
    """An archive that exists."""

    objects: Objects
    settings: ArchiveSettings

    @cached_property
    def codec(self) -> UcrayCodec:
        """The codec in the array's metadata, with the decoder's weights; raises ArchiveError."""
        return UcrayCodec.from_dict(self._codec_document)

    def metadata_are_whole(self) -> bool:
        """Whether the array's metadata, all that a zarr reader goes by, say what the settings say."""
        settings = self.settings
        expected = settings.codec_with(self.codec.weights)
        documents = []
        levels = range(1, len(settings.levels) + 1)
        try:
            for data in (self.objects.get(ARRAY_KEY), array_metadata(settings, expected)):
                document = json.loads(data or b"{}")
                # Another release of zstd may pack the same weights into other bytes; their digest stays.
                document["codecs"][0]["configuration"]["codecs"][0]["configuration"]["weights"].pop("zstd")
                documents.append(document)
            return bool(documents[0] == documents[1]) and all(
                json.loads(self.objects.get(level_key(level)) or b"{}")
                == json.loads(level_metadata(settings, level))
                for level in levels
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return False

    @property
    def weights_size(self) -> int:
        """Bytes that the decoder's weights take in the array's metadata; raises ArchiveError."""
        try:
            return len(self._codec_document["configuration"]["weights"]["zstd"])
        except (KeyError, TypeError):
            raise self._damaged from None

    @cached_property
    def _codec_document(self) -> dict[str, Any]:
        data = self.objects.get(ARRAY_KEY)
        if data is None:
            raise ArchiveError(f"{self.objects.url} holds no array {ARRAY}: its writing did not start")
        try:
            return dict(json.loads(data)["codecs"][0]["configuration"]["codecs"][0])
        except (ValueError, KeyError, IndexError, TypeError):
            raise self._damaged from None

    @property
    def _damaged(self) -> ArchiveError:
        return ArchiveError(f"the metadata of {self.objects.url}/{ARRAY} are damaged")

    def sizes(self) -> dict[str, int]:
        """Every object of the archive with its size."""
        return self.objects.sizes("")

    def shard(self, index: Shape3) -> bytes:
        """A shard's object; raises ArchiveError if it is missing."""
        data = self.objects.get(shard_key(index))
        if data is None:
            raise ArchiveError(f"shard {index} of {self.objects.url} is missing")
        return data

    def statistics(self, index: Shape3, crc32c: int) -> ShardStatistics:
        """Statistics of a shard with that checksum; raises ArchiveError if they are missing."""
        return stored_statistics(self.objects, index, crc32c)

    def all_statistics(self) -> Iterator[ShardStatistics]:
        """Statistics of every shard that exists; raises ArchiveError where they are missing.

        Where two writers left statistics of one shard, the checksum of the stored object decides.
        """
        sizes = self.objects.sizes("")
        by_shard: dict[str, list[str]] = {}
        for key in sizes:
            if key.startswith(STATISTICS):
                by_shard.setdefault(key.removeprefix(STATISTICS).split("-")[0], []).append(key)
        for index in sorted(present_shards(sizes, self.settings.grid)):
            keys = by_shard.get(".".join(map(str, index)), [])
            if len(keys) == 1 and (data := self.objects.get(keys[0])) is not None:
                yield ShardStatistics.from_bytes(data)
            else:
                yield self.statistics(index, google_crc32c.value(self.shard(index)))


def open_archive(url: str, endpoint_url: str | None = None) -> Archive:
    """Open an archive; raises ArchiveError if there is none."""
    archive = find_archive(open_objects(url, endpoint_url))
    if archive is None:
        raise ArchiveError(f"{url} holds no ucray archive, or does not exist")
    return archive


def find_archive(objects: Objects) -> Archive | None:
    """The archive among `objects`; None where there is no zarr metadata at all.

    Raises
    ------
    DestinationError
        If a zarr group stands there that is no archive of ucray.
    """
    data = objects.get(GROUP_KEY)
    if data is None:
        return None
    try:
        attributes = json.loads(data)["attributes"]["ucray"]
        return Archive(objects, ArchiveSettings.model_validate(attributes))
    except (ValueError, KeyError, TypeError, ValidationError):
        raise DestinationError(f"{objects.url} holds zarr data that are no ucray archive") from None


def create_archive(
    objects: Objects,
    settings: ArchiveSettings,
    weights: Weights,
    space: Space,
    name: str,
    provenance: Mapping[str, Any] | None = None,
) -> Archive:
    """Write the metadata of a new archive, or open one of the same fingerprint that exists.

    The group's metadata come first: they alone say whose archive it is. A second driver, or a run
    after one that died in between, finds them and completes the rest.
    """
    group = {"zarr_format": 3, "node_type": "group"}
    attributes = space.to_ome(name, settings.levels) | {"ucray": settings.model_dump(mode="json")}
    if provenance is not None:
        attributes["provenance"] = dict(provenance)
    objects.put_new(GROUP_KEY, _json(group | {"attributes": attributes}))
    archive = find_archive(objects)
    if archive is None:
        raise ArchiveError(f"{objects.url} does not give back what was written to it")
    check_same(archive, settings.fingerprint)
    stored = archive.settings
    codec = stored.codec_with(weights)
    objects.put_new(ARRAY_KEY, array_metadata(stored, codec))
    for level in range(1, len(stored.levels) + 1):
        objects.put_new(level_key(level), level_metadata(stored, level))
    return archive


def archive_bytes(archive: Archive, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Bytes of an archive's objects of these sizes: (without weights, of weights)."""
    weights = sizes.get(WEIGHTS_KEY, 0) + archive.weights_size
    return sum(sizes.values()) - weights, weights


def check_same(archive: Archive, fingerprint: str) -> None:
    """Refuse an archive that was made from another source or with other settings."""
    stored = archive.settings
    if stored.fingerprint != fingerprint:
        target = ", ".join(f"{name} {value:g}" for name, value in stored.target.items())
        raise DestinationError(
            f"{archive.objects.url} holds an archive of {stored.source} with other settings "
            f"({target}, chunk {stored.chunk}, shard {stored.shard}, region {stored.region}, "
            f"weights {stored.weights_digest[:12]}); give another destination or the same settings"
        )


def array_metadata(settings: ArchiveSettings, codec: UcrayCodec) -> bytes:
    """zarr.json of the archive's array, as zarr itself writes it."""
    return _written(
        settings,
        ARRAY,
        shape=settings.shape,
        chunks=settings.chunk,
        shards=settings.shard,
        serializer=codec,
    )


def _written(settings: ArchiveSettings, name: str, **layout: Any) -> bytes:
    store = MemoryStore()
    zarr.create_array(
        store,
        name=name,
        dtype=settings.dtype,
        compressors=None,
        filters=None,
        fill_value=settings.stored_fill,
        dimension_names=("z", "y", "x"),
        **layout,
    )
    data = asyncio.run(store.get(f"{name}/zarr.json", default_buffer_prototype()))
    assert data is not None
    return _json(json.loads(data.to_bytes()))


def level_key(level: int) -> str:
    """Key of a coarser level's metadata."""
    return f"{level}/zarr.json"


def level_metadata(settings: ArchiveSettings, level: int) -> bytes:
    """zarr.json of a coarser level, 1 and up, as zarr itself writes it."""
    z, y, x = (float(factor) for factor in settings.levels[level - 1])
    shape = scaled_shape(settings.shape, (z, y, x))
    return _written(
        settings,
        str(level),
        shape=shape,
        chunks=triple(min(c, n) for c, n in zip(settings.chunk, shape, strict=True)),
        serializer=LevelCodec(ARRAY, settings.levels[level - 1]),
    )


def stray_objects(sizes: Iterable[str], settings: ArchiveSettings) -> list[str]:
    """Keys that belong to no part of the archive."""
    known = {GROUP_KEY, ARRAY_KEY, WEIGHTS_KEY}
    known |= {level_key(level) for level in range(1, len(settings.levels) + 1)}
    known |= {shard_key(i) for i in settings.grid.shard_indices()}
    return sorted(key for key in sizes if key not in known and not key.startswith(STATISTICS))


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
