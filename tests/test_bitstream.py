"""The bytes of a coded chunk: golden examples, exact round trips, no damage that goes unnoticed."""

from __future__ import annotations

import dataclasses

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ucray.codec.bitstream import (
    HEADER,
    VERSION,
    VERSION_SHIFT,
    BoundedBody,
    Chunk,
    Kind,
    NeuralBody,
    ResidualBody,
    read_chunk,
    write_chunk,
)
from ucray.errors import ChunkError

# Symbols are int16 before they are escapes.
escape_arrays = arrays(np.int32, st.integers(0, 20), elements=st.integers(-32768, 32767))
word_arrays = arrays(np.uint32, st.integers(0, 20))
neural_bodies = st.builds(NeuralBody, st.integers(0, 255), st.integers(0, 127), word_arrays, escape_arrays)
places = st.integers(0, 2**31 - 1)
origins = st.none() | st.tuples(places, places, places)
digests = st.binary(min_size=32, max_size=32)
masks = st.binary(max_size=300)

DIGEST = bytes(range(32))
NEURAL = Chunk(
    Kind.NEURAL,
    (1, 300, 70000),
    bytes.fromhex("0128b52ffd"),
    NeuralBody(200, 10, np.array([0xDEADBEEF, 1], np.uint32), np.array([-1, 0, 400, -32767], np.int32)),
)
BOUNDED = Chunk(
    Kind.BOUNDED,
    (0, 0, 9),
    b"",
    BoundedBody(
        NeuralBody(255, 7, np.array([5], np.uint32), np.array([], np.int32)),
        ResidualBody(
            1.0, 2, b"\x28\xb5", b"\x1b", np.array([0xCAFE, 7], np.uint32), np.array([-300], np.int32)
        ),
    ),
)
CONSTANT = Chunk(Kind.CONSTANT, (0, 2, 3), bytes.fromhex("0028b5"), bytes.fromhex("7f01"))
RAW = Chunk(Kind.RAW, (4, 5, 6), bytes.fromhex("00ff"), bytes.fromhex("28b52ffd2000"))

GOLDEN = {
    "neural": (
        NEURAL,
        "5538c186331c01ac02f0a204050128b52ffdc88a040100a006fdff03efbeadde01",
    ),
    "bounded": (
        BOUNDED,
        "552b23f2970e000009ff070105000000000000f03f020228b5011b01d704feca000007",
    ),
    "constant": (CONSTANT, "553958e6fd57000203030028b57f01"),
    "raw": (RAW, "553a3a4522940405060200ff28b52ffd2000"),
    "no origin, no mask": (Chunk(Kind.CONSTANT, None, b"", b"\x07"), "5521ae1d4e2707"),
}


def assert_equal(first: Chunk, second: Chunk) -> None:
    """Compare field by field; arrays have no truth of their own."""
    assert (first.kind, first.origin, first.mask) == (second.kind, second.origin, second.mask)
    assert_equal_bodies(first.body, second.body)


def assert_equal_bodies(first: object, second: object) -> None:
    """Dataclasses, arrays within them, or plain values."""
    assert type(first) is type(second)
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        assert first.dtype == second.dtype
        np.testing.assert_array_equal(first, second)
    elif isinstance(first, (NeuralBody, ResidualBody, BoundedBody)):
        for field in dataclasses.fields(first):
            assert_equal_bodies(getattr(first, field.name), getattr(second, field.name))
    else:
        assert first == second


def forged(version: int, flags: int, tail: bytes) -> bytes:
    """Bytes with a right checksum whatever stands behind it."""
    head = b"U" + bytes([version << VERSION_SHIFT | flags])
    return head + int(google_crc32c.value(DIGEST + head + tail)).to_bytes(4, "little") + tail


@pytest.mark.parametrize(("chunk", "golden"), GOLDEN.values(), ids=GOLDEN.keys())
def test_golden_bytes(chunk: Chunk, golden: str) -> None:
    """Version 1 for ever: these bytes must be written, and must be read, by every later ucray."""
    assert write_chunk(chunk, DIGEST).hex() == golden
    assert_equal(read_chunk(bytes.fromhex(golden), DIGEST), chunk)


@given(digests, origins, masks, neural_bodies)
def test_round_trip_of_neural_chunks(
    digest: bytes, origin: tuple[int, int, int] | None, mask: bytes, body: NeuralBody
) -> None:
    chunk = Chunk(Kind.NEURAL, origin, mask, body)
    assert_equal(read_chunk(write_chunk(chunk, DIGEST), DIGEST), chunk)


@given(
    neural_bodies,
    st.floats(0, 1e30),
    st.integers(0, 255),
    st.binary(max_size=50),
    st.binary(max_size=50),
    word_arrays,
    escape_arrays,
)
def test_round_trip_of_bounded_chunks(
    coarse: NeuralBody,
    bound: float,
    shift: int,
    tables: bytes,
    low: bytes,
    words: npt.NDArray[np.uint32],
    escapes: npt.NDArray[np.int32],
) -> None:
    body = BoundedBody(coarse, ResidualBody(bound, shift, tables, low, words, escapes))
    chunk = Chunk(Kind.BOUNDED, (1, 2, 3), b"", body)
    assert_equal(read_chunk(write_chunk(chunk, DIGEST), DIGEST), chunk)


@given(st.sampled_from([Kind.CONSTANT, Kind.RAW]), digests, origins, masks, st.binary(max_size=100))
def test_round_trip_of_other_chunks(
    kind: Kind, digest: bytes, origin: tuple[int, int, int] | None, mask: bytes, body: bytes
) -> None:
    chunk = Chunk(kind, origin, mask, body)
    assert_equal(read_chunk(write_chunk(chunk, DIGEST), DIGEST), chunk)


@pytest.mark.parametrize(
    "chunk", [NEURAL, BOUNDED, CONSTANT, RAW], ids=["neural", "bounded", "constant", "raw"]
)
def test_every_flipped_bit_is_found(chunk: Chunk) -> None:
    data = write_chunk(chunk, DIGEST)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ChunkError):
            read_chunk(bytes(flipped), DIGEST)


@pytest.mark.parametrize(
    "chunk", [NEURAL, BOUNDED, CONSTANT, RAW], ids=["neural", "bounded", "constant", "raw"]
)
def test_every_cut_and_added_byte_is_found(chunk: Chunk) -> None:
    data = write_chunk(chunk, DIGEST)
    for damaged in [data[:count] for count in range(len(data))] + [data + b"\0", b"\0" + data]:
        with pytest.raises(ChunkError):
            read_chunk(damaged, DIGEST)


@given(st.binary(max_size=60))
def test_foreign_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ChunkError):
        read_chunk(data, DIGEST)


def test_a_later_version_is_named() -> None:
    with pytest.raises(ChunkError, match="version 2; this ucray reads version 1"):
        read_chunk(forged(VERSION + 1, 0, b"\0\0"), DIGEST)


@pytest.mark.parametrize(
    ("flags", "tail", "message"),
    [
        (5, b"", "unknown kind 5"),
        (7, b"", "unknown kind 7"),
        (0x08 | Kind.CONSTANT, b"\x01\x01", "lengths"),
        (0x08 | Kind.CONSTANT, b"\xff\xff\xff\xff\xff\x01", "does not end"),
        (0x10 | Kind.CONSTANT, b"\x05abcd", "lengths"),
        (0x10 | Kind.CONSTANT, b"\xff\xff\xff\xff\x07", "lengths"),
        (0x10 | Kind.CONSTANT, b"\x80\x80\x80\x80\x08", "too large"),
        (Kind.NEURAL, b"", "lengths"),
        (Kind.NEURAL, b"\x07\x81", "lengths"),
        (Kind.NEURAL, b"\x07\x81\x02\x01", "lengths"),
        (Kind.NEURAL, b"\x07\x81\xff\xff\xff\xff\x07", "lengths"),
        (Kind.BOUNDED, b"\x07\x01", "lengths"),
        (Kind.BOUNDED, b"\x07\x01\x05\x00", "lengths"),
        (Kind.BOUNDED, b"\x07\x01\x01\x00" + b"\0" * 8, "lengths"),
        (Kind.BOUNDED, b"\x07\x01\x01\x00" + b"\0" * 9 + b"\x01", "lengths"),
        (Kind.BOUNDED, b"\x07\x01\x01\x00" + b"\0" * 9 + b"\x00\x00\x01", "lengths"),
    ],
)
def test_lengths_that_do_not_fit_are_refused_behind_a_right_checksum(
    flags: int, tail: bytes, message: str
) -> None:
    with pytest.raises(ChunkError, match=message):
        read_chunk(forged(VERSION, flags, tail), DIGEST)


def test_a_chunk_that_ends_with_its_header_has_no_body() -> None:
    data = forged(VERSION, Kind.RAW, b"")
    assert len(data) == HEADER
    assert read_chunk(data, DIGEST).body == b""
