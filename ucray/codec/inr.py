"""The implicit neural representation: voxel value as a function of coordinate and feature.

f(p, feature): the position p inside a cell scales and shifts the cell's feature, then two small
layers give the value (UniCompress, Yang et al. 2024, equation 1, with the prior and the latents in
place of a weight vector per block). As it takes coordinates, a cell may be sampled at any
resolution.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ucray.grid import Shape3

OCTAVES = 3
"""Octaves of sines and cosines in the encoding of a coordinate."""


JOINED = 4
"""Points of a cell that go through one matrix product."""


class CoordinateNetwork(nn.Module):
    """One value per coordinate and cell, from `width` features a cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        encoding = 3 * (2 * OCTAVES + 1)
        self.modulate = nn.Linear(encoding, 2 * width)
        self.hidden = nn.Linear(width, width)
        self.value = nn.Linear(width, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, features: Tensor, coordinates: Tensor) -> Tensor:
        """Values (..., points) of features (..., width) at coordinates (points, 3) in [-1, 1]."""
        scale, shift = self.modulate(encode_coordinates(coordinates)).chunk(2, dim=-1)
        hidden = functional.relu(torch.addcmul(shift, features.unsqueeze(-2), 1.0 + scale), inplace=True)
        # Products this small waste a processor: several points share one, on a block-diagonal matrix.
        width, points = hidden.shape[-1], hidden.shape[-2]
        joined = math.gcd(points, JOINED)
        hidden = hidden.reshape(*hidden.shape[:-2], points // joined, joined * width)
        hidden = _joined(self.hidden, hidden, joined)
        return _joined(self.value, functional.relu(hidden, inplace=True), joined).flatten(-2)


def _joined(layer: nn.Linear, values: Tensor, joined: int) -> Tensor:
    """A layer applied to each of the `joined` parts of the last axis of `values`."""
    weight = torch.block_diag(*[layer.weight] * joined)  # type: ignore[no-untyped-call]
    return functional.linear(values, weight, layer.bias.repeat(joined))


def cell_coordinates(cell: Shape3) -> Tensor:
    """Centres of the voxels of one cell, row-major: (voxels, 3), (z, y, x) in [-1, 1]."""
    axes = [(torch.arange(n, dtype=torch.float32) + 0.5) * (2.0 / n) - 1.0 for n in cell]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def encode_coordinates(coordinates: Tensor) -> Tensor:
    """Coordinates (points, 3) with their sines and cosines: (points, 3 + 6 * OCTAVES)."""
    angles = [coordinates * (math.pi * 0.5 * 2**octave) for octave in range(OCTAVES)]
    return torch.cat([coordinates, *(f(a) for a in angles for f in (torch.sin, torch.cos))], dim=-1)
