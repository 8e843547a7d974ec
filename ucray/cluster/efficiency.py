"""How much of the cores' encoding speed a compress job keeps: the job on Ray against the bare loop."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass

from ucray.bench.ours import PROCESSES, VolumeCodec
from ucray.bench.report import report_folder
from ucray.cluster import jobs
from ucray.cluster.benchmark import read_region
from ucray.cluster.connection import Connection
from ucray.cluster.pipeline import RunOptions
from ucray.cluster.plan import CompressOptions
from ucray.cluster.telemetry import Event
from ucray.cluster.weights_store import load_weights
from ucray.config import default_chunk
from ucray.errors import SettingsError
from ucray.grid import triple

PIPELINE_FILE = "pipeline.md"
CHUNKS = 4
"""Chunks along each axis of a shard."""

STARTED = 4
"""Every worker is at work, and time is taken, from shard 1 / STARTED of the job on."""


@dataclass(frozen=True)
class Efficiency:
    """Speeds in MB/s of source voxels on the same cores, one after the other.

    `bare` codes chunks that lie in memory, in one process a core. `job` reads, codes and writes, with as
    many encode workers; `whole` is the same job with the start of Ray and its workers, `steady` without.
    """

    quality: int
    bare: float
    steady: float
    whole: float

    @property
    def efficiency(self) -> float:
        """Steady speed of the job over that of the bare loop."""
        return self.steady / self.bare

    def to_markdown(self) -> str:
        """The figures as a table."""
        return (
            f"Quality {self.quality}, {PROCESSES} encode workers or processes.\n"
            f"The first 1/{STARTED} of the job is not timed.\n\n"
            "| | MB/s |\n|---|---|\n"
            f"| bare loop | {self.bare:.4g} |\n"
            f"| job | {self.steady:.4g} |\n"
            f"| job, start included | {self.whole:.4g} |\n\n"
            f"Efficiency {self.efficiency:.1%}.\n"
        )


def measure_pipeline(
    source: str,
    folder: str,
    weights: str | None,
    *,
    roi: str | None = None,
    connection: Connection = Connection(),
) -> Efficiency:
    """Compress a region at the default ratio by a job and by the bare loop; leaves a table in a folder.

    `weights` are named as for the job.

    Raises
    ------
    SettingsError
        If there are no weights, or the region has one shard alone.
    """
    if weights is None:
        raise SettingsError("--pipeline compares at one quality of one codec; give --weights")
    volume = connection.open(source)
    region, voxels = read_region(volume, roi)
    loaded = load_weights(weights, connection.endpoint_url)
    chunk = default_chunk(loaded.config)
    shard = triple(CHUNKS * n for n in chunk)
    shards = math.prod(-(-extent // n) for extent, n in zip(region.shape, shard, strict=True))
    if shards < max(2, PROCESSES):
        raise SettingsError(f"{region} is {shards} shards; a speed takes several, and one a core at least")
    marks: list[tuple[float, float]] = []

    def note(event: Event) -> None:
        if event.stage == "compress" and event.done:
            marks.append((time.perf_counter(), event.done))

    place = report_folder(folder)
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        report = jobs.compress(
            source,
            f"{scratch}/pipeline.zarr",
            CompressOptions(roi=str(region), chunk=chunk, shard=shard),
            weights=weights,
            run_options=RunOptions(encode_workers=PROCESSES),
            connection=connection,
            listener=note,
        )
    (first, before), (last, after) = marks[len(marks) // STARTED], marks[-1]
    with VolumeCodec(voxels, loaded, chunk, volume.fill_value) as codec:
        started = time.perf_counter()
        codec.encode(report.quality)
        bare = voxels.nbytes / (time.perf_counter() - started) / 1e6
    found = Efficiency(
        quality=report.quality,
        bare=bare,
        steady=(after - before) / (last - first) / 1e6,
        whole=report.bytes_in / report.seconds / 1e6,
    )
    (place / PIPELINE_FILE).write_text(found.to_markdown())
    return found
