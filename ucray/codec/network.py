"""The networks: analysis g_a to latents, synthesis g_s back, in a teacher and a student size.

::

    x --lapping--DWT--> subbands --+--> linear ---------------(+)--> y   latents
                                   |--> residual blocks --+----^
                                                          +--> z      side latents, to the codebook

    y_hat, prior --+--> residual blocks (latent and wavelet grid) --+--> subbands --(+)--unlapping--> x_hat
                   |                                                +--> INR --------^
                   +--> linear --> subbands -----------------------------------------^

Behind both decoders may stand a post-filter (`ucray.codec.postfilter`).

Both directions are the linear transform of `ucray.codec.linear` with a learned correction. Where a
configuration has no sizes for a network, its linear part stands alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ucray.codec.cells import cells_to_volume
from ucray.codec.codebook import spread
from ucray.codec.conditioning import QualityAffine
from ucray.codec.convolution import Convolution
from ucray.codec.inr import CoordinateNetwork, cell_coordinates
from ucray.codec.linear import LinearAnalysis, LinearSynthesis, in_float32
from ucray.codec.weights import FEATURES_PER_VOXEL, Weights
from ucray.config import AnalysisConfig, CodecConfig, FilterConfig, SynthesisConfig
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


class Analysis(LinearAnalysis):
    """g_a: normalised chunks (batch, 1, z, y, x) to latents y and side latents z."""

    subband_scale: Tensor

    def __init__(self, config: CodecConfig, sizes: AnalysisConfig) -> None:
        super().__init__(config)
        stride = config.latent_stride
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

    def forward(self, x: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Latents y, and side latents z (batch, code_width, ...), for the quality they will be rounded at."""
        with in_float32(x):
            subbands = self.subbands(x)
            y = torch.as_tensor(self.linear(subbands))
        features = self.entered(self.enter(subbands / _channels(self.subband_scale)), quality)
        features = self.grid(functional.gelu(features), quality)
        features = self.finished(self.latent(functional.gelu(self.down(features)), quality), quality)
        y = y + self.correct(features).float() * _channels(self.latent_scale)
        return y, self.side(features).float()


class Synthesis(LinearSynthesis):
    """g_s: dequantised latents, prior and quality to normalised chunks (batch, 1, z, y, x)."""

    subband_scale: Tensor
    latent_scale: Tensor
    coordinates: Tensor

    def __init__(
        self, config: CodecConfig, sizes: SynthesisConfig, filter_sizes: FilterConfig | None = None
    ) -> None:
        super().__init__(config, filter_sizes)
        stride = config.latent_stride
        self.cell = config.grid_stride
        self.enter = Convolution(config.latents + config.code_width, sizes.latent_width, 1)
        self.entered = QualityAffine(sizes.latent_width)
        self.latent = ResidualBlocks(sizes.latent_width, (3, 3, 3), sizes.latent_blocks)
        self.up = nn.ConvTranspose3d(sizes.latent_width, sizes.grid_width, stride, stride=stride)
        self.grid = ResidualBlocks(sizes.grid_width, config.grid_kernel, sizes.grid_blocks)
        self.finished = QualityAffine(sizes.grid_width)
        self.correct = Convolution(sizes.grid_width, config.subbands, 1)
        _zero(self.correct)
        self.feature = Convolution(sizes.grid_width, sizes.inr_width, 1)
        self.inr = CoordinateNetwork(sizes.inr_width)
        self.register_buffer("subband_scale", torch.ones(config.subbands))
        self.register_buffer("latent_scale", torch.ones(config.latents))
        self.register_buffer("coordinates", cell_coordinates(self.cell), persistent=False)

    def unfiltered(self, y_hat: Tensor, prior: Tensor, quality: Tensor) -> Tensor:
        """Chunks before the post-filter, from the same as the linear part, and from the prior."""
        return self._decoded(y_hat, self.features(y_hat, prior, quality), quality)

    def features(self, y_hat: Tensor, prior: Tensor, quality: Tensor) -> Tensor:
        """Features (batch, grid_width, ...) on the wavelet grid; what distillation compares."""
        side = spread(prior, y_hat.shape[2:])
        # A latent that a quality leaves out has a mean that nothing holds in place: it is scaled away first.
        known = self.rescaled(y_hat, quality) / _channels(self.latent_scale)
        joined = torch.cat([known, side], dim=1)
        features = self.entered(self.enter(joined), quality)
        features = self.latent(functional.gelu(features), quality)
        features = self.grid(functional.gelu(self.up(features)), quality)
        return torch.as_tensor(self.finished(features, quality))

    def decode(self, y_hat: Tensor, features: Tensor, quality: Tensor) -> Tensor:
        """Chunks from latents (the linear part) and features (its correction)."""
        return self.filtered(self._decoded(y_hat, features, quality), quality)

    def _decoded(self, y_hat: Tensor, features: Tensor, quality: Tensor) -> Tensor:
        cells = features.permute(0, 2, 3, 4, 1).contiguous()
        detail = self.inr(functional.linear(cells, *_pointwise(self.feature)), self.coordinates).float()
        with in_float32(features):
            subbands = self.correct(features.float()) * _channels(self.subband_scale)
            correction = self.wavelet.inverse(subbands) + cells_to_volume(detail, self.cell)
            return torch.as_tensor(self.lapped(self.unlapped(y_hat, quality) + correction))


def _zero(layer: Convolution) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _pointwise(layer: Convolution) -> tuple[Tensor, Tensor]:
    """Weight (outputs, inputs) and bias of a convolution of one cell."""
    assert layer.bias is not None
    return layer.weight.flatten(1), layer.bias


def _channels(vector: Tensor) -> Tensor:
    return vector[None, :, None, None, None]


def analysis_of(config: CodecConfig) -> LinearAnalysis:
    """A new analysis as large as a configuration says."""
    return LinearAnalysis(config) if config.analysis is None else Analysis(config, config.analysis)


def synthesis_of(config: CodecConfig, part: str) -> LinearSynthesis:
    """A new "student" or "teacher" as large as a configuration says."""
    sizes, filter_sizes = _sizes(config, part)
    if sizes is None:
        return LinearSynthesis(config, filter_sizes)
    return Synthesis(config, sizes, filter_sizes)


def _sizes(config: CodecConfig, part: str) -> tuple[SynthesisConfig | None, FilterConfig | None]:
    if part == "teacher":
        return config.teacher, config.teacher_filter
    return config.student, config.student_filter


def stored_synthesis(weights: Weights, part: str) -> LinearSynthesis:
    """The synthesis that weights hold as "student" or "teacher".

    Raises
    ------
    WeightsError
        If it is missing or does not fit its configuration.
    """
    config = weights.config
    sizes, filter_sizes = _sizes(config, part)
    # Built as large as a configuration says, a network could take all memory before anything is compared, and
    # what it computes, however few numbers it has, when a chunk is decoded.
    widths = []
    if sizes is not None:
        widths.append(sizes.grid_width / math.prod(config.grid_stride))
        widths.append(sizes.latent_width / math.prod(config.latent_cell))
        widths.append(float(sizes.inr_width))
    if filter_sizes is not None:
        widths.append(filter_sizes.width / math.prod(config.filter_cell(filter_sizes)))
    if max(widths, default=0.0) > FEATURES_PER_VOXEL:
        raise WeightsError(f"the weights are damaged: more than {FEATURES_PER_VOXEL} features a voxel")
    least = config.latents * config.subbands * math.prod(config.latent_stride)
    if sizes is not None:
        least += sizes.latent_blocks * sizes.latent_width**2 + sizes.grid_blocks * sizes.grid_width**2
        least += config.latents * sizes.latent_width
        least += sizes.latent_width * sizes.grid_width * math.prod(config.latent_stride)
        least += sizes.grid_width * sizes.inr_width + sizes.inr_width**2
    if filter_sizes is not None:
        least += 9 * filter_sizes.layers * filter_sizes.width**2 + filter_sizes.width
    if least > sum(array.size for array in weights.part(part).values()):
        raise WeightsError(f"the weights are damaged: the {part} does not fit its configuration")
    network = synthesis_of(config, part)
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
