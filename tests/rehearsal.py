"""A compress job on a simulated cluster of four nodes, its codec replaced by one that copies bytes.

As a script: ``rehearsal.py FOLDER`` prints, as JSON, what a shard costs beside coding it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import zarr
from ray.cluster_utils import Cluster

import ucray
from ucray.cluster.memory import peak_memory
from ucray.storage.archive import open_archive

NODES = 4
SIDE = 32
SHARDS = 11
"""Shards on an axis."""

STARTED = 200
"""Shards after which every actor works, and time is taken."""

PETABYTE, SHARD_BYTES = 1e15, 512**3


def copy_bytes() -> None:
    """Runs in every worker before anything else: drafts are the shard's bytes."""
    from ucray.cluster import worker
    from ucray.codec.encoder import Draft
    from ucray.quality import ErrorSum

    def start(self: Any, job: Any) -> None:
        self._settings = job.settings
        self._packs = False

    def drafts(self: Any, index: Any, voxels: np.ndarray[Any, Any], weights: None) -> list[Draft]:
        return [Draft(index, b"", b"", voxels.tobytes(), None, ErrorSum(voxels.size))]

    worker.ShardEncoder.__init__ = start  # type: ignore[method-assign]
    worker.ShardEncoder.drafts = drafts  # type: ignore[assignment,method-assign]


def run(source: str, archive: str) -> list[tuple[float, float]]:
    """When each shard of a job was done, and the driver's processor time until then, in seconds."""
    options = ucray.CompressOptions(chunk=(SIDE,) * 3, shard=(SIDE,) * 3)
    run_options = ucray.RunOptions(encode_workers=NODES, write_workers=NODES, worker_cpus=0.5)
    done: list[tuple[float, float]] = []

    def note(event: ucray.Event) -> None:
        if event.stage == "compress" and event.done:
            done.append((time.perf_counter(), time.process_time()))

    ucray.compress(source, archive, options, weights="em-fib-v1", run_options=run_options, listener=note)
    return done


def main() -> None:
    """The rehearsal."""
    folder = Path(sys.argv[1])
    source = str(folder / "em.zarr")
    noise = np.random.default_rng(0).integers(1, 255, (SHARDS * SIDE,) * 3, dtype=np.uint8)
    zarr.create_array(source, data=noise, chunks=(SIDE,) * 3)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(NODES):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(
            address=cluster.address,
            runtime_env={
                "worker_process_setup_hook": copy_bytes,
                "env_vars": {"PYTHONPATH": str(Path(__file__).parent)},
            },
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        done = run(source, str(folder / "archive"))
        ray.shutdown()
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]
    stored = open_archive(str(folder / "archive")).sizes()
    shards = len(done) - STARTED
    seconds, driver = (
        (last - first) / shards for first, last in zip(done[STARTED - 1], done[-1], strict=True)
    )
    found = {
        "shards": SHARDS**3,
        "stored": sum(key.startswith("0/c/") for key in stored),
        "milliseconds_a_shard": 1e3 * seconds,
        "driver_milliseconds_a_shard": 1e3 * driver,
        "driver_hours_of_a_petabyte": driver * PETABYTE / SHARD_BYTES / 3600.0,
        "driver_memory": peak_memory(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
