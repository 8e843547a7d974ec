"""Picture and array peers through imagecodecs and Pillow: slice by slice, or the volume at once."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from ucray.bench.samples import Bytes3
from ucray.grid import Shape3

Encode = Callable[[Bytes3, float], bytes]
Decode = Callable[[bytes, Shape3], Bytes3]

JPEG_XL_EFFORT = 7
AVIF_SPEED = 4


@cache
def missing_avif() -> str | None:
    """Why Pillow cannot write AVIF; None if it can."""
    try:
        from PIL import features
    except ImportError:
        return "Pillow is not installed (extra: bench)"
    return None if features.check("avif") else "Pillow is built without AVIF"


@cache
def missing(codec: str) -> str | None:
    """Why a codec of imagecodecs cannot be used; None if it can."""
    try:
        import imagecodecs
    except ImportError:
        return "imagecodecs is not installed (extra: bench)"
    return None if getattr(imagecodecs, codec).available else f"imagecodecs is built without {codec}"


def by_slice(encode: Callable[[Any, float], bytes], decode: Callable[[bytes], Any]) -> tuple[Encode, Decode]:
    """A picture codec over the slices of a volume: lengths, then the pictures."""

    def encode_volume(volume: Bytes3, setting: float) -> bytes:
        pictures = [bytes(encode(np.ascontiguousarray(slice_), setting)) for slice_ in volume]
        lengths = np.array([len(p) for p in pictures], dtype="<u4").tobytes()
        return lengths + b"".join(pictures)

    def decode_volume(data: bytes, shape: Shape3) -> Bytes3:
        lengths = np.frombuffer(data[: 4 * shape[0]], "<u4")
        ends = 4 * shape[0] + np.cumsum(lengths)
        slices = [decode(data[end - n : end]) for end, n in zip(ends, lengths, strict=True)]
        return np.stack(slices).reshape(shape).astype(np.uint8)

    return encode_volume, decode_volume


def jpeg_xl() -> tuple[Encode, Decode]:
    """JPEG XL at effort 7; the setting is the Butteraugli distance."""
    import imagecodecs as ic

    def encode(picture: Any, distance: float) -> bytes:
        return bytes(ic.jpegxl_encode(picture, distance=distance, effort=JPEG_XL_EFFORT, lossless=False))

    return by_slice(encode, ic.jpegxl_decode)


def jpeg_2000() -> tuple[Encode, Decode]:
    """JPEG 2000; the setting is the PSNR in dB that the encoder aims at."""
    import imagecodecs as ic

    def encode(picture: Any, level: float) -> bytes:
        return bytes(ic.jpeg2k_encode(picture, level=int(level), codecformat="j2k", reversible=False))

    return by_slice(encode, ic.jpeg2k_decode)


def avif() -> tuple[Encode, Decode]:
    """AVIF through Pillow; the setting is its quality from 0 to 100."""
    from PIL import Image

    def encode(picture: Any, quality: float) -> bytes:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "AVIF", quality=int(quality), speed=AVIF_SPEED)
        return file.getvalue()

    def decode(data: bytes) -> Any:
        return np.asarray(Image.open(io.BytesIO(data)).convert("L"))

    return by_slice(encode, decode)


def jpeg() -> tuple[Encode, Decode]:
    """JPEG; the setting is its quality from 1 to 100."""
    import imagecodecs as ic

    def encode(picture: Any, level: float) -> bytes:
        return bytes(ic.jpeg_encode(picture, level=int(level)))

    return by_slice(encode, ic.jpeg_decode)


def zfp() -> tuple[Encode, Decode]:
    """Zfp over the volume; the setting is its absolute tolerance."""
    import imagecodecs as ic

    def encode(volume: Bytes3, tolerance: float) -> bytes:
        return bytes(ic.zfp_encode(volume.astype(np.float32), level=int(tolerance), mode="a"))

    def decode(data: bytes, shape: Shape3) -> Bytes3:
        return _to_bytes(ic.zfp_decode(data).reshape(shape))

    return encode, decode


def sz3() -> tuple[Encode, Decode]:
    """SZ3 over the volume; the setting is its absolute error bound."""
    import imagecodecs as ic

    def encode(volume: Bytes3, bound: float) -> bytes:
        return bytes(ic.sz3_encode(volume.astype(np.float32), mode="abs", abs=bound))

    def decode(data: bytes, shape: Shape3) -> Bytes3:
        return _to_bytes(ic.sz3_decode(data, shape=shape, dtype=np.float32).reshape(shape))

    return encode, decode


def _to_bytes(values: Any) -> Bytes3:
    return np.asarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
