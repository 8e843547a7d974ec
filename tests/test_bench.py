"""The benchmark: peers that really code, curves that compare rightly, a report that says all."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ucray.bench import siren
from ucray.bench.ours import VolumeCodec
from ucray.bench.peers import PEERS
from ucray.bench.report import bd_rate, write_report
from ucray.bench.run import Bench, Point, codec_names, run_bench
from ucray.bench.samples import Samples
from ucray.cli import app
from ucray.cluster.benchmark import bench
from ucray.codec.chunk import ChunkFormat, normalisation
from ucray.codec.encoder import ChunkEncoder
from ucray.codec.importance import LEADING, ChunkImportance
from ucray.codec.rate import CHUNK_OVERHEAD
from ucray.codec.shipped import shipped_weights
from ucray.codec.steering import Steering
from ucray.codec.tracer import MembraneNetwork, Normaliser, TracerNetwork
from ucray.codec.weights import Weights
from ucray.errors import SettingsError, WeightsError
from ucray.grid import Box, blocks, triple
from ucray.quality import SeamSum
from ucray.synthetic import synthetic_volume

POINT = Point("x", "volume", 0.0, 16.0, 30.0, 0.5, 1.0, 1.0, "1", 1.0, 1.0)

Voxels = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def volume() -> Voxels:
    """Cells and membranes, with a side that no block and no video frame divides."""
    return np.ascontiguousarray(synthetic_volume((16, 70, 67), 3, padding=0))


def curve(codec: str, ratios: list[float], psnrs: list[float]) -> list[Point]:
    return [replace(POINT, codec=codec, ratio=r, psnr=p) for r, p in zip(ratios, psnrs, strict=True)]


def test_half_the_bytes_at_equal_psnr_are_minus_fifty_percent() -> None:
    anchor = curve("a", [10, 20, 40, 80], [36, 33, 30, 27])
    half = curve("b", [20, 40, 80, 160], [36, 33, 30, 27])
    assert bd_rate(anchor, half) == pytest.approx(-50.0, abs=1e-6)
    assert bd_rate(half, anchor) == pytest.approx(100.0, abs=1e-6)
    assert bd_rate(anchor, anchor) == pytest.approx(0.0, abs=1e-9)


def test_bd_rate_is_over_the_psnr_that_both_reach() -> None:
    """Beyond the common range the second curve is absurdly bad; only its slope at the end may tell."""
    anchor = curve("a", [10, 20, 40, 80], [36, 33, 30, 27])
    other = curve("b", [20, 40, 80, 160, 161], [36, 33, 30, 27, 3])
    assert bd_rate(anchor, other) == pytest.approx(-50.0, abs=2.0)


@pytest.mark.parametrize(
    "other",
    [
        curve("b", [10, 20], [36, 33]),
        curve("b", [10, 20, 40], [20, 19, 18]),
        curve("b", [10, 20, 40], [float("inf")] * 3),
    ],
    ids=["two points", "no common psnr", "lossless"],
)
def test_curves_that_cannot_be_compared(other: list[Point]) -> None:
    assert bd_rate(curve("a", [10, 20, 40, 80], [36, 33, 30, 27]), other) is None


def test_points_beaten_in_both_are_left_out() -> None:
    anchor = curve("a", [10, 20, 40, 80], [36, 33, 30, 27])
    worse = [*anchor, replace(POINT, ratio=19.0, psnr=29.0)]
    assert bd_rate(anchor, worse) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", sorted(PEERS))
def test_peers_code_a_volume_coarser_and_coarser(name: str, volume: Voxels) -> None:
    peer = PEERS[name]
    if (reason := peer.missing()) is not None:
        pytest.skip(reason)
    original = volume[:8, :, :] if name != "siren" else volume[:8, :32, :32]
    sizes, errors = [], []
    for setting in (peer.settings[0], peer.settings[-1]):
        data = peer.encode(np.ascontiguousarray(original), setting)
        decoded = peer.decode(data, triple(iter(original.shape)))
        assert decoded.shape == original.shape
        assert decoded.dtype == np.uint8
        sizes.append(len(data))
        errors.append(float(np.mean((decoded.astype(float) - original) ** 2)))
        # A shift or stretch of all values would be a mistake of ours, not the codec's loss.
        assert abs(float(decoded.mean()) - float(original.mean())) < 3.0
    assert sizes[0] > sizes[1]
    assert errors[0] < errors[1]
    # Any of them tells more of the volume than its mean does.
    assert errors[0] < original.var()


@pytest.mark.parametrize("ratio", [16.0, 100.0])
def test_a_siren_is_as_wide_as_its_budget_allows(ratio: float) -> None:
    block = np.zeros((16, 32, 32), np.uint8)
    width = siren.width_for(block.size, ratio)
    counts = [sum(p.numel() for p in siren.Siren(w).parameters()) for w in (width, width + 1)]
    assert counts[0] * 2 <= block.size / ratio < counts[1] * 2


def test_samples_of_other_dtypes_come_back_within_half_a_step() -> None:
    values = np.random.default_rng(0).integers(-3000, 9000, (4, 5, 6)).astype(np.int16)
    samples = Samples.of(values)
    assert samples.values.min() == 0
    assert samples.values.max() == 255
    assert np.abs(samples.back(samples.values) - values).max() <= samples.step / 2 + 1e-9
    flat = Samples.of(np.full((2, 2, 2), 7.5, np.float32))
    np.testing.assert_array_equal(flat.back(flat.values), 7.5)


def test_blocks_cover_a_volume_once() -> None:
    counts = np.zeros((5, 9, 7), int)
    for box in blocks((5, 9, 7), (4, 4, 4)):
        counts[box.slices] += 1
    assert (counts == 1).all()


def test_ucray_s_bytes_are_those_that_decode(tiny_weights: Weights, volume: Voxels) -> None:
    with VolumeCodec(volume, tiny_weights, (16, 32, 32), 0.0) as codec:
        coded = codec.encode(128)
        assert len(coded.chunks) == 9
        assert coded.nbytes == sum(map(len, coded.chunks)) + 9 * CHUNK_OVERHEAD
        decoded, again = codec.decode(coded), codec.decode(coded)
    assert decoded.shape == volume.shape
    assert np.mean((decoded.astype(float) - volume) ** 2) < volume.var() / 2
    np.testing.assert_array_equal(again, decoded)


def test_each_half_is_steered_by_its_tracer() -> None:
    """A chunk has the bytes that steering gives it by the tracer where its middle is."""
    chunk, weights = (64, 64, 64), shipped_weights("em-fib-v14")
    whole = synthetic_volume((64, 64, 128), 3, padding=0)
    places = Box((0, 0, 0), (64, 64, 60)), Box((0, 0, 60), (64, 64, 128))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        networks = [MembraneNetwork(flat=False).eval().requires_grad_(False) for _ in places]
    tracers = [TracerNetwork(network, Normaliser.of(whole)) for network in networks]
    with VolumeCodec(whole, weights, chunk, 0.0, list(zip(places, tracers, strict=True))) as codec:
        coded = codec.encode(110)
        assert whole.nbytes / codec.encode(codec.quality_for(40)).nbytes == pytest.approx(40, rel=0.06)

    encoder = ChunkEncoder(weights, ChunkFormat(chunk, "uint8", 0.0, *normalisation([whole], 0.0)))
    steering = [Steering(encoder, tracer) for tracer in tracers]
    boxes = list(blocks((64, 64, 128), chunk))
    views = []
    for box, by in zip(boxes, steering, strict=True):
        views.append(by.view(whole, box))
    mean = float(np.mean([view.weights[..., :LEADING] for view in views]))
    for data, box, by, view in zip(coded.chunks, boxes, steering, views, strict=True):
        weighed = ChunkImportance.of_latents(view.weights, mean)
        # With its place, as an archive has it.
        place = triple(start // size for start, size in zip(box.start, chunk, strict=True))
        (prepared,) = encoder.prepare([whole[box.slices]], [place], [weighed])
        (draft,) = encoder.drafts_at([by.steered(prepared, view, 110, mean)], 110)
        assert encoder.pack(draft).data == data
        assert encoder.pack(encoder.drafts_at([prepared], 110)[0]).data != data


def test_a_run_measures_ours_and_theirs(tiny_weights: Weights, volume: Voxels) -> None:
    seen: list[str] = []
    found = run_bench(
        volume, tiny_weights, (16, 32, 32), codecs=["ucray", "ucray-teacher", "sz3"], ratios=[40, 100],
        watch=seen.append,
    )  # fmt: skip
    assert seen == ["ucray", "ucray-teacher", "sz3"]
    assert found.missing == {}
    by_codec = {name: [p for p in found.points if p.codec == name] for name in ("ucray", "ucray-teacher")}
    student, teacher = by_codec["ucray"], by_codec["ucray-teacher"]
    # The same stream, decoded by another network.
    assert [p.ratio for p in student] == [p.ratio for p in teacher]
    assert [p.psnr for p in student] != [p.psnr for p in teacher]
    assert student[0].ratio < student[1].ratio
    assert all(p.encode_speed > 0 and p.decode_speed > 0 and -1 <= p.ssim <= 1 for p in found.points)
    assert len([p for p in found.points if p.codec == "SZ3"]) >= 2


def test_seams_are_those_of_ucray_s_chunks(tiny_weights: Weights, volume: Voxels) -> None:
    """Of ours and of a peer that codes the volume as one."""
    chunk = (16, 32, 32)
    found = run_bench(volume, tiny_weights, chunk, codecs=["ucray", "sz3"], ratios=[40])
    ours = found.points[0]
    with VolumeCodec(volume, tiny_weights, chunk, 0.0) as codec:
        decoded = codec.decode(codec.encode(int(ours.setting)))
    expected = SeamSum.between(volume, decoded, chunk)
    assert (ours.seam_error, ours.seam_step) == (expected.error, expected.step)
    peer = PEERS["sz3"]
    theirs = next(point for point in found.points if point.codec == "SZ3")
    back = peer.decode(peer.encode(volume, theirs.setting), triple(iter(volume.shape)))
    expected = SeamSum.between(volume, back, chunk)
    assert (theirs.seam_error, theirs.seam_step) == (expected.error, expected.step)
    assert ours.seam_error != ours.seam_step


def test_weights_that_cannot_encode_are_refused_before_a_process_starts(
    tiny_weights: Weights, volume: Voxels
) -> None:
    with pytest.raises(WeightsError, match="no analysis"):
        VolumeCodec(volume, tiny_weights.decoder(), (32, 32, 32), 0.0)


def test_what_cannot_run_is_named(volume: Voxels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "zfp", replace(PEERS["zfp"], missing=lambda: "zfp went home"))
    found = run_bench(volume, None, (16, 32, 32), codecs=["ucray", "zfp"])
    assert found == Bench((), {"ucray": "no weights were given", "zfp": "zfp went home"})


def test_a_run_that_is_cut_off_leaves_what_it_has(volume: Voxels, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setitem(PEERS, "zfp", replace(PEERS["zfp"], encode=broken))
    left: list[Bench] = []
    with pytest.raises(KeyboardInterrupt):
        run_bench(volume, None, (16, 32, 32), codecs=["sz3", "zfp"], ratios=[40], so_far=left.append)
    assert {point.codec for point in left[-1].points} == {"SZ3"}


def test_unknown_codecs_are_refused(volume: Voxels) -> None:
    with pytest.raises(SettingsError, match="h266: choose from ucray"):
        run_bench(volume, None, (16, 32, 32), codecs=["h266"])


def test_a_report_holds_every_point_and_what_is_missing(tmp_path: Path) -> None:
    points = [*curve("ucray", [10, 20, 40], [36, 33, 30]), *curve("x265 slow", [5, 10, 20], [36, 33, 30])]
    files = write_report(Bench(tuple(points), {"av1": "ffmpeg is not installed"}), str(tmp_path), "cells")
    assert sorted(files) == sorted(p.name for p in tmp_path.iterdir())
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["codec"], float(r["ratio"]), float(r["psnr"])) for r in rows] == [
        (p.codec, p.ratio, p.psnr) for p in points
    ]
    text = (tmp_path / "table.md").read_text()
    assert "| x265 slow | -50.0 % |" in text
    assert "Missing: av1: ffmpeg is not installed." in text
    for name in ("psnr", "ssim"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 300
        assert ElementTree.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")


def test_the_command_writes_a_report(tmp_path: Path, tiny_weights: Weights) -> None:
    source, weights, out = tmp_path / "v.zarr", tmp_path / "w.safetensors", tmp_path / "report"
    weights.write_bytes(tiny_weights.to_bytes())
    run: Callable[..., Any] = CliRunner().invoke
    assert run(app, ["synth", str(source), "--shape", "32,64,64"]).exit_code == 0
    done = run(
        app,
        [
            *("bench", str(source), "-o", str(out), "--weights", str(weights), "--codecs", "ucray,sz3"),
            *("--ratios", "40,80", "--roi", "0:32,0:64,0:32", "--chunk", "32,32,32", "--json"),
        ],
    )
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert {point["codec"] for point in document["points"]} == {"ucray", "SZ3"}
    assert document["missing"] == {}
    assert (out / "table.md").read_text().startswith("# v.zarr")


FILTERED_STAGES = {"anticipation", "post-filter"}


@pytest.mark.parametrize("filtered", [False, True])
def test_the_command_times_the_stages(
    filtered: bool, tmp_path: Path, tiny_weights: Weights, filtered_weights: Weights
) -> None:
    source, weights, out = tmp_path / "v.zarr", tmp_path / "w.safetensors", tmp_path / "report"
    weights.write_bytes((filtered_weights if filtered else tiny_weights).to_bytes())
    run: Callable[..., Any] = CliRunner().invoke
    assert run(app, ["synth", str(source), "--shape", "64,64,64"]).exit_code == 0
    common = ["bench", str(source), "-o", str(out), "--weights", str(weights)]
    done = run(app, [*common, "--device", "cpu", "--batch", "2", "--json"])
    assert done.exit_code == 0, done.output
    stages = json.loads(done.stdout)["stages"]
    names = [stage["name"] for stage in stages]
    assert [name for name in names if name not in FILTERED_STAGES][::5] == ["wavelet", "synthesis"]
    assert FILTERED_STAGES & set(names) == (FILTERED_STAGES if filtered else set())
    # A chunk of 64^3 bytes: its time and its speed say the same.
    for stage in stages:
        assert stage["milliseconds"] * stage["speed"] == pytest.approx(64**3 / 1e3, rel=1e-6)
    assert (out / "stages.md").read_text().count("|") > 6 * 5
    refused = run(app, [*common, "--device", "abacus"])
    assert "no such device" in str(refused.exception)


def test_the_command_times_a_job_against_the_bare_loop(tmp_path: Path, tiny_weights: Weights) -> None:
    source, weights, out = tmp_path / "v.zarr", tmp_path / "w.safetensors", tmp_path / "report"
    weights.write_bytes(tiny_weights.to_bytes())
    run: Callable[..., Any] = CliRunner().invoke
    # Three shards of four chunks of 64 a side, the last two of them cut off.
    assert run(app, ["synth", str(source), "--shape", "64,64,576"]).exit_code == 0
    common = ["bench", str(source), "-o", str(out), "--pipeline"]
    done = run(app, [*common, "--weights", str(weights), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    # The start of Ray's workers takes seconds, the three shards do not.
    assert 0 < found["whole"] < found["steady"]
    assert found["efficiency"] == pytest.approx(found["steady"] / found["bare"])
    # The archive that it wrote is gone.
    assert [path.name for path in out.iterdir()] == ["pipeline.md"]
    few = run(app, [*common, "--weights", str(weights), "--roi", "0:64,0:64,0:256"])
    assert "1 shards" in str(few.exception)
    assert "give --weights" in str(run(app, common).exception)
    assert run(app, [*common, "--weights", str(weights), "--device", "cpu"]).exit_code == 2


def test_levels_are_compared_two_ways(tmp_path: Path, tiny_weights: Weights) -> None:
    source, out, weights = tmp_path / "v.zarr", tmp_path / "report", tmp_path / "w.safetensors"
    weights.write_bytes(tiny_weights.to_bytes())
    run: Callable[..., Any] = CliRunner().invoke
    assert run(app, ["synth", str(source), "--shape", "64,64,128"]).exit_code == 0
    common = ["bench", str(source), "-o", str(out), "--levels", "2", "--ratios", "4"]
    done = run(app, [*common, "--weights", str(weights), "--json"])
    assert done.exit_code == 0, done.output
    points = json.loads(done.stdout)["levels"]
    assert {point["level"] for point in points} == {1, 2}
    for level in (1, 2):
        shared, *coded = [point for point in points if point["level"] == level]
        assert (shared["quality"], shared["nbytes"]) == (None, 0)
        sizes = [point["nbytes"] for point in coded]
        assert sizes == sorted(sizes)
        assert all(0 < point["psnr"] < shared["psnr"] for point in coded[:1])
    assert "averaged from level 0" in (out / "levels.md").read_text()
    assert "give --weights" in str(run(app, common).exception)
    assert run(app, [*common, "--weights", str(weights), "--device", "cpu"]).exit_code == 2


@pytest.mark.parametrize("ratios", ["1", "a,b", "16,,32", "inf", ""])
def test_ratios_that_are_none_are_refused(ratios: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", str(tmp_path), "-o", str(tmp_path), "--ratios", ratios])
    assert isinstance(done.exception, SettingsError)


def test_a_region_too_large_for_one_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "v.zarr"
    assert CliRunner().invoke(app, ["synth", str(source), "--shape", "32,32,32"]).exit_code == 0
    monkeypatch.setattr("ucray.cluster.benchmark.LARGEST", 100)
    with pytest.raises(SettingsError, match="smaller --roi"):
        bench(str(source), str(tmp_path / "out"), None)


def test_names_are_those_of_the_table() -> None:
    assert codec_names()[:2] == ("ucray", "ucray-teacher")
    assert set(codec_names()[2:]) == set(PEERS)
