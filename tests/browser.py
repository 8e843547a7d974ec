"""A real headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import io
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image
from websockets.sync.client import connect

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-port=0",
]


def chromium() -> str | None:
    """Where Chromium is installed; None where it is not."""
    return shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """One tab. `problems` are errors of its console, uncaught exceptions, and answers of 400 and more."""

    def __init__(self, profile: Path, size: tuple[int, int] = (1000, 700)) -> None:
        binary = chromium()
        assert binary is not None
        self.problems: list[str] = []
        self._open = ExitStack()
        self._numbers = itertools.count(1)
        window = f"--window-size={size[0]},{size[1]}"
        command = [binary, *FLAGS, window, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            tab = connect(self._tab(profile / "DevToolsActivePort"), max_size=1 << 28)
            self._socket = self._open.enter_context(tab)
        except BaseException:
            self._process.kill()
            raise
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", metrics)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()
        self._process.terminate()
        self._process.wait(30)

    def _tab(self, port_file: Path) -> str:
        port = wait_for(lambda: port_file.exists() and port_file.read_text().splitlines()[:1], 60)[0]

        def tab() -> str | None:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=5) as answer:
                pages = [page for page in json.load(answer) if page["type"] == "page"]
            return str(pages[0]["webSocketDebuggerUrl"]) if pages else None

        return str(wait_for(tab, 30))

    def call(self, method: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask the browser, and note what it tells meanwhile."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters or {}}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == number:
                if "error" in message:
                    raise ConnectionError(str(message["error"]))
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        told = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(str(told["exceptionDetails"]))
        if message.get("method") == "Runtime.consoleAPICalled" and told["type"] == "error":
            self.problems.append(str(told["args"]))
        if message.get("method") == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.problems.append(str(told["entry"]))
        if message.get("method") == "Network.responseReceived" and told["response"]["status"] >= 400:
            self.problems.append(f"{told['response']['status']} {told['response']['url']}")

    def open(self, url: str) -> None:
        """Go to a page, and wait for it."""
        self.call("Page.navigate", {"url": url})
        loaded = f"document.readyState === 'complete' && location.href.startsWith({url!r})"
        wait_for(lambda: self.evaluate(loaded), 60)

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", {"expression": script, "returnByValue": True})
        return found["result"].get("value")

    def emulate(self, scheme: str) -> None:
        """Prefer a colour scheme, light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", {"features": features})

    def picture(self) -> Any:
        """What the window shows, (rows, columns, RGB)."""
        data = self.call("Page.captureScreenshot", {"format": "png"})["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def wait_for(ready: Callable[[], Any], seconds: float) -> Any:
    """What `ready` gives once it gives something; fails after that long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := ready():
                return found
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"not ready after {seconds} s")
