"""Chunks are computed with one thread each, and nothing else of the process is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
import torch
from threadpoolctl import ThreadpoolController

from ucray.codec.chunk import ChunkFormat
from ucray.codec.encoder import ChunkEncoder
from ucray.codec.threads import one_thread
from ucray.codec.weights import Weights

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def inside_and_after() -> tuple[int, int]:
    with one_thread(CPU):
        inside = torch.get_num_threads()
    return inside, torch.get_num_threads()


def test_a_processor_computes_with_one_thread_while_asked_to() -> None:
    assert inside_and_after() == (1, 3)
    with pytest.raises(ZeroDivisionError), one_thread(CPU):
        _ = 1 // 0
    assert torch.get_num_threads() == 3
    with one_thread(torch.device("cuda")):
        assert torch.get_num_threads() == 3


def test_threads_that_never_computed_before_are_left_as_they_would_be() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(inside_and_after).result() == (1, 3)
    with one_thread(CPU), ThreadPoolExecutor(1) as pool:
        # Only the thread that asked is limited.
        assert pool.submit(torch.get_num_threads).result() == 3


def algebra() -> int:
    """Threads of numpy's own library; scipy has another."""
    libraries = ThreadpoolController().select(user_api="blas").info()
    (found,) = (library for library in libraries if "numpy.libs" in library["filepath"])
    return int(found["num_threads"])


def test_numpy_s_algebra_is_limited_and_given_back() -> None:
    before = algebra()
    with one_thread(torch.device("cuda")):
        assert algebra() == 1
        with one_thread(CPU):
            assert algebra() == 1
        assert algebra() == 1
    assert algebra() == before


def test_chunks_side_by_side_leave_numpy_s_algebra_as_it_was() -> None:
    """Whoever goes last must not bring the other's limit back."""
    before = algebra()
    entered, leave = Event(), Event()

    def other() -> None:
        with one_thread(CPU):
            entered.set()
            leave.wait()

    with ThreadPoolExecutor(1) as pool:
        with one_thread(CPU):
            working = pool.submit(other)
            entered.wait()
            assert algebra() == 1
        leave.set()
        working.result()
        assert algebra() == before
        pool.submit(inside_and_after).result()
    assert algebra() == before


def test_the_networks_of_a_chunk_see_one_thread(
    tiny_weights: Weights,
    chunk_format: Callable[[str], ChunkFormat],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    forward = torch.nn.Module.__call__

    def watched(self: torch.nn.Module, *arguments: object, **named: object) -> object:
        seen.append(torch.get_num_threads())
        return forward(self, *arguments, **named)

    encoder = ChunkEncoder(tiny_weights, chunk_format("uint8"))
    voxels = np.random.default_rng(0).integers(1, 255, (32, 32, 32)).astype(np.uint8)
    monkeypatch.setattr(torch.nn.Module, "__call__", watched)
    data = encoder.encode(voxels, 128).data
    assert seen
    coding = len(seen)
    encoder.decoder.decode(data)
    assert len(seen) > coding
    assert set(seen) == {1}
    assert torch.get_num_threads() == 3
