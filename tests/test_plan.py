"""Plans are pure: from metadata and options alone to grid, memory and fingerprint."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucray.cluster.plan import (
    CompressOptions,
    CompressPlan,
    default_shard,
    plan_compress,
    sample_boxes,
    sample_chunk_boxes,
    training_boxes,
)
from ucray.config import CodecConfig, config_for_voxels, default_chunk
from ucray.errors import SettingsError
from ucray.grid import Box, Grid, Shape3
from ucray.settings import TrainingConfig
from ucray.storage.space import Space
from ucray.storage.volume import Volume

SIDES = st.integers(1, 400)
SHAPES = st.tuples(SIDES, SIDES, SIDES)


def _volume(shape: Shape3 = (250, 250, 250), dtype: str = "uint8", identity: str = "i") -> Volume:
    return Volume("volume.zarr", "0", None, shape, dtype, 0.0, Space(), identity)


def _plan(volume: Volume | None = None, **options: Any) -> CompressPlan:
    return plan_compress(volume or _volume(), CodecConfig(), CompressOptions.model_validate(options))


@given(SHAPES)
def test_a_plan_covers_its_volume_with_whole_shards(shape: Shape3) -> None:
    plan = _plan(_volume(shape))
    covered = sum(plan.grid.shard_box(index).voxels for index in plan.grid.shard_indices())
    assert covered == np.prod(shape) == plan.bytes_in
    listed = sum(len(list(plan.grid.chunk_boxes(index))) for index in plan.grid.shard_indices())
    assert listed == plan.chunk_count
    assert len(list(plan.grid.shard_indices())) == plan.shard_count


def test_a_region_is_planned_in_its_own_coordinates() -> None:
    plan = _plan(roi="10:110,20:90,:")
    assert plan.region == Box((10, 20, 0), (110, 90, 250))
    assert plan.grid.shape == (100, 70, 250)
    assert plan.source_box(Box((0, 0, 0), (1, 1, 1))) == Box((10, 20, 0), (11, 21, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"roi": "5:5,:,:"}, "is empty"),
        ({"roi": "0:300,:,:"}, "does not lie in the volume"),
        ({"roi": "0:9"}, "not of the form"),
        ({"chunk": (60, 64, 64)}, "multiple of 32,32,32"),
        ({"shard": (96, 64, 64)}, "multiple of the chunk"),
        ({"memory": 2 * 2**30, "shard": (1024, 1024, 1024)}, "largest that fits is 512,512,512"),
        ({"ratio": 8.0, "psnr": 40.0}, "--ratio and --psnr contradict"),
        ({"max_error": 1.0, "lossless": True}, "--max-error and --lossless contradict"),
        ({"memory": 2**20}, "largest that fits is none"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_done(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        _plan(**options)


def test_the_fingerprint_names_what_makes_another_archive() -> None:
    base = _plan()
    assert _plan().fingerprint == base.fingerprint
    others = [
        _plan(ratio=32),
        _plan(chunk=(32, 32, 32)),
        _plan(shard=(64, 64, 64)),
        _plan(roi="0:64,:,:"),
        _plan(_volume(identity="j")),
    ]
    assert len({plan.fingerprint for plan in [base, *others]}) == 6
    assert base.with_weights("a", None) != base.with_weights("b", None)
    assert base.with_weights("a", None) != base.with_weights("a", TrainingConfig())


def test_memory_is_what_a_worker_holds() -> None:
    small, large = _plan(shard=(64, 64, 64)), _plan(_volume(dtype="float32"), shard=(64, 64, 64))
    assert large.peak_memory - small.peak_memory == 3 * (4 - 1) * 64**3


@given(SHAPES, st.sampled_from([(16, 16, 16), (64, 64, 64), (16, 128, 128)]))
def test_default_shards_are_whole_chunks(shape: Shape3, chunk: Shape3) -> None:
    grid = Grid(shape, chunk, default_shard(shape, chunk))
    assert max(grid.chunks_per_shard) <= 8


@given(SHAPES, st.integers(1, 40))
def test_sampled_chunks_are_chunks_of_the_grid(shape: Shape3, count: int) -> None:
    grid = Grid(shape, (64, 64, 64), (128, 128, 128))
    every = {box for index in grid.shard_indices() for _, _, box in grid.chunk_boxes(index)}
    chosen = sample_chunk_boxes(grid, count)
    assert set(chosen) <= every
    assert len(set(chosen)) == len(chosen) == min(count, len(chosen))
    assert len(chosen) == count or len(chosen) == len(every)


def test_samples_spread_over_all_boxes() -> None:
    boxes = [Box((n, 0, 0), (n + 1, 1, 1)) for n in range(100)]
    chosen = [box.start[0] for box in sample_boxes(boxes, 10)]
    assert [start // 10 for start in chosen] == list(range(10))


@given(st.tuples(*[st.integers(32, 300)] * 3), st.integers(0, 5))
def test_training_tiles_lie_in_the_volume_and_hold_a_chunk(shape: Shape3, seed: int) -> None:
    boxes = training_boxes(shape, (32, 32, 32), 40, seed)
    assert boxes == training_boxes(shape, (32, 32, 32), 40, seed)
    assert all(box.clipped(shape) == box for box in boxes)
    assert all(min(box.shape) >= 32 for box in boxes)


def test_training_tiles_reach_every_part_of_a_volume() -> None:
    boxes = training_boxes((1000, 1000, 1000), (64, 64, 64), 192, 0)
    octants = {tuple(c > 452 for c in box.start) for box in boxes}
    assert len(octants) == 8


def test_a_volume_smaller_than_a_chunk_cannot_be_trained_on() -> None:
    with pytest.raises(SettingsError, match="smaller than a chunk"):
        training_boxes((20, 64, 64), (32, 32, 32), 10, 0)


@pytest.mark.parametrize(
    ("voxel", "stride", "chunk"),
    [
        ((8.0, 8.0, 8.0), (32, 32, 32), (64, 64, 64)),
        ((50.0, 4.6, 4.6), (4, 32, 32), (16, 128, 128)),
        ((16.0, 8.0, 8.0), (16, 32, 32), (64, 64, 64)),
    ],
)
def test_levels_follow_the_voxels(voxel: tuple[float, float, float], stride: Shape3, chunk: Shape3) -> None:
    config = config_for_voxels(voxel)
    assert config.stride == stride
    assert default_chunk(config) == chunk
    # Large networks change who encodes and teaches, not the stream, nor who decodes.
    large = config_for_voxels(voxel, large=True)
    assert large.analysis is not None
    assert config.analysis is not None
    assert large.analysis.latent_width > config.analysis.latent_width
    assert large.teacher is not None
    assert config.teacher is not None
    assert large.teacher.latent_width > config.teacher.latent_width
    assert msgspec.structs.replace(large, analysis=config.analysis, teacher=config.teacher) == config
