"""Bounds on every voxel: they hold for any prediction; damaged residuals are refused."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucray.codec.bitstream import ResidualBody
from ucray.codec.chunk import ChunkFormat
from ucray.codec.context import TABLES
from ucray.codec.frames import pack
from ucray.codec.frequencies import SILENT, FrequencyTables
from ucray.codec.residual import (
    Reference,
    Residual,
    apply_residual,
    decode_residual,
    encode_residual,
    residual_of,
    to_cells,
    to_volume,
)
from ucray.codec.unlapping import LARGEST_VALUE, VALUE_SHIFT, Unlapping
from ucray.codec.weights import Weights
from ucray.errors import ChunkError
from ucray.grid import Shape3

CELL: Shape3 = (2, 4, 4)
SHAPE: Shape3 = (4, 8, 8)
EVERYWHERE = np.ones(SHAPE, bool)
UNLAPPED = Unlapping(CELL, {})


@pytest.fixture(scope="module")
def frequencies(tiny_weights: Weights) -> FrequencyTables:
    return tiny_weights.stream.frequencies


def _residual(
    voxels: npt.NDArray[Any],
    predicted: npt.NDArray[np.float64],
    bound: float,
    tables: FrequencyTables,
    kept: npt.NDArray[np.bool_] = EVERYWHERE,
) -> Residual:
    residual = residual_of(voxels, kept, predicted, bound, CELL, tables)
    assert residual is not None
    return residual


def through(
    voxels: npt.NDArray[Any], predicted: npt.NDArray[np.float64], bound: float, tables: FrequencyTables
) -> npt.NDArray[Any]:
    """Voxels after residual, entropy coder and back."""
    body = encode_residual(_residual(voxels, predicted, bound, tables), tables)
    residual = decode_residual(body, tables, 8, 32)
    return np.asarray(apply_residual(predicted, residual, str(voxels.dtype), CELL))


@given(
    st.sampled_from(["uint8", "uint16", "int16"]),
    st.sampled_from([0.0, 1.0, 2.5, 7.0, 300.0]),
    st.floats(0.0, 1e5),
    st.integers(0, 1000),
)
def test_whole_voxels_stay_within_their_bound(
    frequencies: FrequencyTables, dtype: str, bound: float, spread: float, seed: int
) -> None:
    """However bad the prediction, at the ends of the dtype's range too."""
    random = np.random.default_rng(seed)
    limits = np.iinfo(dtype)
    voxels = random.integers(limits.min, limits.max, SHAPE, dtype, endpoint=True)
    voxels[0, 0, :2] = limits.min, limits.max
    predicted = np.clip(np.rint(voxels + random.normal(0, spread, SHAPE)), limits.min, limits.max)
    decoded = through(voxels, predicted, bound, frequencies)
    assert decoded.dtype == voxels.dtype
    assert np.abs(decoded.astype(np.int64) - voxels).max() <= bound


@given(st.floats(1e-3, 1e3), st.floats(0.0, 1e3), st.integers(0, 1000))
def test_float_voxels_stay_within_their_bound(
    frequencies: FrequencyTables, bound: float, spread: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    voxels = random.normal(0, 100, SHAPE).astype(np.float32)
    predicted = voxels + random.normal(0, spread, SHAPE)
    decoded = through(voxels, predicted, bound, frequencies)
    assert decoded.dtype == np.float32
    # The last place of a float32 of a few hundred is 3e-5.
    assert np.abs(decoded.astype(np.float64) - voxels).max() <= bound + 3e-5


@pytest.mark.parametrize("bound", [0.0, 3.0, 9.0])
def test_every_cell_has_the_table_that_codes_it_in_the_fewest_bits(
    frequencies: FrequencyTables, bound: float
) -> None:
    """Residuals of a wide bound are zero but for a few: their mean size says little of their table."""
    random = np.random.default_rng(3)
    spread = np.repeat([0.5, 1.0, 2.0, 4.0], 64).reshape(SHAPE)
    voxels = np.clip(128 + spread * random.laplace(0, 4, SHAPE), 0, 255).astype(np.uint8)
    residual = _residual(voxels, np.full(SHAPE, 128.0), bound, frequencies)
    for table, values in zip(residual.tables, residual.values, strict=True):
        assert values.any() == (table != SILENT)
        if table == SILENT:
            continue
        bits = [
            frequencies.bits_of(np.full(len(values), other, np.uint8), values) for other in range(1, TABLES)
        ]
        # Sums of 32 float32 numbers.
        assert bits[table - 1] == pytest.approx(min(bits), abs=1e-3)


def test_voxels_that_do_not_count_cost_nothing(frequencies: FrequencyTables) -> None:
    voxels = np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8)
    residual = _residual(voxels, np.zeros(SHAPE), 0.0, frequencies, np.zeros(SHAPE, bool))
    assert not residual.values.any()
    assert len(encode_residual(residual, frequencies).words) == 0


@pytest.mark.parametrize("far", [2.5e15, 1e20, 3e38], ids=str)
def test_residuals_that_no_chunk_can_hold_are_none(frequencies: FrequencyTables, far: float) -> None:
    """One voxel that far from its prediction: beyond 31 bits, 53 bits, and 63 bits."""
    voxels = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    voxels[1, 2, 3] = far
    assert residual_of(voxels, EVERYWHERE, np.zeros(SHAPE), 0.05, CELL, frequencies) is None


def test_a_prediction_is_exact_in_any_order() -> None:
    random = np.random.default_rng(1)
    latents = random.integers(-(1 << 30), 1 << 30, (2, 2, 2, 300))
    weight = random.integers(-32768, 32768, (300, 32)).astype(np.int16)
    chunk = ChunkFormat(SHAPE, "float32", 0.0, 0.0, 1.0)
    order = random.permutation(300)
    one = Reference(weight, 24, CELL, UNLAPPED).predict(latents, chunk)
    other = Reference(weight[order], 24, CELL, UNLAPPED).predict(latents[..., order], chunk)
    np.testing.assert_array_equal(one, other)
    cut = np.clip(latents, -(1 << 24), 1 << 24).astype(object)
    exact = (cut.reshape(8, 300) @ weight.astype(object)).reshape(2, 2, 2, 32)
    whole = np.vectorize(lambda one: round(Fraction(one * 2**VALUE_SHIFT, 2**24)), otypes=[object])(exact)
    cut_off = np.clip(whole.astype(np.float64), -LARGEST_VALUE, LARGEST_VALUE)
    np.testing.assert_array_equal(one, to_volume(cut_off, CELL) * 0.5**VALUE_SHIFT)


def test_cells_and_volumes_undo_each_other() -> None:
    values = np.arange(4 * 8 * 8, dtype=np.float64).reshape(SHAPE)
    cells = to_cells(values, CELL)
    np.testing.assert_array_equal(cells[3].reshape(CELL), values[:2, 4:, 4:])
    np.testing.assert_array_equal(to_volume(cells.reshape(2, 2, 2, 32), CELL), values)


@pytest.mark.parametrize("shift", [0, 3])
def test_damaged_bodies_are_refused(frequencies: FrequencyTables, shift: int) -> None:
    random = np.random.default_rng(2)
    voxels = random.integers(0, 60000, SHAPE).astype(np.uint16)
    predicted = voxels.astype(np.float64) + np.rint(random.normal(0, 400 if shift else 5, SHAPE))
    body = encode_residual(_residual(voxels, predicted, 0.0, frequencies), frequencies)
    assert (body.shift > 0) == (shift > 0)
    full = pack(bytes([TABLES]) * 8, 1)
    spoilt: list[ResidualBody] = [
        replace(body, tables=b"nothing"),
        replace(body, tables=full),
        replace(body, tables=pack(b"\1" * 9, 1)),
        replace(body, low=body.low + b"\0"),
        replace(body, shift=body.shift + 1),
        replace(body, max_error=1.5e308),
        replace(body, shift=255),
        replace(body, max_error=float("nan")),
        replace(body, max_error=-1.0),
        replace(body, words=np.append(body.words, np.uint32(7))),
        replace(body, escapes=np.append(body.escapes, np.int32(7))),
    ]
    for one in spoilt:
        with pytest.raises(ChunkError):
            decode_residual(one, frequencies, 8, 32)
