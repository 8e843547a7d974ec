"""One contract for every format of source: files of independent libraries read as one volume (z, y, x).

N5, precomputed and HDF5 stand beside this file; sources/write.py says who wrote them.
"""

from __future__ import annotations

import importlib.util
import json
import pickle  # what Ray does to a volume that it sends to a worker
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st
from object_store import ObjectStore
from PIL import Image

import ucray
from ucray.errors import DtypeError, SettingsError, SourceError, StorageError
from ucray.grid import Box
from ucray.storage.space import Space, axis_names
from ucray.storage.volume import open_volume

SOURCES = Path(__file__).parent / "sources"
UNKNOWN = Space()
NANOMETERS = Space((40.0, 4.0, 4.0), (0.0, 0.0, 0.0), "nanometer")


def _voxels(shape: tuple[int, ...], dtype: str) -> Any:
    spec = importlib.util.spec_from_file_location("write", SOURCES / "write.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.voxels(shape, dtype)


SHAPE = (9, 10, 11)
U16 = _voxels(SHAPE, "uint16")
U8 = _voxels(SHAPE, "uint8")


@dataclass(frozen=True)
class Case:
    """A source and what must be read from it."""

    url: str
    voxels: Any
    space: Space = UNKNOWN
    chunks: tuple[int, ...] = SHAPE
    array: str | None = None
    select: str | None = None
    tolerance: int = 0


def _n5(folder: Path) -> Case:
    expected = U16.copy()
    expected[:, :, 6:] = 0  # blocks that were never written
    return Case(str(SOURCES / "volume.n5"), expected, NANOMETERS, (4, 5, 6), array="em/s0")


def _precomputed(name: str, folder: Path) -> Case:
    space = Space((40.0, 4.0, 4.0), (12000.0, 800.0, 400.0), "nanometer")
    url = str(SOURCES / f"{name}.precomputed")
    if name == "raw":
        both = _voxels((2, *SHAPE), "uint16")
        return Case(url, both[1], space, (8, 8, 8), array="4_4_40", select="c=1")
    if name == "jpeg":
        # Quantised by JPEG at its writer's default quality.
        return Case(
            url, (np.indices((16,) * 3).sum(0) * 4 + 60).astype("uint8"), space, (8, 8, 8), tolerance=8
        )
    return Case(url, _voxels((16,) * 3, "uint8"), space, (8, 8, 8))


def _hdf5(folder: Path) -> Case:
    space = Space((40.0, 4.0, 4.0), (400.0, 0.0, 8.0), "nanometer")
    return Case(str(SOURCES / "volume.h5"), U16, space, (4, 5, 6), array="volumes/raw")


def _pages(folder: Path) -> Case:
    pages = [Image.fromarray(section) for section in U16]
    pages[0].save(folder / "pages.tif", save_all=True, append_images=pages[1:], compression="tiff_lzw")
    return Case(str(folder / "pages.tif"), U16, chunks=(1, 10, 11))


def _sections(folder: Path) -> Case:
    for place, section in enumerate(U8):
        # Numbers without leading zeros from 5 on: sorted by name, 10 would come before 5.
        Image.fromarray(section).save(folder / f"section_{place + 5}.tif", compression="tiff_deflate")
    (folder / "readme.txt").write_text("not a section")
    return Case(str(folder), U8, chunks=(1, 10, 11))


def _zarr(folder: Path, *, zarr_format: Any, dtype: str, **layout: Any) -> Case:
    place = folder / "volume.zarr"
    array = zarr.create_array(
        place, shape=SHAPE, chunks=(4, 5, 6), dtype=dtype, zarr_format=zarr_format, **layout
    )
    array[...] = U16
    array.attrs["resolution"] = [40, 4, 4]
    return Case(str(place), U16.astype(array.dtype.newbyteorder("=")), NANOMETERS, (4, 5, 6))


def _five_axes(folder: Path) -> Case:
    """OME-Zarr 0.4 with time and channels, as microscopes' converters write it."""
    place = folder / "five.ome.zarr"
    axes: list[dict[str, str]] = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}]
    axes += [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]
    transforms = [{"type": "scale", "scale": [1, 1, 40, 4, 4]}]
    datasets = [{"path": "0", "coordinateTransformations": transforms}]
    group = zarr.create_group(
        place, zarr_format=2, attributes={"multiscales": [{"axes": axes, "datasets": datasets}]}
    )
    array = group.create_array("0", shape=(2, 3, *SHAPE), chunks=(1, 1, 4, 5, 6), dtype="uint8")
    array[...] = 7
    array[1, 2] = U8
    return Case(str(place), U8, NANOMETERS, (4, 5, 6), select="t=1,c=2")


CASES: dict[str, Callable[[Path], Case]] = {
    "n5": _n5,
    "precomputed raw": partial(_precomputed, "raw"),
    "precomputed jpeg": partial(_precomputed, "jpeg"),
    "precomputed sharded": partial(_precomputed, "sharded"),
    "hdf5, big-endian": _hdf5,
    "tiff pages": _pages,
    "tiff sections": _sections,
    "zarr 2, big-endian, Fortran": partial(_zarr, zarr_format=2, order="F", dtype=">u2"),
    "zarr 3": partial(_zarr, zarr_format=3, dtype="float32"),
    "OME-Zarr of five axes": _five_axes,
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return CASES[request.param](tmp_path)


def test_a_source_is_a_volume(case: Case) -> None:
    volume = open_volume(case.url, case.array, select=case.select)
    assert (volume.shape, volume.dtype) == (case.voxels.shape, case.voxels.dtype.name)
    assert volume.space == case.space
    assert volume.chunks == case.chunks
    for box in (
        Box((0, 0, 0), volume.shape),
        Box((3, 4, 5), (8, 9, 7)),
        Box((8, 9, 10), (9, 10, 11)),
        Box((4, 0, 0), (5, 10, 11)),
    ):
        found = volume.read(box)
        assert found.dtype == case.voxels.dtype
        assert found.dtype.isnative
        error = np.abs(found.astype(float) - case.voxels[box.slices])
        assert error.max() <= case.tolerance


def test_a_volume_of_any_format_travels_to_a_worker(case: Case) -> None:
    volume = open_volume(case.url, case.array, select=case.select)
    box = Box((1, 2, 3), (5, 6, 7))
    expected = volume.read(box)
    arrived = pickle.loads(pickle.dumps(volume))
    assert arrived == volume
    assert "array" not in vars(arrived)
    np.testing.assert_array_equal(arrived.read(box), expected)


def test_reading_is_by_box(tmp_path: Path) -> None:
    """A section that is damaged is met where it is read, and nowhere else."""
    case = _sections(tmp_path)
    (tmp_path / "section_13.tif").write_bytes(b"II*\0")
    volume = open_volume(case.url)
    np.testing.assert_array_equal(volume.read(Box((0, 0, 0), (8, 10, 11))), U8[:8])
    with pytest.raises(SourceError, match=r"section_13\.tif"):
        volume.read(Box((7, 0, 0), (9, 2, 2)))


def test_sections_of_other_sizes_are_refused(tmp_path: Path) -> None:
    case = _sections(tmp_path)
    Image.fromarray(U8[0, :5]).save(tmp_path / "section_9.tif")
    with pytest.raises(SourceError, match=r"section_9\.tif is \(5, 11\)"):
        open_volume(case.url).read(Box((0, 0, 0), (9, 2, 2)))


def test_a_stack_of_files_with_more_than_a_section_each_is_refused(tmp_path: Path) -> None:
    for number in range(2):
        tifffile.imwrite(tmp_path / f"part_{number}.tif", U8[:3], photometric="minisblack")
    with pytest.raises(SourceError, match=r"part_0\.tif has 3 pages"):
        open_volume(str(tmp_path))


def test_a_scale_is_known_by_the_group_that_lists_it(tmp_path: Path) -> None:
    """Whoever names it: below the group's own folder, by its own place, with a slash too many."""
    group = zarr.open_group(tmp_path / "v.zarr", mode="w").create_group("em")
    voxels = np.zeros((10, 11, 12), np.uint8)
    voxels[:, :, 11] = 7
    group.create_array("deep/s0", data=voxels)
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "xyz"]
    transforms = [{"type": "scale", "scale": [4.0, 4.0, 40.0]}]
    datasets: Any = [{"path": "deep/s0", "coordinateTransformations": transforms}]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    root = tmp_path / "v.zarr"
    named: list[tuple[Path, str | None]] = [
        (root / "em", None),
        (root, "em/deep/s0"),
        (root / "em", "/deep/s0/"),
    ]
    named += [(root / "em" / "deep" / "s0", None), (root / "em" / "deep", "s0")]
    for place, array in named:
        volume = open_volume(str(place), array)
        assert volume.space == Space((40.0, 4.0, 4.0), unit="nanometer")
        assert volume.shape == (12, 11, 10)
        # A worker knows the axes, and need not look.
        assert pickle.loads(pickle.dumps(volume)).read(Box((11, 0, 0), (12, 11, 10))).sum() == 110 * 7


@pytest.mark.parametrize(
    ("attributes", "space"),
    [
        ({"resolution": 8.0}, Space((8.0, 8.0, 8.0), unit="nanometer")),
        ({"resolution": [40, 4, 4], "units": "nm"}, Space((40.0, 4.0, 4.0), unit="nanometer")),
        ({"voxel_size": [0.04, 0.004, 0.004], "units": "um"}, Space((0.04, 0.004, 0.004), unit="micrometer")),
        (
            {"resolution": [0.04, 4, 4], "units": ["um", "nm", "nanometer"], "offset": [1, 8, 0]},
            Space((40.0, 4.0, 4.0), (1000.0, 8.0, 0.0), "nanometer"),
        ),
        ({"resolution": "high"}, Space()),
        ({"resolution": ["a", "b", "c"]}, Space()),
        ({"resolution": [4, 4]}, Space()),
        ({"voxel_size": None, "resolution": [2, 2, float("nan")]}, Space()),
    ],
)
def test_voxel_sizes_as_tools_write_them(attributes: dict[str, Any], space: Space, tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "a.zarr", data=np.zeros((3, 4, 5), np.uint8))
    array.attrs.update(attributes)
    assert open_volume(str(tmp_path / "a.zarr")).space == space


def test_a_pattern_picks_sections(tmp_path: Path) -> None:
    _sections(tmp_path)
    volume = open_volume(str(tmp_path / "section_?.tif"))
    assert volume.shape == (5, 10, 11)
    np.testing.assert_array_equal(volume.read(Box((0, 0, 0), volume.shape)), U8[:5])


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (None, r"--select t=0,c=0 of t \(0 to 1\), c \(0 to 2\)"),
        ("c=1", "--select t=0"),
        ("t=0,c=3", r"--select c=3.*c \(0 to 2\)"),
        ("t=0,c=1,q=0", "q=0"),
        ("z=0,t=0,c=0", "z=0"),
    ],
)
def test_other_axes_are_chosen_or_refused_with_the_choices(
    tmp_path: Path, select: str | None, message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        open_volume(_five_axes(tmp_path).url, select=select)


@pytest.mark.parametrize("select", ["t", "t=x", "t=1=2", ""])
def test_a_selection_that_does_not_parse_is_refused(tmp_path: Path, select: str) -> None:
    with pytest.raises(SettingsError, match="t=0,c=1"):
        open_volume(_five_axes(tmp_path).url, select=select)


def test_another_place_on_an_axis_is_another_volume(tmp_path: Path) -> None:
    url = _five_axes(tmp_path).url
    first, second = (open_volume(url, select=f"t=1,c={c}") for c in (1, 2))
    assert first.identity != second.identity
    assert first.select == (("t", 1), ("c", 1))


def test_a_file_of_several_datasets_lists_them() -> None:
    with pytest.raises(SourceError, match="volumes/mask, volumes/raw"):
        open_volume(str(SOURCES / "volume.h5"))
    with pytest.raises(SourceError, match="'volumes'"):
        open_volume(str(SOURCES / "volume.h5"), "volumes")


@pytest.mark.parametrize("name", ["a.h5", "a.tif", "a.n5", "a.precomputed"])
def test_a_file_of_something_else_is_a_source_error(tmp_path: Path, name: str) -> None:
    with pytest.raises((SourceError, StorageError)):
        open_volume(str(tmp_path / name))
    (tmp_path / name).write_bytes(b"neither one nor the other")
    with pytest.raises(SourceError, match=name):
        open_volume(str(tmp_path / name))


def test_metadata_of_no_known_kind_are_a_source_error(tmp_path: Path) -> None:
    (tmp_path / "info").write_text(json.dumps({"@type": "neuroglancer_skeletons"}))
    (tmp_path / "attributes.json").write_text("[]")
    with pytest.raises(SourceError, match="holds no volume"):
        open_volume(str(tmp_path))
    with pytest.raises(SourceError, match="cannot be opened"):
        open_volume(f"precomputed://{tmp_path}")
    with pytest.raises(SourceError, match="cannot be opened"):
        open_volume(f"n5://{tmp_path}")


def test_segments_are_refused_by_their_dtype(tmp_path: Path) -> None:
    shutil.copytree(SOURCES / "raw.precomputed", tmp_path / "seg")
    info = json.loads((tmp_path / "seg" / "info").read_text())
    (tmp_path / "seg" / "info").write_text(json.dumps(info | {"data_type": "uint64", "num_channels": 1}))
    with pytest.raises(DtypeError, match="uint64"):
        open_volume(str(tmp_path / "seg"))


@pytest.mark.parametrize("name", ["volume.n5", "raw.precomputed", "volume.h5"])
def test_sources_are_read_from_an_object_store(store: ObjectStore, bucket: str, name: str) -> None:
    import s3fs

    files = s3fs.S3FileSystem(endpoint_url=store.endpoint)
    files.put(str(SOURCES / name), f"{bucket}/{name}", recursive=True)
    cases: dict[str, Callable[[Path], Case]] = {
        "volume.n5": _n5,
        "raw.precomputed": partial(_precomputed, "raw"),
        "volume.h5": _hdf5,
    }
    local = cases[name](SOURCES)
    volume = open_volume(f"{bucket}/{name}", local.array, store.endpoint, local.select)
    np.testing.assert_array_equal(volume.read(Box((1, 2, 3), (9, 10, 9))), local.voxels[1:, 2:, 3:9])


def test_sources_are_read_over_http(tmp_path: Path) -> None:
    handler = partial(_Quiet, directory=str(SOURCES))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            for name, case in (("volume.n5", _n5(tmp_path)), ("sharded.precomputed", None)):
                case = case or _precomputed("sharded", tmp_path)
                kind = name.rpartition(".")[2]
                volume = open_volume(f"{kind}://{url}/{name}", case.array)
                found = volume.read(Box((1, 2, 3), (9, 9, 9)))
                np.testing.assert_array_equal(found, case.voxels[1:9, 2:9, 3:9])
        finally:
            server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    """A file server without a log."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize("name", ["tensorstore", "h5py", "tifffile"])
def test_without_its_library_a_format_is_refused_by_name(name: str) -> None:
    url = {"tensorstore": "n5://x", "h5py": "x.h5", "tifffile": "x.tif"}[name]
    code = (
        f"import sys; sys.modules[{name!r}] = None\n"
        "from ucray.storage.volume import open_volume\n"
        f"open_volume({url!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"takes {name}; pip install 'ucray[sources]'" in done.stderr


def test_not_a_number_and_infinities_survive(tmp_path: Path) -> None:
    values = np.zeros((4, 4, 4), "float32")
    values[0, 0] = [np.nan, np.inf, -np.inf, 1.5]
    array = zarr.create_array(
        tmp_path / "f.zarr", shape=(8, 4, 4), chunks=(4, 4, 4), dtype="float32", fill_value=np.nan
    )
    array[:4] = values
    volume = open_volume(str(tmp_path / "f.zarr"))
    assert np.isnan(volume.fill_value)
    np.testing.assert_array_equal(volume.read(Box((0, 0, 0), (4, 4, 4))), values)
    assert np.isnan(volume.read(Box((4, 0, 0), (8, 4, 4)))).all()


def test_compressing_a_channel_of_a_source(tmp_path: Path) -> None:
    """The whole way from another format: the archive says which place was chosen."""
    folder = tmp_path / "sections"
    folder.mkdir()
    sections = _voxels((64, 64, 64), "uint8")
    for place, section in enumerate(sections):
        Image.fromarray(section).save(folder / f"{place}.tif")
    ucray.compress(
        str(folder),
        str(tmp_path / "a.zarr"),
        ucray.CompressOptions(lossless=True),
        weights="em-fib-v1",
        run_options=ucray.RunOptions(serial=True),
    )
    decoded: Any = zarr.open_group(tmp_path / "a.zarr", mode="r")["0"]
    np.testing.assert_array_equal(decoded[...], sections)
    assert ucray.verify(str(tmp_path / "a.zarr"), str(folder), serial=True).clean


@given(st.permutations(["x", "y", "z", "c", "t"]), st.integers(3, 5))
def test_named_axes_keep_their_names_and_others_get_the_usual_ones(names: list[str], count: int) -> None:
    found = axis_names(names[:count], count)
    if {"x", "y", "z"} <= set(names[:count]):
        assert found == tuple(names[:count])
    else:
        assert found == ("t", "c", "z", "y", "x")[5 - count :]
