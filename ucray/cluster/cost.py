"""What compressing a volume and keeping what comes of it costs. Arithmetic alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ucray.settings import Settings

PRICES_AS_OF = "June 2026"
"""When the default prices were those of AWS us-east-1, on demand."""

Price = Annotated[float, Field(ge=0.0, le=1e6)]


class Prices(Settings):
    """US dollars, by default the list prices of PRICES_AS_OF.

    A GB (1e9 bytes) for a month and a thousand requests of S3 Standard; an hour of a core (half an m7g.large)
    and of a GPU with the cores beside it (g5.xlarge). Traffic within the region is free there.
    """

    gb_month: Price = 0.023
    thousand_puts: Price = 0.005
    thousand_gets: Price = 0.0004
    core_hour: Price = 0.0408
    gpu_hour: Price = 1.006


@dataclass(frozen=True)
class Way:
    """One way to keep a volume.

    `bytes` are what it takes, `once` what it costs to get there, `monthly` what it costs to stay, in US
    dollars; `psnr` is in dB, infinite where nothing is lost.
    """

    name: str
    bytes: int
    psnr: float
    once: float
    monthly: float

    def total(self, months: float) -> float:
        """Dollars that this way costs over so many months."""
        return self.once + months * self.monthly


def way(
    name: str, size: float, psnr: float, prices: Prices, *, compute: float = 0.0, puts: int = 0, gets: int = 0
) -> Way:
    """A way to keep a volume in `size` bytes, reached by `compute` dollars and by requests."""
    requests = (puts * prices.thousand_puts + gets * prices.thousand_gets) / 1000.0
    return Way(name, round(size), psnr, compute + requests, size / 1e9 * prices.gb_month)


def break_even(chosen: Way, other: Way) -> float | None:
    """Months from which `chosen` has cost less than `other`: zero if from the start, None if never."""
    saved = other.monthly - chosen.monthly
    dearer = chosen.once - other.once
    if dearer <= 0.0:
        return 0.0 if saved >= 0.0 else None
    return dearer / saved if saved > 0.0 else None


def cheapest(ways: Sequence[Way], months: float) -> Way:
    """The way that costs least over so many months; the first of equals."""
    return min(ways, key=lambda one: one.total(months))


METADATA_READS = 9
"""GET requests that find and open source and archive; more where an array does not say its voxels' size."""


def requests(shards: int, source_reads: float) -> tuple[int, int]:
    """PUT and GET requests of a job of so many shards, whose source is asked `source_reads` times.

    A shard is put with its statistics, and looked for before it is coded. Beside them the metadata of group
    and array are put.
    """
    return 2 * shards + 2, shards + math.ceil(source_reads) + METADATA_READS
