"""Archives on this machine's disk are read without zarr, and as zarr reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import ucray
from ucray.errors import ArchiveError, ChunkError, StorageError
from ucray.storage.index import chunk_spans, empty_table, index_size, pack_index
from ucray.storage.local import LocalArchive
from ucray.zarr_codec import UcrayCodec

SHAPE = (40, 50, 70)
SLOTS = 8
FIRST_SHARD = Path("0/c/0/0/0")


def compressed(folder: Path, weights: ucray.Weights, voxels: Any, fill_value: float) -> Path:
    """An archive of a volume that no chunk divides."""
    (folder / "tiny.safetensors").write_bytes(weights.to_bytes())
    zarr.create_array(folder / "em.zarr", data=voxels, chunks=SHAPE, fill_value=fill_value)
    ucray.compress(
        str(folder / "em.zarr"),
        str(folder / "em.ucray"),
        ucray.CompressOptions(psnr=20, chunk=(16, 16, 16), shard=(32, 32, 32)),
        weights=str(folder / "tiny.safetensors"),
        run_options=ucray.RunOptions(serial=True),
    )
    return folder / "em.ucray"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, tiny_weights: ucray.Weights) -> Path:
    """Of noise, with fill in one corner: whole chunks of it, and parts of others."""
    voxels = np.random.default_rng(0).integers(90, 160, SHAPE, dtype=np.uint8)
    voxels[:20, :40, :40] = 0
    return compressed(tmp_path_factory.mktemp("local"), tiny_weights, voxels, 0)


@pytest.fixture
def copy(archive: Path, tmp_path: Path) -> Path:
    """A copy of the archive that may be damaged."""
    return Path(shutil.copytree(archive, tmp_path / "copy.ucray"))


def by_zarr(archive: Path) -> Any:
    group: Any = zarr.open_group(archive, mode="r")
    return group["0"][...]


@pytest.fixture(scope="module")
def voxels(archive: Path) -> Any:
    return by_zarr(archive)


SPAN = st.tuples(st.integers(0, 70), st.integers(0, 70)).map(sorted).map(lambda ends: slice(*ends))


@given(st.tuples(SPAN, SPAN, SPAN))
def test_a_box_is_what_zarr_finds_there(archive: Path, voxels: Any, box: Any) -> None:
    opened = ucray.open(str(archive))
    assert opened.local is not None
    np.testing.assert_array_equal(opened[box], voxels[box])
    assert opened[box].dtype == voxels.dtype


def test_places_steps_and_lists_are_what_numpy_finds_there(archive: Path, voxels: Any) -> None:
    opened = ucray.open(archive.as_uri())
    assert opened.local is not None
    assert opened[3, -1, 69] == voxels[3, -1, 69]
    np.testing.assert_array_equal(opened[::-3, 5, 40:2:-7], voxels[::-3, 5, 40:2:-7])
    np.testing.assert_array_equal(opened[[1, 39], [2, 49], [3, 69]], voxels[[1, 39], [2, 49], [3, 69]])


def test_fill_that_is_no_number_comes_back(tmp_path: Path, tiny_weights: ucray.Weights) -> None:
    volume = np.random.default_rng(1).normal(0, 1, SHAPE).astype(np.float32)
    volume[:20, :40, :40] = np.nan
    archive = compressed(tmp_path, tiny_weights, volume, float("nan"))
    opened = ucray.open(str(archive))
    assert opened.local is not None
    np.testing.assert_array_equal(opened[...], by_zarr(archive))
    assert np.isnan(opened[:20, :40, :40]).all()


def test_where_nothing_is_stored_yet_is_fill(copy: Path) -> None:
    (copy / FIRST_SHARD).unlink()
    found = ucray.open(str(copy))[...]
    assert not found[:32, :32, :32].any()
    np.testing.assert_array_equal(found, by_zarr(copy))


def cut(shard: bytes) -> bytes:
    return shard[: index_size(SLOTS) - 1]


def flipped_index(shard: bytes) -> bytes:
    return shard[:-5] + bytes([shard[-5] ^ 1]) + shard[-4:]


def flipped_chunk(shard: bytes) -> bytes:
    return shard[:40] + bytes([shard[40] ^ 1]) + shard[41:]


def swapped(shard: bytes) -> bytes:
    """Two whole chunks, each in the other's place, and an index that is sound."""
    end = len(shard) - index_size(SLOTS)
    spans = chunk_spans(shard[end:], end)
    first, second = sorted(spans)[-2:]
    spans[first], spans[second] = spans[second], spans[first]
    table = empty_table(SLOTS)
    for slot, span in spans.items():
        table[slot] = span.start, span.stop - span.start
    return shard[:end] + pack_index(table)


@pytest.mark.parametrize(
    ("damage", "error"),
    [(cut, ArchiveError), (flipped_index, ArchiveError), (flipped_chunk, ChunkError), (swapped, ChunkError)],
)
def test_damage_is_named(copy: Path, damage: Callable[[bytes], bytes], error: type[Exception]) -> None:
    shard = copy / FIRST_SHARD
    shard.write_bytes(damage(shard.read_bytes()))
    opened = ucray.open(str(copy))
    with pytest.raises(error):
        opened[:32, :32, :32]
    np.testing.assert_array_equal(opened[:, 32:, :], by_zarr_beyond(copy))


def by_zarr_beyond(archive: Path) -> Any:
    """What the damage does not touch."""
    group: Any = zarr.open_group(archive, mode="r")
    return group["0"][:, 32:, :]


def test_a_shard_that_cannot_be_read_is_named(copy: Path) -> None:
    (copy / FIRST_SHARD).unlink()
    (copy / FIRST_SHARD).mkdir()
    with pytest.raises(StorageError, match="0/c/0/0/0 cannot be read: Is a directory"):
        ucray.open(str(copy))[0, 0, 0]


def other_index(document: Any) -> None:
    document["codecs"][0]["configuration"]["index_location"] = "start"


def other_keys(document: Any) -> None:
    document["chunk_key_encoding"]["configuration"]["separator"] = "."


def no_shape(document: Any) -> None:
    document["shape"] = [40, True, 70]


def no_codec(document: Any) -> None:
    document["codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}]


def other_fill(document: Any) -> None:
    document["fill_value"] = "none"


def other_voxels(document: Any) -> None:
    document["data_type"] = "int32"


@pytest.mark.parametrize("change", [other_index, other_keys, no_shape, no_codec, other_fill, other_voxels])
def test_what_ucray_did_not_write_is_left_to_zarr(copy: Path, change: Callable[[Any], None]) -> None:
    assert LocalArchive.of(str(copy)) is not None
    file = copy / "0/zarr.json"
    document = json.loads(file.read_bytes())
    change(document)
    file.write_text(json.dumps(document))
    assert LocalArchive.of(str(copy)) is None


def test_an_archive_without_shards_is_read_through_zarr(
    copy: Path, tiny_weights: ucray.Weights, voxels: Any
) -> None:
    group = zarr.open_group(copy, mode="a")
    codec = UcrayCodec(tiny_weights, 128.0, 30.0, 60)
    array = group.create_array(
        "0", shape=SHAPE, chunks=(16, 16, 16), dtype="uint8", serializer=codec, compressors=None,
        fill_value=0, overwrite=True,
    )  # fmt: skip
    array[...] = voxels
    opened = ucray.open(str(copy))
    assert opened.local is None
    np.testing.assert_array_equal(opened[3:30, 5, ::-1], by_zarr(copy)[3:30, 5, ::-1])
