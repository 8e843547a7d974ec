"""Squared error, PSNR and SSIM of decoded volumes."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ucray.quality import ErrorSum, SeamSum, psnr_of, ssim

volumes = arrays(np.uint8, (3, 4, 5))


def test_no_voxels_have_no_error() -> None:
    nothing = ErrorSum()
    assert (nothing.mse, nothing.psnr(255.0)) == (0.0, math.inf)
    assert ErrorSum.between(np.empty(0, np.uint8), np.empty(0, np.uint8)) == nothing


def test_error_of_unsigned_voxels_does_not_wrap_around() -> None:
    original, decoded = np.array([0, 255, 10], np.uint8), np.array([255, 0, 10], np.uint8)
    assert ErrorSum.between(original, decoded) == ErrorSum(3, 2 * 255.0**2, 255.0)


@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", ">u2"])
def test_the_largest_error_of_every_type_is_exact(kind: str) -> None:
    limits = np.iinfo(np.dtype(kind))
    original, decoded = np.array([limits.min] * 3, kind), np.array([limits.max] * 3, kind)
    largest = float(limits.max) - float(limits.min)
    assert ErrorSum.between(original, decoded) == ErrorSum(3, 3 * largest**2, largest)
    assert ErrorSum.between(decoded, original) == ErrorSum(3, 3 * largest**2, largest)


@given(volumes, volumes)
def test_error_is_the_sum_over_voxels(
    original: npt.NDArray[np.uint8], decoded: npt.NDArray[np.uint8]
) -> None:
    differences = [int(a) - int(b) for a, b in zip(original.flat, decoded.flat, strict=True)]
    expected = ErrorSum(60, sum(d * d for d in differences), max(abs(d) for d in differences))
    assert ErrorSum.between(original, decoded) == expected


@given(volumes, volumes, st.integers(0, 3))
def test_errors_of_parts_add_up_to_the_whole(
    original: npt.NDArray[np.uint8], decoded: npt.NDArray[np.uint8], cut: int
) -> None:
    # Whole numbers below 2^53 add up exactly in float64, whatever the order.
    parts = ErrorSum.between(original[:cut], decoded[:cut]) + ErrorSum.between(original[cut:], decoded[cut:])
    assert parts == ErrorSum.between(original, decoded)


def test_not_a_number_equals_itself_and_nothing_else() -> None:
    nan = np.array([np.nan, 1.0], np.float32)
    assert ErrorSum.between(nan, nan) == ErrorSum(2, 0.0, 0.0)
    assert math.isnan(ErrorSum.between(nan, np.array([0.0, 1.0], np.float32)).squared)


def test_infinity_equals_itself_and_nothing_else() -> None:
    infinite = np.array([np.inf, -np.inf, 1.0], np.float32)
    assert ErrorSum.between(infinite, infinite) == ErrorSum(3, 0.0, 0.0)
    assert ErrorSum.between(infinite, -infinite).maximum == math.inf


def test_psnr_is_of_the_mean_over_voxels() -> None:
    # 10 log10(255^2 / 1) dB
    assert ErrorSum(4, 4.0, 2.0).psnr(255.0) == pytest.approx(48.130803608679, abs=1e-9)
    assert psnr_of(0.0, 255.0) == math.inf
    # Half the amplitude of the error is 20 log10(2) dB more.
    assert psnr_of(1.0, 255.0) - psnr_of(4.0, 255.0) == pytest.approx(6.020599913280, abs=1e-9)


def test_ssim_is_the_mean_over_slices() -> None:
    random = np.random.default_rng(0)
    original = random.integers(0, 256, (2, 16, 16)).astype(np.uint8)
    decoded = original.copy()
    decoded[1] = np.clip(original[1].astype(int) + random.integers(-60, 61, (16, 16)), 0, 255)
    one_slice = ssim(original[1:], decoded[1:], 255.0)
    assert ssim(original, original, 255.0) == 1.0
    assert one_slice < 0.95
    assert ssim(original, decoded, 255.0) == pytest.approx((1.0 + one_slice) / 2, abs=1e-12)


CHUNK = (8, 16, 4)


def seamless(seed: int = 0) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """A volume of several chunks an axis, the last ones cut off, and a decoded one of white errors."""
    random = np.random.default_rng(seed)
    original = random.normal(100, 20, (60, 90, 50))
    return original, original + random.normal(0, 3, original.shape)


def test_errors_that_know_nothing_of_chunks_show_no_seams() -> None:
    found = SeamSum.between(*seamless(), CHUNK)
    assert found.error == pytest.approx(1.0, abs=0.01)
    assert found.step == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_step_from_chunk_to_chunk_shows(axis: int) -> None:
    """Each second chunk along one axis is brighter by 4: errors step by 4 there, beside their noise."""
    original, decoded = seamless()
    bright = (np.arange(original.shape[axis]) // CHUNK[axis]) % 2 * 4.0
    decoded += bright.reshape([-1 if a == axis else 1 for a in range(3)])
    found = SeamSum.between(original, decoded, CHUNK)
    pairs = [original.size // n * ((n - 1) // c) for n, c in zip(original.shape, CHUNK, strict=True)]
    stepped = 1 + 4.0**2 / (2 * 3.0**2) * pairs[axis] / sum(pairs)
    assert found.step == pytest.approx(np.sqrt(stepped), rel=0.01)


def test_errors_beside_faces_show_and_those_at_the_volume_s_own_do_not() -> None:
    original, decoded = seamless()
    outer = decoded.copy()
    outer[0] += 50
    outer[:, :, -1] -= 50
    beside = decoded.copy()
    for place in (7, 8, 15, 16):
        beside[place] += 9
    assert SeamSum.between(original, outer, (60, 90, 50)).error == 1.0
    assert SeamSum.between(original, beside, CHUNK).error > 1.2
    assert SeamSum.between(original, outer, CHUNK).error < 1.0


def test_seams_add_up_over_slabs() -> None:
    """But for the faces between the slabs, which neither of them sees."""
    original, decoded = seamless()
    slabs = [slice(0, 32), slice(32, 60)]
    parts = [SeamSum.between(original[s], decoded[s], CHUNK) for s in slabs]
    found = parts[0] + parts[1]
    whole = SeamSum.between(original, decoded, CHUNK)
    assert found.within.voxels == whole.within.voxels
    assert found.within.squared == pytest.approx(whole.within.squared)
    assert found.across.voxels == whole.across.voxels - 90 * 50
    assert found.beside.voxels + found.inside.voxels == original.size


def test_perfect_voxels_have_no_seams() -> None:
    original, _ = seamless()
    found = SeamSum.between(original, original, CHUNK)
    assert (found.error, found.step) == (1.0, 1.0)
    original[0, 0, 0] = np.nan
    assert SeamSum.between(original, original, CHUNK).error == 1.0
