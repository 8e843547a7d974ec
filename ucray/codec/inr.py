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

CELLS = 512
"""Cells that are evaluated together where nothing has to be kept for a gradient."""


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
        width, points = scale.shape[1], len(scale)
        # Every point's scaling side by side: one matrix takes a cell's feature to all of its points.
        spread = torch.diag_embed(1.0 + scale).permute(1, 0, 2).reshape(width, points * width)
        joined = math.gcd(points, JOINED)
        layers = [
            (torch.block_diag(*[layer.weight] * joined).T, layer.bias.repeat(joined))  # type: ignore[no-untyped-call]
            for layer in (self.hidden, self.value)
        ]

        def values(cells: Tensor) -> Tensor:
            hidden = functional.relu(torch.addmm(shift.reshape(-1), cells, spread), inplace=True)
            (middle, middle_bias), (last, last_bias) = layers
            # Products this small waste a processor: several points share one, on a block-diagonal matrix.
            hidden = torch.addmm(middle_bias, hidden.reshape(-1, joined * width), middle)
            return torch.addmm(last_bias, functional.relu(hidden, inplace=True), last).reshape(-1, points)

        cells = features.reshape(-1, width)
        if torch.is_grad_enabled():
            found = values(cells)
        else:
            # What a few cells need stays in a processor's cache from one layer to the next.
            found = torch.cat([values(cells[n : n + CELLS]) for n in range(0, len(cells), CELLS)])
        return found.reshape(*features.shape[:-1], points)


def cell_coordinates(cell: Shape3) -> Tensor:
    """Centres of the voxels of one cell, row-major: (voxels, 3), (z, y, x) in [-1, 1]."""
    axes = [(torch.arange(n, dtype=torch.float32) + 0.5) * (2.0 / n) - 1.0 for n in cell]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def encode_coordinates(coordinates: Tensor) -> Tensor:
    """Coordinates (points, 3) with their sines and cosines: (points, 3 + 6 * OCTAVES)."""
    angles = [coordinates * (math.pi * 0.5 * 2**octave) for octave in range(OCTAVES)]
    return torch.cat([coordinates, *(f(a) for a in angles for f in (torch.sin, torch.cos))], dim=-1)
