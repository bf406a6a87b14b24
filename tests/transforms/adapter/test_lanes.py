"""Outputs sorted into one list for each axis, spec or sharding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sortal.transforms._adapter.effects import Effects, Result
from sortal.transforms._adapter.lanes import Lanes, Sent, unsorted

WRITTEN = (0, 2, 3)


def result(*values: Any) -> Result:
    return Result(
        Effects(WRITTEN, (), None), ("out", list(values[:3]), list(values[3:]))
    )


def test_values_come_back_in_their_order_from_the_lanes_of_their_answers() -> None:
    lanes = Lanes([None, 0, 0, 1])
    sent = [Sent(1, "a"), Sent(None, "b"), Sent(1, "c"), Sent(0, "d")]
    out, lists, places = lanes.sort(result(*"abcd"), sent)
    assert (lanes.answers, lists) == ((None, 0, 1), [["b"], ["d"], ["a", "c"]])
    back = unsorted(out, lists, places)
    assert (back.out, back.values, back.fresh) == ("out", ["a", "b", "c"], ["d"])
    assert back.effects.written == WRITTEN


def test_what_is_left_to_do_is_done_to_each_array_outside() -> None:
    value = {"x": jnp.arange(3), "y": jnp.arange(2)}
    lanes = Lanes([0])
    sorted_ = lanes.sort(result(value), [Sent(0, value, jnp.sum)])
    back = unsorted(*sorted_)
    assert jax.tree.map(int, back.values) == [{"x": 3, "y": 1}]


def test_a_compiled_program_says_where_its_values_are_at_each_call() -> None:
    traces = []

    def f(x: Any) -> Any:
        traces.append(None)
        sent = [Sent("b", x + 1), Sent("a", x + 2), Sent("b", x + 3)]
        found = Lanes("ab").sort(result(*[s.value for s in sent]), sent)
        return found[1:]

    jitted = jax.jit(f)
    for x in (0.0, 10.0):
        out = unsorted(None, *jitted(x))
        assert [float(v) for v in out.values] == [x + 1, x + 2, x + 3]
    assert len(traces) == 1
