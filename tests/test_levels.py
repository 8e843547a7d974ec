"""Coarser levels and free scales: what they show follows from level 0, through zarr's own ways of reading."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from object_store import ObjectStore
from ome_zarr_models.v05 import Image

import ucray
from ucray.errors import ArchiveError, SettingsError
from ucray.grid import Box, Shape3, triple
from ucray.resample import scaled_shape, tiles
from ucray.storage.space import Space
from ucray.zarr_level import LevelCodec, level_factors

SHAPE = (40, 50, 70)


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory, tiny_weights: ucray.Weights) -> str:
    """An archive with three levels of a volume that no chunk divides, at 8 nm and not at the origin."""
    folder = tmp_path_factory.mktemp("levels")
    (folder / "tiny.safetensors").write_bytes(tiny_weights.to_bytes())
    space = Space((8.0, 8.0, 8.0), (80.0, 0.0, 16.0), "nanometer")
    group = zarr.create_group(folder / "em.zarr", attributes=space.to_ome("em"))
    array = group.create_array("0", shape=SHAPE, chunks=SHAPE, dtype="uint8", fill_value=0)
    array[...] = np.random.default_rng(0).integers(90, 160, SHAPE, dtype=np.uint8)
    ucray.compress(
        str(folder / "em.zarr"),
        str(folder / "em.ucray"),
        ucray.CompressOptions(psnr=20, chunk=(16, 16, 16), shard=(32, 32, 32), levels=3),
        weights=str(folder / "tiny.safetensors"),
        run_options=ucray.RunOptions(serial=True),
    )
    return str(folder / "em.ucray")


def _mean(voxels: Any, factors: Shape3) -> Any:
    """The average-downsampled volume, cell by cell."""
    shape = triple(-(-n // f) for n, f in zip(voxels.shape, factors, strict=True))
    found = np.empty(shape)
    for index in np.ndindex(*shape):
        found[index] = voxels[
            tuple(slice(i * f, (i + 1) * f) for i, f in zip(index, factors, strict=True))
        ].mean()
    return found


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_level_is_the_average_of_the_decoded_volume(archive: str, level: int) -> None:
    group: Any = zarr.open_group(archive, mode="r")
    expected = _mean(group["0"][...], (2**level,) * 3)
    found = group[str(level)][...]
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    # Half a step of rounding, and what float32 leaves of a tie.
    assert np.abs(found - expected).max() <= 0.5 + 1e-4


@pytest.mark.parametrize(
    "selection",
    [
        np.s_[3],
        np.s_[2:18, 5, 1:30:7],
        np.s_[..., 0],
        np.s_[4:4],
        np.s_[19:20, 24:25, 34:35],
    ],
)
def test_a_level_is_read_by_any_selection(archive: str, selection: Any) -> None:
    level: Any = zarr.open_group(archive, mode="r")["1"]
    np.testing.assert_array_equal(level[selection], level[...][selection])


def test_a_level_is_read_by_places_and_masks(archive: str) -> None:
    level: Any = zarr.open_group(archive, mode="r")["1"]
    whole = level[...]
    np.testing.assert_array_equal(
        level.oindex[[0, 3, 19], [1, 2], [34]], whole[np.ix_([0, 3, 19], [1, 2], [34])]
    )
    mask = whole > np.median(whole)
    np.testing.assert_array_equal(level.get_mask_selection(mask), whole[mask])


def test_reading_a_part_of_a_level_decodes_that_part_alone(
    archive: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ucray.codec.decoder import ChunkDecoder

    decoded = []
    really = ChunkDecoder.decode

    def decode(self: ChunkDecoder, data: bytes, *rest: Any) -> Any:
        decoded.append(data)
        return really(self, data, *rest)

    monkeypatch.setattr(ChunkDecoder, "decode", decode)
    level: Any = zarr.open_group(archive, mode="r")["1"]
    level[0:8, 0:8, 0:8]
    assert len(decoded) == 1


def test_levels_take_no_bytes_to_speak_of_and_verify(archive: str) -> None:
    for level in (1, 2, 3):
        files = [file for file in (Path(archive) / str(level)).rglob("*") if file.is_file()]
        assert [file.name for file in files] == ["zarr.json"]
        assert files[0].stat().st_size < 1000
    assert ucray.verify(archive, serial=True).clean


def test_verify_sees_a_level_that_was_changed(archive: str, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(archive, tmp_path / "a")
    metadata = tmp_path / "a" / "2" / "zarr.json"
    metadata.write_text(metadata.read_text().replace('"factors":[4,4,4]', '"factors":[4,4,5]'))
    assert not ucray.verify(str(tmp_path / "a"), serial=True).clean
    metadata.write_text(metadata.read_text()[:40])
    assert not ucray.verify(str(tmp_path / "a"), serial=True).clean


def test_the_group_is_valid_ome_zarr_and_says_where_levels_lie(archive: str) -> None:
    image = Image.from_zarr(zarr.open_group(archive, mode="r"))
    (multiscale,) = image.ome_attributes.multiscales
    found = [
        [transform.model_dump()[transform.type] for transform in dataset.coordinateTransformations]
        for dataset in multiscale.datasets
    ]
    # Centres of first voxels: half a voxel of the level from the corner of the volume, which stays.
    assert found == [
        [[8.0, 8.0, 8.0], [80.0, 0.0, 16.0]],
        [[16.0, 16.0, 16.0], [84.0, 4.0, 20.0]],
        [[32.0, 32.0, 32.0], [92.0, 12.0, 28.0]],
        [[64.0, 64.0, 64.0], [108.0, 28.0, 44.0]],
    ]


def test_readers_of_zarr_read_levels_without_importing_ucray(archive: str) -> None:
    """dask and xarray, in a process of their own."""
    code = f"""
import dask.array, numpy, xarray, zarr
group = zarr.open_group({archive!r}, mode="r")
lazy = dask.array.from_zarr({archive!r}, component="1")
numpy.testing.assert_array_equal(lazy[3:9, :, 5].compute(scheduler="threads"), group["1"][3:9, :, 5])
# Levels have the same names of axes and other lengths: a dataset takes one of them.
named = xarray.open_zarr({archive!r}, consolidated=False, drop_variables=["0", "2", "3"])
numpy.testing.assert_array_equal(named["1"].isel(z=2, x=slice(3, 9)), group["1"][2, :, 3:9])
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_levels_are_read_from_an_object_store(archive: str, store: ObjectStore, bucket: str) -> None:
    import s3fs

    s3fs.S3FileSystem(endpoint_url=store.endpoint).put(archive, f"{bucket}/levels.ucray", recursive=True)
    options = {"endpoint_url": store.endpoint}
    there: Any = zarr.open_group(f"{bucket}/levels.ucray", mode="r", storage_options=options)
    here: Any = zarr.open_group(archive, mode="r")
    np.testing.assert_array_equal(there["2"][...], here["2"][...])


def test_levels_are_not_written_to(archive: str) -> None:
    level: Any = zarr.open_group(archive, mode="r+")["1"]
    with pytest.raises(SettingsError, match="follows from level 0"):
        level[...] = 7


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"source": "../0"},
        {"source": ""},
        {"factors": [2, 2]},
        {"factors": [0, 1, 1]},
        {"factors": "222"},
        {"factors": [float("inf"), 1, 1]},
    ],
)
def test_a_damaged_configuration_is_an_archive_error(change: dict[str, Any]) -> None:
    configuration = LevelCodec("0", (2, 2, 2)).to_dict()["configuration"]
    with pytest.raises(ArchiveError):
        LevelCodec.from_dict({"name": "ucray_level", "configuration": configuration | change})


def test_thick_slices_keep_their_number_until_the_other_axes_caught_up() -> None:
    assert level_factors((40.0, 4.0, 4.0), 4) == [(1, 2, 2), (1, 4, 4), (1, 8, 8), (2, 16, 16)]
    assert level_factors((1.0, 1.0, 1.0), 2) == [(2, 2, 2), (4, 4, 4)]


def test_another_number_of_levels_is_another_archive(archive: str) -> None:
    with pytest.raises(ucray.UcrayError, match="other settings"):
        ucray.compress(
            archive.replace("em.ucray", "em.zarr"),
            archive,
            ucray.CompressOptions(psnr=20, chunk=(16, 16, 16), shard=(32, 32, 32)),
            weights=archive.replace("em.ucray", "tiny.safetensors"),
            run_options=ucray.RunOptions(serial=True),
        )


SCALES = st.floats(0.3, 300.0)
EXTENTS = st.integers(1, 300)


def _resampled(voxels: Any, box: Box, scale: tuple[float, float, float]) -> Any:
    found = np.zeros(box.shape, voxels.dtype)
    counted = np.zeros(box.shape, int)
    for tile in tiles(box, scale, voxels.shape):
        place = tile.target.shifted(triple(-n for n in box.start)).slices
        found[place] = tile.of(voxels[tile.source.slices])
        counted[place] += 1
    assert (counted == 1).all()
    return found


@given(SCALES, EXTENTS, st.data())
def test_every_voxel_of_a_scale_is_a_mean_of_voxels_that_exist(scale: float, extent: int, data: Any) -> None:
    shape = (1, 1, extent)
    (_, _, count) = scaled_shape(shape, (1.0, 1.0, scale))
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, min(count, start + 40)))
    for tile in tiles(Box((0, 0, start), (1, 1, stop)), (1.0, 1.0, scale), shape):
        assert tile.source.clipped(shape) == tile.source
        matrix = tile.weights[2]
        assert (matrix >= 0).all()
        np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-4)


@given(st.integers(1, 40), st.integers(1, 12))
def test_at_a_whole_scale_voxels_are_plain_means(extent: int, scale: int) -> None:
    values = np.random.default_rng(extent).random((1, 1, extent)).astype(np.float32)
    shape = scaled_shape((1, 1, extent), (1.0, 1.0, float(scale)))
    found = _resampled(values, Box((0, 0, 0), shape), (1.0, 1.0, float(scale)))
    np.testing.assert_allclose(found, _mean(values, (1, 1, scale)), atol=1e-5)


def test_at_scale_one_nothing_changes() -> None:
    voxels = np.random.default_rng(0).integers(0, 65535, (5, 6, 300)).astype(np.uint16)
    np.testing.assert_array_equal(_resampled(voxels, Box((0, 0, 0), (5, 6, 300)), (1.0, 1.0, 1.0)), voxels)


def test_what_is_no_number_is_left_out_of_averages() -> None:
    values = np.arange(16, dtype=np.float32).reshape(2, 2, 4)
    values[0, 0, 0], values[0, 0, 1], values[:, :, 2:] = np.nan, np.inf, np.nan
    whole = Box((0, 0, 0), values.shape)
    np.testing.assert_array_equal(_resampled(values, whole, (1.0, 1.0, 1.0)), values)
    found = _resampled(values, Box((0, 0, 0), (1, 1, 2)), (2.0, 2.0, 2.0))
    np.testing.assert_allclose(found, [[[float(np.mean([4, 5, 8, 9, 12, 13])), np.nan]]])


def test_at_a_broken_scale_voxels_share_what_they_share() -> None:
    values = np.array([[[0.0, 10.0, 20.0, 30.0, 40.0]]], np.float32)
    found = _resampled(values, Box((0, 0, 0), (1, 1, 2)), (1.0, 1.0, 2.5))
    np.testing.assert_allclose(found, [[[(0 + 10 + 20 / 2) / 2.5, (20 / 2 + 30 + 40) / 2.5]]], rtol=1e-6)


def test_at_a_finer_scale_a_gradient_stays_a_gradient() -> None:
    values = np.arange(8, dtype=np.float32)[None, None]
    found = _resampled(values, Box((0, 0, 0), (1, 1, 16)), (1.0, 1.0, 0.5))[0, 0]
    # Between the centres of the first and the last voxel; beyond them there is nothing to go by.
    np.testing.assert_allclose(found, np.clip(np.arange(16) / 2 - 0.25, 0, 7), atol=1e-6)
