"""Objects, volumes, shards and archives: one contract on a local folder and on a real S3 server."""

from __future__ import annotations

import gzip
import json
import pickle  # what Ray does to a volume that it sends to a worker
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from object_store import ObjectStore

from ucray.codec.bitstream import Kind
from ucray.codec.encoder import Packed
from ucray.errors import (
    ArchiveError,
    CredentialsError,
    DestinationError,
    DtypeError,
    SettingsError,
    SourceError,
    StorageError,
)
from ucray.grid import Box, Grid, Shape3
from ucray.quality import ErrorSum
from ucray.storage.archive import ArchiveSettings, create_archive, find_archive, open_archive
from ucray.storage.index import shard_key
from ucray.storage.objects import Objects, open_objects
from ucray.storage.shard import (
    LARGEST_STATISTICS,
    ShardStatistics,
    assemble,
    commit,
    present_shards,
    split,
    statistics_key,
)
from ucray.storage.space import Space
from ucray.storage.volume import open_volume

Place = Callable[[], Objects]


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Opens the same empty place again and again: a folder, or a prefix of a bucket."""
    if request.param == "local":
        return lambda: open_objects(str(tmp_path / "place"))
    url: str = request.getfixturevalue("bucket")
    return lambda: open_objects(f"{url}/{tmp_path.name}")


def test_the_first_create_only_put_wins(place: Place) -> None:
    objects = place()
    assert objects.get("a/b") is None
    assert objects.put_new("a/b", b"first")
    assert not objects.put_new("a/b", b"second")
    assert place().get("a/b") == b"first"


def test_of_many_writers_at_once_exactly_one_wins(place: Place) -> None:
    writers = [place() for _ in range(8)]
    bodies = [bytes([n]) * 100_000 for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(
            pool.map(lambda pair: pair[0].put_new("shard", pair[1]), zip(writers, bodies, strict=True))
        )
    assert sum(won) == 1
    assert place().get("shard") == bodies[won.index(True)]


def test_a_listing_gives_every_object_and_its_size(place: Place) -> None:
    objects = place()
    written = {"zarr.json": 3, "0/c/0/0/0": 5, "0/c/0/0/1": 0, "ucray/statistics/x.json": 7}
    for key, size in written.items():
        objects.put_new(key, b"." * size)
    assert place().sizes("") == written
    assert place().sizes("0/c") == {"0/c/0/0/0": 5, "0/c/0/0/1": 0}
    assert place().sizes("nothing") == {}


def test_a_local_put_leaves_no_draft_behind(tmp_path: Path) -> None:
    objects = open_objects(str(tmp_path))
    objects.put_new("x", b"1")
    objects.put_new("x", b"2")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("url", ["gs://bucket/x", "s3://", "ftp://host/x"])
def test_a_url_that_is_not_served_is_refused(url: str) -> None:
    with pytest.raises(SettingsError):
        open_objects(url)


def test_http_is_no_destination() -> None:
    with pytest.raises(SettingsError, match="cannot be written to"):
        open_objects("http://127.0.0.1/x")


def test_a_missing_bucket_is_named(store: ObjectStore) -> None:
    with pytest.raises(StorageError, match="bucket nobody does not exist"):
        open_objects("s3://nobody/x", store.endpoint).check_place()


def test_refused_credentials_are_named(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(CredentialsError, match="refused"):
        # Another spelling of the endpoint: s3fs would go on with the connection of the right secret.
        open_objects("s3://ucray-tests/refused", store.endpoint + "//").put_new("x", b"")


def test_missing_credentials_are_named(no_credentials: str) -> None:
    with pytest.raises(CredentialsError, match="AWS_ACCESS_KEY_ID"):
        open_objects("s3://ucray-tests/missing", no_credentials).check_place()


def test_a_dead_endpoint_is_a_storage_error() -> None:
    with pytest.raises(StorageError):
        open_objects("s3://ucray-tests/x", "http://127.0.0.1:9").check_place()


# Volumes


def _write(path: Path, shape: tuple[int, ...], dtype: str = "uint8", zarr_format: Any = 3) -> Path:
    array = zarr.create_array(path, shape=shape, dtype=dtype, chunks=shape, zarr_format=zarr_format)
    array[...] = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    return path


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_arrays_of_both_zarr_formats_open(tmp_path: Path, zarr_format: int) -> None:
    volume = open_volume(str(_write(tmp_path / "a.zarr", (4, 5, 6), "int16", zarr_format)))
    assert (volume.shape, volume.dtype, volume.path) == ((4, 5, 6), "int16", "")
    box = Box((1, 2, 3), (3, 5, 4))
    expected = np.arange(120).reshape(4, 5, 6)[box.slices]
    np.testing.assert_array_equal(volume.read(box), expected)


@pytest.mark.parametrize("nested", [True, False], ids=["ome-0.5", "ome-0.4"])
def test_an_ome_group_opens_its_first_scale_with_its_space(tmp_path: Path, nested: bool) -> None:
    axes = [{"name": n, "type": "space", "unit": "nanometer"} for n in "zyx"]
    transforms = [{"type": "scale", "scale": [40, 4, 4]}, {"type": "translation", "translation": [80, 0, 8]}]
    multiscales = [
        {
            "axes": axes,
            "datasets": [
                {"path": "s0", "coordinateTransformations": transforms},
                {"path": "s1", "coordinateTransformations": [{"type": "scale", "scale": [40, 8, 8]}]},
            ],
        }
    ]
    attributes = (
        {"ome": {"version": "0.5", "multiscales": multiscales}} if nested else {"multiscales": multiscales}
    )
    zarr.create_group(tmp_path / "g.zarr", attributes=attributes)
    _write(tmp_path / "g.zarr" / "s0", (4, 8, 8))
    _write(tmp_path / "g.zarr" / "s1", (4, 4, 4))
    volume = open_volume(str(tmp_path / "g.zarr"))
    assert volume.path == "s0"
    assert volume.space == Space((40.0, 4.0, 4.0), (80.0, 0.0, 8.0), "nanometer")
    assert open_volume(str(tmp_path / "g.zarr"), "s1").space.scale == (40.0, 8.0, 8.0)


def test_space_goes_through_ome_metadata_and_back(tmp_path: Path) -> None:
    space = Space((40.0, 4.0, 4.0), (80.0, 0.0, 8.0), "nanometer").within((2, 0, 10))
    assert space.translation == (160.0, 0.0, 48.0)
    zarr.create_group(tmp_path / "g.zarr", attributes=space.to_ome("g"))
    _write(tmp_path / "g.zarr" / "0", (2, 2, 2))
    assert open_volume(str(tmp_path / "g.zarr")).space == space


def test_a_plain_group_needs_a_name_unless_it_holds_one_array(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "g.zarr")
    _write(tmp_path / "g.zarr" / "raw", (2, 2, 2))
    assert open_volume(str(tmp_path / "g.zarr")).path == "raw"
    _write(tmp_path / "g.zarr" / "labels", (2, 2, 2))
    with pytest.raises(SourceError, match="labels, raw"):
        open_volume(str(tmp_path / "g.zarr"))
    assert open_volume(str(tmp_path / "g.zarr"), "labels").path == "labels"
    with pytest.raises(SourceError, match="no array 'none'"):
        open_volume(str(tmp_path / "g.zarr"), "none")


def test_what_is_no_volume_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        open_volume(str(tmp_path / "missing.zarr"))
    with pytest.raises(SourceError, match="2 axes"):
        open_volume(str(_write(tmp_path / "flat.zarr", (4, 4))))
    with pytest.raises(DtypeError, match="float64"):
        open_volume(str(_write(tmp_path / "double.zarr", (4, 4, 4), "float64")))
    (tmp_path / "text.zarr").write_text("no zarr")
    with pytest.raises(SourceError):
        open_volume(str(tmp_path / "text.zarr"))


def test_a_source_in_a_bucket_that_is_not_there_is_refused(store: ObjectStore) -> None:
    with pytest.raises((SourceError, StorageError)):
        open_volume("s3://nobody/volume.zarr", endpoint_url=store.endpoint)


def test_a_volume_is_read_over_http(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.zarr", (4, 5, 6))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        box = Box((0, 1, 2), (4, 5, 6))
        served = open_volume(f"{url}/a.zarr").read(box)
        np.testing.assert_array_equal(served, open_volume(str(path)).read(box))
        with pytest.raises(SourceError, match="does not exist"):
            open_volume(f"{url}/none.zarr")
        server.shutdown()


def test_damaged_source_bytes_are_a_source_error(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.zarr", (4, 4, 4))
    (chunk,) = (file for file in (path / "c").rglob("*") if file.is_file())
    chunk.write_bytes(b"\x00" * 7)
    with pytest.raises(SourceError, match="cannot be read"):
        open_volume(str(path)).read(Box((0, 0, 0), (4, 4, 4)))


def test_a_volume_travels_to_a_worker_without_its_connection(tmp_path: Path) -> None:
    volume = open_volume(str(_write(tmp_path / "a.zarr", (4, 4, 4))))
    box = Box((0, 0, 0), (2, 2, 2))
    before = volume.read(box)
    again = pickle.loads(pickle.dumps(volume))
    assert "array" not in again.__dict__
    np.testing.assert_array_equal(again.read(box), before)


# Shards

GRID = Grid((40, 70, 33), (16, 16, 16), (32, 32, 32))
INDEX: Shape3 = (1, 2, 1)


def _packed(index: Shape3, seed: int = 0) -> list[Packed]:
    random = np.random.default_rng(seed)
    chunks = []
    for _, _, box in GRID.chunk_boxes(index):
        size = int(random.integers(0, 40))
        chunks.append(Packed(random.bytes(size), Kind.NEURAL, ErrorSum(box.voxels, float(size), 3.0)))
    return chunks


@given(st.integers(0, 1000), st.sampled_from(list(GRID.shard_indices())))
def test_a_shard_splits_into_what_it_was_assembled_from(seed: int, index: Shape3) -> None:
    chunks = _packed(index, seed)
    data, statistics = assemble(GRID, index, 1, chunks)
    slots = [slot for slot, _, _ in GRID.chunk_boxes(index)]
    expected = {slot: chunk.data for slot, chunk in zip(slots, chunks, strict=True) if chunk.data}
    assert split(data, GRID) == expected
    assert statistics.bytes_out == len(data)
    assert statistics.bytes_in == GRID.shard_box(index).voxels
    assert statistics.error.voxels == GRID.shard_box(index).voxels


def test_statistics_go_through_bytes_and_back() -> None:
    _, statistics = assemble(GRID, INDEX, 2, _packed(INDEX))
    data = statistics.to_bytes()
    assert ShardStatistics.from_bytes(data) == statistics
    assert json.loads(gzip.decompress(data))["crc32c"] == statistics.crc32c
    endless = gzip.compress(b" " * (LARGEST_STATISTICS + 1))
    document = json.loads(gzip.decompress(data))
    misfits = [
        gzip.compress(json.dumps(document | {"chunks": document["chunks"] | {name: column}}).encode())
        for name, column in (("slot", [[1]]), ("voxels", ["a"]), ("mse", [None]), ("bytes", [1e999]))
    ]
    nested = gzip.compress(b"[" * 100_000)
    for damaged in (
        b"",
        b"{}",
        gzip.compress(b"{}"),
        data[:-5],
        data + b"\0",
        endless,
        nested,
        *misfits,
    ):
        with pytest.raises(ArchiveError):
            ShardStatistics.from_bytes(damaged)


def test_a_cut_or_changed_index_is_found() -> None:
    data, _ = assemble(GRID, INDEX, 1, _packed(INDEX))
    footer = len(data) - (8 * 16 + 4)
    for place in (footer, footer + 17, len(data) - 1):
        flipped = bytearray(data)
        flipped[place] ^= 1
        with pytest.raises(ArchiveError, match="checksum"):
            split(bytes(flipped), GRID)
    with pytest.raises(ArchiveError):
        split(data[:-1], GRID)
    with pytest.raises(ArchiveError, match="is cut"):
        split(data[:20], GRID)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({3: (2, 1000)}, "slot 3"),
        ({3: (2, 0)}, "slot 3"),
        ({3: (2**63, 2**63)}, "slot 3"),
        ({2: (0, 4), 3: (0, 4)}, "several chunks in one place"),
    ],
)
def test_an_index_that_points_to_no_chunks_of_its_own_is_found(
    entries: dict[int, tuple[int, int]], message: str
) -> None:
    table = np.full((8, 2), 2**64 - 1, dtype="<u8")
    for slot, entry in entries.items():
        table[slot] = entry
    footer = table.tobytes()
    with pytest.raises(ArchiveError, match=message):
        split(b"abcd" + footer + google_crc32c.value(footer).to_bytes(4, "little"), GRID)


def test_a_shard_is_committed_once_with_its_statistics(place: Place) -> None:
    data, statistics = assemble(GRID, INDEX, 1, _packed(INDEX))
    other, other_statistics = assemble(GRID, INDEX, 1, _packed(INDEX, seed=1))
    assert commit(place(), GRID, data, statistics)
    assert not commit(place(), GRID, data, statistics)
    # Another machine's bytes: it loses, and its statistics do not pass for the winner's.
    assert not commit(place(), GRID, other, other_statistics)
    assert place().get(shard_key(INDEX)) == data
    stored = place().get(statistics_key(INDEX, google_crc32c.value(data)))
    assert stored == statistics.to_bytes()
    assert present_shards(place().sizes("0/c"), GRID) == {INDEX}


def test_losing_to_a_damaged_shard_is_an_error(place: Place) -> None:
    data, statistics = assemble(GRID, INDEX, 1, _packed(INDEX))
    place().put_new(shard_key(INDEX), data[:-3])
    with pytest.raises(ArchiveError):
        commit(place(), GRID, data, statistics)


# Archives


def _settings(**changes: Any) -> ArchiveSettings:
    base = ArchiveSettings(
        fingerprint="f" * 64,
        source="volume.zarr",
        source_array="0",
        region="0:32,0:32,0:40",
        shape=(32, 32, 40),
        dtype="uint8",
        fill_value=0.0,
        chunk=(16, 16, 16),
        shard=(32, 32, 32),
        target={"ratio": 64.0},
        max_error=None,
        quality=100,
        offset=128.0,
        scale=30.0,
        data_range=255.0,
        weights_digest="d" * 64,
    )
    return base.model_copy(update=changes)


def test_an_archive_is_created_once_and_found_again(place: Place, tiny_weights: Any) -> None:
    space = Space((8.0, 8.0, 8.0), (0.0, 0.0, 0.0), "nanometer")
    assert find_archive(place()) is None
    created = create_archive(place(), _settings(), tiny_weights, space, "volume")
    # A second driver measured another quality meanwhile: what stands in the archive counts.
    again = create_archive(place(), _settings(quality=99), tiny_weights, space, "volume")
    assert again.settings == created.settings == _settings()
    found = find_archive(place())
    assert found is not None
    assert found.codec.weights.digest == tiny_weights.decoder().digest
    assert found.codec.quality == 100


def test_an_archive_with_another_fingerprint_is_refused(place: Place, tiny_weights: Any) -> None:
    create_archive(place(), _settings(), tiny_weights, Space(), "volume")
    before = place().sizes("")
    with pytest.raises(DestinationError, match="other settings"):
        create_archive(
            place(), _settings(fingerprint="0" * 64, target={"ratio": 32.0}), tiny_weights, Space(), "volume"
        )
    assert place().sizes("") == before


def test_a_foreign_zarr_group_is_no_archive(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "g.zarr")
    with pytest.raises(DestinationError, match="no ucray archive"):
        find_archive(open_objects(str(tmp_path / "g.zarr")))
    with pytest.raises(ArchiveError, match="no ucray archive"):
        open_archive(str(tmp_path / "nothing"))


def test_metadata_that_lost_their_array_are_completed(tmp_path: Path, tiny_weights: Any) -> None:
    url = str(tmp_path / "a.ucray")
    create_archive(open_objects(url), _settings(), tiny_weights, Space(), "volume")
    metadata = tmp_path / "a.ucray" / "0" / "zarr.json"
    before = metadata.read_bytes()
    metadata.unlink()
    with pytest.raises(ArchiveError, match="did not start"):
        _ = open_archive(url).codec
    create_archive(open_objects(url), _settings(), tiny_weights, Space(), "volume")
    assert metadata.read_bytes() == before


def test_the_array_metadata_are_what_the_zarr_specification_names(tmp_path: Path, tiny_weights: Any) -> None:
    url = str(tmp_path / "a.ucray")
    create_archive(open_objects(url), _settings(), tiny_weights, Space(), "volume")
    metadata = json.loads((tmp_path / "a.ucray" / "0" / "zarr.json").read_bytes())
    (sharding,) = metadata["codecs"]
    assert sharding["name"] == "sharding_indexed"
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["ucray"]
    assert [codec["name"] for codec in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
    assert sharding["configuration"]["index_location"] == "end"
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [32, 32, 32]
    assert metadata["dimension_names"] == ["z", "y", "x"]


def test_settings_of_an_archive_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        _settings().quality = 3
