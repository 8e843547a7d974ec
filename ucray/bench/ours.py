"""ucray in the benchmark: chunks coded on threads, every byte that an archive spends on them counted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from ucray.bench.samples import blocks
from ucray.codec.chunk import ChunkFormat, normalisation
from ucray.codec.decoder import ChunkDecoder
from ucray.codec.encoder import ChunkEncoder, Prepared
from ucray.codec.rate import CHUNK_OVERHEAD, finest_within
from ucray.codec.weights import Weights
from ucray.grid import Shape3, triple

Volume = npt.NDArray[np.generic]

SEARCHED = 16
"""Chunks on which the quality for a ratio is searched."""

THREADS = os.cpu_count() or 1


@dataclass(frozen=True)
class Coded:
    """A coded volume: payload of every chunk."""

    chunks: tuple[bytes, ...]

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.chunks)) + CHUNK_OVERHEAD * len(self.chunks)


class VolumeCodec:
    """Codes one volume (z, y, x) with given weights."""

    def __init__(self, volume: Volume, weights: Weights, chunk: Shape3, fill_value: float) -> None:
        offset, scale = normalisation([volume], fill_value)
        self._format = ChunkFormat(chunk, str(volume.dtype), fill_value, offset, scale)
        self._volume = volume
        self._weights = weights
        self._boxes = list(blocks(triple(iter(volume.shape)), chunk))
        self._encoders = [ChunkEncoder(weights, self._format) for _ in range(THREADS)]

    def quality_for(self, ratio: float) -> int:
        """The quality whose ratio on a sample of the chunks meets `ratio`."""
        encoder = self._encoders[0]
        raw = sum(one.voxels.nbytes for one in self._searched)

        def size_at(quality: int) -> float:
            return encoder.size_at(self._searched, quality) + CHUNK_OVERHEAD * len(self._searched)

        return finest_within(size_at, raw / ratio)

    @cached_property
    def _searched(self) -> list[Prepared]:
        """The sample of the chunks."""
        picked = self._boxes[:: max(1, len(self._boxes) // SEARCHED)]
        return self._encoders[0].prepare([self._volume[box.slices] for box in picked])

    def encode(self, quality: int) -> Coded:
        """All chunks, on as many threads as there are cores."""

        def some(worker: int) -> list[bytes]:
            mine = self._boxes[worker::THREADS]
            return [self._encoders[worker].encode(self._volume[box.slices], quality).data for box in mine]

        with one_thread_each(), ThreadPoolExecutor(THREADS) as pool:
            shares = list(pool.map(some, range(THREADS)))
        return Coded(tuple(shares[n % THREADS][n // THREADS] for n in range(len(self._boxes))))

    def decode(self, coded: Coded, part: str = "student") -> Volume:
        """The volume back, with the student or the teacher."""
        decoders = [ChunkDecoder(self._weights, self._format, part=part) for _ in range(THREADS)]
        decoded = np.full_like(self._volume, self._format.fill_value)

        def some(worker: int) -> None:
            mine = list(zip(self._boxes, coded.chunks, strict=True))[worker::THREADS]
            full = [(box, data) for box, data in mine if data]
            found = decoders[worker].decode_many([data for _, data in full])
            for (box, _), voxels in zip(full, found, strict=True):
                decoded[box.slices] = voxels[tuple(slice(0, n) for n in box.shape)]

        with one_thread_each(), ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(some, range(THREADS)))
        return decoded


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Chunks run side by side, so each keeps torch and numpy to one thread."""
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
