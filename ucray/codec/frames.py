"""zstd frames whose size is known before they are unpacked."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard


def pack(data: bytes, level: int) -> bytes:
    """One frame, which says how long it is."""
    return zstandard.ZstdCompressor(level=level).compress(data)


def unpack_exactly(frame: bytes, target: npt.NDArray[Any]) -> bool:
    """Unpack a frame into `target`; False if it is damaged or of another size, which takes no memory."""
    try:
        # A frame that does not say how long it is says -1.
        if zstandard.frame_content_size(frame) != target.nbytes:
            return False
        data = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError:
        return False
    target.reshape(-1)[:] = np.frombuffer(data, target.dtype)
    return True
