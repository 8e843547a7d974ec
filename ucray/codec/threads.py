"""Threads of the networks on a processor: one a chunk, chunks side by side."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from threadpoolctl import ThreadpoolController


def one_thread(device: torch.device) -> AbstractContextManager[object]:
    """Compute with one thread on a processor while the block runs; a GPU is left alone.

    The networks are too small to share out: threads that wait for each other, and for those of numpy's
    linear algebra in between, take longer than they save. This holds for the calling thread alone, so what
    else the process computes, and other chunks in other threads, go on as they were.
    """
    if device.type != "cpu":
        return nullcontext()
    # Torch sets a thread's number when it is first asked there, which must not come after the limit.
    torch.get_num_threads()
    limit: AbstractContextManager[object] = _openmp().limit(limits=1)
    return limit


@cache
def _openmp() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="openmp")
