"""What a job will do, before it does anything: grid, memory, fingerprint. No I/O, no Ray."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import ByteSize, Field

from ucray.config import CodecConfig, config_for_voxels, default_chunk
from ucray.errors import SettingsError
from ucray.grid import Box, Grid, Shape3, format_shape, parse_box, round_up, triple
from ucray.settings import Settings, TrainingConfig
from ucray.storage.importance import ImportanceMap
from ucray.storage.tracer import StoredTracer
from ucray.storage.volume import Volume
from ucray.zarr_level import level_factors

FINGERPRINT_VERSION = 1

NETWORK_MEMORY = 1536 * 2**20
"""Bytes an encode worker holds whatever the shard: interpreter, torch, networks, one chunk's features."""

TRACER_MEMORY = 512 * 2**20
"""Bytes that steering a chunk by a tracer takes beside that: at most 350 MiB were seen, of its tiles."""

COPIES = 3
"""Copies of a shard's voxels that live at once in an encode worker: block, array, drafts."""

SHARD_CHUNKS = 8
"""Chunks on each axis of a default shard."""

TRACED_SHARD_CHUNKS = 4
"""The same where a tracer steers: a shard is what a worker is seen to get done, and takes minutes."""


DEFAULT_RATIO = 64.0


class CompressOptions(Settings):
    """What the user asks of a compress job; None leaves the choice to the plan.

    At most one of `ratio` (source bytes over archive bytes), `psnr` (dB), `max_error` (of any voxel, in
    its units) and `lossless` is the target; without any it is DEFAULT_RATIO. Without `exact_fill` voxels of
    the volume's fill value are coded like others. `importance` is where weights of voxels' errors are, in an
    array as large as the volume or coarser by whole factors; or else `traced_by` is where a tracer is, and
    errors weigh by how far they move what it finds. `levels` coarser ones can be read beside the
    volume itself.
    """

    ratio: Annotated[float, Field(ge=1.0, le=1e6)] | None = None
    psnr: Annotated[float, Field(gt=0.0, le=200.0)] | None = None
    max_error: Annotated[float, Field(ge=0.0, le=1e30)] | None = None
    lossless: bool = False
    exact_fill: bool = True
    chunk: Shape3 | None = None
    shard: Shape3 | None = None
    roi: str | None = None
    importance: str | None = None
    traced_by: str | None = None
    levels: Annotated[int, Field(ge=0, le=16)] = 0
    memory: Annotated[ByteSize, Field(ge=1)] = ByteSize(6 * 2**30)


@dataclass(frozen=True)
class Target:
    """What an archive must meet; of the three, those that are None were not asked for.

    A `max_error` of zero is lossless. A ratio that is `asked` for, and not the default, is met or refused.
    """

    ratio: float
    psnr: float | None = None
    max_error: float | None = None
    asked: bool = False

    @classmethod
    def of(cls, options: CompressOptions) -> Target:
        """The one target of some options; raises SettingsError if there are two."""
        asked = [name for name in ("ratio", "psnr", "max_error") if getattr(options, name) is not None]
        asked += ["lossless"] * options.lossless
        if len(asked) > 1:
            names = " and ".join("--" + name.replace("_", "-") for name in asked)
            raise SettingsError(f"{names} contradict each other; give one of them")
        ratio = DEFAULT_RATIO if options.ratio is None else options.ratio
        max_error = 0.0 if options.lossless else options.max_error
        return cls(ratio, options.psnr, max_error, asked=options.ratio is not None)

    def describe(self) -> dict[str, float]:
        """The one target by name."""
        if self.max_error is not None:
            return {"max_error": self.max_error}
        return {"ratio": self.ratio} if self.psnr is None else {"psnr": self.psnr}


@dataclass(frozen=True)
class CompressPlan:
    """A compress job, decided.

    Parameters
    ----------
    volume, region
        The source and the box of it that is compressed.
    grid
        Chunks and shards of the region.
    target
        What the archive must meet; a ratio is that of source bytes to all its bytes but the weights.
    peak_memory
        Projected bytes of an encode worker.
    fingerprint
        SHA-256 of what makes two jobs write the same archive, but for the weights.
    levels
        Factors (z, y, x) of coarser levels.
    importance, tracer
        Weights of the voxels' errors, or what says how much they weigh; both None where all weigh the same.
    """

    volume: Volume
    region: Box
    grid: Grid
    target: Target
    peak_memory: int
    fingerprint: str
    levels: tuple[Shape3, ...] = ()
    importance: ImportanceMap | None = None
    tracer: StoredTracer | None = None

    @property
    def weighed_by(self) -> str:
        """Where that is what says how much errors weigh; nothing where all weigh the same."""
        if self.tracer is not None:
            return self.tracer.url
        return "" if self.importance is None else self.importance.weights.url

    @property
    def bytes_in(self) -> int:
        """Bytes of the region's voxels."""
        return self.region.voxels * np.dtype(self.volume.dtype).itemsize

    @property
    def shard_count(self) -> int:
        return math.prod(self.grid.shards)

    @property
    def chunk_count(self) -> int:
        chunks = (-(-n // c) for n, c in zip(self.grid.shape, self.grid.chunk, strict=True))
        return math.prod(chunks)

    def source_box(self, box: Box) -> Box:
        """A box of the region in the source's coordinates."""
        return box.shifted(self.region.start)

    def with_weights(self, digest: str, training: TrainingConfig | None) -> str:
        """The job's fingerprint once it is known which weights code it, and how they were asked for."""
        asked = None if training is None else training.model_dump(mode="json")
        return _sha256({"plan": self.fingerprint, "weights": digest, "training": asked})

    def describe(self) -> dict[str, Any]:
        """The plan as plain values, for people and scripts."""
        return {
            "source": self.volume.url,
            "array": self.volume.path,
            "select": dict(self.volume.select),
            "dtype": self.volume.dtype,
            "region": str(self.region),
            "shape": list(self.grid.shape),
            "chunk": list(self.grid.chunk),
            "shard": list(self.grid.shard),
            "levels": [list(factors) for factors in self.levels],
            "importance": None if self.importance is None else self.importance.weights.url,
            "traced_by": None if self.tracer is None else self.tracer.url,
            "chunks": self.chunk_count,
            "shards": self.shard_count,
            "bytes_in": self.bytes_in,
            "target": self.target.describe(),
            "projected_bytes_out": (
                round(self.bytes_in / self.target.ratio) if "ratio" in self.target.describe() else None
            ),
            "peak_memory_per_worker": self.peak_memory,
            "fingerprint": self.fingerprint,
        }


def worker_memory(shard: Shape3, itemsize: int) -> int:
    """Bytes that a worker takes at most, coding or decoding shards of voxels of `itemsize` bytes."""
    return NETWORK_MEMORY + COPIES * math.prod(shard) * itemsize


def plan_compress(
    volume: Volume,
    config: CodecConfig,
    options: CompressOptions,
    importance: ImportanceMap | None = None,
    tracer: StoredTracer | None = None,
) -> CompressPlan:
    """Decide a compress job from metadata alone.

    Raises
    ------
    SettingsError
        If the region is empty, chunk or shard do not fit the networks or each other, or a worker
        would need more than `options.memory`.
    """
    target = Target.of(options)
    if importance is not None and tracer is not None:
        raise SettingsError("--importance and --traced-by both say what errors weigh; give one of them")
    if (importance or tracer) is not None and target.max_error is not None:
        asked_for = "--importance" if tracer is None else "--traced-by"
        raise SettingsError(
            f"{asked_for} spreads errors, and a bound holds for every voxel: give one of them"
        )
    if tracer is not None and config.analysis is not None:
        raise SettingsError(
            "--traced-by takes weights whose analysis is linear, as that of the shipped ones is; "
            "train others first and give them with --weights"
        )
    if not options.exact_fill:
        volume = volume.without_fill()
    region = Box((0, 0, 0), volume.shape) if options.roi is None else parse_box(options.roi, volume.shape)
    chunk = options.chunk or default_chunk(config)
    if any(c % s for c, s in zip(chunk, config.stride, strict=True)):
        raise SettingsError(
            f"chunk shape {format_shape(chunk)} must be a multiple of {format_shape(config.stride)} "
            "for this volume and these weights"
        )
    most = SHARD_CHUNKS if tracer is None else TRACED_SHARD_CHUNKS
    shard = options.shard or default_shard(region.shape, chunk, most)
    grid = Grid(region.shape, chunk, shard)
    itemsize = np.dtype(volume.dtype).itemsize
    peak = worker_memory(shard, itemsize) + (0 if tracer is None else TRACER_MEMORY)
    if peak > options.memory:
        room = (options.memory - peak + COPIES * itemsize * math.prod(shard)) // (
            COPIES * itemsize * math.prod(chunk)
        )
        side = int(max(room, 0) ** (1 / 3) + 1e-9)
        fitting = format_shape(triple(side * c for c in chunk)) if side else "none"
        raise SettingsError(
            f"a shard of {format_shape(shard)} needs {peak / 2**30:.1f} GiB a worker, over the budget of "
            f"{options.memory / 2**30:.1f} GiB; the largest that fits is {fitting}"
        )
    asked: dict[str, Any] = {
        "version": FINGERPRINT_VERSION,
        "source": volume.identity,
        "region": str(region),
        "chunk": chunk,
        "shard": shard,
        "target": target.describe(),
    }
    if options.levels:
        asked["levels"] = options.levels
    if importance is not None:
        asked["importance"] = importance.weights.identity
    if tracer is not None:
        asked["traced_by"] = tracer.digest
    levels = tuple(level_factors(volume.space.scale, options.levels))
    return CompressPlan(volume, region, grid, target, peak, _sha256(asked), levels, importance, tracer)


def default_shard(shape: Shape3, chunk: Shape3, most: int = SHARD_CHUNKS) -> Shape3:
    """At most so many chunks on each axis, less where the volume is smaller."""
    covering = round_up(shape, chunk)
    return triple(min(most * c, n) for c, n in zip(chunk, covering, strict=True))


def config_for(volume: Volume, *, large: bool = False) -> CodecConfig:
    """The configuration that new weights for a volume get: levels follow its voxel size."""
    return config_for_voxels(volume.space.scale, large=large)


def sample_boxes(boxes: Sequence[Box], count: int) -> list[Box]:
    """At most `count` of `boxes`, spread evenly over their order with a fixed random phase each."""
    if len(boxes) <= count:
        return list(boxes)
    edges = np.linspace(0, len(boxes), count + 1).astype(int)
    random = np.random.default_rng(0)
    return [boxes[int(random.integers(a, b))] for a, b in itertools.pairwise(edges)]


def chunk_boxes(grid: Grid) -> list[Box]:
    """Boxes of all chunks of the grid, shard by shard."""
    return [box for index in grid.shard_indices() for _, _, box in grid.chunk_boxes(index)]


def sample_chunk_boxes(grid: Grid, count: int) -> list[Box]:
    """At most `count` chunk boxes spread over a grid, without listing all of a large one."""
    indices = list(grid.shard_indices())
    if len(indices) <= count:
        return sample_boxes(chunk_boxes(grid), count)
    edges = np.linspace(0, len(indices), count + 1).astype(int)
    random = np.random.default_rng(0)
    chosen = []
    for a, b in itertools.pairwise(edges):
        boxes = [box for _, _, box in grid.chunk_boxes(indices[int(random.integers(a, b))])]
        chosen.append(boxes[int(random.integers(len(boxes)))])
    return chosen


def training_boxes(shape: Shape3, chunk: Shape3, count: int, seed: int) -> list[Box]:
    """Boxes of tiles to train on: half a chunk larger than a chunk where the volume allows.

    Their corners follow a scrambled regular lattice over the whole volume, so that every region is
    sampled and a seed always gives the same boxes.
    """
    if any(n < c for n, c in zip(shape, chunk, strict=True)):
        raise SettingsError(
            f"a volume of shape {format_shape(shape)} is smaller than a chunk of {format_shape(chunk)}; "
            "give a smaller --chunk"
        )
    tile = triple(min(n, c + c // 2) for n, c in zip(shape, chunk, strict=True))
    random = np.random.default_rng(seed)
    room = np.array([n - t for n, t in zip(shape, tile, strict=True)])
    # Additive recurrence on the plastic number: low-discrepancy points in three dimensions.
    plastic = 1.2207440846057596
    steps = np.array([plastic**-1, plastic**-2, plastic**-3])
    places = (random.random(3) + np.arange(1, count + 1)[:, None] * steps) % 1.0
    starts = np.floor(places * (room + 1)).astype(int)
    corners = sorted({triple(int(v) for v in start) for start in starts})
    return [Box(c, triple(a + b for a, b in zip(c, tile, strict=True))) for c in corners]


def _sha256(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
