"""Whether what a codec leaves can still be traced: membranes and neurons found in it against those of labels.

Every half of the volume is looked at by a tracer that learnt from the other, and from the original alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ucray.bench.forest import ForestSight
from ucray.bench.labelled import Labelled
from ucray.bench.ours import Weighed
from ucray.bench.outlines import Panel
from ucray.bench.peers import PEERS
from ucray.bench.reconstruction import decoded_at, missing_reason
from ucray.bench.run import OURS
from ucray.bench.tissue import Features, Labels, Lesson, Sight, Tracer, Volume, f1, information, rand_error
from ucray.bench.unet import NetworkSight, Shelf
from ucray.codec.tracer import TracerNetwork
from ucray.codec.weights import Weights
from ucray.errors import SettingsError
from ucray.grid import Box, Shape3, blocks, triple
from ucray.quality import ErrorSum

TASKS = {"membrane": ("f1",), "segmentation": ("f1", "vi_split", "vi_merge", "rand_error")}
"""Figures of each task."""

ORIGINAL = "original"
CODECS = ("ucray", "x265", "av1", "jpegxl", "avif", "jpeg")
"""Who takes part unless told otherwise."""

MEMBRANES = "ucray-membranes"
"""ucray with errors weighed by the membranes that the tracer finds in the original."""

TRACED = "ucray-traced"
"""ucray, steered by another network than those that trace, which learnt as they did."""

MEMBRANE_GAIN = 8.0
"""How much more the error of a voxel weighs that is surely membrane than that of one that surely is none."""

SEED = 0
GUIDE = 2
"""The seed of the network that steers; those that trace have others, however many they are."""

DRAWN_BLOCKS = 2000
"""Of blocks with replacement, for the intervals."""

BLOCKS = (2, 2, 2)
"""Parts of each half along each axis; figures are means over them."""

Watch = Callable[[str], None]


@dataclass(frozen=True)
class Score:
    """One figure of one codec: its mean over blocks, and the same less the original's with a 95 % interval.

    `ratio` and `psnr` are those of the whole volume.
    """

    codec: str
    wanted: float
    ratio: float
    psnr: float
    figure: str
    value: float
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Traced:
    """What was measured, why some codecs were not, and one crop as each of them leaves it."""

    scores: tuple[Score, ...]
    missing: dict[str, str]
    panels: tuple[Panel, ...] = ()


Keep = Callable[[Traced], object]


def run_task(
    task: str,
    given: Labelled,
    weights: Weights | None,
    chunk: Shape3,
    *,
    codecs: Sequence[str] = (),
    ratios: Sequence[float],
    data_range: float,
    fill_value: float = math.nan,
    tracers: int = 1,
    network_steps: int = 0,
    shelf: Shelf | None = None,
    watch: Watch = lambda codec: None,
    keep: Keep = lambda found: None,
) -> Traced:
    """Code a volume with every codec, and trace in each half of what comes back as its other half taught.

    `keep` is given what was found so far after each codec, as all of it may take hours.

    Halves lie along y. Each is traced by so many `tracers`, which learnt from other voxels of the same half,
    with a U-Net in so many `network_steps`, or else with a forest; figures are means over them. U-Nets that
    lie on the `shelf` do not learn again, others are put there. A peer is
    taken at its coarsest setting that spends no fewer bytes than `ratios` ask for, and that is looked for
    between those of the benchmark.

    Raises
    ------
    SettingsError
        If a task or codec is unknown, neurons are wanted and there are none, or half of the volume is all
        membrane, or has none.
    """
    if task not in TASKS:
        raise SettingsError(f"--task {task}: choose from {', '.join(TASKS)}")
    if task == "segmentation" and given.segments is None:
        raise SettingsError("--task segmentation wants labels of neurons, not classes (--membrane)")
    chosen = tuple(codecs) or CODECS
    if unknown := sorted(set(chosen) - {*OURS, *PEERS, *WEIGHED}):
        raise SettingsError(f"--codecs {','.join(unknown)}: not known")
    watch("learning")
    halves = _halves(task, given, tracers, network_steps, shelf, guided=TRACED in chosen)
    voxels = given.voxels
    watch(ORIGINAL)
    before, shown = _looked_at(task, halves, voxels)
    scores = list(_scores(ORIGINAL, math.nan, 1.0, math.inf, before, before))
    panels = [Panel.of(ORIGINAL, math.nan, 1.0, halves[-1].of(voxels), shown)]
    missing: dict[str, str] = {}
    for name in chosen:
        watch(name)
        if (reason := missing_reason(name, weights)) is not None:
            missing[name] = reason
            continue
        if name == TRACED and (reason := _not_steered(weights, network_steps)) is not None:
            missing[name] = reason
            continue
        weighed = WEIGHED.get(name)
        by = None if weighed is None else weighed(halves, voxels)
        for wanted, ratio, decoded in decoded_at(name, voxels, weights, chunk, ratios, by, fill_value):
            found, shown = _looked_at(task, halves, decoded)
            psnr = ErrorSum.between(voxels, decoded).psnr(data_range)
            scores += _scores(name, wanted, ratio, psnr, found, before)
            panels.append(Panel.of(name, wanted, ratio, halves[-1].of(decoded), shown))
        reached = {score.wanted for score in scores if score.codec == name}
        if unreached := [f"{ratio:g}" for ratio in ratios if ratio not in reached]:
            missing[f"{name} at {', '.join(unreached)}"] = "no setting is so fine, or none so coarse"
        keep(Traced(tuple(scores), dict(missing), tuple(panels)))
    return Traced(tuple(scores), missing, tuple(panels))


@dataclass(frozen=True)
class _Half:
    """One half of a volume, and tracers that learnt from the other; so did the `guide` that steers ucray."""

    box: Box
    known: Labelled
    sight: Sight
    tracers: tuple[Tracer, ...]
    guide: TracerNetwork | None = None

    def of(self, volume: Volume) -> Volume:
        return volume[self.box.slices]

    def features(self, volume: Volume) -> Features:
        return self.sight.features(self.of(volume))


def _halves(
    task: str,
    given: Labelled,
    tracers: int,
    network_steps: int = 0,
    shelf: Shelf | None = None,
    *,
    guided: bool = False,
) -> list[_Half]:
    shape = triple(iter(given.voxels.shape))
    middle = (0, shape[1] // 2, 0)
    boxes = Box((0, 0, 0), (shape[0], middle[1], shape[2])), Box(middle, shape)
    parts = [given.part(box) for box in boxes]
    learnt = [_learnt(task, part, tracers, network_steps, shelf, guided=guided) for part in parts]
    return [_Half(box, part, *other) for box, part, other in zip(boxes, parts, learnt[::-1], strict=True)]


def _learnt(
    task: str, part: Labelled, tracers: int, network_steps: int, shelf: Shelf | None, *, guided: bool
) -> tuple[Sight, tuple[Tracer, ...], TracerNetwork | None]:
    sight: Sight = ForestSight.of(part.voxels, flat=part.flat)
    if network_steps:
        sight = NetworkSight.of(part.voxels, flat=part.flat, steps=network_steps, shelf=shelf)
    segments = part.segments if task == "segmentation" else None
    lesson = Lesson(sight.features(part.voxels), part.membrane, part.known, segments)
    seeds = itertools.islice((seed for seed in itertools.count(SEED) if seed != GUIDE), tracers)
    found = tuple(Tracer.trained(sight, lesson, seed=seed) for seed in seeds)
    if not (guided and isinstance(sight, NetworkSight)):
        return sight, found, None
    guide = sight.taught(lesson, seed=GUIDE)
    return sight, found, TracerNetwork(guide.network, sight.normaliser)


def _looked_at(
    task: str, halves: Sequence[_Half], volume: Volume
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.generic]]:
    """Figures (blocks, figures) of what is found in a volume, and what has outlines in its last half.

    That is what the first of its tracers found.
    """
    figures = []
    for half in halves:
        features = half.features(volume)
        found = [Found.of(task, tracer, features) for tracer in half.tracers]
        figures.append(np.mean([_figures(one, half.known) for one in found], axis=0))
    return np.concatenate(figures), found[0].shown


def _not_steered(weights: Weights | None, network_steps: int) -> str | None:
    if not network_steps:
        return "only a network (--network-steps) can steer it"
    if weights is not None and weights.config.analysis is not None:
        return "the analysis of its weights is not linear"
    return None


def _membranes(halves: Sequence[_Half], volume: Volume) -> npt.NDArray[np.float32]:
    """What errors weigh where membranes are to be kept."""
    weights = np.empty(volume.shape, np.float32)
    for half in halves:
        membranes = half.tracers[0].membranes(half.features(volume))
        weights[half.box.slices] = 1.0 + MEMBRANE_GAIN * membranes
    return weights


def _guides(halves: Sequence[_Half], volume: Volume) -> list[tuple[Box, TracerNetwork]]:
    """For each half of the original a network that none of its tracers has: what it says is not looked at."""
    found = []
    for half in halves:
        assert half.guide is not None
        found.append((half.box, half.guide))
    return found


WEIGHED: dict[str, Callable[[Sequence[_Half], Volume], Weighed]] = {MEMBRANES: _membranes, TRACED: _guides}
"""What errors weigh by, for those where not all weigh the same."""


@dataclass(frozen=True)
class Found:
    """Membranes that a tracer found in a volume, and segments at each of its thresholds, if asked for."""

    membrane: npt.NDArray[np.bool_]
    segments: tuple[Labels, ...]

    @classmethod
    def of(cls, task: str, tracer: Tracer, features: Features) -> Found:
        """What is there for a task in voxels of these features."""
        probability = tracer.membranes(features)
        segments = tracer.segments(probability) if task == "segmentation" else []
        return cls(probability > tracer.threshold, tuple(segments))

    @property
    def shown(self) -> npt.NDArray[np.generic]:
        """What has the outlines that are looked at."""
        return self.segments[len(self.segments) // 2] if self.segments else self.membrane


def _figures(found: Found, tested: Labelled) -> npt.NDArray[np.float64]:
    """Figures (blocks, figures) of what was found in voxels that stand for those of `tested`.

    Those of segments are means over thresholds.
    """
    shape = triple(iter(tested.voxels.shape))
    size = triple(max(1, -(-n // b)) for n, b in zip(shape, BLOCKS, strict=True))
    rows = []
    for box in blocks(shape, size):
        known = tested.known[box.slices]
        if not known.any():
            continue
        row = [f1(found.membrane[box.slices][known], tested.membrane[box.slices][known])]
        if found.segments and tested.segments is not None:
            wanted = tested.segments[box.slices]
            here = [segments[box.slices] for segments in found.segments]
            row += np.mean(
                [[*information(one, wanted), rand_error(one, wanted)] for one in here], axis=0
            ).tolist()
        rows.append(row)
    return np.array(rows)


def _scores(
    codec: str,
    wanted: float,
    ratio: float,
    psnr: float,
    found: npt.NDArray[np.float64],
    before: npt.NDArray[np.float64],
) -> Iterator[Score]:
    """Means, and what changes against the original; each block is compared with itself."""
    random = np.random.default_rng(SEED)
    drawn = random.integers(len(found), size=(DRAWN_BLOCKS, len(found)))
    names = TASKS["segmentation"][: found.shape[1]]
    for number, name in enumerate(names):
        lost = found[:, number] - before[:, number]
        low, high = np.quantile(lost[drawn].mean(axis=1), [0.025, 0.975])
        yield Score(
            codec, wanted, ratio, psnr, name, float(found[:, number].mean()), float(lost.mean()), float(low),
            float(high),
        )  # fmt: skip
