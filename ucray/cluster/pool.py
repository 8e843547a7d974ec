"""Do something with every shard of an archive: an actor pool on Ray, or one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import ray
import ray.data

from ucray.cluster.ingest import TASKS, one_row, one_row_batch
from ucray.cluster.session import coders, failure, ray_session
from ucray.errors import UcrayError
from ucray.grid import Shape3, triple

Found = TypeVar("Found")
FoundOut = TypeVar("FoundOut", covariant=True)


class ShardWorker(Protocol[FoundOut]):
    """Does one shard at a time; built once in every worker."""

    def shard(self, index: Shape3) -> FoundOut:
        """Do the shard and say what was found; errors that end the job are raised."""


def over_shards(
    build: Callable[[], ShardWorker[Found]],
    indices: Sequence[Shape3],
    *,
    serial: bool,
    memory: int,
    workers: int | None,
    worker_cpus: float | None,
) -> Iterator[Found]:
    """What workers find in the shards `indices`, in no order.

    `build` makes a worker; on Ray it runs in each actor, of which each takes up to `memory`
    bytes; there is one a core if `workers` is None.
    """
    if serial or not indices:
        worker = build()
        for index in indices:
            yield worker.shard(index)
        return
    with ray_session():
        found = coders(workers, len(indices), memory, cpus=worker_cpus)
        keys = [{"key": ".".join(map(str, index))} for index in indices]
        rows = ray.data.from_items(keys, override_num_blocks=min(len(keys), TASKS)).map_batches(
            _Rows,
            fn_constructor_args=(build,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=found.count),
            num_cpus=found.per_worker["CPU"],
            memory=found.per_worker["memory"],
        )
        try:
            for row in rows.iter_rows():
                found = row["found"].value
                if isinstance(found, UcrayError):
                    raise found
                yield found
        except UcrayError:
            raise
        except Exception as error:
            raise failure(error, "the Ray job") from error


class _Found(Generic[Found]):
    """One result as one value, so that Ray Data does not look into it."""

    def __init__(self, value: Found) -> None:
        self.value = value


class _Rows:
    def __init__(self, build: Callable[[], ShardWorker[Any]]) -> None:
        self._worker = build()

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        key = str(one_row(batch)["key"])
        index = triple(int(part) for part in key.split("."))
        found: Any
        try:
            found = self._worker.shard(index)
        except UcrayError as error:
            # As a value it keeps its name; raised, Ray would wrap it in words of its own.
            found = error
        return one_row_batch({"key": key, "found": _Found(found)})
