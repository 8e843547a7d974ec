"""ucray compresses electron-microscopy volumes on a Ray cluster into archives any zarr reader opens.

The functions below are the command line's jobs. They are imported when first used: reading an
archive with zarr needs neither Ray nor anything else of a job.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ucray.loading import nothing_collected

if TYPE_CHECKING:
    from ucray.cluster.compress import JobReport
    from ucray.cluster.connection import Connection
    from ucray.cluster.jobs import (
        compress,
        decompress,
        info,
        plan,
        synth,
        train,
        verify,
    )
    from ucray.cluster.pipeline import RunOptions
    from ucray.cluster.plan import CompressOptions, CompressPlan
    from ucray.cluster.telemetry import Event
    from ucray.cluster.verify import Verification
    from ucray.cluster.weights_store import load_weights
    from ucray.codec.weights import Weights
    from ucray.config import CodecConfig
    from ucray.errors import UcrayError
    from ucray.reader import Reader, View, open
    from ucray.settings import TrainingConfig
    from ucray.zarr_codec import UcrayCodec

_PLACES = {
    "CodecConfig": "ucray.config",
    "CompressOptions": "ucray.cluster.plan",
    "CompressPlan": "ucray.cluster.plan",
    "Connection": "ucray.cluster.connection",
    "Event": "ucray.cluster.telemetry",
    "JobReport": "ucray.cluster.compress",
    "Reader": "ucray.reader",
    "RunOptions": "ucray.cluster.pipeline",
    "TrainingConfig": "ucray.settings",
    "UcrayCodec": "ucray.zarr_codec",
    "UcrayError": "ucray.errors",
    "Verification": "ucray.cluster.verify",
    "View": "ucray.reader",
    "Weights": "ucray.codec.weights",
    "compress": "ucray.cluster.jobs",
    "decompress": "ucray.cluster.jobs",
    "info": "ucray.cluster.jobs",
    "load_weights": "ucray.cluster.weights_store",
    "open": "ucray.reader",
    "plan": "ucray.cluster.jobs",
    "synth": "ucray.cluster.jobs",
    "train": "ucray.cluster.jobs",
    "verify": "ucray.cluster.jobs",
}

__version__ = version("ucray")

__all__ = [
    "CodecConfig",
    "CompressOptions",
    "CompressPlan",
    "Connection",
    "Event",
    "JobReport",
    "Reader",
    "RunOptions",
    "TrainingConfig",
    "UcrayCodec",
    "UcrayError",
    "Verification",
    "View",
    "Weights",
    "compress",
    "decompress",
    "info",
    "load_weights",
    "open",
    "plan",
    "synth",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'ucray' has no attribute {name!r}")
    with nothing_collected():
        return getattr(import_module(_PLACES[name]), name)
