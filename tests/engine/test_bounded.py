"""Bounded: the latest entries are kept, also where several threads write."""

from __future__ import annotations

import sys
import threading

from sortal._engine.bounded import Bounded


def test_the_latest_entries_are_kept_and_one_can_be_dropped() -> None:
    table: Bounded[int] = Bounded(2)
    for k in range(4):
        table.put(k, k * 10)
    assert [table.get(k) for k in range(4)] == [None, None, 20, 30]
    table.drop(2)
    table.drop(2)
    assert (len(table), table.get(2, "absent"), table.get(3)) == (1, "absent", 30)


def test_threads_that_write_at_once_get_no_error_and_keep_the_bound() -> None:
    table: Bounded[int] = Bounded(8)
    errors: list[BaseException] = []

    def write(thread: int) -> None:
        try:
            for k in range(2_000):
                key = (thread, k % 40)
                table.put(key, k)
                assert table.get(key, k) == k
                table.drop((thread, (k - 3) % 40))
        except BaseException as e:  # noqa: BLE001 - a thread must not swallow it
            errors.append(e)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=write, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not errors
    assert len(table) <= 8
