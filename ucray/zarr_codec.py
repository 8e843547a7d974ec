"""The zarr v3 codec `ucray`: chunks of an archive, decoded by any zarr reader that has ucray.

zarr finds the class by its entry point, so `zarr.open_group(archive)["0"][...]` is all a reader
needs. The configuration in zarr.json holds the decoder's weights.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import math
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numcodecs import zstd
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.common import parse_named_configuration

from ucray.codec.chunk import DTYPES, ChunkFormat
from ucray.codec.decoder import ChunkDecoder, device_for
from ucray.codec.fill import unpack_exactly
from ucray.codec.weights import VERSIONS, Weights
from ucray.config import QUALITIES
from ucray.errors import ArchiveError, DtypeError, SettingsError, WeightsError
from ucray.grid import triple

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer

    from ucray.codec.encoder import ChunkEncoder

NAME = "ucray"
WEIGHTS_LEVEL = 19
"""zstd level of the weights in the metadata."""

DEVICE_VARIABLE = "UCRAY_DEVICE"

LARGEST_WEIGHTS = 1 << 28
"""Bytes of weights that are unpacked at most."""


@dataclass(frozen=True)
class UcrayCodec(ArrayBytesCodec):
    """Codes one chunk with a student that stands in the metadata.

    Parameters
    ----------
    weights
        Decoder weights; with the analysis network among them, arrays can be written too.
    offset, scale
        Normalisation of the volume; see `ChunkFormat`.
    quality
        Quality (0 to 255) at which chunks are written.
    max_error
        Bound on the error of every voxel, in its units; None where there is none.
    exact_fill
        Whether voxels of the array's fill value come back exactly; if not they are voxels like others.
    """

    is_fixed_size = False

    weights: Weights = field(repr=False)
    offset: float
    scale: float
    quality: int
    max_error: float | None = None
    exact_fill: bool = True
    chunk: ChunkFormat | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Parse the configuration in zarr.json; raises ArchiveError or WeightsError."""
        try:
            _, parsed = parse_named_configuration(data, NAME)
            configuration: dict[str, Any] = dict(parsed)
            version = configuration["version"]
            if version not in VERSIONS:
                known = ", ".join(map(str, VERSIONS))
                raise ArchiveError(f"the archive is of codec version {version}; this ucray reads {known}")
            offset, scale = float(configuration["offset"]), float(configuration["scale"])
            quality = int(configuration["quality"])
            bound = configuration["max_error"]
            max_error = None if bound is None else float(bound)
            exact_fill = configuration["exact_fill"]
            stored = configuration["weights"]
            packed, size, digest = stored["zstd"], int(stored["bytes"]), stored["digest"]
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ArchiveError("the codec's configuration in zarr.json is incomplete") from None
        if not 0 <= quality < QUALITIES:
            raise ArchiveError(f"the codec's quality in zarr.json is {quality}, not 0 to {QUALITIES - 1}")
        if not isinstance(exact_fill, bool):
            raise ArchiveError("the codec's exact_fill in zarr.json is neither true nor false")
        weights = Weights.from_bytes(_unpacked(packed, size))
        if weights.config.version != version:
            raise ArchiveError(f"the codec's version in zarr.json is {version}, not that of its weights")
        if weights.digest != digest:
            raise WeightsError(f"the weights in zarr.json have digest {weights.digest}, not {digest}")
        return cls(weights, offset, scale, quality, max_error, exact_fill)

    def to_dict(self) -> dict[str, Any]:
        """The configuration for zarr.json, with the decoder's weights inside."""
        return {
            "name": NAME,
            "configuration": {
                "version": self.weights.config.version,
                "offset": self.offset,
                "scale": self.scale,
                "quality": self.quality,
                "max_error": self.max_error,
                "exact_fill": self.exact_fill,
                "weights": self._stored_weights,
            },
        }

    @cached_property
    def _stored_weights(self) -> dict[str, Any]:
        decoder = self.weights.decoder(bounded=self.max_error is not None)
        data = decoder.to_bytes()
        packed = base64.b64encode(bytes(zstd.compress(data, WEIGHTS_LEVEL))).decode("ascii")
        return {"digest": decoder.digest, "bytes": len(data), "zstd": packed}

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> Self:
        """Bind the codec to an array's chunk shape, dtype and fill value."""
        if len(array_spec.shape) != 3:
            raise SettingsError(f"the codec ucray wants axes (z, y, x), not {len(array_spec.shape)} axes")
        dtype = str(array_spec.dtype.to_native_dtype().name)
        if dtype not in DTYPES:
            raise DtypeError(f"voxels of type {dtype} are not served; {', '.join(DTYPES)} are")
        fill_value = float(array_spec.fill_value) if self.exact_fill else math.nan
        chunk = ChunkFormat(
            shape=triple(iter(array_spec.shape)),
            dtype=dtype,
            # One and the same not-a-number, so that formats of equal settings are equal.
            fill_value=math.nan if math.isnan(fill_value) else fill_value,
            offset=self.offset,
            scale=self.scale,
        )
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
        return ChunkDecoder(self.weights, self.bound, device=_device())

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


def _device() -> str:
    """Where a reader decodes: the processor, unless UCRAY_DEVICE says cuda or auto."""
    asked = os.environ.get(DEVICE_VARIABLE, "cpu")
    device = device_for(asked)
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise SettingsError(f"{DEVICE_VARIABLE}={asked}: no such device here; cpu, cuda and auto are known")
    return device


def _unpacked(packed: Any, size: int) -> bytes:
    """The safetensors file in zarr.json; no more memory is taken than its stated size."""
    try:
        frame = base64.b64decode(packed, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise WeightsError("the weights in zarr.json are damaged: not base64") from None
    if not 0 < size <= LARGEST_WEIGHTS:
        raise WeightsError(f"the weights in zarr.json claim to have {size} bytes")
    data = np.empty(size, np.uint8)
    if not unpack_exactly(frame, data):
        raise WeightsError(f"the weights in zarr.json are damaged: they do not unpack to {size} bytes")
    return data.tobytes()
