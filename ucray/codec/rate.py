"""Rate: how latents are rounded, and the quality that meets a target."""

from __future__ import annotations

import math
from collections.abc import Callable

from ucray.config import QUALITIES

SLOPE = 0.1155
"""Squared error, in squared steps of rounding one by one, that a bit is worth: ln(2) / 6 at high rates.

It is the encoder's choice alone; a decoder does not know it.
"""

LONG_PATH_SHARE = 0.85
"""Of SLOPE, where paths go through many states: they find bits that are worth more (EXPERIMENTS.md)."""

COARSEST_LAMBDA = 24.0
FINEST_LAMBDA = 0.003
"""Weights of a bit per voxel against squared error, in variances of the volume, at both ends of quality."""

CHUNK_OVERHEAD = 16 + 11
"""Bytes an archive spends on a chunk beside its payload: its entry in the shard's index, and statistics."""

LARGEST_THRESHOLD = 0.98
"""A latent is never rounded down further than this from the next symbol."""


def finest_within(size_at: Callable[[int], float], target: float) -> int:
    """The highest quality whose size is at most `target`; quality 0 if none is.

    `size_at` grows with quality, nearly by the same share a step.
    """
    return _last_within(lambda quality: math.log(size_at(quality)), math.log(target))


def coarsest_reaching(psnr_at: Callable[[int], float], target: float) -> int:
    """The lowest quality whose PSNR is at least `target`; the highest quality if none is.

    `psnr_at` grows with quality, nearly in a line.
    """
    reached = _last_within(lambda quality: -psnr_at(QUALITIES - 1 - quality), -target)
    return QUALITIES - 1 - reached


def _last_within(value_at: Callable[[int], float], limit: float) -> int:
    """The last quality whose value is at most `limit`, of values that grow nearly in a line; 0 if none is.

    The method of false position, as Dowell and Jarratt's Illinois variant has it: where one end stays twice,
    its distance from the limit counts half, so that a bend does not make it slow; and where two looks
    did not halve the range together, the next one does.
    """
    below, above = value_at(0) - limit, math.inf
    if below > 0.0:
        return 0
    low, high, stayed = 0, QUALITIES, 0
    widths = [high - low]
    while high - low > 1:
        straight = math.isfinite(above - below) and (len(widths) < 3 or 2 * widths[-1] <= widths[-3])
        share = -below / (above - below) if straight else 0.5
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        distance = value_at(middle) - limit
        if distance <= 0.0:
            low, below = middle, distance
            above /= 2.0 if stayed < 0 else 1.0
            stayed = -1
        else:
            high, above = middle, distance
            below /= 2.0 if stayed > 0 else 1.0
            stayed = 1
        widths.append(high - low)
    return low
