"""How a job reaches what it reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

from ucray.storage.volume import Volume, open_volume


@dataclass(frozen=True)
class Connection:
    """How sources and destinations are reached: S3 endpoint, array in a source, places on other axes."""

    endpoint_url: str | None = None
    array: str | None = None
    select: str | None = None

    def open(self, source: str) -> Volume:
        """The volume at `source`, as `open_volume` says."""
        return open_volume(source, self.array, self.endpoint_url, self.select)
