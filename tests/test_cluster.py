"""Jobs from source to archive: the serial oracle, a real Ray, a real S3 server, real metrics."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import zarr
from object_store import ObjectStore

import ucray
from ucray.cluster.decompress import decompress_archive
from ucray.cluster.session import Resources, claimed, coders, ray_session, resources, shared_out
from ucray.cluster.telemetry import Event, Telemetry
from ucray.cluster.worker import ShardEncoder
from ucray.errors import (
    ArchiveError,
    DestinationError,
    JobError,
    SettingsError,
    SourceError,
    StorageError,
    WeightsError,
)
from ucray.grid import Shape3
from ucray.quality import SeamSum
from ucray.storage.index import shard_key
from ucray.storage.objects import LocalObjects, open_objects, open_store
from ucray.storage.shard import STATISTICS

SHAPE = (40, 70, 64)
OPTIONS = ucray.CompressOptions(ratio=16, chunk=(32, 32, 32), shard=(32, 64, 32))
SERIAL = ucray.RunOptions(serial=True)
TWO_OF_EACH = ucray.RunOptions(encode_workers=2, write_workers=2)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory, tiny_weights: ucray.Weights) -> str:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    path.write_bytes(tiny_weights.to_bytes())
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A volume with padding on one side, so that shards of every kind come up."""
    path = tmp_path_factory.mktemp("source") / "em.zarr"
    ucray.synth(str(path), SHAPE, seed=5)
    zarr.open_array(path / "0", mode="r+")[:, :, 32:] = 0
    return str(path)


@pytest.fixture(scope="module")
def ray_running() -> Iterator[None]:
    with ray_session():
        yield


def _bytes(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _serial(source: str, archive: Path, weights_file: str, **changes: object) -> ucray.JobReport:
    options = OPTIONS.model_copy(update=changes)
    return ucray.compress(source, str(archive), options, weights=weights_file, run_options=SERIAL)


def test_ray_and_the_serial_path_write_the_same_bytes(
    source: str, weights_file: str, tmp_path: Path, ray_running: None
) -> None:
    events: list[ucray.Event] = []
    serial = _serial(source, tmp_path / "serial", weights_file)
    on_ray = ucray.compress(
        source,
        str(tmp_path / "ray"),
        OPTIONS,
        weights=weights_file,
        run_options=TWO_OF_EACH,
        listener=events.append,
    )
    assert _bytes(tmp_path / "ray") == _bytes(tmp_path / "serial")
    assert (on_ray.psnr, on_ray.chunks) == (serial.psnr, serial.chunks)
    assert on_ray.shards == 8
    assert set(serial.peak_memory) == set(on_ray.peak_memory) == {"driver", "read", "encode", "write"}
    assert all(2**26 < peak < OPTIONS.memory for peak in on_ray.peak_memory.values())
    assert "empty" in on_ray.chunks
    assert events[-1].done == events[-1].total == np.prod(SHAPE)
    found = ucray.verify(str(tmp_path / "ray"), source, workers=2)
    assert found.clean
    assert found.measured_psnr == pytest.approx(on_ray.psnr, abs=1e-3)  # float32 order of summation
    ucray.decompress(str(tmp_path / "ray"), str(tmp_path / "plain"), workers=2)
    plain = zarr.open_group(tmp_path / "plain", mode="r")["0"]
    archive = zarr.open_group(tmp_path / "ray", mode="r")["0"]
    np.testing.assert_array_equal(plain[...], archive[...])  # type: ignore[index]


def test_idle_workers_beyond_the_cores_live_on(ray_running: None, tmp_path: Path) -> None:
    """By itself Ray ends them after a second, and a job's next read would start a process anew."""

    @ray.remote(num_cpus=0)
    def work(folder: Path) -> int:
        (folder / str(os.getpid())).touch()
        while not (folder / "done").exists():
            time.sleep(0.1)
        return os.getpid()

    beyond = int(ray.cluster_resources()["CPU"]) + 2  # type: ignore[no-untyped-call]
    working = [work.remote(tmp_path) for _ in range(beyond)]
    while len(list(tmp_path.iterdir())) < beyond:
        time.sleep(0.1)
    (tmp_path / "done").touch()
    processes = ray.get(working)
    time.sleep(5.0)
    assert [pid for pid in processes if not Path(f"/proc/{pid}").exists()] == []


def test_the_whole_way_through_s3(source: str, weights_file: str, bucket: str, store: ObjectStore) -> None:
    connection = ucray.Connection(store.endpoint)
    place = f"{bucket}/whole-way"
    ucray.synth(f"{place}/em.zarr", SHAPE, seed=5, connection=connection)
    report = ucray.compress(
        f"{place}/em.zarr",
        f"{place}/em.ucray",
        OPTIONS,
        weights=weights_file,
        run_options=SERIAL,
        connection=connection,
    )
    listed = open_objects(f"{place}/em.ucray", store.endpoint).sizes("")
    assert report.bytes_out + report.bytes_weights == sum(listed.values())
    found = ucray.verify(f"{place}/em.ucray", f"{place}/em.zarr", serial=True, connection=connection)
    assert found.clean
    original, decoded = (
        np.asarray(zarr.open_group(open_store(f"{place}/{name}", store.endpoint), mode="r")["0"][...])  # type: ignore[index]
        for name in ("em.zarr", "em.ucray")
    )
    np.testing.assert_array_equal(original == 0, decoded == 0)


def test_a_fresh_process_reads_an_archive_with_zarr_alone(
    source: str, weights_file: str, tmp_path: Path
) -> None:
    _serial(source, tmp_path / "a", weights_file)
    script = (
        "import sys, zarr\n"
        f"a = zarr.open_group({str(tmp_path / 'a')!r}, mode='r')['0']\n"
        "voxels = a[5:37, 3:50, 0:20]\n"
        "assert 'ray' not in sys.modules\n"
        "print(voxels.shape, int(voxels.astype('int64').sum()))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    voxels = np.asarray(zarr.open_group(tmp_path / "a", mode="r")["0"][5:37, 3:50, 0:20])  # type: ignore[index]
    assert ended.stdout.split() == f"{voxels.shape} {int(voxels.astype('int64').sum())}".split()


def test_a_second_run_finds_everything_done(source: str, weights_file: str, tmp_path: Path) -> None:
    _serial(source, tmp_path / "a", weights_file)
    before = _bytes(tmp_path / "a")
    again = _serial(source, tmp_path / "a", weights_file)
    assert again.resumed == again.shards
    assert again.psnr is None
    assert _bytes(tmp_path / "a") == before


def test_a_lost_shard_is_done_again_and_only_that(source: str, weights_file: str, tmp_path: Path) -> None:
    _serial(source, tmp_path / "a", weights_file)
    before = _bytes(tmp_path / "a")
    (tmp_path / "a" / shard_key((0, 1, 0))).unlink()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "a" / "0" / "c").rglob("*") if p.is_file()}
    again = _serial(source, tmp_path / "a", weights_file)
    assert again.shards - again.resumed == 1
    assert _bytes(tmp_path / "a") == before
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_other_settings_are_refused_and_nothing_is_written(
    source: str, weights_file: str, tmp_path: Path
) -> None:
    _serial(source, tmp_path / "a", weights_file)
    before = _bytes(tmp_path / "a")
    with pytest.raises(DestinationError, match="other settings"):
        _serial(source, tmp_path / "a", weights_file, ratio=32.0)
    assert _bytes(tmp_path / "a") == before


def test_a_place_that_holds_something_else_is_refused(source: str, weights_file: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(DestinationError, match="not empty"):
        _serial(source, tmp_path, weights_file)
    assert _bytes(tmp_path) == {"mine.txt": b"precious"}


def test_a_region_becomes_an_archive_with_its_place(source: str, weights_file: str, tmp_path: Path) -> None:
    _serial(source, tmp_path / "a", weights_file, roi="8:40,6:70,0:32")
    ome = json.loads((tmp_path / "a" / "zarr.json").read_bytes())["attributes"]["ome"]
    (multiscale,) = ome["multiscales"]
    (dataset,) = multiscale["datasets"]
    assert dataset["coordinateTransformations"] == [
        {"type": "scale", "scale": [8.0, 8.0, 8.0]},
        {"type": "translation", "translation": [64.0, 48.0, 0.0]},
    ]
    assert ucray.verify(str(tmp_path / "a"), source, serial=True).clean


def test_an_unreadable_source_chunk_fails_its_shards_and_no_others(
    weights_file: str, tmp_path: Path, ray_running: None
) -> None:
    path = tmp_path / "em.zarr"
    voxels = np.random.default_rng(0).integers(1, 255, (64, 64, 64), dtype=np.uint8)
    array = zarr.create_array(path, shape=voxels.shape, dtype="uint8", chunks=(32, 64, 32))
    array[...] = voxels
    (path / "c" / "1" / "0" / "1").write_bytes(b"corrupt")
    listing = tmp_path / "failed.json"
    for place, serial in (("serial", True), ("ray", False)):
        run = ucray.RunOptions(serial=serial, failed_boxes=str(listing))
        options = OPTIONS.model_copy(update={"roi": None})
        # Measuring reads everything of so small a volume, so the archive is begun on the sound part.
        archive = tmp_path / place
        (path / "c" / "1" / "0" / "1").unlink()
        begun = ucray.compress(str(path), str(archive), options, weights=weights_file, run_options=run)
        for shard in (shard_key((1, 0, 1)), shard_key((0, 0, 1))):
            (archive / shard).unlink()
        (path / "c" / "1" / "0" / "1").write_bytes(b"corrupt")
        with pytest.raises(JobError, match="1 of 4 shards failed"):
            ucray.compress(str(path), str(archive), options, weights=weights_file, run_options=run)
        (failed,) = json.loads(listing.read_text())
        assert (failed["shard"], failed["box"]) == ([1, 0, 1], "32:64,0:64,32:64")
        assert (archive / shard_key((0, 0, 1))).exists()
        assert begun.shards == 4
    run = ucray.RunOptions(serial=True, failed_boxes=str(tmp_path / "nowhere" / "failed.json"))
    with pytest.raises(
        JobError, match=r"1 of 4 shards failed, and .*nowhere.* cannot be written .*No such file"
    ):
        ucray.compress(str(path), str(tmp_path / "serial"), options, weights=weights_file, run_options=run)


@pytest.mark.parametrize("serial", [True, False], ids=["serial", "ray"])
def test_a_job_given_boxes_does_just_these(
    source: str, weights_file: str, tmp_path: Path, ray_running: None, serial: bool
) -> None:
    archive, listing = tmp_path / "a", tmp_path / "failed.json"
    _serial(source, archive, weights_file)
    whole = _bytes(archive)
    lost = [(0, 0, 1), (0, 1, 0), (1, 1, 1)]
    for index in lost:
        (archive / shard_key(index)).unlink()
    box = {"shard": [0, 1, 0], "box": "0:32,64:70,0:32", "error": "refused"}
    listing.write_text(json.dumps([box]))
    run = ucray.RunOptions(serial=serial, boxes=str(listing))
    report = ucray.compress(source, str(archive), OPTIONS, weights=weights_file, run_options=run)
    assert (report.shards, report.resumed, report.left) == (8, 5, 2)
    assert report.bytes_in == np.prod(SHAPE) - 32 * 64 * 32 - 8 * 6 * 32
    stored = _bytes(archive)
    assert [index for index in lost if shard_key(index) not in stored] == [(0, 0, 1), (1, 1, 1)]
    assert report.bytes_out + report.bytes_weights == sum(map(len, stored.values()))
    _serial(source, archive, weights_file)
    assert _bytes(archive) == whole


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (None, "cannot be read"),
        ("[", "is no JSON"),
        ('{"shard": 1}', "is no list"),
        ('[{"shard": [0, 0], "box": "0:32,0:64,0:32"}]', "is no list"),
        ('[{"shard": [0, 0, 2], "box": "0:32,0:64,64:96"}]', "which this job does not have"),
        ('[{"shard": [0, 0, 0], "box": "0:32,0:64,0:31"}]', "which this job does not have"),
    ],
)
def test_boxes_of_another_job_are_refused_before_anything_is_written(
    source: str, weights_file: str, tmp_path: Path, listed: str | None, message: str
) -> None:
    listing = tmp_path / "failed.json"
    if listed is not None:
        listing.write_text(listed)
    run = ucray.RunOptions(serial=True, boxes=str(listing))
    with pytest.raises(SettingsError, match=message):
        ucray.compress(source, str(tmp_path / "a"), OPTIONS, weights=weights_file, run_options=run)
    assert not (tmp_path / "a").exists()


def test_a_shard_that_was_committed_meanwhile_is_not_coded_again(
    source: str, weights_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another driver finishes the archive when this one is about to begin."""
    coded: list[object] = []
    really = ShardEncoder.drafts

    def drafts(self: ShardEncoder, index: Shape3, voxels: Any, weights: Any) -> Any:
        coded.append(index)
        return really(self, index, voxels, weights)

    monkeypatch.setattr(ShardEncoder, "drafts", drafts)
    _serial(source, tmp_path / "whole", weights_file)
    assert len(coded) == 8
    whole = _bytes(tmp_path / "whole")
    archive = tmp_path / "a"

    def overtake(event: ucray.Event) -> None:
        if event.stage == "compress" and event.done == 0:
            for key in whole:
                if not (archive / key).exists():
                    (archive / key).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(tmp_path / "whole" / key, archive / key)

    report = ucray.compress(
        source, str(archive), OPTIONS, weights=weights_file, run_options=SERIAL, listener=overtake
    )
    assert len(coded) == 8
    assert report.shards - report.resumed == 8
    assert report.bytes_out + report.bytes_weights == sum(map(len, whole.values()))
    assert _bytes(archive) == whole


def test_an_unreadable_source_writes_nothing(weights_file: str, tmp_path: Path) -> None:
    path = tmp_path / "em.zarr"
    array = zarr.create_array(path, shape=(32, 32, 32), dtype="uint8", chunks=(32, 32, 32))
    array[...] = 7
    (path / "c" / "0" / "0" / "0").write_bytes(b"corrupt")
    with pytest.raises(SourceError, match="cannot be read"):
        _serial(str(path), tmp_path / "a", weights_file)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("serial", [True, False], ids=["serial", "ray"])
def test_training_inside_a_compress_job_is_kept_and_used_again(
    source: str, tmp_path: Path, ray_running: None, serial: bool
) -> None:
    training = ucray.TrainingConfig(teacher_steps=2, student_steps=1, batch=1)
    options = OPTIONS.model_copy(update={"roi": "0:40,0:64,0:32"})
    run = ucray.RunOptions(serial=serial)
    archive = tmp_path / "a"
    first = ucray.compress(source, str(archive), options, training=training, run_options=run)
    kept = ucray.load_weights(str(archive / "ucray" / "weights.safetensors"))
    assert kept.training["settings"] == training.model_dump(mode="json")
    again = ucray.compress(source, str(archive), options, training=training, run_options=run)
    assert again.resumed == first.shards
    other = training.model_copy(update={"seed": 1})
    with pytest.raises(DestinationError, match="trained with another settings"):
        ucray.compress(source, str(archive), options, training=other, run_options=run)
    # Nor do weights of an attempt that came no further serve for another region, or for fill.
    (archive / "zarr.json").unlink()
    for change, named in (({"roi": None}, "region"), ({"exact_fill": False}, "volume")):
        changed = options.model_copy(update=change)
        with pytest.raises(DestinationError, match=f"trained with another {named}"):
            ucray.compress(source, str(archive), changed, training=training, run_options=run)


def test_two_workers_train_together_from_weights_of_another_domain(
    source: str, weights_file: str, tmp_path: Path, ray_running: None
) -> None:
    with pytest.raises(SourceError, match="nothing to train on"):  # more than half of it is padding
        ucray.train(source, str(tmp_path / "none"), init=weights_file)
    tissue = str(tmp_path / "tissue.zarr")
    ucray.synth(tissue, SHAPE, seed=5)
    settings = ucray.TrainingConfig(teacher_steps=2, student_steps=2, batch=2)
    target = tmp_path / "tuned.safetensors"
    port, scraped = _free_port(), {}

    def scrape(event: ucray.Event) -> None:
        scraped.update(_samples(port))

    tuned = ucray.train(
        tissue, str(target), settings, init=weights_file, workers=2, metrics_port=port, listener=scrape
    )
    assert (scraped["ucray_training_steps"], scraped["ucray_training_steps_planned"]) == (4.0, 4.0)
    assert scraped["ucray_training_student_mse"] > 0.0
    assert scraped["ucray_training_bytes_per_voxel"] == 0.0  # stage 2 has no rate, and stage 1 was not shown
    start = ucray.load_weights(weights_file)
    assert tuned.digest == ucray.load_weights(str(target)).digest != start.digest
    assert tuned.training["start"] == start.digest
    with pytest.raises(DestinationError, match="exists"):
        ucray.train(tissue, str(target), settings)


def test_several_volumes_are_learnt_from_in_one_run(tmp_path: Path, ray_running: None) -> None:
    """Each in its own dtype and normalisation; volumes of other voxels are refused."""
    first, second = str(tmp_path / "a.zarr"), str(tmp_path / "b.zarr")
    ucray.synth(first, SHAPE, seed=5)
    values = np.random.default_rng(0).normal(9000, 800, SHAPE).astype(np.uint16)
    array = zarr.create_array(second, shape=SHAPE, chunks=(32, 32, 32), dtype="uint16")
    array[...] = values
    settings = ucray.TrainingConfig(teacher_steps=2, student_steps=1, batch=1)
    both = ucray.train(first, str(tmp_path / "both.safetensors"), settings, also=[second])
    one = ucray.train(first, str(tmp_path / "one.safetensors"), settings)
    assert both.training["also"] == [second]
    assert both.digest != one.digest
    thick = str(tmp_path / "thick.zarr")
    ucray.synth(thick, SHAPE, seed=5)
    metadata = tmp_path / "thick.zarr" / "zarr.json"
    document = json.loads(metadata.read_text())
    dataset = document["attributes"]["ome"]["multiscales"][0]["datasets"][0]
    dataset["coordinateTransformations"][0]["scale"] = [50.0, 5.0, 5.0]
    metadata.write_text(json.dumps(document))
    with pytest.raises(SettingsError, match="voxels of another shape"):
        ucray.train(first, str(tmp_path / "no.safetensors"), settings, also=[thick])


def test_damage_ends_decompress_with_the_error_s_own_name(
    source: str, weights_file: str, tmp_path: Path, ray_running: None
) -> None:
    _serial(source, tmp_path / "a", weights_file)
    shard = tmp_path / "a" / shard_key((0, 1, 0))
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(bytes(data))
    for serial in (True, False):
        with pytest.raises(ArchiveError, match="checksum"):
            ucray.decompress(str(tmp_path / "a"), str(tmp_path / f"plain-{serial}"), serial=serial)


class StoppedError(Exception):
    """Ends a job in its middle."""


def test_a_volume_half_written_out_is_finished_by_the_same_command(
    source: str, weights_file: str, tmp_path: Path, ray_running: None
) -> None:
    _serial(source, tmp_path / "a", weights_file)
    archive, plain = str(tmp_path / "a"), tmp_path / "plain"
    ucray.decompress(archive, str(tmp_path / "whole"), serial=True)
    whole = _bytes(tmp_path / "whole")

    def stop(event: Event) -> None:
        if event.done > 2 * 32**3:
            raise StoppedError

    with pytest.raises(StoppedError):
        decompress_archive(archive, str(plain), serial=True, listener=stop)
    shards = [path for path in (plain / "0" / "c").rglob("*") if path.is_file()]
    assert 0 < len(shards) < sum("/c/" in name for name in whole)
    times = {path: path.stat().st_mtime_ns for path in shards}
    found = ucray.decompress(archive, str(plain), workers=2)
    assert found.bytes_out == np.prod(SHAPE)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    same = {name: data for name, data in _bytes(plain).items() if name != "zarr.json"}
    assert same == {name: data for name, data in whole.items() if name != "zarr.json"}
    np.testing.assert_array_equal(
        zarr.open_group(plain, mode="r")["0"][...],  # type: ignore[index]
        zarr.open_group(archive, mode="r")["0"][...],  # type: ignore[index]
    )
    # Once more there is nothing to do, and where only the group was written all of it.
    times = {path: path.stat().st_mtime_ns for path in plain.rglob("*") if path.is_file()}
    ucray.decompress(archive, str(plain), serial=True)
    assert {path: path.stat().st_mtime_ns for path in plain.rglob("*") if path.is_file()} == times
    shutil.rmtree(plain / "0")
    ucray.decompress(archive, str(plain), serial=True)
    assert {name: data for name, data in _bytes(plain).items() if name != "zarr.json"} == same


def test_another_archive_is_not_written_into_what_one_was_written_out_to(
    source: str, weights_file: str, tmp_path: Path
) -> None:
    _serial(source, tmp_path / "a", weights_file)
    _serial(source, tmp_path / "b", weights_file, ratio=32.0)
    ucray.decompress(str(tmp_path / "a"), str(tmp_path / "plain"), serial=True)
    before = _bytes(tmp_path / "plain")
    for other in (tmp_path / "plain", tmp_path / "b", tmp_path / "damaged"):
        if other.name == "damaged":
            other.mkdir()
            (other / "zarr.json").write_text("[]")
        with pytest.raises(DestinationError, match="not empty"):
            ucray.decompress(str(tmp_path / ("b" if other.name != "b" else "a")), str(other), serial=True)
    assert _bytes(tmp_path / "plain") == before
    assert _bytes(tmp_path / "damaged") == {"zarr.json": b"[]"}


# Verification


def test_every_kind_of_damage_is_found_and_named(source: str, weights_file: str, tmp_path: Path) -> None:
    archive = tmp_path / "a"
    _serial(source, archive, weights_file)
    first, second = archive / shard_key((0, 0, 0)), archive / shard_key((0, 1, 0))
    sound, other = first.read_bytes(), second.read_bytes()

    def problems() -> str:
        return "\n".join(ucray.verify(str(archive), serial=True).problems)

    assert problems() == ""
    first.unlink()
    assert "0/c/0/0/0 is missing" in problems()
    first.write_bytes(sound[:-9])
    assert "checksum" in problems()
    first.write_bytes(bytes([sound[0], sound[1], sound[2], sound[3], sound[4] ^ 1]) + sound[5:])
    assert "statistics of shard (0, 0, 0) are missing" in problems()
    first.write_bytes(other)
    assert "0/c/0/0/0" in problems()
    first.write_bytes(sound)
    (archive / "0" / "c" / "0" / "0" / "9").write_bytes(b"extra")
    assert "0/c/0/0/9 belongs to no part" in problems()
    (archive / "0" / "c" / "0" / "0" / "9").unlink()
    for statistics in (archive / STATISTICS).glob("0.0.0-*"):
        statistics.unlink()
    assert "statistics of shard (0, 0, 0) are missing" in problems()


@pytest.mark.parametrize(
    ("was", "now"),
    [('"offset":', '"offset":1'), ('"fill_value":0', '"fill_value":1')],
    ids=["offset", "fill"],
)
def test_metadata_that_a_reader_would_go_by_are_checked(
    source: str, weights_file: str, tmp_path: Path, was: str, now: str
) -> None:
    """What zarr decodes follows from the array's metadata alone, whatever the group's settings say."""
    _serial(source, tmp_path / "a", weights_file)
    metadata = tmp_path / "a" / "0" / "zarr.json"
    text = metadata.read_text()
    assert was in text
    metadata.write_text(text.replace(was, now, 1))
    found = ucray.verify(str(tmp_path / "a"), serial=True)
    assert found.problems == ("0/zarr.json does not say what the archive's settings say",)


def test_verification_measures_the_seams_within_shards(
    source: str, weights_file: str, tmp_path: Path
) -> None:
    _serial(source, tmp_path / "a", weights_file)
    found = ucray.verify(str(tmp_path / "a"), source, serial=True)
    original = np.asarray(zarr.open_array(Path(source) / "0", mode="r")[...])
    decoded = np.asarray(zarr.open_array(tmp_path / "a" / "0", mode="r")[...])
    expected = SeamSum()
    for z in range(0, SHAPE[0], 32):
        for y in range(0, SHAPE[1], 64):
            for x in range(0, SHAPE[2], 32):
                shard = (slice(z, z + 32), slice(y, y + 64), slice(x, x + 32))
                expected += SeamSum.between(original[shard], decoded[shard], (32, 32, 32))
    assert found.seam_error == pytest.approx(expected.error)
    assert found.seam_step == pytest.approx(expected.step)
    assert found.seam_error != pytest.approx(found.seam_step, rel=1e-3)
    assert ucray.verify(str(tmp_path / "a"), serial=True).seam_error is None


def test_a_changed_source_is_noticed(source: str, weights_file: str, tmp_path: Path) -> None:
    _serial(source, tmp_path / "a", weights_file)
    changed = tmp_path / "changed.zarr"
    ucray.synth(str(changed), SHAPE, seed=6)
    found = ucray.verify(str(tmp_path / "a"), str(changed), serial=True)
    assert "mean squared error" in found.problems[0]
    ucray.synth(str(tmp_path / "small.zarr"), (32, 32, 32))
    with pytest.raises(SourceError, match="does not hold region"):
        ucray.verify(str(tmp_path / "a"), str(tmp_path / "small.zarr"), serial=True)


def test_a_sample_looks_into_some_shards_and_lists_all(
    source: str, weights_file: str, tmp_path: Path
) -> None:
    archive = tmp_path / "a"
    _serial(source, archive, weights_file)
    found = ucray.verify(str(archive), source, sample=3, serial=True)
    assert found.clean
    assert (found.shards, found.checked) == (8, 3)
    # Three clean draws: a share of 63 % damaged would let them pass once in twenty times.
    assert found.damaged_below == pytest.approx(0.6316, abs=1e-4)
    whole = ucray.verify(str(archive), sample=100, serial=True)
    assert (whole.checked, whole.damaged_below) == (8, None)
    (archive / shard_key((1, 1, 1))).unlink()
    assert "1/1/1 is missing" in "".join(ucray.verify(str(archive), sample=1, serial=True).problems)
    # Damage of one shard in seven is found sooner or later, as every check draws anew.
    (archive / shard_key((0, 0, 0))).write_bytes(b"cut")
    checks = (ucray.verify(str(archive), sample=2, serial=True) for _ in range(60))
    cut = next(found for found in checks if any("is cut" in problem for problem in found.problems))
    assert cut.damaged_below is None


def test_nothing_is_no_archive(tmp_path: Path) -> None:
    for job in (ucray.verify, ucray.info):
        with pytest.raises(ArchiveError, match="holds no ucray archive"):
            job(str(tmp_path / "nothing"))


def test_info_adds_up_what_the_job_reported(source: str, weights_file: str, tmp_path: Path) -> None:
    report = _serial(source, tmp_path / "a", weights_file)
    info = ucray.info(str(tmp_path / "a"))
    assert (info["bytes_out"], info["bytes_weights"]) == (report.bytes_out, report.bytes_weights)
    assert info["chunks"] == report.chunks
    assert info["psnr"] == pytest.approx(report.psnr, abs=1e-9)
    assert info["measured_ratio"] == report.ratio


def test_the_ratio_holds_over_the_whole_archive(source: str, weights_file: str, tmp_path: Path) -> None:
    whole = {"shard": (64, 96, 64)}
    low = _serial(source, tmp_path / "low", weights_file, ratio=36.0, **whole)
    high = _serial(source, tmp_path / "high", weights_file, ratio=50.0, **whole)
    # Never larger than asked; a step of quality is a few bytes of so small a volume, but not ten percent.
    assert 36.0 <= low.ratio < 1.1 * 36.0
    assert 50.0 <= high.ratio < 1.1 * 50.0
    assert low.psnr is not None
    assert high.psnr is not None
    assert low.psnr > high.psnr


def test_without_exact_fill_its_voxels_are_like_others(
    source: str, weights_file: str, tmp_path: Path
) -> None:
    exact = _serial(source, tmp_path / "exact", weights_file)
    free = _serial(source, tmp_path / "free", weights_file, exact_fill=False)
    assert free.chunks.get("empty", 0) == 0 < exact.chunks["empty"]
    found = ucray.verify(str(tmp_path / "free"), source, serial=True)
    assert found.clean, found
    original, kept, coded = (
        np.asarray(zarr.open_group(place, mode="r")["0"][...])  # type: ignore[index]
        for place in (source, tmp_path / "exact", tmp_path / "free")
    )
    np.testing.assert_array_equal(kept == 0, original == 0)
    assert (coded[:, :, 32:] == 0).all()
    squared = np.square(coded.astype(float) - original).mean()
    assert free.psnr == pytest.approx(10 * np.log10(255**2 / squared), abs=1e-3)
    with pytest.raises(DestinationError, match="other settings"):
        _serial(source, tmp_path / "free", weights_file)
    ucray.decompress(str(tmp_path / "free"), str(tmp_path / "plain"), serial=True)
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "plain", mode="r")["0"][...], coded)  # type: ignore[index]


def test_a_ratio_out_of_reach_is_refused_with_what_can_be_had(weights_file: str, tmp_path: Path) -> None:
    path = tmp_path / "speckled.zarr"
    ucray.synth(str(path), SHAPE, seed=5)
    voxels = zarr.open_array(path / "0", mode="r+")
    voxels[...] = np.where(np.random.default_rng(0).random(SHAPE) < 0.3, 0, np.asarray(voxels[...]))
    with pytest.raises(
        SettingsError, match=r"30 is out of reach: .* gives \d+.*--no-exact-fill does without"
    ):
        _serial(str(path), tmp_path / "a", weights_file, ratio=30.0)
    assert not (tmp_path / "a").exists()
    assert _serial(str(path), tmp_path / "a", weights_file, ratio=30.0, exact_fill=False).ratio >= 29.0


def test_a_psnr_is_met_over_the_whole_archive(source: str, tmp_path: Path) -> None:
    coarse = _serial(source, tmp_path / "coarse", "em-fib-v1", ratio=40.0, shard=(64, 96, 64))
    assert coarse.psnr is not None
    wanted = coarse.psnr + 0.2
    fine = _serial(source, tmp_path / "fine", "em-fib-v1", ratio=None, psnr=wanted, shard=(64, 96, 64))
    assert fine.psnr is not None
    # The volume is measured whole; neighbouring qualities of trained weights lie closer together than that.
    assert wanted <= fine.psnr < wanted + 0.1
    assert fine.ratio < coarse.ratio


@pytest.mark.parametrize("asked", [{"max_error": 2.0}, {"lossless": True}], ids=["max error", "lossless"])
def test_bounds_hold_and_ray_writes_the_serial_bytes(
    asked: dict[str, float], source: str, weights_file: str, tmp_path: Path, ray_running: None
) -> None:
    options = OPTIONS.model_copy(update={"ratio": None, **asked})
    for name, run in (("serial", SERIAL), ("ray", TWO_OF_EACH)):
        ucray.compress(source, str(tmp_path / name), options, weights=weights_file, run_options=run)
    assert _bytes(tmp_path / "serial") == _bytes(tmp_path / "ray")
    found = ucray.verify(str(tmp_path / "ray"), source, serial=True)
    assert found.clean
    assert found.measured_max_error is not None
    assert found.measured_max_error <= asked.get("max_error", 0.0)
    original = zarr.open_array(Path(source) / "0", mode="r")[...]
    decoded = zarr.open_array(tmp_path / "ray" / "0", mode="r")[...]
    difference = np.abs(np.asarray(decoded).astype(int) - np.asarray(original))
    assert difference.max() == found.measured_max_error
    assert ucray.info(str(tmp_path / "ray"))["max_error"] == found.measured_max_error


def test_a_broken_bound_is_found(source: str, weights_file: str, tmp_path: Path) -> None:
    """The archive's own settings claim a tighter bound than its chunks keep."""
    _serial(source, tmp_path / "a", weights_file, ratio=None, max_error=3.0)
    group = tmp_path / "a" / "zarr.json"
    text = group.read_text()
    assert '"max_error":3.0,"quality"' in text
    group.write_text(text.replace('"max_error":3.0,"quality"', '"max_error":1.0,"quality"'))
    found = ucray.verify(str(tmp_path / "a"), source, serial=True)
    assert any("beyond the bound of 1" in problem for problem in found.problems)


# Metrics


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _samples(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_metrics_are_served_while_a_job_runs_and_no_longer(
    source: str, weights_file: str, tmp_path: Path
) -> None:
    port = _free_port()
    scraped: list[dict[str, float]] = []

    def scrape(event: ucray.Event) -> None:
        if event.stage == "compress":
            scraped.append(_samples(port))

    run = ucray.RunOptions(serial=True, metrics_port=port, metrics_linger=0.0)
    report = ucray.compress(
        source, str(tmp_path / "a"), OPTIONS, weights=weights_file, run_options=run, listener=scrape
    )
    last = scraped[-1]
    assert last["ucray_bytes_in_total"] == report.bytes_in
    assert last["ucray_shards_planned"] == report.shards
    assert last['ucray_shards_total{outcome="committed"}'] == report.shards
    for kind, count in report.chunks.items():
        assert last[f'ucray_chunks_total{{kind="{kind}"}}'] == count
    for stage in ("read", "encode", "write"):
        assert last[f'ucray_stage_seconds_count{{stage="{stage}"}}'] == report.shards
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_job_that_has_ended_waits_for_a_last_scrape_and_no_longer() -> None:
    port = _free_port()
    telemetry = Telemetry()

    def job() -> None:
        with telemetry.served(port, linger=60.0):
            telemetry.planned(3, 1)
            telemetry.failed()

    runs = threading.Thread(target=job)
    runs.start()
    runs.join(0.5)
    assert runs.is_alive()
    assert _samples(port)['ucray_shards_total{outcome="failed"}'] == 1.0
    runs.join(30.0)
    assert not runs.is_alive()


@pytest.mark.parametrize(
    ("begun", "ending"), [(False, SettingsError("refused before it began")), (True, SystemExit(143))]
)
def test_what_never_began_or_was_stopped_waits_for_no_scrape(begun: bool, ending: BaseException) -> None:
    telemetry = Telemetry()

    def job() -> None:
        with telemetry.served(_free_port(), linger=60.0):
            if begun:
                telemetry.planned(3, 1)
            raise ending

    began = time.monotonic()
    with pytest.raises(type(ending)):
        job()
    assert time.monotonic() - began < 30.0


def test_a_taken_metrics_port_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        with (
            pytest.raises(SettingsError, match="metrics cannot be served"),
            Telemetry().served(taken.getsockname()[1]),
        ):
            pass


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (2.5, 2), (8.0, 8)])
def test_a_worker_asks_for_the_cores_it_is_said_to_take(cpus: float, threads: int) -> None:
    """No Ray is asked: a cluster that grows has no nodes yet."""
    assert resources(64, use_gpu=True, cpus=cpus) == Resources({"CPU": cpus, "GPU": 1.0}, threads)
    assert resources(64, use_gpu=False, cpus=cpus) == Resources({"CPU": cpus}, threads)


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus", "expected"),
    [
        # A core each, less where that would leave none of a node for reading and writing.
        ([(2.0, 16e9)], None, None, (2, 0.5)),
        ([(16.0, 64e9)], None, None, (16, 0.93)),
        ([(16.0, 64e9)], 8, None, (8, 1.0)),
        ([(16.0, 64e9)] * 4, 32, None, (32, 1.0)),
        ([(2.0, 16e9)], 4, None, (4, 0.25)),
        # No more on a node than there is memory for; a head without cores takes none.
        ([(0.0, 8e9), (16.0, 9e9), (16.0, 9e9)], None, None, (6, 4.0)),
        ([(2.0, 1e9)], None, None, (1, 1.0)),
        # Nodes that are to come are not asked.
        ([], None, None, (1, 0.5)),
        ([(0.0, 8e9)], 32, 1.0, (32, 1.0)),
        ([(16.0, 64e9)], None, 4.0, (3, 4.0)),
        ([(2.0, 16e9)], None, 1.0, (1, 1.0)),
        # Not all cores of all nodes, whatever is said.
        ([(2.0, 16e9)], 2, 1.0, (2, 0.75)),
        ([(2.0, 16e9)], 1, 2.0, (1, 1.5)),
        ([(3.0, 16e9), (8.0, 64e9)], 4, 2.0, (4, 2.0)),
        ([(3.0, 16e9), (8.0, 64e9)], 5, 2.0, (5, 1.87)),
        ([(1.0, 16e9)], 1, 4.0, (1, 4.0)),
    ],
)
def test_workers_that_code_fill_the_cores_there_are(
    nodes: list[tuple[float, float]], workers: int | None, cpus: float | None, expected: tuple[int, float]
) -> None:
    found = shared_out(nodes, workers, 10**6, 2 * 10**9, cpus)
    assert (found.count, found.per_worker) == (expected[0], {"CPU": expected[1]})
    # No worker is started that no shard is left for.
    assert shared_out(nodes, workers, 2, 2 * 10**9, cpus).count == min(2, expected[0])


@pytest.mark.parametrize(
    ("nodes", "asked"),
    [
        ([(16.0, 64e9), (4.0, 11e9)], 2e9),
        # Less than it may take where no node has as much: one is alone there.
        ([(2.0, 1e9), (2.0, 1.5e9)], 1.5e9),
        # A head without cores, and nodes that are to come.
        ([(0.0, 1e9)], 2e9),
        ([], 2e9),
    ],
)
def test_no_more_workers_come_to_a_node_than_there_is_memory_for(
    nodes: list[tuple[float, float]], asked: float
) -> None:
    assert claimed(nodes, 2 * 10**9) == asked


def test_an_encoder_that_fails_in_any_way_fails_its_shard_alone(
    source: str, weights_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = ShardEncoder.chunks

    def chunks(self: ShardEncoder, index: tuple[int, int, int], *what: Any) -> Any:
        if index == (0, 1, 0):
            raise MemoryError("no room\nleft")
        return code(self, index, *what)

    monkeypatch.setattr(ShardEncoder, "chunks", chunks)
    run = ucray.RunOptions(serial=True, failed_boxes=str(tmp_path / "failed.json"))
    with pytest.raises(JobError, match=r"1 of 8 shards failed.*MemoryError: no room left"):
        ucray.compress(source, str(tmp_path / "a"), OPTIONS, weights=weights_file, run_options=run)
    (failed,) = json.loads((tmp_path / "failed.json").read_text())
    assert failed["shard"] == [0, 1, 0]
    monkeypatch.undo()
    assert _serial(source, tmp_path / "a", weights_file).resumed == 7


def test_a_shard_that_the_store_does_not_serve_is_a_finding(
    source: str, weights_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _serial(source, tmp_path / "a", weights_file)
    serve = LocalObjects.get

    def get(self: LocalObjects, key: str) -> bytes | None:
        if key == shard_key((0, 1, 0)):
            raise StorageError("the disk is tired")
        return serve(self, key)

    monkeypatch.setattr(LocalObjects, "get", get)
    found = ucray.verify(str(tmp_path / "a"), source, serial=True)
    assert not found.clean
    assert [problem for problem in found.problems if "the disk is tired" in problem]


def test_without_a_word_of_workers_each_core_has_one(
    source: str, weights_file: str, tmp_path: Path, ray_running: None
) -> None:
    count = coders(None, 10**6, OPTIONS.memory // 8).count
    assert count == int(ray.cluster_resources()["CPU"])  # type: ignore[no-untyped-call]
    _serial(source, tmp_path / "serial", weights_file)
    ucray.compress(source, str(tmp_path / "ray"), OPTIONS, weights=weights_file)
    assert _bytes(tmp_path / "ray") == _bytes(tmp_path / "serial")


def test_workers_that_are_said_to_take_all_cores_leave_enough_to_read(
    source: str, weights_file: str, tmp_path: Path, ray_running: None
) -> None:
    """Where nothing is left to read with, such a job waits for ever."""
    cores = int(ray.cluster_resources()["CPU"])  # type: ignore[no-untyped-call]
    run = ucray.RunOptions(encode_workers=cores, worker_cpus=1.0)
    ucray.compress(source, str(tmp_path / "ray"), OPTIONS, weights=weights_file, run_options=run)
    found = ucray.verify(str(tmp_path / "ray"), source=source, workers=cores, worker_cpus=1.0)
    assert found.clean


def test_missing_weights_are_named(source: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there are no weights"):
        _serial(source, tmp_path / "a", str(tmp_path / "none.safetensors"))
    assert not (tmp_path / "a").exists()
