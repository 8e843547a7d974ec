"""The whole way on one machine: S3 in, Ray, train, compress, verify, S3 out, and a report.

Run it as `make demo`. It writes a synthetic EM-like volume into a real S3 server on loopback, trains
teacher and student on it briefly, compresses at ratio 64, verifies against the source, and leaves
report.md, report.json and slice.png in the folder given.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt

import ucray
from ucray.cluster.session import ray_session
from ucray.quality import ssim
from ucray.storage.objects import open_store

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "deploy"))
from object_store import ObjectStore

SHAPE = (256, 256, 256)
SHARD = (128, 128, 128)
RATIO = 64.0
TRAINING = ucray.TrainingConfig(teacher_steps=80, student_steps=50, batch=2)

Voxels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Stage:
    """One stage of the demo: what it is called, how long it took, bytes it went through."""

    name: str
    seconds: float
    voxel_bytes: int | None

    @property
    def speed(self) -> str:
        """MB/s of voxels, where that means something."""
        return f"{self.voxel_bytes / self.seconds / 1e6:.1f}" if self.voxel_bytes else ""


def main() -> None:
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ucray-demo-") as folder, ObjectStore(folder) as store:
        os.environ.update(store.environment())
        store.create_bucket("demo")
        connection = ucray.Connection(store.endpoint)
        with ray_session():
            stages, report, verification = run(connection)
        original, decoded = read_back(store.endpoint)
    # The outermost fill would flatter every figure: SSIM is taken over the tissue's middle.
    inner = tuple(slice(n // 8, n - n // 8) for n in SHAPE)
    similarity = ssim(original[inner], decoded[inner], 255.0)
    exact = bool(np.array_equal(original == 0, decoded == 0))
    figures = {
        "ratio": report.ratio,
        "psnr_db": verification.measured_psnr,
        "ssim": similarity,
        "bytes_in": report.bytes_in,
        "bytes_out": report.bytes_out,
        "bytes_weights": report.bytes_weights,
        "padding_exact": exact,
        "verified": verification.clean,
        "chunks": report.chunks,
        "seconds": {stage.name: stage.seconds for stage in stages},
    }
    (output / "report.json").write_text(json.dumps(figures, indent=1) + "\n")
    (output / "report.md").write_text(table(figures, stages))
    picture(original, decoded, output / "slice.png", figures)
    print(f"\n{table(figures, stages)}\nThe report and its picture are in {output}/")
    if not (verification.clean and exact):
        sys.exit(1)


def run(connection: ucray.Connection) -> tuple[list[Stage], ucray.JobReport, ucray.Verification]:
    """Synthesise, train, compress and verify; every stage through S3."""
    stages: list[Stage] = []
    voxels = int(np.prod(SHAPE))
    source, weights, archive = "s3://demo/em.zarr", "s3://demo/weights.safetensors", "s3://demo/em.ucray"

    def timed(name: str, voxel_bytes: int | None, job: Any) -> Any:
        print(f"{name} ...", flush=True)
        started = time.perf_counter()
        result = job()
        stages.append(Stage(name, time.perf_counter() - started, voxel_bytes))
        return result

    timed("synth", voxels, lambda: ucray.synth(source, SHAPE, connection=connection))
    timed("train", None, lambda: ucray.train(source, weights, TRAINING, connection=connection))
    options = ucray.CompressOptions(ratio=RATIO, shard=SHARD)
    report = timed(
        "compress",
        voxels,
        lambda: ucray.compress(source, archive, options, weights=weights, connection=connection),
    )
    verification = timed("verify", voxels, lambda: ucray.verify(archive, source, connection=connection))
    return stages, report, verification


def read_back(endpoint: str) -> tuple[Voxels, Voxels]:
    """Source and archive as plain zarr reads them."""
    import zarr

    arrays = [
        zarr.open_group(open_store(f"s3://demo/{name}", endpoint), mode="r")["0"]
        for name in ("em.zarr", "em.ucray")
    ]
    original, decoded = (np.asarray(array[...]) for array in arrays)  # type: ignore[index]
    return original, decoded


def table(figures: dict[str, Any], stages: list[Stage]) -> str:
    """The report as Markdown."""
    rows = [
        f"| ratio (all bytes but the weights) | {figures['ratio']:.1f} |",
        f"| PSNR | {figures['psnr_db']:.2f} dB |",
        f"| SSIM (inner part) | {figures['ssim']:.4f} |",
        f"| bytes in | {figures['bytes_in']:,} |",
        f"| bytes out | {figures['bytes_out']:,} |",
        f"| bytes of the decoder's weights | {figures['bytes_weights']:,} |",
        f"| padding exact | {'yes' if figures['padding_exact'] else 'NO'} |",
        f"| verified | {'clean' if figures['verified'] else 'NOT CLEAN'} |",
    ]
    lines = ["| figure | value |", "|---|---|", *rows, "", "| stage | seconds | MB/s |", "|---|---|---|"]
    lines += [f"| {stage.name} | {stage.seconds:.1f} | {stage.speed} |" for stage in stages]
    return "\n".join(lines) + "\n"


def picture(original: Voxels, decoded: Voxels, path: Path, figures: dict[str, Any]) -> None:
    """One slice: original, decoded, error; whole above, a detail below."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    middle = original.shape[0] // 2
    first, second = original[middle].astype(float), decoded[middle].astype(float)
    figure, axes = pyplot.subplots(2, 3, figsize=(13.5, 9.2), layout="constrained")
    for row, part in zip(axes, (np.s_[:, :], np.s_[80:176, 80:176]), strict=True):
        for axis, image in zip(row[:2], (first, second), strict=True):
            axis.imshow(image[part], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        shown = row[2].imshow((second - first)[part], cmap="RdBu", vmin=-40, vmax=40, interpolation="nearest")
        figure.colorbar(shown, ax=row[2], label="decoded - original (grey levels)", shrink=0.85)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    ratio, psnr = figures["ratio"], figures["psnr_db"]
    titles = ("original", f"decoded at ratio {ratio:.1f}", f"error, PSNR {psnr:.2f} dB")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    axes[1][0].set_ylabel("detail")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
