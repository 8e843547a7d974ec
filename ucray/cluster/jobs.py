"""The jobs as functions of plain values: what `ucray` exports and the command line calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import zarr

from ucray.cluster.boxes import read_boxes
from ucray.cluster.compress import JobReport, prepare, run
from ucray.cluster.connection import Connection
from ucray.cluster.decompress import Decompressed, decompress_archive
from ucray.cluster.pipeline import RunOptions
from ucray.cluster.plan import CompressOptions, CompressPlan, config_for, plan_compress
from ucray.cluster.session import ray_session
from ucray.cluster.telemetry import LINGER, Listener, Telemetry, ignore
from ucray.cluster.train import train as train_on_ray
from ucray.cluster.verify import Verification, verify_archive
from ucray.cluster.weights_store import load_weights, trained_for
from ucray.codec.shipped import shipped_for
from ucray.codec.weights import Weights
from ucray.config import DecoderSizes
from ucray.errors import DestinationError, SettingsError
from ucray.grid import Shape3, parse_box
from ucray.quality import ErrorSum
from ucray.settings import TrainingConfig
from ucray.storage.archive import archive_bytes, open_archive
from ucray.storage.importance import ImportanceMap
from ucray.storage.objects import object_at, open_objects, open_writable_store, translated
from ucray.storage.space import Space
from ucray.storage.tracer import StoredTracer
from ucray.synthetic import synthetic_volume
from ucray.training.widening import check_linear


def synth(
    destination: str,
    shape: Shape3 = (256, 256, 256),
    seed: int = 0,
    *,
    connection: Connection = Connection(),
) -> Space:
    """Write a synthetic EM-like volume, uint8, as a sharded OME-Zarr 0.5 group.

    Raises
    ------
    DestinationError
        If anything stands at the destination.
    """
    objects = open_objects(destination, connection.endpoint_url)
    objects.check_place()
    if objects.sizes(""):
        raise DestinationError(f"{destination} is not empty; give a destination of its own")
    space = Space((8.0, 8.0, 8.0), (0.0, 0.0, 0.0), "nanometer")
    voxels = synthetic_volume(shape, seed)
    chunk = tuple(min(64, n) for n in shape)
    shard = tuple(min(4 * c, -(-n // c) * c) for c, n in zip(chunk, shape, strict=True))
    with translated(destination):
        store = open_writable_store(destination, connection.endpoint_url)
        group = zarr.create_group(store, attributes=space.to_ome("synthetic"))
        array = group.create_array(
            "0",
            shape=shape,
            dtype="uint8",
            chunks=chunk,
            shards=shard,
            fill_value=0,
            dimension_names=("z", "y", "x"),
        )
        array[...] = voxels
    return space


def plan(
    source: str,
    options: CompressOptions,
    weights: str | None = None,
    *,
    connection: Connection = Connection(),
) -> CompressPlan:
    """What `compress` would do, from metadata alone; writes nothing."""
    return decide(source, options, weights, connection)[0]


def decide(
    source: str, options: CompressOptions, weights: str | None, connection: Connection
) -> tuple[CompressPlan, str | None, Weights | None]:
    """The plan of a job, and the weights to start from with their name; None where none fit the volume."""
    volume = connection.open(source)
    name = weights or shipped_for(config_for(volume))
    loaded = None if name is None else load_weights(name, connection.endpoint_url)
    config = loaded.config if loaded else config_for(volume)
    importance = tracer = None
    if options.traced_by is not None:
        tracer = StoredTracer.open(options.traced_by, connection.endpoint_url)
    if options.importance is not None:
        importance = ImportanceMap.open(
            options.importance, volume.shape, config.latent_cell, connection.endpoint_url
        )
    return plan_compress(volume, config, options, importance, tracer), name, loaded


def compress(
    source: str,
    destination: str,
    options: CompressOptions | None = None,
    *,
    weights: str | None = None,
    training: TrainingConfig | None = None,
    run_options: RunOptions | None = None,
    connection: Connection = Connection(),
    listener: Listener = ignore,
) -> JobReport:
    """Compress a volume into an archive, or finish an archive that an earlier run began.

    Parameters
    ----------
    source, destination
        Local paths or s3:// URLs; http(s):// too for the source.
    weights
        Name of shipped weights, path or URL. None takes shipped ones that fit the volume's voxels; where
        none do, weights are trained on the volume and kept in the archive.
    training
        Steps of that training, or of fine-tuning the weights; None uses weights as they are.
    run_options
        Workers, device, serial or Ray, metrics port.

    Raises
    ------
    UcrayError
        One of its subclasses for whatever is wrong; JobError if shards failed while running.
    """
    options = options or CompressOptions()
    run_options = run_options or RunOptions()
    decided, name, start = decide(source, options, weights, connection)
    objects = open_objects(destination, connection.endpoint_url)
    objects.check_place()
    if start is None:
        training = training or TrainingConfig()
    chosen = None if run_options.boxes is None else read_boxes(decided, run_options.boxes)
    telemetry = Telemetry()
    with telemetry.served(run_options.metrics_port, run_options.metrics_linger):
        if start is not None and training is None:
            used = start
        else:
            assert training is not None
            follow = telemetry.following(listener)
            used = trained_for(decided, objects, training, start, run_options, follow)
        # Workers may have GPUs that this process has not: what it measures, it measures with what it has.
        device = run_options.device if run_options.serial else "auto"
        archive = prepare(decided, objects, used, training, device, listener)
        report = run(
            decided, archive, used, run_options, connection.endpoint_url, telemetry, listener, chosen=chosen
        )
    return replace(report, weights=_origin(name, training))


def train(
    source: str,
    destination: str,
    settings: TrainingConfig | None = None,
    *,
    also: Sequence[str] = (),
    exact_fill: bool = True,
    init: str | None = None,
    large: bool = False,
    sizes: DecoderSizes = DecoderSizes(),
    more_latents: int = 0,
    workers: int = 1,
    worker_cpus: float | None = None,
    use_gpu: bool = False,
    storage: str | None = None,
    roi: str | None = None,
    chunk: Shape3 | None = None,
    metrics_port: int | None = None,
    metrics_linger: float = LINGER,
    connection: Connection = Connection(),
    listener: Listener = ignore,
) -> Weights:
    """Train weights on a volume, or a region of it, and `also` on others; write them to a new object.

    Without `exact_fill` voxels of a volume's fill value are learnt from like others.
    """
    volume = connection.open(source)
    others = [connection.open(other) for other in also]
    if not exact_fill:
        volume, others = volume.without_fill(), [other.without_fill() for other in others]
    folder, name = object_at(destination, connection.endpoint_url)
    folder.check_place()
    if folder.get(name) is not None:
        raise DestinationError(f"{destination} exists; give another name")
    if init is None and settings is not None and settings.keep_stream:
        raise SettingsError("--keep-stream wants a stream that is there; give --init")
    if init is None and more_latents:
        raise SettingsError("--more-latents are more than those of weights that are there; give --init")
    if large and init is not None:
        raise SettingsError("--large sizes new networks; those of --init have their size")
    start = load_weights(init, connection.endpoint_url) if init is not None else None
    if start is not None and more_latents:
        check_linear(start.config)
    telemetry = Telemetry()
    with ray_session(), telemetry.served(metrics_port, metrics_linger):
        weights = train_on_ray(
            volume,
            settings or TrainingConfig(),
            also=others,
            start=start,
            large=large,
            sizes=sizes,
            more_latents=more_latents,
            chunk=chunk,
            region=None if roi is None else parse_box(roi, volume.shape),
            workers=workers,
            worker_cpus=worker_cpus,
            use_gpu=use_gpu,
            storage=storage,
            listener=telemetry.following(listener),
        )
    if not folder.put_new(name, weights.to_bytes()):
        raise DestinationError(f"{destination} appeared while training; the new weights are not kept")
    return weights


def verify(
    archive: str,
    source: str | None = None,
    *,
    sample: int | None = None,
    serial: bool = False,
    workers: int | None = None,
    worker_cpus: float | None = None,
    connection: Connection = Connection(),
    listener: Listener = ignore,
) -> Verification:
    """Check an archive, or a random sample of its shards, against its checksums and statistics.

    With a source, every voxel of what is checked.
    """
    volume = None if source is None else connection.open(source)
    return verify_archive(
        archive,
        source=volume,
        sample=sample,
        endpoint_url=connection.endpoint_url,
        serial=serial,
        workers=workers,
        worker_cpus=worker_cpus,
        listener=listener,
    )


def decompress(
    archive: str,
    destination: str,
    *,
    serial: bool = False,
    workers: int | None = None,
    worker_cpus: float | None = None,
    connection: Connection = Connection(),
    listener: Listener = ignore,
) -> Decompressed:
    """Write an archive out as a plain zarr volume."""
    return decompress_archive(
        archive,
        destination,
        endpoint_url=connection.endpoint_url,
        serial=serial,
        workers=workers,
        worker_cpus=worker_cpus,
        listener=listener,
    )


def info(archive: str, *, connection: Connection = Connection()) -> dict[str, Any]:
    """What an archive holds and how well, from its metadata, one listing, and its statistics."""
    opened = open_archive(archive, connection.endpoint_url)
    settings = opened.settings
    stored, weights = archive_bytes(opened, opened.sizes())
    error = ErrorSum()
    kinds: dict[str, int] = {}
    shards = 0
    for statistics in opened.all_statistics():
        shards += 1
        error += statistics.error
        for chunk in statistics.chunks:
            kinds[chunk.kind] = kinds.get(chunk.kind, 0) + 1
    return settings.model_dump(mode="json") | {
        "archive": archive,
        "shards_planned": int(np.prod(settings.grid.shards)),
        "shards_present": shards,
        "chunks": kinds,
        "bytes_in": settings.bytes_in,
        "bytes_out": stored,
        "bytes_weights": weights,
        "measured_ratio": settings.bytes_in / stored,
        "psnr": error.psnr(settings.data_range) if error.voxels else None,
        "max_error": error.maximum,
    }


def _origin(weights: str | None, training: TrainingConfig | None) -> str:
    """Where the weights of a job came from, for its report."""
    if weights is None:
        return "trained on the volume"
    return weights if training is None else f"{weights}, fine-tuned on the volume"
