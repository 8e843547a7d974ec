"""The HTTP application: images as zarr v3 and precomputed, their figures, a page to look at them, metrics."""

from __future__ import annotations

import asyncio
import gzip
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import ByteSize, Field
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ucray.errors import UcrayError
from ucray.grid import Box, Shape3, triple
from ucray.serve.cache import BusyError, ChunkCache, Payload
from ucray.serve.client import client_folder, client_routes
from ucray.serve.scales import Image
from ucray.settings import Settings

CHUNKS_ARE_FRESH = "public, max-age=3600"
"""Chunks of an archive do not change; an hour spares the question whether they did."""


class Limits(Settings):
    """What the gateway takes at most.

    `cache` bytes of chunks are kept, `threads` chunks are made at once, `waiting` more may wait.
    """

    cache: Annotated[ByteSize, Field(ge=0)] = ByteSize(1 << 29)
    threads: Annotated[int, Field(ge=1)] = os.cpu_count() or 1
    waiting: Annotated[int, Field(ge=0)] = 256


def gateway(images: Sequence[Image], figures: Mapping[str, Any], limits: Limits) -> Starlette:
    """The application that serves images under their names, the first of them being what is to be seen."""
    registry = CollectorRegistry()
    requests = Counter("ucray_serve_requests", "Requests answered.", ["kind", "status"], registry=registry)
    seconds = Histogram("ucray_serve_seconds", "Seconds to an answer.", ["kind"], registry=registry)
    cache = ChunkCache(limits.cache, limits.threads, limits.waiting, registry)
    by_name = {image.name: image for image in images}
    page = files("ucray.serve").joinpath("page.html").read_text(encoding="utf-8")

    def counted(kind: str, answer: Callable[[Request], Awaitable[Response]]) -> Any:
        async def endpoint(request: Request) -> Response:
            started = time.perf_counter()
            try:
                response = await answer(request)
            except BusyError:
                response = Response("too many chunks wait", 503, {"Retry-After": "1"})
            except UcrayError as error:
                # Damaged, or not to be reached: one line, and nothing that passes for voxels.
                response = Response(str(error), 502)
            requests.labels(kind, response.status_code).inc()
            seconds.labels(kind).observe(time.perf_counter() - started)
            return response

        return endpoint

    def image_of(request: Request) -> Image | None:
        return by_name.get(request.path_params["image"])

    async def zarr_metadata(request: Request) -> Response:
        image = image_of(request)
        level = request.path_params.get("level")
        if image is None or (level is not None and level >= len(image.factors)):
            return _missing()
        make = image.group_metadata if level is None else lambda: image.array_metadata(level)
        return _ranged(request, await asyncio.to_thread(make), "application/json")

    async def zarr_chunk(request: Request) -> Response:
        image = image_of(request)
        level, *index = (request.path_params[name] for name in ("level", "z", "y", "x"))
        box = _chunk_box(image, level, triple(iter(index)))
        if image is None or box is None:
            return _missing()
        payload = await cache.get(("zarr", image.name, level, box), lambda: image.zarr_chunk(level, box))
        return _ranged(request, payload.gzipped, "application/octet-stream", payload.etag)

    async def info(request: Request) -> Response:
        image = image_of(request)
        return _missing() if image is None else JSONResponse(image.precomputed_info())

    async def precomputed_chunk(request: Request) -> Response:
        image = image_of(request)
        level = request.path_params["level"]
        box = _precomputed_box(image, level, request.path_params["box"])
        if image is None or box is None:
            return _missing()
        make = lambda: image.precomputed_chunk(level, box)  # noqa: E731
        payload = await cache.get(("precomputed", image.name, level, box), make)
        return _encoded(request, payload)

    async def index(request: Request) -> Response:
        return HTMLResponse(page)

    async def described(request: Request) -> Response:
        return JSONResponse(dict(figures) | {"images": list(by_name), "viewer": client_folder() is not None})

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def health(request: Request) -> Response:
        return Response("well")

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        cache.close()

    cutout = "/{image:str}/precomputed/{level:int}/{box:str}"
    chunk = "/{image:str}/zarr/{level:int}/c/{z:int}/{y:int}/{x:int}"
    return Starlette(
        routes=[
            Route("/", counted("page", index)),
            Route("/figures.json", counted("figures", described)),
            Route("/metrics", metrics),
            Route("/healthz", health),
            *client_routes(images),
            Route("/{image:str}/zarr/zarr.json", counted("metadata", zarr_metadata)),
            Route("/{image:str}/zarr/{level:int}/zarr.json", counted("metadata", zarr_metadata)),
            Route(chunk, counted("zarr", zarr_chunk)),
            Route("/{image:str}/precomputed/info", counted("metadata", info)),
            Route(cutout, counted("precomputed", precomputed_chunk)),
        ],
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origins=["*"],
                allow_methods=["GET", "HEAD"],
                allow_headers=["Range", "If-None-Match"],
                expose_headers=["Content-Range", "Content-Length", "ETag", "Accept-Ranges"],
            )
        ],
        lifespan=lifespan,
    )


def _chunk_box(image: Image | None, level: int, index: Shape3) -> Box | None:
    if image is None or level >= len(image.factors):
        return None
    return image.chunk_box(level, index)


def _precomputed_box(image: Image | None, level: int, text: str) -> Box | None:
    """The chunk that a precomputed name says, x0-x1_y0-y1_z0-z1 from the volume's offset on."""
    if image is None or level >= len(image.factors):
        return None
    try:
        spans = [_precomputed_span(part) for part in text.split("_")]
        offset = image.precomputed_info()["scales"][level]["voxel_offset"]
        start = triple((a - o for (a, _), o in zip(spans, offset, strict=True)))[::-1]
        stop = triple((b - o for (_, b), o in zip(spans, offset, strict=True)))[::-1]
    except ValueError:
        return None
    index = triple(n // c for n, c in zip(start, image.chunk, strict=True))
    box = image.chunk_box(level, index) if min(index) >= 0 else None
    return box if box == Box(start, stop) else None


def _precomputed_span(text: str) -> tuple[int, int]:
    """First voxel and the one behind the last, either below zero or not; raises ValueError."""
    found = re.fullmatch(r"(-?\d{1,18})-(-?\d{1,18})", text, re.ASCII)
    if found is None:
        raise ValueError(text)
    return int(found[1]), int(found[2])


def _missing() -> Response:
    return Response("there is no such thing here", 404)


def _encoded(request: Request, payload: Payload) -> Response:
    headers = {"ETag": payload.etag, "Cache-Control": CHUNKS_ARE_FRESH, "Vary": "Accept-Encoding"}
    if request.headers.get("if-none-match") == payload.etag:
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(
            payload.gzipped, 200, headers | {"Content-Encoding": "gzip"}, "application/octet-stream"
        )
    return Response(gzip.decompress(payload.gzipped), 200, headers, "application/octet-stream")


def _ranged(request: Request, data: bytes, kind: str, etag: str | None = None) -> Response:
    """The data, or the one range of it that is asked for."""
    headers = {"Accept-Ranges": "bytes"}
    if etag is not None:
        headers |= {"ETag": etag, "Cache-Control": CHUNKS_ARE_FRESH}
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
    asked = request.headers.get("range")
    if asked is None:
        return Response(data, 200, headers, kind)
    span = _span(asked, len(data))
    if span is None:
        return Response(status_code=416, headers=headers | {"Content-Range": f"bytes */{len(data)}"})
    start, stop = span
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    return Response(data[start:stop], 206, headers, kind)


def _span(asked: str, size: int) -> tuple[int, int] | None:
    """First byte and the one behind the last of a range; None if it lies outside, or there are several."""
    unit, _, text = asked.partition("=")
    first, dash, last = text.strip().partition("-")
    if unit.strip() != "bytes" or not dash or not (first + last).isascii() or not (first or last).isdigit():
        return None
    try:
        if not first:
            start, stop = max(0, size - int(last)), size
        else:
            start, stop = int(first), min(int(last) + 1, size) if last else size
    except ValueError:
        return None
    return (start, stop) if start < stop else None
