"""Shards and chunks tile a volume exactly; shapes and regions are parsed or refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucray.errors import SettingsError
from ucray.grid import Box, Grid, Shape3, add, format_shape, parse_box, parse_shape, round_up

small = st.integers(1, 20)
edges = st.integers(1, 6)
triples = st.tuples(st.integers(-50, 50), st.integers(-50, 50), st.integers(-50, 50))


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Volumes of up to 20 voxels an axis, mostly not multiples of their shards."""
    shape = draw(st.tuples(small, small, small))
    z, y, x = draw(st.tuples(edges, edges, edges))
    a, b, c = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)))
    return Grid(shape, (z, y, x), (a * z, b * y, c * x))


@given(grids())
def test_shards_tile_the_volume_exactly_once(grid: Grid) -> None:
    covered = np.zeros(grid.shape, dtype=int)
    indices = list(grid.shard_indices())
    for index in indices:
        covered[grid.shard_box(index).slices] += 1
    assert (covered == 1).all()
    assert len(indices) == len(set(indices)) == math.prod(grid.shards)


@given(grids())
def test_chunks_tile_their_shard_exactly_once(grid: Grid) -> None:
    covered = np.zeros(grid.shape, dtype=int)
    for index in grid.shard_indices():
        shard = grid.shard_box(index)
        for _, _, box in grid.chunk_boxes(index):
            assert all(a <= b for a, b in zip(shard.start, box.start, strict=True))
            assert all(a >= b for a, b in zip(shard.stop, box.stop, strict=True))
            covered[box.slices] += 1
    assert (covered == 1).all()


@given(grids(), st.tuples(*[st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted)] * 3))
def test_the_chunks_of_a_box_are_those_that_meet_it(grid: Grid, ends: tuple[list[int], ...]) -> None:
    (z0, z1), (y0, y1), (x0, x1) = ends
    box = Box((z0, y0, x0), (z1, y1, x1)).clipped(grid.shape)
    every = [(index, *chunk) for index in grid.shard_indices() for chunk in grid.chunk_boxes(index)]
    met = [chunk for chunk in every if min(chunk[3].common(box).shape) > 0]
    assert sorted(grid.chunks_of(box)) == sorted(met)
    for _, _, _, place in met:
        part = np.zeros(grid.shape, bool)
        part[box.slices] = True
        both = place.common(box)
        assert part[place.slices].sum() == both.voxels
        assert part[place.slices][both.relative_to(place).slices].all()


@given(grids())
def test_slots_and_chunk_indices_name_the_chunk_s_place(grid: Grid) -> None:
    for index in grid.shard_indices():
        shard = grid.shard_box(index)
        slots = []
        for slot, chunk_index, box in grid.chunk_boxes(index):
            within = tuple((b - s) // c for b, s, c in zip(box.start, shard.start, grid.chunk, strict=True))
            assert slot == np.ravel_multi_index(within, grid.chunks_per_shard)
            assert box.start == tuple(i * c for i, c in zip(chunk_index, grid.chunk, strict=True))
            slots.append(slot)
        assert slots == sorted(set(slots))


def test_shard_indices_run_fastest_along_x() -> None:
    grid = Grid((4, 4, 8), (4, 2, 4), (4, 2, 4))
    assert list(grid.shard_indices()) == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]


@pytest.mark.parametrize(
    ("shape", "chunk", "shard"),
    [
        ((0, 4, 4), (4, 4, 4), (4, 4, 4)),
        ((4, 4, 4), (4, 0, 4), (4, 4, 4)),
        ((4, 4, 4), (4, 4, -4), (4, 4, -8)),
        ((4, 4, 4), (4, 4, 4), (4, 4, 6)),
        ((4, 4, 4), (4, 4, 4), (4, 4, 2)),
        ((4, 4, 4), (4, 4, 4), (0, 4, 4)),
        ((4, 4, 4), (4, 4, 4), (-4, 4, 4)),
    ],
)
def test_grids_without_sense_are_refused(shape: Shape3, chunk: Shape3, shard: Shape3) -> None:
    with pytest.raises(SettingsError):
        Grid(shape, chunk, shard)


def test_a_refused_shard_shape_is_named_as_the_user_wrote_it() -> None:
    with pytest.raises(SettingsError, match="96,64,64 must be a multiple of the chunk shape 64,64,64"):
        Grid((100, 100, 100), (64, 64, 64), (96, 64, 64))


@given(triples, triples, st.tuples(small, small, small))
def test_clipped_keeps_the_voxels_inside_and_no_others(start: Shape3, size: Shape3, shape: Shape3) -> None:
    stop = add(start, (abs(size[0]), abs(size[1]), abs(size[2])))
    clipped = Box(start, stop).clipped(shape)
    for axis, length in enumerate(shape):
        inside = [v for v in range(length) if start[axis] <= v < stop[axis]]
        assert list(range(clipped.start[axis], clipped.stop[axis])) == inside
    assert min(clipped.start) >= 0
    assert clipped.clipped(shape) == clipped


def test_box_figures() -> None:
    box = Box((1, 2, 3), (4, 4, 4))
    assert box.shape == (3, 2, 1)
    assert box.voxels == 6
    assert box.shifted((-1, 0, 10)) == Box((0, 2, 13), (3, 4, 14))
    assert str(box) == "1:4,2:4,3:4"
    assert np.zeros((9, 9, 9))[box.slices].shape == box.shape


@given(st.tuples(small, small, small), st.tuples(edges, edges, edges))
def test_round_up_gives_the_smallest_multiple(shape: Shape3, multiple: Shape3) -> None:
    for rounded, n, m in zip(round_up(shape, multiple), shape, multiple, strict=True):
        assert rounded % m == 0
        assert n <= rounded < n + m


@given(st.tuples(small, small, small))
def test_parse_shape_undoes_format_shape(shape: Shape3) -> None:
    assert parse_shape(format_shape(shape)) == shape


@pytest.mark.parametrize(
    "text",
    ["", "64", "64,64", "64,64,64,64", "64,64,x", "64,64,", "6.4,64,64", "64x64x64", "0,64,64", "64,-64,64"],
)
def test_bad_shapes_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="shape"):
        parse_shape(text)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("0:10,0:20,0:30", Box((0, 0, 0), (10, 20, 30))),
        (":,:,:", Box((0, 0, 0), (10, 20, 30))),
        ("2:,:5,7:8", Box((2, 0, 7), (10, 5, 8))),
    ],
)
def test_parse_box(text: str, box: Box) -> None:
    assert parse_box(text, (10, 20, 30)) == box


@given(st.data())
def test_parse_box_undoes_str(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(small, small, small))
    ends = [
        sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in shape
    ]
    (a, d), (b, e), (c, f) = ends
    box = Box((a, b, c), (d, e, f))
    assert parse_box(str(box), shape) == box


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0:1,0:1",
        "0:1,0:1,0:1,0:1",
        "0:1,0:1,5",
        "0:1,0:1,0:4:2",
        "0:1,0:1,a:b",
        "0:1,0:1,-1:5",
        "0:11,0:1,0:1",
        "0:1,0:1,0:-1",
        "3:3,0:1,0:1",
        "5:3,0:1,0:1",
        "10:,0:1,0:1",
    ],
)
def test_bad_regions_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="region"):
        parse_box(text, (10, 20, 30))
