"""Makes the golden archives of one format version: run once, when a version is frozen, and never again.

PYTHONPATH=deploy python tests/golden/make.py v1
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import zarr

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from conftest import (  # noqa: E402
    TINY,
    TINY_CELLS,
    TINY_DEPENDENT,
    TINY_FILTERED,
    TINY_INTERLACED,
    TINY_LONG_PATHS,
    build_weights,
    smooth_volume_of,
)

import ucray  # noqa: E402
from ucray.grid import Shape3  # noqa: E402

SMALL = {"chunk": (32, 32, 32), "shard": (32, 64, 64)}


def volume(shape: Shape3, seed: int) -> Any:
    """Tissue of which a part is speckled with fill, a chunk of 32^3 constant, one noise, one fill alone."""
    voxels = np.clip(smooth_volume_of(shape, seed) * 30 + 128, 1, 255).astype(np.uint8)
    random = np.random.default_rng(seed)
    voxels[:, :20, 40:50] = 0
    voxels[:8][random.random(voxels[:8].shape) < 0.05] = 0
    voxels[:32, 32:64, 64:96] = 7
    voxels[:32, :32, 64:96] = random.integers(1, 255, (32, 32, 32), dtype=np.uint8)
    voxels[:32, 32:64, :32] = 0
    return voxels


TINY_OF = {
    "v1": (TINY, 1),
    "v2": (TINY_FILTERED, 3),
    "v3": (TINY_DEPENDENT, 1),
    "v4": (TINY_INTERLACED, 1),
    "v5": (TINY_LONG_PATHS, 1),
    "v6": (TINY_CELLS, 3),
}
"""Configuration and seed of the untrained weights."""

ARCHIVES: dict[str, dict[str, tuple[dict[str, object], str]]] = {
    "v1": {
        "networks": ({}, "tiny.safetensors"),
        "bounded": ({"max_error": 2}, "tiny.safetensors"),
        "lossless": ({"lossless": True}, "tiny.safetensors"),
        "linear": ({"psnr": 30}, "em-fib-v1"),
    },
    "v2": {"filtered": ({"ratio": 12}, "tiny.safetensors")},
    "v3": {
        "dependent": ({"ratio": 8}, "tiny.safetensors"),
        "dependent-bounded": ({"max_error": 2}, "tiny.safetensors"),
    },
    "v4": {
        "interlaced": ({"ratio": 8}, "tiny.safetensors"),
        "interlaced-bounded": ({"max_error": 2}, "tiny.safetensors"),
    },
    "v5": {
        "long-paths": ({"ratio": 8}, "tiny.safetensors"),
        "long-paths-bounded": ({"max_error": 2}, "tiny.safetensors"),
    },
    "v6": {"cells": ({"ratio": 8}, "tiny.safetensors")},
}
"""Targets and weights."""


def main() -> None:
    """Write <version>/<archive> and <version>/<archive>.npz, the voxels it decoded to when it was made."""
    version = sys.argv[1]
    place = HERE / version
    place.mkdir()
    serial = ucray.RunOptions(serial=True)
    # Archives name their source: one that says nothing of the machine.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        source, weights = "volume.zarr", Path("tiny.safetensors")
        config, seed = TINY_OF[version]
        weights.write_bytes(build_weights(config, seed).to_bytes())
        zarr.save_array(source, volume((32, 64, 120), 3), path="0")
        for name, (target, chosen) in ARCHIVES[version].items():
            options = ucray.CompressOptions.model_validate({**SMALL, **target})
            archive = str(place / name)
            connection = ucray.Connection(array="0")
            ucray.compress(
                source, archive, options, weights=chosen, run_options=serial, connection=connection
            )
            decoded = np.asarray(zarr.open_array(f"{archive}/0", mode="r"))
            np.savez_compressed(place / f"{name}.npz", voxels=decoded)


if __name__ == "__main__":
    main()
