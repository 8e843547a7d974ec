"""Measure a volume before it is compressed: normalisation, range, and the quality for a ratio."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ucray.cluster.plan import CompressPlan, sample_chunk_boxes
from ucray.cluster.telemetry import Event, Listener
from ucray.codec.chunk import ChunkFormat, normalisation
from ucray.codec.decoder import device_for
from ucray.codec.encoder import ChunkEncoder, Draft, Latents
from ucray.codec.fill import fill_mask
from ucray.codec.rate import finest_within
from ucray.codec.weights import Weights

SAMPLED_CHUNKS = 64
"""Chunks on which quality is searched; a volume of no more is measured whole."""

CHUNK_OVERHEAD = 16 + 34
"""Bytes a chunk costs beside its payload: its entry in the shard's index, and its statistics."""

SHARD_OVERHEAD = 4 + 180
"""Bytes a shard costs beside its chunks: the index's checksum, and the head of its statistics."""

ARCHIVE_OVERHEAD = 1600
"""Bytes of the metadata of group and array but for the weights."""


@dataclass(frozen=True)
class Measured:
    """Normalisation (offset, scale), peak value for PSNR, and the quality to code at."""

    offset: float
    scale: float
    data_range: float
    quality: int


def measure_volume(plan: CompressPlan, weights: Weights, device: str, listener: Listener) -> Measured:
    """Read a sample of chunks and search the quality whose projected ratio meets the plan's."""
    boxes = sample_chunk_boxes(plan.grid, SAMPLED_CHUNKS)
    samples = []
    for number, box in enumerate(boxes):
        samples.append(plan.volume.read(plan.source_box(box)))
        listener(Event("measure", number + 1, 2 * len(boxes)))
    volume = plan.volume
    offset, scale = normalisation(samples, volume.fill_value)
    chunk = ChunkFormat(plan.grid.chunk, volume.dtype, volume.fill_value, offset, scale)
    encoder = ChunkEncoder(weights, chunk, device=device_for(device))
    drafts: list[Draft | None] = []
    latents: list[Latents] = []
    for number, sample in enumerate(samples):
        drafts += encoder.drafts([sample], 0)
        latents += encoder.latents([sample])
        listener(Event("measure", len(boxes) + number + 1, 2 * len(boxes)))
    voxels = sum(box.voxels for box in boxes)

    def projected(quality: int) -> float:
        """Bytes of the whole archive, without weights."""
        payload = sum(
            encoder.size_at(draft, known, quality) for draft, known in zip(drafts, latents, strict=True)
        )
        per_chunk = plan.chunk_count * CHUNK_OVERHEAD + plan.shard_count * SHARD_OVERHEAD
        return payload * plan.region.voxels / voxels + per_chunk + ARCHIVE_OVERHEAD

    quality = finest_within(projected, plan.bytes_in / plan.ratio)
    return Measured(offset, scale, data_range(samples, volume.dtype, volume.fill_value), quality)


def data_range(samples: list[npt.NDArray[np.generic]], dtype: str, fill_value: float) -> float:
    """Peak value for PSNR: 255 for uint8, else the span of tissue values in the samples."""
    if dtype == "uint8":
        return 255.0
    spans = [s[~fill_mask(s, fill_value)].astype(np.float64) for s in samples]
    kept = np.concatenate([span[np.isfinite(span)] for span in spans])
    return float(kept.max() - kept.min()) if kept.size and kept.max() > kept.min() else 1.0
