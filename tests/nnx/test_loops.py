"""Loops and branches that hand back new objects."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

from sortal import nnx
from sortal.errors import LoopError


def small(lib: Any, value: float = 1.0) -> Any:
    class Small(lib.Module):
        def __init__(self) -> None:
            self.w = lib.Param(jnp.full(3, value))
            self.n = lib.BatchStat(jnp.zeros(3))

    return Small()


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


def with_another_variable(i: Any, m: Any) -> Any:
    m.w = nnx.Param(m.w[...] * 2)
    return m


def with_another_list(i: Any, m: Any) -> Any:
    m.items = list(m.items)
    return m


@pytest.mark.parametrize(
    "body",
    [
        with_another_variable,
        with_another_list,
        written_and_replaced,
        of_another_structure,
        of_another_shape,
        of_a_variable_that_was_given,
        with_another_leaf,
    ],
)
def test_what_is_no_next_value_is_refused_as_ever(body: Any) -> None:
    model = small(nnx)
    model.items = [nnx.Param(jnp.ones(3))]
    with pytest.raises(LoopError, match=r"the body of fori_loop must"):
        nnx.fori_loop(0, 3, body, model)
    np.testing.assert_array_equal(model.w[...], np.ones(3))


def test_branches_must_return_the_same_objects() -> None:
    model = small(nnx)
    with pytest.raises(LoopError):
        nnx.cond(True, lambda m: grown(nnx, m), lambda m: m, model)
    with pytest.raises(LoopError):
        nnx.cond(True, lambda m: [m.w, nnx.Param(1.0)], lambda m: [m.w], model)


def test_arrays_in_tuples_are_refused_before_anything_is_written() -> None:
    first, second = small(nnx), small(nnx)
    second.pair = nnx.data((jnp.zeros(1), jnp.zeros(1)))

    def body(i: Any, both: Any) -> Any:
        first, second = both
        first.w[...] += 1
        second.pair = tuple(x + 1 for x in second.pair)
        return first, second

    with pytest.raises(LoopError, match=r"pair\.0 .*hold it in a list"):
        nnx.fori_loop(0, 3, body, (first, second))
    np.testing.assert_array_equal(first.w[...], np.ones(3))
