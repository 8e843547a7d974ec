"""Video peers through ffmpeg: the slices of a volume as frames of one stream."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from functools import cache

import numpy as np

from ucray.bench.samples import Bytes3
from ucray.errors import BenchError
from ucray.grid import Shape3

SMALLEST_FRAME = 64
"""Pixels on each side; SVT-AV1 takes no less. Both sides are even."""

ENCODERS = {
    "libx265": ("gray", "hevc", ("-preset", "slow", "-tune", "psnr"), "-x265-params",
                "crf={}:log-level=none:info=0:keyint=-1"),
    "libsvtav1": ("yuv420p", "obu", ("-preset", "4"), "-svtav1-params", "crf={}:keyint=-1"),
}  # fmt: skip
"""Pixel format, container, options, and where the quality goes. No text is left in the streams."""


@cache
def missing(encoder: str) -> str | None:
    """Why an encoder cannot be used; None if it can."""
    if shutil.which("ffmpeg") is None:
        return "ffmpeg is not installed"
    listed = subprocess.run(["ffmpeg", "-hide_banner", "-encoders"], capture_output=True, text=True)
    return None if f" {encoder} " in listed.stdout else f"ffmpeg is built without {encoder}"


def encode(volume: Bytes3, encoder: str, crf: float) -> bytes:
    """One stream of the slices of a volume (z, y, x) at a constant rate factor."""
    pixels, container, options, flag, value = ENCODERS[encoder]
    padded = _padded(volume)
    frames = padded.tobytes()
    if pixels == "yuv420p":
        grey = bytes([128]) * (padded[0].size // 2)
        frames = b"".join(frame.tobytes() + grey for frame in padded)
    size = f"{padded.shape[2]}x{padded.shape[1]}"
    source = ["-f", "rawvideo", "-pix_fmt", pixels, "-s", size, "-r", "25", "-i", "-"]
    target = ["-c:v", encoder, *options, flag, value.format(f"{crf:g}"), "-f", container, "-"]
    return _ffmpeg([*source, *target], frames)


def decode(data: bytes, encoder: str, shape: Shape3) -> Bytes3:
    """Slices of a stream, as a volume (z, y, x)."""
    pixels, container, *_ = ENCODERS[encoder]
    height, width = (_side(n) for n in shape[1:])
    # Asked for in the format it was coded in: from any other, ffmpeg would stretch the range of values.
    raw = _ffmpeg(["-f", container, "-i", "-", "-f", "rawvideo", "-pix_fmt", pixels, "-"], data)
    frames = np.frombuffer(raw, np.uint8).reshape(shape[0], -1)[:, : height * width]
    return frames.reshape(-1, height, width)[:, : shape[1], : shape[2]]


def _ffmpeg(arguments: Sequence[str], data: bytes) -> bytes:
    done = subprocess.run(["ffmpeg", "-v", "error", "-nostdin", *arguments], input=data, capture_output=True)
    if done.returncode:
        raise BenchError(f"ffmpeg failed: {done.stderr.decode(errors='replace').strip()[-300:]}")
    return done.stdout


def _padded(volume: Bytes3) -> Bytes3:
    missing = [(0, 0), *((0, _side(n) - n) for n in volume.shape[1:])]
    return np.ascontiguousarray(np.pad(volume, missing, mode="edge"))


def _side(size: int) -> int:
    return max(SMALLEST_FRAME, size + size % 2)
