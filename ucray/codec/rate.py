"""Rate control: the quality that meets a size, searched on a sample of chunks."""

from __future__ import annotations

from collections.abc import Callable

from ucray.config import QUALITIES


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
