"""Trace neurons in what codecs leave of a region of a volume, and choose a ratio by that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ucray.bench.choice import Choice, choose, draw_choice
from ucray.bench.labelled import Labelled, labelled
from ucray.bench.run import RATIOS, STUDENT
from ucray.bench.task import SEED, Traced, run_task
from ucray.bench.task_report import write_task
from ucray.bench.tissue import FLAT, Lesson
from ucray.bench.unet import NetworkSight
from ucray.cluster.benchmark import fitting_weights, read_region
from ucray.cluster.connection import Connection
from ucray.cluster.plan import config_for
from ucray.cluster.rate import data_range
from ucray.cluster.telemetry import Event, Listener, ignore
from ucray.codec.tracer import TracerNetwork
from ucray.codec.weights import Weights
from ucray.config import default_chunk
from ucray.errors import DestinationError, SettingsError
from ucray.grid import Box, Shape3, format_shape
from ucray.storage.objects import object_at, open_objects
from ucray.storage.volume import LABEL_DTYPES, Volume, open_volume

SWEPT = (8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 500.0)
"""Ratios that a choice is made from."""

SIMPLER = ("jpegxl", "jpeg")
"""Who might do as well, section by section and without weights."""


@dataclass(frozen=True)
class Tracing:
    """What is traced: a region of a volume, or all of it, and what is known to be there.

    Parameters
    ----------
    labels
        A volume like the source, or as large as the region alone: neurons by number, or classes of which
        some are `membrane`.
    chunk
        What ucray codes at once; by default as its weights say.
    tracers
        How many trace, of which figures are means.
    network_steps
        Of the U-Net that finds membranes; none for a forest.
    networks
        Folder, or URL of one, of U-Nets that learnt before: they are taken, and others put there.
    exact_fill
        Whether ucray codes voxels of the volume's fill value as such.
    """

    source: str
    labels: str
    membrane: tuple[int, ...] = ()
    roi: str | None = None
    chunk: Shape3 | None = None
    connection: Connection = Connection()
    tracers: int = 1
    network_steps: int = 0
    networks: str | None = None
    exact_fill: bool = True

    def read(self) -> tuple[Volume, Box, Labelled]:
        """The volume, the region of it, and that with what is known to be there."""
        volume = self.connection.open(self.source)
        if not self.exact_fill:
            volume = volume.without_fill()
        region, voxels = read_region(volume, self.roi)
        place = open_volume(self.labels, None, self.connection.endpoint_url, dtypes=LABEL_DTYPES)
        known = _read_labels(place, volume, region)
        thickness = volume.space.scale[0] / min(volume.space.scale)
        return volume, region, labelled(voxels, known, self.membrane, flat=thickness >= FLAT)

    def run(
        self,
        task: str,
        weights: Weights | None,
        codecs: Sequence[str],
        ratios: Sequence[float],
        listener: Listener,
        keep: Callable[[Traced, str], object] = lambda found, title: None,
    ) -> tuple[Traced, str]:
        """What was traced, and a title for it; after each codec `keep` is given both."""
        shelf = None if self.networks is None else open_objects(self.networks, self.connection.endpoint_url)
        if shelf is not None:
            shelf.check_place()
        volume, region, known = self.read()
        weights = fitting_weights(volume, weights)
        config = config_for(volume) if weights is None else weights.config
        by = f", by a U-Net of {self.network_steps} steps" if self.network_steps else ""
        title = f"{self.source.rstrip('/').rpartition('/')[2]} {region}: {task}{by}"
        found = run_task(
            task,
            known,
            weights,
            self.chunk or default_chunk(config),
            codecs=codecs,
            ratios=ratios,
            data_range=data_range([known.voxels], volume.dtype, volume.fill_value),
            fill_value=volume.fill_value,
            tracers=self.tracers,
            network_steps=self.network_steps,
            shelf=shelf,
            watch=lambda codec: listener(Event("trace", 0, 1, codec)),
            keep=lambda found: keep(found, title),
        )
        return found, title


def parse_classes(text: str) -> tuple[int, ...]:
    """Parse classes of labels with commas between; there may be none."""
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise SettingsError(f"--membrane {text}: not whole numbers with commas between") from None


def trace(
    tracing: Tracing,
    folder: str,
    weights: Weights | None,
    task: str,
    *,
    codecs: Sequence[str] = (),
    ratios: Sequence[float] = RATIOS,
    listener: Listener = ignore,
) -> Traced:
    """Measure what can be traced in what codecs leave of a volume; leaves a table and pictures in a folder.

    They are there from the first codec on, and grow.

    Raises
    ------
    SettingsError
        If labels do not fit the volume or the task, or a name is unknown.
    """
    found, title = tracing.run(
        task, weights, codecs, ratios, listener, lambda part, title: write_task(part, folder, title)
    )
    write_task(found, folder, title)
    return found


def teach(tracing: Tracing, destination: str, *, listener: Listener = ignore) -> TracerNetwork:
    """Teach a tracer all that is known of a region, and write it to a new object.

    Raises
    ------
    DestinationError
        If something is there.
    SettingsError
        If labels do not fit the volume, or are all membrane, or have none.
    """
    folder, name = object_at(destination, tracing.connection.endpoint_url)
    folder.check_place()
    if folder.get(name) is not None:
        raise DestinationError(f"{destination} exists; give another name")
    _, region, known = tracing.read()
    known = known.part(Box((0, 0, 0), region.shape))
    sight = NetworkSight.of(known.voxels, flat=known.flat, steps=tracing.network_steps)
    lesson = Lesson(sight.features(known.voxels), known.membrane, known.known, known.segments)
    steps = tracing.network_steps
    find = sight.taught(lesson, seed=SEED, watch=lambda step: listener(Event("teach", step, steps)))
    tracer = TracerNetwork(find.network, sight.normaliser)
    if not folder.put_new(name, tracer.to_bytes()):
        raise DestinationError(f"{destination} appeared while teaching; the new tracer is not kept")
    return tracer


def choose_ratio(
    tracing: Tracing,
    weights: Weights | None,
    percent: float,
    curve: str,
    *,
    listener: Listener = ignore,
) -> Choice:
    """The largest ratio at which tracing a region loses at most `percent`; leaves the curve as a PNG.

    Raises
    ------
    SettingsError
        If there is none among SWEPT, there are no weights, or as `trace` does.
    DestinationError
        If the picture cannot be written.
    """
    file = Path(curve)
    if not file.parent.is_dir() or file.is_dir():
        raise DestinationError(f"--curve {curve}: there is no folder {file.parent}, or that is one")
    task = "membrane" if tracing.membrane else "segmentation"
    found, title = tracing.run(task, weights, (STUDENT, *SIMPLER), SWEPT, listener)
    if STUDENT in found.missing:
        raise SettingsError("--max-seg-loss takes weights to code the region with; give --weights")
    choice = choose(found, percent)
    try:
        draw_choice(choice, percent, file, title)
    except OSError as error:
        raise DestinationError(f"--curve {curve}: {error.strerror}") from None
    if not choice.ratio:
        first = min((one for one in choice.losses if one.codec == STUDENT), key=lambda one: one.wanted)
        raise SettingsError(
            f"--max-seg-loss {percent:g}: at a ratio of {first.wanted:g} ucray loses {first.fitted:.1f} %; "
            f"{curve} has the curve"
        )
    return choice


def _read_labels(labels: Volume, volume: Volume, region: Box) -> npt.NDArray[np.generic]:
    """Labels of a region, from an array as large as the volume, or as the region alone."""
    if labels.shape == region.shape != volume.shape:
        return labels.read(Box((0, 0, 0), labels.shape))
    if labels.shape != volume.shape:
        raise SettingsError(
            f"--labels has shape {format_shape(labels.shape)}, the volume {format_shape(volume.shape)}"
        )
    return labels.read(region)
