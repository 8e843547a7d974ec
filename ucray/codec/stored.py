"""What zarr.json says of the codec, the decoder's weights among it, and the decoder that follows from it."""

from __future__ import annotations

import base64
import binascii
import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch

from ucray.codec.chunk import ChunkFormat
from ucray.codec.decoder import ChunkDecoder, device_for
from ucray.codec.frames import pack, unpack_exactly
from ucray.codec.residual import LARGEST_BOUND
from ucray.codec.weights import VERSIONS, Weights
from ucray.config import QUALITIES
from ucray.errors import ArchiveError, SettingsError, WeightsError
from ucray.grid import Shape3

NAME = "ucray"
WEIGHTS_LEVEL = 19
"""zstd level of the weights in the metadata."""

DEVICE_VARIABLE = "UCRAY_DEVICE"

LARGEST_WEIGHTS = 1 << 28
"""Bytes of weights that are unpacked at most."""


@dataclass(frozen=True)
class StoredCodec:
    """The codec of an archive as its metadata have it.

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

    weights: Weights = field(repr=False)
    offset: float
    scale: float
    quality: int
    max_error: float | None = None
    exact_fill: bool = True

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Parse the configuration in zarr.json; raises ArchiveError or WeightsError."""
        try:
            if data["name"] != NAME:
                raise ArchiveError(f"the codec in zarr.json is {data['name']!r}, not {NAME}")
            configuration = data["configuration"]
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
        if max_error is not None and not 0.0 <= max_error <= LARGEST_BOUND:
            raise ArchiveError(f"the codec's max_error in zarr.json is {max_error}, not within 0 and 1e30")
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
        packed = base64.b64encode(pack(data, WEIGHTS_LEVEL)).decode("ascii")
        return {"digest": decoder.digest, "bytes": len(data), "zstd": packed}

    def format_of(self, shape: Shape3, dtype: str, fill_value: float) -> ChunkFormat:
        """The format of an array's chunks; raises SettingsError or DtypeError if there is none."""
        fill_value = fill_value if self.exact_fill else math.nan
        return ChunkFormat(
            shape=shape,
            dtype=dtype,
            # One and the same not-a-number, so that formats of equal settings are equal.
            fill_value=math.nan if math.isnan(fill_value) else fill_value,
            offset=self.offset,
            scale=self.scale,
        )

    def decoder_of(self, chunk: ChunkFormat) -> ChunkDecoder:
        """A decoder on the device that UCRAY_DEVICE names; raises SettingsError if there is no such."""
        return ChunkDecoder(self.weights, chunk, device=_device())


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
