"""Random cut-outs of an archive, as tracing neurons asks for them: how many a second, in how many workers.

python examples/random_reads.py em.ucray --count 200
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ucray

EDGE = 64


def read(reader: ucray.Reader, seed: int, count: int) -> int:
    """Read that many cut-outs at places that no grid knows of; the voxels read."""
    choose = random.Random(seed)
    total = 0
    for _ in range(count):
        corner = [choose.randrange(max(1, n - EDGE + 1)) for n in reader.shape]
        box = tuple(slice(n, n + EDGE) for n in corner)
        voxels: Any = reader[box]
        total += voxels.size
    return total


def read_in_a_process(task: tuple[str, int, int]) -> int:
    """The same in a process of its own, which keeps the model from one task to the next."""
    url, seed, count = task
    return read(_opened(url), seed, count)


_READERS: dict[str, ucray.Reader] = {}


def _opened(url: str) -> ucray.Reader:
    if url not in _READERS:
        _READERS[url] = ucray.open(url)
        _READERS[url][:1, :1, :1]
    return _READERS[url]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("archive")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args()
    started = time.perf_counter()
    reader = _opened(options.archive)
    print(f"opened, with a first voxel, in {time.perf_counter() - started:.2f} s")
    share = options.count // options.workers

    def told(way: str, seconds: float, voxels: int) -> None:
        print(f"{way}: {voxels / EDGE**3 / seconds:.1f} cut-outs of {EDGE}^3 a second")

    started = time.perf_counter()
    voxels = read(reader, 0, options.count)
    told("one thread", time.perf_counter() - started, voxels)
    with ThreadPoolExecutor(options.workers) as threads:
        started = time.perf_counter()
        voxels = sum(threads.map(lambda seed: read(reader, seed, share), range(options.workers)))
        told(f"{options.workers} threads", time.perf_counter() - started, voxels)
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers) as processes:
        processes.map(read_in_a_process, [(options.archive, n, 1) for n in range(options.workers)], 1)
        started = time.perf_counter()
        tasks = [(options.archive, n, share) for n in range(options.workers)]
        voxels = sum(processes.map(read_in_a_process, tasks, 1))
        told(f"{options.workers} processes", time.perf_counter() - started, voxels)


if __name__ == "__main__":
    main()
