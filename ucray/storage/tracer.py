"""A tracer as an object: where it is, and which it was when a job was planned."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from ucray.errors import WeightsError
from ucray.storage.objects import object_at


@dataclass(frozen=True)
class StoredTracer:
    """A tracer that lies at `url`; `digest` is the SHA-256 of its file."""

    url: str
    endpoint_url: str | None
    digest: str

    @classmethod
    def open(cls, url: str, endpoint_url: str | None) -> StoredTracer:
        """The tracer at a path or an s3:// URL; raises WeightsError if there is none, or it is damaged."""
        # Whoever plans a job without a tracer, or reads a source, does not wait for torch.
        from ucray.codec.tracer import TracerNetwork

        data = _read(url, endpoint_url)
        TracerNetwork.from_bytes(data)
        return cls(url, endpoint_url, hashlib.sha256(data).hexdigest())

    def read(self) -> bytes:
        """The bytes of its file; raises WeightsError if they are no longer the same."""
        data = _read(self.url, self.endpoint_url)
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise WeightsError(f"the tracer at {self.url} has changed since the job was planned")
        return data


def _read(url: str, endpoint_url: str | None) -> bytes:
    folder, name = object_at(url, endpoint_url)
    data = folder.get(name)
    if data is None:
        raise WeightsError(f"there is no tracer at {url}; `ucray tracer` makes one")
    return data
