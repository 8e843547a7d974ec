"""The codec inside zarr: arrays that any process with zarr and ucray reads, or refuses by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr

from ucray.codec.bitstream import Kind, read_chunk
from ucray.codec.chunk import ChunkFormat
from ucray.codec.decoder import ChunkDecoder
from ucray.codec.encoder import ChunkEncoder
from ucray.codec.stored import NAME
from ucray.codec.weights import VERSIONS, Weights
from ucray.errors import ArchiveError, ChunkError, DtypeError, SettingsError, WeightsError
from ucray.grid import Shape3
from ucray.zarr_codec import UcrayCodec

Voxels = npt.NDArray[np.generic]
Formats = Callable[[str], ChunkFormat]
VoxelsOf = Callable[[ChunkFormat, Shape3, int], Voxels]

CHUNK: Shape3 = (32, 32, 32)
SHARD: Shape3 = (64, 64, 32)
SHAPE: Shape3 = (80, 64, 48)
ODD_SHAPE: Shape3 = (70, 61, 40)
"""Not even a multiple of the codec's stride."""

QUALITY = 160


def write_volume(
    place: Path, weights: Weights, chunk: ChunkFormat, voxels: Voxels, shards: Shape3 | None
) -> zarr.Array[Any]:
    """A group at `place` with `voxels` as its array "0"."""
    array = zarr.open_group(place, mode="w").create_array(
        "0",
        shape=voxels.shape,
        chunks=chunk.shape,
        shards=shards,
        dtype=chunk.dtype,
        fill_value=chunk.fill_value,
        serializer=UcrayCodec(weights, chunk.offset, chunk.scale, QUALITY),
        compressors=None,
    )
    array[...] = voxels
    return array


def read_volume(place: Path) -> zarr.Array[Any]:
    """The array "0" of a group, opened anew."""
    array = zarr.open_group(place, mode="r")["0"]
    assert isinstance(array, zarr.Array)
    return array


def expected_volume(weights: Weights, chunk: ChunkFormat, voxels: Voxels) -> Voxels:
    """What encoding and decoding chunk by chunk gives; zarr pads edge chunks with the fill value."""
    encoder = ChunkEncoder(weights, chunk)
    expected = np.empty_like(voxels)
    for start in np.ndindex(*(-(-n // c) for n, c in zip(voxels.shape, chunk.shape, strict=True))):
        place = tuple(slice(i * c, (i + 1) * c) for i, c in zip(start, chunk.shape, strict=True))
        inside = voxels[place]
        padded = np.full(chunk.shape, chunk.fill_value, chunk.dtype)
        padded[tuple(slice(0, n) for n in inside.shape)] = inside
        data = encoder.encode(padded, QUALITY).data
        decoded = encoder.decoder.decode(data) if data else padded
        expected[place] = decoded[tuple(slice(0, n) for n in inside.shape)]
    return expected


def edit_metadata(place: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the configuration of the codec in zarr.json."""
    path = place / "0" / "zarr.json"
    metadata = json.loads(path.read_text())
    (codec,) = metadata["codecs"]
    assert codec["name"] == NAME
    change(codec["configuration"])
    path.write_text(json.dumps(metadata))


@pytest.fixture
def chunk(chunk_format: Formats) -> ChunkFormat:
    return chunk_format("uint8")


@pytest.fixture
def voxels(chunk: ChunkFormat, voxels_of: VoxelsOf) -> Voxels:
    """Tissue, with one whole chunk and a part of others as fill."""
    volume = voxels_of(chunk, SHAPE, 40)
    volume[:32, :32, :32] = np.uint8(0)
    volume[32:, :10] = np.uint8(0)
    return volume


@pytest.mark.parametrize("shards", [None, SHARD], ids=["chunks", "shards"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_arrays_hold_what_the_codec_decodes(
    dtype: str,
    shards: Shape3 | None,
    tmp_path: Path,
    tiny_weights: Weights,
    chunk_format: Formats,
    voxels_of: VoxelsOf,
) -> None:
    chunk = chunk_format(dtype)
    voxels = voxels_of(chunk, ODD_SHAPE, 41)
    voxels[:32, :32, :32] = voxels.dtype.type(0)
    write_volume(tmp_path, tiny_weights, chunk, voxels, shards)
    read = read_volume(tmp_path)[...]
    assert isinstance(read, np.ndarray)
    assert read.dtype == voxels.dtype
    np.testing.assert_array_equal(read, expected_volume(tiny_weights, chunk, voxels))
    np.testing.assert_array_equal(read == 0, voxels == 0)


def test_a_region_is_read_as_part_of_the_whole(
    tmp_path: Path, tiny_weights: Weights, chunk: ChunkFormat, voxels: Voxels
) -> None:
    write_volume(tmp_path, tiny_weights, chunk, voxels, SHARD)
    array = read_volume(tmp_path)
    whole = np.asarray(array[...])
    region = (slice(30, 50), slice(5, 6), slice(20, 40))
    np.testing.assert_array_equal(array[region], whole[region])


def test_a_fresh_process_reads_with_zarr_alone(
    tmp_path: Path, tiny_weights: Weights, chunk: ChunkFormat, voxels: Voxels
) -> None:
    write_volume(tmp_path / "archive", tiny_weights, chunk, voxels, SHARD)
    program = (
        "import sys, numpy, zarr\n"
        "assert 'ucray' not in sys.modules\n"
        "numpy.save(sys.argv[2], zarr.open_group(sys.argv[1], mode='r')['0'][...])\n"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path / "archive"), "read.npy"]
    subprocess.run(command, check=True, cwd=tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "read.npy"), read_volume(tmp_path / "archive")[...])


def test_chunks_of_nothing_but_fill_are_not_stored(
    tmp_path: Path, tiny_weights: Weights, chunk: ChunkFormat, voxels: Voxels
) -> None:
    write_volume(tmp_path, tiny_weights, chunk, voxels, None)
    stored = {
        path.relative_to(tmp_path / "0" / "c").as_posix() for path in (tmp_path / "0" / "c").rglob("*/*/*")
    }
    assert stored == {f"{z}/{y}/{x}" for z in range(3) for y in range(2) for x in range(2)} - {"0/0/0"}


def test_chunks_are_written_at_the_codec_s_quality(
    tmp_path: Path, tiny_weights: Weights, chunk: ChunkFormat, voxels: Voxels
) -> None:
    write_volume(tmp_path, tiny_weights, chunk, voxels, None)
    data = (tmp_path / "0" / "c" / "1" / "1" / "0").read_bytes()
    stored = read_chunk(data, bytes.fromhex(tiny_weights.stream_digest))
    assert stored.kind is Kind.NEURAL
    expected = ChunkEncoder(tiny_weights, chunk).encode(voxels[32:64, 32:64, :32], QUALITY)
    assert data == expected.data


def test_metadata_hold_the_decoder_and_no_more(
    tmp_path: Path, tiny_weights: Weights, chunk: ChunkFormat, voxels: Voxels
) -> None:
    array = write_volume(tmp_path, tiny_weights, chunk, voxels, None)
    array[...] = voxels
    (codec,) = read_volume(tmp_path).metadata.codecs  # type: ignore[union-attr]
    assert isinstance(codec, UcrayCodec)
    assert codec.weights.digest == tiny_weights.decoder().digest
    assert (codec.offset, codec.scale, codec.quality) == (chunk.offset, chunk.scale, QUALITY)


def test_configuration_round_trip(tiny_weights: Weights) -> None:
    codec = UcrayCodec(tiny_weights, 0.1, 1 / 3, QUALITY, exact_fill=False)
    stored = json.loads(json.dumps(codec.to_dict()))
    parsed = UcrayCodec.from_dict(stored)
    assert parsed.to_dict() == codec.to_dict()
    assert (parsed.offset, parsed.scale) == (0.1, 1 / 3)
    assert parsed.weights.digest == tiny_weights.decoder().digest


def test_the_same_metadata_are_equal(
    tmp_path: Path, tiny_weights: Weights, chunk: ChunkFormat, voxels: Voxels
) -> None:
    """zarr's metadata are values; so must be the codec that they hold."""
    write_volume(tmp_path, tiny_weights, chunk, voxels, None)
    assert read_volume(tmp_path).metadata == read_volume(tmp_path).metadata
    codec = UcrayCodec(tiny_weights, 0.0, 1.0, QUALITY)
    assert codec == UcrayCodec(Weights.from_bytes(tiny_weights.to_bytes()), 0.0, 1.0, QUALITY)
    assert codec != UcrayCodec(tiny_weights.decoder(), 0.0, 1.0, QUALITY)


def test_arrays_opened_from_an_archive_are_not_written(
    tmp_path: Path, tiny_weights: Weights, chunk: ChunkFormat, voxels: Voxels
) -> None:
    write_volume(tmp_path, tiny_weights, chunk, voxels, None)
    array = zarr.open_group(tmp_path, mode="r+")["0"]
    assert isinstance(array, zarr.Array)
    with pytest.raises(WeightsError, match="analysis"):
        array[...] = voxels


def _tampered_digest(configuration: dict[str, Any]) -> None:
    digest = configuration["weights"]["digest"]
    configuration["weights"]["digest"] = ("0" if digest[0] != "0" else "1") + digest[1:]


def _tampered_weights(configuration: dict[str, Any]) -> None:
    encoded = configuration["weights"]["zstd"]
    configuration["weights"]["zstd"] = encoded[:-9] + ("A" if encoded[-9] != "A" else "B") + encoded[-8:]


def _cut_weights(configuration: dict[str, Any]) -> None:
    configuration["weights"]["zstd"] = configuration["weights"]["zstd"][:400]


def _no_base64(configuration: dict[str, Any]) -> None:
    configuration["weights"]["zstd"] = "*" * 400


def _no_text(configuration: dict[str, Any]) -> None:
    configuration["weights"]["zstd"] = 7


def _another_size(configuration: dict[str, Any]) -> None:
    configuration["weights"]["bytes"] += 1


def _absurd_size(configuration: dict[str, Any]) -> None:
    configuration["weights"]["bytes"] = 1 << 60


TAMPERS = [
    _tampered_digest, _tampered_weights, _cut_weights, _no_base64, _no_text, _another_size, _absurd_size,
]  # fmt: skip


@pytest.mark.parametrize("tamper", TAMPERS)
def test_tampered_weights_are_refused(
    tamper: Callable[[dict[str, Any]], None],
    tmp_path: Path,
    tiny_weights: Weights,
    chunk: ChunkFormat,
    voxels: Voxels,
) -> None:
    write_volume(tmp_path, tiny_weights, chunk, voxels, None)
    edit_metadata(tmp_path, tamper)
    with pytest.raises(WeightsError, match="weights"):
        read_volume(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 6},
        {"version": "1"},
        {"version": None},
        {"offset": "far"},
        {"offset": None},
        {"quality": 256},
        {"quality": -1},
        {"quality": [1]},
        {"quality": float("inf")},
        {"offset": 10**400},
        {"max_error": 1e31},
        {"max_error": -1.0},
        {"max_error": float("nan")},
        {"weights": {}},
        {"weights": None},
        {"weights": "fib25"},
    ],
    ids=str,
)
def test_configurations_without_sense_are_refused(change: dict[str, Any], tiny_weights: Weights) -> None:
    stored = UcrayCodec(tiny_weights, 0.0, 1.0, QUALITY).to_dict()
    stored["configuration"] |= change
    with pytest.raises(ArchiveError):
        UcrayCodec.from_dict(stored)


@pytest.mark.parametrize("key", ["version", "offset", "scale", "quality", "max_error", "weights", None])
def test_incomplete_configurations_are_refused(key: str | None, tiny_weights: Weights) -> None:
    stored = UcrayCodec(tiny_weights, 0.0, 1.0, QUALITY).to_dict()
    if key is None:
        del stored["configuration"]
    else:
        del stored["configuration"][key]
    with pytest.raises(ArchiveError):
        UcrayCodec.from_dict(stored)


def test_a_later_version_is_named_whatever_else_it_holds() -> None:
    later = max(VERSIONS) + 1
    with pytest.raises(ArchiveError, match=f"version {later}; this ucray reads 1, 2, 3, 4"):
        UcrayCodec.from_dict({"name": NAME, "configuration": {"version": later, "model": "x"}})


def test_damaged_chunks_are_refused(
    tmp_path: Path, tiny_weights: Weights, chunk: ChunkFormat, voxels: Voxels
) -> None:
    write_volume(tmp_path, tiny_weights, chunk, voxels, None)
    path = tmp_path / "0" / "c" / "1" / "1" / "0"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:20] + bytes([whole[20] ^ 1]) + whole[21:], b""):
        path.write_bytes(damaged)
        with pytest.raises(ChunkError):
            read_volume(tmp_path)[...]


@pytest.mark.parametrize("shards", [None, (40, 32, 32)], ids=["chunks", "shards"])
def test_chunk_shapes_between_the_codes_are_refused(
    shards: Shape3 | None, tmp_path: Path, tiny_weights: Weights, chunk: ChunkFormat, voxels: Voxels
) -> None:
    """At the latest by the first write; zarr does not show a codec the chunk shape before that."""
    with pytest.raises(SettingsError, match="40,32,32 must be a multiple of 16,16,16"):
        write_volume(tmp_path, tiny_weights, replace(chunk, shape=(40, 32, 32)), voxels, shards)


@pytest.mark.parametrize(("shape", "chunks"), [((64, 64), (32, 32)), ((2, 64, 64, 64), (1, 32, 32, 32))])
def test_other_axes_than_three_are_refused(
    shape: tuple[int, ...], chunks: tuple[int, ...], tmp_path: Path, tiny_weights: Weights
) -> None:
    with pytest.raises(SettingsError, match="axes"):
        zarr.create_array(
            tmp_path,
            shape=shape,
            chunks=chunks,
            dtype="uint8",
            serializer=UcrayCodec(tiny_weights, 0.0, 1.0, QUALITY),
            compressors=None,
        )


@pytest.mark.parametrize("dtype", ["int32", "float64", "complex64", "bool", "S4"])
def test_other_voxel_types_are_refused(dtype: str, tmp_path: Path, tiny_weights: Weights) -> None:
    with pytest.raises(DtypeError, match="uint8, uint16, int16, float32"):
        zarr.create_array(
            tmp_path,
            shape=(32, 32, 32),
            chunks=(32, 32, 32),
            dtype=dtype,
            serializer=UcrayCodec(tiny_weights, 0.0, 1.0, QUALITY),
            compressors=None,
        )


@pytest.mark.parametrize("shards", [None, SHARD], ids=["chunks", "shards"])
@pytest.mark.parametrize("fill_value", [0.0, float("nan")])
def test_networks_are_built_once_for_all_chunks(
    fill_value: float,
    shards: Shape3 | None,
    tmp_path: Path,
    tiny_weights: Weights,
    chunk_format: Formats,
    voxels_of: VoxelsOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Building them for every chunk would take longer than decoding."""
    chunk = replace(chunk_format("float32"), fill_value=fill_value)
    write_volume(tmp_path, tiny_weights, chunk, voxels_of(chunk, SHAPE, 42), shards)
    built = []

    def build(weights: Weights, bound: ChunkFormat, *, device: str) -> ChunkDecoder:
        built.append(bound)
        return ChunkDecoder(weights, bound, device=device)

    monkeypatch.setattr("ucray.codec.stored.ChunkDecoder", build)
    array = read_volume(tmp_path)
    for plane in (0, 40, 79):
        assert np.asarray(array[plane]).shape == SHAPE[1:]
    assert [bound.shape for bound in built] == [CHUNK]


def test_an_unbound_codec_says_so(tiny_weights: Weights) -> None:
    with pytest.raises(SettingsError, match="not bound"):
        _ = UcrayCodec(tiny_weights, 0.0, 1.0, QUALITY).decoder


def test_the_decoder_of_a_bound_codec_is_the_chunk_decoder(
    tmp_path: Path, tiny_weights: Weights, chunk: ChunkFormat, voxels: Voxels
) -> None:
    """Bytes on disk are whole chunks: they decode without zarr."""
    write_volume(tmp_path, tiny_weights, chunk, voxels, None)
    data = (tmp_path / "0" / "c" / "1" / "0" / "0").read_bytes()
    decoded = ChunkDecoder(tiny_weights.decoder(), chunk).decode(data)
    np.testing.assert_array_equal(decoded, read_volume(tmp_path)[32:64, :32, :32])
