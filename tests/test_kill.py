"""Whatever is killed, nothing is lost: jobs are disturbed, run again, and compared with a quiet one."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kill_job
import pytest
from object_store import ObjectStore
from ray.cluster_utils import Cluster

import ucray
from ucray.grid import Shape3
from ucray.storage.index import shard_key
from ucray.storage.objects import Objects, open_objects

SHAPE = (128, 128, 128)
SHARDS = 64
OPTIONS = ucray.CompressOptions(ratio=16, chunk=(32, 32, 32), shard=(32, 32, 32))
LONG = "UCRAY_TEST_LONG"

LIMIT = 400.0
"""Seconds after which a job counts as hung."""

TITLES = {"encode": "MapBatches(_EncodeRow)", "write": "MapBatches(_WriteRow)", "read": "ReadBoxSource"}


class Site:
    """An S3 server, a Ray cluster of a head and two nodes, a source, and the bytes of a quiet job."""

    def __init__(self, folder: Path, store: ObjectStore, weights: str) -> None:
        self.folder, self.store, self.weights = folder, store, weights
        self.connection = ucray.Connection(store.endpoint)
        self.source = "s3://ucray-kill/em.zarr"
        ucray.synth(self.source, SHAPE, seed=3, connection=self.connection)
        quiet = "s3://ucray-kill/quiet.ucray"
        ucray.compress(
            self.source,
            quiet,
            OPTIONS,
            weights=weights,
            run_options=ucray.RunOptions(serial=True),
            connection=self.connection,
        )
        self.quiet = self.contents(quiet)
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "_system_config": {
                    "health_check_period_ms": 500,
                    "health_check_failure_threshold": 3,
                    "health_check_initial_delay_ms": 0,
                    "health_check_timeout_ms": 1000,
                    # As on nodes that ucray has to itself: see WORKER_POOL.
                    "idle_worker_killing_time_threshold_ms": 60000,
                },
            },
        )
        self.nodes = [self.cluster.add_node(num_cpus=2) for _ in range(2)]
        self.cluster.wait_for_nodes()

    def contents(self, archive: str) -> dict[str, bytes]:
        objects = open_objects(archive, self.store.endpoint)
        return {key: objects.get(key) or b"" for key in objects.sizes("")}

    def start(self, archive: str) -> subprocess.Popen[str]:
        """A job as a process of its own."""
        environment = os.environ | self.store.environment()
        environment |= {
            "RAY_ADDRESS": self.cluster.address,
            "PYTHONPATH": str(Path(kill_job.__file__).parent),
            kill_job.LOG: str(self.log(archive)),
        }
        command = [sys.executable, kill_job.__file__, self.source, archive, self.weights]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def log(self, archive: str) -> Path:
        return self.folder / f"{archive.rsplit('/', 1)[-1]}.log"

    def finish(self, job: subprocess.Popen[str], archive: str) -> None:
        """Wait for a disturbed job, run it once more if it failed, and compare with the quiet one."""
        job.communicate(timeout=LIMIT)
        if job.returncode != 0:
            again = self.start(archive)
            _, error = again.communicate(timeout=LIMIT)
            assert again.returncode == 0, error
        self.check(archive)

    def check(self, archive: str) -> None:
        found = ucray.verify(archive, self.source, serial=True, connection=self.connection)
        assert found.problems == ()
        assert self.contents(archive) == self.quiet


class Watch:
    """Lists an archive over and over: when was each shard first seen?"""

    def __init__(self, site: Site, archive: str) -> None:
        self.seen: dict[str, float] = {}
        self._objects: Objects = open_objects(archive, site.store.endpoint)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.05):
            try:
                keys = [key for key in self._objects.sizes("") if key.startswith("0/c/")]
            except ucray.UcrayError:
                continue  # the server is down: it is one of those that get killed
            now = time.time()
            for key in keys:
                self.seen.setdefault(key, now)

    def wait_for(self, shards: int, job: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + LIMIT
        while len(self.seen) < shards:
            assert time.monotonic() < deadline, f"{len(self.seen)} shards after {LIMIT} s"
            assert job.poll() is None, job.communicate()
            time.sleep(0.02)


def encoded(site: Site, archive: str) -> list[tuple[Shape3, float]]:
    lines = site.log(archive).read_text().splitlines()
    return [((z, y, x), at) for (z, y, x), at in map(json.loads, lines)]


def coded_again(site: Site, archive: str, watch: Watch) -> list[Shape3]:
    """Shards that an encoder began although they stood there."""
    found = encoded(site, archive)
    return [index for index, at in found if watch.seen.get(shard_key(index), math.inf) < at]


def processes(title: str) -> list[int]:
    """Processes whose title holds these words, as Ray names its workers after what they do."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if line.startswith("ray::") and title in line:
                found.append(int(folder.name))
    return found


def _kill_worker(kind: str) -> Callable[[Site, subprocess.Popen[str]], None]:
    def kill(site: Site, job: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 20.0
        while not (pids := processes(TITLES[kind])):
            assert time.monotonic() < deadline, f"there is no process for {kind}"
        os.kill(pids[0], signal.SIGKILL)

    return kill


def _kill_driver(site: Site, job: subprocess.Popen[str]) -> None:
    job.kill()


def _kill_node(site: Site, job: subprocess.Popen[str]) -> None:
    site.cluster.remove_node(site.nodes.pop(), allow_graceful=False)
    site.nodes.append(site.cluster.add_node(num_cpus=2))


def _kill_store(site: Site, job: subprocess.Popen[str]) -> None:
    site.store.stop()
    time.sleep(10.0)
    site.store.start()


KILLS: dict[str, Callable[[Site, subprocess.Popen[str]], None]] = {
    "encode": _kill_worker("encode"),
    "write": _kill_worker("write"),
    "read": _kill_worker("read"),
    "driver": _kill_driver,
    "node": _kill_node,
    "store": _kill_store,
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_weights: ucray.Weights) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("kill")
    weights = folder / "tiny.safetensors"
    weights.write_bytes(tiny_weights.to_bytes())
    with ObjectStore(folder / "s3") as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment().items():
            patch.setenv(name, value)
        store.create_bucket("ucray-kill")
        site = Site(folder, store, str(weights))
        yield site
        site.cluster.shutdown()  # type: ignore[no-untyped-call]


@pytest.mark.skipif(LONG not in os.environ, reason=f"eight minutes; {LONG}=1 kills each by itself")
@pytest.mark.parametrize("victim", KILLS)
def test_whatever_is_killed_the_archive_is_the_one_of_a_quiet_job(site: Site, victim: str) -> None:
    archive = f"s3://ucray-kill/{victim}.ucray"
    with Watch(site, archive) as watch:
        job = site.start(archive)
        watch.wait_for(6, job)
        KILLS[victim](site, job)
        site.finish(job, archive)
    assert coded_again(site, archive, watch) == []
    assert len({index for index, _ in encoded(site, archive)}) == SHARDS


def test_killed_again_and_again_in_a_random_order(site: Site) -> None:
    chance = random.Random(7)
    archive = "s3://ucray-kill/random.ucray"
    with Watch(site, archive) as watch:
        # All six take five minutes.
        for kind in chance.sample(sorted(KILLS), len(KILLS) if LONG in os.environ else 3):
            job = site.start(archive)
            watch.wait_for(min(len(watch.seen) + chance.randint(1, 6), SHARDS - 8), job)
            KILLS[kind](site, job)
            time.sleep(chance.random())
            job.kill()
            job.communicate()
        site.finish(site.start(archive), archive)
    assert coded_again(site, archive, watch) == []


def test_two_drivers_at_once_make_one_archive(site: Site) -> None:
    archive = "s3://ucray-kill/two.ucray"
    jobs = [site.start(archive), site.start(archive)]
    for job in jobs:
        _, error = job.communicate(timeout=LIMIT)
        assert job.returncode == 0, error
    site.check(archive)
