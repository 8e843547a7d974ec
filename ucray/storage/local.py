"""An archive on this machine's disk, read without zarr, whose import takes as long as all else that a first
cutout waits for.

What is found is what zarr would find; what was not written by ucray is left to zarr.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np

from ucray.codec.chunk import DTYPES, Voxels
from ucray.codec.decoder import ChunkDecoder
from ucray.codec.stored import NAME, StoredCodec
from ucray.errors import ArchiveError, SettingsError, StorageError
from ucray.grid import Box, Grid, Shape3, triple
from ucray.storage.index import ARRAY, chunk_spans, index_size, shard_key

METADATA = "zarr.json"

_GROUP = {"zarr_format": 3, "node_type": "group"}
_LAYOUT = {
    "zarr_format": 3,
    "node_type": "array",
    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    "storage_transformers": [],
}
_SHARDS = {
    "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    "index_location": "end",
}


@dataclass(frozen=True)
class LocalArchive:
    """An archive whose objects are files.

    Parameters
    ----------
    folder
        That of its group.
    attributes
        Those of its group.
    grid, dtype, codec
        As its array's metadata have them.
    fill
        What voxels are where nothing is stored.
    """

    folder: Path
    attributes: Mapping[str, Any]
    grid: Grid
    dtype: np.dtype[Any]
    fill: np.generic
    codec: StoredCodec

    @classmethod
    def of(cls, url: str) -> Self | None:
        """The archive at a local path or a file:// URL; None where zarr has to say what is there.

        Raises
        ------
        ArchiveError, WeightsError
            If the codec's configuration is damaged, or of a later version.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("", "file"):
            return None
        root = Path(parts.netloc + parts.path if parts.scheme else url)
        try:
            group = json.loads((root / METADATA).read_bytes())
            attributes = group["attributes"]
            document = json.loads((root / ARRAY / METADATA).read_bytes())
            (shards,) = document["codecs"]
            layout = shards["configuration"]
            (codec,) = layout["codecs"]
            known = (
                group | _GROUP == group
                and isinstance(attributes["ucray"], dict)
                and document | _LAYOUT == document
                and (document["chunk_grid"]["name"], shards["name"]) == ("regular", "sharding_indexed")
                and layout | _SHARDS == layout
                and codec["name"] == NAME
                and document["data_type"] in DTYPES
            )
            grid = Grid(
                _shape(document["shape"]),
                _shape(layout["chunk_shape"]),
                _shape(document["chunk_grid"]["configuration"]["chunk_shape"]),
            )
            dtype = np.dtype(document["data_type"])
            fill = dtype.type(document["fill_value"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, SettingsError):
            return None
        if not known:
            return None
        return cls(root, attributes, grid, dtype, fill, StoredCodec.from_dict(codec))

    def read(self, box: Box) -> Voxels:
        """Voxels of a box that lies in the volume; each chunk that it touches is decoded, side by side.

        Raises
        ------
        ArchiveError
            If a shard or a chunk is damaged.
        SettingsError
            If UCRAY_DEVICE names no device that is here, or the chunks' shape cannot be served.
        StorageError
            If a shard cannot be read.
        """
        found: Voxels = np.full(box.shape, self.fill)

        def decode(index: Shape3, place: Box, data: bytes) -> None:
            voxels = self._decoder.decode(data, index)
            part = place.common(box)
            found[part.relative_to(box).slices] = voxels[part.relative_to(place).slices]

        wanted = defaultdict(list)
        for shard, slot, index, place in self.grid.chunks_of(box):
            wanted[shard].append((slot, index, place))
        coded = [
            (index, place, data)
            for shard, chunks in wanted.items()
            for (_, index, place), data in zip(
                chunks, self._stored(shard, [slot for slot, _, _ in chunks]), strict=True
            )
            if data is not None
        ]
        if len(coded) == 1:
            decode(*coded[0])
        elif coded:
            with ThreadPoolExecutor(min(len(coded), os.cpu_count() or 1)) as pool:
                list(pool.map(lambda one: decode(*one), coded))
        return found

    @cached_property
    def _decoder(self) -> ChunkDecoder:
        chunk = self.codec.format_of(self.grid.chunk, self.dtype.name, float(self.fill))
        return self.codec.decoder_of(chunk)

    def _stored(self, shard: Shape3, slots: list[int]) -> list[bytes | None]:
        """The bytes of some chunks of a shard; None for those it does not hold."""
        path = self.folder / shard_key(shard)
        size = index_size(math.prod(self.grid.chunks_per_shard))
        try:
            with path.open("rb") as file:
                end = file.seek(0, os.SEEK_END) - size
                if end < 0:
                    raise ArchiveError(f"{path} is cut: a shard's index alone takes {size} bytes")
                file.seek(end)
                spans = chunk_spans(file.read(size), end)
                data: list[bytes | None] = []
                for span in map(spans.get, slots):
                    if span is not None:
                        file.seek(span.start)
                    data.append(None if span is None else file.read(span.stop - span.start))
                return data
        except FileNotFoundError:
            return [None] * len(slots)
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}") from None


def _shape(values: Any) -> Shape3:
    """Three whole numbers of a document."""
    if not all(type(value) is int for value in values):
        raise TypeError
    return triple(iter(values))
