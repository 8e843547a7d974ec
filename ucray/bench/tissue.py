"""Membranes and neurons in a volume, by a fixed and seeded pipeline of well-kept libraries.

::

    volume --scikit-image features--> random forest --> membrane probability
                                                              |
               seeds far from membranes --watershed--> fragments --merged over weak borders--> segments

It learns from original voxels and their labels alone, and is then applied to what codecs make of others. A
forest is surer of voxels that it learnt from than of others: the thresholds behind it are chosen by what
forests say of voxels that they have not seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Volume = npt.NDArray[np.generic]
Probability = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Features = npt.NDArray[np.float32]
"""(z, y, x, features)."""

SIGMAS = (1.0, 4.0, 3)
"""Smallest and largest scale of the features in voxels, and how many."""

TREES, DEPTH, LEAF = 30, 14, 10
SAMPLES = 60_000
"""Voxels of each class that the forest learns from."""

PARTS = 4
"""Slabs along x; thresholds are chosen by what a forest that learnt from the others says of each."""

MERGES = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)
"""Mean membrane probability of a border below which fragments are one; the best where it learns is taken."""

SEED_DISTANCE = 2.0
"""Voxels from the nearest membrane that a seed keeps."""

FLAT = 2.0
"""Sections that are so many times as thick as their pixels are looked at one by one."""


@dataclass(frozen=True)
class Sight:
    """How voxels are looked at: normalised, and if `flat` section by section."""

    offset: float
    scale: float
    flat: bool

    @classmethod
    def of(cls, volume: Volume, *, flat: bool) -> Sight:
        """As suits a volume."""
        return cls(float(volume.mean()), float(volume.std()) or 1.0, flat)

    def features(self, volume: Volume) -> Features:
        """Features (z, y, x, features) of voxels (z, y, x)."""
        values = (volume.astype(np.float32) - np.float32(self.offset)) / np.float32(self.scale)
        return _features(values.astype(np.float32), self.flat)


@dataclass(frozen=True)
class Tracer:
    """What was learnt: a forest, the probability from which a voxel is membrane, and where borders are weak.

    `merge` is None where no segments were learnt.
    """

    forest: Any
    threshold: float
    merge: float | None

    @classmethod
    def trained(
        cls,
        features: Features,
        membrane: npt.NDArray[np.bool_],
        known: npt.NDArray[np.bool_],
        segments: Labels | None,
        *,
        seed: int,
    ) -> Tracer:
        """Learn from features of original voxels, which are membrane, where that is known, and neurons."""
        random = np.random.default_rng(seed)
        size, columns = membrane.size, np.arange(membrane.shape[2])

        def learnt(used: npt.NDArray[np.bool_]) -> Any:
            """A forest, or None where there is nothing to tell apart."""
            places = [np.flatnonzero(found & used) for found in (membrane, ~membrane)]
            if not all(map(len, places)):
                return None
            drawn = [random.choice(found, min(SAMPLES, len(found)), replace=False) for found in places]
            chosen = np.concatenate(drawn)
            rows = features.reshape(size, -1)[chosen]
            with _warning_filters_kept():
                return _forest(seed).fit(rows, membrane.reshape(-1)[chosen])

        forest = learnt(known)
        found = np.empty(membrane.shape, np.float32)
        for slab in np.array_split(columns, min(PARTS, len(columns))):
            here = (..., slice(slab[0], slab[-1] + 1))
            others = known.copy()
            others[here] = False
            unseen = learnt(others)
            found[here] = _probability(forest if unseen is None else unseen, features[(*here, slice(None))])
        levels = np.linspace(0.05, 0.95, 19)
        threshold = float(max(levels, key=lambda level: f1((found > level)[known], membrane[known])))
        tracer = cls(forest, threshold, None)
        if segments is None:
            return tracer
        fragments = tracer.fragments(found)
        merge = min(MERGES, key=lambda level: sum(information(merged(fragments, found, level), segments)))
        return cls(forest, threshold, merge)

    def membranes(self, features: Features) -> Probability:
        """Probability (z, y, x) that a voxel is membrane."""
        return _probability(self.forest, features)

    def segments(self, probability: Probability) -> Labels:
        """Neurons by number."""
        assert self.merge is not None
        return merged(self.fragments(probability), probability, self.merge)

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


def merged(fragments: Labels, probability: Probability, merge: float) -> Labels:
    """Fragments joined, weakest border first, while a border's mean membrane probability is below `merge`."""
    from skimage import graph

    if fragments.min() == fragments.max():
        return fragments
    borders = graph.rag_boundary(fragments, probability)  # type: ignore[no-untyped-call]
    joined = graph.merge_hierarchical(  # type: ignore[no-untyped-call]
        fragments,
        borders,
        thresh=merge,
        rag_copy=False,
        in_place_merge=True,
        merge_func=lambda borders, gone, kept: None,
        weight_func=_joined_border,
    )
    return np.asarray(joined, np.int64)


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


def _features(volume: npt.NDArray[np.float32], flat: bool) -> Features:
    from skimage.feature import multiscale_basic_features

    low, high, count = SIGMAS

    def of(part: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        found = multiscale_basic_features(  # type: ignore[no-untyped-call]
            part, sigma_min=low, sigma_max=high, num_sigma=count, texture=True
        )
        return np.asarray(found, np.float32)

    return np.stack([of(section) for section in volume]) if flat else of(volume)


def _forest(seed: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(TREES, max_depth=DEPTH, min_samples_leaf=LEAF, random_state=seed, n_jobs=-1)


def _probability(forest: Any, features: Features) -> Probability:
    *shape, count = features.shape
    with _warning_filters_kept():
        found = forest.predict_proba(features.reshape(-1, count))[:, 1]
    return np.asarray(found, np.float32).reshape(shape)


@contextmanager
def _warning_filters_kept() -> Iterator[None]:
    """Puts them back: threads of scikit-learn may leave none, and then warn of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`sklearn.utils.parallel.delayed`")
        yield
