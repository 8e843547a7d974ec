"""Rate: how latents are rounded, and the quality that meets a target."""

from __future__ import annotations

from collections.abc import Callable

from ucray.config import QUALITIES

SLOPE = 0.1155
"""Squared error, in squared steps, that a bit is worth: ln(2) / 6 by the theory of high rates.

It is the encoder's choice alone; a decoder does not know it.
"""

COARSEST_LAMBDA = 24.0
FINEST_LAMBDA = 0.003
"""Weights of a bit per voxel against squared error, in variances of the volume, at both ends of quality."""

CHUNK_OVERHEAD = 16 + 11
"""Bytes an archive spends on a chunk beside its payload: its entry in the shard's index, and statistics."""

LARGEST_THRESHOLD = 0.98
"""A latent is never rounded down further than this from the next symbol."""


def finest_within(size_at: Callable[[int], float], target: float) -> int:
    """The highest quality whose size is at most `target`; quality 0 if none is.

    `size_at` grows with quality, so the search halves the range: eight calls at most.
    """
    low, high = 0, QUALITIES - 1
    while low < high:
        middle = (low + high + 1) // 2
        if size_at(middle) <= target:
            low = middle
        else:
            high = middle - 1
    return low


def coarsest_reaching(psnr_at: Callable[[int], float], target: float) -> int:
    """The lowest quality whose PSNR is at least `target`; the highest quality if none is."""
    low, high = 0, QUALITIES - 1
    while low < high:
        middle = (low + high) // 2
        if psnr_at(middle) >= target:
            high = middle
        else:
            low = middle + 1
    return low
