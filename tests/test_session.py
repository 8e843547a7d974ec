"""A Ray of one's own: what it leaves behind says nothing, what others leave is told as ever."""

from __future__ import annotations

import threading

import pytest

from ucray.cluster.session import RAY_DATA_THREADS, _say_nothing_of_threads


def test_only_threads_of_ray_data_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda raised: told.append(raised.thread.name))

    def fail() -> None:
        raise ValueError

    for _ in range(3):
        # However many jobs a process runs.
        _say_nothing_of_threads(RAY_DATA_THREADS)
        for name in ("ray-data-metadata-prefetch", "mine"):
            thread = threading.Thread(target=fail, name=name)
            thread.start()
            thread.join()
    assert told == ["mine"] * 3
    first = threading.excepthook
    _say_nothing_of_threads(RAY_DATA_THREADS)
    assert threading.excepthook is first
