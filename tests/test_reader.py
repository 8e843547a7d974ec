"""`ucray.open`: reading an archive at any scale, with little installed, from many threads and processes."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from html.parser import HTMLParser
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from object_store import ObjectStore
from PIL import Image

import ucray
from ucray.errors import ArchiveError, SettingsError, StorageError

SHAPE = (40, 50, 70)


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory, tiny_weights: ucray.Weights) -> str:
    """An archive of a volume that no chunk divides, with a level."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "tiny.safetensors").write_bytes(tiny_weights.to_bytes())
    array = zarr.create_array(folder / "em<b>.zarr", shape=SHAPE, chunks=SHAPE, dtype="uint8", fill_value=0)
    array[...] = np.random.default_rng(0).integers(90, 160, SHAPE, dtype=np.uint8)
    array.attrs["resolution"] = [8, 8, 8]
    ucray.compress(
        str(folder / "em<b>.zarr"),
        str(folder / "em.ucray"),
        ucray.CompressOptions(psnr=20, chunk=(16, 16, 16), shard=(32, 32, 32), levels=1),
        weights=str(folder / "tiny.safetensors"),
        run_options=ucray.RunOptions(serial=True),
    )
    return str(folder / "em.ucray")


@pytest.fixture(scope="session")
def voxels(archive: str) -> Any:
    group: Any = zarr.open_group(archive, mode="r")
    return group["0"][...]


def test_an_archive_reads_like_its_array(archive: str, voxels: Any) -> None:
    opened = ucray.open(archive)
    assert (opened.shape, opened.dtype.name, opened.ndim) == (SHAPE, "uint8", 3)
    assert opened.levels == [(1, 1, 1), (2, 2, 2)]
    assert opened.voxel_size == ([8.0, 8.0, 8.0], "nanometer")
    np.testing.assert_array_equal(opened[3:9, 5, -4:], voxels[3:9, 5, -4:])
    np.testing.assert_array_equal(np.asarray(opened), voxels)


def test_at_a_whole_scale_it_reads_like_a_level(archive: str) -> None:
    group: Any = zarr.open_group(archive, mode="r")
    np.testing.assert_array_equal(np.asarray(ucray.open(archive).at(2)), group["1"][...])


def test_a_free_scale_averages_what_its_voxels_cover(archive: str, voxels: Any) -> None:
    view = ucray.open(archive).at(scale=2.5)
    assert view.shape == (16, 20, 28)
    # On a grid five times as fine a voxel of 2.5 is 5 / 2 * 5 cells: every cell in one voxel alone.
    fine = voxels.astype(float).repeat(2, 0).repeat(2, 1).repeat(2, 2)
    expected = fine.reshape(16, 5, 20, 5, 28, 5).mean((1, 3, 5))
    # Half a step of rounding, and what float32 leaves of a tie.
    assert np.abs(view[...] - expected).max() <= 0.5 + 1e-4


def test_scales_differ_by_axis(archive: str, voxels: Any) -> None:
    view = ucray.open(archive).at((1, 2, 2))
    expected = voxels.reshape(40, 25, 2, 35, 2).mean((2, 4))
    assert view.shape == expected.shape
    assert np.abs(view[...] - expected).max() <= 0.5 + 1e-4


def test_a_finer_scale_stays_between_its_neighbours(archive: str, voxels: Any) -> None:
    view = ucray.open(archive).at(0.5)
    assert view.shape == (80, 100, 140)
    found = view[10:14, 10:14, 10:14].astype(int)
    around = voxels[4:8, 4:8, 4:8]
    assert found.min() >= around.min()
    assert found.max() <= around.max()


@pytest.fixture(scope="session")
def view(archive: str) -> ucray.View:
    return ucray.open(archive).at(2.5)


@pytest.fixture(scope="session")
def whole(view: ucray.View) -> Any:
    return view[...]


INDEX = st.integers(-60, 60)
SLICES = st.builds(
    slice, st.none() | INDEX, st.none() | INDEX, st.none() | st.integers(-3, 3).filter(lambda step: step != 0)
)
ONE = st.integers(-16, 15)


@given(st.tuples(SLICES | ONE, SLICES, SLICES) | st.tuples(SLICES) | st.just((..., slice(2, 5))) | ONE)
def test_views_are_sliced_as_numpy_slices(view: ucray.View, whole: Any, selection: Any) -> None:
    np.testing.assert_array_equal(view[selection], whole[selection])


@pytest.mark.parametrize("selection", [16, -17, (0, 0, 0, 0), "z", ([1, 2],)])
def test_what_no_view_has_is_an_index_error(archive: str, selection: Any) -> None:
    with pytest.raises(IndexError):
        ucray.open(archive).at(2.5)[selection]


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf"), (1, 2), (1, 0, 1)])
def test_a_scale_that_is_none_is_refused(archive: str, scale: Any) -> None:
    with pytest.raises(SettingsError, match="above zero"):
        ucray.open(archive).at(scale)


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="does not exist"):
        ucray.open(str(tmp_path / "none"))
    zarr.create_group(tmp_path / "plain").create_array("0", shape=(4, 4, 4), dtype="uint8")
    with pytest.raises(ArchiveError, match="no ucray archive"):
        ucray.open(str(tmp_path / "plain"))


def test_a_store_that_does_not_serve_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:1/a cannot be read"):
        ucray.open("http://127.0.0.1:1/a")
    # Connections that other tests made have credentials of theirs: a process of its own has none.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    code = "import ucray; ucray.open('s3://lab/a')"
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.stderr.splitlines()[-1].startswith(
        "ucray.errors.CredentialsError: no credentials for s3://lab/a"
    )


def test_an_archive_is_opened_on_an_object_store(
    archive: str, voxels: Any, store: ObjectStore, bucket: str
) -> None:
    import s3fs

    s3fs.S3FileSystem(endpoint_url=store.endpoint).put(archive, f"{bucket}/reader.ucray", recursive=True)
    opened = ucray.open(f"{bucket}/reader.ucray", {"endpoint_url": store.endpoint})
    np.testing.assert_array_equal(opened[5:25, 7, :], voxels[5:25, 7, :])


BLOCKED = (
    "ray",
    "s3fs",
    "botocore",
    "typer",
    "rich",
    "prometheus_client",
    "pyarrow",
    "PIL",
    "aiohttp",
    "numba",
)


ZARR = ("zarr", "fsspec")


@pytest.mark.parametrize(
    ("read", "blocked_too"),
    [
        ("import zarr; found = zarr.open_group(url, mode='r')['0'][20:40, :, 3]", ()),
        ("import zarr; found = zarr.open_group(url, mode='r')['1'][10:20, :, 3]", ()),
        ("import ucray; found = ucray.open(url)[20:40, :, 3]", ZARR),
        ("import ucray; a = ucray.open(url); found = a.at(1.5)[5:9]; repr(a); a._repr_html_()", ZARR),
    ],
)
def test_reading_takes_nothing_that_makes_archives(
    archive: str, read: str, blocked_too: tuple[str, ...]
) -> None:
    """From a disk not even zarr, whose import a first cutout would wait for."""
    blocked = "\n".join(f"sys.modules[{name!r}] = None" for name in (*BLOCKED, *blocked_too))
    code = f"import sys\n{blocked}\nurl = {archive!r}\n{read}\nassert found.std() > 0"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_opening_does_not_search_all_objects_and_leaves_collecting_as_it_was(archive: str) -> None:
    """In a fresh process: torch's objects are many."""
    code = f"""
import gc, torch
import ucray
looked = []
gc.callbacks.append(lambda phase, found: looked.append(found["generation"]))
opened = ucray.open({archive!r})
assert 2 not in looked
assert gc.isenabled()
gc.disable()
try:
    ucray.open("/nowhere")
except ucray.UcrayError:
    pass
assert not gc.isenabled()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize(("device", "told"), [("cpu", None), ("auto", None), ("tpu", "UCRAY_DEVICE=tpu")])
def test_the_device_of_a_reader_is_asked_for(
    archive: str, voxels: Any, monkeypatch: pytest.MonkeyPatch, device: str, told: str | None
) -> None:
    monkeypatch.setenv("UCRAY_DEVICE", device)
    if told is None:
        np.testing.assert_array_equal(ucray.open(archive)[:16, :16, :16], voxels[:16, :16, :16])
        return
    with pytest.raises(SettingsError, match=told):
        ucray.open(archive)[:16, :16, :16]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed_by_name(archive: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCRAY_DEVICE", "cuda")
    with pytest.raises(SettingsError, match="no such device here"):
        ucray.open(archive)[:16, :16, :16]


def test_an_archive_says_who_made_it(archive: str) -> None:
    told: Any = ucray.open(archive).group.attrs.asdict()["provenance"]
    assert told["versions"]["ucray"] == ucray.__version__
    assert told["versions"]["zarr"] == zarr.__version__
    source = archive.replace("em.ucray", "em<b>.zarr")
    command = f"ucray compress '{source}' --psnr 20 --roi 0:40,0:50,0:70"
    assert told["command"] == f"{command} --chunk 16,16,16 --shard 32,32,32 --levels 1"
    # Of a volume of no more chunks than are sampled, what was expected is what was stored.
    stored = ucray.info(archive)
    assert told["expected"]["psnr"] == pytest.approx(stored["psnr"], abs=0.051)
    # In an archive of 7 kB the metadata, which a plan takes for 2 kB, are a third.
    assert told["expected"]["ratio"] == pytest.approx(stored["measured_ratio"], rel=0.1)


def test_threads_read_the_same(archive: str, voxels: Any) -> None:
    opened = ucray.open(archive)
    corners = np.random.default_rng(1).integers(0, (20, 30, 50), (60, 3))

    def differs(corner: Any) -> bool:
        z, y, x = (int(n) for n in corner)
        found = opened[z : z + 20, y : y + 20, x : x + 20]
        return not np.array_equal(found, voxels[z : z + 20, y : y + 20, x : x + 20])

    with ThreadPoolExecutor(8) as pool:
        assert not any(pool.map(differs, corners))


def _sum(url: str) -> int:
    return int(ucray.open(url)[10:30].astype(int).sum())


def test_processes_read_the_same(archive: str, voxels: Any) -> None:
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        assert set(pool.map(_sum, [archive] * 6)) == {int(voxels[10:30].astype(int).sum())}


def test_a_notebook_shows_figures_and_a_picture(archive: str, voxels: Any) -> None:
    opened = ucray.open(archive)
    assert repr(opened) == f"<ucray archive {archive}: 40 x 50 x 70 uint8, psnr 20>"
    page = opened._repr_html_()
    seen: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: seen.append(tag)  # type: ignore[method-assign]
    parser.feed(page)
    assert "b" not in seen  # the source's name, em<b>.zarr, is text
    assert seen.count("img") == 1
    found = re.search(r"base64,([^\"]+)", page)
    assert found is not None
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))))
    plane = voxels[20].astype(float)
    assert picture.shape == plane.shape
    # The slice, stretched: alike but for what lies beyond its first and last hundredth.
    assert np.corrcoef(picture.ravel(), plane.ravel())[0, 1] > 0.99
