"""The codecs of the benchmark by name, each with the settings that span its rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ucray.bench import pictures, siren, video
from ucray.bench.samples import Bytes3
from ucray.grid import Shape3

CRF_265 = (18, 21, 24, 27, 30, 33, 36, 39, 42, 45)
CRF_AV1 = (20, 27, 34, 41, 47, 52, 56, 60, 63)


@dataclass(frozen=True)
class Peer:
    """One codec under one way of cutting the volume.

    Parameters
    ----------
    cut
        What is coded on its own, and so can be read on its own: "volume", "slices" or "chunks".
    settings
        From fine to coarse.
    threads
        What the codec uses, for the table.
    missing
        Why it cannot run here; None if it can.
    sampled
        Chunks that stand for all, where coding all would take hours; 0 for all.
    by_ratio
        The setting is the ratio: those beyond the ratios asked for are not tried.
    resolution
        Between two of its settings the codec knows others, in steps of so much.
    """

    name: str
    cut: str
    settings: tuple[float, ...]
    threads: str
    missing: Callable[[], str | None]
    encode: Callable[[Bytes3, float], bytes]
    decode: Callable[[bytes, Shape3], Bytes3]
    sampled: int = 0
    by_ratio: bool = False
    resolution: float = 1.0


def _lazily(
    make: Callable[[], tuple[pictures.Encode, pictures.Decode]],
) -> tuple[pictures.Encode, pictures.Decode]:
    """Both halves of a codec whose library is imported when it is used."""
    return lambda volume, setting: make()[0](volume, setting), lambda data, shape: make()[1](data, shape)


def _video(name: str, encoder: str, settings: tuple[int, ...], cut: str, resolution: float = 1.0) -> Peer:
    return Peer(
        name,
        cut,
        tuple(map(float, settings)),
        "all",
        partial(video.missing, encoder),
        lambda volume, crf: video.encode(volume, encoder, crf),
        lambda data, shape: video.decode(data, encoder, shape),
        resolution=resolution,
    )


def _picture(name: str, library: str, make: Callable[[], tuple[pictures.Encode, pictures.Decode]],
             settings: tuple[float, ...], cut: str = "slices", resolution: float = 1.0) -> Peer:  # fmt: skip
    encode, decode = _lazily(make)
    return Peer(
        name, cut, settings, "1", partial(pictures.missing, library), encode, decode, resolution=resolution
    )


PEERS: dict[str, Peer] = {
    "x265": _video("x265 slow", "libx265", CRF_265, "volume", 0.25),
    "x265-chunks": _video("x265 slow, chunks", "libx265", CRF_265[2:], "chunks", 0.25),
    "av1": _video("SVT-AV1 preset 4", "libsvtav1", CRF_AV1, "volume"),
    "av1-chunks": _video("SVT-AV1 preset 4, chunks", "libsvtav1", CRF_AV1[2:], "chunks"),
    "jpegxl": _picture(
        "JPEG XL effort 7", "JPEGXL", pictures.jpeg_xl, (1.5, 3, 5, 8, 12, 17, 25), resolution=0.1
    ),
    "jpeg2000": _picture("JPEG 2000", "JPEG2K", pictures.jpeg_2000, (36, 34, 32, 30, 28, 26)),
    "avif": Peer(
        "AVIF", "slices", (70, 55, 40, 28, 18, 8, 1), "all", pictures.missing_avif, *_lazily(pictures.avif)
    ),
    "jpeg": _picture("JPEG", "JPEG", pictures.jpeg, (75, 50, 25, 12, 6, 3)),
    "zfp": _picture("zfp", "ZFP", pictures.zfp, (16, 64, 128, 256, 512), "volume"),
    "sz3": _picture("SZ3", "SZ3", pictures.sz3, (6, 12, 20, 30, 45, 70), "volume", 0.1),
    "siren": Peer(
        f"SIREN, {siren.STEPS} steps", "chunks", (16, 64, 256), "all", lambda: None,
        siren.encode, siren.decode, sampled=1, by_ratio=True, resolution=math.inf,
    ),
}  # fmt: skip
"""Every peer, whether it is installed here or not."""
