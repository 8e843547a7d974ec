"""A volume as codecs give it back at ratios that are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np

from ucray.bench.ours import VolumeCodec, Weighed
from ucray.bench.peers import PEERS, Peer
from ucray.bench.run import OURS
from ucray.bench.samples import Samples
from ucray.bench.tissue import Volume
from ucray.codec.weights import Weights
from ucray.grid import Shape3, blocks, triple


def missing_reason(name: str, weights: Weights | None) -> str | None:
    """Why a codec cannot take part; None where it can."""
    if name in PEERS:
        return PEERS[name].missing()
    return "no weights were given" if weights is None else None


def decoded_at(
    name: str,
    volume: Volume,
    weights: Weights | None,
    chunk: Shape3,
    ratios: Sequence[float],
    weighed: Weighed | None,
    fill_value: float,
) -> Iterator[tuple[float, float, Volume]]:
    """Code a volume (z, y, x) with a codec that is there: ratio asked for, ratio, and what comes back.

    A peer is taken at its coarsest setting that spends no fewer bytes; what it cannot reach is left out.
    Errors are `weighed`, and voxels of the fill value come back exactly, by ucray alone.
    """
    if name in PEERS:
        yield from _peer(PEERS[name], volume, chunk, ratios)
        return
    assert weights is not None
    with VolumeCodec(volume, weights, chunk, fill_value, weighed) as codec:
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
