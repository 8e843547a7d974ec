"""What a training learns from each of its volumes, and how its tiles are read. No torch in here.

Read tasks import this module: torch takes seconds and 200 MB of each of their processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy.typing as npt
import ray.data

from ucray.cluster.ingest import BoxSource, one_row, voxels_of
from ucray.cluster.plan import sample_boxes, training_boxes
from ucray.codec.chunk import normalisation
from ucray.errors import SourceError
from ucray.grid import Box, Shape3
from ucray.storage.volume import Volume
from ucray.training.tissue import is_tissue

SAMPLES = 24
"""Tiles that say how a volume is normalised."""

READS = 4
"""Tiles of a volume read at once: there are few, and each process that reads takes seconds to begin."""


@dataclass(frozen=True)
class Lesson:
    """What is learnt from one volume: the boxes of its tiles, and how its voxels are normalised."""

    volume: Volume
    boxes: tuple[Box, ...]
    offset: float
    scale: float


def prepare_lesson(volume: Volume, region: Box, chunk: Shape3, tiles: int, seed: int) -> Lesson:
    """Choose tiles of a region of a volume, each some chunks large.

    Raises
    ------
    SourceError
        If the volume cannot be read, or holds nothing but fill there.
    """
    boxes = [box.shifted(region.start) for box in training_boxes(region.shape, chunk, tiles, seed)]
    samples = [volume.read(box) for box in sample_boxes(boxes, SAMPLES)]
    if not any(is_tissue(sample, volume.fill_value) for sample in samples):
        raise SourceError(f"{volume.url} holds little but fill in {region}; there is nothing to train on")
    return Lesson(volume, tuple(boxes), *normalisation(samples, volume.fill_value))


def tiles_of(number: int, lesson: Lesson) -> ray.data.Dataset:
    """The tiles of one lesson that teach anything, rows of BoxSource; their keys start with its number."""
    volume = lesson.volume
    source = BoxSource(volume, [(f"{number}/{box}", box) for box in lesson.boxes])
    kept = partial(_tissue_rows, dtype=volume.dtype, fill_value=volume.fill_value)
    reads = min(READS, len(lesson.boxes))
    dataset: ray.data.Dataset = ray.data.read_datasource(source, num_cpus=0.25, concurrency=reads)
    return dataset.map_batches(kept, batch_size=1, num_cpus=0.25, concurrency=reads)


def lesson_of(key: str) -> int:
    """The number of the lesson that a row's tile belongs to."""
    return int(key.partition("/")[0])


def _tissue_rows(
    batch: dict[str, npt.NDArray[Any]], dtype: str, fill_value: float
) -> dict[str, npt.NDArray[Any]]:
    """A batch of one tile, or of none if it cannot be read or teaches nothing."""
    row = one_row(batch)
    kept = not row["error"] and is_tissue(voxels_of(row, dtype), fill_value)
    return batch if kept else {name: column[:0] for name, column in batch.items()}
