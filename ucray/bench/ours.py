"""ucray in the benchmark: chunks coded in as many processes as cores, as a cluster's workers do it.

Every byte that an archive spends on a chunk is counted.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.synchronize import Barrier
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from ucray.codec.allocator import keep_freed_memory
from ucray.codec.chunk import ChunkFormat, normalisation
from ucray.codec.decoder import ChunkDecoder
from ucray.codec.encoder import ChunkEncoder, Prepared
from ucray.codec.importance import LEADING, ChunkImportance, cell_means
from ucray.codec.rate import CHUNK_OVERHEAD, finest_within
from ucray.codec.steering import Steering, View
from ucray.codec.tracer import TracerNetwork
from ucray.codec.weights import Weights
from ucray.grid import Box, Shape3, blocks, triple

Volume = npt.NDArray[np.generic]
Shared = ctypes.Array[ctypes.c_ubyte]

SEARCHED = 16
"""Chunks on which the quality for a ratio is searched."""

PROCESSES = os.cpu_count() or 1

WARMING = 128
"""The quality of a chunk that is coded before anything is timed."""


@dataclass(frozen=True)
class Coded:
    """A coded volume: payload of every chunk."""

    chunks: tuple[bytes, ...]

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.chunks)) + CHUNK_OVERHEAD * len(self.chunks)


Weighed = npt.NDArray[np.floating] | Sequence[tuple[Box, TracerNetwork]]
"""Weights of voxels' errors, or tracers and where they look."""


@dataclass(frozen=True)
class _Chunk:
    """A chunk in a box of the volume, its place among chunks, its importance, and which tracer steers it."""

    box: Box
    origin: Shape3
    importance: ChunkImportance | None = None
    tracer: int | None = None


class VolumeCodec:
    """Codes one volume (z, y, x) with given weights; to be used in a `with` statement.

    `weighed` holds weights (z, y, x) of its voxels' errors; or else tracers and boxes, and chunks whose
    middle is in one of these are weighed and steered by its tracer.
    """

    def __init__(
        self,
        volume: Volume,
        weights: Weights,
        chunk: Shape3,
        fill_value: float,
        weighed: Weighed | None = None,
    ) -> None:
        self.chunk = chunk
        offset, scale = normalisation([volume], fill_value)
        self._format = ChunkFormat(chunk, str(volume.dtype), fill_value, offset, scale)
        self._volume = volume
        boxes = list(blocks(triple(iter(volume.shape)), chunk))
        # What is refused is refused here: a pool starts a process that cannot begin over and over.
        self._encoder = ChunkEncoder(weights, self._format)
        places = [triple(a // c for a, c in zip(box.start, chunk, strict=True)) for box in boxes]
        self._chunks = [_Chunk(box, place) for box, place in zip(boxes, places, strict=True)]
        self._tracers: tuple[bytes, ...] = ()
        self._mean = 1.0
        if isinstance(weighed, np.ndarray):
            mean, cell = float(weighed.mean()), weights.config.latent_cell
            found = [
                ChunkImportance.of(cell_means(weighed[b.slices], cell), mean, chunk, cell) for b in boxes
            ]
            self._chunks = [
                replace(chunk, importance=one) for chunk, one in zip(self._chunks, found, strict=True)
            ]
        elif weighed is not None:
            self._tracers = tuple(tracer.to_bytes() for _, tracer in weighed)
            for data in self._tracers:
                TracerNetwork.from_bytes(data)
            homes = [home for home, _ in weighed]
            self._chunks = [replace(chunk, tracer=_home(chunk.box, homes)) for chunk in self._chunks]
        # What the processes must load and build is done before anything is timed.
        context = multiprocessing.get_context("spawn")
        ready = context.Barrier(PROCESSES + 1)
        # Decoded voxels go where this process finds them, as those of a cluster's workers go into an object.
        self._decoded = context.RawArray(ctypes.c_ubyte, volume.nbytes)
        arguments = volume, self._decoded, weights.to_bytes(), self._format, self._tracers, ready
        self._pool = context.Pool(PROCESSES, _Worker.start, arguments)
        ready.wait()
        if self._tracers:
            self._look()

    def _look(self) -> None:
        """Weigh every chunk by what its tracer sees."""
        weights = self._shared(_Worker.look, self._chunks)
        self._mean = float(np.mean([one[..., :LEADING] for one in weights])) or 1.0
        self._chunks = [
            replace(chunk, importance=ChunkImportance.of_latents(one, self._mean))
            for chunk, one in zip(self._chunks, weights, strict=True)
        ]

    def _shared(self, work: Callable[..., list[Any]], chunks: Sequence[_Chunk], *how: Any) -> list[Any]:
        """What all processes together make of chunks, in their order."""
        shares = self._pool.starmap(
            work, [(chunks[n::PROCESSES], *how) for n in range(PROCESSES)], chunksize=1
        )
        return [shares[n % PROCESSES][n // PROCESSES] for n in range(len(chunks))]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.terminate()
        self._pool.join()

    def quality_for(self, ratio: float) -> int:
        """The quality whose ratio on a sample of the chunks meets `ratio`."""
        encoder, prepared = self._searched
        raw = sum(one.voxels.nbytes for one in prepared)
        growth = 1.0

        def size_at(quality: int) -> float:
            return encoder.size_at(prepared, quality) * growth + CHUNK_OVERHEAD * len(prepared)

        quality = finest_within(size_at, raw / ratio)
        if not self._tracers:
            return quality
        # By how much steering changes bytes hardly depends on the quality; how it moves latents does.
        shifts = self._shared(_Worker.steer, self._sample, quality, self._mean)
        steered = [replace(one, shift=shift) for one, shift in zip(prepared, shifts, strict=True)]
        growth = encoder.size_at(steered, quality) / encoder.size_at(prepared, quality)
        return finest_within(size_at, raw / ratio)

    @property
    def _sample(self) -> list[_Chunk]:
        return self._chunks[:: max(1, len(self._chunks) // SEARCHED)]

    @cached_property
    def _searched(self) -> tuple[ChunkEncoder, list[Prepared]]:
        """An encoder, and the sample of the chunks."""
        voxels = [self._volume[chunk.box.slices] for chunk in self._sample]
        origins, weights = zip(*[(one.origin, one.importance) for one in self._sample], strict=True)
        return self._encoder, self._encoder.prepare(voxels, origins, weights)

    def encode(self, quality: int) -> Coded:
        """All chunks."""
        return Coded(tuple(self._shared(_Worker.encode, self._chunks, quality, self._mean)))

    def decode(self, coded: Coded, part: str = "student") -> Volume:
        """The volume back, with the student or the teacher."""
        chunks = [(chunk.box, data) for chunk, data in zip(self._chunks, coded.chunks, strict=True)]
        self._pool.starmap(
            _Worker.decode, [(chunks[n::PROCESSES], part) for n in range(PROCESSES)], chunksize=1
        )
        return _voxels(self._decoded, self._volume).copy()


class _Worker:
    """What a process of the pool holds: the volume, an encoder, a decoder for each part."""

    mine: ClassVar[_Worker]

    def __init__(
        self,
        volume: Volume,
        decoded: Volume,
        weights: Weights,
        chunk: ChunkFormat,
        tracers: Sequence[bytes],
    ) -> None:
        self._volume = volume
        self._decoded = decoded
        self._fill_value = chunk.fill_value
        self._encoder = ChunkEncoder(weights, chunk)
        self._steering = [Steering(self._encoder, TracerNetwork.from_bytes(data)) for data in tracers]
        self._decoders = {
            part: ChunkDecoder(weights, chunk, part=part)
            for part in ("student", "teacher")
            if weights.part(part)
        }

    @classmethod
    def start(
        cls,
        volume: Volume,
        decoded: Shared,
        weights: bytes,
        chunk: ChunkFormat,
        tracers: Sequence[bytes],
        ready: Barrier,
    ) -> None:
        """Begin a process, which has one core to itself."""
        keep_freed_memory()
        cls.mine = cls(volume, _voxels(decoded, volume), Weights.from_bytes(weights), chunk, tracers)
        # Much is loaded and compiled by the first chunk alone.
        first = cls.mine._encoder.encode(volume[tuple(slice(0, n) for n in chunk.shape)], WARMING).data
        for decoder in cls.mine._decoders.values():
            decoder.decode_many([first] if first else [])
        ready.wait()

    @staticmethod
    def look(chunks: Sequence[_Chunk]) -> list[npt.NDArray[np.float32]]:
        """What the tracers see of some of the volume's chunks."""
        return [_Worker.mine._view(chunk).weights for chunk in chunks]

    @staticmethod
    def steer(chunks: Sequence[_Chunk], quality: int, mean: float) -> list[npt.NDArray[np.float32] | None]:
        """How latents of some of the volume's chunks are moved."""
        return [_Worker.mine._prepared(chunk, quality, mean).shift for chunk in chunks]

    @staticmethod
    def encode(chunks: Sequence[_Chunk], quality: int, mean: float) -> list[bytes]:
        """Some of the volume's chunks."""
        mine = _Worker.mine
        coded = []
        for chunk in chunks:
            (draft,) = mine._encoder.drafts_at([mine._prepared(chunk, quality, mean)], quality)
            coded.append(mine._encoder.pack(draft).data)
        return coded

    def _prepared(self, chunk: _Chunk, quality: int, mean: float) -> Prepared:
        voxels = self._volume[chunk.box.slices]
        (prepared,) = self._encoder.prepare([voxels], [chunk.origin], [chunk.importance])
        if chunk.tracer is None:
            return prepared
        return self._steering[chunk.tracer].steered(prepared, self._view(chunk), quality, mean)

    def _view(self, chunk: _Chunk) -> View:
        """A chunk of a tracer, and what is seen around it."""
        assert chunk.tracer is not None
        return self._steering[chunk.tracer].view(self._volume, chunk.box)

    @staticmethod
    def decode(chunks: Sequence[tuple[Box, bytes]], part: str) -> None:
        """Some of the volume's chunks; one without bytes is nothing but fill."""
        mine = _Worker.mine
        found = iter(mine._decoders[part].decode_many([data for _, data in chunks if data]))
        for box, data in chunks:
            inside = tuple(slice(0, n) for n in box.shape)
            mine._decoded[box.slices] = next(found)[inside] if data else mine._fill_value


def _voxels(memory: Shared, like: Volume) -> Volume:
    """Memory that processes share as a volume."""
    return np.frombuffer(memoryview(memory), like.dtype).reshape(like.shape)


def _home(box: Box, places: Sequence[Box]) -> int:
    """Which of some boxes the middle of a box is in."""
    middle = triple((a + b) // 2 for a, b in zip(box.start, box.stop, strict=True))
    point = Box(middle, triple(n + 1 for n in middle))
    return next(n for n, place in enumerate(places) if place.common(point) == point)
