"""Ray itself: start or join it, and share its cores out."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.data

from ucray.errors import JobError, UcrayError

REAP_SECONDS = 30.0
"""How long the processes of a local Ray may take to go after they were ended."""

RAY_DATA_THREADS = "ray-data-"
"""How the names of Ray Data's threads begin."""

WORKER_POOL = {"RAY_idle_worker_killing_time_threshold_ms": "60000"}
"""Environment of a Ray whose nodes ucray has to itself.

Ray ends idle processes beyond one a core after a second, and actors count. Where encode actors have the
cores, each read would start a process, whose imports take longer than its work.
"""


@dataclass(frozen=True)
class Resources:
    """What one worker of a group asks of Ray, and the threads it computes with."""

    per_worker: dict[str, float]
    threads: int


@contextmanager
def ray_session() -> Iterator[None]:
    """Join the Ray of this process or of RAY_ADDRESS, or start a local one for the block.

    A Ray that the block started ends with it; one that was there stays.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name, value in WORKER_POOL.items():
        os.environ.setdefault(name, value)
    # Ray's own notices and bars would bury the job's progress, which is what people look at.
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    on_termination = signal.getsignal(signal.SIGTERM)
    try:
        # Nobody is told where the dashboard of a Ray that lives for one job would be.
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise JobError(f"Ray cannot be reached or started: {' '.join(str(error).split())[:300]}") from None
    if threading.current_thread() is threading.main_thread():
        # Ray takes the signal for itself, and ends the process with a status that says nothing.
        signal.signal(signal.SIGTERM, on_termination)
    ray.data.DataContext.get_current().enable_progress_bars = False
    started = _started_processes()
    try:
        yield
    finally:
        # A job that was stopped leaves tasks behind, and threads of Ray Data that would tell all of them.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        _say_nothing_of_threads(RAY_DATA_THREADS)
        ray.shutdown()
        # Ray gives a process that it killed one second to go; on a busy machine that is too short.
        for process in started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(REAP_SECONDS)


@dataclass(frozen=True)
class _Told:
    """Tells what threads raise, but for those whose names begin with `silent`."""

    before: Callable[[threading.ExceptHookArgs], object]
    silent: str

    def __call__(self, raised: threading.ExceptHookArgs) -> None:
        if raised.thread is None or not raised.thread.name.startswith(self.silent):
            self.before(raised)


def _say_nothing_of_threads(prefix: str) -> None:
    """Leave out what threads whose names begin so raise from here on; they outlive the Ray that they ask."""
    if not isinstance(threading.excepthook, _Told):
        threading.excepthook = _Told(threading.excepthook, prefix)


def _started_processes() -> list[subprocess.Popen[bytes]]:
    """Processes of the local Ray that this process started; none of a cluster that it joined."""
    node = ray._private.worker._global_node
    return [] if node is None else [info.process for kind in node.all_processes.values() for info in kind]


def failure(error: Exception, job: str) -> UcrayError:
    """The error of ours inside what Ray wraps around it, or a JobError that names the innermost one."""
    inner: BaseException = error
    while not isinstance(inner, UcrayError) or isinstance(inner, ray.exceptions.RayTaskError):
        group = [*getattr(inner, "worker_failures", {}).values()]
        deeper = getattr(inner, "cause", None) or (group[0] if group else None) or inner.__cause__
        if not isinstance(deeper, BaseException):
            return JobError(f"{job} failed: {type(inner).__name__}: {' '.join(str(inner).split())[:300]}")
        inner = deeper
    return inner


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


def works_elsewhere() -> bool:
    """Whether Ray may place a worker on another machine than this one."""
    here = ray.get_runtime_context().get_node_id()
    return any_elsewhere([node for node in _nodes() if node["Alive"]], here)


def any_elsewhere(nodes: Sequence[Mapping[str, Any]], here: str) -> bool:
    """Whether, of nodes as Ray lists them, any with cores is on another machine than node `here`, or none."""
    (own,) = (node["NodeManagerAddress"] for node in nodes if node["NodeID"] == here)
    return {node["NodeManagerAddress"] for node in nodes if node["Resources"].get("CPU", 0.0) > 0} != {own}


BESIDE = 0.5
"""Cores of a node that workers leave to reading and writing, at the least."""


@dataclass(frozen=True)
class Coders:
    """Workers that code or decode chunks: how many, and what each asks of Ray."""

    count: int
    per_worker: dict[str, float]


def coders(
    workers: int | None, shards: int, memory: int, *, use_gpu: bool = False, cpus: float | None = None
) -> Coders:
    """Workers for a job of so many shards on the nodes there are; no more than it has shards.

    None is one for each core, or GPU. On a processor a worker computes with one thread, as its chunks do;
    None is then as many as the nodes have room for where each takes `memory` bytes. Unless `cpus` says
    otherwise each asks for a core, or for less where no core of a node would stay free to read and write;
    where they are said to take all cores there are, for so little that half of one stays free.
    """
    nodes = [node["Resources"] for node in _nodes() if node["Alive"]]
    rooms = [(node.get("CPU", 0.0), node.get("memory", 0.0)) for node in nodes]
    if use_gpu:
        count = workers or max(1, int(sum(node.get("GPU", 0.0) for node in nodes)))
        count = min(count, shards)
        found = Coders(count, resources(count, use_gpu=True, cpus=cpus).per_worker)
    else:
        found = shared_out(rooms, workers, shards, memory, cpus)
    return Coders(found.count, found.per_worker | {"memory": claimed(rooms, memory)})


def claimed(nodes: Sequence[tuple[float, float]], memory: int) -> float:
    """Bytes that a worker asks Ray for, which then puts no more on a node than there is memory for.

    On nodes that all have less than it may take it asks for what the largest has, and is alone there.
    """
    rooms = [room for cores, room in nodes if cores >= 1.0 and room > 0.0]
    return min(float(memory), max(rooms, default=float(memory)))


def shared_out(
    nodes: Sequence[tuple[float, float]], workers: int | None, shards: int, memory: int, cpus: float | None
) -> Coders:
    """Workers on processors, for nodes of so many cores and bytes of memory; see `coders`."""
    there = [node for node in nodes if node[0] >= 1.0]
    usable = there or [(1.0, float(memory))]
    smallest = min(cores for cores, _ in usable)
    # Ray goes by cores: where memory is short, a worker asks for those that there is no memory for.
    crowded = [
        math.ceil(cores / max(1.0, room // memory)) for cores, room in usable if room // memory < cores
    ]
    if cpus is None and workers is None and crowded:
        cpus = min(float(max(crowded)), max(0.5, smallest - 1.0))
    if cpus is not None:
        fitting = sum(max(1, int((cores - 1.0) // cpus)) for cores, _ in usable)
        count = min(workers or fitting, shards)
        if count > sum(int((cores - 1.0) // cpus) for cores, _ in there):
            # Workers that fill every node would wait for ever for what nothing is left to read.
            filled = [(cores, cores // cpus) for cores, _ in there if cores >= cpus and cores % cpus < BESIDE]
            shares = [math.floor(100.0 * (cores - BESIDE) / fit) / 100.0 for cores, fit in filled]
            cpus = min([cpus, *shares])
        return Coders(count, {"CPU": cpus})
    count = min(workers or sum(int(cores) for cores, _ in usable), shards)
    free = max(smallest - 1.0, smallest / 2.0)
    share = math.floor(100.0 * free / math.ceil(count / len(usable))) / 100.0
    return Coders(count, {"CPU": min(1.0, max(0.01, share))})


def resources(workers: int, *, use_gpu: bool, cpus: float | None = None) -> Resources:
    """What each of `workers` workers asks for that train, or code on GPUs.

    `cpus` cores each where they are given: a cluster that grows has no nodes yet to go by. Else the cores
    of the nodes are shared out, of which one stays free for reading. A worker then asks
    for as many cores as its share, half a core at least, and computes with as many threads as its node
    has cores for it: reading leaves most of its reserve idle.
    """
    gpu = {"GPU": 1.0} if use_gpu else {}
    if cpus is not None:
        return Resources({"CPU": cpus} | gpu, max(1, int(cpus)))
    nodes = [node["Resources"].get("CPU", 0.0) for node in _nodes() if node["Alive"]]
    usable = [cpus for cpus in nodes if cpus >= 1] or [1.0]
    on_a_node = math.ceil(workers / len(usable))
    share = max(0.5, math.floor((min(usable) - 1.0) / on_a_node))
    return Resources({"CPU": share} | gpu, max(1, int(min(usable) // on_a_node)))
