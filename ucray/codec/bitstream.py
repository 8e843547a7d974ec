"""The bytes of one coded chunk; FORMAT.md beside this file is their law. Imports no torch."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

import google_crc32c
import numpy as np
import numpy.typing as npt

from ucray.errors import ChunkError
from ucray.grid import Shape3

MAGIC = b"U"
VERSION = 1
HEADER = 6
"""Bytes before the body: magic; version, kind and flags; CRC-32C."""

VERSION_SHIFT = 5
"""Of the version in the byte that it shares with kind and flags."""

HAS_ESCAPES = 0x80
"""In a neural body's byte of passes."""

LARGEST_VARINT = (1 << 31) - 1

HAS_ORIGIN = 0x08
HAS_MASK = 0x10


class Kind(enum.IntEnum):
    """How a chunk is coded."""

    NEURAL = 0
    CONSTANT = 1
    RAW = 2
    BOUNDED = 3


@dataclass(frozen=True)
class NeuralBody:
    """Quality (0 to 255), passes that are coded, words of the entropy coder, symbols that no table holds."""

    quality: int
    passes: int
    words: npt.NDArray[np.uint32]
    escapes: npt.NDArray[np.int32]


@dataclass(frozen=True)
class ResidualBody:
    """Bound on the error, low bits left uncoded, packed tables, the low bits, words, escapes."""

    max_error: float
    shift: int
    tables: bytes
    low: bytes
    words: npt.NDArray[np.uint32]
    escapes: npt.NDArray[np.int32]


@dataclass(frozen=True)
class BoundedBody:
    """A coarse form and what is left of the voxels."""

    coarse: NeuralBody
    residual: ResidualBody


Body = NeuralBody | BoundedBody | bytes


@dataclass(frozen=True)
class Chunk:
    """A parsed chunk.

    Parameters
    ----------
    origin
        The chunk's index in the grid (z, y, x), if it was written into a known place.
    mask
        Packed mask of fill voxels; empty if there are none.
    body
        `NeuralBody`; `BoundedBody`; the one value's little-endian bytes (constant); a zstd frame (raw).
    """

    kind: Kind
    origin: Shape3 | None
    mask: bytes
    body: Body


def write_chunk(chunk: Chunk, stream_digest: bytes) -> bytes:
    """Serialise a chunk, with a checksum over it and the digest of the stream tables it was coded with."""
    flags = VERSION << VERSION_SHIFT | int(chunk.kind)
    parts = []
    if chunk.origin is not None:
        flags |= HAS_ORIGIN
        parts += [_varint(n) for n in chunk.origin]
    if chunk.mask:
        flags |= HAS_MASK
        parts += [_varint(len(chunk.mask)), chunk.mask]
    if isinstance(chunk.body, NeuralBody):
        parts += [*_neural(chunk.body)]
    elif isinstance(chunk.body, BoundedBody):
        coarse, residual = chunk.body.coarse, chunk.body.residual
        settings, symbols = _neural(coarse)
        parts += [settings, _sized(symbols)]
        parts += [struct.pack("<dB", residual.max_error, residual.shift), _sized(residual.tables)]
        parts += [_sized(residual.low), _escapes(residual.escapes) + _words(residual.words)]
    else:
        parts.append(chunk.body)
    head, tail = MAGIC + bytes([flags]), b"".join(parts)
    return head + _checksum(stream_digest, head, tail) + tail


def read_chunk(data: bytes, stream_digest: bytes) -> Chunk:
    """Parse and check a chunk that was coded with the stream tables of a digest.

    Raises
    ------
    ChunkError
        If the bytes are no chunk, of a newer version, cut or changed, or were coded with other tables.
    """
    if len(data) < HEADER or data[:1] != MAGIC:
        raise ChunkError(f"{len(data)} bytes that do not start with a chunk's header")
    flags, version = data[1], data[1] >> VERSION_SHIFT
    if version != VERSION:
        raise ChunkError(f"a chunk of format version {version}; this ucray reads version {VERSION}")
    head, stored, tail = data[:2], data[2:HEADER], data[HEADER:]
    if _checksum(stream_digest, head, tail) != stored:
        raise ChunkError(
            "a chunk whose checksum does not match: its bytes are cut or changed, or it was coded with "
            f"other weights than {stream_digest.hex()[:8]}"
        )
    try:
        kind = Kind(flags & 0x07)
    except ValueError:
        raise ChunkError(f"a chunk of unknown kind {flags & 0x07}") from None
    reader = _Reader(tail, 0)
    origin = (reader.varint(), reader.varint(), reader.varint()) if flags & HAS_ORIGIN else None
    mask = reader.take(reader.varint()) if flags & HAS_MASK else b""
    body: Body
    if kind is Kind.NEURAL:
        quality, passes = reader.take(2)
        body = _read_neural(quality, passes, reader)
    elif kind is Kind.BOUNDED:
        quality, passes = reader.take(2)
        coarse = _read_neural(quality, passes, _Reader(reader.take(reader.varint()), 0))
        max_error, shift = struct.unpack("<dB", reader.take(9))
        tables, low = reader.take(reader.varint()), reader.take(reader.varint())
        escapes = reader.escapes()
        body = BoundedBody(coarse, ResidualBody(max_error, shift, tables, low, reader.words(), escapes))
    else:
        body = reader.rest()
    return Chunk(kind, origin, mask, body)


def _neural(body: NeuralBody) -> tuple[bytes, bytes]:
    """Quality and passes; coded symbols."""
    escaped = len(body.escapes) > 0
    settings = bytes([body.quality, body.passes | HAS_ESCAPES * escaped])
    return settings, (_escapes(body.escapes) if escaped else b"") + _words(body.words)


def _read_neural(quality: int, passes: int, reader: _Reader) -> NeuralBody:
    escapes = reader.escapes() if passes & HAS_ESCAPES else np.empty(0, np.int32)
    return NeuralBody(quality, passes & ~HAS_ESCAPES, reader.words(), escapes)


def _escapes(escapes: npt.NDArray[np.int32]) -> bytes:
    """Number of escapes, escapes."""
    return _varint(len(escapes)) + b"".join(_varint(_zigzag(int(symbol))) for symbol in escapes)


def _words(words: npt.NDArray[np.uint32]) -> bytes:
    """Words without the zero bytes that the last one ends with, three at most."""
    data = words.astype("<u4").tobytes()
    return data[:-3] + data[-3:].rstrip(b"\0")


def _sized(data: bytes) -> bytes:
    return _varint(len(data)) + data


def _checksum(stream_digest: bytes, head: bytes, tail: bytes) -> bytes:
    return int(google_crc32c.extend(google_crc32c.value(stream_digest + head), tail)).to_bytes(4, "little")


def _varint(number: int) -> bytes:
    """LEB128: seven bits a byte, lowest first."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _zigzag(number: int) -> int:
    return number << 1 if number >= 0 else (-number << 1) - 1


def _unzigzag(number: int) -> int:
    return number >> 1 if not number & 1 else -((number + 1) >> 1)


class _Reader:
    def __init__(self, data: bytes, place: int) -> None:
        self._data = data
        self._place = place

    def take(self, count: int) -> bytes:
        taken = self._data[self._place : self._place + count]
        if len(taken) != count:
            raise ChunkError("a chunk whose lengths do not fit its bytes")
        self._place += count
        return taken

    def varint(self) -> int:
        number = 0
        for shift in range(0, 35, 7):
            byte = self.take(1)[0]
            number |= (byte & 0x7F) << shift
            if byte < 0x80 and number <= LARGEST_VARINT:
                return number
        raise ChunkError("a chunk with a number that is too large, or does not end")

    def escapes(self) -> npt.NDArray[np.int32]:
        count = self.varint()
        if count > len(self._data):
            raise ChunkError("a chunk whose lengths do not fit its bytes")
        return np.array([_unzigzag(self.varint()) for _ in range(count)], dtype=np.int32)

    def words(self) -> npt.NDArray[np.uint32]:
        """What is left."""
        rest = self.rest()
        return np.frombuffer(rest + bytes(-len(rest) % 4), dtype="<u4").astype(np.uint32)

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._place)
