"""The command that measures ucray beside its peers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ucray.arguments import (
    ArrayName,
    AsJson,
    Chunk,
    Endpoint,
    ExactFill,
    Networks,
    NetworkSteps,
    Roi,
    Select,
    Source,
    Tracers,
)
from ucray.console import progress, show
from ucray.grid import parse_shape

if TYPE_CHECKING:
    # Whoever asks for --help does not wait for what a job needs.
    from ucray.cluster.connection import Connection
    from ucray.cluster.tracing import Tracing
    from ucray.codec.weights import Weights


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
    tracers: Tracers = 1,
    network_steps: NetworkSteps = 0,
    networks: Networks = None,
    endpoint_url: Endpoint = None,
    array: ArrayName = None,
    select: Select = None,
    as_json: AsJson = False,
) -> None:
    """Code a volume with ucray and its peers: tables, plots and BD-rates in a folder."""
    from ucray.cluster.benchmark import parse_ratios
    from ucray.cluster.connection import Connection
    from ucray.cluster.tracing import Tracing, parse_classes
    from ucray.cluster.weights_store import load_weights

    if (device is not None) + pipeline + (levels is not None) + (task is not None) > 1:
        raise typer.BadParameter("--pipeline, --device, --levels, --task: ask for one")
    if (task is None) != (labels is None):
        raise typer.BadParameter("--task and --labels go together")
    if task is None and (membrane or (tracers, network_steps) != (1, 0)):
        raise typer.BadParameter("--membrane, --tracers and --network-steps go with --task")
    if networks is not None and not network_steps:
        raise typer.BadParameter("--networks goes with --network-steps")
    if (device is not None or pipeline or levels is not None) and (codecs or chunk or not exact_fill):
        raise typer.BadParameter(
            "--codecs, --chunk and --no-exact-fill do not go with --pipeline, --device, --levels"
        )
    connection = Connection(endpoint_url, array, select)
    names = [name for name in codecs.split(",") if name]
    asked = parse_ratios(ratios)
    shape = None if chunk is None else parse_shape(chunk)
    if pipeline:
        _pipeline(source, output, weights, roi, connection, as_json=as_json)
        return
    loaded = None if weights is None else load_weights(weights, endpoint_url)
    if device is not None:
        _stages(source, output, loaded, device, batch, roi, connection, as_json=as_json)
    elif levels is not None:
        _levels(source, output, loaded, levels, asked, roi, connection, as_json=as_json)
    elif task is not None and labels is not None:
        tracing = Tracing(
            source,
            labels,
            parse_classes(membrane),
            roi,
            shape,
            connection,
            tracers=tracers,
            network_steps=network_steps,
            networks=networks,
            exact_fill=exact_fill,
        )
        _task(tracing, output, loaded, task, names, asked, as_json=as_json)
    else:
        how: dict[str, Any] = {"codecs": names, "ratios": asked, "roi": roi, "chunk": shape}
        how |= {"exact_fill": exact_fill, "connection": connection}
        _codecs(source, output, loaded, how, as_json=as_json)


def _codecs(source: str, output: str, weights: Weights | None, how: dict[str, Any], *, as_json: bool) -> None:
    from ucray.bench.report import to_markdown
    from ucray.cluster.benchmark import bench as run

    with progress(quiet=as_json) as listener:
        found = run(source, output, weights, listener=listener, **how)
    points = [dataclasses.asdict(point) for point in found.points]
    document = {"points": points, "missing": found.missing, "report": output}
    _show(document, to_markdown(found, source), as_json=as_json)


def _pipeline(
    source: str, output: str, weights: str | None, roi: str | None, connection: Connection, *, as_json: bool
) -> None:
    from ucray.cluster.efficiency import measure_pipeline

    speeds = measure_pipeline(source, output, weights, roi=roi, connection=connection)
    document = dataclasses.asdict(speeds) | {"efficiency": speeds.efficiency}
    _show(document, speeds.to_markdown(), as_json=as_json)


def _stages(
    source: str,
    output: str,
    weights: Weights | None,
    device: str,
    batch: int,
    roi: str | None,
    connection: Connection,
    *,
    as_json: bool,
) -> None:
    from ucray.cluster.benchmark import STAGES_FILE, time_stages

    stages = time_stages(source, output, weights, device, batch, roi=roi, connection=connection)
    document = {"stages": [dataclasses.asdict(stage) for stage in stages]}
    _show(document, (Path(output) / STAGES_FILE).read_text(), as_json=as_json)


def _levels(
    source: str,
    output: str,
    weights: Weights | None,
    levels: int,
    ratios: list[float],
    roi: str | None,
    connection: Connection,
    *,
    as_json: bool,
) -> None:
    from ucray.cluster.benchmark import LEVELS_FILE, compare_levels

    compared = compare_levels(source, output, weights, levels, ratios=ratios, roi=roi, connection=connection)
    document = {"levels": [dataclasses.asdict(point) for point in compared]}
    _show(document, (Path(output) / LEVELS_FILE).read_text(), as_json=as_json)


def _task(
    tracing: Tracing,
    output: str,
    weights: Weights | None,
    task: str,
    codecs: list[str],
    ratios: list[float],
    *,
    as_json: bool,
) -> None:
    from ucray.bench.task_report import TASK_FILE
    from ucray.cluster.tracing import trace

    with progress(quiet=as_json) as listener:
        traced = trace(tracing, output, weights, task, codecs=codecs, ratios=ratios, listener=listener)
    document = {"scores": [dataclasses.asdict(score) for score in traced.scores], "missing": traced.missing}
    _show(document, (Path(output) / TASK_FILE).read_text(), as_json=as_json)


def _show(document: dict[str, Any], markdown: str, *, as_json: bool) -> None:
    """One JSON document for scripts, the report's table for people."""
    if as_json:
        show(document, as_json=True)
    else:
        Console().print(markdown, markup=False)
