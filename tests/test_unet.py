"""A U-Net that finds membranes: what it is shown fits together, and it learns from that and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zarr
from scipy import ndimage
from typer.testing import CliRunner

from ucray.bench import crops, unet
from ucray.bench.crops import Crops, offsets
from ucray.bench.labelled import Labelled, labelled
from ucray.bench.task import GUIDE, _halves
from ucray.bench.tissue import AROUND, Finder, Lesson, Tracer, f1
from ucray.bench.unet import NetworkFinder, NetworkSight
from ucray.cli import app
from ucray.codec import tracer
from ucray.codec.tracer import MembraneNetwork, TracerNetwork, sign_gradients
from ucray.errors import WeightsError
from ucray.grid import Box

STEPS = 40


@pytest.fixture(scope="module", autouse=True)
def small_crops() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crops, "CROP", 24**3)
        patch.setattr(unet, "WARMING", 10)
        yield


def cells(seed: int, shape: tuple[int, int, int] = (24, 64, 40)) -> Labelled:
    """Cells around random places with dark walls between them, in noise."""
    random = np.random.default_rng(seed)
    places = random.uniform(0, shape, (24, 3))
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    away = np.sort(np.linalg.norm(grid[..., None, :] - places, axis=-1), axis=-1)
    labels = 1 + np.argmin(np.linalg.norm(grid[..., None, :] - places, axis=-1), axis=-1)
    wall = away[..., 1] - away[..., 0] < 2.0
    voxels = np.where(wall, 60.0, 160.0) + random.normal(0, 20, shape)
    return labelled(
        ndimage.gaussian_filter(voxels, 0.7).clip(1, 255).astype(np.uint8), labels, [], flat=False
    )


def learnt(part: Labelled, steps: int, seed: int = 0, *, flat: bool = False) -> tuple[NetworkSight, Finder]:
    sight = NetworkSight.of(part.voxels, flat=flat, steps=steps)
    seen = sight.features(part.voxels)
    find, _ = sight.learnt(Lesson(seen, part.membrane, part.known, part.segments), seed=seed)
    return sight, find


@pytest.mark.parametrize("flat", [False, True])
def test_what_it_is_shown_fits_together(flat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a crop is turned, its targets are those of its own voxels."""
    for name in ("BLURRED", "NOISY", "CONTRAST", "BRIGHTNESS"):
        monkeypatch.setattr(crops, name, 0.0)
    random = np.random.default_rng(4)
    segments = random.integers(0, 4, (30, 56, 48), np.int32)
    membrane = segments == 2
    shown = Crops(segments.astype(np.float32), membrane, segments != 3, segments, flat, random)
    for _ in range(20):
        voxels, targets, known = shown.drawn()
        seen = voxels[0].numpy()
        assert seen.shape == ((8, 41, 41) if flat else (24, 24, 24))
        np.testing.assert_array_equal(targets[0].numpy(), seen == 2)
        np.testing.assert_array_equal(known[0].numpy(), seen != 3)
        for number, (axis, distance) in enumerate(offsets(flat), start=1):
            here = np.moveaxis(seen, axis, 0)
            there = here[:-distance]
            differs = np.moveaxis(targets[number].numpy(), axis, 0)[distance:]
            compared = np.moveaxis(known[number].numpy(), axis, 0)
            np.testing.assert_array_equal(differs, here[distance:] != there)
            np.testing.assert_array_equal(compared[distance:], (here[distance:] > 0) & (there > 0))
            assert not compared[:distance].any()


@pytest.mark.parametrize("flat", [False, True])
def test_crops_of_a_small_volume_lie_as_it_does(flat: bool) -> None:
    part = cells(1, (10, 20, 40))
    assert part.segments is not None
    seen = part.voxels.astype(np.float32)
    shown = Crops(
        seen, part.membrane, part.known, part.segments.astype(np.int32), flat, np.random.default_rng(0)
    )
    assert {shown.drawn()[0].shape[1:] for _ in range(8)} == {shown.size}
    assert shown.size == ((8, 20, 40) if flat else (10, 20, 24))


def test_crops_are_blurred_noisy_and_of_other_contrast() -> None:
    flat = np.full((24, 24, 24), 2.0, np.float32)
    nothing = np.zeros(flat.shape, bool)
    random = np.random.default_rng(0)
    shown = Crops(flat, nothing, nothing, np.zeros(flat.shape, np.int32), False, random)
    drawn = [shown.drawn()[0].numpy() for _ in range(40)]
    noise, mean = np.array([one.std() for one in drawn]), np.array([one.mean() for one in drawn])
    # Half of the crops have noise; what is even is not changed by blurring.
    assert 8 <= (noise > 0.01).sum() <= 32
    assert noise.max() < crops.LARGEST_NOISE * (1 + crops.CONTRAST) * 1.05
    assert 1.2 < mean.min() < mean.max() < 2.8


@pytest.mark.parametrize("flat", [False, True])
def test_it_finds_walls_in_other_cells(flat: bool) -> None:
    part, other = cells(1), cells(2)
    sight, find = learnt(part, STEPS, flat=flat)
    probability = find(sight.features(other.voxels))
    assert probability.shape == other.voxels.shape
    assert probability.min() >= 0.0
    assert probability.max() <= 1.0
    everything = f1(np.ones_like(other.membrane), other.membrane)
    assert f1(probability > 0.5, other.membrane) > everything + 0.3


def test_mirrored_tissue_has_mirrored_membranes() -> None:
    part = cells(1)
    sight, find = learnt(part, 5)
    found = find(sight.features(part.voxels))
    for axis in range(3):
        back = find(sight.features(np.flip(part.voxels, axis)))
        np.testing.assert_allclose(np.flip(back, axis), found, rtol=0, atol=1e-5)


def test_a_seed_gives_the_same_network_and_another_one_another() -> None:
    part = cells(1)
    state = torch.random.get_rng_state()
    seen = [
        find(sight.features(part.voxels)) for sight, find in (learnt(part, 3, seed) for seed in (0, 0, 1))
    ]
    np.testing.assert_array_equal(seen[0], seen[1])
    assert np.abs(seen[0] - seen[2]).max() > 1e-3
    # Nobody else's numbers are drawn.
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_is_not_known_teaches_nothing() -> None:
    part = cells(1)
    assert part.segments is not None
    known = part.known.copy()
    known[:, :20] = False
    spoilt = part.membrane ^ ~known
    seen = []
    for membrane in (part.membrane, spoilt):
        one = Labelled(part.voxels, membrane, known, np.where(known, part.segments, 0), False)
        sight, find = learnt(one, 3)
        seen.append(find(sight.features(part.voxels)))
    np.testing.assert_array_equal(seen[0], seen[1])


def test_gradients_say_how_far_errors_move_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean squares along an error are the sum of dp^2 / (p (1 - p)), tile by tile or not."""
    known = cells(5, (16, 32, 24))
    sight, find = learnt(known, STEPS)
    assert isinstance(find, NetworkFinder)
    features = sight.features(known.voxels)
    draws = 150

    def gradients(draws: int, seed: int) -> npt.NDArray[np.float32]:
        box = Box((0, 0, 0), (16, 32, 24))
        return sign_gradients(find.network, features[..., 0], box, draws=draws, seed=seed)

    whole = gradients(draws, 0)
    assert whole.shape == (draws, *known.voxels.shape)
    error = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(features.shape[:3]), 1.5)
    error = (0.02 * error / error.std()).astype(np.float32)
    with torch.inference_mode():
        before, after = (
            find.network(tracer.padded(torch.from_numpy(x)[None, None]))[0, 0].sigmoid().double()
            for x in (features[..., 0], features[..., 0] + error)
        )
    moved = float(((after - before) ** 2 / (before * (1 - before)).clamp_min(1e-9)).sum())
    squares = (whole * error).sum(axis=(1, 2, 3), dtype=np.float64) ** 2
    # Four deviations of a mean of as many squares; and the change is not quite small.
    assert squares.mean() == pytest.approx(moved, rel=4 * np.sqrt(2 / draws) + 0.05)

    # Where tiles show all that the network sees, they say the same of it.
    one, same, other = (gradients(1, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    monkeypatch.setattr(tracer, "TILE", (16, 16, 16))
    tiled = gradients(draws, 1)
    strength = [np.square(found).mean(axis=0) for found in (whole, tiled)]
    assert np.corrcoef(*[ndimage.gaussian_filter(found, 2.0).reshape(-1) for found in strength])[0, 1] > 0.98


def test_a_volume_of_any_shape_is_looked_at() -> None:
    network = MembraneNetwork(flat=False).eval()
    voxels: npt.NDArray[np.float32] = np.random.default_rng(0).normal(size=(9, 17, 30)).astype(np.float32)
    assert unet._found(network, voxels).shape == voxels.shape


def test_halves_are_looked_at_by_networks_where_these_are_asked_for() -> None:
    halves = _halves("segmentation", cells(1), 1, 2)
    for half in halves:
        assert isinstance(half.sight, NetworkSight)
        (tracer,) = half.tracers
        assert isinstance(tracer, Tracer)
        assert AROUND < len(tracer.merges) <= 2 * AROUND + 1


@pytest.mark.parametrize("tracers", [1, 2, 4])
def test_who_steers_never_judges_and_is_the_same_however_many_do(
    tracers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = []

    def remembered(sight: NetworkSight, lesson: Lesson, *, seed: int) -> NetworkFinder:
        taught.append(seed)
        return NetworkFinder(MembraneNetwork(flat=False).eval())

    monkeypatch.setattr(NetworkSight, "taught", remembered)
    _halves("membrane", cells(1), tracers, 2, guided=True)
    half = tracers + 1
    assert taught == 2 * taught[:half]
    *judges, guide = taught[:half]
    assert guide == GUIDE
    assert len({*judges, guide}) == half


@dataclass
class Shelf:
    """What is kept, and how often it was asked for."""

    held: dict[str, bytes] = field(default_factory=dict)

    def get(self, key: str) -> bytes | None:
        return self.held.get(key)

    def put_new(self, key: str, data: bytes) -> bool:
        return self.held.setdefault(key, data) is data


def test_what_was_learnt_is_kept_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf()

    def found(part: Labelled, steps: int, seed: int) -> npt.NDArray[np.float32]:
        sight = NetworkSight.of(part.voxels, flat=False, steps=steps, shelf=shelf)
        seen = sight.features(part.voxels)
        lesson = Lesson(seen, part.membrane, part.known, part.segments)
        return sight.taught(lesson, seed=seed)(seen)

    one, other = cells(1), cells(2)
    assert one.segments is not None
    # Networks that learn from another volume, from other labels, by another seed, or for longer are others.
    relabelled = replace(one, segments=np.where(one.segments == 3, 4, one.segments))
    asked = [(one, 3, 0), (other, 3, 0), (relabelled, 3, 0), (one, 3, 1), (one, 4, 0)]
    taught = [found(*how) for how in asked]
    assert len(shelf.held) == len(asked)
    monkeypatch.setattr(unet, "_taught", lambda *how: pytest.fail("learns again"))
    for how, before in zip(asked, taught, strict=True):
        np.testing.assert_array_equal(found(*how), before)
    shelf.held = {name: data[:-1] for name, data in shelf.held.items()}
    with pytest.raises(WeightsError, match="damaged"):
        found(*asked[0])


def test_the_command_traces_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = cells(1)
    assert part.segments is not None
    zarr.create_array(tmp_path / "em.zarr", data=part.voxels)
    zarr.create_array(tmp_path / "labels.zarr", data=part.segments.astype(np.uint16))
    command = ["bench", str(tmp_path / "em.zarr"), "-o", str(tmp_path / "out"), "--task", "segmentation"]
    command += ["--labels", str(tmp_path / "labels.zarr"), "--ratios", "4", "--tracers", "2"]
    command += ["--network-steps", "30", "--networks", str(tmp_path / "kept")]
    ours = ["--codecs", "jpeg,ucray,ucray-traced", "--weights", "em-fib-v14"]
    result = CliRunner().invoke(app, [*command, *ours])
    assert result.exit_code == 0, result.output
    rows = (tmp_path / "out" / "task.md").read_text().splitlines()
    assert any(": segmentation, by a U-Net of 30 steps" in row for row in rows)
    (original,) = [row for row in rows if row.startswith("| original")]
    assert float(original.split("|")[4]) > 0.6
    psnr = [row.split("|")[3] for row in rows if row.startswith("| ucray")]
    assert len(set(psnr)) == 2
    # Two that trace and one that steers, of each half; any of them steers an archive too.
    kept = list((tmp_path / "kept").iterdir())
    assert len(kept) == 6
    assert not TracerNetwork.from_bytes(kept[0].read_bytes()).network.flat
    monkeypatch.setattr(unet, "_taught", lambda *how: pytest.fail("learns again"))
    result = CliRunner().invoke(app, [*command, "--codecs", "jpeg"])
    assert result.exit_code == 0, result.output
    again = (tmp_path / "out" / "task.md").read_text().splitlines()
    assert set(again) <= set(rows)
    assert original in again
