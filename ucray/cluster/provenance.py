"""Where an archive comes from: a command that makes it again, the versions that made it, what it was to be.

Nothing of when and how a job was started is in it: the same job leaves the same bytes.
"""

from __future__ import annotations

import math
import platform
import shlex
from importlib.metadata import version
from typing import Any

import numpy as np

from ucray.cluster.plan import CompressPlan
from ucray.cluster.rate import Measured
from ucray.grid import format_shape

LIBRARIES = ("ucray", "torch", "numpy", "zarr", "constriction", "ray")


def provenance(plan: CompressPlan, measured: Measured) -> dict[str, Any]:
    """The command of a planned job, without its weights and its destination, the versions here, figures.

    The figures are those of the sample that was coded to plan the job: metadata are written before any shard
    and stay. What was stored stands in each shard's statistics (`ucray info` adds them up).
    """
    volume = plan.volume
    command = ["ucray", "compress", volume.url]
    for name, value in plan.target.describe().items():
        command += [f"--{name.replace('_', '-')}", f"{value:g}"]
    if volume.path:
        command += ["--array", volume.path]
    if volume.select:
        command += ["--select", ",".join(f"{axis}={place}" for axis, place in volume.select)]
    command += ["--roi", str(plan.region)]
    command += ["--chunk", format_shape(plan.grid.chunk), "--shard", format_shape(plan.grid.shard)]
    if plan.importance is not None:
        command += ["--importance", plan.importance.weights.url]
    if plan.tracer is not None:
        command += ["--traced-by", plan.tracer.url]
    if plan.levels:
        command += ["--levels", str(len(plan.levels))]
    if np.isnan(volume.fill_value) and not np.issubdtype(np.dtype(volume.dtype), np.floating):
        command.append("--no-exact-fill")
    versions = {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}
    expected = {
        "ratio": float(f"{plan.bytes_in / measured.bytes_out:.3g}"),
        "psnr": round(measured.psnr, 1) if math.isfinite(measured.psnr) else None,
    }
    return {"command": shlex.join(command), "versions": versions, "expected": expected}
