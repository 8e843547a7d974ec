"""Training batches from sampled tiles: normalised, filled in, cropped, flipped and turned."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ucray.codec.fill import fill_mask
from ucray.codec.inpaint import inpaint
from ucray.config import CodecConfig
from ucray.errors import SourceError
from ucray.grid import Shape3
from ucray.training.tissue import is_tissue

Tile = npt.NDArray[np.float16]


def prepare_tiles(
    voxels: Iterable[npt.NDArray[np.generic]], fill_value: float, offset: float, scale: float
) -> list[Tile]:
    """Normalise tiles (z, y, x) of any dtype and fill in what is no tissue; float16 to save memory.

    Raises
    ------
    SourceError
        If no tile holds tissue.
    """
    tiles = []
    for tile in voxels:
        mask = fill_mask(tile, fill_value)
        if not is_tissue(tile, fill_value):
            continue
        values = (tile.astype(np.float32) - np.float32(offset)) / np.float32(scale)
        filled = inpaint(torch.from_numpy(values)[None, None], torch.from_numpy(mask)[None, None])
        tiles.append(filled[0, 0].numpy().astype(np.float16))
    if not tiles:
        raise SourceError("the sampled tiles hold nothing but fill; there is nothing to train on")
    return tiles


CONTRAST = 0.1
BRIGHTNESS = 0.15
"""Spread of a crop's contrast (its logarithm) and brightness: no two volumes are stained alike."""


def tile_seed(seed: int, rank: int, step: int) -> int:
    """Seed of the chunks that a worker draws from a step on, where it starts or goes on from a checkpoint."""
    return step * 2**32 + seed * 4096 + rank


class TileSampler:
    """Draws batches of chunk-shaped crops from prepared tiles (z, y, x).

    Axes along which the codec works alike are exchanged at random and every axis is flipped at
    random, contrast and brightness are varied a little: tissue has no preferred direction, and a small
    volume yields many different chunks.
    """

    def __init__(
        self, tiles: list[Tile], chunk: Shape3, config: CodecConfig, seed: int, *, device: str = "cpu"
    ) -> None:
        self._tiles = [torch.from_numpy(tile).to(device) for tile in tiles]
        self._chunk = chunk
        self._random = np.random.default_rng(seed)
        self._orders = [
            order
            for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
            if all(
                chunk[axis] == chunk[other] and config.stride[axis] == config.stride[other]
                for axis, other in enumerate(order)
            )
        ]

    def draw(self, batch: int) -> Tensor:
        """A batch (batch, 1, z, y, x) in chunk shape, float32, on the tiles' device."""
        crops = torch.stack([self._crop() for _ in range(batch)])[:, None].float()
        contrast, brightness = (
            self._random.normal(0.0, (CONTRAST, BRIGHTNESS), (batch, 2)).astype(np.float32).T
        )
        scale, shift = (
            torch.from_numpy(drawn).to(crops.device)[:, None, None, None, None]
            for drawn in (np.exp(contrast), brightness)
        )
        return torch.addcmul(shift, crops, scale)

    def _crop(self) -> Tensor:
        tile = self._tiles[self._random.integers(len(self._tiles))]
        starts = [self._random.integers(n - c + 1) for n, c in zip(tile.shape, self._chunk, strict=True)]
        crop = tile[tuple(slice(s, s + c) for s, c in zip(starts, self._chunk, strict=True))]
        crop = crop.permute(self._orders[self._random.integers(len(self._orders))])
        flipped = tuple(axis for axis in range(3) if self._random.integers(2))
        return crop.flip(flipped)
