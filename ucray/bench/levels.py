"""Coarser levels two ways, averaged from the decoded volume or coded of their own: bytes and PSNR."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ucray.bench.ours import VolumeCodec
from ucray.codec.weights import Weights
from ucray.grid import Box, Shape3, triple
from ucray.quality import ErrorSum
from ucray.resample import scaled_shape, tiles

Volume = npt.NDArray[np.generic]

FINER = (0, 20, 40)
"""Steps of quality above that of level 0 at which a level is coded."""


@dataclass(frozen=True)
class LevelPoint:
    """One level, one way: bytes, and PSNR against the average-downsampled original in dB.

    `ratio` is that of level 0; `quality` that of the level's code, None where it has none.
    """

    ratio: float
    level: int
    quality: int | None
    nbytes: int
    share: float
    psnr: float


def measure_levels(
    voxels: Volume,
    weights: Weights,
    chunk: Shape3,
    factors: Sequence[Shape3],
    ratios: Iterable[float],
    data_range: float,
) -> list[LevelPoint]:
    """Levels of a volume (z, y, x) at some ratios of level 0."""
    points = []
    truth = [downsampled(voxels.astype(np.float32), each) for each in factors]
    with VolumeCodec(voxels, weights, chunk, float("nan")) as codec:
        coded = [(quality, codec.encode(quality)) for quality in map(codec.quality_for, ratios)]
        whole = [(quality, each.nbytes, codec.decode(each)) for quality, each in coded]
    for level, (each, expected) in enumerate(zip(factors, truth, strict=True), 1):

        def psnr(found: Volume, expected: Volume = expected) -> float:
            return ErrorSum.between(expected, found.astype(np.float32)).psnr(data_range)

        own = _rounded(expected, voxels.dtype)
        with VolumeCodec(own, weights, chunk, float("nan")) as codec:
            for quality, nbytes, decoded in whole:
                ratio = voxels.nbytes / nbytes
                points.append(LevelPoint(ratio, level, None, 0, 0.0, psnr(downsampled(decoded, each))))
                for finer in sorted({min(255, quality + step) for step in FINER}):
                    code = codec.encode(finer)
                    found = psnr(codec.decode(code))
                    points.append(LevelPoint(ratio, level, finer, code.nbytes, code.nbytes / nbytes, found))
    return sorted(points, key=lambda point: (point.ratio, point.level, point.quality or -1))


def downsampled(voxels: Volume, factors: Shape3) -> Volume:
    """Averages of `factors` voxels, in their dtype."""
    z, y, x = (float(factor) for factor in factors)
    shape = scaled_shape(triple(iter(voxels.shape)), (z, y, x))
    found = np.empty(shape, voxels.dtype)
    for tile in tiles(Box((0, 0, 0), shape), (z, y, x), triple(iter(voxels.shape))):
        found[tile.target.slices] = tile.of(voxels[tile.source.slices])
    return found


def levels_to_markdown(points: Sequence[LevelPoint]) -> str:
    """A table of the points."""
    lines = ["| ratio of level 0 | level | way | share of level 0's bytes | PSNR |", "|---|---|---|---|---|"]
    for point in points:
        way = "averaged from level 0" if point.quality is None else f"coded at quality {point.quality}"
        lines.append(f"| {point.ratio:.1f} | {point.level} | {way} | {point.share:.1%} | {point.psnr:.2f} |")
    return "\n".join(lines) + "\n"


def _rounded(voxels: Volume, dtype: np.dtype[np.generic]) -> Volume:
    return (np.rint(voxels) if np.issubdtype(dtype, np.integer) else voxels).astype(dtype)
