"""`ucray serve`: open an archive, and its source, and serve them until told to stop."""

from __future__ import annotations

from typing import Any

import uvicorn

from ucray.errors import SettingsError
from ucray.reader import Reader
from ucray.reader import open as open_reader
from ucray.serve.gateway import Limits, gateway
from ucray.serve.scales import archive_image, source_image
from ucray.storage.volume import Volume

CONNECTIONS = 1000
"""Connections at once; more are answered 503."""

KEPT_OPEN = 75
"""Seconds that an idle connection is kept: someone who looks at a picture asks again."""


def application(archive: str, source: Volume | None, limits: Limits, endpoint_url: str | None) -> Any:
    """The gateway's application for an archive, and its source beside it.

    Raises
    ------
    ArchiveError
        If there is no archive.
    SettingsError
        If the source is of another shape or dtype than what was compressed.
    """
    remote = archive.startswith("s3://") and endpoint_url is not None
    reader = open_reader(archive, {"endpoint_url": endpoint_url} if remote else None)
    images = [archive_image(reader)]
    if source is not None:
        if source.dtype != images[0].dtype:
            raise SettingsError(f"{source.url} holds {source.dtype}, the archive {images[0].dtype}")
        images.insert(0, source_image(source, str(reader.settings["region"]), images[0]))
    return gateway(images, {"archive": archive, "figures": _figures(reader)}, limits)


def serve(
    archive: str,
    source: Volume | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    endpoint_url: str | None = None,
) -> None:
    """Serve an archive over HTTP until the process is told to stop."""
    app = application(archive, source, limits or Limits(), endpoint_url)
    uvicorn.run(
        app,
        host=host,
        port=port,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEPT_OPEN,
        log_level="warning",
    )


def _figures(reader: Reader) -> dict[str, str]:
    edges, unit = reader.voxel_size
    return {
        "voxels": f"{' x '.join(map(str, reader.shape))} {reader.dtype}",
        "voxel size": " x ".join(f"{edge:g}" for edge in edges) + (f" {unit}" if unit else ""),
        "before compression": f"{reader.nbytes / 1e6:,.1f} MB",
        "asked for": reader.target,
        "weights": str(reader.settings["weights_digest"])[:12],
    }
