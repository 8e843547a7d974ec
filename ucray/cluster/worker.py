"""The two halves of coding a shard, as the actors of a compress job hold them. No Ray in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ucray.codec.allocator import keep_freed_memory
from ucray.codec.decoder import device_for
from ucray.codec.encoder import ChunkEncoder, Draft, Packed, Prepared, pack
from ucray.codec.importance import ChunkImportance
from ucray.codec.importance import Weights as Importance
from ucray.codec.steering import Steering
from ucray.codec.tracer import TracerNetwork
from ucray.codec.weights import Weights
from ucray.grid import Box, Shape3
from ucray.storage.archive import ArchiveSettings
from ucray.storage.objects import open_objects
from ucray.storage.shard import ShardStatistics, assemble, commit, committed


@dataclass(frozen=True)
class EncodeJob:
    """What an encoder needs: the archive's settings, full weights, where to compute; a tracer, if any."""

    settings: ArchiveSettings
    weights: bytes
    device: str = "auto"
    tracer: bytes | None = None


@dataclass(frozen=True)
class WriteJob:
    """What a writer needs: the archive's place and settings, the decoder's weights."""

    url: str
    endpoint_url: str | None
    settings: ArchiveSettings
    decoder: bytes


class ShardEncoder:
    """First half: voxels of a shard to drafts, through the networks.

    On a processor it does the second half's coding too: it has the integers at hand, and would take longer to
    send them. A GPU is not kept waiting for that.
    """

    def __init__(self, job: EncodeJob) -> None:
        keep_freed_memory()
        self._settings = job.settings
        device = device_for(job.device)
        self._packs = device == "cpu"
        weights = Weights.from_bytes(job.weights)
        self._cell = weights.config.latent_cell
        self._encoder = ChunkEncoder(
            weights,
            job.settings.chunk_format,
            device=device,
            max_error=job.settings.max_error,
        )
        self._steering: Steering | None = None
        if job.tracer is not None:
            self._steering = Steering(self._encoder, TracerNetwork.from_bytes(job.tracer))

    def drafts(
        self, index: Shape3, voxels: npt.NDArray[np.generic], weights: Importance | None = None
    ) -> list[Draft | None]:
        """Drafts of all chunks of shard `index` in grid order, from its voxels inside the volume.

        `weights` are those of the shard's latent cells, where some weigh more than others.
        """
        grid, quality = self._settings.grid, self._settings.quality
        corner = grid.shard_box(index).start
        prepared: list[Prepared] = []
        drafts: list[Draft | None] = []
        for _, origin, box in grid.chunk_boxes(index):
            inside = box.shifted((-corner[0], -corner[1], -corner[2]))
            importance = None if weights is None else self._importance(weights, inside)
            prepared += self._encoder.prepare([voxels[inside.slices]], [origin], [importance])
            if self._steering is not None:
                # One by one: what steers a chunk takes more room than its voxels.
                steered = self._steered(self._steering, prepared.pop(), voxels, inside)
                drafts += self._encoder.drafts_at([steered], quality)
        return drafts + self._encoder.drafts_at(prepared, quality)

    def _steered(
        self, steering: Steering, prepared: Prepared, voxels: npt.NDArray[np.generic], box: Box
    ) -> Prepared:
        """A chunk, weighed and steered by what a tracer sees of it in its shard."""
        if not prepared.neural:
            return prepared
        mean, quality = self._settings.importance_mean, self._settings.quality
        view = steering.view(voxels, box)
        weighed = replace(prepared, importance=ChunkImportance.of_latents(view.weights, mean))
        return steering.steered(weighed, view, quality, mean)

    def _importance(self, weights: Importance, box: Box) -> ChunkImportance:
        settings, cell = self._settings, self._cell
        first = [start // n for start, n in zip(box.start, cell, strict=True)]
        last = [-(-stop // n) for stop, n in zip(box.stop, cell, strict=True)]
        own = weights[tuple(slice(a, b) for a, b in zip(first, last, strict=True))]
        return ChunkImportance.of(own, settings.importance_mean, settings.grid.chunk, cell)

    def chunks(
        self, index: Shape3, voxels: npt.NDArray[np.generic], weights: Importance | None = None
    ) -> list[Draft | Packed | None]:
        """What a writer gets of shard `index`: drafts, or coded chunks."""
        drafts = self.drafts(index, voxels, weights)
        return [self._encoder.pack(draft) for draft in drafts] if self._packs else [*drafts]


class ShardWriter:
    """Second half: drafts to entropy-coded chunks, where they are not yet, one object, and its commit."""

    def __init__(self, job: WriteJob) -> None:
        weights = Weights.from_bytes(job.decoder)
        self._settings = job.settings
        self._objects = open_objects(job.url, job.endpoint_url)
        self._stream = weights.stream
        self._digest = weights.stream_digest

    def write(self, index: Shape3, chunks: Sequence[Draft | Packed | None]) -> tuple[ShardStatistics, bool]:
        """Code and commit one shard: statistics of what is stored, and whether this writer was the first."""
        packed = [
            chunk if isinstance(chunk, Packed) else pack(chunk, self._stream, self._digest)
            for chunk in chunks
        ]
        grid = self._settings.grid
        data, statistics = assemble(grid, index, np.dtype(self._settings.dtype).itemsize, packed)
        if commit(self._objects, grid, data, statistics):
            return statistics, True
        return committed(self._objects, index) or statistics, False
