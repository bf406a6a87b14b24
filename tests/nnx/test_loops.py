"""Loops and branches that hand back new objects."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

from sortal import nnx
from sortal.errors import LoopError


@functools.cache
def small_class(lib: Any) -> Any:
    class Small(lib.Module):
        def __init__(self, value: float) -> None:
            self.w = lib.Param(jnp.full(3, value))
            self.n = lib.BatchStat(jnp.zeros(3))

    return Small


def small(lib: Any, value: float = 1.0) -> Any:
    return small_class(lib)(value)


def grown(lib: Any, model: Any, by: Any = 1.0) -> Any:
    """A new model of larger values."""
    graphdef, state = lib.split(model)
    return lib.merge(graphdef, jax.tree.map(lambda x: x + by, state))


def test_new_objects_go_through_while_loop() -> None:
    model = small(nnx)
    out, n = nnx.while_loop(
        lambda c: c[0].w[...].sum() < 20,
        lambda c: (grown(nnx, c[0]), c[1] + 1),
        (model, 0),
    )
    assert out is not model
    assert int(n) == 6
    np.testing.assert_array_equal(out.w[...], np.full(3, 7.0))
    np.testing.assert_array_equal(model.w[...], np.ones(3))


def test_new_objects_go_through_fori_loop() -> None:
    model = small(nnx)
    out = nnx.fori_loop(0, 4, lambda i, m: grown(nnx, m, i), model)
    np.testing.assert_array_equal(out.n[...], np.full(3, 6.0))
    np.testing.assert_array_equal(model.n[...], np.zeros(3))


def test_new_objects_go_through_scan() -> None:
    model = small(nnx)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def step(m: Any, x: Any) -> Any:
        return grown(nnx, m, x), m.w[...].sum() * x

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def only(x: Any, m: Any) -> Any:
        return grown(nnx, m, x)

    out, ys = step(model, jnp.arange(3.0))
    np.testing.assert_array_equal(out.w[...], np.full(3, 4.0))
    np.testing.assert_array_equal(ys, [0.0, 3.0, 12.0])
    np.testing.assert_array_equal(only(jnp.ones(2), model).w[...], np.full(3, 3.0))
    np.testing.assert_array_equal(model.w[...], np.ones(3))


def cond(lib: Any) -> Any:
    model = small(lib)
    found = []
    for which in (True, False):
        out, y = lib.cond(
            which,
            lambda m: (grown(lib, m), m.w[...] * 1),
            lambda m: (grown(lib, m, 5.0), m.w[...] * 2),
            model,
        )
        found += [out.w[...], y, model.w[...], out is model]
    made = lib.switch(1, [lambda m: grown(lib, m), lambda m: grown(lib, m, 2.0)], model)
    return found, made.w[...]


def plain(x: Any) -> Any:
    if isinstance(x, tuple | list):
        return [plain(v) for v in x]
    return np.asarray(x).tolist() if isinstance(x, jax.Array) else x


def test_new_objects_come_out_of_branches_as_in_flax() -> None:
    assert plain(cond(nnx)) == plain(cond(flax_nnx))


def test_objects_that_are_handed_back_are_the_live_ones() -> None:
    old, kept = small(nnx), small(nnx)

    def body(i: Any, pair: Any) -> Any:
        m, kept = pair
        kept.n[...] += 1
        return grown(nnx, m), kept

    out, again = nnx.fori_loop(0, 3, body, (old, kept))
    assert again is kept
    np.testing.assert_array_equal(kept.n[...], np.full(3, 3.0))
    np.testing.assert_array_equal(out.w[...], np.full(3, 4.0))
    np.testing.assert_array_equal(old.w[...], np.ones(3))


def written_and_replaced(i: Any, m: Any) -> Any:
    m.w[...] += 1
    return grown(nnx, m)


def of_another_structure(i: Any, m: Any) -> Any:
    return {"m": m}


def of_another_shape(i: Any, m: Any) -> Any:
    new = grown(nnx, m)
    new.w = nnx.Param(jnp.ones(4))
    return new


def with_another_leaf(i: Any, m: Any) -> Any:
    m.d = nnx.clone(m)
    return m


def of_a_variable_that_was_given(i: Any, m: Any) -> Any:
    new = grown(nnx, m)
    new.w = m.w
    return new


def that_moves(i: Any, m: Any) -> Any:
    m.items[0], m.items[1] = m.items[1], m.items[0]
    return m


def written_before_it_is_replaced(i: Any, m: Any) -> Any:
    m.w[...] += 1
    m.w = nnx.Param(m.w[...] * 2)
    return m


def filled_before_it_is_replaced(i: Any, m: Any) -> Any:
    m.empty.set_value(m.w[...] * 1)
    m.empty = nnx.Cache(None)
    return m


def with_a_list_changed_before_it_is_replaced(i: Any, m: Any) -> Any:
    m.items[0] = nnx.Param(m.items[0][...])
    m.items = list(m.items)
    return m


@pytest.mark.parametrize(
    "body",
    [
        that_moves,
        written_before_it_is_replaced,
        filled_before_it_is_replaced,
        with_a_list_changed_before_it_is_replaced,
        written_and_replaced,
        of_another_structure,
        of_another_shape,
        of_a_variable_that_was_given,
        with_another_leaf,
    ],
)
def test_what_is_no_next_value_is_refused_as_ever(body: Any) -> None:
    model = small(nnx)
    model.items = [nnx.Param(jnp.ones(3)), nnx.Param(jnp.ones(3))]
    model.empty = nnx.Cache(None)
    items = model.items
    with pytest.raises(LoopError, match=r"the body of fori_loop must"):
        nnx.fori_loop(0, 3, body, model)
    assert model.items is items
    np.testing.assert_array_equal(model.w[...], np.ones(3))


def test_branches_must_return_the_same_objects() -> None:
    model = small(nnx)
    with pytest.raises(LoopError):
        nnx.cond(True, lambda m: grown(nnx, m), lambda m: m, model)
    with pytest.raises(LoopError):
        nnx.cond(True, lambda m: [m.w, nnx.Param(1.0)], lambda m: [m.w], model)


def another_variable(lib: Any, i: Any, m: Any) -> None:
    m.w = lib.Param(m.w[...] * 2 + i)
    m.n[...] += m.w[...]


def another_module(lib: Any, i: Any, m: Any) -> None:
    new = small(lib)
    new.w = lib.Param(m.layers[1].w[...] + i)
    m.layers[1] = new


def another_list(lib: Any, i: Any, m: Any) -> None:
    m.layers = lib.List(m.layers)
    m.layers[0].w[...] += 1


def another_tuple(lib: Any, i: Any, m: Any) -> None:
    m.pair = lib.data((m.pair[0] + 1, m.pair[1] * 2))
    m.w[...] += 1


@pytest.mark.parametrize(
    "change", [another_variable, another_module, another_list, another_tuple]
)
@pytest.mark.parametrize("loop", ["fori_loop", "while_loop", "scan"])
def test_what_a_step_replaces_is_new_and_the_old_left_alone_as_in_flax(
    loop: str, change: Any
) -> None:
    def program(lib: Any, looped: bool) -> Any:
        def body(i: Any, m: Any) -> Any:
            change(lib, i, m)
            return m

        m = small(lib)
        m.layers = lib.List([small(lib), small(lib, 2.0)])
        m.pair = lib.data((jnp.zeros(2), jnp.ones(2)))
        olds = [m.w, m.n, m.layers, *m.layers, m.layers[1].w]
        if not looped:
            for i in range(3):
                body(i, m)
        elif loop == "fori_loop":
            assert lib.fori_loop(0, 3, body, m) is m
        elif loop == "while_loop":
            start = (jnp.int32(0), m)
            lib.while_loop(
                lambda c: c[0] < 3, lambda c: (c[0] + 1, body(c[0], c[1])), start
            )
        else:
            step = lib.scan(lambda m, i: body(i, m), out_axes=lib.Carry)
            assert step(m, jnp.arange(3)) is m
        now = [m.w, m.n, m.layers, *m.layers, m.layers[1].w]
        same = [a is b for a, b in zip(olds, now, strict=True)]
        values = [np.asarray(x) for x in jax.tree.leaves(lib.state(m))]
        return same, values, [plain(x[...]) for x in (olds[0], olds[1], olds[-1])]

    found = program(nnx, True)
    jax.tree.map(np.testing.assert_array_equal, found, program(nnx, False))
    if loop != "while_loop":  # Flax's refuses this
        jax.tree.map(np.testing.assert_array_equal, found, program(flax_nnx, True))
