"""What the gateway serves: an image in several scales, each in chunks that are decoded when asked for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BytesCodec, GzipCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from ucray.grid import Box, Shape3, parse_box, triple
from ucray.reader import Reader
from ucray.resample import Scale3, scaled_shape, tiles
from ucray.storage.space import NANOMETER, NANOMETERS, SPATIAL, Space, multiscale_of, multiscale_space
from ucray.storage.volume import Volume
from ucray.zarr_level import level_factors

Voxels = npt.NDArray[np.generic]

SMALLEST = 256
"""Voxels of the longest axis that need no coarser scale."""

MOST_SCALES = 5
"""Scales at most: a chunk of the last takes 8^4 of the first."""

GZIP_LEVEL = 1


@dataclass(frozen=True)
class Image:
    """A volume (z, y, x) in scales whose voxels average `factors` of its own.

    `read` gives the voxels of a box of the volume.
    """

    name: str
    shape: Shape3
    dtype: str
    fill_value: float
    chunk: Shape3
    space: Space
    factors: tuple[Shape3, ...]
    read: Callable[[Box], Voxels]

    def scale(self, level: int) -> Scale3:
        """Edges of a level's voxels in voxels of the volume."""
        z, y, x = self.factors[level]
        return float(z), float(y), float(x)

    def level_shape(self, level: int) -> Shape3:
        """Shape of a level."""
        return scaled_shape(self.shape, self.scale(level))

    def voxels(self, level: int, box: Box) -> Voxels:
        """Voxels of a box of a level."""
        found = np.empty(box.shape, self.dtype)
        for tile in tiles(box, self.scale(level), self.shape):
            place = tile.target.shifted(triple(-n for n in box.start)).slices
            found[place] = tile.of(self.read(tile.source))
        return found

    def chunk_box(self, level: int, index: Shape3) -> Box | None:
        """The box of a chunk within its level; None if there is no such chunk."""
        start = triple(n * c for n, c in zip(index, self.chunk, strict=True))
        stop = triple(a + c for a, c in zip(start, self.chunk, strict=True))
        box = Box(start, stop).clipped(self.level_shape(level))
        return box if min(box.shape) > 0 else None

    def zarr_chunk(self, level: int, box: Box) -> bytes:
        """A chunk's voxels in C order, little-endian, filled up to the shape of a chunk."""
        filled = np.full(self.chunk, self.fill_value, self.dtype)
        filled[Box((0, 0, 0), box.shape).slices] = self.voxels(level, box)
        return filled.astype(np.dtype(self.dtype).newbyteorder("<"), copy=False).tobytes()

    def precomputed_chunk(self, level: int, box: Box) -> bytes:
        """A chunk's voxels with x fastest, little-endian, cut off where the volume ends."""
        return self.voxels(level, box).astype(np.dtype(self.dtype).newbyteorder("<"), copy=False).tobytes()

    def group_metadata(self) -> bytes:
        """zarr.json of the group, OME-Zarr 0.5."""
        attributes = self.space.to_ome(self.name, self.factors[1:])
        return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}).encode()

    def array_metadata(self, level: int) -> bytes:
        """zarr.json of a level, as zarr itself writes it."""
        store = MemoryStore()
        zarr.create_array(
            store,
            shape=self.level_shape(level),
            chunks=self.chunk,
            dtype=self.dtype,
            fill_value=self.fill_value,
            serializer=BytesCodec(endian="little"),
            compressors=GzipCodec(level=GZIP_LEVEL),
            filters=None,
            dimension_names=SPATIAL,
        )
        data = asyncio.run(store.get("zarr.json", default_buffer_prototype()))
        assert data is not None
        return data.to_bytes()

    def precomputed_info(self) -> dict[str, Any]:
        """The `info` of neuroglancer's precomputed format, which counts in nanometers and whole voxels."""
        unit = NANOMETERS.get(self.space.unit or NANOMETER, 1.0)
        scales = []
        for level, factors in enumerate(self.factors):
            edges = [s * f * unit for s, f in zip(self.space.scale, factors, strict=True)]
            corner = zip(self.space.translation, self.space.scale, factors, strict=True)
            scales.append(
                {
                    "key": str(level),
                    "size": list(self.level_shape(level))[::-1],
                    "resolution": edges[::-1],
                    "voxel_offset": [round(t / s / f) for t, s, f in corner][::-1],
                    "chunk_sizes": [list(self.chunk)[::-1]],
                    "encoding": "raw",
                }
            )
        return {
            "@type": "neuroglancer_multiscale_volume",
            "type": "image",
            "data_type": self.dtype,
            "num_channels": 1,
            "scales": scales,
        }


def archive_image(reader: Reader) -> Image:
    """The image of an archive, in its levels, or in those that a viewer needs where it has none."""
    space = multiscale_space(multiscale_of(reader.attributes), "0", SPATIAL)
    shape, array = reader.shape, reader.array
    stored = tuple(reader.levels)
    fill = array.metadata.fill_value

    def read(box: Box) -> Voxels:
        # What is missing would look like fill, and be kept as that by whoever looks.
        reader.check(box)
        return reader.read(box)

    return Image(
        name="compressed",
        shape=shape,
        dtype=reader.dtype.name,
        fill_value=0.0 if fill is None else float(fill),
        chunk=triple(iter(array.chunks)),
        space=space,
        factors=stored if len(stored) > 1 else _viewed(shape, space),
        read=read,
    )


def source_image(volume: Volume, region: str, compressed: Image) -> Image:
    """The image of the source, in the region, the chunks and the scales of what was made of it."""
    corner = parse_box(region, volume.shape).start
    return replace(compressed, name="original", read=lambda box: volume.read(box.shifted(corner)))


def _viewed(shape: Shape3, space: Space) -> tuple[Shape3, ...]:
    factors: list[Shape3] = [(1, 1, 1)]
    for each in level_factors(space.scale, MOST_SCALES - 1):
        if max(-(-n // f) for n, f in zip(shape, factors[-1], strict=True)) <= SMALLEST:
            break
        factors.append(each)
    return tuple(factors)
