"""A real Prometheus on loopback, and what it says through its HTTP API."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from ray_head import free_port

READY = 30.0


class Prometheus:
    """Scrapes targets twice a second and keeps what it saw in a folder; a context manager."""

    def __init__(self, folder: Path, scrape_configs: list[dict[str, Any]], rules: str) -> None:
        self._url = f"127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = folder
        folder.mkdir()
        (folder / "rules.yaml").write_text(rules)
        interval = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
        configuration = {
            "global": interval,
            "rule_files": ["rules.yaml"],
            "scrape_configs": scrape_configs,
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))

    def __enter__(self) -> Prometheus:
        command = ["prometheus", f"--config.file={self._folder / 'prometheus.yml'}"]
        command += [f"--storage.tsdb.path={self._folder / 'data'}", f"--web.listen-address={self._url}"]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self.wait_for(lambda: self._get("/-/ready") is not None, READY)
        return self

    def __exit__(self, *raised: object) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(30.0)

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of every series that an expression has now."""
        answer = self._get("/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        assert answer is not None
        found = json.loads(answer)
        assert found["status"] == "success", found
        return [(one["metric"], float(one["value"][1])) for one in found["data"]["result"]]

    def value(self, expression: str) -> float:
        """The one value of an expression; zero where there is none."""
        found = self.query(expression)
        assert len(found) <= 1, found
        return found[0][1] if found else 0.0

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {labels["alertname"] for labels, _ in self.query('ALERTS{alertstate="firing"}')}

    def wait_for(self, holds: Callable[[], bool], seconds: float) -> None:
        """Until something holds; fails with the log if it does not in time."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, (self._folder / "log").read_text()[-2000:]
            time.sleep(0.1)

    def _get(self, path: str) -> bytes | None:
        try:
            with urllib.request.urlopen(f"http://{self._url}{path}", timeout=5.0) as answer:
                return bytes(answer.read())
        except OSError:
            return None
