"""Weights that come with ucray, by name; `ucray/weights/` holds them and their model cards."""

from __future__ import annotations

from functools import cache
from importlib import resources

from ucray.codec.weights import Weights
from ucray.config import CodecConfig

SUFFIX = ".safetensors"


def shipped_names() -> tuple[str, ...]:
    """Names of all shipped weights, the newest last."""
    folder = resources.files("ucray") / "weights"
    names = (p.name.removesuffix(SUFFIX) for p in folder.iterdir() if p.name.endswith(SUFFIX))
    return tuple(sorted(names, key=lambda name: int(name.rpartition("v")[2])))


@cache
def shipped_weights(name: str) -> Weights:
    """Shipped weights by one of `shipped_names`."""
    return Weights.from_bytes((resources.files("ucray") / "weights" / f"{name}{SUFFIX}").read_bytes())


def shipped_for(config: CodecConfig) -> str | None:
    """The newest shipped weights whose cells follow the voxels as `config` does; None if there are none."""
    for name in reversed(shipped_names()):
        found = shipped_weights(name).config
        if (found.levels, found.latent_stride) == (config.levels, config.latent_stride):
            return name
    return None
