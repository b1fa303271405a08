"""A lock that nobody can keep to himself."""

from __future__ import annotations

import threading
import time

import pytest

from expertshare.serving.scheduling import FairLock


def test_who_asks_again_at_once_waits_behind_those_who_asked_before() -> None:
    lock, order = FairLock(), []
    lock.acquire()

    def take(name: str) -> None:
        with lock:
            order.append(name)

    threads = []
    for place, name in enumerate("abc"):
        threads.append(threading.Thread(target=take, args=(name,)))
        threads[-1].start()
        while len(lock._line) < place + 2:
            time.sleep(0.001)
    lock.release()
    take("me")
    for thread in threads:
        thread.join()
    assert order == ["a", "b", "c", "me"]


def test_waiting_may_end_without_a_turn() -> None:
    lock = FairLock()
    assert lock.acquire()
    assert not lock.acquire(timeout=0)
    assert not lock.acquire(timeout=0.01)
    lock.release()
    assert lock.acquire(timeout=0.01)
    lock.release()
    with pytest.raises(RuntimeError):
        lock.release()
