"""Compress a volume into an archive: read tasks, encode actors, write actors, on Ray or serially.

The serial path runs the same two halves in one process. It is the oracle: it gives the same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import ray.data
from pydantic import Field

from ucray.cluster.ingest import BoxSource, Row, one_row, one_row_batch, voxels_of
from ucray.cluster.plan import CompressPlan
from ucray.cluster.rate import measure_volume
from ucray.cluster.session import failure, ray_session, resources
from ucray.cluster.telemetry import Event, Listener, Telemetry
from ucray.cluster.worker import EncodeJob, ShardEncoder, ShardWriter, WriteJob
from ucray.codec.weights import Weights
from ucray.errors import DestinationError, JobError, UcrayError
from ucray.grid import Shape3, triple
from ucray.quality import ErrorSum
from ucray.settings import Settings, TrainingConfig
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
from ucray.storage.shard import ShardStatistics


class RunOptions(Settings):
    """How a job runs; nothing of it changes the archive's meaning."""

    encode_workers: Annotated[int, Field(ge=1)] = 1
    write_workers: Annotated[int, Field(ge=1)] = 1
    device: Annotated[str, Field(pattern="^(auto|cpu|cuda)$")] = "auto"
    serial: bool = False
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    failed_boxes: str = "ucray-failed-boxes.json"


@dataclass(frozen=True)
class Outcome:
    """What became of one shard: its statistics, or the error that stopped it."""

    index: Shape3
    statistics: ShardStatistics | None
    first: bool
    seconds: dict[str, float]
    error: str


@dataclass(frozen=True)
class JobReport:
    """A compress job that ended well.

    `bytes_out` are all bytes under the archive's prefix less `bytes_weights`, the weights in the
    metadata and beside them; `weights` says where they came from. `psnr` is over the shards of this run;
    None if it had none to do.
    """

    archive: str
    shards: int
    resumed: int
    bytes_in: int
    bytes_out: int
    bytes_weights: int
    psnr: float | None
    quality: int
    chunks: dict[str, int]
    seconds: float
    stage_seconds: dict[str, float]
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
    listener: Listener,
) -> JobReport:
    """Code and commit every shard that is not there yet.

    Raises
    ------
    JobError
        If any shard could not be done; the rest is, and the missing boxes are in a file.
    """
    started = time.perf_counter()
    settings = archive.settings
    present = archive.present()
    missing = [index for index in settings.grid.shard_indices() if index not in present]
    write = WriteJob(
        archive.objects.url,
        endpoint_url,
        settings,
        weights.decoder(bounded=settings.max_error is not None).to_bytes(),
    )
    telemetry = Telemetry()
    telemetry.planned(plan.shard_count, len(present))
    way = _serially if options.serial else _on_ray
    done: list[Outcome] = []
    bytes_in = bytes_out = 0
    with telemetry.served(options.metrics_port):
        total = sum(settings.grid.shard_box(index).voxels for index in missing)
        total *= np.dtype(settings.dtype).itemsize
        listener(Event("compress", 0, total))
        for outcome in way(plan, settings, weights, write, options, missing):
            done.append(outcome)
            if outcome.statistics is None:
                telemetry.failed()
                continue
            telemetry.committed(outcome.statistics, settings.data_range, outcome.seconds, first=outcome.first)
            bytes_in += outcome.statistics.bytes_in
            bytes_out += outcome.statistics.bytes_out
            listener(Event("compress", bytes_in, total, f"ratio {bytes_in / bytes_out:.1f}"))
    _refuse_failed(plan, done, missing, options.failed_boxes)
    return _report(archive, done, len(present), time.perf_counter() - started)


def archive_bytes(archive: Archive) -> tuple[int, int]:
    """All bytes under the archive's prefix: (without weights, of weights)."""
    sizes = archive.sizes()
    weights = sizes.get(WEIGHTS_KEY, 0) + archive.weights_size
    return sum(sizes.values()) - weights, weights


def _serially(
    plan: CompressPlan,
    settings: ArchiveSettings,
    weights: Weights,
    write: WriteJob,
    options: RunOptions,
    missing: Sequence[Shape3],
) -> Iterator[Outcome]:
    encode = _EncodeRow(EncodeJob(settings, weights.to_bytes(), options.device))
    writer = _WriteRow(write)
    for key, box in _boxes(plan, missing):
        started = time.perf_counter()
        row: Row = {"key": key, "shape": np.array(box.shape), "voxels": np.empty(0, np.uint8), "error": ""}
        try:
            voxels = np.ascontiguousarray(plan.volume.read(box))
            row["voxels"] = np.frombuffer(voxels.data.cast("B"), np.uint8)
        except UcrayError as error:
            row["error"] = str(error)
        row["read_seconds"] = time.perf_counter() - started
        yield _outcome(writer.row(encode.row(row)))


def _on_ray(
    plan: CompressPlan,
    settings: ArchiveSettings,
    weights: Weights,
    write: WriteJob,
    options: RunOptions,
    missing: Sequence[Shape3],
) -> Iterator[Outcome]:
    if not missing:
        return
    with ray_session():
        share = resources(options.encode_workers, use_gpu=options.device == "cuda")
        encode = EncodeJob(settings, weights.to_bytes(), options.device, share.threads)
        rows = (
            ray.data.read_datasource(BoxSource(plan.volume, list(_boxes(plan, missing))), num_cpus=0.25)
            .map_batches(
                _EncodeRow,
                fn_constructor_args=(encode,),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=options.encode_workers),
                num_cpus=share.per_worker["CPU"],
                num_gpus=share.per_worker.get("GPU"),
            )
            .map_batches(
                _WriteRow,
                fn_constructor_args=(write,),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=options.write_workers),
                num_cpus=0.25,
            )
        )
        try:
            for row in rows.iter_rows():
                yield _outcome(row)
        except Exception as error:
            raise failure(error, "the Ray job") from error


class _EncodeRow:
    """An encode actor: rows of voxels to rows of drafts."""

    def __init__(self, job: EncodeJob) -> None:
        self._dtype = job.settings.dtype
        self._encoder = ShardEncoder(job)

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        return one_row_batch(self.row(one_row(batch)))

    def row(self, row: Row) -> Row:
        started = time.perf_counter()
        drafts: list[Any] = []
        error = str(row["error"])
        if not error:
            try:
                drafts = self._encoder.drafts(_index(row["key"]), voxels_of(row, self._dtype))
            except UcrayError as failure:
                error = str(failure)
        return {
            "key": str(row["key"]),
            "drafts": _Drafts(drafts),
            "read_seconds": float(row["read_seconds"]),
            "encode_seconds": time.perf_counter() - started,
            "error": error,
        }


class _WriteRow:
    """A write actor: rows of drafts to rows of statistics, by way of a committed shard."""

    def __init__(self, job: WriteJob) -> None:
        self._writer = ShardWriter(job)

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        return one_row_batch(self.row(one_row(batch)))

    def row(self, row: Row) -> Row:
        started = time.perf_counter()
        statistics, first, error = b"", False, str(row["error"])
        if not error:
            try:
                written, first = self._writer.write(_index(row["key"]), row["drafts"].drafts)
                statistics = written.to_bytes()
            except UcrayError as failure:
                error = str(failure)
        return {
            "key": str(row["key"]),
            "statistics": statistics,
            "first": first,
            "read_seconds": float(row["read_seconds"]),
            "encode_seconds": float(row["encode_seconds"]),
            "write_seconds": time.perf_counter() - started,
            "error": error,
        }


@dataclass(frozen=True)
class _Drafts:
    """Drafts of a shard as one value, so that Ray Data does not take their list for a column."""

    drafts: list[Any]


def _boxes(plan: CompressPlan, missing: Sequence[Shape3]) -> Iterator[tuple[str, Any]]:
    for index in missing:
        yield ".".join(map(str, index)), plan.source_box(plan.grid.shard_box(index))


def _index(key: Any) -> Shape3:
    return triple(int(part) for part in str(key).split("."))


def _outcome(row: Row) -> Outcome:
    statistics = bytes(row["statistics"])
    return Outcome(
        index=_index(row["key"]),
        statistics=ShardStatistics.from_bytes(statistics) if statistics else None,
        first=bool(row["first"]),
        seconds={stage: float(row[f"{stage}_seconds"]) for stage in ("read", "encode", "write")},
        error=str(row["error"]),
    )


def _refuse_failed(plan: CompressPlan, done: Sequence[Outcome], missing: Sequence[Shape3], path: str) -> None:
    """Failed is never done: list what is missing in a file and say so."""
    committed = {outcome.index for outcome in done if outcome.statistics is not None}
    failed = [index for index in missing if index not in committed]
    if not failed:
        return
    errors = {outcome.index: outcome.error for outcome in done if outcome.error}
    listed = [
        {
            "shard": list(index),
            "box": str(plan.source_box(plan.grid.shard_box(index))),
            "error": errors.get(index, "not reached"),
        }
        for index in failed
    ]
    Path(path).write_text(json.dumps(listed, indent=1) + "\n")
    raise JobError(
        f"{len(failed)} of {plan.shard_count} shards failed, listed in {path}; the first: "
        f"{listed[0]['error']}; the same command does what is missing"
    )


def _report(archive: Archive, done: Sequence[Outcome], resumed: int, seconds: float) -> JobReport:
    error = ErrorSum()
    kinds: dict[str, int] = {}
    stages: dict[str, float] = {}
    for outcome in done:
        assert outcome.statistics is not None
        error += outcome.statistics.error
        for chunk in outcome.statistics.chunks:
            kinds[chunk.kind] = kinds.get(chunk.kind, 0) + 1
        for stage, took in outcome.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + took
    stored, weights = archive_bytes(archive)
    settings = archive.settings
    return JobReport(
        archive=archive.objects.url,
        shards=len(list(settings.grid.shard_indices())),
        resumed=resumed,
        bytes_in=settings.bytes_in,
        bytes_out=stored,
        bytes_weights=weights,
        psnr=error.psnr(settings.data_range) if done else None,
        quality=settings.quality,
        chunks=kinds,
        seconds=seconds,
        stage_seconds=stages,
    )
