"""Ray Data sources: boxes of a volume, one lazy read task each."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from ray.data import Datasource
from ray.data.block import Block, BlockAccessor, BlockMetadata
from ray.data.datasource import ReadTask

from ucray.cluster.memory import peak_memory
from ucray.cluster.plan import CompressPlan
from ucray.codec.importance import Weights
from ucray.errors import UcrayError
from ucray.grid import Box, Shape3
from ucray.storage.importance import ImportanceMap
from ucray.storage.volume import Volume

Row = dict[str, Any]


TASKS = 10_000
"""Read tasks of a job at most."""


class BoxSource(Datasource):
    """Reads boxes of a volume; one row and one block a box, and up to TASKS tasks.

    Rows have `key` (the box's name), `voxels` (uint8: the bytes in row-major order), `shape`, `weights` and
    `weights_shape` of the box's cells (float32; no number where there is no importance),
    `read_seconds`, `read_memory` (peak of the process, bytes) and `error`: an unreadable box is a row with
    an error, not the end of the job.
    """

    def __init__(
        self, volume: Volume, boxes: Sequence[tuple[str, Box]], importance: ImportanceMap | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._volume = volume
        self._importance = importance
        self._boxes = boxes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task a box, whatever parallelism is suggested, or a few where there are very many.

        Ray Data keeps every task of a dataset from its beginning on. A task gives its boxes one by one, and
        is held back like one that gives a single one.
        """
        several = -(-len(self._boxes) // TASKS)
        return [self._task(self._boxes[at : at + several]) for at in range(0, len(self._boxes), several)]

    def estimate_inmemory_data_size(self) -> int | None:
        """Bytes of all boxes, nearly."""
        return self._nbytes(self._boxes)

    def _nbytes(self, boxes: Sequence[tuple[str, Box]]) -> int:
        """As if all were like the larger one at either end: to make each of a million takes 20 seconds."""
        largest = max((box.voxels for _, box in (*boxes[:1], *boxes[-1:])), default=0)
        return len(boxes) * largest * np.dtype(self._volume.dtype).itemsize

    def _task(self, boxes: Sequence[tuple[str, Box]]) -> ReadTask:
        volume, importance = self._volume, self._importance

        def read() -> Iterable[Block]:
            for key, box in boxes:
                yield row_to_block(read_row(volume, key, box, importance))

        metadata = BlockMetadata(
            num_rows=len(boxes), size_bytes=self._nbytes(boxes), exec_stats=None, input_files=None
        )
        return ReadTask(read, metadata)


class ShardBoxes(Sequence[tuple[str, Box]]):
    """Names of shards and their boxes in the source, made when asked for: a million take no room."""

    def __init__(self, plan: CompressPlan, indices: Sequence[Shape3]) -> None:
        self._plan = plan
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, place: int) -> tuple[str, Box]: ...

    @overload
    def __getitem__(self, place: slice) -> ShardBoxes: ...

    def __getitem__(self, place: int | slice) -> tuple[str, Box] | ShardBoxes:
        if isinstance(place, slice):
            return ShardBoxes(self._plan, self._indices[place])
        index = self._indices[place]
        return ".".join(map(str, index)), self._plan.source_box(self._plan.grid.shard_box(index))


def read_row(volume: Volume, key: str, box: Box, importance: ImportanceMap | None = None) -> Row:
    """The row of one box, as BoxSource describes it."""
    started = time.perf_counter()
    error = ""
    voxels, weights = np.empty(0, np.uint8), np.empty((0, 0, 0), np.float32)
    try:
        voxels = np.frombuffer(np.ascontiguousarray(volume.read(box)).data.cast("B"), np.uint8)
        if importance is not None:
            weights = importance.cells(box)
    except UcrayError as failure:
        error = str(failure)
    return {
        "key": key,
        "voxels": voxels,
        "shape": np.array(box.shape, np.int64),
        "weights": weights.reshape(-1),
        "weights_shape": np.array(weights.shape, np.int64),
        "read_seconds": time.perf_counter() - started,
        "read_memory": peak_memory(),
        "error": error,
    }


def row_to_block(row: Row) -> Block:
    """One row as a block."""
    return BlockAccessor.batch_to_block({name: _column(value) for name, value in row.items()})


def one_row(batch: dict[str, npt.NDArray[Any]]) -> Row:
    """The row of a batch of one."""
    return {name: column[0] for name, column in batch.items()}


def one_row_batch(row: Row) -> dict[str, npt.NDArray[Any]]:
    """A batch of one row."""
    return {name: _column(value) for name, value in row.items()}


def voxels_of(row: Row, dtype: str) -> npt.NDArray[np.generic]:
    """The voxels of a row of BoxSource, (z, y, x)."""
    data = np.ascontiguousarray(row["voxels"], dtype=np.uint8)
    return data.view(dtype).reshape(tuple(int(n) for n in row["shape"]))


def weights_of(row: Row) -> Weights | None:
    """The weights of the cells of a row of BoxSource, (z, y, x); None where there is no importance."""
    shape = tuple(int(n) for n in row["weights_shape"])
    return np.asarray(row["weights"], np.float32).reshape(shape) if min(shape) else None


def _column(value: Any) -> npt.NDArray[Any]:
    if isinstance(value, np.ndarray):
        return value[None]
    if isinstance(value, (str, int, float, bool)):
        return np.array([value])
    column = np.empty(1, dtype=object)
    column[0] = value
    return column
