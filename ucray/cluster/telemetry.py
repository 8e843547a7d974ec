"""What a running job tells: Prometheus metrics over HTTP, and events for progress bars."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, start_http_server
from prometheus_client.registry import Collector

from ucray.errors import SettingsError
from ucray.storage.shard import ShardStatistics

LOGGER = logging.getLogger(__name__)

LINGER = 60.0
"""Seconds that a job which has ended waits for a last scrape, unless it is told otherwise."""


@dataclass(frozen=True)
class Event:
    """Progress of one stage of a job.

    `done` of `total` are in the stage's own unit (bytes or steps); `note` is for people, `figures` are what
    it says as numbers, where it says any.
    """

    stage: str
    done: float
    total: float
    note: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """A listener that shows nothing."""


class _Scrapes(Collector):
    """Notices every scrape of the registry that it is in."""

    def __init__(self) -> None:
        self.seen = threading.Event()

    def collect(self) -> Iterator[Metric]:
        self.seen.set()
        return iter(())


class Telemetry:
    """Metrics of one job, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._begun = False
        self._scrapes = _Scrapes()
        registry = self.registry
        self._bytes_in = Counter("ucray_bytes_in", "Bytes of source voxels stored", registry=registry)
        self._bytes_out = Counter("ucray_bytes_out", "Bytes of shards written", registry=registry)
        self._chunks = Counter("ucray_chunks", "Chunks coded, by kind", ["kind"], registry=registry)
        self._shards = Counter("ucray_shards", "Shards, by outcome", ["outcome"], registry=registry)
        # A series that began with its first failure would hide it from `increase`.
        for outcome in ("committed", "raced", "found", "resumed", "failed"):
            self._shards.labels(outcome)
        self._planned = Gauge("ucray_shards_planned", "Shards of the archive", registry=registry)
        self._stage = Histogram(
            "ucray_stage_seconds",
            "Seconds a shard spent in a stage",
            ["stage"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
            registry=registry,
        )
        self._psnr = Histogram(
            "ucray_shard_psnr_db", "PSNR of shards", buckets=tuple(range(20, 62, 2)), registry=registry
        )
        self._steps = Gauge("ucray_training_steps", "Steps of training done", registry=registry)
        self._all_steps = Gauge("ucray_training_steps_planned", "Steps of training", registry=registry)
        self._training = {
            "loss": Gauge("ucray_training_loss", "Loss of the last step", registry=registry),
            "mse": Gauge(
                "ucray_training_student_mse", "Squared error, in variances of the volume", registry=registry
            ),
            "teacher_mse": Gauge(
                "ucray_training_teacher_mse", "Squared error, in variances of the volume", registry=registry
            ),
            "bpp": Gauge("ucray_training_bytes_per_voxel", "Rate in stage 1", registry=registry),
        }
        self._ratio = Histogram(
            "ucray_shard_ratio",
            "Source bytes over stored bytes of shards",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096),
            registry=registry,
        )
        # Registering asks for a first collection, which is no scrape.
        registry.register(self._scrapes)

    def planned(self, shards: int, present: int) -> None:
        """Shards that there will be, and how many of them an earlier run had committed."""
        self._begun = True
        self._planned.set(shards)
        self._shards.labels("resumed").inc(present)

    def stored(
        self, statistics: ShardStatistics, data_range: float, seconds: Mapping[str, float], place: str
    ) -> None:
        """One shard is safe: "committed" by this job, or "raced" or "found" where another was faster."""
        self._shards.labels(place).inc()
        self._bytes_in.inc(statistics.bytes_in)
        self._bytes_out.inc(statistics.bytes_out)
        for chunk in statistics.chunks:
            self._chunks.labels(chunk.kind).inc()
        for stage, took in seconds.items():
            self._stage.labels(stage).observe(took)
        psnr = statistics.error.psnr(data_range)
        if math.isfinite(psnr):
            self._psnr.observe(psnr)
        self._ratio.observe(statistics.bytes_in / statistics.bytes_out)

    def failed(self) -> None:
        """One shard could not be read, coded or written."""
        self._shards.labels("failed").inc()

    def following(self, listener: Listener) -> Listener:
        """A listener of training that keeps the metrics up to date and tells another."""

        def follow(event: Event) -> None:
            self._begun = True
            self._steps.set(event.done)
            self._all_steps.set(event.total)
            for name, value in event.figures.items():
                # Base units, as Prometheus has them.
                self._training[name].set(value / 8.0 if name == "bpp" else value)
            listener(event)

        return follow

    @contextmanager
    def served(self, port: int | None, linger: float = 0.0) -> Iterator[None]:
        """Serve the metrics on http://0.0.0.0:port/metrics while the block runs; None serves nothing.

        A job that had begun and that has ended, well or with an error, waits up to `linger` seconds for one
        more scrape: what happened since the one before would be lost. One that is stopped does not wait.
        """
        if port is None:
            yield
            return
        try:
            server, thread = start_http_server(port, registry=self.registry)
        except OSError as error:
            raise SettingsError(f"metrics cannot be served on port {port}: {error.strerror}") from None
        try:
            try:
                yield
            except Exception:
                self._await_scrape(linger)
                raise
            self._await_scrape(linger)
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _await_scrape(self, linger: float) -> None:
        if not self._begun or linger <= 0.0:
            return
        self._scrapes.seen.clear()
        LOGGER.info("waiting for a last scrape of the metrics, %g s at most", linger)
        self._scrapes.seen.wait(linger)
