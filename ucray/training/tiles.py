"""Training batches from sampled tiles: random crops, flips and turns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ucray.config import CodecConfig
from ucray.grid import Shape3

Tile = npt.NDArray[np.float32]


class TileSampler:
    """Draws batches of chunk-shaped crops from normalised tiles (z, y, x), float32.

    Axes along which the codec works alike are exchanged at random and every axis is flipped at
    random: tissue has no preferred direction, and a small volume yields many different chunks.
    """

    def __init__(self, tiles: Sequence[Tile], chunk: Shape3, config: CodecConfig, seed: int) -> None:
        self._tiles = tiles
        self._chunk = chunk
        self._random = np.random.default_rng(seed)
        self._orders = [
            order
            for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
            if all(
                chunk[a] == chunk[b] and config.stride[a] == config.stride[b]
                for a, b in enumerate(order)
            )
        ]

    def draw(self, batch: int) -> Tensor:
        """A batch (batch, 1, z, y, x) in chunk shape."""
        return torch.from_numpy(np.stack([self._crop() for _ in range(batch)])[:, None])

    def _crop(self) -> Tile:
        tile = self._tiles[self._random.integers(len(self._tiles))]
        starts = [self._random.integers(n - c + 1) for n, c in zip(tile.shape, self._chunk, strict=True)]
        crop = tile[tuple(slice(s, s + c) for s, c in zip(starts, self._chunk, strict=True))]
        crop = crop.transpose(self._orders[self._random.integers(len(self._orders))])
        flipped = tuple(axis for axis in range(3) if self._random.integers(2))
        return np.flip(crop, flipped)
