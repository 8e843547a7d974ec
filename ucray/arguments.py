"""Arguments and options that commands share: their types, limits and help."""

from __future__ import annotations

from typing import Annotated

import typer

Source = Annotated[
    str,
    typer.Argument(
        help="Volume: zarr, OME-Zarr, N5, precomputed, HDF5, TIFF or a folder of TIFF sections; "
        "path, s3:// or http(s)://."
    ),
]
Archive = Annotated[str, typer.Argument(help="Archive: path or s3:// URL.")]
Endpoint = Annotated[
    str | None, typer.Option(help="S3 endpoint; AWS_ENDPOINT_URL serves too.", envvar="AWS_ENDPOINT_URL")
]
ArrayName = Annotated[
    str | None, typer.Option("--array", help="Array within the source: a path, or a scale's key.")
]
Select = Annotated[
    str | None, typer.Option(help="Place on each axis of the source that is not z, y or x, as t=0,c=1.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Serial = Annotated[bool, typer.Option(help="Work in this process, without Ray.")]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Workers that code or decode; by default one for each core, or GPU, and no more than there is "
        "memory for.",
    ),
]
WorkerCpus = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        help="Cores that a worker asks for; by default one, less where no other would stay free, "
        "and in training and beside GPUs the nodes' are shared out.",
        envvar="UCRAY_WORKER_CPUS",
    ),
]

ExactFill = Annotated[
    bool,
    typer.Option(
        "--exact-fill/--no-exact-fill",
        help="Voxels of the volume's fill value come back exactly; without, they are voxels like others.",
    ),
]

Ratio = Annotated[
    float | None, typer.Option(help="Source bytes over archive bytes; 64 if no target is given.")
]
Psnr = Annotated[float | None, typer.Option(help="Reach this PSNR in dB instead.")]
MaxError = Annotated[
    float | None, typer.Option(help="Keep every voxel within this error instead, on any machine.")
]
Lossless = Annotated[bool, typer.Option("--lossless", help="Keep every voxel as it is.")]
WeightsName = Annotated[
    str | None,
    typer.Option(help="Name, path or URL of weights; by default shipped ones, else trained on the volume."),
]
Chunk = Annotated[str | None, typer.Option(help="Chunk shape, as 64,64,64.")]
Shard = Annotated[str | None, typer.Option(help="Shard shape, a multiple of the chunk's.")]
Roi = Annotated[str | None, typer.Option(help="Region z0:z1,y0:y1,x0:x1.")]
Levels = Annotated[
    int, typer.Option(min=0, max=16, help="Coarser levels beside the volume; they take no bytes to speak of.")
]
Importance = Annotated[
    str | None,
    typer.Option(
        help="Weights of voxels' errors, from 0 on: an array as large as the source, "
        "or coarser by whole factors."
    ),
]
TracedBy = Annotated[
    str | None,
    typer.Option(
        metavar="TRACER",
        help="Path or URL of a tracer, of `ucray tracer`: errors weigh by how far they move what it finds.",
    ),
]
Memory = Annotated[str | None, typer.Option(help="What an encode worker may take, as 4GiB; 6GiB by default.")]
Device = Annotated[
    str, typer.Option(help="cpu or cuda; auto is cpu on Ray, and with --serial what is there.")
]
MetricsPort = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Serve Prometheus metrics on this port.")
]
MetricsLinger = Annotated[
    float,
    typer.Option(min=0.0, max=3600.0, help="Seconds to wait, once done, for a last scrape of the metrics."),
]
Tracers = Annotated[
    int,
    typer.Option(min=1, max=100, help="Tracers, of which figures are means: what one finds is chance."),
]
NetworkSteps = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="Find membranes with a U-Net that learns in N steps (3000, say), not with a forest.",
    ),
]
Networks = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Folder or URL of U-Nets of --network-steps that learnt before; new ones are put there too.",
    ),
]
