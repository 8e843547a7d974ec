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

MAGIC = b"UC"
VERSION = 5
HEADER = 12
"""Bytes before the body: magic, version, kind and flags, CRC-32C, digest of the stream."""

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
    stream_digest
        First four bytes of the digest of the stream tables it was coded with.
    origin
        The chunk's index in the grid (z, y, x), if it was written into a known place.
    mask
        Packed mask of fill voxels; empty if there are none.
    body
        `NeuralBody`; `BoundedBody`; the one value's little-endian bytes (constant); a zstd frame (raw).
    """

    kind: Kind
    stream_digest: bytes
    origin: Shape3 | None
    mask: bytes
    body: Body


def write_chunk(chunk: Chunk) -> bytes:
    """Serialise a chunk with its checksum."""
    flags = int(chunk.kind)
    parts = []
    if chunk.origin is not None:
        flags |= HAS_ORIGIN
        parts += [_varint(n) for n in chunk.origin]
    if chunk.mask:
        flags |= HAS_MASK
        parts += [_varint(len(chunk.mask)), chunk.mask]
    if isinstance(chunk.body, NeuralBody):
        parts += [
            bytes([chunk.body.quality, chunk.body.passes]),
            _symbols(chunk.body.words, chunk.body.escapes),
        ]
    elif isinstance(chunk.body, BoundedBody):
        coarse, residual = chunk.body.coarse, chunk.body.residual
        parts += [bytes([coarse.quality, coarse.passes]), _sized(_symbols(coarse.words, coarse.escapes))]
        parts += [struct.pack("<dB", residual.max_error, residual.shift), _sized(residual.tables)]
        parts += [_sized(residual.low), _symbols(residual.words, residual.escapes)]
    else:
        parts.append(chunk.body)
    head = MAGIC + bytes([VERSION, flags])
    tail = chunk.stream_digest[:4] + b"".join(parts)
    return head + _checksum(head, tail) + tail


def read_chunk(data: bytes) -> Chunk:
    """Parse and check a chunk.

    Raises
    ------
    ChunkError
        If the bytes are no chunk, of a newer version, cut, or have flipped bits.
    """
    if len(data) < HEADER or data[:2] != MAGIC:
        raise ChunkError(f"{len(data)} bytes that do not start with a chunk's header")
    if data[2] != VERSION:
        raise ChunkError(f"a chunk of format version {data[2]}; this ucray reads version {VERSION}")
    head, stored, tail = data[:4], data[4:8], data[8:]
    if _checksum(head, tail) != stored:
        raise ChunkError("a chunk whose checksum does not match: its bytes are cut or changed")
    try:
        kind = Kind(data[3] & 0x07)
    except ValueError:
        raise ChunkError(f"a chunk of unknown kind {data[3] & 0x07}") from None
    if data[3] & ~(0x07 | HAS_ORIGIN | HAS_MASK):
        raise ChunkError("a chunk with flags of a later version")
    reader = _Reader(tail, 4)
    origin = (reader.varint(), reader.varint(), reader.varint()) if data[3] & HAS_ORIGIN else None
    mask = reader.take(reader.varint()) if data[3] & HAS_MASK else b""
    body: Body
    if kind is Kind.NEURAL:
        quality, passes = reader.take(2)
        body = NeuralBody(quality, passes, *reader.symbols())
    elif kind is Kind.BOUNDED:
        quality, passes = reader.take(2)
        coarse = NeuralBody(quality, passes, *_Reader(reader.take(reader.varint()), 0).symbols())
        max_error, shift = struct.unpack("<dB", reader.take(9))
        tables, low = reader.take(reader.varint()), reader.take(reader.varint())
        body = BoundedBody(coarse, ResidualBody(max_error, shift, tables, low, *reader.symbols()))
    else:
        body = reader.rest()
    return Chunk(kind, tail[:4], origin, mask, body)


def _symbols(words: npt.NDArray[np.uint32], escapes: npt.NDArray[np.int32]) -> bytes:
    """Number of escapes, escapes, words to the end."""
    escaped = b"".join(_varint(_zigzag(int(symbol))) for symbol in escapes)
    return _varint(len(escapes)) + escaped + words.astype("<u4").tobytes()


def _sized(data: bytes) -> bytes:
    return _varint(len(data)) + data


def _checksum(head: bytes, tail: bytes) -> bytes:
    return int(google_crc32c.extend(google_crc32c.value(head), tail)).to_bytes(4, "little")


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

    def symbols(self) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int32]]:
        """Words and escapes of what is left."""
        count = self.varint()
        if count > len(self._data):
            raise ChunkError("a chunk whose lengths do not fit its bytes")
        escapes = np.array([_unzigzag(self.varint()) for _ in range(count)], dtype=np.int32)
        rest = self.rest()
        if len(rest) % 4:
            raise ChunkError("a chunk whose lengths do not fit its bytes")
        return np.frombuffer(rest, dtype="<u4").astype(np.uint32), escapes

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._place)
