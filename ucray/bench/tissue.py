"""Membranes and neurons in a volume, by a fixed and seeded pipeline of well-kept libraries.

::

    volume --forest, or U-Net--> membrane probability
                                         |
       seeds far from membranes --watershed--> fragments --merged over weak borders--> segments

It learns from original voxels and their labels alone, and is then applied to what codecs make of others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Volume = npt.NDArray[np.generic]
Probability = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Features = npt.NDArray[np.float32]
"""(z, y, x, features)."""

MERGES = tuple(n / 40 for n in range(8, 33))
"""Mean membrane probability of a border below which fragments are one; in order."""

AROUND = 4
"""Thresholds on either side of the best that are looked at too: one border more or less is chance."""

SEED_DISTANCE = 2.0
"""Voxels from the nearest membrane that a seed keeps."""

FLAT = 2.0
"""Sections that are so many times as thick as their pixels are looked at one by one."""


class Finder(Protocol):
    """Says how probably a voxel is membrane."""

    def __call__(self, features: Features, /) -> Probability: ...


@dataclass(frozen=True)
class Lesson:
    """What is learnt from: features of original voxels, which are membrane, where that is known, neurons."""

    features: Features
    membrane: npt.NDArray[np.bool_]
    known: npt.NDArray[np.bool_]
    segments: Labels | None


class Sight(Protocol):
    """How voxels are looked at, and how what is seen in them is learnt."""

    def features(self, volume: Volume) -> Features:
        """What is seen (z, y, x, features) in voxels (z, y, x)."""
        ...

    def learnt(self, lesson: Lesson, *, seed: int) -> tuple[Finder, Probability]:
        """What finds membranes, and what thresholds are chosen by: what is said of the lesson's voxels."""
        ...


@dataclass(frozen=True)
class Tracer:
    """What was learnt: membranes, the probability from which a voxel is one, and where borders are weak.

    `merges` are the best threshold for that and its neighbours, in order; none where no segments were learnt.
    """

    membranes: Finder
    threshold: float
    merges: tuple[float, ...]

    @classmethod
    def trained(
        cls,
        sight: Sight,
        lesson: Lesson,
        *,
        seed: int,
    ) -> Tracer:
        """Learn as a sight does; thresholds are the best for its voxels."""
        find, found = sight.learnt(lesson, seed=seed)
        membrane, known, segments = lesson.membrane, lesson.known, lesson.segments
        levels = np.linspace(0.05, 0.95, 19)
        threshold = float(max(levels, key=lambda level: f1((found > level)[known], membrane[known])))
        tracer = cls(find, threshold, ())
        if segments is None:
            return tracer
        fragments = tracer.fragments(found)
        lost = [sum(information(one, segments)) for one in merged(fragments, found, MERGES)]
        best = lost.index(min(lost))
        return cls(find, threshold, MERGES[max(best - AROUND, 0) : best + AROUND + 1])

    def segments(self, probability: Probability) -> list[Labels]:
        """Neurons by number, for each of the thresholds."""
        return list(merged(self.fragments(probability), probability, self.merges))

    def fragments(self, probability: Probability) -> Labels:
        """Parts of neurons, each around a place far from any membrane, numbered from 1."""
        from scipy import ndimage
        from skimage.segmentation import watershed

        away = ndimage.distance_transform_edt(probability < self.threshold)
        smooth = ndimage.gaussian_filter(away, 1.0)
        peaks = (smooth == ndimage.maximum_filter(smooth, 5)) & (away >= SEED_DISTANCE)
        seeds, count = ndimage.label(peaks, np.ones((3, 3, 3)))
        if count == 0:
            return np.ones(probability.shape, np.int64)
        fragments = watershed(probability - 0.01 * smooth.astype(np.float32), seeds)  # type: ignore[no-untyped-call]
        return np.asarray(fragments, np.int64)


def merged(fragments: Labels, probability: Probability, merges: Sequence[float]) -> Iterator[Labels]:
    """Fragments joined, weakest border first, while its mean membrane probability is below a threshold.

    That is done for each of some rising thresholds, from where the one before it ended.
    """
    from skimage import graph

    if fragments.min() == fragments.max():
        yield from [fragments] * len(merges)
        return
    borders = graph.rag_boundary(fragments, probability)  # type: ignore[no-untyped-call]
    for merge in merges:
        joined = graph.merge_hierarchical(  # type: ignore[no-untyped-call]
            fragments,
            borders,
            thresh=merge,
            rag_copy=False,
            in_place_merge=True,
            merge_func=lambda borders, gone, kept: None,
            weight_func=_joined_border,
        )
        yield np.asarray(joined, np.int64)


def _joined_border(borders: Any, gone: int, kept: int, other: int) -> dict[str, float]:
    """The border of two fragments that become one with a third: the mean over both."""
    nothing = {"weight": 0.0, "count": 0}
    one, two = (borders[fragment].get(other, nothing) for fragment in (gone, kept))
    count = one["count"] + two["count"]
    return {"count": count, "weight": (one["weight"] * one["count"] + two["weight"] * two["count"]) / count}


def f1(found: npt.NDArray[np.bool_], wanted: npt.NDArray[np.bool_]) -> float:
    """Harmonic mean of precision and recall."""
    both = float((found & wanted).sum())
    return 2 * both / max(float(found.sum() + wanted.sum()), 1.0)


def information(found: Labels, wanted: Labels) -> tuple[float, float]:
    """Variation of information, split and merge, in bits (Meila 2007), where `wanted` is not 0."""
    from skimage.metrics import variation_of_information

    merge, split = variation_of_information(*_known(found, wanted))  # type: ignore[no-untyped-call]
    return float(split), float(merge)


def rand_error(found: Labels, wanted: Labels) -> float:
    """Adapted Rand error (Arganda-Carreras et al. 2015), where `wanted` is not 0."""
    from skimage.metrics import adapted_rand_error

    error, _, _ = adapted_rand_error(*reversed(_known(found, wanted)))  # type: ignore[no-untyped-call]
    return float(error)


def _known(found: Labels, wanted: Labels) -> tuple[Labels, Labels]:
    known = wanted > 0
    return found[known], wanted[known]
