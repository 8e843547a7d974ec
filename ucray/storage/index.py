"""Where a shard lies in an archive, and by its index its chunks, in the layout of zarr's sharding_indexed."""

from __future__ import annotations

import google_crc32c
import numpy as np
import numpy.typing as npt

from ucray.errors import ArchiveError
from ucray.grid import Shape3

ARRAY = "0"

ABSENT = np.uint64(2**64 - 1)
"""Offset and length of a chunk that a shard does not hold: nothing but fill."""

_ENTRY, _CHECKSUM = 16, 4
"""Bytes of a chunk's offset and length, and of what they are checked by."""


def shard_key(index: Shape3) -> str:
    """Key of a shard's object in the archive."""
    return "/".join([ARRAY, "c", *map(str, index)])


def empty_table(slots: int) -> npt.NDArray[np.uint64]:
    """Offset and length of each chunk of a shard (slots, 2) that holds none yet."""
    return np.full((slots, 2), ABSENT, dtype="<u8")


def index_size(slots: int) -> int:
    """Bytes at the end of a shard that are its index."""
    return slots * _ENTRY + _CHECKSUM


def pack_index(table: npt.NDArray[np.uint64]) -> bytes:
    """Offsets and lengths (slots, 2) as little-endian uint64, then their CRC-32C."""
    entries = table.astype("<u8").tobytes()
    return entries + _checksum(entries)


def chunk_spans(index: bytes, end: int) -> dict[int, slice]:
    """Where the chunks of a shard lie, by slot; chunks of nothing but fill are left out.

    Parameters
    ----------
    index
        The last `index_size` bytes of the shard.
    end
        Bytes of the shard before them.

    Raises
    ------
    ArchiveError
        If the index fails its checksum, or points outside of the shard.
    """
    entries = index[:-_CHECKSUM]
    if _checksum(entries) != index[-_CHECKSUM:]:
        raise ArchiveError("a shard whose index does not match its checksum")
    spans = {}
    for slot, (offset, length) in enumerate(np.frombuffer(entries, "<u8").reshape(-1, 2).tolist()):
        if offset == ABSENT and length == ABSENT:
            continue
        if not length or offset + length > end:
            raise ArchiveError(f"a shard whose index points past its end, or to nothing, in slot {slot}")
        spans[slot] = slice(offset, offset + length)
    if sum(span.stop - span.start for span in spans.values()) > end:
        raise ArchiveError("a shard whose index has several chunks in one place")
    return spans


def _checksum(entries: bytes) -> bytes:
    return int(google_crc32c.value(entries)).to_bytes(_CHECKSUM, "little")
