"""A job with no more rights than it needs, whose credentials are nowhere to be found afterwards."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import botocore.exceptions
import pytest
from object_store import ObjectStore

import ucray
from ucray.storage.index import shard_key
from ucray.storage.objects import open_objects

BUCKET = "ucray-rights"
POLICY = {
    "Version": "2012-10-17",
    "Statement": [
        {
            "Effect": "Allow",
            "Principal": "*",
            "Action": ["s3:GetObject"],
            "Resource": [f"arn:aws:s3:::{BUCKET}/source/*", f"arn:aws:s3:::{BUCKET}/weights/*"],
        },
        {
            "Effect": "Allow",
            "Principal": "*",
            "Action": ["s3:GetObject", "s3:PutObject"],
            "Resource": [f"arn:aws:s3:::{BUCKET}/archives/*"],
        },
        {
            "Effect": "Allow",
            "Principal": "*",
            "Action": ["s3:ListBucket"],
            "Resource": [f"arn:aws:s3:::{BUCKET}"],
        },
    ],
}


@pytest.fixture(scope="module")
def rights(tmp_path_factory: pytest.TempPathFactory, tiny_weights: ucray.Weights) -> Iterator[ObjectStore]:
    """A server with a volume and weights, whose limited identity may read these and write archives."""
    with ObjectStore(tmp_path_factory.mktemp("s3")) as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment().items():
            patch.setenv(name, value)
        store.create_bucket(BUCKET)
        connection = ucray.Connection(store.endpoint)
        ucray.synth(f"s3://{BUCKET}/source/em.zarr", (64, 64, 64), seed=2, connection=connection)
        open_objects(f"s3://{BUCKET}/weights", store.endpoint).put_new("tiny", tiny_weights.to_bytes())
        store.client().put_bucket_policy(Bucket=BUCKET, Policy=json.dumps(POLICY))
        yield store


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder for Ray, whose sockets take no long path."""
    folder = Path(tempfile.mkdtemp(prefix="u", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_get_put_and_list_are_enough_and_credentials_stay_where_they_are(
    rights: ObjectStore, short_folder: Path, tmp_path: Path
) -> None:
    limited = rights.client(limited=True)
    with pytest.raises(botocore.exceptions.ClientError, match="AccessDenied"):
        limited.delete_object(Bucket=BUCKET, Key="source/em.zarr/zarr.json")
    with pytest.raises(botocore.exceptions.ClientError, match="AccessDenied"):
        limited.put_object(Bucket=BUCKET, Key="source/x", Body=b"")

    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    environment |= rights.environment(limited=True) | {"RAY_TMPDIR": str(short_folder)}
    environment |= {"UCRAY_LOG_FORMAT": "json", "UCRAY_LOG_LEVEL": "debug"}
    source, archive = f"s3://{BUCKET}/source/em.zarr", f"s3://{BUCKET}/archives/em.ucray"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    compress = ["compress", source, archive, "--weights", f"s3://{BUCKET}/weights/tiny", "--ratio", "16"]
    compress += ["--chunk", "32,32,32", "--shard", "32,32,64", "--metrics-port", str(port)]
    seen: list[str] = []
    for command, expected in (
        (compress, 0),
        ([*compress, "--serial", "--json"], 0),
        (["verify", archive, "--source", source, "--serial", "--json"], 0),
        (["decompress", archive, f"s3://{BUCKET}/archives/plain.zarr", "--serial", "--json"], 0),
        (["info", archive], 0),
        (["compress", source, f"s3://{BUCKET}/forbidden/em.ucray", *compress[3:], "--serial"], 2),
    ):
        seen.append(_run(command, environment, tmp_path, port, expected=expected))
    assert any("ucray_bytes_out_total" in text for text in seen)
    assert any('"shard": [0, 0, 0]' in text for text in seen)

    secrets = [rights.limited_access_key, rights.limited_secret_key]
    objects = open_objects(f"s3://{BUCKET}/archives", rights.endpoint)
    for key in objects.sizes(""):
        data = objects.get(key) or b""
        assert not any(secret.encode() in data for secret in secrets), key
    assert not any(secret in text for text in seen for secret in secrets)
    logs = [path for path in (*short_folder.rglob("*"), *tmp_path.rglob("*")) if path.is_file()]
    assert any("logs" in path.parts for path in logs)
    for path in logs:
        data = path.read_bytes()
        assert not any(secret.encode() in data for secret in secrets), path


def _run(command: list[str], environment: dict[str, str], folder: Path, port: int, *, expected: int) -> str:
    """What a command prints, and its metrics as long as it serves them."""
    job = subprocess.Popen(
        [Path(sys.executable).with_name("ucray"), *command],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = ""
    while job.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1.0) as answer:
                metrics = answer.read().decode()
        except OSError:
            pass
        time.sleep(0.1)
    assert job.stdout is not None
    printed = job.stdout.read()
    job.stdout.close()
    assert job.returncode == expected, printed
    return printed + metrics


def test_a_shard_that_the_store_refuses_is_listed_and_done_by_the_next_job(
    rights: ObjectStore, short_folder: Path, tmp_path: Path
) -> None:
    """403 for one object of four: the others are stored, the job exits with 1, its list leads to the rest."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    environment |= rights.environment(limited=True) | {"RAY_TMPDIR": str(short_folder)}
    archive, listing = f"s3://{BUCKET}/archives/refused.ucray", tmp_path / "failed.json"
    compress = ["compress", f"s3://{BUCKET}/source/em.zarr", archive, "--ratio", "16", "--json"]
    compress += ["--weights", f"s3://{BUCKET}/weights/tiny", "--chunk", "32,32,32", "--shard", "32,32,64"]
    refused = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": ["s3:PutObject"],
        "Resource": [f"arn:aws:s3:::{BUCKET}/archives/refused.ucray/{shard_key((1, 0, 0))}"],
    }
    client = rights.client()
    policy = POLICY | {"Statement": [*POLICY["Statement"], refused]}
    client.put_bucket_policy(Bucket=BUCKET, Policy=json.dumps(policy))
    try:
        said = _run([*compress, "--failed-boxes", str(listing)], environment, tmp_path, 1, expected=1)
    finally:
        client.put_bucket_policy(Bucket=BUCKET, Policy=json.dumps(POLICY))
    assert "1 of 4 shards failed" in said
    (failed,) = json.loads(listing.read_text())
    assert (failed["shard"], failed["box"]) == ([1, 0, 0], "32:64,0:32,0:64")
    objects = open_objects(archive, rights.endpoint)
    before = objects.sizes("0/c")
    assert len(before) == 3

    _run([*compress, "--serial", "--boxes", str(listing)], environment, tmp_path, 1, expected=0)
    after = objects.sizes("0/c")
    assert set(after) - set(before) == {shard_key((1, 0, 0))}
    assert before.items() <= after.items()
    _run(["verify", archive, "--serial", "--json"], environment, tmp_path, 1, expected=0)
