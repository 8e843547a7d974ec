"""Boxes, chunks and shards of a volume, in whole numbers. Axes are (z, y, x), boxes half-open."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ucray.errors import SettingsError

Shape3 = tuple[int, int, int]


@dataclass(frozen=True, order=True)
class Box:
    """A half-open box of voxels: `start` <= voxel < `stop` on each of (z, y, x)."""

    start: Shape3
    stop: Shape3

    @property
    def shape(self) -> Shape3:
        z, y, x = (stop - start for start, stop in zip(self.start, self.stop, strict=True))
        return z, y, x

    @property
    def voxels(self) -> int:
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        z, y, x = (slice(start, stop) for start, stop in zip(self.start, self.stop, strict=True))
        return z, y, x

    def shifted(self, offset: Shape3) -> Box:
        """The same box with `offset` voxels added to both corners."""
        return Box(add(self.start, offset), add(self.stop, offset))

    def relative_to(self, other: Box) -> Box:
        """The same box counted from where `other` starts."""
        return self.shifted(triple(-n for n in other.start))

    def common(self, other: Box) -> Box:
        """What lies in both; of boxes that do not meet, a box without voxels or with less than none."""
        return Box(
            triple(max(a, b) for a, b in zip(self.start, other.start, strict=True)),
            triple(min(a, b) for a, b in zip(self.stop, other.stop, strict=True)),
        )

    def clipped(self, shape: Shape3) -> Box:
        """The part of the box that lies in a volume of `shape`."""
        return Box(
            triple(min(max(v, 0), n) for v, n in zip(self.start, shape, strict=True)),
            triple(min(max(v, 0), n) for v, n in zip(self.stop, shape, strict=True)),
        )

    def grown(self, margin: int) -> Box:
        """The box and so many voxels beyond each of its faces."""
        return Box(triple(a - margin for a in self.start), triple(b + margin for b in self.stop))

    def __str__(self) -> str:
        return ",".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True))


@dataclass(frozen=True)
class Grid:
    """A volume of `shape` cut into shards, and each shard into chunks.

    `shard` is a multiple of `chunk` on each axis. Shards and chunks at the upper end of the volume
    are cut off by it: `shard_box` and `chunk_boxes` give only what lies inside.
    """

    shape: Shape3
    chunk: Shape3
    shard: Shape3

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise SettingsError(f"a volume of shape {self.shape} holds no voxels")
        if min(self.chunk) < 1:
            raise SettingsError(f"chunk shape {format_shape(self.chunk)} must be positive on each axis")
        if any(s < c or s % c for s, c in zip(self.shard, self.chunk, strict=True)):
            raise SettingsError(
                f"shard shape {format_shape(self.shard)} must be a multiple of the chunk shape "
                f"{format_shape(self.chunk)}"
            )

    @property
    def shards(self) -> Shape3:
        """Number of shards on each axis."""
        return triple(-(-n // s) for n, s in zip(self.shape, self.shard, strict=True))

    @property
    def chunks_per_shard(self) -> Shape3:
        """Number of chunks on each axis of one shard."""
        return triple(s // c for s, c in zip(self.shard, self.chunk, strict=True))

    def shard_indices(self) -> Iterator[Shape3]:
        """All shard indices, x fastest."""
        z, y, x = self.shards
        return itertools.product(range(z), range(y), range(x))

    def shard_box(self, index: Shape3) -> Box:
        """The voxels of one shard that lie in the volume."""
        start = triple(i * s for i, s in zip(index, self.shard, strict=True))
        return Box(start, add(start, self.shard)).clipped(self.shape)

    def chunk_boxes(self, index: Shape3) -> Iterator[tuple[int, Shape3, Box]]:
        """The chunks of shard `index` that touch the volume: (slot, chunk index, box).

        `slot` is the chunk's place in the shard's index, row-major; the chunk index counts chunks
        over the whole volume.
        """
        counts = self.chunks_per_shard
        for slot, within in enumerate(itertools.product(*(range(n) for n in counts))):
            chunk_index = triple(i * n + w for i, n, w in zip(index, counts, within, strict=True))
            start = triple(i * c for i, c in zip(chunk_index, self.chunk, strict=True))
            if all(s < n for s, n in zip(start, self.shape, strict=True)):
                yield slot, chunk_index, Box(start, add(start, self.chunk)).clipped(self.shape)

    def chunks_of(self, box: Box) -> Iterator[tuple[Shape3, int, Shape3, Box]]:
        """The chunks that a box of the volume touches: (shard index, slot, chunk index, box)."""
        spans = [
            range(start // c, -(-stop // c))
            for start, stop, c in zip(box.start, box.stop, self.chunk, strict=True)
        ]
        counts = self.chunks_per_shard
        for chunk_index in itertools.product(*spans) if box.voxels else ():
            z, y, x = (i % n for i, n in zip(chunk_index, counts, strict=True))
            start = triple(i * c for i, c in zip(chunk_index, self.chunk, strict=True))
            yield (
                triple(i // n for i, n in zip(chunk_index, counts, strict=True)),
                (z * counts[1] + y) * counts[2] + x,
                triple(iter(chunk_index)),
                Box(start, add(start, self.chunk)).clipped(self.shape),
            )


def blocks(shape: Shape3, block: Shape3) -> Iterator[Box]:
    """Boxes that cover a volume, those at its end cut off."""
    axes = [range(0, n, b) for n, b in zip(shape, block, strict=True)]
    for start in itertools.product(*axes):
        stop = triple(min(a + b, n) for a, b, n in zip(start, block, shape, strict=True))
        yield Box(triple(iter(start)), stop)


def triple(values: Iterator[int]) -> Shape3:
    """Exactly three whole numbers as a tuple."""
    z, y, x = values
    return z, y, x


def add(first: Shape3, second: Shape3) -> Shape3:
    """Sum of two triples, axis by axis."""
    return triple(a + b for a, b in zip(first, second, strict=True))


def round_up(shape: Shape3, multiple: Shape3) -> Shape3:
    """The smallest multiple of `multiple` that is at least `shape`, axis by axis."""
    return triple(-(-n // m) * m for n, m in zip(shape, multiple, strict=True))


def format_shape(shape: Shape3) -> str:
    """The command line's form of a shape: 64,64,64."""
    return ",".join(str(n) for n in shape)


def parse_shape(text: str) -> Shape3:
    """Parse the command line's form of a shape: three positive whole numbers, 64,64,64."""
    try:
        shape = triple(int(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(f"shape {text!r} is not of the form 64,64,64") from None
    if min(shape) < 1:
        raise SettingsError(f"shape {text!r} must be positive on each axis")
    return shape


def parse_box(text: str, shape: Shape3) -> Box:
    """Parse z0:z1,y0:y1,x0:x1 in a volume of `shape`; an end that is left out is the volume's."""
    parts = text.split(",")
    try:
        if len(parts) != 3:
            raise ValueError
        pairs = [part.split(":") for part in parts]
        start = triple(int(low) if low else 0 for low, _ in pairs)
        stop = triple(int(high) if high else n for (_, high), n in zip(pairs, shape, strict=True))
    except ValueError:
        raise SettingsError(f"region {text!r} is not of the form z0:z1,y0:y1,x0:x1") from None
    box = Box(start, stop)
    if min(start) < 0 or any(b > n for b, n in zip(stop, shape, strict=True)):
        raise SettingsError(f"region {text} does not lie in the volume of shape {format_shape(shape)}")
    if min(box.shape) < 1:
        raise SettingsError(f"region {text} is empty")
    return box
