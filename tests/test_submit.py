"""`ray job submit` to a real head, by the scripts in examples/: logs, exit status, stop and go on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from object_store import ObjectStore
from ray_head import RayHead

import ucray
from ucray.storage.objects import open_objects

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
BUCKET = "s3://ucray-submit"
SIZES = ("--chunk", "32,32,32", "--shard", "32,32,32", "--ratio", "16")


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, tiny_weights: ucray.Weights
) -> Iterator[tuple[RayHead, ObjectStore]]:
    """A head whose jobs reach a bucket with a volume and weights."""
    with ObjectStore(tmp_path_factory.mktemp("s3")) as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment().items():
            patch.setenv(name, value)
        store.create_bucket(BUCKET.removeprefix("s3://"))
        ucray.synth(f"{BUCKET}/em.zarr", (96, 96, 96), seed=4, connection=ucray.Connection(store.endpoint))
        open_objects(BUCKET, store.endpoint).put_new("tiny", tiny_weights.to_bytes())
        with RayHead(store.environment()) as head:
            yield head, store


def test_train_compress_and_verify_by_the_scripts(site: tuple[RayHead, ObjectStore], tmp_path: Path) -> None:
    head, store = site
    train = [str(EXAMPLES / "submit_train.sh"), f"{BUCKET}/em.zarr", f"{BUCKET}/trained"]
    train += ["--chunk", "64,64,64", "--train-steps", "3", "--student-steps", "1", "--batch", "1"]
    trained = head.run(*train, "--storage", str(tmp_path / "checkpoints"), cwd=tmp_path)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert re.search(r"^train 100%", trained.stdout, re.MULTILINE)

    archive = f"{BUCKET}/trained.ucray"
    compress = [str(EXAMPLES / "submit_compress.sh"), f"{BUCKET}/em.zarr", archive]
    compress += ["--weights", f"{BUCKET}/trained", "--chunk", "64,64,64", "--ratio", "32"]
    compressed = head.run(*compress, cwd=tmp_path)
    assert compressed.returncode == 0, compressed.stdout + compressed.stderr
    # Lines for people, in the order of what happens, and none of a bar that draws itself anew.
    told = [line for line in compressed.stdout.splitlines() if re.match(r"(measure|compress) \d+%", line)]
    assert told[0].startswith("measure")
    assert re.fullmatch(r"compress 100%, \d+\.\d MB/s, ratio \d+\.\d", told[-1])
    assert "\x1b[2K" not in compressed.stdout

    verified = head.run(
        str(EXAMPLES / "submit_verify.sh"), archive, "--source", f"{BUCKET}/em.zarr", cwd=tmp_path
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
    objects = open_objects(archive, store.endpoint)
    shard = next(key for key in objects.sizes("") if key.startswith("0/c/"))
    client = store.client()
    client.delete_object(Bucket="ucray-submit", Key=f"trained.ucray/{shard}")
    damaged = head.run(str(EXAMPLES / "submit_verify.sh"), archive, cwd=tmp_path)
    assert damaged.returncode == 1
    assert f"{shard} is missing" in damaged.stdout


def test_a_working_dir_goes_along_and_bad_input_fails_the_job(
    site: tuple[RayHead, ObjectStore], tmp_path: Path
) -> None:
    head, _ = site
    (tmp_path / "boxes.json").write_text(json.dumps([{"shard": [0, 0, 0], "box": "0:32,0:32,0:32"}]))
    submit = ["ray", "job", "submit", "--working-dir", ".", "--"]
    compress = ["ucray", "compress", f"{BUCKET}/em.zarr", f"{BUCKET}/box.ucray", *SIZES]
    compress += ["--weights", f"{BUCKET}/tiny", "--boxes", "boxes.json", "--json"]
    one = head.run(*submit, *compress, cwd=tmp_path)
    assert one.returncode == 1, one.stdout  # 26 shards are left
    assert '"left": 26' in one.stdout

    none = head.run(*submit, "ucray", "compress", f"{BUCKET}/none.zarr", f"{BUCKET}/none.ucray", cwd=tmp_path)
    assert none.returncode == 1  # Ray's own for a job that failed
    assert "SourceError: " in none.stdout
    assert "exit code 2" in none.stdout + none.stderr
    assert "Traceback" not in none.stdout


def test_a_stopped_job_ends_at_once_and_its_next_submission_goes_on(
    site: tuple[RayHead, ObjectStore], tmp_path: Path
) -> None:
    head, store = site
    archive = f"{BUCKET}/stopped.ucray"
    arguments = [f"{BUCKET}/em.zarr", archive, *SIZES, "--weights", f"{BUCKET}/tiny"]
    submit = ["ray", "job", "submit", "--no-wait", "--submission-id", "first"]
    submit += ["--runtime-env-json", json.dumps({"env_vars": {"UCRAY_LOG_LEVEL": "debug"}})]
    begun = head.run(*submit, "--", "ucray", "compress", *arguments, cwd=tmp_path)
    assert begun.returncode == 0, begun.stdout + begun.stderr
    objects = open_objects(archive, store.endpoint)
    deadline = time.monotonic() + 120.0
    while not any(key.startswith("0/c/") for key in objects.sizes("")):
        assert time.monotonic() < deadline, head.run("ray", "job", "logs", "first", cwd=tmp_path).stdout
        time.sleep(0.02)

    # As `ray job stop` does, which takes longer to start on a busy machine than the rest of the job takes.
    job = f"{head.dashboard}/api/jobs/first"
    assert httpx.post(f"{job}/stop", timeout=60).json() == {"stopped": True}
    while httpx.get(job, timeout=60).json()["status"] == "RUNNING":
        assert time.monotonic() < deadline + 60.0
        time.sleep(0.2)
    status = head.run("ray", "job", "status", "first", cwd=tmp_path).stdout
    assert "'first' was stopped" in status
    log = head.run("ray", "job", "logs", "first", cwd=tmp_path).stdout
    assert "stopped; compress, and train with --storage, go on where they ended" in log
    assert "Traceback" not in log
    stood = sum(key.startswith("0/c/") for key in objects.sizes(""))
    assert stood < 27  # it was stopped on the way

    again = head.run("ray", "job", "submit", "--", "ucray", "compress", *arguments, "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    resumed = re.search(r'"resumed": (\d+)', again.stdout)
    assert resumed is not None
    assert int(resumed[1]) >= stood
    connection = ucray.Connection(store.endpoint)
    assert ucray.verify(archive, f"{BUCKET}/em.zarr", serial=True, connection=connection).clean


def test_the_walk_through_runs_from_top_to_bottom(tmp_path: Path) -> None:
    walk = subprocess.run(
        [sys.executable, str(EXAMPLES / "walkthrough.py"), str(tmp_path / "walk")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert walk.returncode == 0, walk.stderr
    assert "clean: True" in walk.stdout
