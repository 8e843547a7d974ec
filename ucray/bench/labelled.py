"""A volume and what is known of it: which voxels are membrane, and neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ucray.bench.tissue import Labels, Volume
from ucray.errors import SettingsError
from ucray.grid import Box


@dataclass(frozen=True)
class Labelled:
    """A volume (z, y, x), which of its voxels are membrane, where that is `known`, and its neurons, if given.

    `flat` says that its sections are thick, and looked at one by one.
    """

    voxels: Volume
    membrane: npt.NDArray[np.bool_]
    known: npt.NDArray[np.bool_]
    segments: Labels | None
    flat: bool

    def part(self, box: Box) -> Labelled:
        """A part of it; raises SettingsError if there is no membrane in it, or nothing else."""
        found, known = self.membrane[box.slices], self.known[box.slices]
        if not (found & known).any() or (found | ~known).all():
            raise SettingsError(f"--labels holds no membranes, or nothing else, in {box}")
        segments = None if self.segments is None else self.segments[box.slices]
        return Labelled(self.voxels[box.slices], found, known, segments, self.flat)


def labelled(
    volume: Volume, labels: npt.NDArray[np.generic], membrane: Sequence[int], *, flat: bool
) -> Labelled:
    """A volume and its labels: classes of which some are `membrane`, or else neurons, where 0 is unknown.

    Between neurons is membrane.

    Raises
    ------
    SettingsError
        If the shapes differ.
    """
    from skimage.segmentation import find_boundaries

    if labels.shape != volume.shape:
        raise SettingsError(f"--labels has shape {labels.shape}, the volume {volume.shape}")
    if membrane:
        return Labelled(volume, np.isin(labels, membrane), np.ones(labels.shape, bool), None, flat)
    # The largest number may be far beyond how many there are; 0 stays what it is.
    numbers, places = np.unique(np.append(labels.reshape(-1), 0), return_inverse=True)
    zero = int(np.flatnonzero(numbers == 0)[0])
    segments = ((places[:-1] - zero) % len(numbers)).reshape(labels.shape)
    sections = segments if flat else segments[None]
    found = np.stack([find_boundaries(section, mode="thick") for section in sections])  # type: ignore[no-untyped-call]
    return Labelled(volume, found.reshape(labels.shape), segments > 0, segments, flat)
