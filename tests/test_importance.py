"""Importance: bits go where errors weigh more, the rate stays, and a decoder knows nothing of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zarr
from hypothesis import assume, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ucray import CompressOptions, RunOptions, compress, synth
from ucray.cli import app
from ucray.cluster.options import options_from
from ucray.codec.chunk import ChunkFormat
from ucray.codec.decoder import ChunkDecoder
from ucray.codec.encoder import ChunkEncoder
from ucray.codec.importance import LEADING, ChunkImportance, cell_means, quality_shift
from ucray.codec.network import analysis_of, load_network
from ucray.codec.prior import lambda_of
from ucray.codec.shipped import shipped_weights
from ucray.codec.weights import Weights
from ucray.errors import DestinationError, SettingsError, SourceError
from ucray.grid import Box
from ucray.quality import ErrorSum
from ucray.storage.importance import ImportanceMap

Voxels = npt.NDArray[np.generic]

SHAPE = (64, 128, 128)
SERIAL = RunOptions(serial=True)


@given(st.floats(0.02, 60.0), st.integers(0, 255))
def test_quality_rises_to_where_a_bit_weighs_that_much_less(weight: float, quality: int) -> None:
    step = lambda_of(0.0) / lambda_of(1.0)
    assert lambda_of(float(quality + quality_shift(weight))) == pytest.approx(
        lambda_of(float(quality)) / weight, rel=step**0.51 - 1
    )


@given(st.tuples(*[st.integers(1, 20)] * 3), st.tuples(*[st.integers(1, 8)] * 3), st.integers(0, 2**32 - 1))
def test_cells_hold_means_of_what_there_is_of_them(
    shape: tuple[int, int, int], cell: tuple[int, int, int], seed: int
) -> None:
    weights = np.random.default_rng(seed).random(shape, np.float32)
    found = cell_means(weights, cell)
    assert found.shape == tuple(-(-n // c) for n, c in zip(shape, cell, strict=True))
    for index in np.ndindex(found.shape):
        inside = weights[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, cell, strict=True))]
        assert found[index] == pytest.approx(inside.mean(), rel=1e-5)


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
def test_weights_that_are_none_are_refused(tmp_path: Path, wrong: float) -> None:
    weights = np.ones(SHAPE, np.float32)
    weights[3, 4, 5] = wrong
    zarr.create_array(tmp_path / "map.zarr", data=weights)
    found = ImportanceMap.open(str(tmp_path / "map.zarr"), SHAPE, (8, 8, 8), None)
    with pytest.raises(SourceError, match="numbers from 0 on"):
        found.cells(Box((0, 0, 0), (8, 8, 8)))
    assert found.cells(Box((8, 0, 0), SHAPE)).shape == (7, 16, 16)


@given(factor=st.tuples(*[st.integers(1, 5)] * 3), start=st.tuples(*[st.integers(0, 20)] * 3))
def test_a_coarser_map_is_read_as_one_of_the_volume_s_size(
    tmp_path_factory: pytest.TempPathFactory, factor: tuple[int, int, int], start: tuple[int, int, int]
) -> None:
    shape = (23, 29, 31)
    coarse = np.random.default_rng(0).integers(
        0, 200, [-(-n // f) for n, f in zip(shape, factor, strict=True)], np.uint8
    )
    place = tmp_path_factory.mktemp("map") / "map.zarr"
    zarr.create_array(place, data=coarse)
    fine = coarse
    for axis, times in enumerate(factor):
        fine = fine.repeat(times, axis=axis)
    box = Box(start, (23, 27, 31))
    opened = ImportanceMap.open(str(place), shape, (4, 8, 8), None)
    # An axis this short fits several factors, and one that fits all axes is taken before others.
    assume(opened.factor == factor)
    found = opened.cells(box)
    np.testing.assert_allclose(found, cell_means(fine[box.slices], (4, 8, 8)), rtol=1e-6)


@pytest.mark.parametrize("factor", [2, 5, 8, 31, 32, 33, 64])
@pytest.mark.parametrize("covers", [True, False])
def test_a_map_of_one_factor_is_read_by_it(factor: int, covers: bool, tmp_path: Path) -> None:
    """Whether it covers the volume's end or stops short of it, and whatever else its axes would fit."""
    shape = (2047, 929, 1536)
    lengths = tuple(-(-n // factor) if covers else n // factor for n in shape)
    zarr.create_array(tmp_path / "map.zarr", shape=lengths, chunks=lengths, dtype=np.uint8)
    found = ImportanceMap.open(str(tmp_path / "map.zarr"), shape, (8, 8, 8), None)
    assert found.factor == (factor, factor, factor)


def test_bits_of_a_chunk_go_where_it_weighs_more(
    tiny_weights: Weights,
    chunk_format: Callable[[str], ChunkFormat],
    voxels_of: Callable[..., Voxels],
) -> None:
    chunk = chunk_format("uint8")
    voxels = voxels_of(chunk, chunk.shape, 5)
    cell = tiny_weights.config.latent_cell
    heavy = np.ones(tuple(n // c for n, c in zip(chunk.shape, cell, strict=True)), np.float32)
    heavy[:2] = 8.0
    encoder, decoder = ChunkEncoder(tiny_weights, chunk), ChunkDecoder(tiny_weights, chunk)

    def errors(importance: ChunkImportance | None) -> tuple[float, float]:
        decoded = decoder.decode(encoder.encode(voxels, 100, None, importance).data)
        return tuple(ErrorSum.between(voxels[part], decoded[part]).mse for part in (slice(16), slice(16, 32)))  # type: ignore[return-value]

    # The quality stays: what is compared is the rounding alone.
    plain, weighed = errors(None), errors(ChunkImportance(0, heavy[..., None] / heavy.mean()))
    assert weighed[0] < plain[0]
    assert weighed[1] > plain[1]
    level = ChunkImportance.of(np.full_like(heavy, 3.0), 3.0, chunk.shape, cell)
    assert encoder.encode(voxels, 100, None, level) == encoder.encode(voxels, 100)


@pytest.fixture(scope="module")
def encoder() -> ChunkEncoder:
    chunk = ChunkFormat((64, 64, 64), "uint8", 0.0, 128.0, 40.0)
    return ChunkEncoder(shipped_weights("em-fib-v14"), chunk)


def test_latents_weigh_by_what_a_network_sees_of_them(encoder: ChunkEncoder) -> None:
    """A network that sees one latent alone is sensitive to that one; in white noise all count alike."""
    weights = shipped_weights("em-fib-v14")
    analysis = analysis_of(weights.config)
    load_network(weights, "analysis", analysis)
    nothing = np.zeros(encoder.format.shape, bool)
    for cell, latent in (((1, 2, 3), 0), ((4, 7, 2), 37)):
        voxels = torch.zeros(1, 1, *encoder.format.shape, requires_grad=True)
        analysis.latents(voxels)[(0, latent, *cell)].backward()  # type: ignore[no-untyped-call]
        assert voxels.grad is not None
        found = encoder.sensitivity.of(voxels.grad[0].numpy(), nothing)
        assert found.shape == (8, 8, 8, weights.config.latents)
        assert found.argmax() == np.ravel_multi_index((*cell, latent), found.shape)
    noise = np.random.default_rng(0).standard_normal((4, *encoder.format.shape), np.float32)
    # Means of 4 * 512 squares on either side of the division deviate by 3 %.
    whole = encoder.sensitivity.of(3.0 * noise, nothing)
    means = np.square(whole).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(means, 9.0, rtol=0.2)
    # Where a chunk goes on beyond the volume, or is fill, it weighs as what there is of it.
    half = nothing.copy()
    half[:, 32:] = True
    cut = encoder.sensitivity.of(3.0 * noise[:, :, :32], nothing[:, :32])
    np.testing.assert_array_equal(cut, encoder.sensitivity.of(3.0 * noise, half))
    np.testing.assert_allclose(cut[:, :2], whole[:, :2], rtol=1e-4)
    others = cut[:, :4].mean(axis=(0, 1, 2))
    np.testing.assert_allclose(cut[:, 4:], np.broadcast_to(others, cut[:, 4:].shape), rtol=1e-5)
    shifts = [ChunkImportance.of_latents(one, 3.0).shift for one in (whole, cut)]
    # Latents that reach beyond the end weigh somewhat less.
    assert 0 <= shifts[0] - shifts[1] <= 3


def test_bits_of_a_cell_go_to_the_latents_that_weigh_more(encoder: ChunkEncoder, tmp_path: Path) -> None:
    synth(str(tmp_path / "em.zarr"), encoder.format.shape, seed=4)
    original: Any = zarr.open_group(tmp_path / "em.zarr", mode="r")["0"]
    (found,) = encoder.latents([original[:]], [128])

    def errors(weights: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float64]:
        _, coded = encoder.stream.quantise(found.codes, found.values, 128, weights)
        return np.asarray(np.square(coded.latents - found.values).mean(axis=(0, 1, 2)))

    weights = np.ones_like(found.values)
    np.testing.assert_array_equal(errors(weights), errors(None))
    weights[..., 5], weights[..., 9] = 1 / 16, 16.0
    plain, weighed = errors(None), errors(weights)
    assert weighed[5] > 1.1 * plain[5]
    assert weighed[9] < 0.9 * plain[9]


def test_a_chunk_whose_latents_all_weigh_more_has_a_finer_quality() -> None:
    weights = np.random.default_rng(0).uniform(0.5, 1.5, (2, 2, 2, LEADING + 8)).astype(np.float32)
    mean = float(weights[..., :LEADING].mean())
    same, heavy = (ChunkImportance.of_latents(times * weights, mean) for times in (1.0, 4.0))
    assert (same.shift, heavy.shift) == (0, quality_shift(4.0))
    np.testing.assert_allclose(heavy.weights, same.weights, rtol=1e-5)


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume, and a map at half its resolution: its second half along x weighs eight times as much."""
    folder = tmp_path_factory.mktemp("importance")
    synth(str(folder / "em.zarr"), SHAPE, seed=4)
    weights = np.full(tuple(n // 2 for n in SHAPE), 1, np.uint8)
    weights[..., SHAPE[2] // 4 :] = 8
    zarr.create_array(folder / "map.zarr", data=weights)
    return folder


def options(folder: Path, **others: Any) -> CompressOptions:
    values: dict[str, Any] = {"ratio": 64.0, "shard": "64,64,64", "importance": str(folder / "map.zarr")}
    return options_from(**values | others)


def halves(folder: Path, archive: str) -> list[float]:
    """PSNR of both halves along x."""
    original: Any = zarr.open_group(folder / "em.zarr", mode="r")["0"]
    decoded: Any = zarr.open_group(folder / archive, mode="r")["0"]
    half = SHAPE[2] // 2
    return [
        ErrorSum.between(original[..., part], decoded[..., part]).psnr(255.0)
        for part in (slice(half), slice(half, None))
    ]


def test_a_job_gives_bits_to_what_weighs_more_at_the_ratio_asked_for(volume: Path) -> None:
    source = str(volume / "em.zarr")
    weighed = compress(source, str(volume / "weighed"), options(volume), run_options=SERIAL)
    plain = compress(source, str(volume / "plain"), options(volume, importance=None), run_options=SERIAL)
    assert weighed.ratio == pytest.approx(64.0, rel=0.03)
    assert plain.ratio == pytest.approx(64.0, rel=0.03)
    light, heavy = halves(volume, "weighed")
    before = halves(volume, "plain")
    assert heavy > before[1] + 0.3
    assert light < before[0] - 0.3
    # What was asked for: the error as it is weighed.
    weighed_error, plain_error = (10 ** (-a / 10) + 8 * 10 ** (-b / 10) for a, b in ((light, heavy), before))
    assert weighed_error < plain_error
    told = json.loads((volume / "weighed" / "zarr.json").read_text())["attributes"]["ucray"]
    assert told["importance"].endswith("map.zarr")
    assert (
        "--importance"
        in json.loads((volume / "weighed" / "zarr.json").read_text())["attributes"]["provenance"]["command"]
    )


def test_ray_gives_the_bytes_of_the_serial_way(volume: Path) -> None:
    source = str(volume / "em.zarr")
    for name, how in (("serial", SERIAL), ("ray", RunOptions())):
        compress(source, str(volume / name), options(volume), run_options=how)
    names = sorted(path.relative_to(volume / "ray") for path in (volume / "ray").rglob("*") if path.is_file())
    assert len(names) == 2 + 2 * 4
    for path in names:
        assert (volume / "ray" / path).read_bytes() == (volume / "serial" / path).read_bytes()


def test_another_map_is_another_job(volume: Path) -> None:
    zarr.create_array(volume / "other.zarr", data=np.ones(SHAPE, np.uint8))
    source, archive = str(volume / "em.zarr"), str(volume / "first")
    compress(source, archive, options(volume), run_options=SERIAL)
    with pytest.raises(DestinationError):
        compress(source, archive, options(volume, importance=str(volume / "other.zarr")), run_options=SERIAL)


def test_maps_that_serve_for_nothing_are_refused_before_anything_is_written(volume: Path) -> None:
    zarr.create_array(volume / "odd.zarr", data=np.ones((7, 100, 128), np.uint8))
    zarr.create_array(volume / "zero.zarr", data=np.zeros(SHAPE, np.uint8))
    source, archive = str(volume / "em.zarr"), volume / "none"
    for wrong in (
        {"importance": str(volume / "odd.zarr")},
        {"importance": str(volume / "zero.zarr")},
        {"ratio": None, "lossless": True},
    ):
        with pytest.raises(SettingsError, match="--importance"):
            compress(source, str(archive), options(volume, **wrong), run_options=SERIAL)
    assert not archive.exists()


def test_the_command_line_plans_with_a_map(volume: Path) -> None:
    done = CliRunner().invoke(
        app,
        [
            *("plan", str(volume / "em.zarr"), str(volume / "planned"), "--json"),
            *("--importance", str(volume / "map.zarr")),
        ],
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["importance"] == str(volume / "map.zarr")
