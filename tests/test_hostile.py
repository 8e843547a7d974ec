"""Bytes from a stranger: refused by name, in bounded time and memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import fuzz
import numpy as np
import pytest

import ucray
from ucray.codec.decoder import ChunkDecoder
from ucray.codec.weights import Weights
from ucray.errors import ChunkError, UcrayError, WeightsError

RUNS = {"chunk": 3000, "weights": 1500, "configuration": 1500}
LONGEST = 10.0
"""Seconds after which an input counts as one that hangs; they take milliseconds."""

MEMORY = 80
"""Bytes that decoding a chunk takes at most for each of its voxels, counted by tracemalloc."""


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_mutated_bytes_are_decoded_or_refused_by_name(name: str) -> None:
    target, seeds = fuzz.TARGETS[name]
    random = np.random.default_rng(20)
    known = seeds()
    for seed in known:
        target(seed)
    slowest = 0.0
    for run in range(RUNS[name]):
        data = fuzz.mutated(known[run % len(known)], random)
        started = time.perf_counter()
        target(data)
        slowest = max(slowest, time.perf_counter() - started)
    assert slowest < LONGEST


def test_hostile_chunks_take_no_more_memory_than_others() -> None:
    random = np.random.default_rng(21)
    seeds = [fuzz.unforged(chunk) for chunk in fuzz.chunks().values()]
    for seed in seeds:
        fuzz.decode_chunk(seed)
    tracemalloc.start()
    try:
        for run in range(300):
            fuzz.decode_chunk(fuzz.mutated(seeds[run % len(seeds)], random))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEMORY * fuzz.FORMAT.voxels


@pytest.mark.parametrize("name", fuzz.CHUNKS)
def test_every_flipped_bit_of_a_whole_chunk_is_found(name: str) -> None:
    data = fuzz.chunks()[name]
    decoder = ChunkDecoder(fuzz.weights().decoder(), fuzz.FORMAT)
    # A raw chunk of noise has a quarter of a million bits: every 31st, so that all places in a byte come up.
    for bit in range(0, 8 * len(data), 1 if len(data) < 4000 else 31):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ChunkError):
            decoder.decode(bytes(flipped))


def test_a_megabyte_of_nesting_is_refused_early() -> None:
    stored = ucray.zarr_codec.UcrayCodec(fuzz.weights(), 0.0, 1.0, 100).to_dict()
    nested: Any = []
    for _ in range(900):
        nested = [nested]
    for name in stored["configuration"]:
        with pytest.raises(UcrayError):
            ucray.zarr_codec.UcrayCodec.from_dict(
                {**stored, "configuration": {**stored["configuration"], name: nested}}
            )
    header = json.dumps({"__metadata__": {"x": "[" * 1_000_000}}).encode()
    with pytest.raises(WeightsError):
        Weights.from_bytes(len(header).to_bytes(8, "little") + header)
