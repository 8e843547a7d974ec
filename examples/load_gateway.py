"""Viewers that pan through an archive served by `ucray serve`: latencies, and the server's memory.

python examples/load_gateway.py http://127.0.0.1:8000 --viewers 50 --seconds 60 --pid PID
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from pathlib import Path

import httpx
import numpy as np


async def view(
    url: str, image: str, seed: int, until: float, seconds: list[float], refused: list[int]
) -> None:
    """One viewer: walks from chunk to chunk, six requests at once like a browser, on all levels."""
    choose = random.Random(seed)
    limits = httpx.Limits(max_connections=6)
    async with httpx.AsyncClient(base_url=f"{url}/{image}/zarr", timeout=120, limits=limits) as client:
        group = (await client.get("zarr.json")).json()
        levels = [each["path"] for each in group["attributes"]["ome"]["multiscales"][0]["datasets"]]
        arrays = {level: (await client.get(f"{level}/zarr.json")).json() for level in levels}

        async def fetch(path: str) -> None:
            started = time.perf_counter()
            answer = await client.get(path)
            if answer.status_code == 503:
                refused.append(1)
                await asyncio.sleep(float(answer.headers["retry-after"]))
            else:
                answer.raise_for_status()
                seconds.append(time.perf_counter() - started)

        while time.perf_counter() < until:
            level = choose.choice(levels)
            chunk = arrays[level]["chunk_grid"]["configuration"]["chunk_shape"]
            counts = [-(-n // c) for n, c in zip(arrays[level]["shape"], chunk, strict=True)]
            z = choose.randrange(counts[0])
            corner = [choose.randrange(n) for n in counts[1:]]
            plane = [
                (y, x)
                for y in range(corner[0], min(corner[0] + 2, counts[1]))
                for x in range(corner[1], min(corner[1] + 3, counts[2]))
            ]
            await asyncio.gather(*(fetch(f"{level}/c/{z}/{y}/{x}") for y, x in plane))
            await asyncio.sleep(choose.uniform(0.0, 0.5))


def resident(pid: int) -> float:
    """Resident memory of a process in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1e3


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--image", default="compressed")
    parser.add_argument("--viewers", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--pid", type=int, help="process of the server")
    options = parser.parse_args()
    taken: list[float] = []
    refused: list[int] = []
    started = time.perf_counter()
    until = started + options.seconds
    viewers = [
        asyncio.create_task(view(options.url, options.image, seed, until, taken, refused))
        for seed in range(options.viewers)
    ]
    steps = 6
    for step in range(steps):
        await asyncio.sleep(options.seconds / steps)
        memory = f", {resident(options.pid):.0f} MB" if options.pid else ""
        print(f"{(step + 1) * options.seconds / steps:4.0f} s: {len(taken)} chunks{memory}", flush=True)
    await asyncio.gather(*viewers)
    rate = len(taken) / (time.perf_counter() - started)
    p50, p95, p99 = np.percentile(taken, [50, 95, 99]) * 1e3
    print(f"{rate:.0f} chunks/s; latency p50 {p50:.0f}, p95 {p95:.0f}, p99 {p99:.0f} ms")
    print(f"{len(refused)} told to wait")


if __name__ == "__main__":
    asyncio.run(main())
