"""The command that teaches a tracer."""

from __future__ import annotations

from typing import Annotated

import typer

from ucray.arguments import ArrayName, AsJson, Endpoint, Roi, Select, Source
from ucray.console import progress, show


def tracer(
    source: Source,
    destination: Annotated[str, typer.Argument(metavar="TRACER", help="Where the tracer goes.")],
    labels: Annotated[str, typer.Option(help="Volume of neurons by number, or of classes (--membrane).")],
    membrane: Annotated[str, typer.Option(help="Classes of --labels that are membrane, with commas.")] = "",
    network_steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps in which it learns.")] = 3000,
    roi: Roi = None,
    endpoint_url: Endpoint = None,
    array: ArrayName = None,
    select: Select = None,
    as_json: AsJson = False,
) -> None:
    """Teach a U-Net where membranes are, for compress --traced-by."""
    from ucray.cluster.connection import Connection
    from ucray.cluster.tracing import Tracing, parse_classes, teach

    tracing = Tracing(
        source,
        labels,
        parse_classes(membrane),
        roi,
        connection=Connection(endpoint_url, array, select),
        network_steps=network_steps,
    )
    with progress(quiet=as_json) as listener:
        taught = teach(tracing, destination, listener=listener)
    show({"tracer": destination, "steps": network_steps, "bytes": len(taught.to_bytes())}, as_json=as_json)
