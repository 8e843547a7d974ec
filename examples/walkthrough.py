# %% [markdown]
# # A volume through ucray, step by step
#
# Run it cell by cell in an editor that knows `# %%`, or as a whole: `python examples/walkthrough.py FOLDER`.
# Everything stays in the folder; with s3:// URLs in place of paths the same lines work on a bucket.

# %%
"""A volume through ucray, step by step."""

import sys
from pathlib import Path

import numpy as np
import zarr

import ucray

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "walkthrough")
source, archive = str(folder / "em.zarr"), str(folder / "em.ucray")

# %% [markdown]
# A synthetic EM-like volume takes the place of yours: any zarr array or OME-Zarr group of three axes.

# %%
ucray.synth(source, (128, 128, 128), seed=7)

# %% [markdown]
# What would a job do? The plan reads metadata alone, and writes nothing.

# %%
options = ucray.CompressOptions(ratio=32)
planned = ucray.plan(source, options)
print(f"{planned.chunk_count} chunks in {planned.shard_count} shards, {planned.bytes_in / 1e6:.1f} MB")

# %% [markdown]
# Compress it. Without `serial`, the same call starts a Ray or joins the one of RAY_ADDRESS.

# %%
report = ucray.compress(source, archive, options, run_options=ucray.RunOptions(serial=True))
print(f"ratio {report.ratio:.1f} at {report.psnr:.2f} dB in {report.seconds:.1f} s")

# %% [markdown]
# zarr alone opens the archive; only the chunks that a cutout touches are decoded.

# %%
volume = zarr.open_group(archive, mode="r")["0"]
assert isinstance(volume, zarr.Array)
cutout = np.asarray(volume[32:64, 40:120, 40:120])
print(f"cutout of shape {cutout.shape}, mean {cutout.mean():.1f}")

# %% [markdown]
# Is all of it there, and as good as the job said? Every object, every checksum, every voxel.

# %%
found = ucray.verify(archive, source, serial=True)
print(f"clean: {found.clean}, {found.measured_psnr:.2f} dB over {found.chunks} chunks")
