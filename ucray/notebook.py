"""What a notebook shows of an archive: a table of figures and a slice, in the colours of the notebook."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.generic]
"""Voxels (y, x)."""


def shown(rows: Mapping[str, str], plane: Callable[[], Plane], title: str) -> str:
    """HTML of rows and a slice, which is asked for only where there is what draws it."""
    cells = "".join(
        f'<tr><th style="text-align:left">{html.escape(name)}</th>'
        f'<td style="text-align:left">{html.escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:1em;align-items:flex-start">'
        f"{_image(plane, title)}<table>{cells}</table></div>"
    )


def _image(plane: Callable[[], Plane], title: str) -> str:
    """A slice as an <img>; nothing where pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        return ""
    values = np.asarray(plane(), np.float32)
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, [1, 99]) if finite.size else (0.0, 1.0)
    grey = np.clip(np.nan_to_num((values - low) / max(high - low, 1e-9)), 0, 1) * 255
    file = io.BytesIO()
    Image.fromarray(grey.astype(np.uint8)).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
