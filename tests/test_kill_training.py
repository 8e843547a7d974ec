"""Training goes on from its last checkpoint, whoever was killed: its worker, or its driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import train_job
from test_kill import LONG, processes

import ucray
from ucray.cluster.train import CHECKPOINT_STEPS, STATE_FILE

LIMIT = 400.0
"""Seconds for what takes a third of it."""

MARGIN = 100
"""Steps after a checkpoint: a file that lies there is not yet one that Ray knows of."""

pytestmark = pytest.mark.skipif(LONG not in os.environ, reason=f"ten minutes; {LONG}=1 kills trainings")

TOTAL = train_job.SETTINGS.teacher_steps + train_job.SETTINGS.student_steps


class Run:
    """A source, weights to begin with, and a folder for checkpoints."""

    def __init__(self, folder: Path, weights: ucray.Weights) -> None:
        self.storage, self.target, self._log = folder / "runs", folder / "out.safetensors", folder / "steps"
        self._source, self._init = folder / "em.zarr", folder / "tiny.safetensors"
        self._init.write_bytes(weights.to_bytes())
        ucray.synth(str(self._source), (64, 64, 96), seed=4)

    def start(self) -> subprocess.Popen[bytes]:
        places = (self._source, self.target, self._init, self.storage, self._log)
        command = [sys.executable, train_job.__file__, *map(str, places)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def wait_for_checkpoint(self, job: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + LIMIT
        while not any(self.storage.rglob(STATE_FILE)) or max(self.steps()) <= CHECKPOINT_STEPS + MARGIN:
            assert time.monotonic() < deadline
            assert job.poll() is None
            time.sleep(0.1)

    def steps(self) -> list[int]:
        """Steps in the order in which they were heard of."""
        return [int(line) for line in self._log.read_text().split()] if self._log.exists() else [0]


@pytest.fixture
def run(tmp_path: Path, tiny_weights: ucray.Weights) -> Run:
    return Run(tmp_path, tiny_weights)


def test_a_killed_worker_goes_on_from_the_checkpoint(run: Run) -> None:
    job = run.start()
    run.wait_for_checkpoint(job)
    (worker,) = processes("RayTrainWorker")
    os.kill(worker, signal.SIGKILL)
    assert job.wait(LIMIT) == 0
    steps = run.steps()
    drops = [after for before, after in pairwise(steps) if after < before]
    assert all(after >= CHECKPOINT_STEPS for after in drops)
    assert steps[-1] == TOTAL
    assert ucray.load_weights(str(run.target)).training["settings"]["teacher_steps"] == 500


def test_a_killed_driver_s_command_goes_on_from_the_checkpoint(run: Run) -> None:
    job = run.start()
    run.wait_for_checkpoint(job)
    job.kill()
    job.wait()
    before = len(run.steps())
    assert not run.target.exists()
    assert run.start().wait(LIMIT) == 0
    steps = [step for step in run.steps()[before:] if step]
    assert min(steps) > CHECKPOINT_STEPS
    assert steps[-1] == TOTAL
    assert run.target.exists()
