"""Chunks of voxels to bytes and back, of every kind and dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ucray.codec import frames
from ucray.codec.bitstream import HEADER, Kind, NeuralBody, read_chunk
from ucray.codec.chunk import DTYPES, ChunkFormat, normalisation
from ucray.codec.decoder import ChunkDecoder, device_for
from ucray.codec.encoder import RAW_LEVEL, ChunkEncoder, pack
from ucray.codec.network import stored_synthesis
from ucray.codec.weights import Weights
from ucray.config import QUALITIES
from ucray.errors import ChunkError, DtypeError, SettingsError, WeightsError
from ucray.grid import Shape3
from ucray.quality import ErrorSum
from ucray.training.calibrate import load_coder
from ucray.training.loss import Coder, frozen_stream

Voxels = npt.NDArray[np.generic]
Formats = Callable[[str], ChunkFormat]
VoxelsOf = Callable[[ChunkFormat, Shape3, int], Voxels]
SmoothVolume = Callable[[Shape3, int], npt.NDArray[np.float32]]

FULL: Shape3 = (32, 32, 32)
QUALITY = 128

WORKING = 0.2
"""Mean squared error, in variances of the volume, that these weights stay under on smooth volumes.

Without the latents it would be 1, with codes or gain mixed up about 0.3 to several.
"""


def encoder_of(weights: Weights, chunk: ChunkFormat) -> ChunkEncoder:
    """A fresh encoder; building one takes some milliseconds."""
    return ChunkEncoder(weights, chunk)


def fill_value_of(dtype: str) -> float:
    """A value in the midst of the volume's, so that decoded voxels would meet it by chance."""
    return {"uint8": 128.0, "uint16": 30000.0, "int16": -100.0, "float32": 0.5}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_neural_chunks(dtype: str, tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf) -> None:
    chunk = chunk_format(dtype)
    encoder = encoder_of(tiny_weights, chunk)
    voxels = voxels_of(chunk, FULL, 11)

    packed = encoder.encode(voxels, QUALITY)
    decoded = encoder.decoder.decode(packed.data)

    assert packed.kind is Kind.NEURAL
    assert (decoded.shape, decoded.dtype) == (FULL, np.dtype(dtype))
    assert packed.error == ErrorSum.between(voxels, decoded)
    assert 0 < packed.error.mse < WORKING * chunk.scale**2
    assert len(packed.data) < chunk.voxels / 64


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_decoding_is_what_training_saw(
    part: str, tiny_weights: Weights, chunk_format: Formats, smooth_volume: SmoothVolume
) -> None:
    """The frozen stream of stage 2, in floats, against bytes, integer tables and stored networks."""
    coder = Coder(tiny_weights.config)
    load_coder(tiny_weights, coder)
    values = smooth_volume(FULL, 10)
    # Between the trained points of the quality gain, training does not round it to whole units.
    quality = QUALITIES - 1
    with torch.no_grad():
        asked = torch.tensor([float(quality)])
        decoder = stored_synthesis(tiny_weights, part)
        stream = frozen_stream(coder, decoder, torch.from_numpy(values)[None, None], asked)
        expected = decoder(stream.y_hat, stream.prior, asked)[0, 0].numpy()

    chunk = replace(chunk_format("float32"), offset=0.0, scale=1.0)
    data = encoder_of(tiny_weights, chunk).encode(values, quality).data
    decoded = ChunkDecoder(tiny_weights, chunk, part=part).decode(data)

    # The stream's whole numbers round the means, so a latent here and there falls on the other side;
    # a wrong code or gain errs by 0.1.
    assert np.sqrt(np.mean((decoded.astype(np.float32) - expected) ** 2)) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_fill_voxels_decode_to_the_fill_value(
    dtype: str, tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    chunk = replace(chunk_format(dtype), fill_value=fill_value_of(dtype))
    encoder = encoder_of(tiny_weights, chunk)
    voxels = voxels_of(chunk, FULL, 12)
    voxels[:, 20:] = voxels.dtype.type(chunk.fill_value)
    voxels[3, 4, 5] = voxels.dtype.type(chunk.fill_value)

    packed = encoder.encode(voxels, QUALITY)
    decoded = encoder.decoder.decode(packed.data)

    assert packed.kind is Kind.NEURAL
    np.testing.assert_array_equal(decoded == chunk.fill_value, voxels == chunk.fill_value)
    assert packed.error == ErrorSum.between(voxels, decoded)
    assert packed.error.mse < WORKING * chunk.scale**2


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_nothing_but_fill_take_no_bytes(
    dtype: str, tiny_weights: Weights, chunk_format: Formats
) -> None:
    chunk = replace(chunk_format(dtype), fill_value=fill_value_of(dtype))
    encoder = encoder_of(tiny_weights, chunk)
    voxels = np.full(FULL, chunk.fill_value, dtype)
    packed = encoder.encode(voxels, QUALITY)
    assert packed.data == b""
    assert packed.error.squared == 0.0
    assert encoder.drafts([voxels], QUALITY) == [None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [False, True])
def test_constant_chunks_come_back_exactly(
    dtype: str, padded: bool, tiny_weights: Weights, chunk_format: Formats
) -> None:
    chunk = chunk_format(dtype)
    encoder = encoder_of(tiny_weights, chunk)
    voxels = np.full(FULL, 77, dtype)
    if padded:
        voxels[:, :, :9] = 0
    packed = encoder.encode(voxels, QUALITY)
    assert packed.kind is Kind.CONSTANT
    assert packed.error == ErrorSum(voxels.size)
    assert len(packed.data) < 64
    np.testing.assert_array_equal(encoder.decoder.decode(packed.data), voxels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [False, True])
def test_chunks_that_zstd_codes_shorter_are_raw_and_exact(
    dtype: str, padded: bool, tiny_weights: Weights, chunk_format: Formats
) -> None:
    chunk = chunk_format(dtype)
    encoder = encoder_of(tiny_weights, chunk)
    # One uneven row again and again: next to nothing for zstd, plenty for latents at the finest quality.
    row = chunk.offset + chunk.scale * np.random.default_rng(4).uniform(-1.5, 1.5, FULL[2])
    voxels = np.broadcast_to(row if dtype == "float32" else np.rint(row), FULL).astype(dtype)
    if padded:
        voxels[:, :9] = 0
    packed = encoder.encode(voxels, 255)
    assert packed.kind is Kind.RAW
    assert packed.error == ErrorSum(voxels.size)
    decoded = encoder.decoder.decode(packed.data)
    assert decoded.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(decoded, voxels)


def test_big_endian_voxels_are_coded_like_native_ones(
    tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    chunk = chunk_format("uint16")
    encoder = encoder_of(tiny_weights, chunk)
    halves = np.where(np.arange(32)[:, None, None] < 16, 5, np.full(FULL, 1000)).astype(np.uint16)
    for voxels in (voxels_of(chunk, FULL, 13), np.full(FULL, 258, np.uint16), halves):
        assert encoder.encode(voxels.astype(">u2"), QUALITY) == encoder.encode(voxels, QUALITY)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_chunks_with_values_that_are_no_number_are_raw_and_exact(
    value: float, tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    chunk = chunk_format("float32")
    encoder = encoder_of(tiny_weights, chunk)
    voxels = voxels_of(chunk, FULL, 14)
    voxels[:4] = np.float32(0.0)
    voxels[7, 8, 9] = np.float32(value)
    packed = encoder.encode(voxels, QUALITY)
    assert packed.kind is Kind.RAW
    np.testing.assert_array_equal(encoder.decoder.decode(packed.data), voxels)


def test_chunks_beyond_the_networks_range_are_raw_and_exact(
    tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    """Normalised, these float32 voxels overflow."""
    chunk = replace(chunk_format("float32"), scale=1e-3)
    encoder = encoder_of(tiny_weights, chunk)
    voxels = np.multiply(voxels_of(chunk_format("float32"), FULL, 15), 3e38, dtype=np.float32)
    packed = encoder.encode(voxels, QUALITY)
    assert packed.kind is Kind.RAW
    np.testing.assert_array_equal(encoder.decoder.decode(packed.data), voxels)


def test_a_fill_value_of_not_a_number(
    tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    chunk = replace(chunk_format("float32"), fill_value=float("nan"))
    encoder = encoder_of(tiny_weights, chunk)
    voxels = voxels_of(chunk, FULL, 16)
    voxels[:, :10] = np.float32(np.nan)
    packed = encoder.encode(voxels, QUALITY)
    decoded = encoder.decoder.decode(packed.data)
    assert packed.kind is Kind.NEURAL
    np.testing.assert_array_equal(np.isnan(decoded.astype(np.float64)), np.isnan(voxels.astype(np.float64)))
    assert packed.error.mse < WORKING * chunk.scale**2
    assert encoder.drafts([np.full(FULL, np.nan, np.float32)], QUALITY) == [None]


@pytest.mark.parametrize("shape", [(32, 32, 7), (20, 1, 32), (1, 1, 2), (31, 17, 16)])
def test_edge_chunks_are_measured_inside_and_decode_to_the_chunk_s_shape(
    shape: Shape3, tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    chunk = replace(chunk_format("uint8"), fill_value=128.0)
    encoder = encoder_of(tiny_weights, chunk)
    voxels = voxels_of(chunk, shape, 17)
    voxels[0, 0, 0] = np.uint8(128)
    packed = encoder.encode(voxels, QUALITY)
    decoded = encoder.decoder.decode(packed.data)
    z, y, x = shape
    assert decoded.shape == FULL
    assert packed.error == ErrorSum.between(voxels, decoded[:z, :y, :x])
    np.testing.assert_array_equal(decoded[:z, :y, :x] == 128, voxels == 128)


def test_what_lies_beyond_the_volume_costs_no_bits(
    tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    """An edge chunk is no longer than the same chunk padded by replication, which is no fill."""
    chunk = chunk_format("uint8")
    encoder = encoder_of(tiny_weights, chunk)
    voxels = voxels_of(chunk, (32, 20, 32), 18)
    replicated = np.pad(voxels, ((0, 0), (0, 12), (0, 0)), mode="edge")
    assert encoder.encode(voxels, QUALITY).data == encoder.encode(replicated, QUALITY).data


@pytest.mark.parametrize("kind", [Kind.CONSTANT, Kind.RAW])
def test_exact_edge_chunks(kind: Kind, tiny_weights: Weights, chunk_format: Formats) -> None:
    encoder = encoder_of(tiny_weights, chunk_format("int16"))
    voxels = np.full((9, 32, 3), -7, np.int16)
    voxels[:, 5:8] = 0
    if kind is Kind.RAW:
        voxels[4, 20:] = 30000
    packed = encoder.encode(voxels, QUALITY)
    assert packed.kind is kind
    np.testing.assert_array_equal(encoder.decoder.decode(packed.data)[:9, :, :3], voxels)


def test_chunks_larger_than_the_chunk_shape_are_refused(
    tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    chunk = chunk_format("uint8")
    with pytest.raises(SettingsError, match="larger"):
        encoder_of(tiny_weights, chunk).encode(voxels_of(chunk, (32, 32, 33), 19), QUALITY)


def test_thick_slices(anisotropic_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf) -> None:
    chunk = replace(chunk_format("uint8"), shape=(6, 48, 32))
    encoder = encoder_of(anisotropic_weights, chunk)
    voxels = voxels_of(chunk, (6, 48, 32), 20)
    voxels[0, :10] = np.uint8(0)
    packed = encoder.encode(voxels, QUALITY, (1, 2, 3))
    decoded = encoder.decoder.decode(packed.data, (1, 2, 3))
    assert packed.kind is Kind.NEURAL
    assert packed.error == ErrorSum.between(voxels, decoded)
    assert packed.error.mse < WORKING * chunk.scale**2
    np.testing.assert_array_equal(decoded == 0, voxels == 0)


def test_more_quality_takes_more_bytes_and_errs_less(
    tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    chunk = chunk_format("uint8")
    encoder = encoder_of(tiny_weights, chunk)
    voxels = voxels_of(chunk, FULL, 21)
    coded = [encoder.encode(voxels, quality) for quality in (0, 64, 128, 255)]
    sizes, errors = [len(packed.data) for packed in coded], [packed.error.mse for packed in coded]
    assert sizes == sorted(set(sizes))
    assert errors == sorted(set(errors), reverse=True)
    bodies = [read_chunk(packed.data, bytes.fromhex(tiny_weights.stream_digest)).body for packed in coded]
    assert [body.quality for body in bodies if isinstance(body, NeuralBody)] == [0, 64, 128, 255]


@pytest.mark.parametrize("seed", range(4))
def test_no_chunk_is_longer_than_its_raw_form(
    seed: int, tiny_weights: Weights, chunk_format: Formats
) -> None:
    """Blocks of one value each are short in zstd, but so far off here that every latent is an escape."""
    chunk = replace(chunk_format("float32"), scale=1e-5)
    values = 1.0 + np.random.default_rng(seed).integers(0, 17, (2, 2, 2)) / 16
    voxels = np.kron(values, np.ones((16, 16, 16))).astype(np.float32)
    packed = encoder_of(tiny_weights, chunk).encode(voxels, 255)
    assert len(packed.data) <= HEADER + len(frames.pack(voxels.tobytes(), RAW_LEVEL))


@pytest.mark.parametrize("noisy", [32, 128, 256, 512, 1024])
def test_a_chunk_of_which_a_part_is_noise_is_no_longer_than_its_raw_form(
    noisy: int, tiny_weights: Weights, chunk_format: Formats
) -> None:
    """What is packed first, to learn whether the rest is worth it, says least where the rest is nothing."""
    chunk = replace(chunk_format("float32"), scale=1e-5)
    voxels = np.ones(FULL, np.float32)
    voxels.reshape(-1)[:noisy] += np.random.default_rng(6).random(noisy, np.float32)
    for turned in (voxels, voxels[::-1, ::-1, ::-1]):
        packed = encoder_of(tiny_weights, chunk).encode(turned, 255)
        whole = len(frames.pack(turned.tobytes(), RAW_LEVEL))
        assert len(packed.data) <= HEADER + whole


def test_the_same_chunk_gives_the_same_bytes(
    tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    chunk = chunk_format("uint8")
    encoder = encoder_of(tiny_weights, chunk)
    voxels = voxels_of(chunk, FULL, 23)
    voxels[:2] = np.uint8(0)
    first = encoder.encode(voxels, QUALITY, (1, 0, 2))
    encoder.encode(voxels_of(chunk, FULL, 24), QUALITY)
    again = encoder.encode(np.asfortranarray(voxels), QUALITY, (1, 0, 2))
    fresh = encoder_of(Weights.from_bytes(tiny_weights.to_bytes()), chunk).encode(voxels, QUALITY, (1, 0, 2))
    in_halves = pack(
        encoder.drafts([voxels], QUALITY, [(1, 0, 2)])[0], tiny_weights.stream, tiny_weights.stream_digest
    )
    assert first == again == fresh == in_halves


def test_the_bytes_of_a_chunk_do_not_depend_on_its_company(
    tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    chunk = chunk_format("uint8")
    encoder = encoder_of(tiny_weights, chunk)
    chunks = [voxels_of(chunk, FULL, seed) for seed in range(5)]
    alone = [encoder.encode(voxels, QUALITY) for voxels in chunks]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for company in (chunks, chunks[::-1]):
            drafts = encoder.drafts(company, QUALITY)
            together = [pack(draft, tiny_weights.stream, tiny_weights.stream_digest) for draft in drafts]
            assert together == (alone if company is chunks else alone[::-1])
    torch.set_num_threads(1)


def test_encoding_leaves_the_voxels_alone(
    tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    chunk = chunk_format("float32")
    voxels = voxels_of(chunk, FULL, 25)
    voxels[:2] = np.float32(0.0)
    before = voxels.copy()
    encoder_of(tiny_weights, chunk).encode(voxels, QUALITY)
    np.testing.assert_array_equal(voxels, before)


def test_the_teacher_decodes_the_student_s_bytes(
    tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    chunk = chunk_format("uint8")
    voxels = voxels_of(chunk, FULL, 26)
    voxels[:, :, 25:] = np.uint8(0)
    encoder = encoder_of(tiny_weights, chunk)
    data = encoder.encode(voxels, QUALITY).data
    taught = ChunkDecoder(tiny_weights, chunk, part="teacher").decode(data)
    np.testing.assert_array_equal(taught == 0, voxels == 0)
    assert ErrorSum.between(voxels, taught).mse < WORKING * chunk.scale**2
    assert (taught != encoder.decoder.decode(data)).any()


def test_decoder_weights_decode_and_do_not_encode(
    tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    chunk = chunk_format("uint8")
    encoder = encoder_of(tiny_weights, chunk)
    data = encoder.encode(voxels_of(chunk, FULL, 27), QUALITY).data
    alone = ChunkDecoder(tiny_weights.decoder(), chunk)
    np.testing.assert_array_equal(alone.decode(data), encoder.decoder.decode(data))
    with pytest.raises(WeightsError, match="analysis"):
        ChunkEncoder(tiny_weights.decoder(), chunk)
    with pytest.raises(WeightsError, match="teacher"):
        ChunkDecoder(tiny_weights.decoder(), chunk, part="teacher")


def samples(chunk: ChunkFormat, voxels_of: VoxelsOf) -> list[Voxels]:
    """Chunks of each kind: neural, constant with a mask, raw."""
    neural = voxels_of(chunk, FULL, 28)
    constant, raw = np.full(FULL, 9, chunk.dtype), np.full(FULL, 9, chunk.dtype)
    constant[:, :8] = 0
    raw[:, :8] = 200
    return [neural, constant, raw]


def test_chunks_of_other_weights_are_refused(
    tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    chunk = chunk_format("uint8")
    tensors = dict(tiny_weights.tensors)
    tensors["stream.base"] = tiny_weights.stream.context.base + np.int16(1)
    changed = Weights(tiny_weights.config, tensors)
    other = ChunkDecoder(changed, chunk)
    encoder = encoder_of(tiny_weights, chunk)
    for voxels in samples(chunk, voxels_of):
        data = encoder.encode(voxels, QUALITY).data
        with pytest.raises(ChunkError, match=f"other weights than {changed.stream_digest[:8]}"):
            other.decode(data)


def test_chunks_of_another_place_are_refused(
    tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    chunk = chunk_format("uint8")
    encoder = encoder_of(tiny_weights, chunk)
    for voxels in samples(chunk, voxels_of):
        placed, free = encoder.encode(voxels, QUALITY, (4, 5, 6)).data, encoder.encode(voxels, QUALITY).data
        with pytest.raises(ChunkError, match=r"\(4, 5, 6\) stands at place \(4, 5, 7\)"):
            encoder.decoder.decode(placed, (4, 5, 7))
        expected = encoder.decoder.decode(free)
        for data, place in ((placed, (4, 5, 6)), (placed, None), (free, (9, 9, 9))):
            np.testing.assert_array_equal(encoder.decoder.decode(data, place), expected)


@pytest.mark.parametrize("shape", [(32, 32, 16), (32, 32, 48), (64, 32, 32)])
def test_chunks_of_another_shape_are_refused(
    shape: Shape3, tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    chunk = chunk_format("uint8")
    encoder = encoder_of(tiny_weights, chunk)
    other = ChunkDecoder(tiny_weights, replace(chunk, shape=shape))
    for voxels in samples(chunk, voxels_of):
        data = encoder.encode(voxels, QUALITY).data
        with pytest.raises(ChunkError):
            other.decode(data)


def test_chunks_of_another_dtype_are_refused(
    tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    """Exact chunks hold bytes of their dtype; a neural chunk holds none."""
    encoder = encoder_of(tiny_weights, chunk_format("uint8"))
    other = ChunkDecoder(tiny_weights, chunk_format("uint16"))
    for voxels in samples(encoder.format, voxels_of)[1:]:
        with pytest.raises(ChunkError):
            other.decode(encoder.encode(voxels, QUALITY).data)


@pytest.mark.parametrize("dtype", ["float64", "int32", "bool", "complex64"])
def test_other_voxel_types_are_refused(dtype: str) -> None:
    with pytest.raises(DtypeError, match=dtype):
        ChunkFormat(FULL, dtype, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("offset", "scale"), [(0.0, 0.0), (0.0, -1.0), (0.0, np.nan), (0.0, np.inf), (np.nan, 1.0), (np.inf, 1.0)]
)
def test_normalisations_without_sense_are_refused(offset: float, scale: float) -> None:
    with pytest.raises(SettingsError):
        ChunkFormat(FULL, "uint8", 0.0, offset, scale)


def test_chunk_shapes_between_the_codes_are_refused(tiny_weights: Weights, chunk_format: Formats) -> None:
    chunk = replace(chunk_format("uint8"), shape=(32, 40, 32))
    for build in (ChunkEncoder, ChunkDecoder):
        with pytest.raises(SettingsError, match="32,40,32 must be a multiple of 16,16,16"):
            build(tiny_weights, chunk)


def test_normalisation_is_of_tissue_alone() -> None:
    first = np.array([0, 0, 10, 14], np.uint8).reshape(1, 2, 2)
    second = np.array([0, 12, 12, 12], np.uint8).reshape(1, 2, 2)
    # Mean 12; squares 4 + 4 over five voxels.
    assert normalisation([first, second], 0.0) == (12.0, 1.26491)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.0], (0.0, 1.0)), ([5.0, 5.0], (5.0, 1.0)), ([np.nan, np.inf, 3.0, 5.0], (4.0, 1.0))],
)
def test_normalisation_of_odd_volumes(values: list[float], expected: tuple[float, float]) -> None:
    assert normalisation([np.array(values, np.float32).reshape(1, 1, -1)], 0.0) == expected


def test_a_device_that_is_named_is_taken() -> None:
    assert device_for("cpu") == "cpu"
    assert device_for("auto") in ("cpu", "cuda")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("bound", [0.0, 3.0])
def test_bounded_chunks(
    dtype: str, bound: float, tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    """Every voxel within the bound, padding exact, cut-off chunks too; zero bounds are lossless."""
    chunk = replace(chunk_format(dtype), fill_value=fill_value_of(dtype))
    bound *= chunk.scale / 30.0
    encoder = ChunkEncoder(tiny_weights, chunk, max_error=bound)
    # Noise, as every microscope has it: a general compressor has nothing to gain from it.
    noise = np.random.default_rng(0).normal(0, 0.3 * chunk.scale, (32, 20, 32))
    voxels: npt.NDArray[Any] = voxels_of(chunk, (32, 20, 32), 31)
    limits = {"uint8": (0, 255), "uint16": (0, 65535)}.get(dtype, (-32768, 32767))
    voxels = np.clip(voxels + noise, *limits).astype(dtype)
    voxels[:, 12:15] = voxels.dtype.type(chunk.fill_value)
    packed = encoder.encode(voxels, QUALITY, (1, 2, 3))
    decoder = ChunkDecoder(tiny_weights.decoder(bounded=True), chunk)
    decoded = decoder.decode(packed.data, (1, 2, 3))[:, :20]
    difference = np.abs(decoded.astype(np.float64) - voxels.astype(np.float64))
    assert difference.max() <= bound
    assert packed.error.maximum == difference.max()
    np.testing.assert_array_equal(decoded[:, 12:15], chunk.fill_value)
    # Without a tolerance, a volume this smooth and half empty is shorter as it is.
    assert packed.kind is (Kind.BOUNDED if bound else Kind.RAW)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_lossless_chunks_of_noisy_tissue(
    dtype: str, tiny_weights: Weights, chunk_format: Formats, smooth_volume: SmoothVolume
) -> None:
    chunk = chunk_format(dtype)
    noise = np.random.default_rng(0).normal(0, 0.3, FULL)
    values = (smooth_volume(FULL, 8) + noise) * chunk.scale + chunk.offset
    voxels = np.clip(values, np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)
    packed = ChunkEncoder(tiny_weights, chunk, max_error=0.0).encode(voxels, QUALITY)
    np.testing.assert_array_equal(ChunkDecoder(tiny_weights, chunk).decode(packed.data), voxels)
    assert packed.kind is Kind.BOUNDED
    assert len(packed.data) < len(frames.pack(voxels.tobytes(), RAW_LEVEL))


@pytest.mark.parametrize("bound", [0.1, 0.037, 3.0])
def test_a_bound_on_float_voxels_leaves_room_for_their_last_place(
    bound: float, tiny_weights: Weights, chunk_format: Formats, smooth_volume: SmoothVolume
) -> None:
    """Voxels of 128 to 256: float32 rounds them to 2^-16, and not one may end beyond the bound."""
    chunk = replace(chunk_format("float32"), offset=190.0, scale=10.0)
    voxels = np.clip(smooth_volume(FULL, 8) * 10 + 190, 130, 250).astype(np.float32)
    packed = ChunkEncoder(tiny_weights, chunk, max_error=bound).encode(voxels, QUALITY)
    decoded = ChunkDecoder(tiny_weights, chunk).decode(packed.data)
    assert packed.kind is Kind.BOUNDED
    assert np.abs(decoded.astype(np.float64) - voxels).max() <= bound


def test_a_voxel_that_no_residual_reaches_makes_its_chunk_raw(
    tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    chunk = chunk_format("float32")
    for far in (2.5e15, 1e20):
        voxels = voxels_of(chunk, FULL, 3)
        voxels[5, 6, 7] = np.float32(far)
        packed = ChunkEncoder(tiny_weights, chunk, max_error=0.05).encode(voxels, QUALITY)
        assert packed.kind is Kind.RAW
        np.testing.assert_array_equal(ChunkDecoder(tiny_weights, chunk).decode(packed.data), voxels)


def test_a_scale_that_overflows_is_no_undefined_voxel(tiny_weights: Weights, chunk_format: Formats) -> None:
    chunk = chunk_format("uint8")
    voxels = np.random.default_rng(0).integers(100, 120, FULL).astype(np.uint8)
    data = encoder_of(tiny_weights, chunk).encode(voxels, QUALITY).data
    with pytest.raises(ChunkError, match="no numbers"), np.errstate(over="ignore"):
        ChunkDecoder(tiny_weights, replace(chunk, scale=1e300)).decode(data)


@pytest.mark.parametrize("shape", [(32, 32, 8192), (2**21, 2**21, 2**21), (4096, 4096, 32)])
def test_chunks_that_would_take_all_memory_are_refused(
    shape: Shape3, tiny_weights: Weights, chunk_format: Formats
) -> None:
    with pytest.raises(SettingsError, match="too large"):
        ChunkDecoder(tiny_weights, replace(chunk_format("uint8"), shape=shape))


def test_bounded_chunks_of_noise_are_no_larger_than_raw(tiny_weights: Weights, chunk_format: Formats) -> None:
    chunk = chunk_format("uint8")
    voxels = np.random.default_rng(0).integers(1, 256, FULL).astype(np.uint8)
    packed = ChunkEncoder(tiny_weights, chunk, max_error=0.0).encode(voxels, QUALITY)
    np.testing.assert_array_equal(ChunkDecoder(tiny_weights, chunk).decode(packed.data), voxels)
    assert len(packed.data) < 1.01 * voxels.nbytes


def test_a_bound_needs_the_reference(tiny_weights: Weights, chunk_format: Formats) -> None:
    tensors = {k: v for k, v in tiny_weights.tensors.items() if not k.startswith("reference.")}
    with pytest.raises(WeightsError, match="no reference"):
        ChunkEncoder(Weights(tiny_weights.config, tensors), chunk_format("uint8"), max_error=1.0)


def test_bounded_bytes_do_not_depend_on_threads_or_company(
    tiny_weights: Weights, chunk_format: Formats, voxels_of: VoxelsOf
) -> None:
    """Decoding needs no float network, so threads cannot change a voxel; nor can what is decoded beside."""
    chunk = chunk_format("uint8")
    encoder = ChunkEncoder(tiny_weights, chunk, max_error=2.0)
    company = [voxels_of(chunk, FULL, seed) for seed in (40, 41, 42)]
    decoder = ChunkDecoder(tiny_weights.decoder(bounded=True), chunk)
    packed = [encoder.pack(draft) for draft in encoder.drafts(company, QUALITY)]
    alone = [decoder.decode(one.data) for one in packed]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for one, expected, original in zip(packed, alone, company, strict=True):
            again = ChunkDecoder(tiny_weights.decoder(bounded=True), chunk).decode(one.data)
            np.testing.assert_array_equal(again, expected)
            assert np.abs(again.astype(int) - original).max() <= 2
    finally:
        torch.set_num_threads(before)
