"""Training on Ray: tiles through Ray Data, the two stages through Ray Train.

Any number of workers, CPU (gloo) or GPU (nccl). Each holds its share of the tiles and draws crops
from them; rank 0 writes checkpoints, from which a killed group goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs
import ray
import ray.data
import ray.train
import ray.train.torch
import torch
from msgspec.structs import replace
from ray.train import Checkpoint, DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ucray.cluster.ingest import one_row, voxels_of
from ucray.cluster.lessons import Lesson, lesson_of, prepare_lesson, tiles_of
from ucray.cluster.plan import config_for
from ucray.cluster.session import Resources, failure, resources, works_elsewhere
from ucray.cluster.telemetry import Event, Listener
from ucray.codec.allocator import keep_freed_memory
from ucray.codec.weights import Weights
from ucray.config import FIRST_DEPENDENT, LARGE_TRELLIS, CodecConfig, DecoderSizes, default_chunk
from ucray.errors import JobError, SettingsError
from ucray.grid import Box, Shape3
from ucray.settings import TrainingConfig
from ucray.storage.volume import Volume
from ucray.training.distill import Trainer
from ucray.training.tiles import Tile, TileSampler, prepare_tiles, tile_seed

TILES = 192
"""Tiles sampled over the volume."""

TILES_PER_WORKER = 8
"""Tiles a worker must have at least for a share of them to do."""

CALIBRATION_BATCHES = (4, 32)
"""Batches that symbols are counted on: an eighth of the steps, between these; one takes as long as some.

The most where there were weights to start from: few steps then, or one, may be all that they need.
"""

SHOWN_STEPS = 4
BOARD_SECONDS = 10.0
"""How long the driver waits for figures of the training."""

CHECKPOINT_STEPS = 200
STATE_FILE = "trainer.safetensors"
WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True)
class TrainingJob:
    """A training run, decided: what every worker needs to know. All of it can be pickled by Ray."""

    config: CodecConfig
    settings: TrainingConfig
    chunk: Shape3
    lessons: tuple[Lesson, ...]
    start: Weights | None
    record: dict[str, Any]
    threads: int

    @property
    def identity(self) -> str:
        """Names the run in its storage: only a run of the same sources and settings goes on from it."""
        document = {k: v for k, v in self.record.items() if k not in ("workers", "volume")}
        volumes = [lesson.volume.identity for lesson in self.lessons]
        document |= {"config": self.config.to_json(), "chunk": self.chunk, "volumes": volumes}
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]


def train(
    volume: Volume,
    settings: TrainingConfig,
    *,
    also: Sequence[Volume] = (),
    start: Weights | None = None,
    large: bool = False,
    sizes: DecoderSizes = DecoderSizes(),
    more_latents: int = 0,
    chunk: Shape3 | None = None,
    region: Box | None = None,
    tiles: int = TILES,
    workers: int = 1,
    worker_cpus: float | None = None,
    use_gpu: bool = False,
    storage: str | None = None,
    listener: Listener,
) -> Weights:
    """Train teacher and student on samples of a volume; needs an initialised Ray.

    Parameters
    ----------
    also
        More volumes to learn from, as much as from the first; their voxels must be shaped like its.
    start
        Weights of another domain to start from; with `settings.teacher_steps` of zero their teacher
        teaches a student on this volume.
    large
        Train LARGE_NETWORKS, where `start` does not say which; for a GPU.
    sizes
        Of the decoders, where they are to be others than those of `start` or the default.
    more_latents
        How many a cell has beyond those of `start`, in a group of their own.
    chunk
        Voxels of a training crop; the volume's default chunk if None.
    region
        The part of the first volume to sample; all of it if None.
    worker_cpus
        Cores of a worker; None shares out those of the nodes there are.
    storage
        Where checkpoints go (path or s3:// URL, the volume's endpoint); a temporary folder if None.

    Raises
    ------
    SettingsError
        If the volume is smaller than a chunk, `start` does not fit it, or a worker may run on another
        machine and there is no `storage` for its checkpoints.
    SourceError
        If the volume cannot be read, or holds nothing but fill.
    JobError
        If the workers failed more often than they are restarted.
    """
    if sizes.teacher_filter is not None and settings.teacher_steps == 0:
        raise SettingsError("--teacher-filter begins with nothing, and --train-steps 0 teaches it nothing")
    if storage is None and works_elsewhere():
        raise SettingsError(
            "training on a cluster keeps its checkpoints where every node reaches them: "
            "`ucray train --storage s3://...`, and compress with its --weights"
        )
    shaped = start.config if start is not None else config_for(volume, large=large)
    if more_latents:
        shaped = replace(shaped, groups=(*shaped.groups, more_latents))
    config = trained_config(sizes.given_to(shaped), keep_stream=settings.keep_stream)
    chunk = chunk or default_chunk(config)
    region = region or Box((0, 0, 0), volume.shape)
    if any(c % s for c, s in zip(chunk, config.stride, strict=True)):
        raise SettingsError(f"chunk shape {chunk} must be a multiple of {config.stride} for this volume")
    for other in also:
        if config_for(other).stride != config.stride:
            raise SettingsError(f"{other.url} has voxels of another shape than {volume.url}")
    learnt = [(volume, region), *((other, Box((0, 0, 0), other.shape)) for other in also)]
    for _, part in learnt:
        chunk = fitting_chunk(chunk, part.shape, config)
    lessons = tuple(
        prepare_lesson(one, part, chunk, tiles // len(learnt), settings.seed) for one, part in learnt
    )
    given = resources(workers, use_gpu=use_gpu, cpus=worker_cpus)
    record = {
        "source": volume.url,
        "volume": volume.identity,
        "also": [other.url for other in also],
        "region": str(region),
        "settings": settings.model_dump(mode="json"),
        "workers": workers,
        "start": None if start is None else start.digest,
    }
    job = TrainingJob(config, settings, chunk, lessons, start, record, given.threads)
    return _fit(job, workers, given, use_gpu, storage, listener)


def trained_config(config: CodecConfig, *, keep_stream: bool) -> CodecConfig:
    """What training makes of a configuration: what is counted anew is interlaced, and on long paths."""
    if keep_stream:
        return config
    return replace(
        config,
        first_dependent=FIRST_DEPENDENT,
        interlaced=config.checkered > 0,
        trellis_states=LARGE_TRELLIS,
    )


def fitting_chunk(chunk: Shape3, shape: Shape3, config: CodecConfig) -> Shape3:
    """The chunk, cut down to whole strides where the volume is smaller than it."""
    z, y, x = (min(c, max(n // s * s, s)) for c, n, s in zip(chunk, shape, config.stride, strict=True))
    return z, y, x


def _fit(
    job: TrainingJob,
    workers: int,
    given: Resources,
    use_gpu: bool,
    storage: str | None,
    listener: Listener,
) -> Weights:
    first, *others = [tiles_of(number, lesson) for number, lesson in enumerate(job.lessons)]
    dataset = first.union(*others) if others else first
    volume = job.lessons[0].volume
    count = sum(len(lesson.boxes) for lesson in job.lessons)
    # A small volume has few tiles: then every worker gets all of them.
    split = ["tiles"] if count >= TILES_PER_WORKER * workers else []
    scratch = Path(tempfile.mkdtemp(prefix="ucray-train-"))
    with _followed(job, listener) as board:
        path, filesystem = _place(storage or str(scratch), volume.endpoint_url)
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": job, "board": board},
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=use_gpu, resources_per_worker=given.per_worker
            ),
            run_config=RunConfig(
                name=f"ucray-{job.identity}",
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=2),
            ),
            datasets={"tiles": dataset},
            dataset_config=DataConfig(datasets_to_split=split),
        )
        try:
            result = trainer.fit()
        except Exception as error:
            found = failure(error, "training")
            if any(scratch.rglob(STATE_FILE)):
                # Hours of work may lie there: only a run that ended well takes its checkpoints away.
                raise type(found)(f"{found}; --storage {scratch} goes on from its last checkpoint") from error
            shutil.rmtree(scratch)
            raise found from error
        if result.checkpoint is None:
            raise JobError("training ended without a checkpoint")
        with result.checkpoint.as_directory() as folder:
            weights = Weights.from_bytes((Path(folder) / WEIGHTS_FILE).read_bytes())
    shutil.rmtree(scratch)
    return weights


def _work(loop: dict[str, Any]) -> None:
    """The loop of one training worker."""
    job: TrainingJob = loop["job"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    keep_freed_memory()
    torch.set_num_threads(job.threads)
    batches = ray.train.get_dataset_shard("tiles").iter_batches(batch_size=1)
    # Tiles come in the order they were read in; a seed should give the same crops every time.
    rows = sorted((one_row(batch) for batch in batches), key=lambda row: str(row["key"]))
    tiles: list[Tile] = []
    for number, lesson in enumerate(job.lessons):
        volume = lesson.volume
        mine = [voxels_of(row, volume.dtype) for row in rows if lesson_of(str(row["key"])) == number]
        if mine:
            tiles += prepare_tiles(mine, volume.fill_value, lesson.offset, lesson.scale)
    device = ray.train.torch.get_device()
    trainer = Trainer(
        job.config,
        job.settings,
        start=job.start,
        device=str(device),
        wrap=lambda module: ray.train.torch.prepare_model(module, move_to_device=False),
        rank=rank,
    )
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            trainer.from_bytes((Path(folder) / STATE_FILE).read_bytes())
    seed = tile_seed(job.settings.seed, rank, trainer.step_number)
    sampler = TileSampler(tiles, job.chunk, job.config, seed, device=str(device))
    if checkpoint is None:
        # All workers start from the same crops, whatever tiles they hold: rank 0's.
        trainer.start(lambda count: _from_first(sampler.draw(count)))
    latest: dict[str, float] = {}
    while trainer.step_number < trainer.total_steps:
        figures = trainer.step(sampler.draw(job.settings.batch))
        last = trainer.step_number == trainer.total_steps
        if last or trainer.step_number % SHOWN_STEPS == 0:
            latest = {name: float(value) for name, value in figures.items()}
            if rank == 0:
                loop["board"].show.remote(trainer.step_number, latest)
        if not last and trainer.step_number % CHECKPOINT_STEPS == 0:
            _report({STATE_FILE: trainer.to_bytes()} if rank == 0 else {}, latest)
    files = {}
    if rank == 0:
        fewest, most = CALIBRATION_BATCHES
        counted = most if job.start is not None else min(max(trainer.total_steps // 8, fewest), most)
        batches = [sampler.draw(job.settings.batch) for _ in range(counted)]
        # A worker that is lost between here and the end goes on from here.
        files[STATE_FILE] = trainer.to_bytes()
        files[WEIGHTS_FILE] = trainer.finish(batches, job.record).to_bytes()
    _report(files, latest)


def _from_first(tensor: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        device = ray.train.torch.get_device()
        shared = tensor.to(device)
        torch.distributed.broadcast(shared, 0)
        return shared.cpu()
    return tensor


def _report(files: dict[str, bytes], figures: dict[str, float]) -> None:
    if not files:
        ray.train.report(figures)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        ray.train.report(figures, checkpoint=Checkpoint.from_directory(folder))


@ray.remote(num_cpus=0)
class _Board:
    """Where rank 0 shows its progress to the driver."""

    def __init__(self) -> None:
        self._latest: tuple[int, dict[str, float]] = (0, {})

    def show(self, step: int, figures: dict[str, float]) -> None:
        self._latest = (step, figures)

    def look(self) -> tuple[int, dict[str, float]]:
        return self._latest


@contextmanager
def _followed(job: TrainingJob, listener: Listener) -> Iterator[Any]:
    """A board on the driver's node, and a thread that tells the listener what appears on it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    board = _Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    ended = threading.Event()
    total = job.settings.teacher_steps + job.settings.student_steps

    def follow() -> None:
        last = False
        while not last:
            # What happened up to the end is told too, however short the run was.
            last = ended.wait(0.5)
            try:
                step, figures = ray.get(board.look.remote(), timeout=BOARD_SECONDS)
            except ray.exceptions.RayError:
                continue  # what is wrong ends the training, and is told there
            note = " ".join(f"{name} {value:.4f}" for name, value in figures.items())
            stage = "teacher" if step < job.settings.teacher_steps else "student"
            listener(Event("train", step, total, f"{stage} {note}", figures))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        ended.set()
        thread.join()
        ray.kill(board)


def _place(storage: str, endpoint_url: str | None) -> tuple[str, pyarrow.fs.FileSystem | None]:
    parts = urlsplit(storage)
    if parts.scheme != "s3" or endpoint_url is None:
        return storage if parts.scheme else str(Path(storage).absolute()), None
    endpoint = urlsplit(endpoint_url)
    filesystem = pyarrow.fs.S3FileSystem(endpoint_override=endpoint.netloc, scheme=endpoint.scheme)
    return parts.netloc + parts.path, filesystem
