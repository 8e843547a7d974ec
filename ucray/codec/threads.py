"""Threads of a chunk's arithmetic: one, with chunks side by side."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

import torch
from threadpoolctl import ThreadpoolController


def one_thread(device: torch.device) -> AbstractContextManager[object]:
    """Compute with one thread on the processor while the block runs; blocks may nest and run side by side.

    A chunk is too small to share out: threads of torch and of numpy's linear algebra that wait for each
    other, or for a core that something else has, take longer than they save. Torch's are limited for the
    calling thread alone, and not where a GPU computes. Those of numpy, which has one number for the whole
    process, are limited by one of the threads that ask at a time.
    """
    # Torch sets a thread's number when it is first asked there, which must not come after the limit.
    torch.get_num_threads()
    apis = ("blas", "openmp") if device.type == "cpu" else ("blas",)
    limit: AbstractContextManager[object] = _libraries(apis).limit(limits=1)
    return limit


@cache
def _libraries(apis: tuple[str, ...]) -> ThreadpoolController:
    return ThreadpoolController().select(user_api=list(apis))
