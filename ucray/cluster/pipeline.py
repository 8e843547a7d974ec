"""Shards through read, encode and write: on Ray, or one after another in this process.

The serial way runs the same halves in one process. It is the oracle: it gives the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import ray.data
from pydantic import Field

from ucray.cluster.ingest import (
    BoxSource,
    Row,
    ShardBoxes,
    one_row,
    one_row_batch,
    read_row,
    voxels_of,
    weights_of,
)
from ucray.cluster.memory import peak_memory
from ucray.cluster.plan import CompressPlan
from ucray.cluster.session import coders, failure, ray_session
from ucray.cluster.telemetry import LINGER
from ucray.cluster.worker import EncodeJob, ShardEncoder, ShardWriter, WriteJob
from ucray.codec.weights import Weights
from ucray.errors import UcrayError
from ucray.grid import Shape3, triple
from ucray.settings import Settings
from ucray.storage.archive import ArchiveSettings
from ucray.storage.objects import open_objects
from ucray.storage.shard import ShardStatistics, committed

STAGES = ("read", "encode", "write")

READS = {"CPU": 2, "GPU": 8}
"""Read tasks at once for each encode worker, by what it computes on: enough that it never waits.

More would only start processes, whose imports take longer on a small machine than all their reading.
"""


class RunOptions(Settings):
    """How a job runs; nothing of it changes the archive's meaning.

    Of encode workers None is one for each core, or GPU, of the nodes there are, as far as memory goes.
    `worker_cpus` are the cores that one asks for; see `coders` for None. Weights that come first are trained
    by one worker, or by as many as encode with a GPU each. Shards that failed are listed in the file
    `failed_boxes`; a job that is given such a file as `boxes` does just what it lists. With a `metrics_port`
    a job that has ended waits up to `metrics_linger` seconds for a last scrape.
    """

    encode_workers: Annotated[int, Field(ge=1)] | None = None
    worker_cpus: Annotated[float, Field(gt=0.0)] | None = None
    write_workers: Annotated[int, Field(ge=1)] = 1
    device: Annotated[str, Field(pattern="^(auto|cpu|cuda)$")] = "auto"
    serial: bool = False
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    metrics_linger: Annotated[float, Field(ge=0.0, le=3600.0)] = LINGER
    failed_boxes: str = "ucray-failed-boxes.json"
    boxes: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one shard: the statistics of what is stored, or the error that stopped it.

    `seconds` and `memory` (peak bytes of the process) are those of each stage. `place` says who committed
    it: "committed" by this attempt, "raced" where another was faster, "found" where it stood there before
    it was coded.
    """

    index: Shape3
    statistics: ShardStatistics | None
    place: str
    seconds: dict[str, float]
    memory: dict[str, int]
    error: str


def serially(
    plan: CompressPlan,
    settings: ArchiveSettings,
    weights: Weights,
    write: WriteJob,
    options: RunOptions,
    missing: Sequence[Shape3],
) -> Iterator[Outcome]:
    """Shards one after another in this process."""
    encode = _EncodeRow(_encode_job(plan, settings, weights, options.device), write)
    writer = _WriteRow(write)
    for key, box in ShardBoxes(plan, missing):
        yield _outcome(writer.row(encode.row(read_row(plan.volume, key, box, plan.importance))))


def on_ray(
    plan: CompressPlan,
    settings: ArchiveSettings,
    weights: Weights,
    write: WriteJob,
    options: RunOptions,
    missing: Sequence[Shape3],
) -> Iterator[Outcome]:
    """Shards through read tasks, encode actors and write actors, as they get done."""
    if not missing:
        return
    with ray_session():
        workers = coders(
            options.encode_workers,
            len(missing),
            plan.peak_memory,
            use_gpu=options.device == "cuda",
            cpus=options.worker_cpus,
        )
        reads = workers.count * READS["GPU" if options.device == "cuda" else "CPU"]
        # Ray shares GPUs out among those that ask for one; all others would compute on the first.
        device = "cuda" if options.device == "cuda" else "cpu"
        encode = _encode_job(plan, settings, weights, device)
        rows = (
            ray.data.read_datasource(
                BoxSource(plan.volume, ShardBoxes(plan, missing), plan.importance),
                num_cpus=0.25,
                concurrency=min(reads, len(missing)),
            )
            .map_batches(
                _EncodeRow,
                fn_constructor_args=(encode, write),
                batch_size=1,
                # All are asked for at once; the first that stands begins.
                compute=ray.data.ActorPoolStrategy(
                    min_size=1, max_size=workers.count, initial_size=workers.count
                ),
                num_cpus=workers.per_worker["CPU"],
                num_gpus=workers.per_worker.get("GPU"),
                memory=workers.per_worker["memory"],
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


def _encode_job(plan: CompressPlan, settings: ArchiveSettings, weights: Weights, device: str) -> EncodeJob:
    tracer = None if plan.tracer is None else plan.tracer.read()
    return EncodeJob(settings, weights.to_bytes(), device, tracer)


class _EncodeRow:
    """An encode actor: rows of voxels to rows of drafts, or of coded chunks.

    A shard that was committed since the job was planned, by another driver or before a node was lost, is
    not coded again.
    """

    def __init__(self, job: EncodeJob, write: WriteJob) -> None:
        self._dtype = job.settings.dtype
        self._encoder = ShardEncoder(job)
        self._objects = open_objects(write.url, write.endpoint_url)

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        return one_row_batch(self.row(one_row(batch)))

    def row(self, row: Row) -> Row:
        started = time.perf_counter()
        index = _index(row["key"])
        chunks: list[Any] = []
        found, error = b"", str(row["error"])
        try:
            if (stored := committed(self._objects, index)) is not None:
                found, error = stored.to_bytes(), ""
            elif not error:
                chunks = self._encoder.chunks(index, voxels_of(row, self._dtype), weights_of(row))
        except Exception as failure:
            error = _told(failure)
        return {
            "key": str(row["key"]),
            "chunks": _Chunks(chunks),
            "found": found,
            "read_seconds": float(row["read_seconds"]),
            "read_memory": int(row["read_memory"]),
            "encode_seconds": time.perf_counter() - started,
            "encode_memory": peak_memory(),
            "error": error,
        }


class _WriteRow:
    """A write actor: rows of what encode actors give to rows of statistics, by way of a committed shard."""

    def __init__(self, job: WriteJob) -> None:
        self._writer = ShardWriter(job)

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        return one_row_batch(self.row(one_row(batch)))

    def row(self, row: Row) -> Row:
        started = time.perf_counter()
        statistics, place, error = bytes(row["found"]), "found", str(row["error"])
        if not error and not statistics:
            try:
                written, first = self._writer.write(_index(row["key"]), row["chunks"].chunks)
                statistics, place = written.to_bytes(), "committed" if first else "raced"
            except Exception as failure:
                error = _told(failure)
        return {
            "key": str(row["key"]),
            "statistics": statistics,
            "place": place,
            "read_seconds": float(row["read_seconds"]),
            "read_memory": int(row["read_memory"]),
            "encode_seconds": float(row["encode_seconds"]),
            "encode_memory": int(row["encode_memory"]),
            "write_seconds": time.perf_counter() - started,
            "write_memory": peak_memory(),
            "error": error,
        }


def _told(failure: Exception) -> str:
    """What stopped a shard, in one line. Whatever it is, it is no reason to stop all others."""
    if isinstance(failure, UcrayError):
        return str(failure)
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"


@dataclass(frozen=True)
class _Chunks:
    """Chunks of a shard as one value, so that Ray Data does not take their list for a column."""

    chunks: list[Any]


def _index(key: Any) -> Shape3:
    return triple(int(part) for part in str(key).split("."))


def _outcome(row: Row) -> Outcome:
    statistics = bytes(row["statistics"])
    return Outcome(
        index=_index(row["key"]),
        statistics=ShardStatistics.from_bytes(statistics) if statistics else None,
        place=str(row["place"]),
        seconds={stage: float(row[f"{stage}_seconds"]) for stage in STAGES},
        memory={stage: int(row[f"{stage}_memory"]) for stage in STAGES},
        error=str(row["error"]),
    )
