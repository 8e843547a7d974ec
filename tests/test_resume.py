"""Resuming costs what is left to do: requests and reads are counted on a real S3 server."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs
import zarr
from object_store import ObjectStore

import ucray
from ucray.grid import Box
from ucray.storage.index import shard_key
from ucray.storage.volume import Volume

SHAPE, SHARD = (400, 320, 320), (16, 16, 16)
PLANNED, LEFT = 25 * 20 * 20, 10


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Requests by what they ask of S3."""
    requests: Counter[str] = Counter()
    really = s3fs.S3FileSystem._call_s3

    async def call(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        requests[method] += 1
        return await really(self, method, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "_call_s3", call)
        patch.setattr(s3fs.S3FileSystem, "call_s3", s3fs.core.sync_wrapper(call))
        yield requests


def test_of_ten_thousand_shards_the_ten_that_are_left_are_read_coded_and_written(
    store: ObjectStore,
    bucket: str,
    tiny_weights: ucray.Weights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, listing = tmp_path / "tiny.safetensors", tmp_path / "boxes.json"
    weights.write_bytes(tiny_weights.to_bytes())
    source, archive = str(tmp_path / "em.zarr"), f"{bucket}/resume.ucray"
    voxels = zarr.create_array(source, shape=SHAPE, chunks=(80, 80, 80), dtype="uint8", fill_value=0)
    voxels[:16, :16] = np.random.default_rng(0).integers(90, 110, (16, 16, SHAPE[2]), dtype=np.uint8)
    options = ucray.CompressOptions(ratio=16, chunk=SHARD, shard=SHARD)
    connection = ucray.Connection(store.endpoint)

    def compress(boxes: str | None) -> ucray.JobReport:
        run = ucray.RunOptions(serial=True, boxes=boxes)
        return ucray.compress(
            source, archive, options, weights=str(weights), run_options=run, connection=connection
        )

    listing.write_text(json.dumps([{"shard": [0, 0, 0], "box": "0:16,0:16,0:16"}]))
    assert compress(str(listing)).left == PLANNED - 1
    files = s3fs.S3FileSystem(endpoint_url=store.endpoint)
    left = [(0, 0, x) for x in range(1, LEFT + 1)]
    keys = [shard_key((z, y, x)) for z in range(25) for y in range(20) for x in range(20)]
    fakes = set(keys) - {shard_key(index) for index in left} - {shard_key((0, 0, 0))}
    files.pipe({f"{archive}/{key}".removeprefix("s3://"): b"there" for key in fakes})

    read: list[Box] = []
    really = Volume.read

    def reading(self: Volume, box: Box) -> Any:
        read.append(box)
        return really(self, box)

    monkeypatch.setattr(Volume, "read", reading)
    with counted() as requests:
        report = compress(None)
    assert (report.shards, report.resumed, report.left) == (PLANNED, PLANNED - LEFT, 0)
    assert sorted(box.start for box in read) == [(0, 0, 16 * x) for _, _, x in left]
    # One listing, a thousand objects a page; and for each shard one look, its statistics, and itself.
    assert requests["list_objects_v2"] == -(-(PLANNED - LEFT + 3) // 1000)
    assert requests["get_object"] == LEFT + 3  # settings and metadata of the archive
    assert requests["put_object"] == 2 * LEFT + 2  # metadata of group and array are offered anew, and refused
    assert requests["head_object"] <= 2  # whether it was the metadata that stood in the way
    assert requests.total() <= 10 + LEFT + 3 + 2 * LEFT + 2 + 2 + 1
