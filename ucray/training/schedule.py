"""How large steps are over a training: a warm-up, then half a cosine."""

from __future__ import annotations

import math

WARM_UP = 40
"""Steps over which the learning rate grows."""


def share_of_rate(step: int, steps: int) -> float:
    """Share of the learning rate, in (0, 1], at a step from 0 to steps - 1."""
    return min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
