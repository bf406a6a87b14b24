"""Functions that transforms are given: objects in them, and their signatures."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax.numpy as jnp
import pytest

import sortal
from sortal.transforms._adapter.functions import (
    by_position,
    lead_with,
    named_positions,
    parameters_of,
)


class Caller(sortal.Module):
    """Can be called, and has a method."""

    def __init__(self) -> None:
        self.n = sortal.Variable(jnp.array(0))

    def __call__(self, x: Any) -> Any:
        self.n[...] += 1
        return self.n + x

    def add_only(self, x: Any, k: int) -> Any:
        return self.n.value * x * k

    def add(self, x: Any, *, by: Any = 1) -> Any:
        self.n[...] += by
        return self.n + x


def test_methods_modules_and_partials_are_taken_apart() -> None:
    live = Caller()
    spelled = [
        lambda: sortal.jit(live)(1),
        lambda: sortal.jit(live.add)(1),
        lambda: sortal.jit(Caller.add)(live, 1),
        lambda: sortal.jit(functools.partial(Caller.add, live))(1),
        lambda: sortal.jit(functools.partial(Caller.add, live, 1))(),
        lambda: sortal.jit(functools.partial(live.add))(1),
        lambda: sortal.remat(live)(1),
        lambda: sortal.remat(live.add)(1),
    ]
    for i, call in enumerate(spelled, 1):
        assert int(call()) == i + 1
        assert int(live.n.value) == i


def test_a_partial_by_keyword_with_a_model_inside_is_not_a_silent_loss() -> None:
    live = Caller()
    assert int(sortal.jit(functools.partial(Caller.add, by=2))(live, 0)) == 2
    assert int(live.n.value) == 2
    f = functools.partial(lambda x, model: model.add(x), model=live)
    sortal.jit(f)(0)
    assert int(live.n.value) == 3


def scaled(model: Any, x: Any, k: int = 1, bias: Any = 0.0) -> Any:
    return model.n.value * x * k + bias


@pytest.mark.parametrize(
    "make",
    [
        lambda m: functools.partial(scaled, m, k=1),
        lambda m: functools.partial(functools.partial(scaled, k=1), m),
        lambda m: functools.partial(lambda ms, x, k: scaled(ms[0], x, k), [m], k=1),
        lambda m: functools.partial(scaled, model=m),
        lambda m: functools.partial(lambda x, ms: scaled(ms["a"], x), ms={"a": m}),
        lambda m: functools.partial(m.add_only, k=1),
    ],
    ids=["keyword", "nested", "list", "by keyword", "dict by keyword", "method"],
)
@pytest.mark.parametrize("transform", [sortal.jit, sortal.remat])
def test_what_a_partial_holds_has_its_value_of_now(make: Any, transform: Any) -> None:
    m = Caller()
    f = make(m)
    compiled = transform(f)
    for n in (2, 3):
        m.n.value = jnp.array(n)
        by_name = "model" in f.keywords
        assert int(compiled(x=5) if by_name else compiled(5)) == 5 * n


def test_keywords_of_a_partial_can_be_given_anew_and_be_static() -> None:
    m, other = Caller(), Caller()
    m.n.value, other.n.value = jnp.array(2), jnp.array(3)
    f = sortal.jit(functools.partial(scaled, model=m, k=1), static_argnames="k")
    assert int(f(x=5)) == 10
    assert int(f(x=5, model=other)) == 15
    assert int(f(x=5, k=2)) == 20
    g = sortal.jit(
        functools.partial(lambda m, x, n: x * m.n.value if n else x, m),
        static_argnums=1,
    )
    assert [int(g(5, n)) for n in (0, 1)] == [5, 10]


def test_named_positions_reads_numbers_and_names_of_parameters() -> None:
    def f(a: Any, b: Any, *rest: Any, c: Any = 0) -> None: ...

    assert named_positions(f, -1, None) == {1, "b"}
    assert named_positions(f, (0,), "c") == {0, "c"}
    assert named_positions(f, (0,), None) == {0, "a"}
    assert named_positions(f, None, ("b",)) == {1, "b"}
    assert named_positions(max, None, None) == set()
    assert named_positions(dict.fromkeys, 1, "x") >= {1, "x"}


def test_a_keyword_stands_where_the_signature_has_it() -> None:
    def f(a: Any, b: Any = 2, *rest: Any, c: Any = 3) -> None: ...

    assert by_position(f, (0,), (), {"b": 1, "c": 4}) == ((1,), {"c": 4})
    assert by_position(f, (), (5,), {"d": 1}) == ((5,), {"d": 1})
    assert by_position(dict.fromkeys, (), (5,), {"d": 1}) == ((5,), {"d": 1})


def test_a_function_takes_the_signature_of_another_after_more_parameters() -> None:
    def call(*args: Any) -> None: ...

    lead_with(call, ["_first"], lambda a, *, b=1: None)
    assert str(inspect.signature(call)) == "(_first, /, a, *, b=1)"
    assert [p.name for p in parameters_of(call)] == ["_first", "a", "b"]


def test_a_builtin_without_a_signature_leaves_the_other_without_one() -> None:
    def call(*args: Any) -> None: ...

    lead_with(call, ["_first"], max)
    assert str(inspect.signature(call)) == "(*args: 'Any') -> 'None'"
    assert parameters_of(max) == []
