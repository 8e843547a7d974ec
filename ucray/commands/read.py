"""Commands that show and check archives."""

from __future__ import annotations

import dataclasses
import signal
from typing import Annotated

import typer
from rich.console import Console

from ucray.arguments import (
    Archive,
    ArrayName,
    AsJson,
    Endpoint,
    Select,
    Serial,
    WorkerCpus,
    Workers,
)
from ucray.console import progress, show


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
    from ucray.cluster.connection import Connection
    from ucray.cluster.options import checked
    from ucray.serve import gateway, start

    limits = checked(gateway.Limits, {"cache": cache, "threads": threads, "waiting": waiting})
    volume = None if source is None else Connection(endpoint_url, array, select).open(source)
    Console(stderr=True).print(f"http://{host}:{port}/", highlight=False)
    # Told to stop it has done what it was asked for: there is nothing to go on with, as there is with a job.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start.serve(archive, volume, host=host, port=port, limits=limits, endpoint_url=endpoint_url)


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
    from ucray.cluster.connection import Connection
    from ucray.report import write_report

    volume = None if source is None else Connection(endpoint_url, array, select).open(source)
    place = write_report(archive, output, volume, endpoint_url)
    show({"report": str(place), "bytes": place.stat().st_size}, as_json=as_json)


def verify(
    archive: Archive,
    source: Annotated[str | None, typer.Option(help="Compare every voxel with this source.")] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Look into that many shards alone, drawn at random.")
    ] = None,
    workers: Workers = None,
    worker_cpus: WorkerCpus = None,
    serial: Serial = False,
    endpoint_url: Endpoint = None,
    array: ArrayName = None,
    select: Select = None,
    as_json: AsJson = False,
) -> None:
    """Check that an archive is whole; exits with 1 if it is not."""
    from ucray.cluster import jobs
    from ucray.cluster.connection import Connection

    with progress(quiet=as_json) as listener:
        found = jobs.verify(
            archive,
            source,
            sample=sample,
            workers=workers,
            worker_cpus=worker_cpus,
            serial=serial,
            connection=Connection(endpoint_url, array, select),
            listener=listener,
        )
    show(dataclasses.asdict(found) | {"clean": found.clean}, as_json=as_json)
    if not found.clean:
        raise typer.Exit(1)


def info(archive: Archive, endpoint_url: Endpoint = None, as_json: AsJson = False) -> None:
    """Say what an archive holds, how large and how good it is."""
    from ucray.cluster import jobs
    from ucray.cluster.connection import Connection

    show(jobs.info(archive, connection=Connection(endpoint_url)), as_json=as_json)
