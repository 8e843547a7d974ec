"""The gateway on a real Ray Serve: what replicas answer, and that one that dies is replaced."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import yaml
import zarr
from browser import wait_for

import ucray
from ucray.serve.on_ray import DEPLOYMENT

SERVE = str(Path(sys.executable).with_name("serve"))
REPLICAS = 2


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, tiny_weights: ucray.Weights) -> Path:
    folder = tmp_path_factory.mktemp("serve-on-ray")
    (folder / "tiny.safetensors").write_bytes(tiny_weights.to_bytes())
    ucray.synth(str(folder / "em.zarr"), (32, 64, 64), seed=1)
    ucray.compress(
        str(folder / "em.zarr"),
        str(folder / "em.ucray"),
        ucray.CompressOptions(psnr=20, chunk=(32, 32, 32), shard=(32, 64, 64), levels=1),
        weights=str(folder / "tiny.safetensors"),
        run_options=ucray.RunOptions(serial=True),
    )
    return folder / "em.ucray"


@pytest.fixture(scope="module")
def running(archive: Path) -> Iterator[tuple[str, psutil.Process]]:
    """URL of a gateway that `serve run` runs as a configuration says, and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "ucray",
                "import_path": "ucray.serve.on_ray:build",
                "route_prefix": "/",
                "args": {"archive": str(archive), "source": str(archive.with_name("em.zarr")), "threads": 1},
                "deployments": [
                    {"name": DEPLOYMENT, "num_replicas": REPLICAS, "ray_actor_options": {"num_cpus": 0.1}}
                ],
            }
        ],
    }
    file = archive.with_name("serve.yaml")
    file.write_text(yaml.safe_dump(config))
    log = archive.with_name("serve.log").open("wb")
    environment = {n: v for n, v in os.environ.items() if n != "RAY_ADDRESS"} | {
        "RAY_USAGE_STATS_ENABLED": "0"
    }
    process = subprocess.Popen([SERVE, "run", str(file)], env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: process.poll() is not None or answers(f"{url}/healthz"), 180)
        assert process.poll() is None, archive.with_name("serve.log").read_text()[-2000:]
        yield url, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            process.kill()
            log.close()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def replicas(process: psutil.Process) -> set[int]:
    """Processes of the gateway's replicas."""
    named = f"ServeReplica:ucray:{DEPLOYMENT}"
    children = process.children(recursive=True)
    return {child.pid for child in children if any(named in part for part in _command(child))}


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def test_replicas_give_what_the_archive_decodes_to(
    running: tuple[str, psutil.Process], archive: Path
) -> None:
    url, _ = running
    served: Any = zarr.open_group(f"{url}/compressed/zarr", mode="r")
    stored: Any = zarr.open_group(archive, mode="r")
    for level in ("0", "1"):
        np.testing.assert_array_equal(served[level][...], stored[level][...])
    source: Any = zarr.open_group(f"{url}/original/zarr", mode="r")
    np.testing.assert_array_equal(source["0"][...], zarr.open_group(archive.with_name("em.zarr"))["0"][...])  # type: ignore[index]


def test_a_replica_that_is_killed_is_replaced(running: tuple[str, psutil.Process]) -> None:
    url, process = running
    wait_for(lambda: len(replicas(process)) == REPLICAS, 60)
    before = replicas(process)
    os.kill(min(before), signal.SIGKILL)
    chunk = f"{url}/compressed/zarr/0/c/0/0/0"
    # One that was on its way to the dead replica may be lost; the next ones are not.
    time.sleep(1)
    assert [httpx.get(chunk, timeout=30).status_code for _ in range(20)] == [200] * 20
    wait_for(lambda: len(replicas(process) - {min(before)}) == REPLICAS, 120)
