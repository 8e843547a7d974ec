"""Whether what a codec leaves can still be traced: membranes and neurons found in it against those of labels.

The half of the volume that a tracer learns from is never coded; every codec codes the other half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from ucray.bench.ours import VolumeCodec
from ucray.bench.outlines import Panel
from ucray.bench.peers import PEERS, Peer
from ucray.bench.run import OURS
from ucray.bench.samples import Samples, blocks
from ucray.bench.tissue import Labels, Tracer, Volume, f1, information, rand_error
from ucray.codec.weights import Weights
from ucray.errors import SettingsError
from ucray.grid import Box, Shape3, triple
from ucray.quality import ErrorSum

TASKS = {"membrane": ("f1",), "segmentation": ("f1", "vi_split", "vi_merge", "rand_error")}
"""Figures of each task."""

ORIGINAL = "original"
CODECS = ("ucray", "x265", "av1", "jpegxl", "avif", "jpeg")
"""Who takes part unless told otherwise."""

MEMBRANES = "ucray-membranes"
"""ucray with errors weighed by the membranes that the tracer finds in the original."""

MEMBRANE_GAIN = 8.0
"""How much more the error of a voxel weighs that is surely membrane than that of one that surely is none."""

SEED = 0
DRAWS = 2000
"""Of blocks with replacement, for the intervals."""

BLOCKS = (2, 2, 2)
"""Parts of the tested half along each axis; figures are means over them."""

Watch = Callable[[str], None]


@dataclass(frozen=True)
class Score:
    """One figure of one codec: its mean over blocks, and the same less the original's with a 95 % interval.

    `ratio` and `psnr` are those of the coded half.
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
class Labelled:
    """A volume (z, y, x), which of its voxels are membrane, where that is `known`, and its neurons, if given.

    `flat` says that its sections are thick, and looked at one by one.
    """

    voxels: Volume
    membrane: npt.NDArray[np.bool_]
    known: npt.NDArray[np.bool_]
    segments: Labels | None
    flat: bool

    def part(self, box: Box) -> Labelled:
        """A part of it; raises SettingsError if there is no membrane in it, or nothing else."""
        found, known = self.membrane[box.slices], self.known[box.slices]
        if not (found & known).any() or (found | ~known).all():
            raise SettingsError(f"--labels holds no membranes, or nothing else, in {box}")
        segments = None if self.segments is None else self.segments[box.slices]
        return Labelled(self.voxels[box.slices], found, known, segments, self.flat)


@dataclass(frozen=True)
class Traced:
    """What was measured, why some codecs were not, and one crop as each of them leaves it."""

    scores: tuple[Score, ...]
    missing: dict[str, str]
    panels: tuple[Panel, ...] = ()


def labelled(
    volume: Volume, labels: npt.NDArray[np.generic], membrane: Sequence[int], *, flat: bool
) -> Labelled:
    """A volume and its labels: classes of which some are `membrane`, or else neurons, where 0 is unknown.

    Between neurons is membrane.

    Raises
    ------
    SettingsError
        If the shapes differ.
    """
    from skimage.segmentation import find_boundaries

    if labels.shape != volume.shape:
        raise SettingsError(f"--labels has shape {labels.shape}, the volume {volume.shape}")
    if membrane:
        return Labelled(volume, np.isin(labels, membrane), np.ones(labels.shape, bool), None, flat)
    # The largest number may be far beyond how many there are; 0 stays what it is.
    numbers, places = np.unique(np.append(labels.reshape(-1), 0), return_inverse=True)
    zero = int(np.flatnonzero(numbers == 0)[0])
    segments = ((places[:-1] - zero) % len(numbers)).reshape(labels.shape)
    sections = segments if flat else segments[None]
    found = np.stack([find_boundaries(section, mode="thick") for section in sections])  # type: ignore[no-untyped-call]
    return Labelled(volume, found.reshape(labels.shape), segments > 0, segments, flat)


def run_task(
    task: str,
    given: Labelled,
    weights: Weights | None,
    chunk: Shape3,
    *,
    codecs: Sequence[str] = (),
    ratios: Sequence[float],
    data_range: float,
    watch: Watch = lambda codec: None,
) -> Traced:
    """Learn on one half along y, code the other with every codec, and trace in what comes back.

    A peer is taken at its coarsest setting that spends no fewer bytes than `ratios` ask for, and that is
    looked for between those of the benchmark.

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
    if unknown := sorted(set(chosen) - {*OURS, *PEERS, MEMBRANES}):
        raise SettingsError(f"--codecs {','.join(unknown)}: not known")
    shape = triple(iter(given.voxels.shape))
    half = shape[1] // 2
    learnt = given.part(Box((0, 0, 0), (shape[0], half, shape[2])))
    tested = given.part(Box((0, half, 0), shape))
    watch("learning")
    segments = learnt.segments if task == "segmentation" else None
    tracer = Tracer.trained(
        learnt.voxels, learnt.membrane, learnt.known, segments, flat=given.flat, seed=SEED
    )
    watch(ORIGINAL)
    found = Found.of(task, tracer, tested.voxels)
    before = _figures(found, tested)
    scores = list(_scores(ORIGINAL, math.nan, 1.0, math.inf, before, before))
    panels = [Panel.of(ORIGINAL, math.nan, 1.0, tested.voxels, found.shown)]
    missing: dict[str, str] = {}
    for name in chosen:
        watch(name)
        if (reason := _missing(name, weights)) is not None:
            missing[name] = reason
            continue
        importance = 1.0 + MEMBRANE_GAIN * tracer.membranes(tested.voxels) if name == MEMBRANES else None
        for wanted, ratio, decoded in _decoded(name, tested.voxels, weights, chunk, ratios, importance):
            found = Found.of(task, tracer, decoded)
            psnr = ErrorSum.between(tested.voxels, decoded).psnr(data_range)
            scores += _scores(name, wanted, ratio, psnr, _figures(found, tested), before)
            panels.append(Panel.of(name, wanted, ratio, decoded, found.shown))
        reached = {score.wanted for score in scores if score.codec == name}
        if unreached := [f"{ratio:g}" for ratio in ratios if ratio not in reached]:
            missing[f"{name} at {', '.join(unreached)}"] = "no setting is so fine, or none so coarse"
    return Traced(tuple(scores), missing, tuple(panels))


def _missing(name: str, weights: Weights | None) -> str | None:
    if name in PEERS:
        return PEERS[name].missing()
    return "no weights were given" if weights is None else None


def _decoded(
    name: str,
    volume: Volume,
    weights: Weights | None,
    chunk: Shape3,
    ratios: Sequence[float],
    importance: npt.NDArray[np.floating] | None,
) -> Iterator[tuple[float, float, Volume]]:
    """Ratio asked for, ratio, and voxels of a codec that is there."""
    if name in PEERS:
        yield from _peer(PEERS[name], volume, chunk, ratios)
        return
    assert weights is not None
    with VolumeCodec(volume, weights, chunk, math.nan, importance) as codec:
        for wanted in ratios:
            coded = codec.encode(codec.quality_for(wanted))
            yield wanted, volume.nbytes / coded.nbytes, codec.decode(coded, OURS.get(name, "student"))


def _peer(
    peer: Peer, volume: Volume, chunk: Shape3, ratios: Sequence[float]
) -> Iterator[tuple[float, float, Volume]]:
    samples = Samples.of(volume)
    shape = triple(iter(volume.shape))
    boxes = list(blocks(shape, chunk if peer.cut == "chunks" else shape))

    @cache
    def coded(setting: float) -> tuple[list[bytes], float]:
        parts = [peer.encode(np.ascontiguousarray(samples.values[box.slices]), setting) for box in boxes]
        return parts, volume.nbytes / sum(map(len, parts))

    for wanted in ratios:
        setting = coarsest_within(peer, lambda setting: coded(setting)[1], wanted)
        if setting is None:
            continue
        decoded = np.empty_like(samples.values)
        parts, ratio = coded(setting)
        for box, data in zip(boxes, parts, strict=True):
            decoded[box.slices] = peer.decode(data, triple(iter(box.shape)))
        yield wanted, ratio, samples.back(decoded)


def coarsest_within(peer: Peer, ratio_at: Callable[[float], float], wanted: float) -> float | None:
    """The coarsest setting of a peer whose ratio is at most `wanted`; None where all are on one side."""
    fine = None
    for coarse in peer.settings:
        if ratio_at(coarse) > wanted:
            break
        fine = coarse
    else:
        return fine if fine is not None and ratio_at(fine) == wanted else None
    if fine is None:
        return None
    while (steps := round(abs(coarse - fine) / peer.resolution)) > 1:
        middle = fine + math.copysign(steps // 2 * peer.resolution, coarse - fine)
        if ratio_at(middle) <= wanted:
            fine = middle
        else:
            coarse = middle
    return fine


@dataclass(frozen=True)
class Found:
    """Membranes that a tracer found in a volume, and segments, if these were asked for."""

    membrane: npt.NDArray[np.bool_]
    segments: Labels | None

    @classmethod
    def of(cls, task: str, tracer: Tracer, voxels: Volume) -> Found:
        """What is there for a task in voxels (z, y, x)."""
        probability = tracer.membranes(voxels)
        segments = tracer.segments(probability) if task == "segmentation" else None
        return cls(probability > tracer.threshold, segments)

    @property
    def shown(self) -> npt.NDArray[np.generic]:
        """What has the outlines that are looked at."""
        return self.membrane if self.segments is None else self.segments


def _figures(found: Found, tested: Labelled) -> npt.NDArray[np.float64]:
    """Figures (blocks, figures) of what was found in voxels that stand for those of `tested`."""
    segments = found.segments
    shape = triple(iter(tested.voxels.shape))
    size = triple(max(1, -(-n // b)) for n, b in zip(shape, BLOCKS, strict=True))
    rows = []
    for box in blocks(shape, size):
        known = tested.known[box.slices]
        if not known.any():
            continue
        row = [f1(found.membrane[box.slices][known], tested.membrane[box.slices][known])]
        if segments is not None and tested.segments is not None:
            here, wanted = segments[box.slices], tested.segments[box.slices]
            row += [*information(here, wanted), rand_error(here, wanted)]
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
    drawn = random.integers(len(found), size=(DRAWS, len(found)))
    names = TASKS["segmentation"][: found.shape[1]]
    for number, name in enumerate(names):
        lost = found[:, number] - before[:, number]
        low, high = np.quantile(lost[drawn].mean(axis=1), [0.025, 0.975])
        yield Score(
            codec, wanted, ratio, psnr, name, float(found[:, number].mean()), float(lost.mean()), float(low),
            float(high),
        )  # fmt: skip
