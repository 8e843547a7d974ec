"""The command line: parses, calls a job, prints. Nothing else happens here."""

from __future__ import annotations

import dataclasses
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

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
    WeightsName,
    WorkerCpus,
    Workers,
)
from ucray.console import progress, show, show_plan
from ucray.errors import UcrayError
from ucray.grid import parse_shape
from ucray.log import LogFormat, LogLevel, configure

if TYPE_CHECKING:
    # Whoever asks for --help does not wait for what a job needs.
    from ucray.cluster.plan import CompressOptions
    from ucray.codec.weights import Weights

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

STOPPED = 128 + signal.SIGTERM
"""Exit status of a job that was told to stop, as shells say it."""


@app.callback()
def log_options(
    log_format: Annotated[
        LogFormat, typer.Option(help="Log lines, on standard error.", envvar="UCRAY_LOG_FORMAT")
    ] = LogFormat.TEXT,
    log_level: Annotated[
        LogLevel, typer.Option(help="At debug each shard has a line.", envvar="UCRAY_LOG_LEVEL")
    ] = LogLevel.INFO,
) -> None:
    """Compress electron-microscopy volumes on Ray into archives that any zarr reader opens."""
    configure(log_format, log_level)


@app.command()
def synth(
    destination: Annotated[str, typer.Argument(metavar="DST", help="Where the volume goes.")],
    shape: Annotated[str, typer.Option(help="Shape z,y,x.")] = "256,256,256",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Write a synthetic EM-like volume as OME-Zarr."""
    from ucray.cluster import jobs

    jobs.synth(destination, parse_shape(shape), seed, connection=jobs.Connection(endpoint_url))
    show({"volume": destination, "shape": list(parse_shape(shape)), "seed": seed}, as_json=as_json)


@app.command()
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
    student: Annotated[
        str | None,
        typer.Option(
            help="Size of the student, which decodes: width and blocks on latents, then on wavelet cells, "
            "width of the INR, as 32,1,16,1,4. Another size than that of --init starts it anew."
        ),
    ] = None,
    student_filter: Annotated[
        str | None,
        typer.Option(help="The student's post-filter: width, layers, finest quality, as 16,2,160."),
    ] = None,
    teacher_filter: Annotated[
        str | None, typer.Option(help="The teacher's post-filter, as 32,6,160.")
    ] = None,
    workers: Workers = 1,
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
    from ucray.config import DecoderSizes, FilterConfig, SynthesisConfig

    settings = jobs.training_from(
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
            workers=workers,
            worker_cpus=worker_cpus,
            use_gpu=gpu,
            storage=storage,
            metrics_port=metrics_port,
            metrics_linger=metrics_linger,
            roi=roi,
            chunk=None if chunk is None else parse_shape(chunk),
            connection=jobs.Connection(endpoint_url, array, select),
            listener=listener,
        )
    show(
        {"weights": destination, "digest": weights.digest, "bytes": len(weights.to_bytes())}, as_json=as_json
    )


@app.command()
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
        int | None, typer.Option(min=1, help="Train, or fine-tune --weights, that long.")
    ] = None,
    chunk: Chunk = None,
    shard: Shard = None,
    roi: Roi = None,
    importance: Importance = None,
    levels: Levels = 0,
    memory: Memory = None,
    metrics_port: MetricsPort = None,
    metrics_linger: MetricsLinger = 60.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    workers: Workers = 1,
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

    options = jobs.options_from(
        ratio=ratio,
        psnr=psnr,
        max_error=max_error,
        lossless=lossless,
        exact_fill=exact_fill,
        chunk=chunk,
        shard=shard,
        roi=roi,
        importance=importance,
        levels=levels,
        memory=memory,
    )
    connection = jobs.Connection(endpoint_url, array, select)
    training = None if train_steps is None else jobs.training_for(train_steps)
    run_options = jobs.run_options_from(
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
        _project(
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


@app.command()
def plan(
    source: Source,
    destination: Annotated[str, typer.Argument(metavar="DST", help="Where the archive would go.")],
    ratio: Ratio = None,
    psnr: Psnr = None,
    max_error: MaxError = None,
    lossless: Lossless = False,
    exact_fill: ExactFill = True,
    weights: WeightsName = None,
    chunk: Chunk = None,
    shard: Shard = None,
    roi: Roi = None,
    importance: Importance = None,
    memory: Memory = None,
    workers: Workers = 1,
    device: Device = "auto",
    max_seg_loss: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Take the largest ratio at which tracing --labels loses at most so many per cent; "
            "--roi is then the region that is traced, and the plan that of the whole volume.",
        ),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Volume of neurons by number, or of classes (--membrane).")
    ] = None,
    membrane: Annotated[str, typer.Option(help="Classes of --labels that are membrane, with commas.")] = "",
    curve: Annotated[str, typer.Option(help="PNG of what is lost at which ratio.")] = "ucray-seg-loss.png",
    months: Annotated[float, typer.Option(min=0.0, help="Over how long the volume is kept.")] = 12.0,
    gb_month: Annotated[float | None, typer.Option(help="Price of a GB for a month.")] = None,
    thousand_puts: Annotated[float | None, typer.Option(help="Price of a thousand PUTs.")] = None,
    thousand_gets: Annotated[float | None, typer.Option(help="Price of a thousand GETs.")] = None,
    core_hour: Annotated[float | None, typer.Option(help="Price of a core for an hour.")] = None,
    gpu_hour: Annotated[float | None, typer.Option(help="Price of a GPU for an hour.")] = None,
    endpoint_url: Endpoint = None,
    array: ArrayName = None,
    select: Select = None,
    as_json: AsJson = False,
) -> None:
    """Code a few chunks, and say what compressing all would give, take and cost; writes nothing."""
    from ucray.cluster import jobs
    from ucray.cluster.cost import Prices

    if (max_seg_loss is None) != (labels is None):
        raise typer.BadParameter("--max-seg-loss and --labels go together")
    connection = jobs.Connection(endpoint_url, array, select)
    choice = None
    if max_seg_loss is not None and labels is not None:
        if (ratio, psnr, max_error, lossless) != (None, None, None, False):
            raise typer.BadParameter("--max-seg-loss chooses the ratio; give no other target")
        choice = _chosen(
            source,
            labels,
            None if weights is None else jobs.load_weights(weights, endpoint_url),
            max_seg_loss,
            curve,
            membrane,
            roi=roi,
            chunk=None if chunk is None else parse_shape(chunk),
            connection=connection,
            as_json=as_json,
        )
        ratio, roi = choice["ratio"], None
    options = jobs.options_from(
        ratio=ratio,
        psnr=psnr,
        max_error=max_error,
        lossless=lossless,
        exact_fill=exact_fill,
        chunk=chunk,
        shard=shard,
        roi=roi,
        importance=importance,
        memory=memory,
    )
    prices = {"gb_month": gb_month, "thousand_puts": thousand_puts, "thousand_gets": thousand_gets}
    prices |= {"core_hour": core_hour, "gpu_hour": gpu_hour}
    _project(
        source,
        destination,
        options,
        weights=weights,
        run_options=jobs.run_options_from(encode_workers=workers, device=device),
        prices=jobs.checked(Prices, prices),
        months=months,
        connection=connection,
        choice=choice,
        as_json=as_json,
    )


def _chosen(
    source: str,
    labels: str,
    weights: Weights | None,
    percent: float,
    curve: str,
    membrane: str,
    *,
    as_json: bool,
    **how: Any,
) -> dict[str, Any]:
    """The ratio that keeps a segmentation, and why, as plain values."""
    from ucray.cluster.benchmark import choose_ratio, parse_classes

    classes = parse_classes(membrane)
    with progress(quiet=as_json) as listener:
        choice = choose_ratio(
            source, labels, weights, percent, curve, membrane=classes, listener=listener, **how
        )
    return dataclasses.asdict(choice) | {"curve": curve}


def _project(
    source: str,
    destination: str,
    options: CompressOptions,
    *,
    as_json: bool,
    choice: dict[str, Any] | None = None,
    **how: Any,
) -> None:
    """Print what compressing would give, take and cost."""
    from ucray.cluster.projection import project

    with progress(quiet=as_json) as listener:
        projected = project(source, destination, options, listener=listener, **how)
    show_plan(projected.describe() | ({} if choice is None else {"choice": choice}), as_json=as_json)


@app.command()
def bench(
    source: Source,
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="Folder of the report.")],
    weights: Annotated[
        str | None, typer.Option(help="Weights; by default those that compress would take.")
    ] = None,
    codecs: Annotated[str, typer.Option(help="Names with commas; all by default.")] = "",
    ratios: Annotated[str, typer.Option(help="Ratios with commas.")] = "16,32,64,128,256,500",
    roi: Roi = None,
    chunk: Chunk = None,
    exact_fill: ExactFill = True,
    device: Annotated[
        str | None, typer.Option(help="Time the stages of the codec on cpu or cuda, instead of all codecs.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Chunks that go through the networks at once.")] = 8,
    pipeline: Annotated[
        bool,
        typer.Option("--pipeline", help="Time a whole job on Ray against the bare loop, instead of codecs."),
    ] = False,
    levels: Annotated[
        int | None,
        typer.Option(
            min=1, max=4, help="Coarser levels, averaged from the decoded volume or coded, instead of codecs."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="membrane or segmentation: trace --labels in what each codec leaves.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Volume of neurons by number, or of classes (--membrane).")
    ] = None,
    membrane: Annotated[str, typer.Option(help="Classes of --labels that are membrane, with commas.")] = "",
    endpoint_url: Endpoint = None,
    array: ArrayName = None,
    select: Select = None,
    as_json: AsJson = False,
) -> None:
    """Code a volume with ucray and its peers: tables, plots and BD-rates in a folder."""
    from ucray.bench.report import to_markdown
    from ucray.bench.task_report import TASK_FILE
    from ucray.cluster.benchmark import (
        LEVELS_FILE,
        STAGES_FILE,
        compare_levels,
        parse_classes,
        parse_ratios,
        time_stages,
        trace,
    )
    from ucray.cluster.benchmark import bench as run
    from ucray.cluster.jobs import Connection, load_weights

    connection = Connection(endpoint_url, array, select)
    if (device is not None) + pipeline + (levels is not None) + (task is not None) > 1:
        raise typer.BadParameter("--pipeline, --device, --levels, --task: ask for one")
    if (task is None) != (labels is None):
        raise typer.BadParameter("--task and --labels go together")
    if pipeline:
        from ucray.cluster.efficiency import measure_pipeline

        speeds = measure_pipeline(source, output, weights, roi=roi, connection=connection)
        if as_json:
            show(dataclasses.asdict(speeds) | {"efficiency": speeds.efficiency}, as_json=as_json)
        else:
            Console().print(speeds.to_markdown(), markup=False)
        return
    loaded = None if weights is None else load_weights(weights, endpoint_url)
    if device is not None:
        stages = time_stages(source, output, loaded, device, batch, roi=roi, connection=connection)
        if as_json:
            show({"stages": [dataclasses.asdict(stage) for stage in stages]}, as_json=as_json)
        else:
            Console().print((Path(output) / STAGES_FILE).read_text(), markup=False)
        return
    if levels is not None:
        compared = compare_levels(
            source, output, loaded, levels, ratios=parse_ratios(ratios), roi=roi, connection=connection
        )
        if as_json:
            show({"levels": [dataclasses.asdict(point) for point in compared]}, as_json=as_json)
        else:
            Console().print((Path(output) / LEVELS_FILE).read_text(), markup=False)
        return
    if task is not None and labels is not None:
        with progress(quiet=as_json) as listener:
            traced = trace(
                source,
                labels,
                output,
                loaded,
                task,
                membrane=parse_classes(membrane),
                codecs=[name for name in codecs.split(",") if name],
                ratios=parse_ratios(ratios),
                roi=roi,
                chunk=None if chunk is None else parse_shape(chunk),
                connection=connection,
                listener=listener,
            )
        if as_json:
            scores = [dataclasses.asdict(score) for score in traced.scores]
            show({"scores": scores, "missing": traced.missing}, as_json=as_json)
        else:
            Console().print((Path(output) / TASK_FILE).read_text(), markup=False)
        return
    with progress(quiet=as_json) as listener:
        found = run(
            source,
            output,
            loaded,
            codecs=[name for name in codecs.split(",") if name],
            ratios=parse_ratios(ratios),
            roi=roi,
            chunk=None if chunk is None else parse_shape(chunk),
            exact_fill=exact_fill,
            connection=connection,
            listener=listener,
        )
    if as_json:
        points = [dataclasses.asdict(point) for point in found.points]
        show({"points": points, "missing": found.missing, "report": output}, as_json=as_json)
    else:
        Console().print(to_markdown(found, source), markup=False)


@app.command()
def decompress(
    archive: Archive,
    destination: Annotated[str, typer.Argument(metavar="DST", help="Where the plain zarr volume goes.")],
    workers: Workers = 1,
    worker_cpus: WorkerCpus = None,
    serial: Serial = False,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Write an archive out as a plain OME-Zarr volume."""
    from ucray.cluster import jobs

    with progress(quiet=as_json) as listener:
        done = jobs.decompress(
            archive,
            destination,
            workers=workers,
            worker_cpus=worker_cpus,
            serial=serial,
            connection=jobs.Connection(endpoint_url),
            listener=listener,
        )
    show(dataclasses.asdict(done), as_json=as_json)


@app.command()
def serve(
    archive: Archive,
    source: Annotated[str | None, typer.Option(help="Show this source beside it.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    cache: Annotated[
        str | None, typer.Option(help="What chunks that are kept may take; 512MiB by default.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Chunks decoded at once; a core each.")] = None,
    waiting: Annotated[
        int | None, typer.Option(min=0, help="Chunks that may wait, beyond them 503; 256 by default.")
    ] = None,
    endpoint_url: Endpoint = None,
    array: ArrayName = None,
    select: Select = None,
) -> None:
    """Serve an archive over HTTP: zarr v3, neuroglancer precomputed, a viewer, metrics."""
    from ucray.cluster import jobs
    from ucray.serve import gateway, start

    limits = jobs.checked(gateway.Limits, {"cache": cache, "threads": threads, "waiting": waiting})
    volume = None if source is None else jobs.Connection(endpoint_url, array, select).open(source)
    Console(stderr=True).print(f"http://{host}:{port}/", highlight=False)
    start.serve(archive, volume, host=host, port=port, limits=limits, endpoint_url=endpoint_url)


@app.command()
def report(
    archive: Archive,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="File of the report.")],
    source: Annotated[str | None, typer.Option(help="Show this source beside what is decoded.")] = None,
    endpoint_url: Endpoint = None,
    array: ArrayName = None,
    select: Select = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML file: figures, where the bits are, the worst chunks, how it was made."""
    from ucray.cluster.jobs import Connection
    from ucray.report import write_report

    volume = None if source is None else Connection(endpoint_url, array, select).open(source)
    place = write_report(archive, output, volume, endpoint_url)
    show({"report": str(place), "bytes": place.stat().st_size}, as_json=as_json)


@app.command()
def verify(
    archive: Archive,
    source: Annotated[str | None, typer.Option(help="Compare every voxel with this source.")] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Look into that many shards alone, drawn at random.")
    ] = None,
    workers: Workers = 1,
    worker_cpus: WorkerCpus = None,
    serial: Serial = False,
    endpoint_url: Endpoint = None,
    array: ArrayName = None,
    select: Select = None,
    as_json: AsJson = False,
) -> None:
    """Check that an archive is whole; exits with 1 if it is not."""
    from ucray.cluster import jobs

    with progress(quiet=as_json) as listener:
        found = jobs.verify(
            archive,
            source,
            sample=sample,
            workers=workers,
            worker_cpus=worker_cpus,
            serial=serial,
            connection=jobs.Connection(endpoint_url, array, select),
            listener=listener,
        )
    show(dataclasses.asdict(found) | {"clean": found.clean}, as_json=as_json)
    if not found.clean:
        raise typer.Exit(1)


@app.command()
def info(archive: Archive, endpoint_url: Endpoint = None, as_json: AsJson = False) -> None:
    """Say what an archive holds, how large and how good it is."""
    from ucray.cluster import jobs

    show(jobs.info(archive, connection=jobs.Connection(endpoint_url)), as_json=as_json)


def main() -> None:
    """Entry point: errors of ours become one line and their exit status, and so does SIGTERM."""
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except UcrayError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except SystemExit as ended:
        if ended.code == STOPPED:
            print("stopped; the same command goes on where this one ended", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    # No error of ours: a worker's loop would take it for one of its shard.
    raise SystemExit(STOPPED)
