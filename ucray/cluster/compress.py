"""Compress a volume into an archive: what is missing of it, and what became of that."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ucray.cluster.boxes import write_boxes
from ucray.cluster.memory import peak_memory
from ucray.cluster.pipeline import Outcome, RunOptions, on_ray, serially
from ucray.cluster.plan import CompressPlan
from ucray.cluster.provenance import provenance
from ucray.cluster.rate import measure_volume
from ucray.cluster.telemetry import Event, Listener, Telemetry
from ucray.cluster.worker import WriteJob
from ucray.codec.weights import Weights
from ucray.errors import DestinationError, JobError
from ucray.grid import Shape3
from ucray.quality import ErrorSum
from ucray.settings import TrainingConfig
from ucray.storage.archive import (
    GROUP_KEY,
    WEIGHTS_KEY,
    Archive,
    ArchiveSettings,
    archive_bytes,
    check_same,
    create_archive,
    find_archive,
)
from ucray.storage.index import shard_key
from ucray.storage.objects import Objects
from ucray.storage.shard import ShardStatistics, present_shards, statistics_key

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobReport:
    """A compress job that did what it was asked to.

    `bytes_in` are the voxels of the shards that stand there. `bytes_out` are all bytes under the archive's
    prefix, as listed when the run began and added to by it, less `bytes_weights`, the weights in the
    metadata and beside them; `weights` says where they came from. `psnr` is over the shards of this run;
    None if it had none to do. `peak_memory` is the largest of any process of a stage, and the driver's, in
    bytes. `left` are shards that are missing still, because the job was given others to do.
    """

    archive: str
    shards: int
    resumed: int
    left: int
    bytes_in: int
    bytes_out: int
    bytes_weights: int
    psnr: float | None
    quality: int
    chunks: dict[str, int]
    seconds: float
    stage_seconds: dict[str, float]
    peak_memory: dict[str, int]
    weights: str = ""

    @property
    def ratio(self) -> float:
        """Source bytes over all bytes of the archive but its weights."""
        return self.bytes_in / self.bytes_out


def prepare(
    plan: CompressPlan,
    objects: Objects,
    weights: Weights,
    training: TrainingConfig | None,
    device: str,
    listener: Listener,
) -> Archive:
    """The archive of a planned job: found, or created after measuring the volume.

    Raises
    ------
    DestinationError
        If the place holds anything else.
    """
    fingerprint = plan.with_weights(weights.digest, training)
    volume = plan.volume
    archive = find_archive(objects)
    if archive is not None:
        check_same(archive, fingerprint)
        settings, told = archive.settings, None
    else:
        check_empty(objects)
        measured = measure_volume(plan, weights, device, listener)
        settings = ArchiveSettings(
            fingerprint=fingerprint,
            source=volume.url,
            source_array=volume.path,
            source_select=",".join(f"{axis}={place}" for axis, place in volume.select),
            region=str(plan.region),
            shape=plan.grid.shape,
            dtype=volume.dtype,
            fill_value=volume.fill_value if np.isfinite(volume.fill_value) else str(volume.fill_value),
            chunk=plan.grid.chunk,
            shard=plan.grid.shard,
            target=plan.target.describe(),
            max_error=plan.target.max_error,
            quality=measured.quality,
            offset=measured.offset,
            scale=measured.scale,
            data_range=measured.data_range,
            weights_digest=weights.digest,
            importance=plan.weighed_by,
            importance_mean=measured.importance_mean,
            levels=plan.levels,
        )
        told = provenance(plan, measured)
    # Also where the archive was found: a run that died in between left the array's metadata unwritten.
    name = volume.url.rstrip("/").rsplit("/", 1)[-1].removesuffix(".zarr")
    space = volume.space.within(plan.region.start)
    return create_archive(objects, settings, weights, space, name, told)


def check_empty(objects: Objects) -> None:
    """Refuse a place that holds data of somebody else; weights of an earlier attempt may stand."""
    others = sorted(key for key in objects.sizes("") if key not in (GROUP_KEY, WEIGHTS_KEY))
    if others:
        raise DestinationError(
            f"{objects.url} is not empty (it holds {others[0]}, {len(others)} objects in all); "
            "give a destination of its own"
        )


def run(
    plan: CompressPlan,
    archive: Archive,
    weights: Weights,
    options: RunOptions,
    endpoint_url: str | None,
    telemetry: Telemetry,
    listener: Listener,
    *,
    chosen: Collection[Shape3] | None = None,
) -> JobReport:
    """Code and commit every shard that is not there yet, or those of them that are `chosen`.

    Raises
    ------
    JobError
        If any shard could not be done; the rest is, and the missing boxes are in a file.
    """
    started = time.perf_counter()
    settings = archive.settings
    sizes = archive.sizes()
    present = present_shards(sizes, settings.grid)
    absent = [index for index in settings.grid.shard_indices() if index not in present]
    missing = absent if chosen is None else [index for index in absent if index in chosen]
    write = WriteJob(
        archive.objects.url,
        endpoint_url,
        settings,
        weights.decoder(bounded=settings.max_error is not None).to_bytes(),
    )
    telemetry.planned(len(present) + len(missing), len(present))
    way = serially if options.serial else on_ray
    tally = Tally(sizes)
    left = set(missing)
    errors: dict[Shape3, str] = {}
    total = sum(settings.grid.shard_box(index).voxels for index in missing)
    total *= np.dtype(settings.dtype).itemsize
    listener(Event("compress", 0, total))
    try:
        for outcome in way(plan, settings, weights, write, options, missing):
            key = shard_key(outcome.index)
            if outcome.statistics is None:
                errors[outcome.index] = outcome.error
                telemetry.failed()
                LOGGER.warning("shard %s failed: %s", key, outcome.error, extra=_figures(outcome))
                continue
            left.discard(outcome.index)
            tally.add(outcome, outcome.statistics)
            telemetry.stored(outcome.statistics, settings.data_range, outcome.seconds, outcome.place)
            LOGGER.debug("shard %s %s", key, outcome.place, extra=_figures(outcome))
            listener(
                Event("compress", tally.bytes_in, total, f"ratio {tally.bytes_in / tally.bytes_out:.1f}")
            )
    except JobError as error:
        if not errors:
            raise
        listed = write_boxes(plan, errors, options.failed_boxes)
        raise JobError(f"{error}; {len(errors)} shards had failed before, {listed}") from error
    if left:
        # Failed is never done: what is missing is listed in a file, and said.
        missed = {index: errors.get(index, "not reached") for index in missing if index in left}
        listed = write_boxes(plan, missed, options.failed_boxes)
        raise JobError(
            f"{len(missed)} of {plan.shard_count} shards failed, {listed}; "
            f"the first: {next(iter(missed.values()))}; the same command does what is missing"
        )
    # What other shards there are to do was not asked for.
    others = [] if chosen is None else [index for index in absent if index not in chosen]
    return _report(archive, tally, len(present) + len(absent), len(present), others, started)


class Tally:
    """What a job has stored, in sums: their size does not grow with the job.

    `bytes_in` and `bytes_out` are of the shards that were added, `new_bytes` of all objects they brought that
    were not there when the archive was listed.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.shards = self.bytes_in = self.bytes_out = self.new_bytes = 0
        self.error = ErrorSum()
        self.kinds: dict[str, int] = {}
        self.stages: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    def add(self, outcome: Outcome, statistics: ShardStatistics) -> None:
        """Count one stored shard."""
        self.shards += 1
        self.bytes_in += statistics.bytes_in
        self.bytes_out += statistics.bytes_out
        self.new_bytes += statistics.bytes_out
        # An attempt that died may have left statistics without their shard.
        if statistics_key(statistics.index, statistics.crc32c) not in self.sizes:
            self.new_bytes += len(statistics.to_bytes())
        self.error += statistics.error
        for chunk in statistics.chunks:
            self.kinds[chunk.kind] = self.kinds.get(chunk.kind, 0) + 1
        for stage, took in outcome.seconds.items():
            self.stages[stage] = self.stages.get(stage, 0.0) + took
        for stage, peak in outcome.memory.items():
            self.peaks[stage] = max(peak, self.peaks.get(stage, 0))


def _figures(outcome: Outcome) -> dict[str, Any]:
    """What a shard's log line says beside its text."""
    figures: dict[str, Any] = {"shard": list(outcome.index), "seconds": outcome.seconds}
    if outcome.statistics is not None:
        figures |= {"bytes_in": outcome.statistics.bytes_in, "bytes_out": outcome.statistics.bytes_out}
    return figures


def _report(
    archive: Archive, tally: Tally, shards: int, resumed: int, left: Sequence[Shape3], started: float
) -> JobReport:
    stored, weights = archive_bytes(archive, tally.sizes)
    settings = archive.settings
    voxels_left = sum(settings.grid.shard_box(index).voxels for index in left)
    return JobReport(
        archive=archive.objects.url,
        shards=shards,
        resumed=resumed,
        left=len(left),
        bytes_in=settings.bytes_in - voxels_left * np.dtype(settings.dtype).itemsize,
        bytes_out=stored + tally.new_bytes,
        bytes_weights=weights,
        psnr=tally.error.psnr(settings.data_range) if tally.shards else None,
        quality=settings.quality,
        chunks=tally.kinds,
        seconds=time.perf_counter() - started,
        stage_seconds=tally.stages,
        peak_memory=tally.peaks | {"driver": peak_memory()},
    )
