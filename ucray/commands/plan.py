"""Commands that say what a job would do, before it does it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ucray.arguments import (
    ArrayName,
    AsJson,
    Chunk,
    Device,
    Endpoint,
    ExactFill,
    Importance,
    Lossless,
    MaxError,
    Memory,
    Networks,
    NetworkSteps,
    Psnr,
    Ratio,
    Roi,
    Select,
    Shard,
    Source,
    TracedBy,
    Tracers,
    WeightsName,
    Workers,
)
from ucray.console import progress, show_plan
from ucray.grid import parse_shape

if TYPE_CHECKING:
    # Whoever asks for --help does not wait for what a job needs.
    from ucray.cluster.plan import CompressOptions
    from ucray.cluster.tracing import Tracing

CURVE = "ucray-seg-loss.png"


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
    traced_by: TracedBy = None,
    memory: Memory = None,
    workers: Workers = None,
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
    tracers: Tracers = 1,
    network_steps: NetworkSteps = 0,
    networks: Networks = None,
    curve: Annotated[
        str | None, typer.Option(help=f"PNG of what is lost at which ratio; {CURVE} by default.")
    ] = None,
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
    """Code a few chunks, and say what compressing all would give, take and cost; writes no archive."""
    from ucray.cluster.connection import Connection
    from ucray.cluster.cost import Prices
    from ucray.cluster.options import checked, options_from, run_options_from
    from ucray.cluster.tracing import Tracing, parse_classes

    if (max_seg_loss is None) != (labels is None):
        raise typer.BadParameter("--max-seg-loss and --labels go together")
    if max_seg_loss is None and (membrane or curve is not None or (tracers, network_steps) != (1, 0)):
        raise typer.BadParameter("--membrane, --tracers, --network-steps and --curve go with --max-seg-loss")
    if networks is not None and not network_steps:
        raise typer.BadParameter("--networks goes with --network-steps")
    connection = Connection(endpoint_url, array, select)
    choice = None
    if max_seg_loss is not None and labels is not None:
        if (ratio, psnr, max_error, lossless) != (None, None, None, False):
            raise typer.BadParameter("--max-seg-loss chooses the ratio; give no other target")
        if importance is not None or traced_by is not None:
            raise typer.BadParameter(
                "--max-seg-loss traces what is coded without --importance and --traced-by; give neither"
            )
        tracing = Tracing(
            source,
            labels,
            membrane=parse_classes(membrane),
            roi=roi,
            chunk=None if chunk is None else parse_shape(chunk),
            connection=connection,
            tracers=tracers,
            network_steps=network_steps,
            networks=networks,
            exact_fill=exact_fill,
        )
        choice = _chosen(tracing, weights, max_seg_loss, curve or CURVE, as_json=as_json)
        ratio, roi = choice["ratio"], None
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
        memory=memory,
    )
    prices = {"gb_month": gb_month, "thousand_puts": thousand_puts, "thousand_gets": thousand_gets}
    prices |= {"core_hour": core_hour, "gpu_hour": gpu_hour}
    show_projection(
        source,
        destination,
        options,
        weights=weights,
        run_options=run_options_from(encode_workers=workers, device=device),
        prices=checked(Prices, prices),
        months=months,
        connection=connection,
        choice=choice,
        as_json=as_json,
    )


def _chosen(
    tracing: Tracing, weights: str | None, percent: float, curve: str, *, as_json: bool
) -> dict[str, Any]:
    """The ratio that keeps a segmentation, and why, as plain values."""
    from ucray.cluster.tracing import choose_ratio
    from ucray.cluster.weights_store import load_weights

    loaded = None if weights is None else load_weights(weights, tracing.connection.endpoint_url)
    with progress(quiet=as_json) as listener:
        choice = choose_ratio(tracing, loaded, percent, curve, listener=listener)
    return dataclasses.asdict(choice) | {"curve": curve}


def show_projection(
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
