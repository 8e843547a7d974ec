"""Whole objects under a prefix, on a local file system or S3: get, list, and create-only put.

The create-only put is what makes a shard's object its commit: of several writers one wins, whole,
and the others learn that they lost.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import urlsplit

import botocore.exceptions
import fsspec
import s3fs
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore

from ucray.errors import CredentialsError, SettingsError, StorageError


class Objects(Protocol):
    """Objects by key under one prefix. Keys are relative, with forward slashes."""

    url: str

    def get(self, key: str) -> bytes | None:
        """The object's bytes; None if there is none."""

    def put_new(self, key: str, data: bytes) -> bool:
        """Write a whole object unless one exists; False if one did."""

    def sizes(self, prefix: str) -> dict[str, int]:
        """Size in bytes of every object whose key starts with `prefix`, from one listing."""

    def check_place(self) -> None:
        """Raise if the place itself (bucket, access) cannot serve; writes nothing."""


def open_objects(url: str, endpoint_url: str | None = None) -> Objects:
    """Objects under a local path, file:// or s3:// URL."""
    scheme, place = _parsed(url)
    if scheme == "s3":
        return S3Objects(place, endpoint_url)
    if scheme == "file":
        return LocalObjects(Path(place))
    raise SettingsError(f"{url} cannot be written to; give a local path or an s3:// URL")


def object_at(place: str, endpoint_url: str | None) -> tuple[Objects, str]:
    """The folder of an object and its name there."""
    folder, _, name = place.rstrip("/").rpartition("/")
    if not name or (place.startswith("s3://") and folder in ("s3:/", "s3:")):
        raise SettingsError(f"{place} names no object")
    return open_objects(folder or ("/" if place.startswith("/") else str(Path.cwd())), endpoint_url), name


def open_store(url: str, endpoint_url: str | None = None) -> Store:
    """A read-only zarr store under a local path, file://, s3:// or http(s):// URL."""
    scheme, place = _parsed(url)
    if scheme == "s3":
        return FsspecStore.from_url(
            f"s3://{place}", storage_options=_s3_options(endpoint_url, asynchronous=True), read_only=True
        )
    if scheme in ("http", "https"):
        return FsspecStore.from_url(url.rstrip("/"), read_only=True)
    return LocalStore(place, read_only=True)


def local_path(url: str) -> Path | None:
    """The path that a local path or file:// URL names; None for other URLs."""
    scheme, place = _parsed(url)
    return Path(place) if scheme == "file" else None


def open_file(url: str, endpoint_url: str | None = None) -> BinaryIO:
    """A file under a local path, file://, s3:// or http(s):// URL, read where it is asked for."""
    scheme, place = _parsed(url)
    if scheme == "file":
        return Path(place).open("rb")
    if scheme == "s3":
        file = s3fs.S3FileSystem(**_s3_options(endpoint_url, asynchronous=False)).open(place, "rb")
    else:
        file = fsspec.open(url, "rb").open()
    return cast(BinaryIO, file)


def open_writable_store(url: str, endpoint_url: str | None = None) -> Store:
    """A zarr store to write to, under a local path, file:// or s3:// URL."""
    scheme, place = _parsed(url)
    if scheme == "s3":
        return FsspecStore.from_url(
            f"s3://{place}", storage_options=_s3_options(endpoint_url, asynchronous=True)
        )
    if scheme == "file":
        return LocalStore(place)
    raise SettingsError(f"{url} cannot be written to; give a local path or an s3:// URL")


class LocalObjects:
    """Objects as files under a folder, which the first write makes."""

    def __init__(self, root: Path) -> None:
        self.url = str(root)
        self._root = root

    def get(self, key: str) -> bytes | None:
        with translated(self.url):
            try:
                return (self._root / key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def put_new(self, key: str, data: bytes) -> bool:
        path = self._root / key
        with translated(self.url):
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            try:
                with draft.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                try:
                    # A link fails where a rename would replace: the first writer wins.
                    os.link(draft, path)
                except FileExistsError:
                    return False
            finally:
                draft.unlink(missing_ok=True)
            _sync_folder(path.parent)
            return True

    def sizes(self, prefix: str) -> dict[str, int]:
        with translated(self.url):
            start = self._root / prefix
            return {
                path.relative_to(self._root).as_posix(): path.stat().st_size
                for path in start.rglob("*")
                if path.is_file() and not path.name.startswith(".")
            }

    def check_place(self) -> None:
        if self._root.exists() and not self._root.is_dir():
            raise StorageError(f"{self.url} is a file, not a folder")


class S3Objects:
    """Objects under a prefix of an S3 bucket."""

    def __init__(self, place: str, endpoint_url: str | None) -> None:
        self.url = f"s3://{place}"
        self._place = place
        self._options = _s3_options(endpoint_url, asynchronous=False)

    @cached_property
    def _files(self) -> Any:
        return s3fs.S3FileSystem(**self._options)

    def get(self, key: str) -> bytes | None:
        with translated(self.url):
            try:
                return bytes(self._files.cat_file(f"{self._place}/{key}"))
            except FileNotFoundError:
                return None

    def put_new(self, key: str, data: bytes) -> bool:
        with translated(self.url):
            try:
                self._files.pipe_file(f"{self._place}/{key}", data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                # s3fs gives a lost race (412 PreconditionFailed) no type of its own.
                if error.errno == 22 and self._files.exists(f"{self._place}/{key}"):
                    return False
                raise
            return True

    def sizes(self, prefix: str) -> dict[str, int]:
        with translated(self.url):
            self._files.invalidate_cache()
            found = self._files.find(f"{self._place}/{prefix}".rstrip("/"), detail=True)
            return {
                path.removeprefix(self._place + "/"): int(entry["size"])
                for path, entry in found.items()
                if entry["type"] == "file"
            }

    def check_place(self) -> None:
        bucket = self._place.split("/", 1)[0]
        with translated(self.url):
            try:
                self._files.call_s3("head_bucket", Bucket=bucket)
            except FileNotFoundError:
                raise StorageError(f"bucket {bucket} does not exist; create it first") from None


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn what storage libraries raise into one of ours, in one line."""
    try:
        yield
    except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError):
        raise CredentialsError(
            f"no credentials for {url}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
        ) from None
    except PermissionError as error:
        raise CredentialsError(f"access to {url} was refused: {_one_line(error)}") from None
    except botocore.exceptions.BotoCoreError as error:
        raise StorageError(f"{url} does not answer: {_one_line(error)}") from None
    except OSError as error:
        raise StorageError(f"{url} cannot be used: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _parsed(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    if parts.scheme in ("s3", "file"):
        place = (parts.netloc + parts.path).rstrip("/")
        if not place.strip("/"):
            raise SettingsError(f"{url} names no place")
        return parts.scheme, place
    if parts.scheme in ("http", "https"):
        return parts.scheme, url
    if parts.scheme == "":
        return "file", str(Path(url))
    raise SettingsError(
        f"{url}: storage of kind {parts.scheme}:// is not served; local paths, s3:// and http(s):// are"
    )


def _s3_options(endpoint_url: str | None, *, asynchronous: bool) -> dict[str, Any]:
    # With more than one part at a time s3fs asks for an object's size, and lists its folder where there is
    # none, before it asks for the object.
    options: dict[str, Any] = {
        "asynchronous": asynchronous,
        "use_listings_cache": False,
        "max_concurrency": 1,
    }
    if endpoint_url is not None:
        options["endpoint_url"] = endpoint_url
    return options


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
