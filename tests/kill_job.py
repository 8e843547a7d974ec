"""A compress job as a driver of its own, whose workers note every shard that they begin to encode."""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import ray

import ucray
from ucray.errors import UcrayError
from ucray.grid import Shape3

LOG = "UCRAY_TEST_ENCODED"
"""Where encodes are noted."""

ENCODING, READING = 0.15, 0.5
"""Seconds that encoding and reading a shard take at least, so that a kill finds work under way."""


class _Finder(importlib.abc.MetaPathFinder):
    """Finds some modules as others do, and changes them once they are loaded.

    Most workers never load them: importing them in all would take longer than the job.
    """

    def __init__(self, changes: dict[str, Callable[[Any], None]]) -> None:
        self._changes = changes

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._changes:
            return None
        change = self._changes.pop(fullname)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        loader: Any = spec.loader
        load = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            change(module)

        loader.exec_module = exec_module
        return spec


def watch() -> None:
    """Runs in every worker process before anything else."""
    changes: dict[str, Callable[[Any], None]] = {
        "ucray.cluster.worker": _note_encodes,
        "ucray.storage.volume": _slow_down_reads,
    }
    sys.meta_path.insert(0, _Finder(changes))


def _note_encodes(module: Any) -> None:
    really = module.ShardEncoder.drafts

    def drafts(self: Any, index: Shape3, voxels: np.ndarray[Any, Any], weights: Any) -> Any:
        with Path(os.environ[LOG]).open("a") as log:
            log.write(json.dumps([list(index), time.time()]) + "\n")
        time.sleep(ENCODING)
        return really(self, index, voxels, weights)

    module.ShardEncoder.drafts = drafts


def _slow_down_reads(module: Any) -> None:
    really = module.Volume.read

    def read(self: Any, box: Any) -> Any:
        time.sleep(READING)
        return really(self, box)

    module.Volume.read = read


def main() -> int:
    source, destination, weights = sys.argv[1:4]
    ray.init(
        runtime_env={"worker_process_setup_hook": watch, "env_vars": {LOG: os.environ[LOG]}},
        log_to_driver=False,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    options = ucray.CompressOptions(ratio=16, chunk=(32, 32, 32), shard=(32, 32, 32))
    run = ucray.RunOptions(encode_workers=2, write_workers=1, worker_cpus=0.5, failed_boxes=os.devnull)
    try:
        report = ucray.compress(source, destination, options, weights=weights, run_options=run)
    except UcrayError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_status
    print(json.dumps({"shards": report.shards, "resumed": report.resumed}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
