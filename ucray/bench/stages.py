"""Where the time of a chunk goes: the stages of coding, each alone, on one device.

Times are of compute alone, without input and output. Networks run on the device in batches; context
model and entropy coder run on one CPU core, chunk by chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ucray.codec.anticipation import anticipated
from ucray.codec.chunk import ChunkFormat, normalisation
from ucray.codec.decoder import ready
from ucray.codec.encoder import ChunkEncoder
from ucray.codec.network import analysis_of, load_network, stored_synthesis
from ucray.codec.threads import one_thread
from ucray.codec.weights import Weights
from ucray.errors import SettingsError
from ucray.grid import Shape3, blocks, triple

REPEATS = 5
"""Runs of a stage; the fastest counts, as others of the machine only ever slow one down."""

SHORTEST = 1e-9
"""Seconds: what is a difference of two times may come out below."""


@dataclass(frozen=True)
class Stage:
    """One stage: milliseconds a chunk, and megabytes of voxels a second."""

    name: str
    where: str
    milliseconds: float
    speed: float


def measure_stages(
    volume: npt.NDArray[np.generic],
    weights: Weights,
    chunk: Shape3,
    *,
    quality: int,
    device: str,
    batch: int,
) -> list[Stage]:
    """Time the stages on the whole chunks of a volume, as many as a batch has.

    Raises
    ------
    SettingsError
        If the volume holds no whole chunk.
    """
    whole = [box for box in blocks(triple(iter(volume.shape)), chunk) if box.shape == chunk]
    if not whole:
        raise SettingsError(f"the region of shape {volume.shape} holds no whole chunk of shape {chunk}")
    voxels = [volume[whole[n % len(whole)].slices] for n in range(batch)]
    chunk_format = ChunkFormat(chunk, str(volume.dtype), 0.0, *normalisation(voxels, 0.0))
    place = torch.device(device)
    analysis = analysis_of(weights.config)
    load_network(weights, "analysis", analysis)
    analysis, synthesis = ready(analysis, place), ready(stored_synthesis(weights, "student"), place)
    values = np.stack(voxels).astype(np.float32)[:, None]
    values = (values - chunk_format.offset) / chunk_format.scale
    x = torch.from_numpy(values.astype(np.float32)).to(place).contiguous(memory_format=torch.channels_last_3d)

    encoder = ChunkEncoder(weights, chunk_format)
    latents = encoder.latents(voxels[:1], [quality])[0]
    stream = encoder.stream
    symbols, coded = stream.quantise(latents.codes, latents.values, quality)
    words, escapes = stream.encode(symbols)
    grid = triple(iter(latents.codes.shape[1:]))
    y_hat = torch.from_numpy(coded.latents.astype(np.float32) * stream.context.unit).permute(3, 0, 1, 2)
    y_hat = y_hat[None].expand(batch, -1, -1, -1, -1).to(place)
    side = torch.zeros(batch, weights.config.code_width, *grid, device=place)
    qualities = torch.full((batch,), float(quality), device=place)

    def on_device(run: Callable[[], object]) -> float:
        with torch.inference_mode(), one_thread(place):
            return _fastest(run, place) / batch

    wavelet = on_device(lambda: analysis.wavelet(x))
    filtering = 0.0 if synthesis.postfilter is None else on_device(lambda: synthesis.filtered(x, qualities))
    step = torch.from_numpy(stream.rounding_step(quality) * stream.context.unit).to(place).expand(batch, -1)

    def anticipate() -> torch.Tensor:
        return anticipated(y_hat, side, qualities, step, analysis, synthesis)

    found = [
        ("wavelet", device, wavelet),
        ("analysis", device, max(on_device(lambda: analysis(x, qualities)) - wavelet, SHORTEST)),
        *([] if synthesis.postfilter is None else [("anticipation", device, on_device(anticipate))]),
        ("context and rounding", "one core", _fastest(
            lambda: stream.quantise(latents.codes, latents.values, quality), place)),
        ("entropy coding", "one core", _fastest(lambda: stream.encode(symbols), place)),
        ("context and entropy decoding", "one core", _fastest(
            lambda: stream.decode(words, escapes, grid, quality, len(symbols.tables)), place)),
        ("synthesis", device, max(
            on_device(lambda: synthesis(y_hat, side, qualities)) - filtering, SHORTEST)),
        *([] if synthesis.postfilter is None else [("post-filter", device, filtering)]),
    ]  # fmt: skip
    size = chunk_format.nbytes
    return [Stage(name, where, 1e3 * seconds, size / seconds / 1e6) for name, where, seconds in found]


def stages_to_markdown(stages: list[Stage], quality: int, batch: int) -> str:
    """The stages as a table."""
    lines = [
        f"Stages at quality {quality}, networks in batches of {batch}, on a processor with one thread.",
        "",
        "| stage | where | ms a chunk | MB/s |",
        "|---|---|---|---|",
        *(f"| {s.name} | {s.where} | {s.milliseconds:.2f} | {s.speed:.4g} |" for s in stages),
    ]
    return "\n".join(lines) + "\n"


def _fastest(run: Callable[[], object], place: torch.device) -> float:
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        run()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        times.append(max(time.perf_counter() - start, SHORTEST))
    return min(times[1:])
