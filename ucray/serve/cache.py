"""Payloads of chunks: made once however many ask, kept while there is room, refused when too many wait."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cachetools import LRUCache
from prometheus_client import CollectorRegistry, Counter, Gauge

from ucray.serve.scales import GZIP_LEVEL


class BusyError(Exception):
    """More chunks wait to be made than may."""


@dataclass(frozen=True)
class Payload:
    """A gzipped payload and its entity tag."""

    gzipped: bytes
    etag: str


class ChunkCache:
    """Makes payloads in threads and keeps the last used ones.

    Parameters
    ----------
    budget
        Bytes of payloads that are kept.
    threads
        Payloads that are made at once.
    waiting
        Payloads that may wait to be made.
    """

    def __init__(self, budget: int, threads: int, waiting: int, registry: CollectorRegistry) -> None:
        self._kept: LRUCache[Hashable, Payload] = LRUCache(budget, getsizeof=lambda one: len(one.gzipped))
        self._made: dict[Hashable, asyncio.Task[Payload]] = {}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._most = threads + waiting
        self._hits = Counter("ucray_serve_cache_hits", "Chunks that were kept.", registry=registry)
        self._misses = Counter("ucray_serve_cache_misses", "Chunks that were made.", registry=registry)
        size = Gauge("ucray_serve_cache_bytes", "Bytes of chunks that are kept.", registry=registry)
        size.set_function(lambda: float(self._kept.currsize))

    async def get(self, key: Hashable, make: Callable[[], bytes]) -> Payload:
        """The payload of a key; whoever asks for one that is being made waits for that one.

        Raises
        ------
        BusyError
            If it would have to be made, and too many wait already.
        """
        kept = self._kept.get(key)
        if kept is not None:
            self._hits.inc()
            return kept
        task = self._made.get(key)
        if task is None:
            if len(self._made) >= self._most:
                raise BusyError
            self._misses.inc()
            task = asyncio.create_task(self._make(key, make))
            self._made[key] = task
            task.add_done_callback(lambda _: self._made.pop(key, None))
        # A viewer that went away does not take the chunk from the others that wait for it.
        return await asyncio.shield(task)

    async def _make(self, key: Hashable, make: Callable[[], bytes]) -> Payload:
        payload = await asyncio.get_running_loop().run_in_executor(self._pool, lambda: _packed(make()))
        if len(payload.gzipped) <= self._kept.maxsize:
            self._kept[key] = payload
        return payload

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _packed(data: bytes) -> Payload:
    gzipped = gzip.compress(data, GZIP_LEVEL, mtime=0)
    return Payload(gzipped, f'"{hashlib.sha256(data).hexdigest()[:32]}"')
