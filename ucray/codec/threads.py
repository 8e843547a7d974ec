"""Threads of a chunk's arithmetic: one, with chunks side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from threading import Lock

import torch
from threadpoolctl import ThreadpoolController

_ALGEBRA = Lock()
"""Held while numpy's number is looked at and changed."""


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Compute with one thread on the processor while the block runs; blocks may nest and run side by side.

    A chunk is too small to share out: threads of torch and of numpy's linear algebra that wait for each
    other, or for a core that something else has, take longer than they save. Torch's are limited for the
    calling thread alone, and not where a GPU computes; its matrix products keep a number that somebody gave
    it by `torch.set_num_threads`. Numpy has one number for the whole process: the first block that finds
    more than one limits it, and gives it back when it ends.
    """
    # Torch sets a thread's number when it is first asked there, which must not come after the limit.
    torch.get_num_threads()
    limited = _libraries("openmp").limit(limits=1) if device.type == "cpu" else nullcontext()
    with limited, _one_thread_of_algebra():
        yield


@contextmanager
def _one_thread_of_algebra() -> Iterator[None]:
    libraries = _libraries("blas")
    with _ALGEBRA:
        # Whoever finds the limit set has nothing to give back: it would be the limit.
        free = any(library.num_threads != 1 for library in libraries.lib_controllers)
        limit = libraries.limit(limits=1) if free else nullcontext()
        limit.__enter__()
    try:
        yield
    finally:
        with _ALGEBRA:
            limit.__exit__(None, None, None)


@cache
def _libraries(api: str) -> ThreadpoolController:
    return _loaded().select(user_api=api)


@cache
def _loaded() -> ThreadpoolController:
    """All that are loaded: looking for them takes a few milliseconds."""
    return ThreadpoolController()
