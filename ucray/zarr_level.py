"""The zarr v3 codec `ucray_level`: a coarser level of an archive, averaged from level 0 when it is read.

A level is an array of its own that any zarr reader with ucray opens, and has no chunks in the store: what
it shows follows from the codes of level 0. Averages of decoded voxels are closer to averages of the source
than anything that as many bytes again could code (`EXPERIMENTS.md`, "Levels").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import zarr.api.asynchronous
from zarr.abc.codec import ArrayBytesCodec, ArrayBytesCodecPartialDecodeMixin
from zarr.core.common import parse_named_configuration
from zarr.storage import StorePath

from ucray.errors import ArchiveError, SettingsError
from ucray.grid import Box, Shape3, triple
from ucray.resample import scaled_shape, tiles

if TYPE_CHECKING:
    from zarr.abc.store import ByteGetter, Store
    from zarr.core.array import AsyncArray
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer
    from zarr.core.indexing import SelectorTuple

NAME = "ucray_level"
VERSION = 1

CHUNK_KEY_PARTS = 4
"""Parts of a chunk's key within its array: c, z, y and x."""


@dataclass(frozen=True)
class LevelCodec(ArrayBytesCodecPartialDecodeMixin, ArrayBytesCodec):
    """Averages `factors` (z, y, x) voxels of the array `source`, beside the level in its group, to one."""

    is_fixed_size = False

    source: str
    factors: Shape3

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Parse the configuration in zarr.json; raises ArchiveError."""
        try:
            _, parsed = parse_named_configuration(data, NAME)
            configuration: dict[str, Any] = dict(parsed)
            version, source = configuration["version"], str(configuration["source"])
            factors = configuration["factors"]
            if not isinstance(factors, list | tuple):
                raise TypeError
            z, y, x = (int(factor) for factor in factors)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ArchiveError("the configuration of a level in zarr.json is incomplete") from None
        if version != VERSION:
            raise ArchiveError(f"the level is of codec version {version}; this ucray reads version {VERSION}")
        if not source or "/" in source or source in (".", "..") or min(z, y, x) < 1:
            raise ArchiveError(f"a level in zarr.json is of {source!r}, {z} x {y} x {x} to one")
        return cls(source, (z, y, x))

    def to_dict(self) -> dict[str, Any]:
        """The configuration for zarr.json."""
        return {
            "name": NAME,
            "configuration": {"version": VERSION, "source": self.source, "factors": list(self.factors)},
        }

    @cached_property
    def _sources(self) -> dict[str, tuple[Store, AsyncArray[Any]]]:
        return {}

    async def _decode_partial_single(
        self, byte_getter: ByteGetter, selection: SelectorTuple, chunk_spec: ArraySpec
    ) -> NDBuffer | None:
        # The chunk that is asked for tells where in the store the level is, and beside it its source.
        if not isinstance(byte_getter, StorePath):
            raise ArchiveError("a level of an archive is read from a store, not from within another array")
        folder, index = _place(byte_getter.path)
        source = await self._opened(byte_getter.store, "/".join([*folder, self.source]))
        chunk = triple(iter(chunk_spec.shape))
        corner = triple(n * c for n, c in zip(index, chunk, strict=True))
        shape = scaled_shape(triple(iter(source.shape)), self._scale)
        wanted = _bounds(selection, chunk)
        inside = wanted.shifted(corner).clipped(shape)
        dtype = chunk_spec.dtype.to_native_dtype()
        voxels = np.full(chunk, chunk_spec.fill_value, dtype)
        for tile in tiles(inside, self._scale, triple(iter(source.shape))):
            found = np.asarray(await source.getitem(tile.source.slices))
            voxels[tile.target.shifted(triple(-n for n in corner)).slices] = tile.of(found)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(voxels[_plain(selection)])

    @property
    def _scale(self) -> tuple[float, float, float]:
        z, y, x = self.factors
        return float(z), float(y), float(x)

    async def _opened(self, store: Store, path: str) -> AsyncArray[Any]:
        """The array that is averaged; opened once a store, as its metadata hold the decoder's weights."""
        known = self._sources.get(path)
        if known is not None and known[0] is store:
            return known[1]
        array = await zarr.api.asynchronous.open_array(store=store, path=path, mode="r")
        self._sources[path] = store, array
        return array

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        raise ArchiveError("a level of an archive has no chunks of its own to decode")

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        raise SettingsError("a level of an archive follows from level 0 and is not written to")

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """None: a level has no chunks."""
        return 0


def _place(path: str) -> tuple[list[str], Shape3]:
    """Folders of the group that a chunk's level is in, and the chunk's index."""
    parts = path.split("/")
    return parts[: -1 - CHUNK_KEY_PARTS], triple(int(part) for part in parts[1 - CHUNK_KEY_PARTS :])


def _bounds(selection: SelectorTuple, chunk: Shape3) -> Box:
    """The box of a chunk that a selection lies in; all of it where it is more than slices and places."""
    parts = _plain(selection)
    if len(parts) != len(chunk) or not all(isinstance(part, slice | int | np.integer) for part in parts):
        return Box((0, 0, 0), chunk)
    spans = []
    for part, extent in zip(parts, chunk, strict=True):
        places = range(extent)[part] if isinstance(part, slice) else range(int(part), int(part) + 1)
        spans.append((min(places), max(places) + 1) if places else (0, 0))
    return Box(triple(a for a, _ in spans), triple(b for _, b in spans))


def _plain(selection: SelectorTuple) -> tuple[Any, ...]:
    return selection if isinstance(selection, tuple) else (selection,)


def level_factors(scale: tuple[float, float, float], levels: int) -> list[Shape3]:
    """Factors (z, y, x) of levels 1 and up of voxels with edges of `scale`.

    An axis is halved where its voxels are less than twice as long as the shortest: thick slices keep their
    number until the others have caught up.
    """
    factors: list[Shape3] = []
    last: Shape3 = (1, 1, 1)
    for _ in range(levels):
        edges = [s * f for s, f in zip(scale, last, strict=True)]
        last = triple(f * (2 if edge < 2 * min(edges) else 1) for f, edge in zip(last, edges, strict=True))
        factors.append(last)
    return factors
