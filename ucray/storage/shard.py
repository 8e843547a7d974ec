"""One shard: its bytes in zarr's sharding_indexed layout, its statistics, and its commit.

A shard is one object with one writer. Its statistics are written first and named after the
checksum of the shard they describe, so a shard that exists has its statistics, also where two
machines coded it with different bytes and only one of them won.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import google_crc32c

from ucray.codec.encoder import Packed
from ucray.errors import ArchiveError
from ucray.grid import Grid, Shape3
from ucray.quality import ErrorSum
from ucray.storage.index import chunk_spans, empty_table, index_size, pack_index, shard_key
from ucray.storage.objects import Objects

STATISTICS = "ucray/statistics/"
LARGEST_STATISTICS = 1 << 26
"""Bytes of JSON that a shard's statistics may unpack to."""


@dataclass(frozen=True)
class ChunkFigures:
    """Figures of one chunk of a shard: bytes, kind's name, error against the source."""

    slot: int
    bytes: int
    kind: str
    voxels: int
    mse: float
    max_error: float


@dataclass(frozen=True)
class ShardStatistics:
    """What is known of a shard since it was encoded.

    `bytes_in` are the source's voxels inside the volume, `bytes_out` the whole object.
    """

    index: Shape3
    bytes_in: int
    bytes_out: int
    crc32c: int
    chunks: tuple[ChunkFigures, ...]

    @property
    def error(self) -> ErrorSum:
        """Error over the whole shard, the exact chunks of nothing but fill included."""
        total = ErrorSum()
        for chunk in self.chunks:
            total += ErrorSum(chunk.voxels, chunk.mse * chunk.voxels, chunk.max_error)
        return total

    def to_bytes(self) -> bytes:
        """Gzipped JSON, one list per figure to stay small; the same figures, the same bytes."""
        columns = {
            name: [asdict(chunk)[name] for chunk in self.chunks] for name in ChunkFigures.__annotations__
        }
        document = asdict(self) | {"chunks": columns}
        return gzip.compress(json.dumps(document, separators=(",", ":")).encode(), 9, mtime=0)

    @classmethod
    def from_bytes(cls, data: bytes) -> ShardStatistics:
        """Parse `to_bytes`; raises ArchiveError if it is something else."""
        try:
            unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
            text = unpacker.decompress(data, LARGEST_STATISTICS)
            if not unpacker.eof or unpacker.unused_data:
                raise ArchiveError("statistics of a shard are cut, or have no end")
            document = json.loads(text)
            columns = document["chunks"]
            rows = zip(*(columns[name] for name in ChunkFigures.__annotations__), strict=True)
            chunks = [
                ChunkFigures(int(slot), int(size), str(kind), int(voxels), float(mse), float(largest))
                for slot, size, kind, voxels, mse, largest in rows
            ]
            z, y, x = document["index"]
            return cls(
                index=(int(z), int(y), int(x)),
                bytes_in=int(document["bytes_in"]),
                bytes_out=int(document["bytes_out"]),
                crc32c=int(document["crc32c"]),
                chunks=tuple(chunks),
            )
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, zlib.error):
            raise ArchiveError("statistics of a shard do not parse") from None


def statistics_key(index: Shape3, crc32c: int) -> str:
    """Key of the statistics of a shard whose object has that checksum."""
    return f"{STATISTICS}{'.'.join(map(str, index))}-{crc32c:08x}.json.gz"


def assemble(
    grid: Grid, index: Shape3, itemsize: int, chunks: Sequence[Packed]
) -> tuple[bytes, ShardStatistics]:
    """Lay the coded chunks of a shard out as one object: payloads, then the index, then CRC-32C.

    `chunks` stand in the order of `grid.chunk_boxes(index)`. The layout is that of zarr v3's
    sharding_indexed codec with the index at the end, little-endian uint64, checked by crc32c.
    """
    table = empty_table(math.prod(grid.chunks_per_shard))
    payload = bytearray()
    figures = []
    for (slot, _, box), chunk in zip(grid.chunk_boxes(index), chunks, strict=True):
        if chunk.data:
            table[slot] = len(payload), len(chunk.data)
            payload += chunk.data
        kind = chunk.kind.name.lower() if chunk.data else "empty"
        # Four digits of a squared error are far below what two machines' last places make of it.
        mse, largest = float(f"{chunk.error.mse:.4g}"), float(f"{chunk.error.maximum:.6g}")
        figures.append(ChunkFigures(slot, len(chunk.data), kind, box.voxels, mse, largest))
    data = bytes(payload) + pack_index(table)
    statistics = ShardStatistics(
        index=index,
        bytes_in=grid.shard_box(index).voxels * itemsize,
        bytes_out=len(data),
        crc32c=google_crc32c.value(data),
        chunks=tuple(figures),
    )
    return data, statistics


def split(data: bytes, grid: Grid) -> dict[int, bytes]:
    """The coded chunks of a shard's object by slot; chunks of nothing but fill are left out.

    Raises
    ------
    ArchiveError
        If the index is cut, fails its checksum, or points outside the object.
    """
    size = index_size(math.prod(grid.chunks_per_shard))
    end = len(data) - size
    if end < 0:
        raise ArchiveError(f"a shard of {len(data)} bytes is cut: its index alone takes {size}")
    return {slot: data[span] for slot, span in chunk_spans(data[end:], end).items()}


def commit(objects: Objects, grid: Grid, data: bytes, statistics: ShardStatistics) -> bool:
    """Write statistics, then the shard, each unless it exists; False if another writer was first.

    Raises
    ------
    ArchiveError
        If the shard that stands there is damaged.
    """
    objects.put_new(statistics_key(statistics.index, statistics.crc32c), statistics.to_bytes())
    key = shard_key(statistics.index)
    if objects.put_new(key, data):
        return True
    stored = objects.get(key)
    if stored is not None and stored != data:
        split(stored, grid)
    return False


def committed(objects: Objects, index: Shape3) -> ShardStatistics | None:
    """Statistics of the shard that stands there; None if none does.

    Raises
    ------
    ArchiveError
        If its statistics are missing or do not parse.
    """
    data = objects.get(shard_key(index))
    if data is None:
        return None
    return stored_statistics(objects, index, google_crc32c.value(data))


def stored_statistics(objects: Objects, index: Shape3, crc32c: int) -> ShardStatistics:
    """Statistics of a shard with that checksum; raises ArchiveError if they are missing."""
    key = statistics_key(index, crc32c)
    data = objects.get(key)
    if data is None:
        raise ArchiveError(f"the statistics of shard {index} are missing ({key})")
    return ShardStatistics.from_bytes(data)


def present_shards(sizes: Mapping[str, int], grid: Grid) -> set[Shape3]:
    """Which shards of the grid exist, from one listing of the archive's array."""
    return {index for index in grid.shard_indices() if shard_key(index) in sizes}
