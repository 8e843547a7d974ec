"""The quality that meets a target, found with few looks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ucray.codec.rate import coarsest_reaching, finest_within
from ucray.config import QUALITIES

Curve = Callable[[int], float]

MOST_LOOKS = 1 + 3 * 8
"""Three halve the range at least, of 256 qualities; one is for the coarsest."""


class Looks:
    """A curve that counts how often it is asked."""

    def __init__(self, curve: Curve) -> None:
        self._curve = curve
        self.count = 0

    def __call__(self, quality: int) -> float:
        assert 0 <= quality < QUALITIES
        self.count += 1
        return self._curve(quality)


steps = st.one_of(
    st.lists(st.floats(0.0, 9.0), min_size=QUALITIES, max_size=QUALITIES),
    # Nothing but one jump, and what grows ever faster.
    st.integers(0, QUALITIES - 1).map(lambda place: [1e3 * (n == place) for n in range(QUALITIES)]),
    st.floats(1.0, 1.1).map(lambda growth: [growth**n for n in range(QUALITIES)]),
)


@given(steps, st.floats(0.0, 1.0))
def test_it_is_the_highest_quality_within_a_size(steps: list[float], place: float) -> None:
    sizes = 1.0 + np.cumsum(steps)
    target = float(sizes[0] / 2 + place * sizes[-1])
    looks = Looks(lambda quality: float(sizes[quality]))
    found = finest_within(looks, target)
    assert looks.count <= MOST_LOOKS
    within = np.flatnonzero(np.log(sizes) <= math.log(target))
    assert found == (within[-1] if len(within) else 0)


@given(steps, st.floats(0.0, 1.0), st.integers(1, QUALITIES))
def test_it_is_the_lowest_quality_that_reaches_a_psnr(steps: list[float], place: float, finite: int) -> None:
    psnrs = np.cumsum(steps)
    target = float(place * psnrs[-1] * 1.1)
    # From some quality on nothing may be lost at all.
    psnrs[finite:] = math.inf
    reaching = np.flatnonzero(psnrs >= target)
    expected = reaching[0] if len(reaching) else QUALITIES - 1
    looks = Looks(lambda quality: float(psnrs[quality]))
    assert coarsest_reaching(looks, target) == expected
    assert looks.count <= MOST_LOOKS


@given(st.floats(-1.0, 1.0), st.floats(0.1, 0.9))
def test_a_curve_like_those_of_volumes_takes_few_looks(bend: float, place: float) -> None:
    def size(quality: int) -> float:
        share = quality / (QUALITIES - 1)
        return math.exp(5.0 * (share + 0.5 * bend * share * (1.0 - share)))

    looks = Looks(size)
    finest_within(looks, math.exp(5.0 * place))
    assert looks.count <= 7
