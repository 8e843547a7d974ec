"""Prometheus, for real: what it has scraped of a job is what the archive's own statistics say."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from metric_names import RULES
from object_store import ObjectStore
from prometheus import Prometheus
from ray_head import RayHead, free_port
from test_kill import TITLES, processes

import ucray
from ucray.storage.archive import open_archive

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")

BUCKET = "s3://ucray-metrics"
SHARDS = 512
SIZES = ("--chunk", "16,16,16", "--shard", "16,16,16", "--ratio", "4")
LIMIT = 400.0
"""Seconds after which a step of a job hangs: on two busy cores its processes alone take two minutes."""

FASTER = {"[5m]": "[3s]", "[30m]": "[10s]", "for: 15m": "for: 2s", "interval: 30s": "interval: 500ms"}
"""The rules that ship, for tests that cannot wait a quarter of an hour."""


@dataclass(frozen=True)
class Site:
    """A store with a volume, a Ray head, and a Prometheus that scrapes both of them and jobs on `port`."""

    store: ObjectStore
    head: RayHead
    prometheus: Prometheus
    port: int

    def start(self, archive: str, *options: str, shape: str = "em") -> subprocess.Popen[str]:
        """A job as a process of its own."""
        command = ["ucray", "compress", f"{BUCKET}/{shape}.zarr", archive, "--weights", f"{BUCKET}/tiny"]
        command += ["--metrics-port", str(self.port), "--json", *SIZES, *options]
        environment = self.head.environment | {"RAY_ADDRESS": self.head.address}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def committed(self) -> float:
        """Shards that the job has stored, as far as Prometheus knows."""
        return self.prometheus.value('ucray_shards_total{outcome="committed"}')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_weights: ucray.Weights) -> Iterator[Site]:
    rules = RULES.read_text()
    for slow, fast in FASTER.items():
        assert slow in rules
        rules = rules.replace(slow, fast)
    folder = tmp_path_factory.mktemp("prometheus")
    with ObjectStore(folder / "s3") as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment().items():
            patch.setenv(name, value)
        store.create_bucket(BUCKET.removeprefix("s3://"))
        connection = ucray.Connection(store.endpoint)
        ucray.synth(f"{BUCKET}/em.zarr", (128, 128, 128), seed=6, connection=connection)
        ucray.synth(f"{BUCKET}/small.zarr", (16, 16, 16), seed=6, connection=connection)
        store.client().put_object(Bucket="ucray-metrics", Key="tiny", Body=tiny_weights.to_bytes())
        with RayHead(store.environment()) as head:
            port = free_port()
            scraped = [
                {"job_name": "ucray", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]},
                {
                    "job_name": "ray",
                    "file_sd_configs": [{"files": [str(head.discovery)], "refresh_interval": "1s"}],
                },
            ]
            with Prometheus(folder / "prometheus", scraped, rules) as prometheus:
                yield Site(store, head, prometheus, port)


def _finish(job: subprocess.Popen[str]) -> dict[str, object]:
    printed, error = job.communicate(timeout=LIMIT)
    assert job.returncode == 0, error
    report: dict[str, object] = json.loads(printed)
    return report


def test_what_prometheus_saw_is_what_the_archive_says_though_an_actor_was_killed(site: Site) -> None:
    archive = f"{BUCKET}/em.ucray"
    prometheus = site.prometheus
    job = site.start(archive)
    prometheus.wait_for(lambda: site.committed() > 0 or job.poll() is not None, LIMIT)
    encoder, *_ = processes(TITLES["encode"])
    before = site.committed()
    os.kill(encoder, signal.SIGKILL)
    report = _finish(job)
    assert before < SHARDS
    assert report["shards"] == SHARDS

    statistics = list(open_archive(archive, site.store.endpoint).all_statistics())
    assert len(statistics) == SHARDS
    seen = "last_over_time({}[1h])".format
    assert prometheus.value(seen("ucray_bytes_in_total")) == sum(one.bytes_in for one in statistics)
    assert prometheus.value(seen("ucray_bytes_out_total")) == sum(one.bytes_out for one in statistics)
    assert prometheus.value(seen("ucray_shards_planned")) == SHARDS
    stored = "sum({})".format(seen('ucray_shards_total{outcome!="failed"}'))
    assert prometheus.value(stored) == SHARDS
    kinds = dict[str, int]()
    for one in statistics:
        for chunk in one.chunks:
            kinds[chunk.kind] = kinds.get(chunk.kind, 0) + 1
    counted = prometheus.query(seen("ucray_chunks_total"))
    assert {labels["kind"]: value for labels, value in counted} == kinds
    # Not one counter ever went back.
    for counter in ("bytes_in", "bytes_out", "shards", "chunks"):
        assert prometheus.value(f"max(resets(ucray_{counter}_total[1h]))") == 0.0
    assert prometheus.value("max_over_time(ucray:bytes_in:rate5m[1h])") > 0.0
    # Ray's own figures stand beside them.
    prometheus.wait_for(lambda: prometheus.value("sum(ray_node_cpu_count)") == 2.0, 60.0)


def test_a_job_shorter_than_a_scrape_s_interval_is_seen(site: Site) -> None:
    # Of 4 kB the metadata alone are half: it does not reach the ratio of the others.
    report = _finish(site.start(f"{BUCKET}/small.ucray", "--serial", "--ratio", "1.5", shape="small"))
    assert report["shards"] == 1
    assert site.prometheus.value("last_over_time(ucray_shards_planned[1h])") == 1.0
    assert site.prometheus.value("last_over_time(ucray_bytes_in_total[1h])") == 16**3


def _moves(site: Site) -> bool:
    return 0 < site.committed() < SHARDS and "UcrayStalled" not in site.prometheus.firing()


def test_a_job_that_stands_still_raises_the_alarm_until_it_goes_on(site: Site) -> None:
    job = site.start(f"{BUCKET}/stalled.ucray")
    # With times this short the alarm is raised while actors start, too: it has to be over first.
    site.prometheus.wait_for(lambda: _moves(site) or job.poll() is not None, LIMIT)
    assert job.poll() is None
    os.kill(site.store.pid, signal.SIGSTOP)
    try:
        site.prometheus.wait_for(lambda: "UcrayStalled" in site.prometheus.firing(), 30.0)
    finally:
        os.kill(site.store.pid, signal.SIGCONT)
    site.prometheus.wait_for(lambda: "UcrayStalled" not in site.prometheus.firing(), LIMIT)
    assert _finish(job)["shards"] == SHARDS
