"""Golden archives of each version: whatever ucray becomes, these decode to what they did when made.

`tests/golden/make.py` made them, once. Voxels of networks are arithmetic in floats: another machine may round
one of them differently, networks in bfloat16 a little more; FORMAT.md states by how much. The rest is exact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
import torch
import zarr

import ucray
from ucray.codec import postfilter
from ucray.codec.bitstream import BoundedBody, Kind, NeuralBody, read_chunk
from ucray.codec.decoder import ChunkDecoder
from ucray.grid import triple
from ucray.storage.archive import open_archive
from ucray.storage.shard import split

GOLDEN = Path(__file__).parent / "golden"

EXACT = {
    "bounded": 4046131818,
    "lossless": 163987942,
    "dependent-bounded": 3916774136,
    "interlaced-bounded": 490358148,
    "long-paths-bounded": 2878834123,
}
"""CRC-32C of an archive's voxels, row-major."""

LATENTS = {
    "networks": 3303943537,
    "linear": 3066869082,
    "filtered": 3995166416,
    "dependent": 828967988,
    "interlaced": 1942939210,
    "long-paths": 2218008907,
    "cells": 2655888055,
}
"""CRC-32C of all whole latents of an archive, int64, chunk by chunk."""

KINDS = dict.fromkeys(LATENTS, set(Kind) - {Kind.BOUNDED})
KINDS |= dict.fromkeys(EXACT, set(Kind) - {Kind.NEURAL})

LARGEST_DIFFERENCE = 1
"""Of a voxel in float32, in grey levels: one that lay at a half."""

DIFFERENT_SHARE = 1e-3

LARGEST_IN_BF16 = 2
"""Grey levels."""

DIFFERENT_IN_BF16 = 0.1
"""Share of voxels behind a post-filter in bfloat16."""


def place_of(name: str) -> Path:
    """Where an archive stands: names differ between versions."""
    (place,) = GOLDEN.glob(f"v*/{name}")
    return place


def voxels_of(name: str) -> npt.NDArray[np.uint8]:
    """The volume that an archive decoded to when it was made."""
    found: npt.NDArray[np.uint8] = np.load(place_of(name).with_suffix(".npz"))["voxels"]
    return found


def decoded(name: str) -> npt.NDArray[Any]:
    """The volume that an archive decodes to now, through zarr."""
    array: Any = zarr.open_array(f"{place_of(name)}/0", mode="r")
    return np.asarray(array[:])


def chunks_of(name: str) -> list[bytes]:
    """All chunks of an archive, in the order of shards and slots."""
    archive = open_archive(str(place_of(name)), None)
    grid = archive.settings.grid
    shards = [split(archive.shard(index), grid) for index in grid.shard_indices()]
    return [shard[slot] for shard in shards for slot in sorted(shard)]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Any:
    """As many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", sorted(EXACT))
def test_bounded_archives_are_exact(name: str, threads: int) -> None:
    found = decoded(name)
    assert google_crc32c.value(found.tobytes()) == EXACT[name]
    np.testing.assert_array_equal(found, voxels_of(name))


@pytest.mark.parametrize("name", sorted(LATENTS))
def test_latents_are_exact(name: str) -> None:
    archive = open_archive(str(place_of(name)), None)
    weights = archive.codec.weights
    digest = bytes.fromhex(weights.stream_digest)
    grid = triple(n // s for n, s in zip(archive.settings.chunk, weights.config.stride, strict=True))
    checksum = 0
    for data in chunks_of(name):
        body = read_chunk(data, digest).body
        if isinstance(body, NeuralBody):
            coded = weights.stream.decode(body.words, body.escapes, grid, body.quality, body.passes)
            checksum = google_crc32c.extend(checksum, coded.latents.astype("<i8").tobytes())
    assert checksum == LATENTS[name]


@pytest.mark.parametrize("name", sorted(LATENTS))
def test_voxels_of_networks_are_the_same_but_for_rounding(
    name: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postfilter, "fast_in_bfloat16", lambda: False)
    difference = np.abs(decoded(name).astype(int) - voxels_of(name))
    assert difference.max() <= LARGEST_DIFFERENCE
    assert (difference > 0).mean() <= DIFFERENT_SHARE


@pytest.mark.parametrize("name", sorted(LATENTS))
def test_networks_in_bfloat16_stay_within_what_is_stated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = open_archive(str(place_of(name)), None)
    chunks = chunks_of(name)
    decoder = ChunkDecoder(archive.codec.weights, archive.settings.chunk_format)
    # oneDNN has bfloat16 on few processors, PyTorch itself on all.
    monkeypatch.setattr("ucray.codec.convolution._ONE_DNN", False)
    with torch.autocast("cpu", torch.bfloat16):
        fewer = np.stack(decoder.decode_many(chunks)).astype(int)
    difference = np.abs(fewer - np.stack(decoder.decode_many(chunks)))
    assert difference.max() <= (LARGEST_IN_BF16 if archive.codec.weights.config.student else 0)


@pytest.mark.parametrize("name", sorted(LATENTS))
def test_filters_in_bfloat16_stay_within_what_is_stated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not postfilter.fast_in_bfloat16():
        # oneDNN has bfloat16 on few processors, PyTorch itself on all.
        monkeypatch.setattr("ucray.codec.convolution._ONE_DNN", False)
        monkeypatch.setattr(postfilter, "fast_in_bfloat16", lambda: True)
    difference = np.abs(decoded(name).astype(int) - voxels_of(name))
    assert difference.max() <= LARGEST_DIFFERENCE
    filtered = open_archive(str(place_of(name)), None).codec.weights.config.student_filter is not None
    assert (difference > 0).mean() <= (DIFFERENT_IN_BF16 if filtered else DIFFERENT_SHARE)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_they_hold_every_kind_of_chunk_and_are_clean(name: str) -> None:
    archive = open_archive(str(place_of(name)), None)
    digest = bytes.fromhex(archive.codec.weights.stream_digest)
    chunks = [read_chunk(data, digest) for data in chunks_of(name)]
    assert {chunk.kind for chunk in chunks} >= KINDS[name] - {Kind.RAW}
    assert any(chunk.mask for chunk in chunks)
    assert all(isinstance(c.body, BoundedBody) == (c.kind is Kind.BOUNDED) for c in chunks)
    assert ucray.verify(str(place_of(name)), serial=True).clean
