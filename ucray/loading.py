"""Modules and archives load sooner where nobody looks for garbage meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_collected() -> Iterator[None]:
    """No garbage collection within.

    What is loaded makes many objects, and they stay. Looking for garbage among all of torch's takes as long
    as importing zarr.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
