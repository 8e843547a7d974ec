"""The neuroglancer client that its Python package bundles, shown the images of the gateway.

The bundled client takes its configuration and state from a stream of events and tells its own changes
back; here every tab begins with the same state and keeps its changes to itself.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from ucray.serve.scales import Image
from ucray.storage.space import NANOMETERS

TOKEN = "ucray"

KEEP_ALIVE = 15.0
"""Seconds between comments on a stream with nothing to say: a proxy would cut it."""


def client_folder() -> Path | None:
    """Where the bundled client stands; None where the package is not installed."""
    spec = find_spec("neuroglancer")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "static" / "client"
    return folder if (folder / "index.html").is_file() else None


def client_routes(images: Sequence[Image]) -> list[BaseRoute]:
    """Routes of the client; none where it is not installed."""
    folder = client_folder()
    if folder is None:
        return []

    async def events(request: Request) -> Response:
        if "c" not in request.query_params:
            return Response("missing client", status_code=400)
        state = viewer_state(images, str(request.base_url).rstrip("/"))
        return StreamingResponse(_events(state), media_type="text/event-stream")

    async def keep(request: Request) -> Response:
        try:
            told = json.loads(await request.body())
            return JSONResponse({"g": f"{told['c']}/{told['g']}"})
        except (ValueError, KeyError, TypeError):
            return Response("no state", status_code=400)

    return [
        Route(f"/events/{TOKEN}", events),
        Route(f"/state/{TOKEN}", keep, methods=["POST"]),
        Mount(f"/v/{TOKEN}", StaticFiles(directory=folder, html=True)),
    ]


def viewer_state(images: Sequence[Image], base: str) -> dict[str, Any]:
    """A neuroglancer state: one panel an image, side by side, at the middle of the volume."""
    first = images[0]
    unit = NANOMETERS.get(first.space.unit or "nanometer", 1.0) * 1e-9
    names = ("x", "y", "z")
    # A place is counted in voxels from the coordinates' origin, not the volume's.
    middle = [
        n / 2 + t / s for n, t, s in zip(first.shape, first.space.translation, first.space.scale, strict=True)
    ]
    layers = [
        {"type": "image", "name": image.name, "source": f"zarr3://{base}/{image.name}/zarr"}
        for image in images
    ]
    panels = [{"type": "viewer", "layers": [image.name], "layout": "xy"} for image in images]
    return {
        "dimensions": {
            name: [size * unit, "m"] for name, size in zip(names, first.space.scale[::-1], strict=True)
        },
        "position": middle[::-1],
        "crossSectionScale": 1,
        "layers": layers,
        "layout": {"type": "row", "children": panels},
        "showAxisLines": False,
    }


async def _events(state: dict[str, Any]) -> AsyncIterator[str]:
    for key, told in (("c", {}), ("s", state)):
        yield f"data: {json.dumps({'k': key, 's': told, 'g': 'ucray/1'})}\n\n"
    while True:
        await asyncio.sleep(KEEP_ALIVE)
        yield ": here\n\n"
