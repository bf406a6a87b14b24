"""Arguments of loops, taken apart and put together; how messages name objects."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from models import Count, Holder
from sortal import Cache, Param
from sortal.errors import LoopError
from sortal.transforms._adapter.effects import Result
from sortal.transforms._adapter.operands import Operands, check_types, moved, only_added
from sortal.transforms._adapter.tracing import run


def model() -> Holder:
    sub = Holder(n=Count(jnp.array(2)))
    return Holder(w=Param(jnp.array(1.0)), sub=sub, parts=[Holder(u=Cache(3.0))])


def ran(operands: Operands, fn: Any) -> Result:
    """``fn`` run on the arguments inside a trace, with tracers in the Result."""
    found = []

    def f(values: Any) -> None:
        plain = list(range(len(operands.plain)))
        found.append(run(fn, operands.rebuild(plain, values), {}))

    jax.eval_shape(f, operands.values)
    return found[0]


def test_arguments_are_plain_leaves_and_values_of_roots_in_order() -> None:
    m = model()
    operands = Operands(({"m": m, "x": 5}, 7, None))
    assert operands.plain == [5, 7]
    assert list(map(float, operands.values)) == [3.0, 2.0, 1.0]
    rows = ["parts.0.u (Cache)", "sub.n (Count)", "w (Param)"]
    assert [operands.describe(k) for k in range(3)] == rows
    assert [jax.tree_util.keystr(p) for p in operands.plain_paths()] == [
        "[0]['x']",
        "[1]",
    ]


def test_arguments_are_rebuilt_around_other_values() -> None:
    a, b = Holder(w=Param(jnp.array(1.0))), Holder(w=Param(jnp.array(2.0)))
    b.shared = a.w
    operands = Operands((a, 5, {"b": b}))
    assert len(operands.values) == 2
    args = operands.rebuild([6], [10.0, 20.0])

    def look(a: Any, x: Any, rest: Any) -> None:
        assert rest["b"].shared is a.w
        assert (a.w.value, rest["b"].w.value, x) == (10.0, 20.0, 6)

    run(look, args, {})
    assert float(a.w.value) == 1.0


def test_objects_in_an_output_are_named_by_root_path_or_as_new() -> None:
    m = model()
    operands = Operands((m, 1))

    def f(m: Any, x: Any) -> Any:
        return m, m.sub, m.sub.n, m.parts[0], {"x": x}

    result = ran(operands, f)
    assert operands.outline(result.out, result.effects) == (
        "(Holder 0, sub (Holder), sub.n (Count), parts.0 (Holder), {'x': *})"
    )
    result = ran(operands, lambda m, x: (m, m.w, Holder(w=Param(x))))
    assert operands.outline(result.out, result.effects) == (
        "(Holder 0, w (Param), a new object)"
    )
    assert operands.outline(operands.skeleton({"m": operands.bound.args[0]})) == (
        "{'m': Holder 0}"
    )


def test_a_root_keeps_its_number_where_structure_was_added() -> None:
    """The numbers of nodes shift when something is added before them."""
    m, other = model(), model()
    operands = Operands((m, other))

    def f(m: Any, other: Any) -> Any:
        m.added = Holder(h=Cache(jnp.zeros(2)))
        return other, m

    result = ran(operands, f)
    out = operands.same_objects(result.out, result.effects)
    assert [ref.k for ref in out] == [1, 0]
    assert only_added(operands, result.effects)


def test_variables_that_change_places_are_no_addition() -> None:
    m = Holder(a=Param(jnp.array(1.0)), b=Param(jnp.array(2.0)), c=Cache(jnp.zeros(1)))
    operands = Operands((m,))

    def swap(m: Any) -> None:
        m.a, m.b = m.b, m.a

    def renew(m: Any) -> None:
        m.c = Cache(m.c * 2)

    effects = ran(operands, swap).effects
    rows = ["a (Param) is another Variable now", "b (Param) is another Variable now"]
    assert moved(operands, effects) == rows
    assert not only_added(operands, effects)
    effects = ran(operands, renew).effects
    assert moved(operands, effects) == ["c (Cache) is another Variable now"]
    assert moved(operands, effects, new=False) == []
    assert only_added(operands, effects)
    assert moved(operands, ran(operands, lambda m: None).effects) == []


def test_arrays_of_a_tuple_are_no_values_to_write_and_others_are() -> None:
    m = Holder(pair=(jnp.zeros(1),), raw=jnp.zeros(1), other=jnp.zeros(1))
    operands = Operands((m,))

    def write(m: Any) -> None:
        m.raw, m.other = m.other + 1, m.other * 2
        m.pair = (m.pair[0] + 1,)

    effects = ran(operands, write).effects
    row = "pair.0 (unlabelled array) is another array now, in another tuple; "
    assert moved(operands, effects) == [row + "hold it in a list"]
    assert moved(operands, effects, new=False) == []


def test_values_that_differ_in_type_are_listed_together() -> None:
    x = jnp.zeros(2)
    rows = [
        ("same", x, x + 1),
        ("shape", x, x[:1]),
        ("dtype", x, x.astype(int)),
        ("structure", (x,), x),
    ]
    check_types("a step", rows[:1])
    with pytest.raises(LoopError) as info:
        check_types("a step", rows)
    assert str(info.value) == (
        "a step must keep the shape and dtype of what it hands on; it changed:\n"
        "  shape: float32[2] -> float32[1]\n"
        "  dtype: float32[2] -> int32[2]\n"
        "  structure: tuple of float32[2] -> float32[2]\n"
        "Cast or reshape what is written, as in variable[...] = "
        "x.astype(variable.dtype)."
    )
