"""ucray in the benchmark: chunks coded in as many processes as cores, as a cluster's workers do it.

Every byte that an archive spends on a chunk is counted.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.synchronize import Barrier
from types import TracebackType
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from ucray.codec.allocator import keep_freed_memory
from ucray.codec.chunk import ChunkFormat, normalisation
from ucray.codec.decoder import ChunkDecoder
from ucray.codec.encoder import ChunkEncoder, Prepared
from ucray.codec.importance import LEADING, ChunkImportance, cell_means
from ucray.codec.rate import CHUNK_OVERHEAD, finest_within
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


class VolumeCodec:
    """Codes one volume (z, y, x) with given weights; to be used in a `with` statement.

    `importance` (z, y, x) weighs the errors of its voxels; or else it holds gradients (draws, z, y, x), and
    errors weigh by what they change in that of which these are.
    """

    def __init__(
        self,
        volume: Volume,
        weights: Weights,
        chunk: Shape3,
        fill_value: float,
        importance: npt.NDArray[np.floating] | None = None,
    ) -> None:
        self.chunk = chunk
        offset, scale = normalisation([volume], fill_value)
        self._format = ChunkFormat(chunk, str(volume.dtype), fill_value, offset, scale)
        self._volume = volume
        self._boxes = list(blocks(triple(iter(volume.shape)), chunk))
        # What is refused is refused here: a pool starts a process that cannot begin over and over.
        self._encoder = ChunkEncoder(weights, self._format)
        self._importance: list[ChunkImportance | None] = [None] * len(self._boxes)
        if importance is not None:
            self._importance = [*self._weighed(importance, weights.config.latent_cell)]
        # What the processes must load and build is done before anything is timed.
        context = multiprocessing.get_context("spawn")
        ready = context.Barrier(PROCESSES + 1)
        # Decoded voxels go where this process finds them, as those of a cluster's workers go into an object.
        self._decoded = context.RawArray(ctypes.c_ubyte, volume.nbytes)
        arguments = volume, self._decoded, weights.to_bytes(), self._format, ready
        self._pool = context.Pool(PROCESSES, _Worker.start, arguments)
        ready.wait()

    def _weighed(self, importance: npt.NDArray[np.floating], cell: Shape3) -> Iterator[ChunkImportance]:
        if importance.ndim == 3:
            mean = float(importance.mean())
            for box in self._boxes:
                yield ChunkImportance.of(cell_means(importance[box.slices], cell), mean, self.chunk, cell)
            return
        found = [self._encoder.sensitivity.of(importance[(slice(None), *box.slices)]) for box in self._boxes]
        mean = float(np.mean([one[..., :LEADING] for one in found])) or 1.0
        for one in found:
            yield ChunkImportance.of_latents(one, mean)

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

        def size_at(quality: int) -> float:
            return encoder.size_at(prepared, quality) + CHUNK_OVERHEAD * len(prepared)

        return finest_within(size_at, raw / ratio)

    @cached_property
    def _searched(self) -> tuple[ChunkEncoder, list[Prepared]]:
        """An encoder, and the sample of the chunks."""
        every = slice(None, None, max(1, len(self._boxes) // SEARCHED))
        voxels = [self._volume[box.slices] for box in self._boxes[every]]
        return self._encoder, self._encoder.prepare(voxels, None, self._importance[every])

    def encode(self, quality: int) -> Coded:
        """All chunks."""
        chunks = list(zip(self._boxes, self._importance, strict=True))
        shares = self._pool.starmap(
            _Worker.encode, [(chunks[n::PROCESSES], quality) for n in range(PROCESSES)], chunksize=1
        )
        return Coded(tuple(shares[n % PROCESSES][n // PROCESSES] for n in range(len(self._boxes))))

    def decode(self, coded: Coded, part: str = "student") -> Volume:
        """The volume back, with the student or the teacher."""
        chunks = list(zip(self._boxes, coded.chunks, strict=True))
        self._pool.starmap(
            _Worker.decode, [(chunks[n::PROCESSES], part) for n in range(PROCESSES)], chunksize=1
        )
        return _voxels(self._decoded, self._volume).copy()


class _Worker:
    """What a process of the pool holds: the volume, an encoder, a decoder for each part."""

    mine: ClassVar[_Worker]

    def __init__(self, volume: Volume, decoded: Volume, weights: Weights, chunk: ChunkFormat) -> None:
        self._volume = volume
        self._decoded = decoded
        self._fill_value = chunk.fill_value
        self._encoder = ChunkEncoder(weights, chunk)
        self._decoders = {
            part: ChunkDecoder(weights, chunk, part=part)
            for part in ("student", "teacher")
            if weights.part(part)
        }

    @classmethod
    def start(
        cls, volume: Volume, decoded: Shared, weights: bytes, chunk: ChunkFormat, ready: Barrier
    ) -> None:
        """Begin a process, which has one core to itself."""
        keep_freed_memory()
        cls.mine = cls(volume, _voxels(decoded, volume), Weights.from_bytes(weights), chunk)
        # Much is loaded and compiled by the first chunk alone.
        first = cls.mine._encoder.encode(volume[tuple(slice(0, n) for n in chunk.shape)], WARMING).data
        for decoder in cls.mine._decoders.values():
            decoder.decode_many([first] if first else [])
        ready.wait()

    @staticmethod
    def encode(chunks: Sequence[tuple[Box, ChunkImportance | None]], quality: int) -> list[bytes]:
        """Some of the volume's chunks."""
        mine = _Worker.mine
        return [
            mine._encoder.encode(mine._volume[box.slices], quality, None, importance).data
            for box, importance in chunks
        ]

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
