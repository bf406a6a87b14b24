"""Barriers and exchanges, with a client that pretends."""

from __future__ import annotations

import re

import jax
import pytest

from sortal.distributed import meeting
from sortal.errors import ArgumentError, DistributedError, TraceError


class Client:
    """Four processes, of which some come; the second one's barrier may fail."""

    def __init__(self, came, fails=True, dead=False):
        self.came, self.fails, self.dead = came, fails, dead
        self.keys = []

    def key_value_set(self, key, value):
        self.keys.append(key)

    def wait_at_barrier(self, key, milliseconds):
        if self.fails:
            raise RuntimeError("DEADLINE_EXCEEDED: too late")

    def key_value_dir_get(self, key):
        if self.dead:
            raise RuntimeError("UNAVAILABLE: connection refused")
        return [(f"{key}{i}", f"text {i}") for i in self.came]


@pytest.fixture
def four(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)

    def use(client):
        monkeypatch.setattr(meeting, "coordinator", lambda: client)
        return client

    return use


def test_the_texts_come_in_the_order_of_processes(four):
    four(Client([3, 1, 0, 2], fails=False))
    found = meeting.exchange("x/1", "mine", "it")
    assert found == ["text 0", "text 1", "text 2", "text 3"]


@pytest.mark.parametrize(
    ("client", "told"),
    [
        (Client([0, 2]), "^barrier 'x': processes 1, 3 of 4 did not come within 2.5 s"),
        (Client([0, 1, 2]), "^barrier 'x': process 3 of 4 did not come within 2.5 s"),
        (Client([0, 1, 2, 3]), "came when the others had given up waiting.*too late"),
        (
            Client([], dead=True),
            "process 0, which carries the messages of the others, does",
        ),
        (None, "4 processes run this program and cannot talk to one another"),
    ],
)
def test_who_is_missing_is_said(four, client, told):
    four(client)
    with pytest.raises(DistributedError, match=told):
        meeting.barrier("x", 2.5)


def test_a_barrier_may_be_passed_again(four):
    client = four(Client(range(4), fails=False))
    for _ in range(2):
        meeting.barrier("twice")
    one, two = client.keys
    assert one != two


@pytest.mark.parametrize("timeout", [None, "5", -1, float("nan"), float("inf")])
def test_what_is_no_number_of_seconds_is_refused(timeout):
    told = f"timeout= is seconds, from 0 on; found {timeout!r}."
    with pytest.raises(ArgumentError, match=re.escape(told)):
        meeting.barrier("x", timeout)


def test_a_barrier_in_a_trace_is_refused():
    with pytest.raises(TraceError, match="would wait once, when it is traced"):
        jax.jit(lambda x: meeting.barrier("x"))(1.0)


def test_of_many_processes_some_are_named():
    assert meeting.processes([7]) == "process 7"
    assert meeting.processes(list(range(22))).endswith("18, 19 and 2 more")
