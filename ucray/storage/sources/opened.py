"""What a format gives: an array with named axes in its own order, read by slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from ucray.errors import SourceError
from ucray.storage.space import Space, axis_names

Selection = tuple[slice | int, ...]


class Sliceable(Protocol):
    """Voxels that are read when they are asked for."""

    def __getitem__(self, selection: Selection, /) -> Any:
        """The voxels of one slice or place an axis."""


@dataclass(frozen=True)
class Opened:
    """An opened array of a source.

    Parameters
    ----------
    voxels
        Read by slices, in the order of `axes`.
    path
        Where the array is within its source.
    axes
        A letter each: z, y and x in some order, and others that one place is chosen of.
    chunks, shards
        Shapes of what is read at once, and of what holds several of them in one object.
    space
        That of z, y and x.
    metadata
        What tells this array from another, for the identity of the volume.
    """

    voxels: Sliceable
    path: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None
    fill_value: float
    space: Space
    metadata: str


def required(module: str, url: str) -> Any:
    """A library that reads one format; raises SourceError where it is not installed."""
    try:
        return import_module(module)
    except ImportError:
        raise SourceError(f"reading {url} takes {module}; pip install 'ucray[sources]'") from None


def axes_of(url: str, names: Sequence[Any] | None, count: int) -> tuple[str, ...]:
    """Letters of an array's axes; raises SourceError where nothing says which of them are z, y and x."""
    axes = axis_names(names, count)
    if axes is None:
        raise SourceError(f"{url} has {count} axes; a volume of three, (z, y, x), is wanted")
    return axes


def the_one(url: str, names: Sequence[str]) -> str:
    """The only array of a source; raises SourceError with the choice where there are several, or none."""
    if len(names) == 1:
        return names[0]
    listed = ", ".join(names) if names else "none"
    raise SourceError(
        f"{url} is a group without OME-Zarr scales; name an array with --array (there are: {listed})"
    )
