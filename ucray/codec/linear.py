"""The linear transform that codes and decodes: lapping, wavelet packet, a matrix for every latent cell.

::

    x --lapping--DWT--linear--> y            y_hat --(scale and shift)--linear--DWT^-1--unlapping--> x_hat

The matrix starts as the Karhunen-Loeve transform of the training volume, so that training starts from a
working transform codec instead of from noise. `ucray.codec.network` adds networks to both directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Self

import torch
from torch import Tensor, nn

from ucray.codec.cells import cells_to_volume, volume_to_cells
from ucray.codec.conditioning import QualityAffine
from ucray.codec.convolution import Convolution
from ucray.codec.lapping import Lapping
from ucray.codec.postfilter import PostFilter, computed_in
from ucray.codec.wavelet import WaveletPacket
from ucray.config import CodecConfig, FilterConfig

FINEST_IN_FEWER_BITS = 200.0
"""Up to here what rounding loses is far above what bfloat16 does, where a processor has units for it."""


class LinearTransform(nn.Module):
    """What both directions are made of: lapping and wavelet packet; `linear`, a layer, is each one's own."""

    def __init__(self, config: CodecConfig, *, inverse: bool) -> None:
        super().__init__()
        self.latent_cell = config.latent_cell
        self.lapped = Lapping(config.latent_cell, inverse=inverse)
        self.wavelet = WaveletPacket(config.wavelet, config.levels)
        self._kept: Tensor | None = None

    def train(self, mode: bool = True) -> Self:
        """As of every module; what was kept while nothing was learned is dropped."""
        self._kept = None
        return super().train(mode)

    def _joined(self, weight: Tensor, filters: Tensor) -> Tensor:
        """A layer and the filters of one cell as a matrix (latents, voxels of a latent cell).

        Where nothing is learned any more it is kept.
        """
        if self._kept is not None:
            return self._kept
        joined = torch.einsum("lsijk,sabc->liajbkc", weight, filters[:, 0]).flatten(1)
        if not self.training:
            self._kept = joined
        return joined


class LinearAnalysis(LinearTransform):
    """Normalised chunks (batch, 1, z, y, x) to latents y; there are no side latents."""

    latent_scale: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__(config, inverse=False)
        stride = config.latent_stride
        self.linear = Convolution(config.subbands, config.latents, stride, stride=stride, bias=False)
        self.code_stride = config.code_stride
        self.register_buffer("latent_scale", torch.ones(config.latents))

    def forward(self, x: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Latents y (batch, latents, ...) on the latent grid and z (batch, 0, ...) on the grid of codes.

        Parameters
        ----------
        x
            Normalised chunks (batch, 1, z, y, x).
        quality
            Qualities (batch,); what is linear is the same at all of them.
        """
        with in_float32(x):
            fewer = bool((quality <= FINEST_IN_FEWER_BITS).all())
            y = self.latents(x.to(computed_in(x)) if fewer else x).float()
        grid = [n // s for n, s in zip(y.shape[2:], self.code_stride, strict=True)]
        return y, y.new_zeros(len(y), 0, *grid)

    def latents(self, x: Tensor) -> Tensor:
        """The linear latents of chunks (batch, 1, z, y, x), in their dtype where the wavelet allows it."""
        if not self.wavelet.blockwise:
            return torch.as_tensor(self.linear(self.subbands(x.float())))
        # Filters of cells that do not overlap: one matrix product takes voxels straight to latents.
        cells = volume_to_cells(self.lapped(x), self.latent_cell)
        joined = self._joined(self.linear.weight, self.wavelet.analysis).to(x.dtype)
        return (cells @ joined.T).permute(0, 4, 1, 2, 3)

    def subbands(self, x: Tensor) -> Tensor:
        """Wavelet coefficients (batch, subbands, ...) of lapped chunks (batch, 1, z, y, x)."""
        return torch.as_tensor(self.wavelet(self.lapped(x)))


class LinearSynthesis(LinearTransform):
    """Dequantised latents and quality to normalised chunks (batch, 1, z, y, x)."""

    def __init__(self, config: CodecConfig, sizes: FilterConfig | None = None) -> None:
        super().__init__(config, inverse=True)
        stride = config.latent_stride
        self.linear = nn.ConvTranspose3d(config.latents, config.subbands, stride, stride=stride, bias=False)
        self.rescaled = QualityAffine(config.latents)
        self.postfilter = None if sizes is None else PostFilter(config, sizes)
        self._last: tuple[tuple[float, torch.dtype], Tensor, Tensor] | None = None

    def train(self, mode: bool = True) -> Self:
        """As of every module; what was kept while nothing was learned is dropped."""
        self._last = None
        return super().train(mode)

    def forward(self, y_hat: Tensor, prior: Tensor, quality: Tensor) -> Tensor:
        """Chunks (batch, 1, z, y, x).

        Parameters
        ----------
        y_hat
            Dequantised latents (batch, latents, ...) on the latent grid.
        prior
            Codebook vectors (batch, code_width, ...) on the grid of codes; the linear part reads none.
        quality
            Qualities (batch,) from 0 to QUALITIES - 1: how coarsely y_hat was rounded.
        """
        return self.filtered(self.unfiltered(y_hat, prior, quality), quality)

    def unfiltered(self, y_hat: Tensor, prior: Tensor, quality: Tensor) -> Tensor:
        """Chunks before the post-filter, from the same; where that follows, in the bits that it reads."""
        if bool(self.is_filtered(quality).all()):
            y_hat = y_hat.to(computed_in(y_hat))
        with in_float32(y_hat):
            return torch.as_tensor(self.lapped(self.unlapped(y_hat, quality)))

    def filtered(self, x_hat: Tensor, quality: Tensor) -> Tensor:
        """Chunks (batch, 1, z, y, x) behind the post-filter, where it is worth its time."""
        if self.postfilter is None:
            return x_hat
        used = self.is_filtered(quality)
        # Where it learns, every parameter has a gradient, be it zero.
        if not self.training and not bool(used.any()):
            return x_hat
        better = torch.as_tensor(self.postfilter(x_hat, quality))
        if not self.training and bool(used.all()):
            return better
        return torch.where(used[:, None, None, None, None], better, x_hat)

    def is_filtered(self, quality: Tensor) -> Tensor:
        """Where the post-filter is worth its time: bool (batch,)."""
        return quality <= (-1 if self.postfilter is None else self.postfilter.finest)

    def unlapped(self, y_hat: Tensor, quality: Tensor) -> Tensor:
        """Chunks (batch, 1, z, y, x) before lapping is undone."""
        if not self.wavelet.blockwise:
            return self.wavelet.inverse(self.linear(self.rescaled(y_hat, quality)))
        # Filters of cells that do not overlap: one matrix product takes latents straight to voxels.
        joined = self._joined(self.linear.weight, self.wavelet.synthesis)
        if len(y_hat) > 1 or torch.is_grad_enabled():
            latents = self.rescaled(y_hat, quality).to(y_hat.dtype).permute(0, 2, 3, 4, 1)
            return cells_to_volume(latents @ joined.to(y_hat.dtype), self.latent_cell)
        # Those of a single chunk are scaled and shifted within that product.
        matrix, bias = self._rescaling(joined, quality, y_hat.dtype)
        latents = y_hat.permute(0, 2, 3, 4, 1)
        cells = torch.addmm(bias, latents.flatten(0, 3), matrix)
        return cells_to_volume(cells.view(*latents.shape[:4], -1), self.latent_cell)

    def _rescaling(self, joined: Tensor, quality: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The matrix of a cell, and what is added, where latents have yet to be scaled and shifted.

        Those of the last quality are kept: that of the next chunk is mostly the same.
        """
        key = float(quality), dtype
        # Other threads may ask for another quality meanwhile.
        last = self._last
        if last is None or last[0] != key or self.training:
            scale, shift = (table[0] for table in self.rescaled.at(quality))
            last = key, (joined * scale[:, None]).to(dtype), (shift @ joined).to(dtype)
            self._last = last
        return last[1:]


def start_linear(analysis: LinearAnalysis, synthesis: LinearSynthesis, tiles: Tensor) -> None:
    """Set the linear parts to the Karhunen-Loeve transform of `tiles` (batch, 1, z, y, x)."""
    with torch.no_grad():
        subbands = analysis.subbands(tiles)
        kept = analysis.linear.out_channels
        basis, energy = principal(latent_cells(subbands, analysis.linear.stride), kept)
        weight = basis.reshape(analysis.linear.weight.shape)
        analysis.linear.weight.copy_(weight)
        synthesis.linear.weight.copy_(weight)
        scales = {
            "latent_scale": energy.clamp_min(1e-6).sqrt().float(),
            "subband_scale": subbands.square().mean(dim=(0, 2, 3, 4)).clamp_min(1e-6).sqrt(),
        }
        for network in (analysis, synthesis):
            for name, buffer in network.named_buffers(recurse=False):
                if name in scales:
                    buffer.copy_(scales[name])


def latent_cells(subbands: Tensor, stride: Sequence[int]) -> Tensor:
    """Subbands (batch, subbands, ...) cell by cell: what a latent is a weighted sum of (cells, numbers)."""
    blocks = subbands
    for axis, size in enumerate(stride, start=2):
        blocks = blocks.unfold(axis, size, size)
    return blocks.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(0, 3)


def principal(samples: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Directions (count, numbers) in which samples (cells, numbers) are largest; mean squares, float64."""
    covariance = samples.T.double() @ samples.double() / len(samples)
    energy, vectors = torch.linalg.eigh(covariance)
    basis = vectors[:, -count:].flip(1).T.float()
    # The sign of an eigenvector is arbitrary; fix it so that a seed gives the same weights anywhere.
    basis = basis * basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)).sign()
    return basis, energy[-count:].flip(0)


def in_float32(x: Tensor) -> AbstractContextManager[None]:
    """Where networks run in fewer bits, what is linear still does not: latents need all of theirs."""
    return torch.autocast(x.device.type, enabled=False)
