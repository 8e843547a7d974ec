"""A tracer: what it sees of errors says where a job's bits go; it is data, and damaged ones are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save
from typer.testing import CliRunner

from ucray import CompressOptions, RunOptions, compress, synth
from ucray.bench import crops, unet
from ucray.bench.ours import VolumeCodec
from ucray.cli import app
from ucray.cluster.options import options_from
from ucray.cluster.plan import TRACER_MEMORY, plan_compress
from ucray.cluster.tracing import Tracing, teach
from ucray.codec import tracer
from ucray.codec.chunk import ChunkFormat
from ucray.codec.decoder import ChunkDecoder
from ucray.codec.encoder import ChunkEncoder
from ucray.codec.importance import LEADING, ChunkImportance
from ucray.codec.scenes import angles_of, distance_gradient, scenes
from ucray.codec.shipped import shipped_weights
from ucray.codec.steering import Steering
from ucray.codec.tracer import (
    FORMAT,
    MIRRORED,
    MembraneNetwork,
    Normaliser,
    TracerNetwork,
    logits_of,
    mirrored,
    sign_gradients,
)
from ucray.errors import DestinationError, SettingsError, WeightsError
from ucray.grid import Box
from ucray.storage.tracer import StoredTracer
from ucray.storage.volume import open_volume

SHAPE = (64, 128, 128)
SERIAL = RunOptions(serial=True)
RATIO = 24.0


def network_of(seed: int = 0, *, flat: bool = False) -> MembraneNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MembraneNetwork(flat=flat).eval().requires_grad_(False)


def tracer_of(seed: int = 0) -> TracerNetwork:
    return TracerNetwork(network_of(seed), Normaliser(128.0, 40.0))


@pytest.mark.parametrize("flat", [False, True])
def test_a_file_gives_back_what_was_written(flat: bool) -> None:
    written = TracerNetwork(network_of(3, flat=flat), Normaliser(100.5, 31.25))
    read = TracerNetwork.from_bytes(written.to_bytes())
    assert (read.normaliser, read.network.flat) == (written.normaliser, flat)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 1, 16, 16, 16), np.float32))
    assert torch.equal(read.network(x), written.network(x))


FILE = tracer_of().to_bytes()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, len(FILE) - 1))
def test_a_file_that_ends_early_is_refused(length: int) -> None:
    with pytest.raises(WeightsError, match="no tracer, or a damaged one"):
        TracerNetwork.from_bytes(FILE[:length])


def test_files_of_something_else_are_refused() -> None:
    with pytest.raises(WeightsError, match="no tracer, or a damaged one"):
        TracerNetwork.from_bytes(shipped_weights("em-fib-v14").to_bytes())
    first = tracer_of()
    for offset, scale in ((np.nan, 1.0), (0.0, 0.0), (0.0, -1.0), (0.0, np.inf)):
        with pytest.raises(WeightsError, match="units"):
            TracerNetwork.from_bytes(TracerNetwork(first.network, Normaliser(offset, scale)).to_bytes())
    other = tracer_of()
    next(other.network.parameters())[0] = float("nan")
    with pytest.raises(WeightsError, match="no number"):
        TracerNetwork.from_bytes(other.to_bytes())
    header = {"flat": False, "offset": 10**400, "scale": 1.0}
    with pytest.raises(WeightsError, match="no tracer, or a damaged one"):
        TracerNetwork.from_bytes(save(load(FILE), metadata={FORMAT: json.dumps(header)}))
    tensors = load(FILE)
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    header = json.loads(json.loads(FILE[8 : 8 + int.from_bytes(FILE[:8], "little")])["__metadata__"][FORMAT])
    with pytest.raises(WeightsError, match="missing or misshapen"):
        TracerNetwork.from_bytes(save(wide, metadata={FORMAT: json.dumps(header)}))
    head = FILE.replace(b'"flat": false', b'"flat": true ').replace(
        b'\\"flat\\": false', b'\\"flat\\": true '
    )
    assert head != FILE
    with pytest.raises(WeightsError, match="missing or misshapen"):
        TracerNetwork.from_bytes(head)


def test_a_box_is_seen_with_what_lies_around_it() -> None:
    """Its gradients are those of the whole, of which they are cut, as far as the network sees."""
    seen = tracer_of()
    voxels = np.random.default_rng(0).normal(128, 40, (16, 80, 80)).astype(np.float32)
    box = Box((0, 16, 24), (16, 48, 56))
    found = seen.gradients(voxels, box, draws=2, seed=0)
    assert found.shape == (2, *box.shape)
    around = Box((0, 0, 8), (16, 64, 72))
    same = seen.gradients(voxels[around.slices], box.relative_to(around), draws=2, seed=0)
    np.testing.assert_array_equal(found, same)
    # What there is around a box changes what is said of it.
    alone = seen.gradients(voxels[box.slices], Box((0, 0, 0), box.shape), draws=2, seed=0)
    assert np.abs(alone - found).max() > 0.0


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("tile", [(80, 80, 80), (16, 16, 24)])
@pytest.mark.parametrize("image", [0, 5])
def test_gradients_are_those_of_the_voxels_there_are(
    flat: bool, tile: tuple[int, int, int], image: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a volume of any shape: what lies beyond its end is not there to be found, and repeats what is."""
    monkeypatch.setattr(tracer, "fast_in_bfloat16", lambda: False)
    monkeypatch.setattr(tracer, "TILE", tile)
    monkeypatch.setattr(tracer, "FLAT_TILE", tile)
    seen = TracerNetwork(network_of(2, flat=flat), Normaliser(128.0, 40.0))
    random = np.random.default_rng(0)
    shape = (13, 18, 21)
    box = Box((0, 0, 0), shape)
    before = random.normal(128, 40, shape).astype(np.float32)
    after = before + random.normal(0, 8, shape).astype(np.float32)
    found = scenes(seen, before, box)
    gradient = distance_gradient(seen, found, after, box, image).astype(np.float64)
    assert gradient.shape == shape

    def distance(voxels: Any) -> float:
        """Summed over tiles and what is seen around each, as each of them is looked at."""
        total = 0.0
        axes = MIRRORED[image]
        for scene in found:
            x = mirrored(seen.input_of(voxels[scene.around.slices]), axes)
            here = angles_of(logits_of(seen.network, x).flip(axes))
            total += float(2.0 * (here - scene.angles).double().square().sum())
        return total

    if tile == (80, 80, 80):
        assert len(found) == 1
        assert found[0].angles.shape == (1, 1, *shape)
        # At the end itself a voxel counts as often as it is repeated.
        change = np.zeros(shape, np.float32)
        change[-1] = gradient[-1] / np.abs(gradient[-1]).max()
        step = 0.5
        with torch.inference_mode():
            rise = (distance(after + step * change) - distance(after - step * change)) / (2 * step)
        assert (gradient * change).sum() / 40.0 == pytest.approx(rise, rel=0.02)
    else:
        assert len(found) > 1
        whole = distance_gradient(seen, scenes(seen, before, box), after, box, image)
        np.testing.assert_array_equal(gradient.astype(np.float32), whole)


def test_what_is_to_be_kept_is_what_a_tracer_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says the mean over a volume's mirror images: what `bench` and people trace by."""
    monkeypatch.setattr(tracer, "fast_in_bfloat16", lambda: False)
    seen = tracer_of(2)
    voxels = np.random.default_rng(0).normal(128, 40, (16, 24, 32)).astype(np.float32)
    (scene,) = scenes(seen, voxels, Box((0, 0, 0), voxels.shape))
    said = unet._found(seen.network, seen.normaliser.normalised(voxels)).astype(np.float64)
    angles = np.arcsin(np.sqrt(said))
    np.testing.assert_allclose(scene.angles[0, 0], angles, atol=1e-5)
    # One image alone says something else.
    with torch.inference_mode():
        alone = angles_of(logits_of(seen.network, seen.input_of(voxels)))
    assert np.abs(np.asarray(alone[0, 0]) - angles).max() > 1e-3


def test_what_is_no_number_hides_nothing_else() -> None:
    seen = tracer_of()
    voxels = np.random.default_rng(0).normal(128, 40, (16, 16, 16)).astype(np.float32)
    voxels[0, 0, :3] = np.nan, np.inf, 3e38
    found = seen.gradients(voxels, Box((0, 0, 0), voxels.shape), draws=1, seed=0)
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 0.0


def test_gradients_do_not_depend_on_how_a_box_is_cut_into_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sign for each voxel's probability would: a tile draws its own. Where only one is left, nothing."""
    voxels = np.random.default_rng(0).standard_normal((16, 40, 16)).astype(np.float32)
    everything = Box((0, 0, 0), (16, 40, 16))
    network = network_of()
    strength = []
    for tile in ((80, 80, 80), (16, 16, 16)):
        monkeypatch.setattr(tracer, "TILE", tile)
        found = sign_gradients(network, voxels, everything, draws=64, seed=0)
        strength.append(np.square(found).mean())
    # A mean over 10 000 voxels of 64 squares each.
    assert strength[1] == pytest.approx(strength[0], rel=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume, and a tracer that has begun to learn which of its voxels are dark."""
    place = tmp_path_factory.mktemp("tracer")
    synth(str(place / "em.zarr"), SHAPE, seed=4)
    original: Any = zarr.open_group(place / "em.zarr", mode="r")["0"]
    zarr.create_array(place / "labels.zarr", data=(original[:] > 110).astype(np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crops, "CROP", 24**3)
        tracing = Tracing(str(place / "em.zarr"), str(place / "labels.zarr"), (0,), network_steps=60)
        teach(tracing, str(place / "tracer.safetensors"))
    (place / "other.safetensors").write_bytes(tracer_of(1).to_bytes())
    return place


def options(folder: Path, **others: Any) -> CompressOptions:
    values: dict[str, Any] = {"ratio": RATIO, "shard": "64,64,64"}
    values["traced_by"] = str(folder / "tracer.safetensors")
    return options_from(**values | others)


def moved(seen: TracerNetwork, before: Any, after: Any) -> float:
    """How far what is found in mirror images of voxels is from what is said of others, beyond their own.

    What it says is the mean over images.
    """
    first, second = (
        torch.from_numpy(seen.normaliser.normalised(voxels))[None, None] for voxels in (before, after)
    )
    with torch.inference_mode():
        found, now = (
            torch.cat([seen.network(x.flip(axes)).sigmoid().flip(axes) for axes in MIRRORED])
            for x in (first, second)
        )
    said = found.mean(0).sqrt().asin()
    far, further = (float((images.sqrt().asin() - said).square().mean()) for images in (found, now))
    return further - far


def test_a_steered_chunk_moves_what_is_found_less_than_one_that_is_weighed(folder: Path) -> None:
    original: Any = zarr.open_group(folder / "em.zarr", mode="r")["0"]
    voxels = original[:, :64, :64]
    seen = TracerNetwork.from_bytes((folder / "tracer.safetensors").read_bytes())
    weights = shipped_weights("em-fib-v14")
    chunk = ChunkFormat((64, 64, 64), "uint8", 0.0, float(voxels.mean()), float(voxels.std()))
    encoder, decoder = ChunkEncoder(weights, chunk), ChunkDecoder(weights, chunk)
    steering = Steering(encoder, seen)
    view = steering.view(voxels, Box((0, 0, 0), voxels.shape))
    mean = float(view.weights[..., :LEADING].mean())
    (plain,) = encoder.prepare([voxels])
    weighed = replace(plain, importance=ChunkImportance.of_latents(view.weights, mean))
    packed = [
        encoder.pack(encoder.drafts_at([one], 180)[0]).data
        for one in (plain, weighed, steering.steered(weighed, view, 180, mean))
    ]
    sizes = [len(data) for data in packed]
    plain_moved, weighed_moved, steered_moved = (
        moved(seen, voxels, decoded) for decoded in decoder.decode_many(packed)
    )
    assert steered_moved < 0.85 * weighed_moved
    # A quarter of the chunk is fill, which costs next to nothing.
    assert sizes[2] < 1.1 * sizes[1]
    assert steered_moved < plain_moved
    assert sizes[2] < 0.75 * sizes[0]


def test_fill_and_constants_are_not_steered(folder: Path) -> None:
    """What a tracer finds in fill does not change; a chunk without a network's part is left as it is."""
    original: Any = zarr.open_group(folder / "em.zarr", mode="r")["0"]
    voxels = original[:, :64, :64].copy()
    voxels[:, :, 40:] = 0
    chunk = ChunkFormat((64, 64, 64), "uint8", 0.0, 128.0, 40.0)
    encoder = ChunkEncoder(shipped_weights("em-fib-v14"), chunk)
    steering = Steering(encoder, tracer_of())
    view = steering.view(voxels, Box((0, 0, 0), voxels.shape))
    mean = float(view.weights[..., :LEADING].mean())
    (masked,) = encoder.prepare([voxels])
    shift = steering.steered(masked, view, 128, mean).shift
    assert shift is not None
    strength = np.square(shift).mean(axis=(0, 1, 3))
    # Latents reach some cells further than their own.
    assert strength[:5].min() > 0.0
    assert strength[7] == 0.0
    for value in (0, 7):
        (alike,) = encoder.prepare([np.full_like(voxels, value)])
        assert steering.steered(alike, view, 128, mean) is alike


def test_a_tracer_that_finds_no_numbers_is_refused_before_anything_is_written(folder: Path) -> None:
    wild = tracer_of()
    for tensor in wild.network.parameters():
        tensor.mul_(1e30)
    place, archive = folder / "wild.safetensors", folder / "nothing"
    place.write_bytes(wild.to_bytes())
    with pytest.raises(WeightsError, match="no number"):
        compress(
            str(folder / "em.zarr"), str(archive), options(folder, traced_by=str(place)), run_options=SERIAL
        )
    assert not archive.exists()


def test_a_job_moves_what_the_tracer_finds_less_at_the_ratio_asked_for(folder: Path) -> None:
    source = str(folder / "em.zarr")
    steered = compress(source, str(folder / "seen"), options(folder), run_options=SERIAL)
    plain = compress(source, str(folder / "plain"), options(folder, traced_by=None), run_options=SERIAL)
    # A quality is 4 % of the bytes here; how many steering adds is known to 3 %.
    assert 0.97 * RATIO < steered.ratio < 1.07 * RATIO
    assert plain.ratio == pytest.approx(RATIO, rel=0.04)
    seen = TracerNetwork.from_bytes((folder / "tracer.safetensors").read_bytes())
    volumes: list[Any] = [
        zarr.open_group(folder / name, mode="r")["0"] for name in ("em.zarr", "seen", "plain")
    ]
    original, after, before = (volume[:] for volume in volumes)
    assert moved(seen, original, after) < 0.8 * moved(seen, original, before)
    told = json.loads((folder / "seen" / "zarr.json").read_text())["attributes"]
    assert told["ucray"]["importance"].endswith("tracer.safetensors")
    assert f"--traced-by {folder / 'tracer.safetensors'}" in told["provenance"]["command"]


def test_ray_gives_the_bytes_of_the_serial_way(folder: Path) -> None:
    for name, how in (("serial", SERIAL), ("ray", RunOptions())):
        compress(str(folder / "em.zarr"), str(folder / name), options(folder), run_options=how)
    names = sorted(path.relative_to(folder / "ray") for path in (folder / "ray").rglob("*") if path.is_file())
    assert len(names) == 2 + 2 * 4
    for path in names:
        assert (folder / "ray" / path).read_bytes() == (folder / "serial" / path).read_bytes()


def test_another_tracer_is_another_job(folder: Path) -> None:
    source, archive = str(folder / "em.zarr"), str(folder / "first")
    compress(source, archive, options(folder), run_options=SERIAL)
    other = options(folder, traced_by=str(folder / "other.safetensors"))
    with pytest.raises(DestinationError):
        compress(source, archive, other, run_options=SERIAL)


def test_a_tracer_that_changes_while_a_job_runs_is_noticed(tmp_path: Path) -> None:
    place = tmp_path / "tracer.safetensors"
    place.write_bytes(FILE)
    stored = StoredTracer.open(str(place), None)
    assert stored.read() == FILE
    place.write_bytes(tracer_of(1).to_bytes())
    with pytest.raises(WeightsError, match="has changed"):
        stored.read()


def test_what_serves_for_nothing_is_refused_before_anything_is_written(folder: Path) -> None:
    zarr.create_array(folder / "map.zarr", data=np.ones(SHAPE, np.uint8))
    (folder / "cut.safetensors").write_bytes(FILE[:1000])
    archive = folder / "none"

    def attempt(**wrong: Any) -> None:
        compress(str(folder / "em.zarr"), str(archive), options(folder, **wrong), run_options=SERIAL)

    with pytest.raises(SettingsError, match="give one of them"):
        attempt(importance=str(folder / "map.zarr"))
    with pytest.raises(SettingsError, match="--traced-by spreads errors"):
        attempt(ratio=None, max_error=3.0)
    with pytest.raises(WeightsError, match="damaged"):
        attempt(traced_by=str(folder / "cut.safetensors"))
    with pytest.raises(WeightsError, match="there is no tracer at"):
        attempt(traced_by=str(folder / "nowhere.safetensors"))
    assert not archive.exists()


def test_a_plan_has_room_for_the_tracer(folder: Path) -> None:
    volume = open_volume(str(folder / "em.zarr"), None, None)
    config = shipped_weights("em-fib-v14").config
    stored = StoredTracer.open(str(folder / "tracer.safetensors"), None)
    plain, traced = (plan_compress(volume, config, CompressOptions(), None, one) for one in (None, stored))
    assert traced.peak_memory == plain.peak_memory + TRACER_MEMORY
    tight = options_from(memory=str(traced.peak_memory - 1), shard="64,128,128")
    with pytest.raises(SettingsError, match="largest that fits is 64,64,64"):
        plan_compress(volume, config, tight, None, stored)


def test_weights_with_an_analysis_of_networks_are_refused(folder: Path) -> None:
    volume = open_volume(str(folder / "em.zarr"), None, None)
    stored = StoredTracer.open(str(folder / "tracer.safetensors"), None)
    with pytest.raises(SettingsError, match="weights whose analysis is linear"):
        plan_compress(volume, TINY, CompressOptions(), None, stored)


def test_a_tracer_learns_from_labels(folder: Path) -> None:
    original: Any = zarr.open_group(folder / "em.zarr", mode="r")["0"]
    taught = TracerNetwork.from_bytes((folder / "tracer.safetensors").read_bytes())
    seen = torch.from_numpy(taught.normaliser.normalised(original[:]))[None, None]
    with torch.inference_mode():
        logits = taught.network(seen)[0, 0].numpy()
    dark = original[:] <= 110
    assert logits[dark].mean() > logits[~dark].mean() + 0.5


def test_the_command_line_teaches_a_tracer_and_plans_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crops, "CROP", 16**3)
    made = folder / "taught.safetensors"
    teaching = ["tracer", str(folder / "em.zarr"), str(made), "--labels", str(folder / "labels.zarr")]
    teaching += ["--membrane", "0", "--network-steps", "2", "--json"]
    result = CliRunner().invoke(app, teaching)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bytes"] == made.stat().st_size
    TracerNetwork.from_bytes(made.read_bytes())
    # What is there is not written over, and that is said before anything is learnt.
    tracing = Tracing(str(folder / "em.zarr"), str(folder / "labels.zarr"), (0,), network_steps=10**9)
    with pytest.raises(DestinationError, match="exists"):
        teach(tracing, str(made))
    planned = ["plan", str(folder / "em.zarr"), str(folder / "planned"), "--traced-by", str(made), "--json"]
    result = CliRunner().invoke(app, planned)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["traced_by"] == str(made)
    # What lies around sampled chunks is read too.
    result = CliRunner().invoke(app, [*planned[:3], "--json"])
    assert json.loads(result.stdout)["gets"] < told["gets"]


def test_voxels_that_are_no_numbers_teach_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fill of NaN, say; and a network that learns no numbers is not written."""
    monkeypatch.setattr(crops, "CROP", 16**3)
    original: Any = zarr.open_group(folder / "em.zarr", mode="r")["0"]
    voxels = original[:, :64, :64].astype(np.float32)
    voxels[:20], voxels[20, 0, :2] = np.nan, (np.inf, -np.inf)
    zarr.create_array(tmp_path / "em.zarr", data=voxels)
    zarr.create_array(tmp_path / "labels.zarr", data=(original[:, :64, :64] > 110).astype(np.uint8))
    tracing = Tracing(str(tmp_path / "em.zarr"), str(tmp_path / "labels.zarr"), (0,), network_steps=3)
    teach(tracing, str(tmp_path / "tracer.safetensors"))
    taught = TracerNetwork.from_bytes((tmp_path / "tracer.safetensors").read_bytes())
    assert taught.normaliser.offset == pytest.approx(voxels[21:].mean(), rel=0.01)
    monkeypatch.setattr(unet, "RATE", 1e30)
    with pytest.raises(WeightsError, match="its training diverged"):
        teach(tracing, str(tmp_path / "wild.safetensors"))
    assert not (tmp_path / "wild.safetensors").exists()


def test_the_benchmark_does_not_wait_for_a_tracer_that_is_refused(folder: Path) -> None:
    original: Any = zarr.open_group(folder / "em.zarr", mode="r")["0"]
    broken = TracerNetwork(network_of(), Normaliser(np.nan, 1.0))
    places = [(Box((0, 0, 0), SHAPE), broken)]
    with pytest.raises(WeightsError, match="units"):
        VolumeCodec(original[:], shipped_weights("em-fib-v14"), (64, 64, 64), 0.0, places)


def test_fill_says_nothing_of_what_errors_weigh(folder: Path) -> None:
    """A volume that is half fill has the mean weight of its other half."""
    original: Any = zarr.open_group(folder / "em.zarr", mode="r")["0"]
    voxels = np.zeros((64, 64, 128), np.uint8)
    voxels[..., :64] = original[:, :64, :64].clip(1)
    zarr.create_array(folder / "sparse.zarr", data=voxels, chunks=(64, 64, 64), fill_value=0)
    means = []
    for name, roi in (("whole", None), ("half", "0:64,0:64,0:64")):
        compress(
            str(folder / "sparse.zarr"), str(folder / name), options(folder, roi=roi), run_options=SERIAL
        )
        told = json.loads((folder / name / "zarr.json").read_text())["attributes"]["ucray"]
        means.append(told["importance_mean"])
    assert means[0] == means[1] != 1.0
