"""Code a volume with ucray and with its peers, and measure rate, distortion and time in one run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ucray.bench.ours import PROCESSES, VolumeCodec
from ucray.bench.peers import PEERS, Peer
from ucray.bench.samples import Samples
from ucray.codec.weights import Weights
from ucray.errors import SettingsError
from ucray.grid import Box, Shape3, blocks, triple
from ucray.quality import ErrorSum, SeamSum, ssim

STUDENT = "ucray"
"""ucray as it decodes from an archive."""

OURS = {STUDENT: "student", "ucray-teacher": "teacher"}
"""Names under which ucray takes part, and the network that decodes."""

RATIOS = (16.0, 32.0, 64.0, 128.0, 256.0, 500.0)

Volume = npt.NDArray[np.generic]
Result = TypeVar("Result")
Watch = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """One codec at one setting. Speeds are megabytes of the volume a second, wall clock.

    `seam_error` and `seam_step` say whether faces of ucray's chunks show (`ucray.quality.SeamSum`); not a
    number where a codec coded only some of the volume's chunks.
    """

    codec: str
    cut: str
    setting: float
    ratio: float
    psnr: float
    ssim: float
    encode_speed: float
    decode_speed: float
    threads: str
    seam_error: float
    seam_step: float
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """What was measured, and why some codecs were not."""

    points: tuple[Point, ...]
    missing: dict[str, str]


def codec_names() -> tuple[str, ...]:
    """All codecs that can be asked for."""
    return (*OURS, *PEERS)


def run_bench(
    volume: Volume,
    weights: Weights | None,
    chunk: Shape3,
    *,
    codecs: Sequence[str] = (),
    ratios: Sequence[float] = RATIOS,
    data_range: float = 255.0,
    fill_value: float = 0.0,
    watch: Watch = lambda codec: None,
    so_far: Callable[[Bench], object] = lambda found: None,
) -> Bench:
    """Measure every codec on `volume` (z, y, x).

    Parameters
    ----------
    codecs
        Names of `codec_names`; all if empty.
    ratios
        ucray is coded at each; of a peer's settings those within their span and one on either side.
    watch, so_far
        Told the name of each codec before it is measured, and all that was measured after it.

    Raises
    ------
    SettingsError
        If a codec has no such name.
    """
    chosen = tuple(codecs) or codec_names()
    if unknown := sorted(set(chosen) - set(codec_names())):
        raise SettingsError(f"--codecs {','.join(unknown)}: choose from {', '.join(codec_names())}")
    points: list[Point] = []
    missing: dict[str, str] = {}
    for name in chosen:
        watch(name)
        if name in OURS:
            if weights is None:
                missing[name] = "no weights were given"
            else:
                with VolumeCodec(volume, weights, chunk, fill_value) as ours:
                    points += _ours(ours, volume, name, ratios, data_range)
        elif (reason := PEERS[name].missing()) is not None:
            missing[name] = reason
        else:
            points += _peer(PEERS[name], volume, chunk, ratios, data_range)
        so_far(Bench(tuple(points), dict(missing)))
    return Bench(tuple(points), missing)


def _ours(
    codec: VolumeCodec, volume: Volume, name: str, ratios: Sequence[float], data_range: float
) -> Iterator[Point]:
    for ratio in ratios:
        quality = codec.quality_for(ratio)
        coded, encoding = _timed(lambda quality=quality: codec.encode(quality))  # type: ignore[misc]
        decoded, decoding = _timed(lambda coded=coded: codec.decode(coded, OURS[name]))  # type: ignore[misc]
        seams = SeamSum.between(volume, decoded, codec.chunk)
        yield Point(
            name,
            "chunks",
            float(quality),
            volume.nbytes / coded.nbytes,
            ErrorSum.between(volume, decoded).psnr(data_range),
            ssim(volume, decoded, data_range),
            volume.nbytes / encoding / 1e6,
            volume.nbytes / decoding / 1e6,
            f"{PROCESSES} processes",
            seams.error,
            seams.step,
        )


def _peer(
    peer: Peer, volume: Volume, chunk: Shape3, ratios: Sequence[float], data_range: float
) -> Iterator[Point]:
    samples = Samples.of(volume)
    shape = triple(iter(volume.shape))
    boxes = list(blocks(shape, chunk if peer.cut == "chunks" else shape))
    if peer.sampled:
        boxes = boxes[:: -(-len(boxes) // peer.sampled)]
    parts = [np.ascontiguousarray(samples.values[box.slices]) for box in boxes]
    originals = [volume[box.slices] for box in boxes]
    raw = sum(part.nbytes for part in originals)
    note = f"{len(boxes)} of the volume's chunks" if peer.sampled else ""
    for setting in peer.settings:
        if peer.by_ratio and not min(ratios) <= setting <= max(ratios):
            continue
        coded, encoding = _timed(lambda s=setting: [peer.encode(part, s) for part in parts])  # type: ignore[misc]
        ratio = raw / sum(map(len, coded))
        if ratio < min(ratios) / 2:
            continue
        decoded, decoding = _timed(
            lambda coded=coded: [
                peer.decode(d, triple(iter(p.shape))) for d, p in zip(coded, parts, strict=True)
            ]  # type: ignore[misc]
        )
        back = [samples.back(values) for values in decoded]
        error, similar = _distortion(originals, back, data_range)
        seams = (math.nan, math.nan) if note else _seams(volume, boxes, back, chunk)
        yield Point(
            peer.name, peer.cut, setting, ratio, error.psnr(data_range), similar,
            raw / encoding / 1e6, raw / decoding / 1e6, peer.threads, *seams, note,
        )  # fmt: skip
        if ratio > max(ratios):
            return


def _seams(
    volume: Volume, boxes: Sequence[Box], decoded: Sequence[Volume], chunk: Shape3
) -> tuple[float, float]:
    whole = np.empty(volume.shape, np.float64)
    for box, part in zip(boxes, decoded, strict=True):
        whole[box.slices] = part
    found = SeamSum.between(volume, whole, chunk)
    return found.error, found.step


def _distortion(
    originals: Sequence[Volume], decoded: Sequence[Volume], data_range: float
) -> tuple[ErrorSum, float]:
    error = ErrorSum()
    similar = 0.0
    for original, back in zip(originals, decoded, strict=True):
        error += ErrorSum.between(original, back)
        similar += ssim(original, back, data_range) * original.size
    return error, similar / error.voxels


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start
