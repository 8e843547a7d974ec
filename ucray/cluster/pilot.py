"""A pilot: a few chunks of a volume coded on this machine, to project what a job would give and take."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numcodecs
import numpy as np
import numpy.typing as npt

from ucray.bench.pictures import JPEG_XL_EFFORT, missing
from ucray.cluster.plan import CompressPlan, sample_chunk_boxes
from ucray.cluster.rate import Measured, measure_volume
from ucray.cluster.telemetry import Listener
from ucray.cluster.weighing import Weighing
from ucray.codec.chunk import ChunkFormat
from ucray.codec.decoder import ChunkDecoder, device_for
from ucray.codec.encoder import ChunkEncoder
from ucray.codec.weights import Weights
from ucray.grid import triple
from ucray.quality import ErrorSum

PILOT_CHUNKS = 16
"""Chunks that are timed and given to other codecs; quality is searched on more."""

DISTANCES = (0.1, 25.0)
"""Butteraugli distances between which JPEG XL's for the same PSNR is searched."""

Voxels = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Coded:
    """What a codec made of the pilot's chunks: bytes, PSNR in dB, and seconds that encoding took."""

    bytes: int
    psnr: float
    seconds: float


@dataclass(frozen=True)
class Pilot:
    """A few chunks of a volume, coded.

    `voxel_bytes` are those of the chunks before. `jpeg_xl` is at no lower PSNR than `ucray`, or None, with
    the reason in `no_jpeg_xl`.
    """

    chunks: int
    voxel_bytes: int
    measured: Measured
    ucray: Coded
    decode_seconds: float
    blosc: Coded
    jpeg_xl: Coded | None
    no_jpeg_xl: str


def run_pilot(plan: CompressPlan, weights: Weights, device: str, listener: Listener) -> Pilot:
    """Search the quality as a job would, and code a few chunks at it, with ucray and with simpler codecs."""
    measured = measure_volume(plan, weights, device, listener)
    boxes = sample_chunk_boxes(plan.grid, PILOT_CHUNKS)
    chunks = [plan.volume.read(plan.source_box(box)) for box in boxes]
    places = [triple(a // c for a, c in zip(box.start, plan.grid.chunk, strict=True)) for box in boxes]
    bound = plan.target.max_error
    form = ChunkFormat(
        plan.grid.chunk, plan.volume.dtype, plan.volume.fill_value, measured.offset, measured.scale
    )
    encoder = ChunkEncoder(weights, form, device=device_for(device), max_error=bound)
    decoder = ChunkDecoder(weights.decoder(bounded=bound is not None), form, device=device_for(device))
    # What is loaded and built at the first chunk is not a job's speed.
    encoder.encode(chunks[0], measured.quality, places[0])
    weighing = Weighing.of(plan, encoder)
    near = [] if weighing is None else [weighing.near(box) for box in boxes]
    if weighing is not None:
        weighing.look(encoder.prepare(chunks[:1])[0], boxes[0], near[0])
    started = time.perf_counter()
    prepared = encoder.prepare(chunks, places)
    if weighing is not None:
        mean = measured.importance_mean
        looks = [weighing.look(*one) for one in zip(prepared, boxes, near, strict=True)]
        prepared = [weighing.weighed(one, look, mean) for one, look in zip(prepared, looks, strict=True)]
        prepared = [
            weighing.steered(one, look, measured.quality, mean)
            for one, look in zip(prepared, looks, strict=True)
        ]
    drafts = encoder.drafts_at(prepared, measured.quality)
    packed = [encoder.pack(draft) for draft in drafts]
    seconds = time.perf_counter() - started
    stored = [(one.data, place) for one, place in zip(packed, places, strict=True) if one.data]
    started = time.perf_counter()
    decoder.decode_many([data for data, _ in stored], [place for _, place in stored])
    decode_seconds = time.perf_counter() - started
    error = sum((one.error for one in packed), ErrorSum())
    ours = Coded(sum(len(one.data) for one in packed), error.psnr(measured.data_range), seconds)
    no_jpeg_xl = _no_jpeg_xl(plan.volume.dtype)
    return Pilot(
        chunks=len(chunks),
        voxel_bytes=sum(chunk.nbytes for chunk in chunks),
        measured=measured,
        ucray=ours,
        decode_seconds=decode_seconds,
        blosc=_blosc(chunks),
        # It knows no bounds: where one holds, only without loss it promises as much.
        jpeg_xl=None
        if no_jpeg_xl
        else _jpeg_xl(chunks, ours.psnr if bound is None else math.inf, measured.data_range),
        no_jpeg_xl=no_jpeg_xl,
    )


def _blosc(chunks: Sequence[Voxels]) -> Coded:
    codec = numcodecs.Blosc(cname="zstd", clevel=5, shuffle=numcodecs.Blosc.BITSHUFFLE)
    started = time.perf_counter()
    size = sum(len(codec.encode(np.ascontiguousarray(chunk))) for chunk in chunks)
    return Coded(size, math.inf, time.perf_counter() - started)


def _no_jpeg_xl(dtype: str) -> str:
    if dtype not in ("uint8", "uint16"):
        return f"JPEG XL does not code {dtype}"
    return missing("JPEGXL") or ""


def _jpeg_xl(chunks: Sequence[Voxels], psnr: float, data_range: float) -> Coded | None:
    """JPEG XL of the chunks' slices, as small as it gets at that PSNR; lossless if that is infinite."""
    if math.isinf(psnr):
        return _jpeg_xl_at(chunks, None, data_range)
    finest, coarsest = math.log(DISTANCES[0]), math.log(DISTANCES[1])
    found = _jpeg_xl_at(chunks, math.exp(finest), data_range)
    if found.psnr < psnr:
        return _jpeg_xl_at(chunks, None, data_range)
    for _ in range(7):
        middle = (finest + coarsest) / 2.0
        tried = _jpeg_xl_at(chunks, math.exp(middle), data_range)
        if tried.psnr >= psnr:
            found, finest = tried, middle
        else:
            coarsest = middle
    return found


def _jpeg_xl_at(chunks: Sequence[Voxels], distance: float | None, data_range: float) -> Coded:
    import imagecodecs

    settings: dict[str, Any] = {"lossless": distance is None, "distance": distance}
    size, error, seconds = 0, ErrorSum(), 0.0
    for chunk in chunks:
        for picture in np.ascontiguousarray(chunk):
            started = time.perf_counter()
            data = imagecodecs.jpegxl_encode(picture, effort=JPEG_XL_EFFORT, **settings)
            seconds += time.perf_counter() - started
            size += len(data)
            error += ErrorSum.between(picture, imagecodecs.jpegxl_decode(data))
    return Coded(size, error.psnr(data_range), seconds)
