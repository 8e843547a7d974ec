"""napari's way to an archive: its OME-Zarr reader, with no viewer and no ucray in the user's code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import ucray

LONG = os.environ.get("UCRAY_TEST_LONG") == "1"

READ = """
import sys
import numpy as np
from napari_ome_zarr import napari_get_reader

archive, out = sys.argv[1:]
layers = napari_get_reader(archive)(archive)
data, options, kind = layers[0]
levels = data if isinstance(data, list) else [data]
np.savez(out, *[np.asarray(level) for level in levels])
print(kind, *np.ravel(options["scale"]))
"""


@pytest.mark.skipif(not LONG, reason="installs napari, more than fifty packages; UCRAY_TEST_LONG=1 runs it")
def test_napari_s_reader_gives_every_level(tmp_path: Path, tiny_weights: ucray.Weights) -> None:
    libraries = tmp_path / "libraries"
    constraints = Path(__file__).parents[1] / "deploy" / "constraints.txt"
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", str(libraries)], check=True)
    python = libraries / "bin" / "python"
    # What this environment has is there already; the new one only adds to it.
    site = next(p for p in sys.path if p.endswith("site-packages"))
    (next((libraries / "lib").glob("python*")) / "site-packages" / "tests.pth").write_text(
        f"import site; site.addsitedir({site!r})\n"
    )
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", str(constraints), "napari-ome-zarr>=0.6"],
        check=True,
        timeout=600,
    )
    source, archive = str(tmp_path / "em.zarr"), str(tmp_path / "em.ucray")
    (tmp_path / "tiny.safetensors").write_bytes(tiny_weights.to_bytes())
    ucray.synth(source, (32, 64, 64), seed=1)
    ucray.compress(
        source,
        archive,
        ucray.CompressOptions(psnr=20, chunk=(16, 32, 32), shard=(32, 64, 64), levels=2),
        weights=str(tmp_path / "tiny.safetensors"),
        run_options=ucray.RunOptions(serial=True),
    )
    out = tmp_path / "levels.npz"
    ended = subprocess.run(
        [python, "-c", READ, archive, str(out)], capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    # The reader prints lines of its own before.
    kind, *scale = ended.stdout.splitlines()[-1].split()
    assert kind == "image"
    edges, _ = ucray.open(archive).voxel_size
    assert [float(n) for n in scale] == edges
    group: Any = zarr.open_group(archive, mode="r")
    with np.load(out) as levels:
        assert len(levels.files) == 3
        for level, name in enumerate(levels.files):
            np.testing.assert_array_equal(levels[name], group[str(level)][...])
