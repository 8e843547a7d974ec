"""Commands that write volumes, weights and archives."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from ucray.arguments import (
    Archive,
    ArrayName,
    AsJson,
    Chunk,
    Device,
    Endpoint,
    ExactFill,
    Importance,
    Levels,
    Lossless,
    MaxError,
    Memory,
    MetricsLinger,
    MetricsPort,
    Psnr,
    Ratio,
    Roi,
    Select,
    Serial,
    Shard,
    Source,
    TracedBy,
    WeightsName,
    WorkerCpus,
    Workers,
)
from ucray.commands.plan import show_projection
from ucray.console import progress, show
from ucray.grid import parse_shape


def synth(
    destination: Annotated[str, typer.Argument(metavar="DST", help="Where the volume goes.")],
    shape: Annotated[str, typer.Option(help="Shape z,y,x.")] = "256,256,256",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Write a synthetic EM-like volume as OME-Zarr."""
    from ucray.cluster import jobs
    from ucray.cluster.connection import Connection

    jobs.synth(destination, parse_shape(shape), seed, connection=Connection(endpoint_url))
    show({"volume": destination, "shape": list(parse_shape(shape)), "seed": seed}, as_json=as_json)


def train(
    source: Source,
    destination: Annotated[str, typer.Argument(metavar="WEIGHTS", help="Where the weights go.")],
    train_steps: Annotated[int, typer.Option(min=0, help="Steps of the teacher.")] = 1200,
    student_steps: Annotated[int, typer.Option(min=1, help="Steps of the student.")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="Chunks a step and worker.")] = 2,
    exact_fill: ExactFill = True,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    init: Annotated[str | None, typer.Option(help="Weights of another domain to start from.")] = None,
    also: Annotated[list[str] | None, typer.Option(help="One more volume to learn from; repeatable.")] = None,
    untaught: Annotated[
        bool, typer.Option("--untaught", help="The student learns from the data alone, for comparison.")
    ] = False,
    keep_stream: Annotated[
        bool,
        typer.Option("--keep-stream", help="Teach the decoders alone; chunks are coded as with --init."),
    ] = False,
    large: Annotated[
        bool, typer.Option("--large", help="Larger analysis and teacher; takes a GPU to train.")
    ] = False,
    more_latents: Annotated[
        int, typer.Option(min=0, max=1024, help="Latents a cell beyond those of --init, for finer qualities.")
    ] = 0,
    student: Annotated[
        str | None,
        typer.Option(
            help="Size of the student, which decodes: width and blocks on latents, then on wavelet cells, "
            "width of the INR, as 32,1,16,1,4. Another size than that of --init starts it anew."
        ),
    ] = None,
    student_filter: Annotated[
        str | None,
        typer.Option(
            help="The student's post-filter: width, layers, finest quality, as 16,2,160, and if it has "
            "cells of its own their voxels z, y, x, as 32,6,160,2,4,4."
        ),
    ] = None,
    teacher_filter: Annotated[
        str | None, typer.Option(help="The teacher's post-filter, as 32,6,160.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Workers that train.")] = 1,
    worker_cpus: WorkerCpus = None,
    gpu: Annotated[bool, typer.Option(help="One GPU a worker.")] = False,
    storage: Annotated[str | None, typer.Option(help="Where checkpoints go; path or s3:// URL.")] = None,
    metrics_port: MetricsPort = None,
    metrics_linger: MetricsLinger = 60.0,
    roi: Annotated[str | None, typer.Option(help="Region z0:z1,y0:y1,x0:x1 to learn from.")] = None,
    chunk: Annotated[str | None, typer.Option(help="Shape of a crop to learn from, as 64,64,64.")] = None,
    endpoint_url: Endpoint = None,
    array: ArrayName = None,
    select: Select = None,
    as_json: AsJson = False,
) -> None:
    """Train a teacher and distil a student on samples of a volume."""
    from ucray.cluster import jobs
    from ucray.cluster.connection import Connection
    from ucray.cluster.options import training_from
    from ucray.config import DecoderSizes, FilterConfig, SynthesisConfig

    settings = training_from(
        teacher_steps=train_steps,
        student_steps=student_steps,
        batch=batch,
        learning_rate=learning_rate,
        taught=not untaught,
        keep_stream=keep_stream,
        seed=seed,
    )
    with progress(quiet=as_json) as listener:
        weights = jobs.train(
            source,
            destination,
            settings,
            also=also or (),
            exact_fill=exact_fill,
            init=init,
            large=large,
            sizes=DecoderSizes(
                None if student is None else SynthesisConfig.parse(student),
                None if student_filter is None else FilterConfig.parse(student_filter),
                None if teacher_filter is None else FilterConfig.parse(teacher_filter),
            ),
            more_latents=more_latents,
            workers=workers,
            worker_cpus=worker_cpus,
            use_gpu=gpu,
            storage=storage,
            metrics_port=metrics_port,
            metrics_linger=metrics_linger,
            roi=roi,
            chunk=None if chunk is None else parse_shape(chunk),
            connection=Connection(endpoint_url, array, select),
            listener=listener,
        )
    show(
        {"weights": destination, "digest": weights.digest, "bytes": len(weights.to_bytes())}, as_json=as_json
    )


def compress(
    source: Source,
    destination: Annotated[str, typer.Argument(metavar="DST", help="Archive to write or to finish.")],
    ratio: Ratio = None,
    psnr: Psnr = None,
    max_error: MaxError = None,
    lossless: Lossless = False,
    exact_fill: ExactFill = True,
    weights: WeightsName = None,
    train_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Train, or fine-tune --weights, that long: by one worker with all cores, or by --workers "
            "with a GPU each.",
        ),
    ] = None,
    chunk: Chunk = None,
    shard: Shard = None,
    roi: Roi = None,
    importance: Importance = None,
    traced_by: TracedBy = None,
    levels: Levels = 0,
    memory: Memory = None,
    metrics_port: MetricsPort = None,
    metrics_linger: MetricsLinger = 60.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    workers: Workers = None,
    worker_cpus: WorkerCpus = None,
    write_workers: Annotated[int, typer.Option(min=1, help="Workers that write.")] = 1,
    device: Device = "auto",
    serial: Serial = False,
    failed_boxes: Annotated[
        str, typer.Option(help="File for boxes that failed.")
    ] = "ucray-failed-boxes.json",
    boxes: Annotated[
        str | None,
        typer.Option(
            help="Do just the shards that such a file lists; exits with 1 while others are missing."
        ),
    ] = None,
    endpoint_url: Endpoint = None,
    array: ArrayName = None,
    select: Select = None,
    as_json: AsJson = False,
) -> None:
    """Compress a volume into an archive; the same command again finishes an interrupted job."""
    from ucray.cluster import jobs
    from ucray.cluster.connection import Connection
    from ucray.cluster.options import options_from, run_options_from, training_for

    options = options_from(
        ratio=ratio,
        psnr=psnr,
        max_error=max_error,
        lossless=lossless,
        exact_fill=exact_fill,
        chunk=chunk,
        shard=shard,
        roi=roi,
        importance=importance,
        traced_by=traced_by,
        levels=levels,
        memory=memory,
    )
    connection = Connection(endpoint_url, array, select)
    training = None if train_steps is None else training_for(train_steps)
    run_options = run_options_from(
        encode_workers=workers,
        worker_cpus=worker_cpus,
        write_workers=write_workers,
        device=device,
        serial=serial,
        metrics_port=metrics_port,
        metrics_linger=metrics_linger,
        failed_boxes=failed_boxes,
        boxes=boxes,
    )
    if dry_run:
        show_projection(
            source,
            destination,
            options,
            weights=weights,
            training=training,
            run_options=run_options,
            connection=connection,
            as_json=as_json,
        )
        return
    with progress(quiet=as_json) as listener:
        report = jobs.compress(
            source,
            destination,
            options,
            weights=weights,
            training=training,
            run_options=run_options,
            connection=connection,
            listener=listener,
        )
    show(dataclasses.asdict(report) | {"ratio": report.ratio}, as_json=as_json)
    if report.left:
        raise typer.Exit(1)


def decompress(
    archive: Archive,
    destination: Annotated[str, typer.Argument(metavar="DST", help="Where the plain zarr volume goes.")],
    workers: Workers = None,
    worker_cpus: WorkerCpus = None,
    serial: Serial = False,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Write an archive out as a plain OME-Zarr volume."""
    from ucray.cluster import jobs
    from ucray.cluster.connection import Connection

    with progress(quiet=as_json) as listener:
        done = jobs.decompress(
            archive,
            destination,
            workers=workers,
            worker_cpus=worker_cpus,
            serial=serial,
            connection=Connection(endpoint_url),
            listener=listener,
        )
    show(dataclasses.asdict(done), as_json=as_json)
