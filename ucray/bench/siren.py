"""The paper's baseline: one implicit neural representation fitted to each block by gradient.

A SIREN (Sitzmann et al. 2020) as SCI uses it (Yang et al. 2022), with as many weights, stored as
float16, as the ratio leaves room for. Fitting is full-batch Adam.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from ucray.bench.samples import Bytes3
from ucray.grid import Shape3

LAYERS = 5
"""Linear layers, the first and the last among them."""

FREQUENCY = 30.0
"""omega_0 of SIREN, section 3.2."""

STEPS = 500
LEARNING_RATE = 1e-3


class Siren(nn.Module):
    """Sines of linear layers: coordinates (n, 3) in [-1, 1] to values (n, 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [3] + [width] * (LAYERS - 1) + [1]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        with torch.no_grad():
            for number, layer in enumerate(self.layers):
                assert isinstance(layer, nn.Linear)
                inputs = layer.in_features
                reach = 1 / inputs if number == 0 else math.sqrt(6 / inputs) / FREQUENCY
                layer.weight.uniform_(-reach, reach)

    def forward(self, coordinates: Tensor) -> Tensor:
        """Values at coordinates."""
        values = coordinates
        for layer in self.layers[:-1]:
            values = torch.sin(FREQUENCY * layer(values))
        return torch.as_tensor(self.layers[-1](values))


def width_for(voxels: int, ratio: float) -> int:
    """The widest network whose float16 weights fit `voxels` / `ratio` bytes; at least 1."""
    width = 1
    while _weights(width + 1) * 2 <= voxels / ratio:
        width += 1
    return width


def encode(block: Bytes3, ratio: float) -> bytes:
    """Fit a network to a block (z, y, x); its float16 weights."""
    torch.manual_seed(0)
    network = Siren(width_for(block.size, ratio))
    target = torch.from_numpy(block.reshape(-1, 1).astype(np.float32)) / 127.5 - 1
    coordinates = _coordinates(block.shape)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        loss = (network(coordinates) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])
    return flat.half().numpy().tobytes()


def decode(data: bytes, shape: Shape3) -> Bytes3:
    """A block of voxels from a network's weights."""
    flat = torch.from_numpy(np.frombuffer(data, np.float16).astype(np.float32))
    width = next(w for w in range(1, len(flat) + 1) if _weights(w) == len(flat))
    network = Siren(width)
    with torch.no_grad():
        nn.utils.vector_to_parameters(flat, network.parameters())
        values = network(_coordinates(shape)).reshape(shape).numpy()
    return np.asarray(np.clip(np.rint((values + 1) * 127.5), 0, 255).astype(np.uint8))


def _weights(width: int) -> int:
    return 4 * width + (LAYERS - 2) * width * (width + 1) + width + 1


def _coordinates(shape: tuple[int, ...]) -> Tensor:
    axes = [torch.linspace(-1, 1, n) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
