"""A Ray head with its dashboard, started as people start one, that takes submitted jobs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

BIN = Path(sys.executable).parent
READY = 90.0
"""Seconds that a head may take to answer."""


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RayHead:
    """`ray start --head` on ports of its own; a context manager.

    Jobs inherit `environment`, and find `ucray` on their path.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        # Ray's sockets take no long path.
        self.folder = Path(tempfile.mkdtemp(prefix="h", dir="/tmp"))
        self._gcs, self._dashboard = free_port(), free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.environment = dict(os.environ) | dict(environment)
        self.environment |= {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self.folder),
        }

    @property
    def address(self) -> str:
        """Where a driver joins."""
        return f"127.0.0.1:{self._gcs}"

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted to."""
        return f"http://127.0.0.1:{self._dashboard}"

    @property
    def discovery(self) -> Path:
        """Where Ray tells Prometheus of its own metrics."""
        return self.folder / "ray" / "prom_metrics_service_discovery.json"

    def __enter__(self) -> RayHead:
        command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={self._gcs}"]
        command += [f"--dashboard-port={self._dashboard}", "--node-ip-address=127.0.0.1"]
        command += [f"--metrics-export-port={free_port()}", "--object-store-memory=300000000"]
        with (self.folder / "head.log").open("wb") as output:
            self._process = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + READY
        while not self._answers():
            log = (self.folder / "head.log").read_text()
            assert self._process.poll() is None, log
            assert time.monotonic() < deadline, log
            time.sleep(0.2)
        return self

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.dashboard}/api/jobs/", timeout=5.0):
                return True
        except OSError:
            return False

    def __exit__(self, *raised: object) -> None:
        assert self._process is not None
        # With its session go raylet and stores; workers end when their raylet is gone.
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str, cwd: Path, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """A command as somebody would type it who works with this cluster."""
        environment = self.environment | {"RAY_ADDRESS": self.dashboard}
        return subprocess.run(
            command, env=environment, cwd=cwd, timeout=timeout, capture_output=True, text=True, check=False
        )
