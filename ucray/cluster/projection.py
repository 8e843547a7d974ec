"""What a compress job would give, take and cost, projected from a pilot, beside what is simpler."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from ucray.cluster.compress import check_empty
from ucray.cluster.connection import Connection
from ucray.cluster.cost import PRICES_AS_OF, Prices, Way, break_even, cheapest, requests, way
from ucray.cluster.jobs import decide
from ucray.cluster.pilot import Pilot, run_pilot
from ucray.cluster.pipeline import RunOptions
from ucray.cluster.plan import (
    CompressOptions,
    CompressPlan,
    sample_chunk_boxes,
)
from ucray.cluster.rate import SAMPLED_CHUNKS
from ucray.cluster.telemetry import Listener, ignore
from ucray.cluster.weighing import seen_around
from ucray.settings import TrainingConfig
from ucray.storage.archive import check_same, find_archive
from ucray.storage.objects import open_objects
from ucray.storage.shard import present_shards

MONTHS = 12.0
"""Over how long ways to keep a volume are compared, unless it is said."""

OURS, BLOSC, JPEG_XL = "ucray", "blosc-zstd", "JPEG XL"


@dataclass(frozen=True)
class Projection:
    """A plan with what a pilot says of it; `pilot` is None where no weights are there to code with.

    `present` are shards that stand there already. A worker is taken to be as fast as this machine.
    """

    plan: CompressPlan
    pilot: Pilot | None
    present: int
    options: RunOptions
    prices: Prices
    months: float

    @property
    def share(self) -> float:
        """What is left to do, of one."""
        return 1.0 - self.present / self.plan.shard_count

    @property
    def hours(self) -> float:
        """Hours of encoding, workers side by side."""
        pilot = self._measured
        seconds = pilot.ucray.seconds * self.plan.bytes_in * self.share / pilot.voxel_bytes
        return seconds / 3600.0 / self.workers

    @property
    def workers(self) -> int:
        """Workers of the job: without a word of them as many as this machine has cores, or one GPU.

        No more of them work than there are shards left.
        """
        here = 1 if self.options.device == "cuda" else os.cpu_count() or 1
        left = max(1, self.plan.shard_count - self.present)
        return min(self.options.encode_workers or here, left)

    @property
    def bytes_out(self) -> float:
        """Bytes of the archive but for its weights."""
        return self._measured.measured.bytes_out

    def ways(self) -> dict[str, Way]:
        """Ways to keep the volume, by name: as blosc-zstd, which needs no job, as ucray, as JPEG XL."""
        pilot, prices = self._measured, self.prices
        puts, gets = self.requests
        hours = self.hours * self.workers
        rate = prices.gpu_hour if self.options.device == "cuda" else prices.core_hour
        found = [
            way(BLOSC, self._scaled(pilot.blosc.bytes), math.inf, prices),
            way(OURS, self.bytes_out, pilot.ucray.psnr, prices, compute=hours * rate, puts=puts, gets=gets),
        ]
        if (picture := pilot.jpeg_xl) is not None:
            hours = picture.seconds * self.plan.bytes_in * self.share / pilot.voxel_bytes / 3600.0
            compute = hours * prices.core_hour
            size = self._scaled(picture.bytes)
            found.append(way(JPEG_XL, size, picture.psnr, prices, compute=compute, puts=puts // 2, gets=gets))
        return {one.name: one for one in found}

    @property
    def requests(self) -> tuple[int, int]:
        """PUT and GET requests of the job."""
        left = self.plan.shard_count - self.present
        measuring = 0 if self.present else _measuring_reads(self.plan)
        puts, gets = requests(left, _shard_reads(self.plan) * self.share + measuring)
        return puts + len(self.plan.levels), gets

    def describe(self) -> dict[str, Any]:
        """Plan and projection as plain values, for people and scripts."""
        found = self.plan.describe() | {"shards_present": self.present}
        if self.pilot is None:
            return found | {"pilot": "none: weights are trained first; `ucray train` makes some to plan with"}
        pilot = self.pilot
        ways = self.ways()
        ours, best = ways[OURS], cheapest(list(ways.values()), self.months)
        puts, gets = self.requests
        gpu = self.options.device == "cuda"
        worker_hours = self.hours * self.workers
        return found | {
            "pilot": f"{pilot.chunks} chunks, quality {pilot.measured.quality}",
            "projected_bytes_out": round(self.bytes_out),
            "projected_ratio": self.plan.bytes_in / self.bytes_out,
            "projected_psnr": ours.psnr,
            "encode_mb_s": pilot.voxel_bytes / pilot.ucray.seconds / 1e6,
            "decode_mb_s": pilot.voxel_bytes / pilot.decode_seconds / 1e6,
            "workers": self.workers,
            "hours": self.hours,
            "core_hours": None if gpu else worker_hours,
            "gpu_hours": worker_hours if gpu else None,
            "puts": puts,
            "gets": gets,
            "ways": {name: _described(one, self.months) for name, one in ways.items()},
            "break_even_months": {
                name: break_even(ours, other) for name, other in ways.items() if name != OURS
            },
            "no_jpeg_xl": pilot.no_jpeg_xl or None,
            "prices": f"US dollars, AWS us-east-1 of {PRICES_AS_OF} unless given",
            "recommended": best.name,
            "why": f"costs least over {self.months:g} months",
        }

    @property
    def _measured(self) -> Pilot:
        assert self.pilot is not None
        return self.pilot

    def _scaled(self, size: int) -> float:
        return size * self.plan.bytes_in / self._measured.voxel_bytes


def project(
    source: str,
    destination: str,
    options: CompressOptions | None = None,
    *,
    weights: str | None = None,
    training: TrainingConfig | None = None,
    run_options: RunOptions | None = None,
    prices: Prices | None = None,
    months: float = MONTHS,
    connection: Connection | None = None,
    listener: Listener = ignore,
) -> Projection:
    """What `compress` would give, take and cost, from a pilot on this machine; writes nothing.

    With `training` the pilot is coded by the weights that it would start from.

    Raises
    ------
    UcrayError
        Whatever of its subclasses the job would end with before it begins.
    """
    options, run_options = options or CompressOptions(), run_options or RunOptions()
    connection = connection or Connection()
    plan, _, loaded = decide(source, options, weights, connection)
    objects = open_objects(destination, connection.endpoint_url)
    objects.check_place()
    present = 0
    archive = find_archive(objects)
    if archive is None:
        check_empty(objects)
    elif loaded is not None and training is None:
        check_same(archive, plan.with_weights(loaded.digest, None))
        present = len(present_shards(archive.sizes(), plan.grid))
    pilot = None if loaded is None else run_pilot(plan, loaded, run_options.device, listener)
    return Projection(plan, pilot, present, run_options, prices or Prices(), months)


def _shard_reads(plan: CompressPlan) -> int:
    """GET requests that reading all shards takes."""
    # Shards are boxes of a grid: what they touch on one axis is the same whatever the others.
    grid = plan.grid
    spans = [
        [(start + at, start + min(at + shard, length)) for at in range(0, length, shard)]
        for start, length, shard in zip(plan.region.start, grid.shape, grid.shard, strict=True)
    ]
    return sum(
        math.prod(sum(_touched(span, cell) for span in axis) for axis, cell in zip(spans, cells, strict=True))
        for cells in _fetched(plan)
    )


def _measuring_reads(plan: CompressPlan) -> int:
    """GET requests that measuring the volume takes."""
    sample = sample_chunk_boxes(plan.grid, SAMPLED_CHUNKS)
    seen = [] if plan.tracer is None else [seen_around(plan, box) for box in sample]
    boxes = [plan.source_box(box) for box in (*sample, *seen)]
    return sum(
        math.prod(
            _touched(span, cell)
            for span, cell in zip(zip(box.start, box.stop, strict=True), cells, strict=True)
        )
        for box in boxes
        for cells in _fetched(plan)
    )


def _fetched(plan: CompressPlan) -> list[tuple[int, ...]]:
    """Shapes of what takes a request of its own: chunks, and where the source is sharded, shards' indices."""
    volume = plan.volume
    return [volume.chunks] if volume.shards is None else [volume.chunks, volume.shards]


def _touched(span: tuple[int, int], cell: int) -> int:
    """Cells of an axis that lie in part between two places."""
    return (span[1] - 1) // cell - span[0] // cell + 1


def _described(one: Way, months: float) -> dict[str, Any]:
    return {
        "bytes": one.bytes,
        "psnr": one.psnr,
        "once": one.once,
        "monthly": one.monthly,
        "total": one.total(months),
    }
