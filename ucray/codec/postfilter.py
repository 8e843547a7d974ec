"""The post-filter: a small network on decoded voxels that knows how coarsely they were coded.

::

    x_hat --cells of 2^3--> 3^3 convolution --> layers of one plane each --> pointwise --(+)--> x_hat
      +--------------------------------------------------------------------------------^

What rounding takes away is not all lost: what is left of an edge says where the rest of it was. A linear
transform cannot say so, nor do networks on its cells find it (EXPERIMENTS.md), whose few positions all
differ; this one is the same at every second voxel. Filters behind a decoder are as old as HEVC's; with
convolutions: Dong et al. 2015, "Compression artifacts reduction by a deep convolutional network".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ucray.codec.conditioning import QualityAffine
from ucray.codec.convolution import Convolution
from ucray.codec.wavelet import cells_to_volume, volume_to_cells
from ucray.config import CodecConfig, FilterConfig
from ucray.grid import Shape3, triple

PLANES: tuple[Shape3, ...] = ((1, 3, 3), (3, 1, 3), (3, 3, 1))
"""Kernels of the layers, in turn: three of them see 5^3 cells for the price of one of 3^3."""


class FilterLayer(nn.Module):
    """x plus a convolution of one plane, scaled and shifted by the quality, ReLU."""

    def __init__(self, width: int, kernel: Shape3) -> None:
        super().__init__()
        self.spatial = Convolution(width, width, kernel, padding=triple(k // 2 for k in kernel))
        self.affine = QualityAffine(width)

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        return x + functional.relu(self.affine.behind(self.spatial, x, quality), inplace=True)


class PostFilter(nn.Module):
    """Decoded chunks (batch, 1, z, y, x) at qualities (batch,) to better ones; starts as no change."""

    def __init__(self, config: CodecConfig, sizes: FilterConfig) -> None:
        super().__init__()
        self.cell = config.filter_cell
        voxels = math.prod(self.cell)
        self.enter = Convolution(voxels, sizes.width, 3, padding=1)
        self.entered = QualityAffine(sizes.width)
        self.layers = nn.ModuleList(
            FilterLayer(sizes.width, PLANES[number % len(PLANES)]) for number in range(sizes.layers)
        )
        self.leave = Convolution(sizes.width, voxels, 1)
        self.left = QualityAffine(voxels)
        for parameter in self.leave.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        cells = volume_to_cells(x, self.cell).permute(0, 4, 1, 2, 3)
        features = functional.relu(self.entered.behind(self.enter, cells, quality), inplace=True)
        for layer in self.layers:
            features = layer(features, quality)
        change = self.left.behind(self.leave, features, quality).float()
        return torch.as_tensor(x + cells_to_volume(change.permute(0, 2, 3, 4, 1), self.cell))
