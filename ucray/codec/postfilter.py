"""The post-filter: a small network on decoded voxels that knows how coarsely they were coded.

::

    x_hat --cells--> convolution --> residual convolutions --> pointwise --(+)--> x_hat
      +----------------------------------------------------------------------^

What rounding takes away is not all lost: what is left of an edge says where the rest of it was. A linear
transform cannot say so, nor do networks on its cells find it (EXPERIMENTS.md), whose few positions all
differ; this one is the same at every cell of a few voxels. Filters behind a decoder are as old as
HEVC's; with convolutions: Dong et al. 2015, "Compression artifacts reduction by a deep convolutional
network".
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn

from ucray.codec.cells import channels_to_volume, volume_to_channels
from ucray.codec.conditioning import QualityAffine
from ucray.codec.convolution import Convolution
from ucray.config import CodecConfig, FilterConfig
from ucray.grid import Shape3, triple

PLANES: tuple[Shape3, ...] = ((1, 3, 3), (3, 1, 3), (3, 3, 1))
"""Kernels of the convolutions, in turn: three of them see 5^3 cells for the price of one of 3^3."""

START = 0.3
"""Of its usual size, what the second convolution of a pair starts at."""


@cache
def fast_in_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 by instructions of its own (AMX, or those of AVX-512).

    A convolution then takes half of the time or less. What it adds to a voxel is small, and so is what
    eight bits of it say less than twenty-four.
    """
    return learns_in_bfloat16() or bool(torch.cpu._is_avx512_bf16_supported())


def learns_in_bfloat16() -> bool:
    """Whether it is fast at it and right about all gradients of weights: AMX alone.

    By AVX-512 those of kernels three sections deep, on grids of two, are what was in memory before; on grids
    of any other depth they are right (torch 2.13).
    """
    return bool(torch.cpu._is_amx_tile_supported())


class FilterLayer(nn.Module):
    """x plus a convolution of one plane, scaled and shifted by the quality, ReLU."""

    def __init__(self, width: int, kernel: Shape3) -> None:
        super().__init__()
        self.spatial = _convolution(width, width, kernel)
        self.affine = QualityAffine(width)

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        change = self.affine.behind(self.spatial, x, quality, relu=True)
        # In place saves a tensor where no gradient needs it.
        return x + change if torch.is_grad_enabled() else change.add_(x)


class FilterPair(nn.Module):
    """x plus two convolutions of a plane each, scaled and shifted by the quality, with a ReLU between.

    Adding costs a pass over memory, as much as half a convolution: here it is once in two, and within the
    second.
    """

    def __init__(self, width: int, kernels: tuple[Shape3, Shape3]) -> None:
        super().__init__()
        self.open = _convolution(width, width, kernels[0])
        self.opened = QualityAffine(width)
        self.close = _convolution(width, width, kernels[1])
        self.closed = QualityAffine(width)
        with torch.no_grad():
            self.close.weight.mul_(START)

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        """Where nothing is learned `x` is written over."""
        inner = self.opened.behind(self.open, x, quality, relu=True)
        return self.closed.behind(self.close, inner, quality, onto=x)


class PostFilter(nn.Module):
    """Decoded chunks (batch, 1, z, y, x) at qualities (batch,) to better ones; starts as no change."""

    def __init__(self, config: CodecConfig, sizes: FilterConfig) -> None:
        super().__init__()
        self.cell = config.filter_cell(sizes)
        self.finest = sizes.finest
        voxels = math.prod(self.cell)
        self.enter = _convolution(voxels, sizes.width, PLANES[0])
        self.entered = QualityAffine(sizes.width)
        planes = [PLANES[number % len(PLANES)] for number in range(1, sizes.layers + 1)]
        if sizes.cell is None:
            self.layers = nn.ModuleList(FilterLayer(sizes.width, plane) for plane in planes)
        else:
            pairs = zip(planes[::2], planes[1::2], strict=True)
            self.layers = nn.ModuleList(FilterPair(sizes.width, pair) for pair in pairs)
        self.leave = Convolution(sizes.width, voxels, 1)
        self.left = QualityAffine(voxels)
        for parameter in self.leave.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        change = self.change(x, quality)
        return x.to(torch.promote_types(x.dtype, torch.float32)) + change

    def change(self, x: Tensor, quality: Tensor) -> Tensor:
        """What is added to chunks, in as many bits as it is computed in."""
        cells = volume_to_channels(x.to(computed_in(x)), self.cell)
        features = self.entered.behind(self.enter, cells, quality, relu=True)
        for layer in self.layers:
            features = layer(features, quality)
        return channels_to_volume(self.left.behind(self.leave, features, quality), self.cell)


def computed_in(x: Tensor) -> torch.dtype:
    """What a chunk's features are computed in: fewer bits where the processor has a unit for them."""
    alone = len(x) == 1 and x.device.type == "cpu" and not torch.is_grad_enabled()
    return torch.bfloat16 if alone and fast_in_bfloat16() else x.dtype


def _convolution(inputs: int, outputs: int, kernel: Shape3) -> Convolution:
    return Convolution(inputs, outputs, kernel, padding=triple(k // 2 for k in kernel))
