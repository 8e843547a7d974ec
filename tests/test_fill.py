"""Fill voxels: packed exactly and small, kept off by everything else, smooth to the networks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays

from ucray.codec.fill import fill_mask, keep_off_fill, pack_mask, unpack_mask
from ucray.codec.frames import pack
from ucray.codec.inpaint import inpaint
from ucray.errors import ChunkError
from ucray.grid import Shape3

Mask = npt.NDArray[np.bool_]

mask_arrays = array_shapes(min_dims=3, max_dims=3, max_side=9).flatmap(lambda shape: arrays(np.bool_, shape))


def shape_of(mask: Mask) -> Shape3:
    z, y, x = mask.shape
    return z, y, x


def border(shape: Shape3, low: Shape3, high: Shape3) -> Mask:
    """True outside the box from `low` to `high`: padding around tissue."""
    mask = np.ones(shape, dtype=bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = False
    return mask


@given(mask_arrays)
def test_masks_are_packed_and_unpacked_exactly(mask: Mask) -> None:
    original = mask.copy()
    unpacked = unpack_mask(pack_mask(mask), shape_of(mask))
    assert unpacked.dtype == np.bool_
    np.testing.assert_array_equal(unpacked, original)
    np.testing.assert_array_equal(mask, original)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ((20, 0, 0), (64, 64, 64)),
        ((0, 0, 0), (64, 64, 37)),
        ((0, 13, 0), (64, 51, 64)),
        ((9, 21, 33), (50, 64, 61)),
    ],
)
def test_axis_aligned_padding_costs_next_to_nothing(low: Shape3, high: Shape3) -> None:
    mask = border((64, 64, 64), low, high)
    packed = pack_mask(mask)
    assert len(packed) < 64
    np.testing.assert_array_equal(unpack_mask(packed, (64, 64, 64)), mask)


def test_a_packed_mask_is_never_much_longer_than_its_bits() -> None:
    """zstd keeps what it cannot shorten: 3 bytes a block, and its frame's header."""
    mask = np.random.default_rng(0).random((16, 16, 16)) < 0.5
    assert len(pack_mask(mask)) <= mask.size // 8 + 24


def test_damaged_masks_are_refused() -> None:
    mask = border((8, 8, 8), (2, 0, 0), (8, 8, 8))
    packed = pack_mask(mask)
    for damaged in (
        b"",
        packed[:1],
        packed[: len(packed) // 2],
        packed[:-1],
        b"\x02" + packed[1:],
        packed[:1] + b"not a zstd frame",
    ):
        with pytest.raises(ChunkError):
            unpack_mask(damaged, (8, 8, 8))


@pytest.mark.parametrize("shape", [(8, 8, 4), (8, 8, 16), (16, 16, 16)])
def test_masks_of_another_shape_are_refused(shape: Shape3) -> None:
    packed = pack_mask(border((8, 8, 8), (2, 0, 0), (8, 8, 8)))
    with pytest.raises(ChunkError):
        unpack_mask(packed, shape)


def test_a_mask_of_too_many_bytes_is_refused() -> None:
    with pytest.raises(ChunkError):
        unpack_mask(b"\0" + pack(bytes(1000), 9), (8, 8, 8))


@pytest.mark.parametrize("fill_value", [0.0, 7.0, 255.0])
def test_fill_mask_finds_the_value(fill_value: float) -> None:
    voxels = np.array([[[0, 7, 255, 8]]], np.uint8)
    assert fill_mask(voxels, fill_value).tolist() == [[[v == fill_value for v in (0, 7, 255, 8)]]]


def test_fill_mask_of_not_a_number() -> None:
    voxels = np.array([[[np.nan, 0.0, np.inf]]], np.float32)
    assert fill_mask(voxels, float("nan")).tolist() == [[[True, False, False]]]
    assert fill_mask(voxels, 0.0).tolist() == [[[False, True, False]]]


def test_whole_numbers_without_a_fill_value_have_no_fill() -> None:
    voxels = np.array([[[0, 7, 255]]], np.uint8)
    assert not fill_mask(voxels, float("nan")).any()
    np.testing.assert_array_equal(keep_off_fill(voxels, voxels == 1, float("nan")), voxels)


LIMITS = {"uint8": (0, 255), "uint16": (0, 65535), "int16": (-32768, 32767), "float32": (-4, 4)}


@pytest.mark.parametrize("place", ["lowest", "middle", "highest"])
@pytest.mark.parametrize("dtype", LIMITS.keys())
def test_only_masked_voxels_keep_the_fill_value(dtype: str, place: str) -> None:
    low, high = LIMITS[dtype]
    fill = {"lowest": low, "middle": 3, "highest": high}[place]
    # Each value once masked and once not.
    decoded = np.array([[[low, low + 1, 2, 3, 4, high - 1, high]] * 2], dtype)
    mask = np.array([[[True] * 7, [False] * 7]])
    before = decoded.copy()

    kept = keep_off_fill(decoded, mask, float(fill))

    assert kept.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(kept == fill, mask)
    unaffected = ~mask & (before != fill)
    np.testing.assert_array_equal(kept[unaffected], before[unaffected])
    # What met the fill value moves by one step, no more.
    moved = kept[~mask & (before == fill)].astype(np.float64)
    assert moved.size >= 1
    step = np.spacing(np.float32(4.0)) if dtype == "float32" else 1
    assert (np.abs(moved - fill) <= step).all()
    np.testing.assert_array_equal(decoded, before)


def test_masked_voxels_become_a_fill_value_of_not_a_number() -> None:
    decoded = np.array([[[1.0, 2.0]]], np.float32)
    kept = keep_off_fill(decoded, np.array([[[True, False]]]), float("nan"))
    np.testing.assert_array_equal(kept, np.array([[[np.nan, 2.0]]], np.float32))


@pytest.mark.parametrize("shape", [(8, 8, 8), (2, 16, 16), (1, 8, 8), (6, 10, 13)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_inpainting_leaves_the_rest_alone_and_stays_in_its_range(shape: Shape3, share: float) -> None:
    random = np.random.default_rng(1)
    values = torch.from_numpy(random.standard_normal((1, 1, *shape)).astype(np.float32))
    mask = torch.from_numpy(random.random((1, 1, *shape)) < share)
    mask[..., 0] = False
    values[mask] = float("nan")
    filled = inpaint(values, mask)
    assert torch.equal(filled[~mask], values[~mask])
    # Averages lie between what they average, but for the rounding of float32.
    assert filled.min() >= values[~mask].min() - 1e-5
    assert filled.max() <= values[~mask].max() + 1e-5


def test_inpainting_beside_a_constant_is_that_constant() -> None:
    mask = torch.from_numpy(border((16, 16, 16), (0, 3, 5), (16, 16, 9)))[None, None]
    filled = inpaint(torch.where(mask, 1e9, torch.full(mask.shape, 2.5)), mask)
    # Weighted sums of one number in float32.
    torch.testing.assert_close(filled, torch.full(mask.shape, 2.5), rtol=1e-6, atol=0)


def test_inpainting_is_smooth_far_from_tissue() -> None:
    random = np.random.default_rng(2)
    values = torch.from_numpy(random.standard_normal((1, 1, 32, 32, 32)).astype(np.float32))
    mask = torch.from_numpy(border((32, 32, 32), (0, 0, 0), (32, 32, 16)))[None, None]
    filled = inpaint(values, mask)[0, 0].numpy()
    # White noise differs by 2 in square from voxel to voxel; its averages over 16^3 hardly at all.
    steps = [np.square(np.diff(filled[..., 24:], axis=axis)).mean() for axis in range(3)]
    assert max(steps) < 1e-3


def test_an_entirely_masked_chunk_becomes_zero_to_the_networks() -> None:
    mask = torch.ones(1, 1, 8, 8, 8, dtype=torch.bool)
    assert torch.equal(inpaint(torch.full(mask.shape, 9.0), mask), torch.zeros(mask.shape))


def test_nothing_masked_changes_nothing() -> None:
    values = torch.arange(8.0).reshape(1, 1, 2, 2, 2)
    assert torch.equal(inpaint(values, torch.zeros(1, 1, 2, 2, 2, dtype=torch.bool)), values)
