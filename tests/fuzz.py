"""Hostile bytes: what is decoded from them, and how they are made.

As a script this is a coverage-guided fuzzer: ``make fuzz`` (needs atheris). The targets are those of
test_hostile.py, which runs them on a few thousand mutated inputs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt
from conftest import (
    TINY,
    TINY_CELLS,
    TINY_DEPENDENT,
    TINY_FILTERED,
    TINY_INTERLACED,
    TINY_LONG_PATHS,
    build_weights,
    smooth_volume_of,
)
from numpy.random import Generator

from ucray.codec.bitstream import HEADER, MAGIC, VERSION, VERSION_SHIFT
from ucray.codec.chunk import ChunkFormat
from ucray.codec.decoder import ChunkDecoder
from ucray.codec.encoder import ChunkEncoder
from ucray.codec.weights import Weights
from ucray.errors import ChunkError, UcrayError, WeightsError
from ucray.zarr_codec import UcrayCodec

FORMAT = ChunkFormat((32, 32, 32), "uint8", 0.0, 128.0, 30.0)

INTERESTING = (0x00, 0x01, 0x7F, 0x80, 0xFF)


CONFIGS = {
    1: TINY, 2: TINY_FILTERED, 3: TINY_DEPENDENT, 4: TINY_INTERLACED, 5: TINY_LONG_PATHS, 6: TINY_CELLS
}  # fmt: skip
"""By the version of their weights."""

PARSED = (1, 3, 4, 5)
"""Versions whose streams are parsed in ways of their own."""


@cache
def weights(version: int = 5) -> Weights:
    """The weights that hostile chunks pretend to be coded with."""
    return build_weights(CONFIGS[version], seed=1)


@cache
def _decoders(version: int) -> dict[str, ChunkDecoder]:
    return {
        "neural": ChunkDecoder(weights(version).decoder(), FORMAT),
        "bounded": ChunkDecoder(weights(version).decoder(bounded=True), FORMAT),
    }


CHUNKS = ("tissue", "padded", "speckled", "flat", "noise", "bounded", "bounded padded")


@cache
def chunks(version: int = 5) -> dict[str, bytes]:
    """Whole chunks of every kind, CHUNKS, as seeds."""
    tissue = np.clip(smooth_volume_of((32, 32, 32), 3) * 30 + 128, 1, 255).astype(np.uint8)
    padded = tissue.copy()
    padded[:, :, 20:] = 0
    speckled = np.where(np.random.default_rng(0).random(tissue.shape) < 0.1, 0, tissue).astype(np.uint8)
    flat = np.where(padded > 0, 7, 0).astype(np.uint8)
    noise = np.random.default_rng(1).integers(0, 255, tissue.shape, dtype=np.uint8)
    plain = ChunkEncoder(weights(version), FORMAT)
    bounded = ChunkEncoder(weights(version), FORMAT, max_error=2.0)
    drawn = [plain.encode(voxels, 200, (1, 2, 3)) for voxels in (tissue, padded, speckled, flat, noise)]
    drawn += [bounded.encode(voxels, 100) for voxels in (tissue, padded)]
    return {name: packed.data for name, packed in zip(CHUNKS, drawn, strict=True)}


def forged(data: bytes, version: int) -> bytes:
    """A chunk whose checksum, version and digest are right, whatever the flags and the rest say."""
    flags = data[0] & ((1 << VERSION_SHIFT) - 1) if data else 0
    head, tail = MAGIC + bytes([VERSION << VERSION_SHIFT | flags]), data[1:]
    checked = bytes.fromhex(weights(version).stream_digest) + head + tail
    return head + int(google_crc32c.value(checked)).to_bytes(4, "little") + tail


def unforged(chunk: bytes) -> bytes:
    """What `forged` makes a chunk of."""
    return chunk[1:2] + chunk[HEADER:]


def decode_chunk(data: bytes) -> None:
    """A forged chunk becomes voxels of the right shape, or is refused by name."""
    for version in PARSED:
        chunk = forged(data, version)
        for name, decoder in _decoders(version).items():
            try:
                voxels = decoder.decode(chunk)
            except ChunkError:
                continue
            except WeightsError:
                # An archive of bounded chunks has no student, and the other way round.
                assert chunk[1] & 0x07 in (0, 3), name
                continue
            assert voxels.shape == FORMAT.shape
            assert voxels.dtype == np.uint8


def load_weights(data: bytes) -> None:
    """Bytes are weights that decode or refuse chunks, or no weights."""
    try:
        decoder = ChunkDecoder(Weights.from_bytes(data), FORMAT)
    except UcrayError:
        return
    for version in CONFIGS:
        try:
            decoder.decode(chunks(version)["tissue"])
        except UcrayError:
            continue


def load_configuration(data: bytes) -> None:
    """JSON in an archive's metadata is a codec, or refused by name."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return
    try:
        UcrayCodec.from_dict(document)
    except UcrayError:
        return


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], tuple[bytes, ...]]]] = {
    "chunk": (
        decode_chunk,
        lambda: tuple(unforged(chunk) for version in PARSED for chunk in chunks(version).values()),
    ),
    "weights": (load_weights, lambda: tuple(weights(version).decoder().to_bytes() for version in CONFIGS)),
    "configuration": (
        load_configuration,
        lambda: (json.dumps(UcrayCodec(weights(), 128.0, 30.0, 100).to_dict()).encode(),),
    ),
}
"""Each with its seeds."""


def mutated(data: bytes, random: Generator) -> bytes:
    """One to eight changes: bits, bytes, cut out, put in, doubled, cut off."""
    found = bytearray(data)
    for _ in range(int(random.integers(1, 9))):
        place, length = int(random.integers(len(found) + 1)), int(random.integers(1, 17))
        match int(random.integers(6)):
            case 0 if place < len(found):
                found[place] ^= 1 << int(random.integers(8))
            case 1 if place < len(found):
                found[place] = INTERESTING[int(random.integers(len(INTERESTING)))]
            case 2:
                del found[place : place + length]
            case 3:
                found[place:place] = _some(random, length)
            case 4:
                found[place:place] = found[place : place + length]
            case 5 if random.random() < 0.2:
                del found[place:]
    return bytes(found)


def _some(random: Generator, length: int) -> bytes:
    values: npt.NDArray[np.uint8] = random.integers(0, 256, length, dtype=np.uint8)
    return values.tobytes()


def main() -> None:
    """fuzz.py TARGET CORPUS [libFuzzer's options]."""
    import atheris

    name, corpus, *options = sys.argv[1:]
    target, seeds = TARGETS[name]
    folder = Path(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (folder / f"seed-{number}").write_bytes(seed)
    atheris.instrument_all()
    atheris.Setup([sys.argv[0], corpus, *options], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
