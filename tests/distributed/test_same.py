"""assert_same in one process; tests/distributed/test_together.py has two."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
from sortal.distributed import assert_same, same
from sortal.errors import DistributedError, FilterError, TraceError


def test_alone_everything_is_the_same():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert_same({"model": model, "n": nnx.Variable(3), "x": np.ones(2)})
    assert_same(model, only=nnx.Param)


def test_a_filter_that_is_none_and_a_trace_are_refused():
    with pytest.raises(FilterError):
        assert_same(nnx.Rngs(0), only=3)
    with pytest.raises(TraceError, match="inside a transform"):
        jax.jit(lambda x: assert_same({"x": x}))(1.0)


@pytest.fixture
def others(monkeypatch):
    """Makes up what three other processes say, from what this one does."""

    def use(change):
        def exchange(key, mine, matter, timeout):
            return [json.dumps(change(i, json.loads(mine))) for i in range(4)]

        monkeypatch.setattr(jax, "process_count", lambda: 4)
        monkeypatch.setattr(same, "exchange", exchange)

    return use


def compare(sums, names=("a", "b", "c"), who=same.EVERYONE):
    same._Meeting(0, 1.0).compare("round", who, list(names), list(sums))


def test_the_first_difference_and_those_who_have_what_most_have_not(others):
    def change(i, mine):
        if not isinstance(mine, list):
            return f"brief {i % 3}" if mine not in ("a", "b", "c") else mine
        return [mine[0], f"b{i in (1, 3)}", f"c{i}"]

    others(change)
    with pytest.raises(
        DistributedError, match="First difference: b, in processes 1, 3"
    ):
        compare(["a", "b", "c"])


def test_processes_that_hold_no_part_are_not_asked(others):
    others(lambda i, mine: "brief" if i in (1, 2) else f"other {i}")
    compare(["x"], ["a"], "1,2")


def test_checksums_see_bits_and_not_numbers():
    zero, nan = np.zeros(2, np.float32), np.full(2, np.nan, np.float32)
    assert same._sums(zero) != same._sums(-zero)
    assert same._sums(nan) == same._sums(nan.copy())
    assert same._sums(jnp.asarray(nan)) == same._sums(jnp.asarray(nan.copy()))
    assert same._sums(jax.random.key(0)) != same._sums(jax.random.key(1))
    assert same._sums(1) != same._sums(True)
