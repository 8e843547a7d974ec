"""Where voxels lie: edge lengths, first corner and unit, from and to the metadata of OME-Zarr and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ucray.grid import Shape3

SPATIAL = ("z", "y", "x")

_SAME = {"channel": "c", "time": "t", "samples": "c"}
"""Names of axes that are written out, by letter."""

NANOMETER, MICROMETER = "nanometer", "micrometer"

UNITS = {"nm": NANOMETER, "um": MICROMETER, "µm": MICROMETER, "micron": MICROMETER, "microns": MICROMETER}
UNITS |= {"mm": "millimeter", "m": "meter", "Å": "angstrom", "A": "angstrom"}
"""Units as OME-Zarr writes them, by their symbols."""

NANOMETERS: dict[str | None, float] = {NANOMETER: 1.0, MICROMETER: 1e3, "angstrom": 0.1}
NANOMETERS |= {"millimeter": 1e6, "meter": 1e9}
"""Of a unit."""


@dataclass(frozen=True)
class Space:
    """Where the voxels lie: edge lengths and first corner (z, y, x), in `unit` (None: unknown)."""

    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    translation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    unit: str | None = None

    @classmethod
    def of_axes(
        cls,
        axes: Sequence[str],
        scale: Sequence[float],
        translation: Sequence[float] | None = None,
        units: Sequence[str | None] = (),
    ) -> Space:
        """The space of an array with any axes: values of those that are not z, y, x are left out.

        Where axes are in several units of length, all are in nanometers.
        """
        places = [axes.index(axis) for axis in SPATIAL]
        edges = [float(scale[place]) for place in places]
        moved = [0.0 if translation is None else float(translation[place]) for place in places]
        found = [units[place] for place in places] if units else [None] * len(places)
        named = [None if unit is None else UNITS.get(unit, unit) for unit in found]
        unit = named[0] if len(set(named)) == 1 else None
        lengths = [NANOMETERS[one] for one in named if one in NANOMETERS]
        if unit is None and len(lengths) == len(places):
            edges = [edge * length for edge, length in zip(edges, lengths, strict=True)]
            moved = [start * length for start, length in zip(moved, lengths, strict=True)]
            unit = NANOMETER
        return cls((edges[0], edges[1], edges[2]), (moved[0], moved[1], moved[2]), unit)

    def within(self, start: Shape3) -> Space:
        """The space of a region whose first voxel is `start`."""
        moved = [t + s * n for t, s, n in zip(self.translation, self.scale, start, strict=True)]
        return Space(self.scale, (moved[0], moved[1], moved[2]), self.unit)

    def coarser(self, factors: Shape3) -> Space:
        """The space of averages of `factors` voxels: OME-Zarr places a voxel by its centre."""
        scale = [s * f for s, f in zip(self.scale, factors, strict=True)]
        moved = [t + s * (f - 1) / 2 for t, s, f in zip(self.translation, self.scale, factors, strict=True)]
        return Space((scale[0], scale[1], scale[2]), (moved[0], moved[1], moved[2]), self.unit)

    def to_ome(self, name: str, levels: Sequence[Shape3] = ()) -> dict[str, Any]:
        """OME-Zarr 0.5 attributes of a group of the scale "0", and "1" and up by their factors (z, y, x)."""
        axes = [{"name": axis, "type": "space"} for axis in SPATIAL]
        if self.unit is not None:
            axes = [axis | {"unit": self.unit} for axis in axes]
        datasets = []
        for level, factors in enumerate([(1, 1, 1), *levels]):
            space = self.coarser(factors)
            transforms: list[dict[str, Any]] = [{"type": "scale", "scale": list(space.scale)}]
            if any(space.translation):
                transforms.append({"type": "translation", "translation": list(space.translation)})
            datasets.append({"path": str(level), "coordinateTransformations": transforms})
        multiscale: dict[str, Any] = {"name": name, "axes": axes, "datasets": datasets}
        if levels:
            multiscale["type"] = "mean"
        return {"ome": {"version": "0.5", "multiscales": [multiscale]}}


def axis_names(names: Sequence[Any] | None, count: int) -> tuple[str, ...] | None:
    """Names of an array's axes as letters; from their number where there are none, None if that says nothing.

    Three axes whose names are not x, y and z in some order are z, y and x.
    """
    if names is not None and len(names) == count and all(isinstance(name, str) and name for name in names):
        letters = [_SAME.get(name.lower(), name.lower()) for name in names]
        if set(SPATIAL) <= set(letters) and len(set(letters)) == count:
            return tuple(letters)
    return {3: SPATIAL, 4: ("c", *SPATIAL), 5: ("t", "c", *SPATIAL)}.get(count)


def multiscale_of(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first multiscale of OME-Zarr 0.5 or 0.4 attributes; empty if there is none."""
    ome = attributes.get("ome", attributes)
    found = ome.get("multiscales") if isinstance(ome, Mapping) else None
    if isinstance(found, Sequence) and found and isinstance(found[0], Mapping):
        return found[0]
    return {}


def multiscale_axes(multiscale: Mapping[str, Any]) -> list[Any]:
    """Names of a multiscale's axes, which older versions write without more."""
    axes = multiscale.get("axes", [])
    return [axis.get("name") if isinstance(axis, Mapping) else axis for axis in axes]


def multiscale_space(multiscale: Mapping[str, Any], path: str, axes: Sequence[str]) -> Space:
    """Voxel size, first corner and unit of one scale; unknown where they are not said of every axis."""
    described = multiscale.get("axes", [])
    datasets = [d for d in multiscale.get("datasets", []) if str(d.get("path")).strip("/") == path]
    if len(described) != len(axes) or not datasets:
        return Space()
    scale, translation = [1.0] * len(axes), [0.0] * len(axes)
    for transforms in (
        datasets[0].get("coordinateTransformations", []),
        multiscale.get("coordinateTransformations", []),
    ):
        for transform in transforms:
            if transform.get("type") == "scale":
                factors = [float(v) for v in transform["scale"]]
                scale = [a * b for a, b in zip(scale, factors, strict=True)]
                translation = [a * b for a, b in zip(translation, factors, strict=True)]
            elif transform.get("type") == "translation":
                translation = [
                    a + float(b) for a, b in zip(translation, transform["translation"], strict=True)
                ]
    units = [axis.get("unit") if isinstance(axis, Mapping) else None for axis in described]
    return Space.of_axes(axes, scale, translation, units)


def attribute_space(attributes: Mapping[str, Any], axes: Sequence[str]) -> Space:
    """The space that an array's own attributes tell, as connectomics tools write them.

    `resolution` or `voxel_size`, and `offset`, in nanometers unless `units` says else; `element_size_um`;
    all in the order of the array's spatial axes, or one value for all. What is no number says nothing.
    """
    spatial = [axis for axis in axes if axis in SPATIAL]

    def values(*names: str) -> list[float] | None:
        for name in names:
            try:
                found = np.broadcast_to(np.asarray(attributes[name], np.float64), len(spatial))
            except (KeyError, TypeError, ValueError):
                continue
            if np.isfinite(found).all():
                return [float(value) for value in found]
        return None

    def units() -> list[str]:
        found = attributes.get("units", NANOMETER)
        if isinstance(found, str):
            return [found] * len(spatial)
        listed = [str(unit) for unit in found] if isinstance(found, Sequence | np.ndarray) else []
        return listed if len(listed) == len(spatial) else [NANOMETER] * len(spatial)

    if (size := values("element_size_um")) is not None:
        return Space.of_axes(spatial, size, units=[MICROMETER] * len(spatial))
    if (size := values("resolution", "voxel_size")) is None:
        return Space()
    return Space.of_axes(spatial, size, values("offset"), units())
