"""The zarr v3 codec `ucray`: chunks of an archive, decoded by any zarr reader that has ucray.

zarr finds the class by its entry point, so `zarr.open_group(archive)["0"][...]` is all a reader
needs. The configuration in zarr.json holds the decoder's weights.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np
from zarr.abc.codec import ArrayBytesCodec

from ucray.codec.chunk import DTYPES, ChunkFormat
from ucray.codec.decoder import ChunkDecoder
from ucray.codec.stored import StoredCodec
from ucray.errors import DtypeError, SettingsError
from ucray.grid import triple

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer

    from ucray.codec.encoder import ChunkEncoder


@dataclass(frozen=True)
class UcrayCodec(StoredCodec, ArrayBytesCodec):
    """Codes one chunk with a student that stands in the metadata.

    Parameters
    ----------
    chunk
        The chunk format of the array that the codec is bound to; None before.
    """

    is_fixed_size = False

    chunk: ChunkFormat | None = None

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> Self:
        """Bind the codec to an array's chunk shape, dtype and fill value."""
        if len(array_spec.shape) != 3:
            raise SettingsError(f"the codec ucray wants axes (z, y, x), not {len(array_spec.shape)} axes")
        dtype = str(array_spec.dtype.to_native_dtype().name)
        if dtype not in DTYPES:
            raise DtypeError(f"voxels of type {dtype} are not served; {', '.join(DTYPES)} are")
        chunk = self.format_of(triple(iter(array_spec.shape)), dtype, float(array_spec.fill_value))
        # The shape is not checked here: without shards, zarr binds codecs to the whole array's shape
        # first. Networks are built once per chunk format, by the codec that is bound to it.
        if chunk == self.chunk:
            return self
        return self._bound.setdefault(chunk, replace(self, chunk=chunk))

    @cached_property
    def _bound(self) -> dict[ChunkFormat, Self]:
        return {}

    @property
    def bound(self) -> ChunkFormat:
        """The chunk format of the array the codec is bound to."""
        if self.chunk is None:
            raise SettingsError("the codec ucray is not bound to an array yet")
        return self.chunk

    @cached_property
    def decoder(self) -> ChunkDecoder:
        """The decoder of the bound array."""
        return self.decoder_of(self.bound)

    @cached_property
    def encoder(self) -> ChunkEncoder:
        """The encoder of the bound array; raises WeightsError if the weights can only decode."""
        # Whoever only reads does not wait for what encodes.
        from ucray.codec.encoder import ChunkEncoder

        return ChunkEncoder(self.weights, self.bound, max_error=self.max_error)

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        codec = self.evolve_from_array_spec(chunk_spec)
        voxels = await asyncio.to_thread(codec.decoder.decode, chunk_data.to_bytes())
        return chunk_spec.prototype.nd_buffer.from_numpy_array(np.asarray(voxels))

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        codec = self.evolve_from_array_spec(chunk_spec)
        voxels = np.asarray(chunk_data.as_numpy_array())
        packed = await asyncio.to_thread(codec.encoder.encode, voxels, self.quality)
        return chunk_spec.prototype.buffer.from_bytes(packed.data) if packed.data else None

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Refused: the size of a coded chunk depends on its voxels."""
        raise NotImplementedError("the size of a chunk coded by ucray depends on its voxels")
