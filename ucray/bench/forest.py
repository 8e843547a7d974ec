"""Membranes found by a random forest in features of well-kept libraries: learnt in a minute or two."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ucray.bench.tissue import Features, Finder, Lesson, Probability, Volume
from ucray.codec.tracer import Normaliser

SIGMAS = (1.0, 4.0, 3)
"""Smallest and largest scale of the features in voxels, and how many."""

TREES, DEPTH, LEAF = 30, 14, 10
SAMPLES = 60_000
"""Voxels of each class that the forest learns from."""

PARTS = 4
"""Slabs along x; thresholds are chosen by what a forest that learnt from the others says of each."""


@dataclass(frozen=True)
class ForestSight:
    """How voxels are looked at: normalised, and if `flat` section by section."""

    normaliser: Normaliser
    flat: bool

    @classmethod
    def of(cls, volume: Volume, *, flat: bool) -> ForestSight:
        """As suits a volume."""
        return cls(Normaliser.of(volume), flat)

    def features(self, volume: Volume) -> Features:
        """Features (z, y, x, features) of voxels (z, y, x)."""
        return _features(self.normaliser.normalised(volume), self.flat)

    def learnt(self, lesson: Lesson, *, seed: int) -> tuple[Finder, Probability]:
        """A forest, and what others like it say of voxels that they have not seen.

        A forest is surer of voxels that it learnt from.
        """
        features, membrane, known = lesson.features, lesson.membrane, lesson.known
        random = np.random.default_rng(seed)
        size, columns = membrane.size, np.arange(membrane.shape[2])

        def grown(used: npt.NDArray[np.bool_]) -> Any:
            """A forest, or None where there is nothing to tell apart."""
            places = [np.flatnonzero(found & used) for found in (membrane, ~membrane)]
            if not all(map(len, places)):
                return None
            drawn = [random.choice(found, min(SAMPLES, len(found)), replace=False) for found in places]
            chosen = np.concatenate(drawn)
            rows = features.reshape(size, -1)[chosen]
            with _warning_filters_kept():
                return _forest(seed).fit(rows, membrane.reshape(-1)[chosen])

        forest = grown(known)
        found = np.empty(membrane.shape, np.float32)
        for slab in np.array_split(columns, min(PARTS, len(columns))):
            here = (..., slice(slab[0], slab[-1] + 1))
            others = known.copy()
            others[here] = False
            unseen = grown(others)
            found[here] = _probability(forest if unseen is None else unseen, features[(*here, slice(None))])
        return lambda features: _probability(forest, features), found


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
