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
from conftest import TINY, build_weights
from numcodecs import zstd
from ray.cluster_utils import Cluster

import ucray
from ucray.cluster.memory import peak_memory
from ucray.storage.archive import open_archive
from ucray.storage.shard import shard_key

NODES = 4
SIDE = 16
SMALL, LARGE = 6, 13
"""Shards on an axis of the two jobs, whose difference is what more shards cost."""

PETABYTE, SHARD_BYTES = 1e15, 512**3


def copy_bytes() -> None:
    """Runs in every worker before anything else: drafts are the shard's bytes."""
    from ucray.cluster import worker
    from ucray.codec.encoder import Draft
    from ucray.quality import ErrorSum

    def start(self: Any, job: Any) -> None:
        self._settings = job.settings

    def drafts(self: Any, index: Any, voxels: np.ndarray[Any, Any]) -> list[Draft]:
        frame = zstd.compress(voxels.tobytes(), 1)
        return [Draft(index, b"", b"", frame, None, ErrorSum(voxels.size))]

    worker.ShardEncoder.__init__ = start  # type: ignore[method-assign]
    worker.ShardEncoder.drafts = drafts  # type: ignore[assignment,method-assign]


def run(source: str, archive: str, weights: str, side: int) -> float:
    """Seconds of a job over side^3 shards."""
    roi = ",".join(f"0:{side * SIDE}" for _ in range(3))
    options = ucray.CompressOptions(ratio=4, chunk=(SIDE,) * 3, shard=(SIDE,) * 3, roi=roi)
    run_options = ucray.RunOptions(encode_workers=NODES, write_workers=NODES, worker_cpus=0.5)
    started = time.perf_counter()
    report = ucray.compress(source, archive, options, weights=weights, run_options=run_options)
    assert report.shards == side**3
    return time.perf_counter() - started


def main() -> None:
    """The rehearsal."""
    folder = Path(sys.argv[1])
    source, weights = str(folder / "em.zarr"), folder / "tiny"
    weights.write_bytes(build_weights(TINY, seed=1).to_bytes())
    noise = np.random.default_rng(0).integers(1, 255, (LARGE * SIDE,) * 3, dtype=np.uint8)
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
        small = run(source, str(folder / "small"), str(weights), SMALL)
        large = run(source, str(folder / "large"), str(weights), LARGE)
        ray.shutdown()
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]
    stored = open_archive(str(folder / "large")).sizes()
    shards = LARGE**3
    overhead = (large - small) / (shards - SMALL**3)
    print(
        json.dumps(
            {
                "shards": shards,
                "stored": sum(shard_key((0, 0, 0))[:4] == key[:4] for key in stored),
                "seconds": [small, large],
                "milliseconds_a_shard": 1e3 * overhead,
                "hours_of_a_petabyte": overhead * PETABYTE / SHARD_BYTES / 3600.0,
                "driver_memory": peak_memory(),
            }
        )
    )


if __name__ == "__main__":
    main()
