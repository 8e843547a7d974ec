"""Writes the small volumes beside it, with libraries that ucray does not read with.

They stand in the repository because those libraries do not install beside ucray's own (N5 needs zarr 2):

    python -m venv other && other/bin/pip install "zarr==2.18.7" "numcodecs<0.16" "cloud-volume==12.15.2" \
        "tables==3.11.1" && other/bin/python tests/sources/write.py

Every volume holds `voxels(...)` of its shape and dtype; test_sources.py computes them anew.
"""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SHAPE = (9, 10, 11)


def voxels(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    """A gradient along each axis, another on each."""
    index = np.indices(shape)
    steps = np.array([3, 11, 37, 101, 53])[: len(shape)][::-1]
    return (np.tensordot(steps, index, 1) % 251).astype(dtype)


def n5() -> None:
    """zarr 2's N5 store: block-wise gzip, big-endian, axes in the other order; one block is left out."""
    # Another release than the one this project is checked with.
    zarr: Any = import_module("zarr")
    root = zarr.open_group(zarr.N5Store(str(HERE / "volume.n5")), mode="w")
    array = root.create_dataset(
        "em/s0", shape=SHAPE, chunks=(4, 5, 6), dtype="uint16", compressor=zarr.GZip(), fill_value=0
    )
    array[:, :, :6] = voxels(SHAPE, "uint16")[:, :, :6]
    array.attrs["resolution"] = [4.0, 4.0, 40.0]
    array.attrs["units"] = ["nm", "nm", "nm"]


def precomputed() -> None:
    """cloud-volume: raw with two channels, jpeg, and sharded."""
    from cloudvolume import CloudVolume
    from cloudvolume.lib import Bbox

    kinds: dict[str, dict[str, Any]] = {
        "raw": {"encoding": "raw", "num_channels": 2, "data_type": "uint16"},
        "jpeg": {"encoding": "jpeg", "num_channels": 1, "data_type": "uint8"},
        "sharded": {"encoding": "raw", "num_channels": 1, "data_type": "uint8"},
    }
    for name, kind in kinds.items():
        place = HERE / f"{name}.precomputed"
        size = SHAPE if name == "raw" else (16, 16, 16)
        info = CloudVolume.create_new_info(
            layer_type="image",
            resolution=(4, 4, 40),
            voxel_offset=(100, 200, 300),
            chunk_size=(8, 8, 8),
            volume_size=size[::-1],
            **kind,
        )
        if name == "sharded":
            info["scales"][0]["sharding"] = {
                "@type": "neuroglancer_uint64_sharded_v1",
                "hash": "identity",
                "minishard_bits": 0,
                "preshift_bits": 3,
                "shard_bits": 0,
                "minishard_index_encoding": "gzip",
                "data_encoding": "gzip",
            }
        volume = CloudVolume(f"file://{place}", info=info, compress=False, progress=False, provenance={})
        volume.commit_info()
        if name == "raw":
            data = voxels((2, *size), "uint16").transpose(3, 2, 1, 0)
        elif name == "jpeg":
            data = (np.indices(size).sum(0) * 4 + 60).astype("uint8").transpose(2, 1, 0)[..., None]
        else:
            data = voxels(size, "uint8").transpose(2, 1, 0)[..., None]
        if name == "sharded":
            from cloudvolume.datasource.precomputed.sharding import ShardingSpecification

            spec = ShardingSpecification.from_dict(info["scales"][0]["sharding"])
            files = volume.image.make_shard(data, Bbox((100, 200, 300), (116, 216, 316)), 0, spec=spec)
            key = place / info["scales"][0]["key"]
            key.mkdir(parents=True, exist_ok=True)
            (key / files[0]).write_bytes(files[1])
        else:
            volume[:, :, :] = data
        (place / "provenance").unlink(missing_ok=True)
        stored = json.loads((place / "info").read_text())
        (place / "info").write_text(json.dumps(stored))


def hdf5() -> None:
    """PyTables: big-endian, chunked, zlib; two datasets."""
    import tables

    with tables.open_file(str(HERE / "volume.h5"), "w") as file:
        group = file.create_group("/", "volumes")
        array = file.create_carray(
            group,
            "raw",
            obj=voxels(SHAPE, ">u2").astype(">u2"),
            chunkshape=(4, 5, 6),
            filters=tables.Filters(complevel=5),
        )
        array.attrs.resolution = np.array([40.0, 4.0, 4.0])
        array.attrs.offset = np.array([400.0, 0.0, 8.0])
        file.create_carray(group, "mask", obj=np.ones(SHAPE, "u1"))


if __name__ == "__main__":
    for old in HERE.iterdir():
        if old.suffix in (".n5", ".precomputed"):
            shutil.rmtree(old)
    n5()
    precomputed()
    hdf5()
