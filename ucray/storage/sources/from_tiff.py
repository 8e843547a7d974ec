"""TIFF: files of many pages (OME and ImageJ among them), and stacks of files with a section each."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import zarr

from ucray.errors import SourceError, UcrayError
from ucray.storage.objects import open_file, translated
from ucray.storage.sources.opened import Opened, Selection, axes_of, required
from ucray.storage.space import SPATIAL, UNITS, Space

SUFFIXES = (".tif", ".tiff", ".btf", ".tf8")

_SECTIONS = {"i": "z", "q": "z", "s": "c"}
"""tifffile's letters for pages that the file says nothing of, and for samples of a pixel."""


def stack_of(url: str) -> list[Path]:
    """The TIFF files of a local folder or pattern, by the numbers in their names; empty if it is neither."""
    if "://" in url:
        return []
    place = Path(url)
    if has_magic(place.name):
        files = list(place.parent.glob(place.name))
    elif place.is_dir():
        files = [file for file in place.iterdir() if file.suffix.lower() in SUFFIXES]
    else:
        return []
    return sorted(
        files, key=lambda file: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", file.name)]
    )


def open_tiff(url: str, array: str | None, endpoint_url: str | None) -> Opened:
    """The series `array` of a file, the first by default.

    Raises
    ------
    SourceError
        If the file is missing or no TIFF, or has no such series.
    """
    tifffile = required("tifffile", url)
    with translated(url):
        source = open_file(url, endpoint_url)
    try:
        file = tifffile.TiffFile(source, name=url)
        series = file.series[int(array or 0)]
        voxels = zarr.open_array(series.aszarr(level=0), mode="r")
        weakref.finalize(voxels, source.close)
    except Exception as error:
        # On damaged bytes the library raises what it meets.
        source.close()
        raise SourceError(f"{url} is no readable TIFF: {' '.join(str(error).split())}") from None
    letters = [_SECTIONS.get(axis, axis) for axis in series.axes.lower()]
    axes = axes_of(url, letters, len(letters))
    return Opened(
        voxels=voxels,
        path=array or "",
        axes=axes,
        shape=voxels.shape,
        dtype=voxels.dtype,
        chunks=voxels.chunks,
        shards=None,
        fill_value=0.0,
        space=_space(file),
        metadata=json.dumps([series.shape, series.dtype.str, series.axes, file.filehandle.size]),
    )


def open_stack(url: str, files: Sequence[Path]) -> Opened:
    """Files of one section each, as a volume; raises SourceError where the first is not of one section."""
    with _section(files[0]) as first:
        if first.ndim != 2:
            raise SourceError(f"{files[0]} has {first.ndim} axes; a stack is of files with one section each")
    names = [file.name for file in files]
    return Opened(
        voxels=_Stack(files, first.shape, first.dtype),
        path="",
        axes=SPATIAL,
        shape=(len(files), *first.shape),
        dtype=first.dtype,
        chunks=(1, *first.chunks),
        shards=None,
        fill_value=0.0,
        space=Space(),
        metadata=json.dumps([names, first.shape, first.dtype.str]),
    )


@dataclass(frozen=True)
class _Stack:
    """Sections read from a file each, strip by strip or tile by tile."""

    files: Sequence[Path]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __getitem__(self, selection: Selection) -> Any:
        z, *within = selection
        assert isinstance(z, slice)
        return np.stack([self._read(file, tuple(within)) for file in self.files[z]])

    def _read(self, file: Path, within: Selection) -> Any:
        with _section(file) as section:
            if (section.shape, section.dtype) != (self.shape, self.dtype):
                raise SourceError(
                    f"{file} is {section.shape} of {section.dtype}, "
                    f"the first section {self.shape} of {self.dtype}"
                )
            return section[within]


@contextmanager
def _section(file: Path) -> Iterator[zarr.Array[Any]]:
    tifffile = required("tifffile", str(file))
    try:
        with tifffile.TiffFile(file) as opened:
            if any(not page.keyframe.is_reduced for page in opened.pages[1:]):
                raise SourceError(
                    f"{file} has {len(opened.pages)} pages; a stack is of files with one section each"
                )
            yield zarr.open_array(opened.pages[0].aszarr(), mode="r")
    except UcrayError:
        raise
    except Exception as error:
        # On damaged bytes the library raises what it meets.
        raise SourceError(f"{file} is no readable TIFF: {' '.join(str(error).split())}") from None


def _space(file: Any) -> Space:
    """Voxel size in OME's or ImageJ's metadata."""
    if file.is_ome:
        pixels = ElementTree.fromstring(file.ome_metadata).find(".//{*}Pixels")
        if pixels is not None and all(f"PhysicalSize{axis}" in pixels.attrib for axis in "ZYX"):
            size = [float(pixels.attrib[f"PhysicalSize{axis}"]) for axis in "ZYX"]
            return Space.of_axes(
                SPATIAL, size, units=[pixels.attrib.get(f"PhysicalSize{axis}Unit", "um") for axis in "ZYX"]
            )
    if file.is_imagej:
        found = file.imagej_metadata
        tags = file.pages[0].tags
        if "spacing" in found and found.get("unit") in UNITS and "XResolution" in tags:
            # Pixels per unit, as a fraction.
            y, x = (tags[name].value for name in ("YResolution", "XResolution"))
            if y[0] and x[0]:
                size = [float(found["spacing"]), y[1] / y[0], x[1] / x[0]]
                return Space.of_axes(SPATIAL, size, units=[found["unit"]] * 3)
    return Space()
