"""A million shards: what plans and reads them stays small; a rehearsal on four nodes without the codec."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from test_kill import LONG

import ucray
from ucray.cluster.ingest import TASKS, BoxSource, ShardBoxes
from ucray.cluster.plan import CompressPlan, plan_compress
from ucray.storage.shard import present_shards
from ucray.storage.volume import open_volume

SHARD = (64, 64, 64)
MILLION = (100, 100, 100)
SHARD_BYTES = 1000
"""Memory that a driver may take for each planned shard."""


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> CompressPlan:
    """A plan of a million shards, of a volume of metadata alone."""
    source = str(tmp_path_factory.mktemp("scale") / "em.zarr")
    shape = tuple(s * n for s, n in zip(SHARD, MILLION, strict=True))
    zarr.create_array(source, shape=shape, chunks=SHARD, dtype="uint8", fill_value=0)
    options = ucray.CompressOptions(ratio=16, chunk=SHARD, shard=SHARD)
    return plan_compress(open_volume(source), ucray.load_weights("em-fib-v1").config, options)


def test_a_million_shards_are_planned_in_bounded_memory(planned: CompressPlan) -> None:
    assert planned.shard_count == 1_000_000
    tracemalloc.start()
    try:
        present = present_shards({}, planned.grid)
        missing = [index for index in planned.grid.shard_indices() if index not in present]
        tasks = BoxSource(planned.volume, ShardBoxes(planned, missing)).get_read_tasks(200)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(tasks) <= TASKS
    assert sum(task.metadata.num_rows or 0 for task in tasks) == 1_000_000
    assert peak < SHARD_BYTES * planned.shard_count
    # Each goes to a worker by itself: none takes the whole plan along.
    assert len(pickle.dumps(ShardBoxes(planned, missing)[:100])) < 100_000


@given(st.integers(0, 10), st.integers(1, 10), st.integers(1, 10))
def test_shards_are_named_and_boxed_alike_however_they_are_asked_for(
    planned: CompressPlan, start: int, length: int, step: int
) -> None:
    indices = [(z, y, x) for z in (0, 7) for y in (0, 99) for x in range(5)]
    boxes = ShardBoxes(planned, indices)
    part = slice(start, start + length, step)
    assert list(boxes[part]) == list(boxes)[part]
    for (key, box), index in zip(boxes, indices, strict=True):
        assert key == ".".join(map(str, index))
        assert box.start == tuple(s * i for s, i in zip(SHARD, index, strict=True))


def test_a_task_of_several_boxes_reads_each_as_a_block_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ucray.cluster.ingest.TASKS", 3)
    source = str(tmp_path / "em.zarr")
    voxels = np.arange(64**3, dtype=np.uint64).astype(np.uint8).reshape(SHARD)
    zarr.create_array(source, data=voxels, chunks=(32, 32, 32))
    options = ucray.CompressOptions(chunk=(32, 32, 32), shard=(32, 32, 32))
    plan = plan_compress(open_volume(source), ucray.load_weights("em-fib-v1").config, options)
    boxes = ShardBoxes(plan, list(plan.grid.shard_indices()))
    tasks = BoxSource(plan.volume, boxes).get_read_tasks(1)
    assert [task.metadata.num_rows for task in tasks] == [3, 3, 2]
    read = [block.to_pylist() for task in tasks for block in task()]
    assert [len(block) for block in read] == [1] * 8
    for (key, box), (row,) in zip(boxes, read, strict=True):
        assert row["key"] == key
        np.testing.assert_array_equal(np.ravel(row["voxels"]), np.ravel(voxels[box.slices]))


@pytest.mark.skipif(LONG not in os.environ, reason=f"five minutes; {LONG}=1 runs it")
def test_a_rehearsal_on_four_nodes(tmp_path: Path) -> None:
    """Every shard once; prints what a shard costs beside its codec."""
    script = Path(__file__).with_name("rehearsal.py")
    ended = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    print(ended.stdout)
    found = json.loads(ended.stdout)
    assert found["stored"] == found["shards"]
