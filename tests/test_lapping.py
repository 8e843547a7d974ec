"""Lapping: undone by its inverse, in floats and in whole numbers, and worth what it costs."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from ucray.codec.lapping import Axis, Lapping, Stage
from ucray.codec.unlapping import (
    LARGEST_VALUE,
    SHIFT,
    STAGES,
    Blocks,
    Unlapping,
    block_sizes,
    whole_axis,
)
from ucray.grid import Shape3
from ucray.training.lapping import CELLS, CORRELATION, coding_gain, orthogonal_stages, start_lapping

CELL_SHAPES: list[Shape3] = [(4, 4, 4), (1, 4, 4), (2, 3, 4)]


def _pair(cell: Shape3) -> tuple[Lapping, Lapping]:
    lapping, undone = Lapping(cell), Lapping(cell, inverse=True)
    start_lapping(lapping, undone)
    return lapping, undone


def _axis(lapping: Lapping, name: str) -> Axis:
    found = lapping.axes[name]
    assert isinstance(found, Axis)
    return found


@pytest.mark.parametrize("cell", CELL_SHAPES)
def test_the_inverse_undoes_it(cell: Shape3) -> None:
    volume = torch.randn(2, 1, *(4 * size for size in cell), generator=torch.Generator().manual_seed(0))
    lapping, undone = _pair(cell)
    with torch.no_grad():
        lapped = lapping(volume)
        found = undone(lapped)
    assert (lapped - volume).abs().max() > 0.1
    torch.testing.assert_close(found, volume, atol=1e-4, rtol=0.0)


def test_an_axis_of_one_cell_or_of_cells_of_one_voxel_is_left_alone() -> None:
    volume = torch.randn(1, 1, 3, 4, 12, generator=torch.Generator().manual_seed(0))
    lapping, _ = _pair((1, 4, 4))
    with torch.no_grad():
        found = lapping(volume)
        whole = _axis(lapping, "x")(12)
    torch.testing.assert_close(found, volume @ whole.T)


def test_a_stage_moves_nothing_across_the_blocks_of_its_picture() -> None:
    whole = orthogonal_stages(4).stages[1](12)
    assert torch.count_nonzero(whole[:2, 2:]) == 0
    assert torch.count_nonzero(whole[2:6, 6:]) == 0
    assert torch.count_nonzero(whole[10:, :10]) == 0
    assert torch.count_nonzero(whole[2:6, 2:6]) == 16


@pytest.mark.parametrize("cell", [2, 3, 4])
def test_its_start_is_orthogonal_and_packs_a_markov_process(cell: int) -> None:
    axis = orthogonal_stages(cell)
    for cells in (2, 3, CELLS):
        whole = axis(cells * cell)
        torch.testing.assert_close(whole @ whole.T, torch.eye(cells * cell, dtype=torch.float64))
    places = torch.arange(CELLS * cell, dtype=torch.float64)
    covariance = CORRELATION ** (places[:, None] - places).abs()
    alone = coding_gain(torch.eye(CELLS * cell, dtype=torch.float64), covariance, cell)
    # A good part of what cells twice as long would gain (28 % of it for cells of 2, 62 % for cells of 4).
    longer = coding_gain(torch.eye(CELLS * cell, dtype=torch.float64), covariance, 2 * cell)
    assert coding_gain(axis(CELLS * cell), covariance, cell) > alone + 0.25 * (longer - alone)


def test_what_is_kept_is_what_was_learned() -> None:
    lapping, _ = _pair((4, 4, 4))
    volume = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = lapping(volume)
        _axis(lapping, "x").stages[0].inner.mul_(2.0)
        _axis(lapping, "x").stages[0].first.mul_(2.0)
        after = lapping(volume)
        assert (after - before).abs().max() > 0.1
        torch.testing.assert_close(lapping.eval()(volume), after)


def _stages(random: np.random.Generator, cell: int, spread: float) -> list[Blocks]:
    """Whole-number stages near the identity."""
    return [
        tuple(
            np.rint((np.eye(size) + random.normal(0, spread, (size, size))) * 2**SHIFT).astype(np.int16)
            for size in block_sizes(cell, stage)
        )
        for stage in reversed(range(STAGES))
    ]


def _unlapped(values: npt.NDArray[np.object_], stages: list[Blocks]) -> npt.NDArray[np.object_]:
    """Along the first axis, in Python's own whole numbers."""
    size = len(values)
    whole = np.eye(size, dtype=np.int64).astype(object) * 2**SHIFT
    for first, inner, last in stages:
        matrix, start = np.zeros((size, size), dtype=object), 0
        inside = (size - len(first) - len(last)) // len(inner)
        for block in [first] + [inner] * inside + [last]:
            matrix[start : start + len(block), start : start + len(block)] = block.astype(object)
            start += len(block)
        whole = np.vectorize(lambda one: (one + 2 ** (SHIFT - 1)) // 2**SHIFT)(matrix @ whole)
    mixed = np.tensordot(whole.astype(object), values, axes=1)
    return np.asarray(np.vectorize(lambda one: round(Fraction(one, 2**SHIFT)), otypes=[object])(mixed))


@given(seed=st.integers(0, 2**32 - 1))
def test_whole_numbers_are_exact(seed: int) -> None:
    random = np.random.default_rng(seed)
    cell: Shape3 = (1, 2, 4)
    axes = {axis: _stages(random, size, 0.2) for axis, size in zip("yx", (2, 4), strict=True)}
    values = random.integers(-(1 << 22), 1 << 22, (2, 6, 8))
    expected = values.astype(object)
    for axis, name in ((1, "y"), (2, "x")):
        expected = np.moveaxis(_unlapped(np.moveaxis(expected, axis, 0), axes[name]), 0, axis)
    found = Unlapping(cell, axes)(values.astype(np.float64))
    np.testing.assert_array_equal(found, expected.astype(np.float64))


def _whole_numbers(stage: Stage) -> Blocks:
    """Of the inverse of an orthogonal stage."""
    first, inner, last = (
        np.rint(block.detach().T.numpy() * 2.0**SHIFT).astype(np.int16)
        for block in (stage.first, stage.inner, stage.last)
    )
    return first, inner, last


def test_whole_numbers_undo_lapping() -> None:
    lapping, _ = _pair((4, 4, 4))
    axes = {axis: [_whole_numbers(stage) for stage in _axis(lapping, axis).stages[::-1]] for axis in "zyx"}
    volume = torch.randn(1, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        lapped = lapping(volume)[0, 0].numpy()
    found = Unlapping((4, 4, 4), axes)(lapped.astype(np.float64) * 4096.0) / 4096.0
    # Twelve matrices, each rounded to 2**-14 at most.
    np.testing.assert_allclose(found, volume[0, 0].numpy(), atol=2e-3)


def test_stages_of_an_axis_are_products_of_block_matrices() -> None:
    random = np.random.default_rng(0)
    whole, stages = np.eye(20) * 2.0**SHIFT, []
    for stage in range(STAGES):
        sizes = block_sizes(4, stage)
        blocks: Any = tuple(random.integers(-9000, 9000, (size, size)).astype(np.int16) for size in sizes)
        stages.append(blocks)
        inside = (20 - sizes[0] - sizes[2]) // sizes[1]
        matrix = scipy.linalg.block_diag(blocks[0], *[blocks[1]] * inside, blocks[2]).astype(np.float64)
        whole = np.floor(matrix @ whole / 2.0**SHIFT + 0.5)
    np.testing.assert_array_equal(whole_axis(stages, 20), whole)


def test_the_largest_whole_numbers_stay_exact() -> None:
    largest: Blocks = tuple(np.full((4, 4), 32767, np.int16) for _ in range(3))  # type: ignore[assignment]
    half: Blocks = tuple(np.full((size, size), 32767, np.int16) for size in (2, 4, 2))  # type: ignore[assignment]
    stages = [half, largest, half, largest]
    assert np.abs(whole_axis(stages, 16)).max() == 32767
    found = Unlapping((4, 4, 4), dict.fromkeys("zyx", stages))(np.full((16, 16, 16), 1e300))
    assert found.max() == LARGEST_VALUE
