"""Memory is bounded: a volume twenty times the budget goes through, and no process goes over it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import ray
import zarr
from test_kill import LONG

from ucray.cluster.plan import COPIES, NETWORK_MEMORY
from ucray.synthetic import synthetic_volume

SIDE = 256
BUDGET = NETWORK_MEMORY + COPIES * SIDE**3
"""Exactly what a job on shards of SIDE needs."""

STORE = 640 * 2**20
"""Ray's object store: some forty shards of the two thousand that go through."""

TISSUE = 24
"""One shard in so many holds tissue; all others are the fill value, and go through the same queues."""


class Peaks(threading.Thread):
    """Largest resident memory of every process of a Ray node by its title, and whether Ray spilled."""

    def __init__(self, spilled: Path) -> None:
        super().__init__(daemon=True)
        self.resident: Counter[str] = Counter()
        self.spilled: set[str] = set()
        self._folder = spilled
        self._ended = threading.Event()

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while not self._ended.wait(0.1):
            self.spilled |= {str(path) for path in self._folder.rglob("*") if path.is_file()}
            for process in Path("/proc").iterdir():
                if not process.name.isdigit():
                    continue
                try:
                    title = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    status = (process / "status").read_text()
                except OSError:
                    continue  # it has ended meanwhile
                name = _stage(title)
                resident = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
                if name and resident:
                    self.resident[name] = max(self.resident[name], int(resident[1]) * 1024)


def _stage(title: str) -> str:
    """What a process does for the job; empty for processes of others."""
    if title.startswith("ray::"):
        return title.strip()
    if "ucray.cli" in title:
        return "driver"
    return next((name for name in ("raylet/raylet", "gcs_server") if name in title), "")


@pytest.mark.skipif(LONG not in os.environ, reason=f"ten minutes; {LONG}=1 runs it")
def test_a_volume_of_twenty_budgets_stays_under_one(tmp_path: Path) -> None:
    shards = (20, 10, 10)
    shape = tuple(SIDE * n for n in shards)
    assert np.prod(shape) > 20 * BUDGET
    source = str(tmp_path / "em.zarr")
    volume = zarr.create_array(source, shape=shape, chunks=(SIDE,) * 3, dtype="uint8", fill_value=0)
    tissue = np.maximum(synthetic_volume((SIDE,) * 3, seed=1), 1)
    indices = list(np.ndindex(*shards))
    for index in indices[::TISSUE]:
        volume[tuple(slice(SIDE * n, SIDE * (n + 1)) for n in index)] = tissue

    peaks = Peaks(tmp_path / "spilled")
    ray.init(
        num_cpus=2,
        object_store_memory=STORE,
        object_spilling_directory=str(tmp_path / "spilled"),
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        peaks.start()
        side = f"{SIDE},{SIDE},{SIDE}"
        ended = subprocess.run(
            [
                *(sys.executable, "-c", "from ucray.cli import main; main()", "compress", source),
                *(str(tmp_path / "em.ucray"), "--weights", "em-fib-v1", "--shard", side),
                *("--memory", str(BUDGET), "--json"),
            ],
            env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        peaks.stop()
        ray.shutdown()
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    print(f"budget {BUDGET >> 20} MiB, volume {int(np.prod(shape)) >> 20} MiB, {report['seconds']:.0f} s")
    for name, resident in sorted(peaks.resident.items()):
        print(f"{name}: {resident / 2**20:.0f} MiB")
    assert report["shards"] == len(indices)
    assert any("_EncodeRow" in name for name in peaks.resident)
    assert any("_WriteRow" in name for name in peaks.resident)
    assert "driver" in peaks.resident
    assert {name: size for name, size in peaks.resident.items() if size > BUDGET} == {}
    # What the job itself counts says the same.
    assert max(report["peak_memory"].values()) <= BUDGET
    # Shards wait because Ray Data holds back who makes them, and not on disk.
    assert peaks.spilled == set()
