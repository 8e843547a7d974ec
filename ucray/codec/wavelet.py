"""Wavelet packet transform as strided convolution, from PyWavelets filter banks.

A transform of `levels` (z, y, x) halves each axis that often, always splitting both the low and
the high band, so that a chunk turns into a grid with one channel per subband. Periodic extension
(pywt's mode "periodization") keeps the number of coefficients equal to the number of voxels.
Mallat, "A Wavelet Tour of Signal Processing", chapters 7 and 8.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
import pywt
import torch
from torch import Tensor, nn
from torch.nn import functional

from ucray.errors import SettingsError
from ucray.grid import Shape3, triple


class WaveletPacket(nn.Module):
    """Separable wavelet packet transform of volumes and its inverse.

    `forward` maps (batch, 1, z, y, x) to (batch, prod(2**levels), z / 2**levels[0], ...); channels
    run over the subbands row-major in (z, y, x), the lowest band first on each axis.

    Raises
    ------
    SettingsError
        If PyWavelets has no filter bank of that name.
    """

    analysis: Tensor
    synthesis: Tensor

    def __init__(self, wavelet: str, levels: Shape3) -> None:
        super().__init__()
        _check_size(wavelet, levels)
        banks = [filter_bank(wavelet, level) for level in levels]
        self.stride = triple(2**level for level in levels)
        self.starts = triple(bank[1] for bank in banks)
        self.register_buffer("analysis", _separable([bank[0] for bank in banks]), persistent=False)
        self.register_buffer("synthesis", _separable([bank[2] for bank in banks]), persistent=False)
        self.lengths = triple(int(n) for n in self.analysis.shape[2:])

    def forward(self, volume: Tensor) -> Tensor:
        """Coefficients of `volume` (batch, 1, z, y, x); each axis a multiple of its stride."""
        return functional.conv3d(self._wrapped(volume), self.analysis, stride=self.stride)

    @property
    def blockwise(self) -> bool:
        """Whether the filters of neighbouring cells do not overlap, as those of Haar."""
        return self.lengths == self.stride and self.starts == (0, 0, 0)

    def inverse(self, coefficients: Tensor) -> Tensor:
        """Volume (batch, 1, z, y, x) of coefficients as `forward` gives them."""
        extended = functional.conv_transpose3d(coefficients, self.synthesis, stride=self.stride)
        return self._folded(
            extended, [n * s for n, s in zip(coefficients.shape[2:], self.stride, strict=True)]
        )

    def _wrapped(self, volume: Tensor) -> Tensor:
        """Extend periodically so that a plain strided convolution computes the periodic one."""
        for axis, (start, length, stride) in enumerate(
            zip(self.starts, self.lengths, self.stride, strict=True), start=2
        ):
            if length == stride and start == 0:
                continue
            size = volume.shape[axis]
            wanted = torch.arange(start, start + size - stride + length, device=volume.device) % size
            volume = volume.index_select(axis, wanted)
        return volume

    def _folded(self, extended: Tensor, sizes: list[int]) -> Tensor:
        """Adjoint of `_wrapped`: add what lies outside the volume to where it wraps to."""
        for axis, (start, length, stride, size) in enumerate(
            zip(self.starts, self.lengths, self.stride, sizes, strict=True), start=2
        ):
            if length == stride and start == 0:
                continue
            count = extended.shape[axis]
            wanted = torch.arange(start, start + count, device=extended.device) % size
            shape = list(extended.shape)
            shape[axis] = size
            extended = extended.new_zeros(shape).index_add(axis, wanted, extended)
        return extended


LARGEST_BANK = 1 << 24
"""Numbers in the filters of three axes together."""


def _check_size(wavelet: str, levels: Shape3) -> None:
    """Refuse filters that are too long before any is made: a band of 2**L has at least so many taps."""
    try:
        taps = pywt.Wavelet(wavelet).dec_len
    except (TypeError, ValueError):
        raise SettingsError(f"PyWavelets has no discrete wavelet named {wavelet!r}") from None
    if math.prod(2**level * max(1, (2**level - 1) * (taps - 1) // 2) for level in levels) > LARGEST_BANK:
        raise SettingsError("wavelet filters this long cannot be split into this many bands")


@functools.cache
def filter_bank(wavelet: str, levels: int) -> tuple[npt.NDArray[np.float64], int, npt.NDArray[np.float64]]:
    """One-axis packet filters: (analysis (2**levels, taps), first tap's position, synthesis).

    Row b of the analysis holds correlation weights: coefficient n of band b is the sum over t of
    analysis[b, t] * signal[(n * 2**levels + position + t) mod length]. The rows of the synthesis
    stand at the same positions and add up to the signal again.
    """
    try:
        bank = pywt.Wavelet(wavelet)
    except (TypeError, ValueError):
        raise SettingsError(f"PyWavelets has no discrete wavelet named {wavelet!r}") from None
    # Filters are read off pywt itself, as responses to unit impulses far from any border, so that
    # its conventions of phase and periodization hold here by construction.
    block = 2**levels
    reach = (block - 1) * (bank.dec_len + bank.rec_len)
    centre = block * (reach // block + 2)
    size = 2 * centre
    analysis = np.stack(
        [_packet(_impulse(size, t), wavelet, levels)[:, centre // block] for t in range(size)], axis=1
    )
    synthesis = np.stack(
        [_unpacket(np.eye(block)[b][:, None] * np.eye(size // block)[centre // block], wavelet, levels)
         for b in range(block)]
    )  # fmt: skip
    used = np.flatnonzero((np.abs(analysis) + np.abs(synthesis)).max(axis=0) > 1e-12)
    window = slice(int(used[0]), int(used[-1]) + 1)
    return analysis[:, window], int(used[0]) - centre, synthesis[:, window]


def _impulse(size: int, place: int) -> npt.NDArray[np.float64]:
    signal = np.zeros(size)
    signal[place] = 1.0
    return signal


def _packet(signal: npt.NDArray[np.float64], wavelet: str, levels: int) -> npt.NDArray[np.float64]:
    bands = signal[None, :]
    for _ in range(levels):
        low, high = pywt.dwt(bands, wavelet, mode="periodization", axis=-1)
        bands = np.stack([low, high], axis=1).reshape(-1, low.shape[-1])
    return np.asarray(bands, dtype=np.float64)


def _unpacket(bands: npt.NDArray[np.float64], wavelet: str, levels: int) -> npt.NDArray[np.float64]:
    for _ in range(levels):
        pairs = bands.reshape(-1, 2, bands.shape[-1])
        bands = pywt.idwt(pairs[:, 0], pairs[:, 1], wavelet, mode="periodization", axis=-1)
    return np.asarray(bands[0], dtype=np.float64)


def _separable(banks: list[npt.NDArray[np.float64]]) -> Tensor:
    """Outer product of three one-axis banks: (subbands, 1, taps z, taps y, taps x), float32."""
    z, y, x = banks
    if math.prod(bank.size for bank in banks) > LARGEST_BANK:
        raise SettingsError("wavelet filters this long cannot be split into this many bands")
    kernels = np.einsum("ai,bj,ck->abcijk", z, y, x)
    subbands = math.prod(kernels.shape[:3])
    return torch.from_numpy(kernels.reshape(subbands, 1, *kernels.shape[3:]).astype(np.float32))
