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
    check_same,
    create_archive,
    find_archive,
)
from ucray.storage.objects import Objects
from ucray.storage.shard import present_shards, shard_key, statistics_key

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
        settings = archive.settings
    else:
        check_empty(objects)
        measured = measure_volume(plan, weights, device, listener)
        settings = ArchiveSettings(
            fingerprint=fingerprint,
            source=volume.url,
            source_array=volume.path,
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
        )
    # Also where the archive was found: a run that died in between left the array's metadata unwritten.
    name = volume.url.rstrip("/").rsplit("/", 1)[-1].removesuffix(".zarr")
    return create_archive(objects, settings, weights, volume.space.within(plan.region.start), name)


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
    done: list[Outcome] = []
    bytes_in = bytes_out = 0
    total = sum(settings.grid.shard_box(index).voxels for index in missing)
    total *= np.dtype(settings.dtype).itemsize
    listener(Event("compress", 0, total))
    for outcome in way(plan, settings, weights, write, options, missing):
        done.append(outcome)
        if outcome.statistics is None:
            telemetry.failed()
            LOGGER.warning(
                "shard %s failed: %s", shard_key(outcome.index), outcome.error, extra=_figures(outcome)
            )
            continue
        telemetry.stored(outcome.statistics, settings.data_range, outcome.seconds, outcome.place)
        LOGGER.debug("shard %s %s", shard_key(outcome.index), outcome.place, extra=_figures(outcome))
        bytes_in += outcome.statistics.bytes_in
        bytes_out += outcome.statistics.bytes_out
        listener(Event("compress", bytes_in, total, f"ratio {bytes_in / bytes_out:.1f}"))
    _refuse_failed(plan, done, missing, options.failed_boxes)
    return _report(archive, sizes, done, present, absent, time.perf_counter() - started)


def _figures(outcome: Outcome) -> dict[str, Any]:
    """What a shard's log line says beside its text."""
    figures: dict[str, Any] = {"shard": list(outcome.index), "seconds": outcome.seconds}
    if outcome.statistics is not None:
        figures |= {"bytes_in": outcome.statistics.bytes_in, "bytes_out": outcome.statistics.bytes_out}
    return figures


def archive_bytes(archive: Archive, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Bytes of an archive's objects of these sizes: (without weights, of weights)."""
    weights = sizes.get(WEIGHTS_KEY, 0) + archive.weights_size
    return sum(sizes.values()) - weights, weights


def _refuse_failed(plan: CompressPlan, done: Sequence[Outcome], missing: Sequence[Shape3], path: str) -> None:
    """Failed is never done: list what is missing in a file and say so."""
    stored = {outcome.index for outcome in done if outcome.statistics is not None}
    told = {outcome.index: outcome.error for outcome in done if outcome.error}
    errors = {index: told.get(index, "not reached") for index in missing if index not in stored}
    if errors:
        write_boxes(plan, errors, path)
        raise JobError(
            f"{len(errors)} of {plan.shard_count} shards failed, listed in {path}; the first: "
            f"{next(iter(errors.values()))}; the same command does what is missing"
        )


def _report(
    archive: Archive,
    sizes: Mapping[str, int],
    done: Sequence[Outcome],
    present: Collection[Shape3],
    absent: Sequence[Shape3],
    seconds: float,
) -> JobReport:
    error = ErrorSum()
    sizes = dict(sizes)
    kinds: dict[str, int] = {}
    stages: dict[str, float] = {}
    peaks = {"driver": peak_memory()}
    for outcome in done:
        assert outcome.statistics is not None
        statistics = outcome.statistics
        # The listing is not repeated: what this run added to it is known.
        sizes[shard_key(statistics.index)] = statistics.bytes_out
        sizes[statistics_key(statistics.index, statistics.crc32c)] = len(statistics.to_bytes())
        error += statistics.error
        for chunk in statistics.chunks:
            kinds[chunk.kind] = kinds.get(chunk.kind, 0) + 1
        for stage, took in outcome.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + took
        for stage, peak in outcome.memory.items():
            peaks[stage] = max(peak, peaks.get(stage, 0))
    stored, weights = archive_bytes(archive, sizes)
    settings = archive.settings
    stand = {outcome.index for outcome in done}
    left = [index for index in absent if index not in stand]
    voxels_left = sum(settings.grid.shard_box(index).voxels for index in left)
    return JobReport(
        archive=archive.objects.url,
        shards=len(present) + len(absent),
        resumed=len(present),
        left=len(left),
        bytes_in=settings.bytes_in - voxels_left * np.dtype(settings.dtype).itemsize,
        bytes_out=stored,
        bytes_weights=weights,
        psnr=error.psnr(settings.data_range) if done else None,
        quality=settings.quality,
        chunks=kinds,
        seconds=seconds,
        stage_seconds=stages,
        peak_memory=peaks,
    )
