"""The wavelet packet transform against PyWavelets, which defines what the coefficients are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import pywt
import torch

from ucray.codec.wavelet import WaveletPacket, filter_bank
from ucray.errors import SettingsError
from ucray.grid import Shape3

WAVELETS = ("haar", "db2", "bior2.2", "bior4.4")
LEVELS: tuple[Shape3, ...] = ((2, 2, 2), (0, 2, 2), (1, 0, 2))

FLOAT32 = 1e-5
"""Rounding: up to 22,000 float32 products (bior4.4, twice per axis) of sums below 16 with 24 bits."""


def volume(shape: Shape3, seed: int = 0) -> npt.NDArray[np.float32]:
    """Values in [-1, 1)."""
    return np.random.default_rng(seed).uniform(-1.0, 1.0, shape).astype(np.float32)


def reference(values: npt.NDArray[np.float32], wavelet: str, levels: Shape3) -> npt.NDArray[np.float64]:
    """Split every band of every axis `levels` times with pywt itself: (subbands, z, y, x)."""
    bands = [values.astype(np.float64)]
    for axis, count in enumerate(levels):
        for _ in range(count):
            bands = [half for band in bands for half in pywt.dwt(band, wavelet, "periodization", axis=axis)]
    return np.stack(bands)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_coefficients_are_those_of_pywt(wavelet: str, levels: Shape3) -> None:
    values = volume((8, 12, 16))
    coefficients = WaveletPacket(wavelet, levels)(torch.from_numpy(values)[None, None])[0]
    np.testing.assert_allclose(coefficients.numpy(), reference(values, wavelet, levels), rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_filters_may_be_longer_than_the_volume(wavelet: str) -> None:
    """Periodic extension then goes around more than once."""
    values = volume((4, 4, 8))
    packet = WaveletPacket(wavelet, (2, 2, 2))
    coefficients = packet(torch.from_numpy(values)[None, None])
    np.testing.assert_allclose(
        coefficients[0].numpy(), reference(values, wavelet, (2, 2, 2)), rtol=0, atol=FLOAT32
    )
    np.testing.assert_allclose(packet.inverse(coefficients)[0, 0].numpy(), values, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_reconstruction_is_perfect(wavelet: str, levels: Shape3) -> None:
    values = torch.from_numpy(np.stack([volume((8, 8, 8), seed) for seed in range(2)])[:, None])
    packet = WaveletPacket(wavelet, levels)
    np.testing.assert_allclose(packet.inverse(packet(values)).numpy(), values.numpy(), rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_the_grid_has_one_channel_per_subband(levels: Shape3) -> None:
    packet = WaveletPacket("db2", levels)
    z, y, x = packet.stride
    assert packet.stride == tuple(2**level for level in levels)
    assert packet(torch.zeros(3, 1, 8, 16, 24)).shape == (3, z * y * x, 8 // z, 16 // y, 24 // x)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_orthonormal_wavelets_keep_inner_products(wavelet: str, levels: Shape3) -> None:
    packet = WaveletPacket(wavelet, levels).double()
    first, second = (torch.from_numpy(volume((8, 8, 8), seed))[None, None].double() for seed in (1, 2))
    for other in (first, second):
        kept, wanted = (packet(first) * packet(other)).sum(), (first * other).sum()
        # The filters are rounded to 24 bits; both norms are about the root of 512 / 3.
        assert float(kept) == pytest.approx(float(wanted), abs=2**-22 * 512 / 3)


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_orthonormal_filters_are_orthonormal_over_bands_and_shifts(wavelet: str, levels: int) -> None:
    analysis, _, synthesis = filter_bank(wavelet, levels)
    stride, taps = 2**levels, analysis.shape[1]
    # pywt's coefficients of db2 are given to about 12 digits.
    np.testing.assert_allclose(synthesis, analysis, rtol=0, atol=1e-11)
    for shift in range(0, taps, stride):
        inner = analysis[:, shift:] @ analysis[:, : taps - shift].T
        np.testing.assert_allclose(inner, np.eye(stride) if shift == 0 else 0.0, rtol=0, atol=1e-11)


def test_the_lowest_band_comes_first() -> None:
    coefficients = WaveletPacket("haar", (2, 2, 2))(torch.ones(1, 1, 4, 4, 4))[0, :, 0, 0, 0]
    # Haar's low band of a constant gains a factor sqrt(2) per halving, six halvings in all.
    np.testing.assert_allclose(coefficients.numpy(), [8.0] + 63 * [0.0], rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("name", ["nonsense", "", "morl"])
def test_unknown_wavelets_are_refused(name: str) -> None:
    """morl is a wavelet of pywt, but has no filter bank."""
    with pytest.raises(SettingsError, match="wavelet"):
        WaveletPacket(name, (2, 2, 2))
