"""List and Dict, modules that are containers, and Sequential."""

from __future__ import annotations

import copy
import functools
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx
from hypothesis import given
from hypothesis import strategies as st

import sortal
from sortal import nnx
from sortal.errors import (
    ArgumentError,
    PathAttributeError,
    StructureError,
    TraceError,
)
from strategies import Box, arrays, variables

Param = sortal.Param
leaves = st.one_of(variables(), arrays)


class Heads(nnx.Dict):
    """A type of its own."""


class Scale(sortal.Module):
    def __init__(self, factor):
        self.factor = Param(jnp.array(factor))

    def __call__(self, x):
        return x * self.factor


class FlaxScale(flax_nnx.Module):
    def __init__(self, factor):
        self.factor = flax_nnx.Param(jnp.array(factor))

    def __call__(self, x):
        return x * self.factor


# --------------------------------------------------------------- List and Dict
@given(st.lists(leaves, max_size=3))
def test_a_list_has_the_leaves_of_a_plain_list(items):
    model, plain = Box(x=nnx.List(items)), Box(x=items)
    assert sortal.state(model).paths() == sortal.state(plain).paths()
    flat, treedef = jax.tree.flatten(model.x)
    made = treedef.unflatten(flat)
    assert type(made) is nnx.List
    assert [type(x) for x in made] == [
        type(x) for x in jax.tree.map(lambda x: x, items)
    ]


@given(st.dictionaries(st.sampled_from(["b", "a", "c"]), leaves, max_size=3))
def test_a_dict_has_the_leaves_and_the_order_of_a_plain_dict(items):
    model, plain = Box(x=nnx.Dict(items)), Box(x=items)
    assert sortal.state(model).paths() == sortal.state(plain).paths()
    flat, treedef = jax.tree.flatten(model.x)
    made = treedef.unflatten(flat)
    assert type(made) is nnx.Dict
    assert list(made) == list(items)
    assert all(type(made[k]) is type(items[k]) for k in items)


def test_items_of_a_dict_are_attributes():
    heads = nnx.Dict(policy=1, value=2)
    assert heads.policy == heads["policy"] == 1
    heads.extra = 3
    assert heads["extra"] == 3
    del heads.policy
    assert "policy" not in heads
    with pytest.raises(ArgumentError, match=r"names of attributes; found 0\."):
        heads[0] = 1


def test_a_missing_item_is_an_attribute_error_that_lists_what_there_is():
    heads = nnx.Dict({"policy": 1, "value": 2})
    text = r"Dict has no item 'polciy'; it has \['policy', 'value'\]\."
    with pytest.raises(PathAttributeError, match=text):
        _ = heads.polciy
    with pytest.raises(PathAttributeError, match=text):
        del heads.polciy
    assert not hasattr(heads, "polciy")
    assert getattr(heads, "polciy", None) is None
    with pytest.raises(KeyError):
        heads["polciy"]
    with pytest.raises(KeyError):
        del heads["polciy"]


@pytest.mark.parametrize("made", [nnx.List([1, 2]), nnx.Dict(a=1), Heads(b=1, a=2)])
def test_containers_survive_pickle_and_both_copies_with_their_type(made):
    for other in (
        pickle.loads(pickle.dumps(made)),
        copy.copy(made),
        copy.deepcopy(made),
    ):
        assert type(other) is type(made)
        assert list(other) == list(made)


@given(st.data())
def test_a_list_and_its_marks_change_as_a_list_does(data):
    """The marks of a list are those of the items that were marked."""
    ours, plain = nnx.List(), []
    for i in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(-3, 3))
        part = slice(place, data.draw(st.integers(-3, 3)))
        change = data.draw(st.sampled_from(sorted(EDITS)))
        mark = data.draw(st.sampled_from([nnx.data, nnx.static]))
        results = []
        for items, new in ((ours, mark(i)), (plain, (mark, i))):
            try:
                EDITS[change](items, place, part, new)
                results.append(None)
            except IndexError:
                results.append(IndexError)
        assert results[0] is results[1]
        assert list(ours) == [x for _, x in plain]
        marked = [i for i, (mark, _) in enumerate(plain) if mark is nnx.data]
        assert sortal.state(ours).paths() == tuple((i,) for i in marked)


EDITS = {
    "append": lambda items, i, s, x: items.append(x),
    "extend": lambda items, i, s, x: items.extend([x, x]),
    "add": lambda items, i, s, x: items.__iadd__([x]),
    "insert": lambda items, i, s, x: items.insert(i, x),
    "set": lambda items, i, s, x: items.__setitem__(i, x),
    "set several": lambda items, i, s, x: items.__setitem__(s, [x, x]),
    "delete": lambda items, i, s, x: items.__delitem__(i),
    "delete several": lambda items, i, s, x: items.__delitem__(s),
    "pop": lambda items, i, s, x: items.pop(i),
    "reverse": lambda items, i, s, x: items.reverse(),
    "clear": lambda items, i, s, x: items.clear(),
}


def test_a_refused_item_leaves_a_list_as_it_was():
    items = nnx.List([nnx.static(1), nnx.data(2)])
    with pytest.raises(StructureError, match="cannot assign data, a Param"):
        items.insert(0, nnx.static(Param(1)))
    assert list(items) == [1, 2]
    assert sortal.state(items).to_pure_dict() == {1: 2}


def programs_with_containers_as_models(lib):
    """Containers that hold functions, as arguments of every transform."""
    layers = lib.List([lib.Linear(2, 2, rngs=lib.Rngs(0)), lib.relu])
    heads = lib.Dict(z=lib.relu, a=lib.List([lib.Dropout(0.5)]), rate=lib.data(3))

    def loss(layers, heads):
        return heads.z(layers[1](layers[0](X)).sum() * heads.rate)

    @lib.split_rngs(splits=2)
    @lib.vmap
    def make(rngs):
        return lib.List([lib.Linear(2, 2, rngs=rngs), lib.relu])

    optimizer = lib.Optimizer(layers, optax.adam(0.1), wrt=lib.Param)
    optimizer.update(layers, lib.grad(loss)(layers, heads))
    both = lib.vmap(lambda m: m[1](m[0](X)))(make(lib.Rngs(0)))
    outs = [lib.jit(loss)(layers, heads), jax.jit(loss)(layers, heads), both]
    layers.append(lib.Dropout(0.5, rngs=lib.Rngs(1)))
    heads.eval()
    return jax.tree.map(np.asarray, outs), (
        layers[2].deterministic,
        len(jax.tree.leaves(heads)),
        isinstance(layers, lib.Module) and not isinstance(layers, list),
        sorted(map(str, dict(lib.iter_modules(heads)))),
        [name for name, _ in lib.iter_children(heads)],
        [name for name, _ in lib.iter_children(layers)],
    )


X = jnp.arange(6.0).reshape(3, 2)


def test_containers_are_models_as_in_flax():
    ours = programs_with_containers_as_models(nnx)
    theirs = programs_with_containers_as_models(flax_nnx)
    assert ours[1] == theirs[1]
    jax.tree.map(np.testing.assert_array_equal, ours[0], theirs[0])


def test_containers_in_a_model_come_back_with_their_types():
    model = Box(a=nnx.List([Param(1)]), b=nnx.Dict(w=Param(2)), c=Heads(w=1))
    copied = sortal.merge(*sortal.split(model))
    assert [type(x) for x in (copied.a, copied.b, copied.c)] == [
        nnx.List, nnx.Dict, Heads
    ]  # fmt: skip
    assert copied.b.w.value == 2


def test_nnx_code_that_names_the_containers_works():
    class Ours(sortal.Module):
        def __init__(self):
            self.layers = nnx.List([])
            self.layers.append(Scale(2.0))
            self.heads = nnx.Dict()
            self.heads["a"] = Scale(3.0)

    class Theirs(flax_nnx.Module):
        def __init__(self):
            self.layers = flax_nnx.List([])
            self.layers.append(FlaxScale(2.0))
            self.heads = flax_nnx.Dict()
            self.heads["a"] = FlaxScale(3.0)

    flax = flax_nnx.to_flat_state(flax_nnx.state(Theirs()))
    assert sortal.state(Ours()).paths() == tuple(path for path, _ in flax)


# ---------------------------------------------------------------- Sequential
def pair(x):
    return x, x + 1


def total(a, b, c=0.0):
    return a + b + c


def named(x):
    return {"a": x, "b": 2 * x, "c": 1.0}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([Scale(2.0), jnp.sin], [FlaxScale(2.0), jnp.sin]),
        ([pair, total], [pair, total]),
        ([named, total, Scale(3.0)], [named, total, FlaxScale(3.0)]),
        ([pair], [pair]),
        ([named], [named]),
        ([lambda x: [x, x], jnp.stack], [lambda x: [x, x], jnp.stack]),
    ],
)
def test_functions_are_called_one_after_another_as_in_flax(ours, theirs):
    x = jnp.arange(3.0)
    mine, flax = sortal.Sequential(*ours), flax_nnx.Sequential(*theirs)
    a, b = mine(x), flax(x)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, a, b))
    flat = flax_nnx.to_flat_state(flax_nnx.state(flax))
    assert sortal.state(mine).paths() == tuple(path for path, _ in flat)
    assert list(mine) == ours


def test_the_first_function_takes_all_arguments():
    model = sortal.Sequential(total, Scale(2.0))
    assert model(1.0, 2.0, c=3.0) == 12


def test_rngs_are_handed_to_those_that_take_them():
    seen = []

    def takes(x, rngs):
        seen.append(("takes", rngs))
        return x

    def may(x, *, rngs=None):
        seen.append(("may", rngs))
        return x

    def anything(x, **kwargs):
        seen.append(("anything", kwargs["rngs"]))
        return x

    def not_me(x):
        seen.append(("not me", None))
        return x

    class Layer(sortal.Module):
        def __call__(self, x, rngs=None):
            seen.append(("layer", rngs))
            return x

    fns = [
        takes,
        not_me,
        may,
        anything,
        Layer(),
        functools.partial(takes),
        jnp.sin,
        abs,
    ]
    rngs = sortal.Rngs(0)
    sortal.Sequential(*fns)(jnp.ones(2), rngs=rngs)
    assert [name for name, _ in seen] == [
        "takes", "not me", "may", "anything", "layer", "takes"
    ]  # fmt: skip
    assert all(given is rngs for name, given in seen if name != "not me")
    seen.clear()
    sortal.Sequential(may, Layer())(jnp.ones(2))
    assert seen == [("may", None), ("layer", None)]


def test_keywords_of_the_call_reach_all_that_take_them():
    """As in Flax 0.12.12, which leaves out what none takes."""
    drop = sortal.Dropout(0.5, rngs=sortal.Rngs(0))
    model = sortal.Sequential(Scale(2.0), drop, named, total, drop)
    x = jnp.ones(4)
    assert (model(x, deterministic=True) == 7).all()
    with pytest.raises(ArgumentError, match=r"no layer takes determinstic\."):
        model(x, determinstic=True)
    with pytest.raises(ArgumentError, match=r"layers\.1 is given b, c by the layer"):
        sortal.Sequential(named, lambda *, a, b, c: a)(x, b=1, c=2)
    assert sortal.Sequential(abs, total)(-1, b=2) == 3


def test_a_builtin_without_a_signature_takes_no_rngs():
    """``inspect`` knows no signature of some functions, such as ``min``."""
    assert sortal.Sequential(min)([3, 1], rngs=sortal.Rngs(0)) == 1


def test_what_cannot_be_called_is_named_with_its_place():
    with pytest.raises(
        ArgumentError, match=r"Sequential: layers\.1 is a list, .* call"
    ):
        sortal.Sequential(abs, [abs])(1)
    with pytest.raises(TypeError):
        flax_nnx.Sequential(abs, 1)(1)  # type: ignore[arg-type]


def test_layers_may_be_changed_like_any_list():
    model = sortal.Sequential(Scale(2.0))
    model.layers.append(Scale(5.0))
    assert model(1.0) == 10
    assert len(list(model)) == 2
    assert model.layers[1].factor.value == 5
    assert sortal.state(model).paths() == (
        ("layers", 0, "factor"), ("layers", 1, "factor")
    )  # fmt: skip


CHANGES = {
    "append": lambda m, v: m.items.append(v),
    "delete item": lambda m, v: m.items.__delitem__(0),
    "reverse": lambda m, v: m.items.reverse(),
    "dict item": lambda m, v: m.named.__setitem__("b", v),
    "dict pop": lambda m, v: m.named.pop("a"),
}


@pytest.mark.parametrize("transform", [sortal.jit, sortal.vmap])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_in_a_trace_that_the_container_was_not_passed_to_is_refused(
    transform, change
):
    model = sortal.Module()
    model.items = nnx.List([sortal.Param(jnp.ones(2))])
    model.named = nnx.Dict(a=sortal.Param(jnp.ones(2)))
    before = list(model.items), dict(model.named)

    def f(x):
        change(model, sortal.Param(x))
        return x.sum()

    with pytest.raises(TraceError, match=r"(items|named)\W+\w\W+of a (List|Dict)"):
        transform(f)(jnp.ones(2))
    assert len(model.items) == 1
    assert model.items[0] is before[0][0]
    assert list(model.named) == ["a"]


def test_a_write_that_is_refused_tells_digits_of_a_dict_from_indices_of_a_list():
    sortal.state(theirs := flax_nnx.List([]))  # Flax is told of our classes
    model = Box(a=nnx.Dict({"10": [Param(jnp.ones(2))]}), b=theirs)
    model.b.append(Param(jnp.ones(2)))
    for variable, path in ((model.a["10"][0], r"a['10'].0"), (model.b[0], "b.0")):

        def f(x, variable=variable):
            variable[...] = x
            return x

        with pytest.raises(TraceError, match=re.escape(f"{path} (Param)")):
            jax.jit(f)(jnp.ones(2))


def test_a_write_that_is_refused_names_the_place_in_a_list():
    model = Box(items=nnx.List([{"a": Param(jnp.ones(2))}]))

    def f(x):
        model.items[0]["a"][...] = x
        return x

    with pytest.raises(TraceError, match=r"items\.0\.a \(Param\)"):
        jax.jit(f)(jnp.ones(2))


def test_a_change_in_a_trace_that_the_container_was_passed_to_is_carried_out():
    model = sortal.Module()
    model.items = nnx.List([])
    model.named = nnx.Dict()

    @sortal.jit
    def grow(model, x):
        model.items.append(sortal.Param(x))
        model.named.a = sortal.Param(2 * x)

    grow(model, jnp.ones(2))
    grow(model, jnp.ones(2))
    assert len(model.items) == 2
    assert sortal.state(model).paths() == (("items", 0), ("items", 1), ("named", "a"))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_of_containers_that_hold_themselves_do_so_too(copied):
    items, table = nnx.List([1]), nnx.Dict(a=1)
    items.append(items)
    table["self"] = table
    again, same = copied(items), copied(table)
    assert type(again) is nnx.List
    assert again[1] is again
    assert type(same) is nnx.Dict
    assert same["self"] is same
