"""The networks: analysis g_a to latents, synthesis g_s back, in a teacher and a student size.

::

    x --lapping--DWT--> subbands --+--> linear ---------------(+)--> y   latents
                                   |--> residual blocks --+----^
                                                          +--> z      side latents, to the codebook

    y_hat, prior --+--> residual blocks (latent grid, wavelet grid) --+--> subbands --(+)--unlapping--> x_hat
                   |                                                  +--> INR --------^
                   +--> linear --> subbands -------------------------------------------^

Both directions are a linear transform with a learned correction. The linear part starts as the
Karhunen-Loeve transform of the training volume, so that training starts from a working transform
codec instead of from noise.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional

from ucray.codec.conditioning import QualityAffine
from ucray.codec.convolution import Convolution
from ucray.codec.inr import CoordinateNetwork, cell_coordinates
from ucray.codec.lapping import Lapping
from ucray.codec.wavelet import WaveletPacket, cells_to_volume
from ucray.codec.weights import Weights
from ucray.config import CodecConfig, SynthesisConfig
from ucray.errors import WeightsError
from ucray.grid import Shape3, triple


class ResidualBlock(nn.Module):
    """x plus a convolution, scaled and shifted by the quality, GELU, and a pointwise convolution."""

    def __init__(self, width: int, kernel: Shape3) -> None:
        super().__init__()
        self.spatial = Convolution(width, width, kernel, padding=triple(k // 2 for k in kernel))
        self.affine = QualityAffine(width)
        self.pointwise = Convolution(width, width, 1)
        with torch.no_grad():
            self.pointwise.weight.mul_(0.2)

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        hidden = functional.gelu(self.affine(self.spatial(x), quality))
        return x + torch.as_tensor(self.pointwise(hidden))


class ResidualBlocks(nn.ModuleList):
    """Residual blocks one after another, each told the quality."""

    def __init__(self, width: int, kernel: Shape3, blocks: int) -> None:
        super().__init__(ResidualBlock(width, kernel) for _ in range(blocks))

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        """Features (batch, width, ...) at qualities (batch,)."""
        for block in self:
            x = block(x, quality)
        return x


class Analysis(nn.Module):
    """g_a: normalised chunks (batch, 1, z, y, x) to latents y and side latents z."""

    subband_scale: Tensor
    latent_scale: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        sizes = config.analysis
        stride = config.latent_stride
        self.lapped = Lapping(config.latent_cell)
        self.wavelet = WaveletPacket(config.wavelet, config.levels)
        self.linear = Convolution(config.subbands, config.latents, stride, stride=stride, bias=False)
        self.enter = Convolution(config.subbands, sizes.grid_width, 1)
        self.entered = QualityAffine(sizes.grid_width)
        self.grid = ResidualBlocks(sizes.grid_width, config.grid_kernel, sizes.grid_blocks)
        self.down = Convolution(sizes.grid_width, sizes.latent_width, stride, stride=stride)
        self.latent = ResidualBlocks(sizes.latent_width, (3, 3, 3), sizes.latent_blocks)
        self.finished = QualityAffine(sizes.latent_width)
        self.correct = Convolution(sizes.latent_width, config.latents, 1)
        _zero(self.correct)
        self.side = Convolution(
            sizes.latent_width, config.code_width, config.code_stride, stride=config.code_stride
        )
        self.register_buffer("subband_scale", torch.ones(config.subbands))
        self.register_buffer("latent_scale", torch.ones(config.latents))

    def forward(self, x: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Latents y (batch, latents, ...) on the latent grid and z (batch, code_width, ...).

        Parameters
        ----------
        x
            Normalised chunks (batch, 1, z, y, x).
        quality
            Qualities (batch,) from 0 to QUALITIES - 1 that the latents will be rounded for.
        """
        with in_float32(x):
            subbands = self.subbands(x)
            y = self.linear(subbands)
        features = self.entered(self.enter(subbands / _channels(self.subband_scale)), quality)
        features = self.grid(functional.gelu(features), quality)
        features = self.finished(self.latent(functional.gelu(self.down(features)), quality), quality)
        y = y + self.correct(features).float() * _channels(self.latent_scale)
        return y, self.side(features).float()

    def subbands(self, x: Tensor) -> Tensor:
        """Wavelet coefficients (batch, subbands, ...) of lapped chunks (batch, 1, z, y, x)."""
        return torch.as_tensor(self.wavelet(self.lapped(x)))


class Synthesis(nn.Module):
    """g_s: dequantised latents, prior and quality to normalised chunks (batch, 1, z, y, x)."""

    subband_scale: Tensor
    latent_scale: Tensor
    coordinates: Tensor

    def __init__(self, config: CodecConfig, sizes: SynthesisConfig) -> None:
        super().__init__()
        stride = config.latent_stride
        self.cell = config.grid_stride
        self.lapped = Lapping(config.latent_cell, inverse=True)
        self.wavelet = WaveletPacket(config.wavelet, config.levels)
        self.linear = nn.ConvTranspose3d(config.latents, config.subbands, stride, stride=stride, bias=False)
        self.enter = Convolution(config.latents + config.code_width, sizes.latent_width, 1)
        self.entered = QualityAffine(sizes.latent_width)
        self.latent = ResidualBlocks(sizes.latent_width, (3, 3, 3), sizes.latent_blocks)
        self.up = nn.ConvTranspose3d(sizes.latent_width, sizes.grid_width, stride, stride=stride)
        self.grid = ResidualBlocks(sizes.grid_width, config.grid_kernel, sizes.grid_blocks)
        self.rescaled = QualityAffine(config.latents)
        self.finished = QualityAffine(sizes.grid_width)
        self.correct = Convolution(sizes.grid_width, config.subbands, 1)
        _zero(self.correct)
        self.feature = Convolution(sizes.grid_width, sizes.inr_width, 1)
        self.inr = CoordinateNetwork(sizes.inr_width)
        self.register_buffer("subband_scale", torch.ones(config.subbands))
        self.register_buffer("latent_scale", torch.ones(config.latents))
        self.register_buffer("coordinates", cell_coordinates(self.cell), persistent=False)
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, y_hat: Tensor, prior: Tensor, quality: Tensor) -> Tensor:
        """Chunks (batch, 1, z, y, x).

        Parameters
        ----------
        y_hat
            Dequantised latents (batch, latents, ...) on the latent grid.
        prior
            Codebook vectors (batch, code_width, ...) on the grid of codes.
        quality
            Qualities (batch,) from 0 to QUALITIES - 1: how coarsely y_hat was rounded.
        """
        return self.decode(y_hat, self.features(y_hat, prior, quality), quality)

    def features(self, y_hat: Tensor, prior: Tensor, quality: Tensor) -> Tensor:
        """Features (batch, grid_width, ...) on the wavelet grid; what distillation compares."""
        side = functional.interpolate(prior, size=y_hat.shape[2:], mode="nearest")
        # A latent that a quality leaves out has a mean that nothing holds in place: it is scaled away first.
        known = self.rescaled(y_hat, quality) / _channels(self.latent_scale)
        joined = torch.cat([known, side], dim=1)
        features = self.entered(self.enter(joined), quality)
        features = self.latent(functional.gelu(features), quality)
        features = self.grid(functional.gelu(self.up(features)), quality)
        return torch.as_tensor(self.finished(features, quality))

    def decode(self, y_hat: Tensor, features: Tensor, quality: Tensor) -> Tensor:
        """Chunks from latents (the linear part) and features (its correction)."""
        cells = features.permute(0, 2, 3, 4, 1).contiguous()
        detail = self.inr(functional.linear(cells, *_pointwise(self.feature)), self.coordinates).float()
        with in_float32(features):
            y_hat = self.rescaled(y_hat, quality)
            if self.wavelet.blockwise:
                x_hat = self._decode_blocks(y_hat, cells.float(), detail)
            else:
                subbands = self.linear(y_hat) + self.correct(features.float()) * _channels(self.subband_scale)
                x_hat = self.wavelet.inverse(subbands) + cells_to_volume(detail, self.cell)
            return torch.as_tensor(self.lapped(x_hat))

    def _decode_blocks(self, y_hat: Tensor, cells: Tensor, detail: Tensor) -> Tensor:
        """Both linear layers joined with the inverse wavelet: a matrix product each, straight to voxels."""
        inner, correct, bias = self._joined()
        detail = torch.addmm(bias, cells.flatten(0, 3), correct).view_as(detail) + detail
        base = y_hat.permute(0, 2, 3, 4, 1) @ inner.flatten(1)
        # A latent gives several cells: they go to their places in the grid as they are added.
        base = base.view(*base.shape[:4], *inner.shape[1:]).permute(0, 1, 4, 2, 5, 3, 6, 7)
        whole = (detail.view(base.shape) + base).reshape(detail.shape)
        return cells_to_volume(whole, self.cell)

    def _joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """From latents, from features, and the bias, to voxels; kept where nothing is learned any more."""
        if self._kept is not None:
            return self._kept
        block = self.wavelet.block
        weight, bias = _pointwise(self.correct)
        scaled = block * self.subband_scale[:, None]
        joined = self.linear.weight.permute(0, 2, 3, 4, 1) @ block, weight.T @ scaled, bias @ scaled
        if not self.training:
            self._kept = joined
        return joined


def start_linear(analysis: Analysis, synthesis: Synthesis, tiles: Tensor) -> None:
    """Set the linear parts to the Karhunen-Loeve transform of `tiles` (batch, 1, z, y, x)."""
    stride = analysis.linear.stride
    with torch.no_grad():
        subbands = analysis.subbands(tiles)
        blocks = subbands
        for axis, size in enumerate(stride, start=2):
            blocks = blocks.unfold(axis, int(size), int(size))
        samples = blocks.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(-1, analysis.linear.weight[0].numel())
        covariance = samples.T.double() @ samples.double() / len(samples)
        energy, vectors = torch.linalg.eigh(covariance)
        kept = analysis.linear.out_channels
        basis = vectors[:, -kept:].flip(1).T.float()
        # The sign of an eigenvector is arbitrary; fix it so that a seed gives the same weights anywhere.
        basis = basis * basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)).sign()
        weight = basis.reshape(analysis.linear.weight.shape)
        analysis.linear.weight.copy_(weight)
        synthesis.linear.weight.copy_(weight)
        latent_scale = energy[-kept:].flip(0).clamp_min(1e-6).sqrt().float()
        subband_scale = subbands.square().mean(dim=(0, 2, 3, 4)).clamp_min(1e-6).sqrt()
        for network in (analysis, synthesis):
            network.latent_scale.copy_(latent_scale)
            network.subband_scale.copy_(subband_scale)


def in_float32(x: Tensor) -> AbstractContextManager[None]:
    """Where networks run in fewer bits, what is linear still does not: latents need all of theirs."""
    return torch.autocast(x.device.type, enabled=False)


def _zero(layer: Convolution) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _pointwise(layer: Convolution) -> tuple[Tensor, Tensor]:
    """Weight (outputs, inputs) and bias of a convolution of one cell."""
    assert layer.bias is not None
    return layer.weight.flatten(1), layer.bias


def _channels(vector: Tensor) -> Tensor:
    return vector[None, :, None, None, None]


def stored_synthesis(weights: Weights, part: str) -> Synthesis:
    """The synthesis that weights hold as "student" or "teacher".

    Raises
    ------
    WeightsError
        If it is missing or does not fit its configuration.
    """
    config = weights.config
    sizes = config.teacher if part == "teacher" else config.student
    # Built as large as a configuration says, a network could take all memory before anything is compared.
    convolutions = sizes.latent_blocks * sizes.latent_width**2 + sizes.grid_blocks * sizes.grid_width**2
    widest = config.latents * sizes.latent_width + sizes.latent_width * sizes.grid_width
    if convolutions + widest + sizes.inr_width**2 > sum(a.size for a in weights.part(part).values()):
        raise WeightsError(f"the weights are damaged: the {part} does not fit its configuration")
    network = Synthesis(config, sizes)
    load_network(weights, part, network)
    return network


def load_network(weights: Weights, part: str, module: nn.Module) -> None:
    """Load one part of `weights` ("analysis", "teacher", "student") into its network.

    Raises
    ------
    WeightsError
        If the part is missing or does not fit the network.
    """
    arrays = weights.network(part)
    if not arrays:
        raise WeightsError(f"the weights hold no {part}; decoder weights cannot do more than decode")
    try:
        module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    except RuntimeError:
        raise WeightsError(f"the weights are damaged: the {part} does not fit its configuration") from None
