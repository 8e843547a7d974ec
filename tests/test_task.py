"""Judged by tracing: the pipeline finds what is there, its figures are right, coding costs what it costs."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

from ucray.bench import forest
from ucray.bench.choice import choose, losses
from ucray.bench.forest import ForestSight
from ucray.bench.labelled import Labelled, labelled
from ucray.bench.outlines import Panel
from ucray.bench.peers import PEERS
from ucray.bench.reconstruction import coarsest_within
from ucray.bench.task import (
    MEMBRANES,
    ORIGINAL,
    TRACED,
    Found,
    Score,
    Traced,
    _figures,
    _halves,
    _looked_at,
    run_task,
)
from ucray.bench.task_report import task_to_markdown
from ucray.bench.tissue import AROUND, Lesson, Sight, Tracer, f1, information, merged, rand_error
from ucray.cli import app
from ucray.cluster import tracing
from ucray.cluster.telemetry import Event
from ucray.codec.shipped import shipped_weights
from ucray.errors import DestinationError, SettingsError
from ucray.grid import Box

SHAPE = (40, 128, 64)


def cells(seed: int, thickness: float = 2.0) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Cells around random points, dark walls between them, noise; and their numbers."""
    random = np.random.default_rng(seed)
    points = np.zeros(SHAPE, bool)
    points[tuple(random.integers(n, size=90) for n in SHAPE)] = True
    numbers, _ = ndimage.label(points, np.ones((3, 3, 3)))
    nearest = ndimage.distance_transform_edt(numbers == 0, return_distances=False, return_indices=True)
    labels = np.asarray(numbers[tuple(nearest)], np.int64)
    walls = np.zeros(SHAPE, bool)
    for axis in range(3):
        walls |= ndimage.maximum_filter1d(labels, 3, axis) != ndimage.minimum_filter1d(labels, 3, axis)
    voxels = np.where(walls, 70.0, 160.0)
    voxels = ndimage.gaussian_filter(voxels, thickness / 2) + random.normal(0, 12, SHAPE)
    return np.clip(voxels, 1, 255).astype(np.uint8), labels


@pytest.fixture(scope="module", autouse=True)
def few_trees() -> Iterator[None]:
    """A third of the trees learns in a third of the time, and tells these cells apart as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forest, "TREES", 10)
        yield


@pytest.fixture(scope="module")
def known() -> Labelled:
    return labelled(*cells(1), [], flat=False)


@pytest.fixture(scope="module")
def sight(known: Labelled) -> Sight:
    return ForestSight.of(known.voxels, flat=False)


@pytest.fixture(scope="module")
def tracer(known: Labelled, sight: Sight) -> Tracer:
    features = sight.features(known.voxels)
    return Tracer.trained(sight, Lesson(features, known.membrane, known.known, known.segments), seed=0)


def test_what_a_forest_knows_by_heart_chooses_no_threshold() -> None:
    """Of labels that voxels say nothing of, all voxels are the best guess for any that are not known."""
    random = np.random.default_rng(3)
    voxels = random.integers(0, 255, (12, 24, 40), dtype=np.uint8)
    membrane = random.random(voxels.shape) < 0.5
    known = np.ones_like(membrane)
    sight = ForestSight.of(voxels, flat=False)
    features = sight.features(voxels)
    found = Tracer.trained(sight, Lesson(features, membrane, known, None), seed=0)
    by_heart = found.membranes(features)
    # All voxels would have 2 / 3.
    assert f1(by_heart > 0.5, membrane) > 0.72
    assert (by_heart > found.threshold).mean() > 0.9


def test_where_only_one_slab_is_known_it_learns_from_that(known: Labelled) -> None:
    part = known.part(Box((0, 0, 0), (32, 64, 64)))
    seen = np.zeros(part.known.shape, bool)
    seen[..., :16] = True
    sight = ForestSight.of(part.voxels, flat=False)
    features = sight.features(part.voxels)
    found = Tracer.trained(sight, Lesson(features, part.membrane, seen, None), seed=0)
    assert f1((found.membranes(features) > found.threshold)[seen], part.membrane[seen]) > 0.8


def test_figures_of_segments_that_are_right_split_and_merged() -> None:
    wanted = np.repeat(np.array([1, 2, 0, 3], np.int64), 8).reshape(4, 2, 4)
    assert information(wanted + 5, wanted) == pytest.approx((0.0, 0.0))
    assert rand_error(wanted + 5, wanted) == pytest.approx(0.0)
    halves = wanted * 2 + (np.arange(wanted.size).reshape(wanted.shape) % 2)
    assert information(halves, wanted) == pytest.approx((1.0, 0.0))
    one = np.ones_like(wanted)
    assert information(one, wanted) == pytest.approx((0.0, math.log2(3)))
    # What no one knows, label 0, may be anything.
    assert information(np.where(wanted == 0, 77, wanted), wanted) == pytest.approx((0.0, 0.0))
    # Of all pairs of the 24 known voxels those within the three of 8 are right; none is missed.
    precision = 3 * 8 * 7 / (24 * 23)
    assert rand_error(one, wanted) == pytest.approx(1 - 2 * precision / (precision + 1))


def test_figures_are_means_over_thresholds(known: Labelled) -> None:
    assert known.segments is not None
    one, halves = np.ones_like(known.segments), known.segments * 2 + (np.indices(SHAPE)[0] % 2)
    each = [_figures(Found(known.membrane, (segments,)), known) for segments in (one, halves)]
    assert (each[0] != each[1]).any()
    both = _figures(Found(known.membrane, (one, halves)), known)
    np.testing.assert_allclose(both, (each[0] + each[1]) / 2)
    np.testing.assert_array_equal(both[:, 0], 1.0)


def test_f1_is_that_of_precision_and_recall() -> None:
    found, wanted = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 0, 1, 0], bool)
    precision, recall = 1 / 3, 1 / 2
    assert f1(found, wanted) == pytest.approx(2 * precision * recall / (precision + recall))
    assert f1(~found & found, wanted) == 0.0


def test_fragments_are_joined_over_weak_borders_alone() -> None:
    """In a row of four with borders of 0.1, 0.9 and 0.2; a border of several heights counts by their mean."""
    fragments = np.repeat(np.arange(1, 5), 4)[None, None].repeat(3, 0).repeat(3, 1)
    probability = np.zeros(fragments.shape, np.float32)
    for place, height in ((4, 0.1), (8, 0.9), (12, 0.2)):
        probability[:, :, place - 1 : place + 1] = height
    assert [one.max() for one in merged(np.ones_like(fragments), probability, [0.3, 0.5])] == [1, 1]
    none, weak, all_of_them = merged(fragments.astype(np.int64), probability, [0.05, 0.5, 0.95])
    first, second, third, fourth = (weak[0, 0, place] for place in (0, 5, 9, 15))
    assert first == second != third == fourth
    assert len(np.unique(none)) == 4
    assert len(np.unique(all_of_them)) == 1


def test_a_threshold_joins_the_same_after_lower_ones_as_by_itself() -> None:
    random = np.random.default_rng(3)
    fragments = np.arange(1, 126).reshape(5, 5, 5).repeat(3, 0).repeat(3, 1).repeat(3, 2)
    probability = random.random(fragments.shape).astype(np.float32)
    thresholds = [0.4, 0.45, 0.5, 0.55]
    counts = []
    for threshold, found in zip(thresholds, merged(fragments, probability, thresholds), strict=True):
        (alone,) = merged(fragments, probability, [threshold])
        assert sum(information(found, alone)) == pytest.approx(0.0, abs=1e-12)
        counts.append(len(np.unique(found)))
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 2


def test_what_was_learnt_holds_on_other_cells(sight: Sight, tracer: Tracer) -> None:
    voxels, labels = cells(2)
    other = labelled(voxels, labels, [], flat=False)
    probability = tracer.membranes(sight.features(voxels))
    assert f1(probability > tracer.threshold, other.membrane) > 0.8
    assert AROUND < len(tracer.merges) <= 2 * AROUND + 1
    for segments in tracer.segments(probability):
        assert sum(information(segments, labels)) < 1.0
        assert rand_error(segments, labels) < 0.15
    # The same again.
    np.testing.assert_array_equal(tracer.membranes(sight.features(voxels)), probability)


def test_blurred_walls_are_found_less_well(sight: Sight, tracer: Tracer) -> None:
    voxels, labels = cells(2)
    other = labelled(voxels, labels, [], flat=False)
    blurred = ndimage.gaussian_filter(voxels.astype(float), 3.0)
    found = [tracer.membranes(sight.features(seen)) > tracer.threshold for seen in (voxels, blurred)]
    sharp, dull = (f1(membrane, other.membrane) for membrane in found)
    assert dull < sharp - 0.1


@pytest.fixture(scope="module")
def traced(known: Labelled) -> Traced:
    return run_task(
        "segmentation",
        known,
        shipped_weights("em-fib-v1"),
        (64, 64, 64),
        codecs=["ucray", MEMBRANES, TRACED, "jpegxl"],
        ratios=[8.0, 64.0],
        data_range=255.0,
    )


def test_codecs_are_compared_with_the_original(traced: Traced) -> None:
    scores = traced.scores
    assert traced.missing == {
        TRACED: "only a network (--network-steps) can steer it",
        "jpegxl at 64": "no setting is so fine, or none so coarse",
    }
    by_name = {(s.codec, s.wanted, s.figure): s for s in scores}
    for figure in ("f1", "vi_split", "vi_merge", "rand_error"):
        (original,) = (s for s in scores if (s.codec, s.figure) == (ORIGINAL, figure))
        assert (original.loss, original.low, original.high) == (0.0, 0.0, 0.0)
        for score in scores:
            if score.figure == figure and score.codec != ORIGINAL:
                assert score.value - original.value == pytest.approx(score.loss)
                assert score.low <= score.loss <= score.high
    fine, coarse = (by_name["ucray", ratio, "f1"] for ratio in (8.0, 64.0))
    assert fine.psnr > coarse.psnr
    assert abs(fine.loss) < abs(coarse.loss)
    assert coarse.high < 0.0
    # Peers spend no fewer bytes than were asked for.
    assert by_name["jpegxl", 8.0, "f1"].ratio <= 8.0


def test_each_half_is_looked_at_as_the_other_taught(known: Labelled) -> None:
    """Labels of one half that say nothing teach nothing: what is found in the other is worth as little."""
    part = known.part(Box((0, 0, 0), (24, 96, 48)))
    first, second = np.index_exp[:, :48], np.index_exp[:, 48:]
    spoilt = part.membrane.copy()
    spoilt[first] = np.random.default_rng(0).random(spoilt[first].shape) < 0.3
    found = []
    for membrane in (part.membrane, spoilt):
        halves = _halves("membrane", dataclasses.replace(part, membrane=membrane), 1)
        assert [half.box.start for half in halves] == [(0, 0, 0), (0, 48, 0)]
        np.testing.assert_array_equal(halves[0].known.membrane, membrane[first])
        (tracer,) = halves[1].tracers
        probability = tracer.membranes(halves[1].features(part.voxels))
        found.append(f1(probability > tracer.threshold, part.membrane[second]))
    assert found[0] > 0.8
    assert found[1] < 0.6


def test_figures_of_several_tracers_are_their_means(known: Labelled) -> None:
    """The first learns from the same voxels whether there are others or not."""
    part = known.part(Box((0, 0, 0), (24, 96, 48)))
    one, two = (_halves("segmentation", part, tracers) for tracers in (1, 2))
    pairs = [half.tracers for half in two]
    features = [half.features(part.voxels) for half in two]
    for half, pair, seen in zip(one, pairs, features, strict=True):
        np.testing.assert_array_equal(half.tracers[0].membranes(seen), pair[0].membranes(seen))
        assert np.abs(pair[0].membranes(seen) - pair[1].membranes(seen)).max() > 0.01
    each = []
    for number in range(2):
        halves = [dataclasses.replace(half, tracers=(half.tracers[number],)) for half in two]
        each.append(_looked_at("segmentation", halves, part.voxels)[0])
    both, _ = _looked_at("segmentation", two, part.voxels)
    np.testing.assert_allclose(both, (each[0] + each[1]) / 2)
    assert (each[0] != each[1]).any()


def test_weighed_membranes_are_coded_better_than_what_is_between(known: Labelled, traced: Traced) -> None:
    """At about equal bytes errors leave membranes, as far as cells of 8^3 tell these from the rest."""
    panels = {
        panel.codec: panel for panel in traced.panels if panel.wanted in (64.0,) or panel.codec == ORIGINAL
    }
    ratios = [s.ratio for s in traced.scores if s.codec in ("ucray", MEMBRANES) and s.wanted == 64.0]
    assert ratios == pytest.approx([64.0] * len(ratios), rel=0.1)
    original = panels[ORIGINAL].voxels.astype(float)
    half = known.membrane[:, SHAPE[1] // 2 :]
    membrane = Panel.of("", 64.0, 64.0, half, half).found.astype(bool)
    on, off = (
        [((panels[name].voxels - original)[part] ** 2).mean() for name in ("ucray", MEMBRANES)]
        for part in (membrane, ~membrane)
    )
    assert on[1] < on[0]
    assert on[1] / off[1] < on[0] / off[0]


def test_classes_give_membranes_alone() -> None:
    voxels, labels = cells(3)
    classes = np.where(labels % 2 == 0, 32, 255)
    known = labelled(voxels, classes, [32, 96], flat=True)
    assert known.segments is None
    np.testing.assert_array_equal(known.membrane, labels % 2 == 0)
    with pytest.raises(SettingsError, match="labels of neurons"):
        run_task("segmentation", known, None, (64, 64, 64), ratios=[8.0], data_range=255.0)


def test_labels_are_numbers_of_any_size_and_zero_is_unknown() -> None:
    """Unknown voxels are neither learnt from nor counted, and numbers may be far apart."""
    voxels, labels = cells(3)
    far = labels.astype(np.uint64) * np.uint64(10**12)
    far[:, :40] = 0
    known = labelled(voxels, far, [], flat=False)
    plain = labelled(voxels, labels, [], flat=False)
    assert known.segments is not None
    assert known.segments.max() < 100
    np.testing.assert_array_equal(known.known, far > 0)
    np.testing.assert_array_equal(known.membrane[:, 42:], plain.membrane[:, 42:])
    assert information(known.segments, labels * (far > 0)) == pytest.approx((0.0, 0.0))


def test_outlines_of_thick_sections_are_found_section_by_section() -> None:
    """What a neuron is in the next section makes no membrane of it in this one."""
    labels = np.ones((2, 8, 8), np.int64)
    labels[1] = 2
    labels[:, :, 4:] += 2
    flat = labelled(labels.astype(np.uint8), labels, [], flat=True).membrane
    assert flat[:, :, 3:5].all()
    assert not flat[:, :, :3].any()
    assert labelled(labels.astype(np.uint8), labels, [], flat=False).membrane.all()


@pytest.mark.parametrize("settings", [(4.0, 12.0, 40.0), (90.0, 40.0, 10.0, 1.0)])
@pytest.mark.parametrize("resolution", [1.0, 0.25])
def test_a_peer_s_setting_is_the_last_that_spends_enough(
    settings: tuple[float, ...], resolution: float
) -> None:
    peer = dataclasses.replace(PEERS["jpeg"], settings=settings, resolution=resolution)
    coarser = math.copysign(resolution, settings[-1] - settings[0])

    def ratio(setting: float) -> float:
        return 2.0 + abs(setting - settings[0])

    for wanted in np.linspace(2.0, ratio(settings[-1]) - 1e-6, 97):
        found = coarsest_within(peer, ratio, float(wanted))
        assert found is not None
        assert (found - settings[0]) % resolution == 0.0
        assert ratio(found) <= wanted < ratio(found + coarser)
    assert coarsest_within(peer, ratio, 1.9) is None
    assert coarsest_within(peer, ratio, ratio(settings[-1])) == settings[-1]
    assert coarsest_within(peer, ratio, ratio(settings[-1]) + 1.0) is None
    # A codec that has no settings but these.
    rough = dataclasses.replace(peer, resolution=math.inf)
    assert coarsest_within(rough, ratio, ratio(settings[1]) + 0.5) == settings[1]


def test_what_cannot_be_measured_is_named_and_the_rest_keeps_its_rows(known: Labelled) -> None:
    """A codec without weights is missing; two ratios that take one setting have a row each."""
    traced = run_task(
        "membrane", known, None, (64, 64, 64), codecs=["ucray", "jpegxl"], ratios=[7.5, 7.6], data_range=255.0
    )
    assert traced.missing == {"ucray": "no weights were given"}
    assert len({score.ratio for score in traced.scores if score.codec == "jpegxl"}) == 1
    lines = task_to_markdown(traced, "title").splitlines()
    rows = [line for line in lines if line.startswith("| jpegxl")]
    assert len(rows) == 2
    assert {line.count("|") for line in rows} == {5}
    assert lines[-1] == "Missing: ucray: no weights were given."


class StoppedError(Exception):
    """Ends a benchmark in its middle."""


def test_a_benchmark_that_is_stopped_leaves_the_codecs_before(tmp_path: Path) -> None:
    voxels, labels = (found[:24, :96, :48] for found in cells(1))
    zarr.create_array(tmp_path / "em.zarr", data=voxels)
    zarr.create_array(tmp_path / "labels.zarr", data=labels.astype(np.uint16))

    def stop(event: Event) -> None:
        if event.note == "jpeg":
            raise StoppedError

    asked = tracing.Tracing(str(tmp_path / "em.zarr"), str(tmp_path / "labels.zarr"))
    with pytest.raises(StoppedError):
        tracing.trace(
            asked,
            str(tmp_path / "out"),
            None,
            "membrane",
            codecs=["jpegxl", "jpeg"],
            ratios=[6.0],
            listener=stop,
        )
    rows = (tmp_path / "out" / "task.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows if row.startswith("|")][2:] == [ORIGINAL, "jpegxl"]
    assert (tmp_path / "out" / "outlines.png").stat().st_size > 0


def test_a_half_without_membranes_is_refused() -> None:
    voxels, labels = cells(3)
    labels[:, : SHAPE[1] // 2 + 2] = 7
    with pytest.raises(SettingsError, match="no membranes"):
        run_task(
            "membrane", labelled(voxels, labels, [], flat=False), None, (64, 64, 64), ratios=[8.0],
            data_range=255.0,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "membrane"], "go together"),
        (["--labels", "L"], "go together"),
        (["--tracers", "2"], "go with --task"),
        (["--network-steps", "9", "--pipeline"], "go with --task"),
        (["--membrane", "3"], "go with --task"),
        (["--task", "membrane", "--labels", "L", "--networks", "kept"], "goes with --network-steps"),
        (["--task", "membrane", "--labels", "L", "--pipeline"], "ask for one"),
        (["--task", "synapses", "--labels", "LABELS"], "--task synapses: choose from membrane, segmentation"),
        (["--task", "membrane", "--labels", "LABELS", "--membrane", "a"], "--membrane a"),
        (["--task", "membrane", "--labels", "LABELS", "--membrane", "9999"], "no membranes"),
        (["--task", "membrane", "--labels", "LABELS", "--codecs", "h264"], "--codecs h264"),
        (["--task", "membrane", "--labels", "SMALL"], "--labels has shape"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    voxels, labels = cells(4)
    places = {"LABELS": str(tmp_path / "labels.zarr"), "SMALL": str(tmp_path / "small.zarr")}
    for name, array in (
        ("em", voxels),
        ("labels", labels.astype(np.uint16)),
        ("small", labels[:9].astype(np.uint16)),
    ):
        zarr.create_array(tmp_path / f"{name}.zarr", data=array)
    given = [places.get(argument, argument) for argument in arguments]
    result = CliRunner().invoke(
        app, ["bench", str(tmp_path / "em.zarr"), "-o", str(tmp_path / "out"), *given], env={"COLUMNS": "200"}
    )
    assert result.exit_code != 0
    assert message in (str(result.exception) + result.output)
    assert not (tmp_path / "out" / "task.md").exists()


def test_the_command_leaves_a_table_and_a_plot(tmp_path: Path) -> None:
    voxels, labels = cells(1)
    for name, array in (("em", voxels), ("labels", labels.astype(np.uint16))):
        zarr.create_array(tmp_path / f"{name}.zarr", data=array)
    out = tmp_path / "out"
    command = ["bench", str(tmp_path / "em.zarr"), "-o", str(out), "--weights", "em-fib-v1", "--json"]
    command += ["--task", "membrane", "--labels", str(tmp_path / "labels.zarr")]
    result = CliRunner().invoke(app, [*command, "--codecs", "ucray", "--ratios", "32"])
    assert result.exit_code == 0, result.output
    with (out / "task.csv").open() as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    assert [(row["codec"], row["figure"]) for row in rows] == [(ORIGINAL, "f1"), ("ucray", "f1")]
    assert float(rows[1]["ratio"]) == pytest.approx(32, rel=0.1)
    assert (out / "task.md").read_text().count("| ucray |") == 1
    assert (out / "task.png").stat().st_size > 10_000
    # The original, and one row of one codec: beside each other.
    with Image.open(out / "outlines.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[1] > 1.5 * pixels.shape[0]
    orange = (pixels[..., 0] > 220) & (pixels[..., 1] < 170) & (pixels[..., 2] < 60)
    left, right = orange[:, : orange.shape[1] // 2], orange[:, orange.shape[1] // 2 :]
    assert min(left.sum(), right.sum()) > 500


def scores_of(losses: dict[str, dict[float, float]], figures: dict[str, float]) -> Traced:
    """A measurement in which codecs lose so much of every figure's own value at ratios asked for."""

    def rows(codec: str, wanted: float, loss: float) -> list[Score]:
        sign = {"f1": -1.0}
        return [
            Score(
                codec, wanted, wanted * 1.01, 30.0, name, value, sign.get(name, 1.0) * loss * value, 0.0, 0.0
            )
            for name, value in figures.items()
        ]

    found = rows(ORIGINAL, math.nan, 0.0)
    for codec, curve in losses.items():
        for wanted, loss in curve.items():
            found += rows(codec, wanted, loss)
    return Traced(tuple(found), {})


NEURONS = {"f1": 0.8, "vi_split": 0.6, "vi_merge": 0.2, "rand_error": 0.1}


@pytest.mark.parametrize("figures", [NEURONS, {"f1": 0.8}])
def test_the_largest_ratio_before_more_is_lost_is_chosen(figures: dict[str, float]) -> None:
    """That a coarser one happens to lose less is chance: both count as what they lose on average."""
    ours = {8.0: -0.01, 32.0: 0.015, 16.0: 0.01, 64.0: 0.03, 128.0: 0.02}
    traced = scores_of(
        {"ucray": ours, "jpegxl": {8.0: 0.0, 16.0: 0.05}, "jpeg": dict.fromkeys(ours, 0.0)}, figures
    )
    choice = choose(traced, 2.0)
    assert choice.ratio == 32.0
    assert choice.simpler == {"jpeg": 128.0}
    by_ratio = {one.wanted: one.percent for one in choice.losses if one.codec == "ucray"}
    assert by_ratio == pytest.approx({ratio: 100 * loss for ratio, loss in ours.items()})
    fitted = {one.wanted: one.fitted for one in choice.losses if one.codec == "ucray"}
    assert fitted == pytest.approx({8.0: -1.0, 16.0: 1.0, 32.0: 1.5, 64.0: 2.5, 128.0: 2.5})
    assert choose(traced, 2.6).ratio == 128.0
    assert choose(traced, -2.0).ratio == 0.0
    # Where the coarsest quality gives 100, 128 is not reached, whatever is lost there.
    short = [
        dataclasses.replace(score, ratio=100.0) if (score.codec, score.wanted) == ("ucray", 128.0) else score
        for score in traced.scores
    ]
    assert choose(dataclasses.replace(traced, scores=tuple(short)), 2.6).ratio == 64.0


def test_the_worse_of_two_figures_counts() -> None:
    traced = scores_of({"ucray": {8.0: 0.0}}, NEURONS)
    worse = [
        dataclasses.replace(score, loss=0.02)
        if (score.codec, score.figure) == ("ucray", "vi_merge")
        else score
        for score in traced.scores
    ]
    # 0.02 bits of 0.6 + 0.2.
    assert [one.percent for one in losses(worse)] == pytest.approx([2.5])
    worse = [
        dataclasses.replace(score, loss=0.01)
        if (score.codec, score.figure) == ("ucray", "rand_error")
        else score
        for score in worse
    ]
    assert [one.percent for one in losses(worse)] == pytest.approx([10.0])


def test_a_plan_takes_the_ratio_that_keeps_a_segmentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The region that is traced has labels of its own; what is planned is the whole volume."""
    # A few of the ratios that are tried: each takes seconds.
    swept = (8.0, 64.0, 500.0)
    monkeypatch.setattr(tracing, "SWEPT", swept)
    voxels, labels = cells(1)
    volume = np.concatenate([voxels, voxels])
    zarr.create_array(tmp_path / "em.zarr", data=volume)
    zarr.create_array(tmp_path / "labels.zarr", data=labels.astype(np.uint16))
    curve = tmp_path / "curve.png"
    command = ["plan", str(tmp_path / "em.zarr"), str(tmp_path / "archive"), "--weights", "em-fib-v1"]
    command += ["--labels", str(tmp_path / "labels.zarr"), "--roi", f"0:{SHAPE[0]},0:{SHAPE[1]},0:{SHAPE[2]}"]
    command += ["--max-seg-loss", "50", "--curve", str(curve)]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    choice = told["choice"]
    ours = {one["wanted"]: one["percent"] for one in choice["losses"] if one["codec"] == "ucray"}
    assert sorted(ours) == list(swept)
    fitted = {one["wanted"]: one["fitted"] for one in choice["losses"] if one["codec"] == "ucray"}
    assert all((fitted[ratio] <= 50) is (ratio <= choice["ratio"]) for ratio in swept)
    assert told["target"] == {"ratio": choice["ratio"]}
    assert told["shape"] == list(volume.shape)
    with Image.open(curve) as picture:
        assert picture.size[0] > 500
    assert not (tmp_path / "archive").exists()


def test_a_loss_that_no_ratio_keeps_is_refused_with_the_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = scores_of({"ucray": {8.0: 0.03, 16.0: 0.05}}, NEURONS)
    monkeypatch.setattr(tracing.Tracing, "run", lambda *_: (scores, "title"))
    curve = tmp_path / "curve.png"
    with pytest.raises(SettingsError, match=r"at a ratio of 8 ucray loses 3\.0 %; .*curve.png has the curve"):
        tracing.choose_ratio(tracing.Tracing("S", "L"), None, 2.0, str(curve))
    with Image.open(curve) as picture:
        assert picture.size[0] > 500
    with pytest.raises(DestinationError, match="--curve"):
        tracing.choose_ratio(tracing.Tracing("S", "L"), None, 2.0, str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-seg-loss", "2"], "go together"),
        (["--curve", "curve.png"], "go with --max-seg-loss"),
        (["--membrane", "3"], "go with --max-seg-loss"),
        (["--network-steps", "9"], "go with --max-seg-loss"),
        (["--tracers", "2"], "go with --max-seg-loss"),
        (["--max-seg-loss", "2", "--labels", "L", "--networks", "kept"], "goes with --network-steps"),
        (["--max-seg-loss", "2", "--labels", "L", "--psnr", "30"], "give no other target"),
        (["--max-seg-loss", "2", "--labels", "L", "--traced-by", "T"], "give neither"),
        (["--max-seg-loss", "2", "--labels", "L", "--importance", "M"], "give neither"),
        (["--max-seg-loss", "2", "--labels", "LABELS", "--curve", "NOWHERE"], "there is no folder"),
        (["--max-seg-loss", "2", "--labels", "LABELS", "--roi", "0:9,0:9,0:9"], "--labels has shape"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    voxels, labels = cells(4)
    zarr.create_array(tmp_path / "em.zarr", data=voxels)
    zarr.create_array(tmp_path / "labels.zarr", data=labels[:9].astype(np.uint16))
    places = {"LABELS": str(tmp_path / "labels.zarr"), "NOWHERE": str(tmp_path / "none" / "curve.png")}
    given = [places.get(argument, argument) for argument in arguments]
    command = ["plan", str(tmp_path / "em.zarr"), str(tmp_path / "archive"), *given]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code != 0
    assert message in (str(result.exception) + result.output)
