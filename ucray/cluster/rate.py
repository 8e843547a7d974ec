"""Measure a volume before it is compressed: normalisation, range, and the quality for its target."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ucray.cluster.plan import CompressPlan, sample_chunk_boxes
from ucray.cluster.telemetry import Event, Listener
from ucray.cluster.weighing import Look, Weighing
from ucray.codec.chunk import ChunkFormat, normalisation
from ucray.codec.decoder import device_for
from ucray.codec.encoder import ChunkEncoder, Prepared
from ucray.codec.fill import fill_mask
from ucray.codec.rate import CHUNK_OVERHEAD, coarsest_reaching, finest_within
from ucray.codec.weights import Weights
from ucray.errors import SettingsError
from ucray.grid import triple
from ucray.quality import ErrorSum

SAMPLED_CHUNKS = 64
"""Chunks on which quality is searched; a volume of no more is measured whole."""

SHARD_OVERHEAD = 4 + 130
"""Bytes a shard costs beside its chunks: the index's checksum, and the head of its statistics."""

BOUNDED_QUALITIES = (64, 112, 160, 208, 255)
"""Qualities of the coarse form that are tried where a bound, not a rate, is asked for."""

RATIO_TOLERANCE = 1.03
"""By how much an archive may be larger than the ratio asked for before that is called out of reach."""

LARGE_MASKS = 0.25
"""Share of an archive's bytes from which the masks of fill voxels are worth a word."""

ARCHIVE_OVERHEAD = 2000
"""Bytes of the metadata of group and array but for the weights and twice the source's name."""

LEVEL_OVERHEAD = 600
"""Bytes of the metadata of a coarser level."""


@dataclass(frozen=True)
class Measured:
    """Normalisation (offset, scale), peak value for PSNR, the quality to code at, and what it gives.

    `bytes_out` are those of the whole archive without weights, projected from the sample; `psnr` is that of
    the sample. `importance_mean` is the mean weight of the sample's cells.
    """

    offset: float
    scale: float
    data_range: float
    quality: int
    bytes_out: float
    psnr: float
    importance_mean: float = 1.0


def measure_volume(plan: CompressPlan, weights: Weights, device: str, listener: Listener) -> Measured:
    """Read a sample of chunks and search the quality that meets the plan's target on it.

    Raises
    ------
    SettingsError
        If even the coarsest quality is larger than the ratio asked for.
    """
    boxes = sample_chunk_boxes(plan.grid, SAMPLED_CHUNKS)
    steps = itertools.count(1)
    # Chunks are read and prepared; by a map they are weighed too, by a tracer also steered.
    total = (2 + bool(plan.weighed_by) + (plan.tracer is not None)) * len(boxes)
    samples = []
    for box in boxes:
        samples.append(plan.volume.read(plan.source_box(box)))
        listener(Event("measure", next(steps), total))
    volume, target = plan.volume, plan.target
    offset, scale = normalisation(samples, volume.fill_value)
    peak = data_range(samples, volume.dtype, volume.fill_value)
    chunk = ChunkFormat(plan.grid.chunk, volume.dtype, volume.fill_value, offset, scale)
    encoder = ChunkEncoder(weights, chunk, device=device_for(device), max_error=target.max_error)
    weighing = Weighing.of(plan, encoder)
    prepared: list[Prepared] = []
    for box, sample in zip(boxes, samples, strict=True):
        # A chunk says its place, and those bytes count too.
        place = triple(start // size for start, size in zip(box.start, plan.grid.chunk, strict=True))
        prepared += encoder.prepare([sample], [place])
        listener(Event("measure", next(steps), total))
    looks: list[Look | None] = []
    mean = 1.0
    if weighing is not None:
        for one, box in zip(prepared, boxes, strict=True):
            looks.append(weighing.look(one, box, weighing.near(box)))
            listener(Event("measure", next(steps), total))
        mean = weighing.mean(looks)
        prepared = [weighing.weighed(one, look, mean) for one, look in zip(prepared, looks, strict=True)]
    share = plan.region.voxels / sum(box.voxels for box in boxes)

    overhead = plan.chunk_count * CHUNK_OVERHEAD + plan.shard_count * SHARD_OVERHEAD
    overhead += ARCHIVE_OVERHEAD + 2 * len(volume.url) + len(plan.levels) * LEVEL_OVERHEAD

    growth, gain = 1.0, 0.0

    def archive_bytes(quality: int) -> float:
        """Projected bytes of the whole archive, without weights."""
        return encoder.size_at(prepared, quality) * growth * share + overhead

    def sample_psnr(sample: Sequence[Prepared], quality: int) -> float:
        error = ErrorSum()
        for one in sample:
            (draft,) = encoder.drafts_at([one], quality)
            error += ErrorSum(one.voxels.size) if draft is None else encoder.pack(draft).error
        return error.psnr(peak)

    def psnr(quality: int) -> float:
        return sample_psnr(prepared, quality) + gain

    def bounded_bytes(quality: int) -> int:
        return sum(len(encoder.pack(draft).data) for draft in encoder.drafts_at(prepared, quality))

    if target.max_error is not None:
        sizes = {quality: bounded_bytes(quality) for quality in BOUNDED_QUALITIES}
        quality = min(sizes, key=sizes.__getitem__)
        bytes_out = sizes[quality] * share + overhead
        return Measured(offset, scale, peak, quality, bytes_out, psnr(quality), mean)

    def quality_for_target() -> int:
        if target.psnr is not None:
            return coarsest_reaching(psnr, target.psnr)
        return finest_within(archive_bytes, wanted)

    wanted = plan.bytes_in / target.ratio
    quality = quality_for_target()
    if weighing is not None and plan.tracer is not None:
        # How much steering changes bytes and error hardly depends on the quality; how it moves latents does.
        steered = []
        for one, look in zip(prepared, looks, strict=True):
            steered.append(weighing.steered(one, look, quality, mean))
            listener(Event("measure", next(steps), total))
        before = psnr(quality)
        gain = sample_psnr(steered, quality) - before if math.isfinite(before) else 0.0
        growth = encoder.size_at(steered, quality) / max(encoder.size_at(prepared, quality), 1)
        quality = quality_for_target()
    too_coarse = target.psnr is None and target.asked and quality == 0
    if too_coarse and (least := archive_bytes(0)) > RATIO_TOLERANCE * wanted:
        masks = sum(len(one.draft.mask) for one in prepared if one.draft is not None) * share
        hint = ""
        if masks > LARGE_MASKS * least:
            hint = f"; exact fill takes {masks / least:.0%} of that: --no-exact-fill does without"
        raise SettingsError(
            f"a ratio of {target.ratio:g} is out of reach: the coarsest quality gives "
            f"{plan.bytes_in / least:.1f}{hint}"
        )
    return Measured(offset, scale, peak, quality, archive_bytes(quality), psnr(quality), mean)


def data_range(samples: list[npt.NDArray[np.generic]], dtype: str, fill_value: float) -> float:
    """Peak value for PSNR: 255 for uint8, else the span of tissue values in the samples."""
    if dtype == "uint8":
        return 255.0
    spans = [s[~fill_mask(s, fill_value)].astype(np.float64) for s in samples]
    kept = np.concatenate([span[np.isfinite(span)] for span in spans])
    return float(kept.max() - kept.min()) if kept.size and kept.max() > kept.min() else 1.0
