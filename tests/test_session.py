"""A Ray of one's own: what it leaves behind says nothing, what others leave is told as ever."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from ucray.cluster.session import RAY_DATA_THREADS, _say_nothing_of_threads, any_elsewhere


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


@pytest.mark.parametrize(
    ("others", "elsewhere"),
    [
        ([], False),
        # Simulated nodes are on this machine too.
        ([("second", "10.0.0.1", 4.0)], False),
        ([("second", "10.0.0.2", 4.0)], True),
        # What has no cores takes no workers: a head, say.
        ([("second", "10.0.0.2", 0.0)], False),
    ],
)
def test_workers_may_be_on_other_machines(others: list[tuple[str, str, float]], elsewhere: bool) -> None:
    def nodes(cores: float) -> list[dict[str, Any]]:
        listed = [("first", "10.0.0.1", cores), *others]
        return [
            {"NodeID": name, "NodeManagerAddress": address, "Resources": {"CPU": number} if number else {}}
            for name, address, number in listed
        ]

    assert any_elsewhere(nodes(8.0), "first") is elsewhere
    # A head that takes no work, in a cluster that has yet to grow.
    assert any_elsewhere(nodes(0.0), "first") is (others != [("second", "10.0.0.1", 4.0)])
