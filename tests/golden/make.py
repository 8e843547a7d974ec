"""Makes the golden archives of one format version: run once, when a version is frozen, and never again.

PYTHONPATH=deploy python tests/golden/make.py
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

from conftest import TINY, build_weights, smooth_volume_of  # noqa: E402

import ucray  # noqa: E402
from ucray.grid import Shape3  # noqa: E402

VERSION = HERE / "v1"
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


def main() -> None:
    """Write v1/<archive> and v1/<archive>.npz, the voxels that it decoded to when it was made."""
    VERSION.mkdir()
    serial = ucray.RunOptions(serial=True)
    # Archives name their source: one that says nothing of the machine.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        source, weights = "volume.zarr", Path("tiny.safetensors")
        weights.write_bytes(build_weights(TINY, seed=1).to_bytes())
        zarr.save_array(source, volume((32, 64, 120), 3), path="0")
        asked: dict[str, tuple[dict[str, object], str]] = {
            "networks": ({}, str(weights)),
            "bounded": ({"max_error": 2}, str(weights)),
            "lossless": ({"lossless": True}, str(weights)),
            "linear": ({"psnr": 30}, "em-fib-v1"),
        }
        for name, (target, chosen) in asked.items():
            options = ucray.CompressOptions.model_validate({**SMALL, **target})
            archive = str(VERSION / name)
            connection = ucray.Connection(array="0")
            ucray.compress(
                source, archive, options, weights=chosen, run_options=serial, connection=connection
            )
            decoded = np.asarray(zarr.open_array(f"{archive}/0", mode="r"))
            np.savez_compressed(VERSION / f"{name}.npz", voxels=decoded)


if __name__ == "__main__":
    main()
