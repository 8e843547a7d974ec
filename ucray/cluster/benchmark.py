"""`ucray bench` as a job: read a region of a volume, run the benchmark on it, write the report."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ucray.bench.levels import LevelPoint, levels_to_markdown, measure_levels
from ucray.bench.report import report_folder, write_report
from ucray.bench.run import RATIOS, Bench, run_bench
from ucray.bench.stages import Stage, measure_stages, stages_to_markdown
from ucray.cluster.connection import Connection
from ucray.cluster.plan import config_for
from ucray.cluster.rate import data_range
from ucray.cluster.telemetry import Event, Listener, ignore
from ucray.codec.shipped import shipped_for, shipped_weights
from ucray.codec.weights import Weights
from ucray.config import default_chunk
from ucray.errors import SettingsError
from ucray.grid import Box, Shape3, parse_box
from ucray.storage.volume import Volume
from ucray.zarr_level import level_factors

STAGES_FILE = "stages.md"
LEVELS_FILE = "levels.md"
STAGES_QUALITY = 128

LARGEST = 1 << 31
"""Voxels that a benchmark holds in memory at once."""


def parse_ratios(text: str) -> list[float]:
    """Parse ratios with commas between; each above 1."""
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        raise SettingsError(f"--ratios {text}: not numbers with commas between") from None
    if not all(1 < ratio < math.inf for ratio in ratios):
        raise SettingsError(f"--ratios {text}: every ratio must be above 1")
    return ratios


def bench(
    source: str,
    folder: str,
    weights: Weights | None,
    *,
    codecs: Sequence[str] = (),
    ratios: Sequence[float] = RATIOS,
    roi: str | None = None,
    chunk: Shape3 | None = None,
    exact_fill: bool = True,
    connection: Connection = Connection(),
    listener: Listener = ignore,
) -> Bench:
    """Measure ucray and its peers on a volume, and leave the report in a folder.

    Raises
    ------
    SettingsError
        If a codec is unknown, or the region is empty or too large for one machine.
    """
    volume = connection.open(source)
    if not exact_fill:
        volume = volume.without_fill()
    region, voxels = read_region(volume, roi)
    weights = fitting_weights(volume, weights)
    if chunk is None:
        chunk = default_chunk(config_for(volume) if weights is None else weights.config)
    done = 0

    def watch(codec: str) -> None:
        nonlocal done
        listener(Event("bench", done, len(codecs) or 1, codec))
        done += 1

    title = f"{source.rstrip('/').rpartition('/')[2]} {region}"
    # Hours may lie between the first codec and the last: a run that is cut off leaves what it has.
    return run_bench(
        voxels,
        weights,
        chunk,
        codecs=codecs,
        ratios=ratios,
        data_range=data_range([voxels], volume.dtype, volume.fill_value),
        fill_value=volume.fill_value,
        watch=watch,
        so_far=lambda found: write_report(found, folder, title),
    )


def time_stages(
    source: str,
    folder: str,
    weights: Weights | None,
    device: str,
    batch: int,
    *,
    roi: str | None = None,
    connection: Connection = Connection(),
) -> list[Stage]:
    """Time the stages of the codec on chunks of a volume; leaves a table in a folder.

    Raises
    ------
    SettingsError
        If there are no weights, no such device, or no whole chunk.
    """
    if weights is None:
        raise SettingsError("--device times the stages of the codec; give --weights")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise SettingsError(f"--device {device}: no such device here")
    _, voxels = read_region(connection.open(source), roi)
    stages = measure_stages(
        voxels, weights, default_chunk(weights.config), quality=STAGES_QUALITY, device=device, batch=batch
    )
    place = report_folder(folder)
    (place / STAGES_FILE).write_text(stages_to_markdown(stages, STAGES_QUALITY, batch))
    return stages


def compare_levels(
    source: str,
    folder: str,
    weights: Weights | None,
    levels: int,
    *,
    ratios: Sequence[float] = RATIOS,
    roi: str | None = None,
    connection: Connection = Connection(),
) -> list[LevelPoint]:
    """Measure coarser levels averaged from the decoded volume, and coded of their own; leaves a table.

    Raises
    ------
    SettingsError
        If there are no weights.
    """
    if weights is None:
        raise SettingsError("--levels compares at qualities of one codec; give --weights")
    volume = connection.open(source)
    _, voxels = read_region(volume, roi)
    points = measure_levels(
        voxels,
        weights,
        default_chunk(weights.config),
        level_factors(volume.space.scale, levels),
        ratios,
        data_range([voxels], volume.dtype, volume.fill_value),
    )
    place = report_folder(folder)
    (place / LEVELS_FILE).write_text(levels_to_markdown(points))
    return points


def fitting_weights(volume: Volume, weights: Weights | None) -> Weights | None:
    """The weights given, or else those that ship for such voxels; None where none do."""
    if weights is None and (name := shipped_for(config_for(volume))) is not None:
        return shipped_weights(name)
    return weights


def read_region(volume: Volume, roi: str | None) -> tuple[Box, npt.NDArray[np.generic]]:
    """The region to be measured, and its voxels.

    Raises
    ------
    SettingsError
        If it is empty or too large for one machine.
    """
    region = Box((0, 0, 0), volume.shape) if roi is None else parse_box(roi, volume.shape)
    if region.voxels > LARGEST:
        raise SettingsError(f"{region} is too large to be coded in memory; give a smaller --roi")
    return region, volume.read(region)
