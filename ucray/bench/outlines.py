"""What a tracer finds, drawn over what it was found in: one crop as each codec leaves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

CROP = (128, 160)
"""Rows and columns of the crop, from the middle of the middle section."""

COLOUR = (1.0, 0.55, 0.0)


@dataclass(frozen=True)
class Panel:
    """A crop of one codec at one ratio asked for: voxels (y, x), and segments, or membranes, in them."""

    codec: str
    wanted: float
    ratio: float
    voxels: npt.NDArray[np.generic]
    found: npt.NDArray[np.generic]

    @classmethod
    def of(
        cls,
        codec: str,
        wanted: float,
        ratio: float,
        volume: npt.NDArray[np.generic],
        found: npt.NDArray[np.generic],
    ) -> Panel:
        """Cut out of a volume and of what was found in it, both (z, y, x)."""
        middle = volume.shape[0] // 2
        place = tuple(
            slice(max(0, (n - size) // 2), (n - size) // 2 + size if n > size else n)
            for n, size in zip(volume.shape[1:], CROP, strict=True)
        )
        return cls(codec, wanted, ratio, volume[middle][place].copy(), found[middle][place].copy())


def draw(panels: Sequence[Panel], file: Path, title: str) -> None:
    """A row for each codec, a column for each ratio; the first panel, the original, stands at the left."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    original, coded = panels[0], panels[1:]
    codecs = list(dict.fromkeys(panel.codec for panel in coded))
    ratios = sorted({panel.wanted for panel in coded})
    low, high = np.quantile(original.voxels.astype(np.float64), [0.002, 0.998])
    rows, columns = max(1, len(codecs)), 1 + len(ratios)
    height, width = original.voxels.shape
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(3.2 * columns, 3.2 * rows * height / width + 0.5),
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat:
        axis.axis("off")
    _show(axes[0][0], original, "original", low, high)
    for panel in coded:
        axis = axes[codecs.index(panel.codec)][1 + ratios.index(panel.wanted)]
        _show(axis, panel, f"{panel.codec}, ratio {panel.ratio:.0f}", low, high)
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _show(axis: object, panel: Panel, title: str, low: float, high: float) -> None:
    from skimage.segmentation import mark_boundaries

    grey = np.clip((panel.voxels.astype(np.float64) - low) / max(high - low, 1e-9), 0.0, 1.0)
    # Drawn at three pixels a voxel, so that a line is thinner than what it runs along.
    big, found = (np.kron(part, np.ones((3, 3))) for part in (grey, panel.found.astype(np.int64)))
    marked = mark_boundaries(big, found.astype(np.int64), color=COLOUR, mode="inner")  # type: ignore[no-untyped-call]
    axis.imshow(marked, interpolation="nearest")  # type: ignore[attr-defined]
    axis.set_title(title, fontsize=10)  # type: ignore[attr-defined]
