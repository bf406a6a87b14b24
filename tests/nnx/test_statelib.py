"""The State verbs as functions: each does what the method and what Flax's does."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import pytest
from flax import nnx as flax_nnx
from hypothesis import given
from hypothesis import strategies as st

from sortal import nnx
from sortal._engine.state import FlatState, State
from sortal.errors import ArgumentError, FilterError, PathError
from sortal.nnx import statelib
from strategies import KEYS, filters, flat_leaves, jax_arrays, states

Param = nnx.Param


def nested():
    return {"layers": {0: {"w": Param(jnp.ones(2))}}, "x": jnp.zeros(1)}


@given(states())
def test_each_function_does_what_the_method_does(state):
    assert statelib.to_flat_state(state) == state.flat_state()
    assert statelib.from_flat_state(state.flat_state()) == state
    assert statelib.from_flat_state(dict(state.flat_state())) == state
    pure, other = statelib.to_pure_dict(state), state.to_pure_dict()
    assert list(pure) == list(other)
    assert statelib.to_pure_dict(state, type) == state.to_pure_dict(type)
    assert statelib.merge_state(state) == state
    assert statelib.map_state(lambda path, x: len(path), state) == state.map(
        lambda path, x: len(path)
    )


@given(states(), st.lists(filters, min_size=1, max_size=3))
def test_filter_and_split_as_functions_are_the_methods(state, chosen):
    def attempt(f, *args):
        try:
            return f(*args)
        except FilterError as e:
            return str(e)

    assert attempt(statelib.filter_state, state, *chosen) == attempt(
        state.filter, *chosen
    )
    assert attempt(statelib.split_state, state, *chosen) == attempt(
        state.split, *chosen
    )


@given(flat_leaves(), flat_leaves())
def test_merging_is_union_where_the_later_wins(a, b):
    x, y = State.from_flat_path(a), State.from_flat_path(b)
    try:
        expected = State.from_flat_path({**a, **b})
    except PathError:
        with pytest.raises(PathError):
            statelib.merge_state(x, y)
    else:
        assert statelib.merge_state(x, y) == expected


def test_every_function_takes_nested_dicts_too():
    state = State(nested())
    assert statelib.to_flat_state(nested()).paths == state.paths()
    assert statelib.to_pure_dict(nested())["layers"][0]["w"].shape == (2,)
    assert statelib.filter_state(nested(), Param).paths() == (("layers", 0, "w"),)
    params, rest = statelib.split_state(nested(), Param, ...)
    assert statelib.merge_state(params, rest) == state
    assert statelib.map_state(lambda path, x: 1, nested()).values_list() == [1, 1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: statelib.to_flat_state([1]),
        lambda: statelib.to_pure_dict(1),
        lambda: statelib.filter_state("x", ...),
        lambda: statelib.split_state((), ...),
        lambda: statelib.merge_state(State(), None),
        lambda: statelib.map_state(lambda p, x: x, 1),
    ],
)
def test_what_is_neither_is_refused_by_its_type(call):
    with pytest.raises(
        ArgumentError, match="a State or a nested dict of leaves, found"
    ):
        call()


def test_replacing_by_a_pure_dict_is_in_place_and_all_or_nothing():
    state = State(nested())
    statelib.replace_by_pure_dict(state, {"layers": {"0": {"w": jnp.zeros(2)}}})
    assert state.layers[0].w.value.tolist() == [0, 0]
    assert type(state.layers[0].w) is Param
    with pytest.raises(PathError, match=r"does not have:\n  y\nIt has:"):
        statelib.replace_by_pure_dict(state, {"x": jnp.ones(1), "y": 1})
    assert state.x.tolist() == [0]
    statelib.replace_by_pure_dict(state, {"x": 5}, lambda old, new: old + new)
    assert state.x.tolist() == [5]


@given(
    st.recursive(
        jax_arrays,
        lambda inner: st.dictionaries(
            st.sampled_from([k for k in KEYS if k != "0"]),
            inner,
            min_size=1,  # Flax drops empty parts
            max_size=3,
        ),
        max_leaves=5,
    ).filter(lambda x: isinstance(x, dict))
)
def test_integers_come_back_from_strings_of_digits(pure):
    def text(x):
        return {str(k): text(v) for k, v in x.items()} if isinstance(x, dict) else x

    assert same(statelib.restore_int_paths(text(pure)), pure)
    assert same(flax_nnx.restore_int_paths(text(pure)), pure)


def same(a, b):
    if not isinstance(a, dict):
        return a is b
    return list(a) == list(b) and all(same(a[k], b[k]) for k in a)


def test_an_integer_and_its_string_side_by_side_are_refused():
    """One of the two leaves would be lost without a word."""
    for table, found in (({"0": 1, 0: 2}, "'0', 0"), ({"7": 1, "07": 2}, "'7', '07'")):
        number = 0 if 0 in table else 7
        with pytest.raises(PathError, match=rf"both be {number}, .* \[{found}\]"):
            statelib.restore_int_paths({"layers": table})


def test_strings_that_are_no_plain_digits_stay_strings():
    pure = {"a0": 1, "-1": 2, "1.5": 3, "²": 4, "": 5, "07": 6}
    assert statelib.restore_int_paths(pure) == {
        "a0": 1, "-1": 2, "1.5": 3, "²": 4, "": 5, 7: 6
    }  # fmt: skip


# ----------------------------------------------------------------- with Flax
def both(flat):
    ours = {p: Param(x) for p, x in flat.items()}
    theirs = {p: flax_nnx.Param(x) for p, x in flat.items()}
    return State.from_flat_path(ours), flax_nnx.from_flat_state(theirs)


@given(flat_leaves(jax_arrays))
def test_flat_and_pure_forms_are_those_of_flax(flat):
    keys = {type(k) for p in flat for k in p}
    if len(keys) > 1:
        return  # Flax cannot sort integers among strings
    ours, theirs = both(flat)
    mine = statelib.to_flat_state(ours)
    assert isinstance(mine, FlatState)
    assert [p for p, _ in mine] == [p for p, _ in flax_nnx.to_flat_state(theirs)]
    assert jax.tree.structure(statelib.to_pure_dict(ours)) == jax.tree.structure(
        flax_nnx.to_pure_dict(theirs)
    )
    assert mine.paths == tuple(p for p, _ in mine)
    assert len(mine.leaves) == len(flat)


def test_splitting_filtering_and_merging_are_those_of_flax():
    flat = {("a", "w"): jnp.ones(1), ("b",): jnp.zeros(2)}
    ours, theirs = both(flat)
    chosen = nnx.PathContains("w"), flax_nnx.PathContains("w")
    for verb in ("split_state", "filter_state"):
        mine = getattr(statelib, verb)(ours, chosen[0], ...)
        flax = getattr(flax_nnx, verb)(theirs, chosen[1], ...)
        assert [s.paths() for s in mine] == [
            tuple(p for p, _ in flax_nnx.to_flat_state(s)) for s in flax
        ]
        assert statelib.merge_state(*mine) == ours
        assert len(flax_nnx.to_flat_state(flax_nnx.merge_state(*flax))) == 2


@pytest.mark.parametrize(
    "name", [n for n, f in inspect.getmembers(statelib, inspect.isfunction)
             if f.__module__ == "sortal.nnx.statelib"]
)  # fmt: skip
def test_each_function_is_exported_and_is_in_flax_or_shaped_like_it(name):
    if name == "diff":
        return  # in NNX it is in this file alone
    assert getattr(nnx, name) is getattr(statelib, name)
