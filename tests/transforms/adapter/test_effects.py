"""What was done to objects in a trace reaches the live ones, wherever they hang now."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import sortal


class Bag(sortal.Module):
    def __init__(self, **attributes):
        for name, value in attributes.items():
            setattr(self, name, value)


def _bag():
    inner = Bag(n=1, w=sortal.Param(jnp.ones(2)), items=[sortal.Param(jnp.ones(1))])
    return Bag(inner=inner, raw=Bag(x=jnp.ones(3)))


def _look(*objects):
    rows = []
    for x in objects:
        rows += [(p, type(v).__name__) for p, v in sortal.functional.iter_graph(x)]
        rows += [jax.tree.map(lambda a: a.tolist(), sortal.state(x).to_pure_dict())]
        rows += map(dict, sortal.state(x).schema.metadata)
    return rows


def _take_out(m):
    m.inner.n = 2
    m.inner.v = sortal.Param(jnp.zeros(3))
    m.inner.w[...] = 5.0
    m.inner.w.set_metadata(tag="t")
    m.inner.items.append(sortal.Param(jnp.ones(4)))
    m.inner = Bag(w=sortal.Param(jnp.ones(1)))
    m.raw.x = m.raw.x * 2
    m.raw = None


def _take_out_a_variable(m):
    m.inner.w.set_metadata(tag="t")
    m.inner.w[...] = 3.0
    del m.inner.w


def _take_out_a_list(m):
    m.inner.items.append(Bag(w=sortal.Param(jnp.ones(4))))
    m.inner.items = []


def _hang_in_what_left(m):
    m.inner.up = m.raw
    del m.raw, m.inner


@pytest.mark.parametrize(
    "edit", [_take_out, _take_out_a_variable, _take_out_a_list, _hang_in_what_left]
)
@pytest.mark.parametrize("transform", [sortal.jit, sortal.remat, sortal.nnx.jit])
def test_what_was_edited_and_then_taken_out_is_edited_as_in_plain_python(
    edit, transform
):
    found = []
    for f in (edit, transform(edit)):
        m = _bag()
        inner, raw, w, items = m.inner, m.raw, m.inner.w, m.inner.items
        f(m)
        found.append([*_look(m, inner, raw, Bag(w=w, items=items)), inner.n])
        assert inner.items is items or edit is _take_out_a_list
    assert found[0] == found[1]


def test_what_was_taken_out_of_the_second_argument_is_edited():
    def edit(a, b):
        b.inner.n, b.inner.v = 2, sortal.Param(jnp.zeros(3))
        a.inner, b.inner = b.raw, None

    found = []
    for f in (edit, sortal.jit(edit)):
        a, b = _bag(), _bag()
        inners = a.inner, b.inner
        f(a, b)
        found.append([*_look(a, b, *inners), inners[1].n])
        assert a.inner is b.raw
    assert found[0] == found[1]


def test_new_leaves_of_what_was_taken_out_are_mapped_like_the_rest():
    m = Bag(inner=Bag(w=sortal.Param(jnp.ones((4, 2)))))
    inner = m.inner

    @sortal.vmap(in_axes=sortal.StateAxes({...: 0}))
    def edit(m):
        m.inner.v = sortal.Param(m.inner.w * 2)
        m.inner = None

    edit(m)
    assert m.inner is None
    assert inner.v.shape == (4, 2)
    assert (inner.v[...] == 2).all()


def _tuple_of_arrays(m):
    m.pair = (m.pair[0] + 1, m.b)


def _tuple_of_the_same_arrays(m):
    m.pair = (m.pair[1], m.pair[0])


def _nothing(m):
    """Leaves the tuple, whose arrays may come back as other ones if donated."""


@pytest.mark.parametrize(
    "tuples", [_tuple_of_arrays, _tuple_of_the_same_arrays, _nothing]
)
@pytest.mark.parametrize(
    "transform",
    [
        sortal.jit,
        sortal.remat,
        lambda f: sortal.jit(f, donate=...),
        lambda f: sortal.jit(f, donate=True),
        lambda f: sortal.jit(f, donate=sortal.PathContains("pair")),
    ],
)
def test_raw_arrays_that_change_places_beside_a_tuple_have_the_values_they_had(
    tuples, transform
):
    """An array's old value goes where it was put, also if its place has a new one."""

    def edit(m):
        tuples(m)
        m.a, m.b = m.b, m.b * 10
        m.items[0], m.c = m.c, m.items[0]

    found = []
    for f in (edit, transform(edit)):
        a, b, c, x, y, z = map(jnp.array, map(float, range(6)))
        m = Bag(a=a, b=b, c=c, items=[x], pair=(y, z))
        for _ in range(2):
            f(m)
            found.append(_look(m))
    assert found[:2] == found[2:]


@pytest.mark.parametrize("donate", [None, True, ...])
def test_a_new_object_keeps_the_raw_arrays_that_it_was_given(donate):
    """Also where their old places in the argument have other values afterwards."""

    def take(m):
        new = Bag(x=m.a, items=[m.b], w=sortal.Param(m.c))
        m.a, m.b, m.c = m.b, m.a, m.c + 1
        return new

    found = []
    for f in (take, sortal.jit(take, donate=donate)):
        m = Bag(a=jnp.array(1.0), b=jnp.array(2.0), c=jnp.array(3.0))
        found.append(_look(f(m), m))
    assert found[0] == found[1]
