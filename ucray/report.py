"""`ucray report`: one HTML file of an archive: how well it is, where its bits are, where it is worst."""

from __future__ import annotations

import base64
import heapq
import html
import io
import math
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ucray.errors import ArchiveError, DestinationError, SettingsError
from ucray.grid import Box, Shape3, add, parse_box, triple
from ucray.quality import ErrorSum
from ucray.reader import Reader
from ucray.reader import open as open_reader
from ucray.storage.archive import Archive, archive_bytes, open_archive
from ucray.storage.volume import Volume

LARGEST_MAP = 96
"""Cells of a map on each axis; of a larger volume a cell is several chunks."""

LAYERS = 12
"""Maps, spread over z."""

WORST = 6
"""Chunks that are shown."""

BINS = 24

RAMP = np.array([[247, 244, 249], [201, 148, 199], [221, 28, 119], [73, 0, 36]], np.float32)
"""Colours of few bits to many."""

EMPTY = (128, 128, 128)
"""Where nothing is stored."""


@dataclass
class Survey:
    """Sums over the statistics of an archive, cell by cell of its map.

    `psnr` counts chunks by hundredths of a decibel, so that it does not grow with the archive. `worst` are
    chunks with their squared error.
    """

    cell: Shape3
    bits: npt.NDArray[np.float64]
    voxels: npt.NDArray[np.float64]
    psnr: Counter[float] = field(default_factory=Counter)
    worst: list[tuple[float, Shape3, Shape3]] = field(default_factory=list)
    error: ErrorSum = field(default_factory=ErrorSum)
    kinds: dict[str, int] = field(default_factory=dict)
    shards: int = 0


def write_report(
    url: str, destination: str, source: Volume | None = None, endpoint_url: str | None = None
) -> Path:
    """Write the report of an archive to a new file; with a source, with pictures of both.

    Raises
    ------
    ArchiveError
        If there is no archive, or no shard of it.
    DestinationError
        If the file exists or cannot be written.
    SettingsError
        If the source does not hold the archive's region.
    """
    archive = open_archive(url, endpoint_url)
    survey = survey_of(archive)
    if not survey.shards:
        raise ArchiveError(f"{url} holds no shard yet")
    region = None if source is None else parse_box(archive.settings.region, source.shape)
    if source is not None and source.dtype != archive.settings.dtype:
        raise SettingsError(f"{source.url} holds {source.dtype}, the archive {archive.settings.dtype}")
    reader = open_reader(url, {"endpoint_url": endpoint_url} if url.startswith("s3://") else None)
    page = Template(files("ucray").joinpath("report.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(url),
        figures=_rows(_figures(archive, survey)),
        maps=_maps(survey),
        histogram=_histogram(survey.psnr),
        worst=_worst(survey, reader, source, region),
        settings=_rows(_settings(archive) | _provenance(reader)),
        version=html.escape(version("ucray")),
    )
    place = Path(destination)
    try:
        with place.open("x", encoding="utf-8") as file:
            file.write(page)
    except FileExistsError:
        raise DestinationError(f"{destination} exists; give another name") from None
    except OSError as error:
        raise DestinationError(f"{destination} cannot be written: {error}") from None
    return place


def survey_of(archive: Archive) -> Survey:
    """One pass over an archive's statistics."""
    settings = archive.settings
    grid = settings.grid
    counts = [-(-n // c) for n, c in zip(grid.shape, grid.chunk, strict=True)]
    cell = triple(c * -(-n // LARGEST_MAP) for n, c in zip(counts, grid.chunk, strict=True))
    shape = triple(-(-n // c) for n, c in zip(grid.shape, cell, strict=True))
    survey = Survey(cell, np.zeros(shape), np.zeros(shape))
    for statistics in archive.all_statistics():
        survey.shards += 1
        survey.error += statistics.error
        origins = {slot: box for slot, _, box in grid.chunk_boxes(statistics.index)}
        for chunk in statistics.chunks:
            box = origins[chunk.slot]
            place = triple(n // c for n, c in zip(box.start, cell, strict=True))
            survey.bits[place] += 8 * chunk.bytes
            survey.voxels[place] += chunk.voxels
            survey.kinds[chunk.kind] = survey.kinds.get(chunk.kind, 0) + 1
            if chunk.kind != "empty":
                total = ErrorSum(chunk.voxels, chunk.mse * chunk.voxels, chunk.max_error)
                survey.psnr[round(total.psnr(settings.data_range), 2)] += 1
                heapq.heappush(survey.worst, (chunk.mse, box.start, box.stop))
                if len(survey.worst) > WORST:
                    heapq.heappop(survey.worst)
    return survey


def _figures(archive: Archive, survey: Survey) -> dict[str, str]:
    settings = archive.settings
    sizes = archive.sizes()
    stored, weights = archive_bytes(archive, sizes)
    planned = math.prod(settings.grid.shards)
    psnr = survey.error.psnr(settings.data_range)
    return {
        "ratio": f"{settings.bytes_in / stored:.2f}" if survey.shards == planned else "not finished",
        "PSNR": f"{psnr:.2f} dB" if math.isfinite(psnr) else "exact",
        "largest error": f"{survey.error.maximum:g}",
        "before": _bytes(settings.bytes_in),
        "stored": f"{_bytes(stored)} and {_bytes(weights)} of weights",
        "shards": f"{survey.shards:,} of {planned:,}",
        "chunks": ", ".join(f"{count:,} {kind}" for kind, count in sorted(survey.kinds.items())),
    }


def _settings(archive: Archive) -> dict[str, str]:
    settings = archive.settings
    described = settings.model_dump(mode="json")
    described["target"] = ", ".join(f"{name} {value:g}" for name, value in settings.target.items())
    described |= {name: "x".join(map(str, described[name])) for name in ("shape", "chunk", "shard")}
    return {n.replace("_", " "): str(value) for n, value in described.items() if value not in ("", None, [])}


def _provenance(reader: Reader) -> dict[str, str]:
    told: Any = reader.attributes.get("provenance", {})
    versions = told.get("versions", {})
    found = {"command": str(told["command"])} if "command" in told else {}
    if expected := told.get("expected"):
        found["expected"] = ", ".join(
            f"{name} {value}" for name, value in expected.items() if value is not None
        )
    return found | ({"versions": ", ".join(f"{n} {v}" for n, v in versions.items())} if versions else {})


def _rows(values: dict[str, str]) -> str:
    return "".join(f"<tr><th>{html.escape(n)}</th><td>{html.escape(v)}</td></tr>" for n, v in values.items())


def _maps(survey: Survey) -> str:
    """Bits a voxel, one map a layer of z, all in the same colours."""
    with np.errstate(invalid="ignore"):
        rate = survey.bits / survey.voxels
    found = rate[np.isfinite(rate)]
    low, high = float(found.min()), float(found.max())
    layers = np.unique(np.linspace(0, len(rate) - 1, min(LAYERS, len(rate))).round().astype(int))
    figures = []
    for layer in layers:
        share = (rate[layer] - low) / max(high - low, 1e-12)
        colours = np.where(np.isfinite(share)[..., None], _ramp(np.nan_to_num(share)), np.array(EMPTY))
        begin = layer * survey.cell[0]
        figures.append(
            f'<figure><img class="map" alt="bits a voxel from z = {begin}" src="{_png(colours)}">'
            f"<figcaption>z from {begin}</figcaption></figure>"
        )
    scale = _png(_ramp(np.linspace(0, 1, 64))[None])
    legend = (
        f'<p class="legend">{low:.3g} <img alt="few to many" src="{scale}"> {high:.3g} bits a voxel; '
        f"a cell is {' x '.join(map(str, survey.cell))} voxels</p>"
    )
    return f'<div class="row">{"".join(figures)}</div>{legend}'


def _ramp(share: npt.NDArray[Any]) -> npt.NDArray[Any]:
    places = np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(share, places, RAMP[:, channel]) for channel in range(3)], -1)


def _histogram(psnr: Counter[float]) -> str:
    """Chunks by PSNR, as bars that take the colour of the text."""
    finite = {value: count for value, count in psnr.items() if math.isfinite(value)}
    exact = psnr.total() - sum(finite.values())
    told = f"<p>{exact:,} chunks are exact.</p>" if exact else ""
    if not finite:
        return told
    counts, edges = np.histogram(list(finite), BINS, weights=list(finite.values()))
    width = 600 / BINS
    bars = "".join(
        f'<rect x="{n * width + 1:.1f}" y="{150 - 150 * count / counts.max():.1f}" width="{width - 2:.1f}" '
        f'height="{150 * count / counts.max():.1f}"><title>{edges[n]:.2f} to {edges[n + 1]:.2f} dB: '
        f"{count} chunks</title></rect>"
        for n, count in enumerate(counts)
    )
    marks = "".join(f"<span>{value:.1f} dB</span>" for value in (edges[0], edges[BINS // 2], edges[-1]))
    return (
        f'<svg viewBox="0 0 600 150" role="img" aria-label="chunks by PSNR">{bars}</svg>'
        f'<p class="marks">{marks}</p>{told}'
    )


def _worst(survey: Survey, reader: Reader, source: Volume | None, region: Box | None) -> str:
    """The chunks of the largest squared error: their middle slices, and the source's beside them."""
    parts = []
    for mse, start, stop in sorted(survey.worst, reverse=True):
        box = Box(start, stop)
        decoded = np.asarray(reader[box.slices])
        middle = len(decoded) // 2
        planes = {"decoded": decoded[middle]}
        if source is not None and region is not None:
            planes = {"original": source.read(box.shifted(region.start))[middle]} | planes
        first = next(iter(planes.values())).astype(np.float32)
        low, high = (
            np.nanpercentile(first[np.isfinite(first)], [1, 99]) if np.isfinite(first).any() else (0, 1)
        )
        pictures = [
            f'<figure><img class="chunk" alt="{name}" src="{_png(_grey(plane, low, high))}">'
            f"<figcaption>{name}</figcaption></figure>"
            for name, plane in planes.items()
        ]
        if "original" in planes:
            off = np.abs(planes["decoded"].astype(np.float32) - first)
            shown = _png(_grey(off, 0, max(high - low, 1e-9) / 4))
            pictures.append(
                f'<figure><img class="chunk" alt="error" src="{shown}">'
                "<figcaption>error, four times</figcaption></figure>"
            )
        corner = ", ".join(map(str, add(start, (middle, 0, 0))))
        parts.append(
            f'<section class="worst"><h3>({corner})</h3><p>root mean squared error {math.sqrt(mse):.3g}</p>'
            f'<div class="row">{"".join(pictures)}</div></section>'
        )
    return "".join(parts) or "<p>Nothing is stored that could be wrong.</p>"


def _grey(plane: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[Any]:
    share = np.nan_to_num((plane.astype(np.float32) - low) / max(high - low, 1e-9))
    return np.repeat(np.clip(share, 0, 1)[..., None] * 255, 3, -1)


def _png(colours: npt.NDArray[Any]) -> str:
    file = io.BytesIO()
    Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8)).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000  # type: ignore[assignment]
    return f"{count:,.4g} {unit}"
