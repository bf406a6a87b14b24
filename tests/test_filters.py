"""Filters: literals as in NNX, Boolean algebra, what covers what, how they print."""

from __future__ import annotations

import dataclasses
import gc
import pickle
import re
import weakref
from typing import Any, Union

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import sortal
from sortal import nnx as sortal_nnx
from sortal._engine.paths import matches
from sortal._engine.schema import Schema, taken
from sortal._engine.statics import EMPTY
from sortal._engine.variable import metadata_of
from sortal.errors import FilterError
from sortal.filters import Calls, Filter, to_filter, to_predicate
from strategies import BatchStat, LoRA, filters, located_leaves

Everything, Nothing = sortal.Everything(), sortal.Nothing()


# ----------------------------------------------------------- Boolean algebra
@given(filters, filters, located_leaves())
def test_the_combinators_are_those_of_boolean_algebra(a, b, leaf):
    """De Morgan, double negation, distribution, absorption, on any leaf."""
    x, y = a(*leaf), b(*leaf)
    assert (a & b)(*leaf) == (x and y)
    assert (a | b)(*leaf) == (x or y)
    assert (~a)(*leaf) == (not x)
    assert (~(a & b))(*leaf) == (~a | ~b)(*leaf)
    assert (~(a | b))(*leaf) == (~a & ~b)(*leaf)
    assert (~~a)(*leaf) == x
    assert (a & (a | b))(*leaf) == x
    assert (a | (a & b))(*leaf) == x


@given(filters, located_leaves())
def test_everything_and_nothing_are_the_identities(a, leaf):
    x = a(*leaf)
    assert (a & ...)(*leaf) == x
    assert (a | None)(*leaf) == x
    assert (a | ...)(*leaf) is True
    assert (a & None)(*leaf) is False
    assert sortal.All()(*leaf) is True
    assert sortal.Any()(*leaf) is False
    assert sortal.All(a)(*leaf) == sortal.Any(a)(*leaf) == x


@given(filters, filters, located_leaves())
def test_what_covers_another_takes_all_that_the_other_takes(a, b, leaf):
    """Soundness: a wrong claim would make a correct list of filters an error."""
    if a.covers(b) and b(*leaf):
        assert a(*leaf)


@given(filters, filters)
def test_covering_holds_for_what_combinators_imply(a, b):
    assert a.covers(a)
    assert Everything.covers(a)
    assert (a | b).covers(a)
    assert (a | b).covers(b)
    assert a.covers(a & b)
    assert a.covers(b & a)
    assert a.covers(sortal.Any())


@pytest.mark.parametrize(
    ("wide", "narrow", "expected"),
    [
        (sortal.Variable, sortal.Param, True),
        (sortal.Param, LoRA, True),
        (LoRA, sortal.Param, False),
        (sortal.BatchStat, BatchStat, False),
        (sortal.Variable, (sortal.Param, sortal.BatchStat), True),
        (sortal.Param, (LoRA, sortal.BatchStat), False),
        ((sortal.Param, sortal.BatchStat), LoRA, True),
        (sortal.Under("a"), sortal.Under("a.b"), True),
        (sortal.Under("a"), sortal.Under("ab"), False),
        (sortal.Under("a.b"), sortal.Under("a"), False),
        (sortal.Under("a"), sortal.At("a"), False),
        (sortal.Not(sortal.Param), sortal.Not(sortal.Variable), True),
        (sortal.Not(LoRA), sortal.Not(sortal.Param), True),
        (sortal.Not(sortal.Param), sortal.Not(LoRA), False),
        (sortal.All(sortal.Variable, "a"), sortal.All("a", sortal.Param), True),
        (None, None, True),
        (None, sortal.Param, False),
        (sortal.Param, None, False),
    ],
)
def test_covering_by_kinds_paths_and_negation(wide, narrow, expected):
    assert to_filter(wide).covers(to_filter(narrow)) is expected


# ------------------------------------------------ filters that can take nothing
class Scale(sortal.Module):
    def __init__(self):
        self.w = sortal.Param(jnp.ones(2))
        self.steps = sortal_nnx.data(3)
        self.mask = jnp.ones(2)


OBJECTS = [sortal.Linear, sortal.Module, nnx.Linear, nnx.Module, list, dict, tuple]


@pytest.mark.parametrize("cls", OBJECTS)
@pytest.mark.parametrize(
    "written",
    [
        lambda c: c,
        lambda c: (sortal.Param, c),
        lambda c: sortal.Param & ~sortal.OfType(c),
        lambda c: sortal.Not(sortal.Any(c, "tag")),
    ],
)
def test_a_class_of_objects_that_hold_leaves_is_refused(cls, written):
    """It can take nothing in any model, alone or in what is combined."""
    name = re.escape(cls.__name__)
    sentence = rf"^{name}: a filter takes leaves, .* Name a kind such as Param, or"
    for use in (
        lambda f: sortal.state(Scale(), f),
        lambda f: sortal.split(Scale(), f, ...),
        lambda f: sortal.pop(Scale(), f),
        lambda f: sortal.variables(Scale(), f),
        lambda f: sortal.state(Scale()).filter(f),
        lambda f: sortal.grad(lambda m: m.w.sum(), wrt=f)(Scale()),
        lambda f: sortal.Optimizer(Scale(), optax.sgd(0.1), wrt=f),
        lambda f: sortal.Optimizer(Scale(), {f: optax.sgd(0.1), ...: optax.sgd(0.2)}),
        lambda f: sortal.EMA(Scale(), decay=0.9, only=f),
        lambda f: sortal.jit(lambda m: None, donate=f)(Scale()),
        lambda f: sortal.StateAxes({f: 0, ...: None}),
        lambda f: sortal.StateSharding({f: None}),
        lambda f: sortal.Policy({f: sortal.Rule(axis=0)}),
        lambda f: sortal.split_rngs(sortal.Rngs(0), splits=2, only=f),
        lambda f: sortal.Rngs(0).fork(split={f: 2}),
    ):
        with pytest.raises(FilterError, match=sentence):
            use(written(cls))


@pytest.mark.parametrize("cls", [float, str, dataclasses.Field, type])
def test_a_class_that_is_no_kind_is_refused_where_no_leaf_is_one(cls):
    for written in (cls, (sortal.Param, cls), sortal.Not(cls)):
        with pytest.raises(
            FilterError,
            match=rf"^{cls.__name__}: no kind, and none of the 3 leaves is one",
        ):
            sortal.state(Scale(), written)


def test_a_class_of_values_that_are_leaves_takes_them():
    assert sortal.state(Scale(), int).paths() == (("steps",),)
    assert sortal.State({"a": 3, "b": 1.0}).filter(int).paths() == (("a",),)


def test_what_can_take_something_in_some_model_may_be_empty_in_this_one():
    class Frozen:
        pass

    class FrozenParam(sortal.Param, Frozen):
        pass

    empty = [
        sortal.BatchStat,
        nnx.BatchStat,
        nnx.LoRAParam,
        BatchStat,
        Frozen,
        FrozenParam,
        np.ndarray,
        jax.ShapeDtypeStruct,
        "parms",
        sortal.At("x"),
        sortal.Shaped((7,)),
        sortal.PathIn(),
        None,
        (),
        lambda path, leaf: False,
    ]
    for written in empty:
        assert sortal.state(Scale(), written).paths() == ()
        assert len(sortal.split(Scale(), written, ...)) == 3
    assert len(sortal.state(Scale(), object)) == 3


def test_modules_are_still_chosen_by_their_class():
    model = [sortal.Dropout(0.5), sortal.Linear(1, 1, rngs=sortal.Rngs(0))]
    box = sortal.Sequential(*model)
    box.set_attributes(sortal.Dropout, deterministic=True)
    assert model[0].deterministic
    assert to_filter(sortal.Not(sortal.Dropout))((), model[1])


def test_a_shape_that_contradicts_its_number_of_axes_is_refused():
    with pytest.raises(FilterError, match=r"a shape of 1 axes and ndim=2"):
        sortal.Shaped((3,), ndim=2)


@given(filters, st.lists(located_leaves(), max_size=4, unique_by=lambda x: x[0]))
def test_what_is_taken_of_many_is_what_is_taken_of_each(a, pairs):
    """Of many leaves some filters are asked at once."""
    paths = [path for path, _ in pairs]
    leaves = [x for _, x in pairs]
    variables = [x if isinstance(x, sortal.Variable) else None for x in leaves]
    kinds = [None if x is None else type(x) for x in variables]
    metadata = [EMPTY if x is None else metadata_of(x) for x in variables]
    schema = Schema.of(paths, kinds, metadata)
    assert taken(a, schema, leaves) == {
        i for i, row in enumerate(schema.rows(leaves)) if a.test(*row)
    }


def test_a_function_in_a_filter_is_asked_only_what_the_others_leave_open():
    asked = []

    def ask(path, leaf):
        asked.append(path)
        return True

    for written in (sortal.Param & Calls(ask), ~sortal.to_filter(sortal.Param) | ask):
        asked.clear()
        sortal.state(OURS, written)
        assert set(asked) == set(sortal.state(OURS, sortal.Param).paths())
    asked.clear()
    assert len(sortal.state(OURS, (ask, ...))) == len(sortal.state(OURS))


def test_a_subclass_of_a_filter_may_test_otherwise():
    class Elsewhere(sortal.Under):
        def test(self, path, kind, metadata, leaf):
            return not super().test(path, kind, metadata, leaf)

    assert leaf_paths(Elsewhere("layers")) == (("count",), ("kernel",))


# ----------------------------------------------------- the same as Flax NNX
class OurModel(sortal.Module):
    def __init__(self):
        self.kernel = sortal.Param(jnp.ones((2, 3)), tag="params")
        self.layers = [OurLayer(i) for i in range(3)]
        self.count = sortal.Variable(jnp.array(0))


class OurLayer(sortal.Module):
    def __init__(self, i: int):
        self.kernel = sortal.Param(jnp.ones((i, 2)), tag=("a", "b", "params")[i])
        self.mean = sortal.BatchStat(jnp.zeros(2))
        self.cache = sortal.Cache(jnp.zeros(2), tag="a")


class FlaxModel(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((2, 3)), tag="params")
        self.layers = nnx.List([FlaxLayer(i) for i in range(3)])
        self.count = nnx.Variable(jnp.array(0))


class FlaxLayer(nnx.Module):
    def __init__(self, i: int):
        self.kernel = nnx.Param(jnp.ones((i, 2)), tag=("a", "b", "params")[i])
        self.mean = nnx.BatchStat(jnp.zeros(2))
        self.cache = nnx.Cache(jnp.zeros(2), tag="a")


def _long(path: Any, leaf: Any) -> bool:
    return len(path) > 2


def _square(path: Any, leaf: Any) -> bool:
    return leaf[...].shape == (2, 2)


NAMES = ["Variable", "Param", "BatchStat", "Cache", "Intermediate"]
ATOMS = [
    *[(getattr(sortal, n), getattr(nnx, n)) for n in NAMES],
    *[
        (x, x)
        for x in (..., True, False, None, "a", "params", "kernel", _long, _square)
    ],
    (sortal.PathContains("kernel"), nnx.PathContains("kernel")),
    (sortal.PathContains(1), nnx.PathContains(1)),
    (sortal.PathContains("e", False), nnx.PathContains("e", exact=False)),
    (
        sortal.PathIn(("kernel",), ("layers", 1, "mean")),
        nnx.filterlib.PathIn(("kernel",), ("layers", 1, "mean")),
    ),
    (sortal.WithTag("b"), nnx.WithTag("b")),
    (sortal.OfType(sortal.Param), nnx.OfType(nnx.Param)),
    (sortal.Everything(), nnx.Everything()),
    (sortal.Nothing(), nnx.Nothing()),
]


def combine(name: str) -> Any:
    def pair(parts: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        return (
            getattr(sortal, name)(*[a for a, _ in parts]),
            getattr(nnx, name)(*[b for _, b in parts]),
        )

    return pair


def sequence(cls: type) -> Any:
    def pair(parts: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        return cls(a for a, _ in parts), cls(b for _, b in parts)

    return pair


pairs = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(sequence(tuple)),
        st.lists(inner, max_size=3).map(sequence(list)),
        st.lists(inner, max_size=3).map(combine("Any")),
        st.lists(inner, max_size=3).map(combine("All")),
        inner.map(lambda p: combine("Not")([p])),
    ),
    max_leaves=5,
)
OURS, FLAX = OurModel(), FlaxModel()


@given(pairs)
def test_a_literal_takes_what_it_takes_in_flax(pair):
    ours, theirs = pair
    mine = sortal.state(OURS, ours).paths()
    flax = [path for path, _ in nnx.to_flat_state(nnx.state(FLAX, theirs))]
    assert sorted(map(str, mine)) == sorted(map(str, flax))


@given(pairs, pairs)
def test_two_filters_divide_a_model_as_in_flax(first, second):
    """Where ours refuses, because one swallows the other, Flax leaves one empty."""
    try:
        mine = sortal.state(OURS, first[0], second[0])
    except FilterError:
        assume(False)
    try:
        flax = nnx.state(FLAX, first[1], second[1])
    except ValueError:  # Flax wants `...` last even where it takes nothing away
        assume(False)
    for ours, theirs in zip(mine, flax, strict=True):
        paths = [path for path, _ in nnx.to_flat_state(theirs)]
        assert sorted(map(str, ours.paths())) == sorted(map(str, paths))


# ------------------------------------------------------------------ literals
LITERALS = [
    (..., Everything),
    (True, Everything),
    (False, Nothing),
    (None, Nothing),
    ("dropout", sortal.WithTag("dropout")),
    (sortal.Param, sortal.OfType(sortal.Param)),
    (sortal.Param[jax.Array], sortal.OfType(sortal.Param)),
    (sortal.Everything, Everything),
    (sortal.Nothing, Nothing),
    ((), sortal.Any()),
    ((sortal.Param, "a"), sortal.Any(sortal.Param, "a")),
    ([sortal.Param, ["a"]], sortal.Any(sortal.Param, sortal.Any("a"))),
    (sortal.Param | sortal.Cache, sortal.Any(sortal.Param, sortal.Cache)),
    (Union[sortal.Param, sortal.Cache], sortal.Any(sortal.Param, sortal.Cache)),  # noqa: UP007
    (_long, Calls(_long)),
    (sortal.At("a.**"), sortal.At("a.**")),
    (jax.Array, sortal.OfType(jax.Array)),
]


@pytest.mark.parametrize(("literal", "expected"), LITERALS)
def test_a_literal_is_read_as_its_filter(literal, expected):
    found = to_filter(literal)
    assert found == expected
    assert hash(found) == hash(expected)
    assert type(found) is type(expected)
    assert to_filter(found) == found
    assert to_predicate is to_filter


def test_a_filter_given_once_is_freed_with_all_that_it_reaches():
    class Scale:
        def takes(self, path, leaf):
            return True

    def select(scale):
        model = {"w": sortal.Param(jnp.ones(2))}
        assert len(sortal.state(model, scale.takes)) == 1
        assert len(sortal.state(model, lambda path, leaf: scale is not None)) == 1
        return weakref.ref(scale)

    freed = select(Scale())
    gc.collect()
    assert freed() is None


@pytest.mark.parametrize(
    "literal", [1, 0, 1.5, {}, {"a": 1}, {sortal.Param}, object(), b"tag", (1,), [[0]]]
)
def test_what_is_no_filter_is_refused_with_what_is(literal):
    with pytest.raises(
        FilterError,
        match=r"is not a filter\. Write a kind such as Param, a tag string, \.\.\.",
    ):
        to_filter(literal)


def test_the_offending_part_and_its_type_are_named():
    with pytest.raises(FilterError, match=r"^1\.5 \(float\) is not a filter"):
        to_filter((sortal.Param, [1.5]))


def test_one_is_no_everything_although_python_takes_it_for_true():
    assert to_filter((True,)) == sortal.Any(...)
    with pytest.raises(FilterError, match=r"^1 \(int\)"):
        to_filter((1,))
    with pytest.raises(FilterError, match=r"^0 \(int\)"):
        to_filter(0)


def test_a_variable_in_the_place_of_its_kind_is_refused():
    """It can be called, and so would be taken for a function of (path, leaf)."""
    with pytest.raises(FilterError, match=r"^Param\(float32\[2\]\) \(Param\) is not a"):
        to_filter(sortal.Param(jnp.ones(2)))


def test_a_filter_class_without_its_arguments_is_refused_by_name():
    for cls in (sortal.At, sortal.Under, sortal.WithTag, sortal.Not, sortal.Dtyped):
        name = cls.__name__
        with pytest.raises(
            FilterError, match=rf"^{name} is a class .* Write {name}\(\.\.\.\)\.$"
        ):
            to_filter(cls)


def test_a_function_that_cannot_be_hashed_is_a_filter_still():
    @dataclasses.dataclass
    class Rule:
        name: str

        def __call__(self, path, leaf):
            return self.name in path

    assert sortal.state(OURS, Rule("count")).paths() == (("count",),)


# ------------------------------------------------------------------- classes
def leaf_paths(*filters: Any) -> Any:
    states = sortal.state(OURS, *filters)
    return [s.paths() for s in states] if len(filters) > 1 else states.paths()


def test_two_classes_of_one_name_are_two_kinds():
    assert BatchStat.__name__ == sortal.BatchStat.__name__
    leaf = BatchStat(1)
    assert to_filter(BatchStat)(("a",), leaf)
    assert not to_filter(sortal.BatchStat)(("a",), leaf)
    assert to_filter(BatchStat) != to_filter(sortal.BatchStat)


def test_a_kind_takes_its_subclasses_and_no_others():
    leaf = LoRA(1)
    taken = [k for k in (sortal.Variable, sortal.Param, LoRA, sortal.Cache)
             if to_filter(k)((), leaf)]  # fmt: skip
    assert taken == [sortal.Variable, sortal.Param, LoRA]


def test_a_class_that_is_no_kind_takes_raw_leaves_that_are_instances():
    """As in Flax: ``jax.Array`` takes what hangs in the model without a label."""

    class Model(sortal.Module):
        def __init__(self):
            self.w = sortal.Param(jnp.ones(2))
            self.table = np.ones(3)
            self.mask = jnp.ones(2)

    model = Model()
    assert sortal.state(model, jax.Array).paths() == (("mask",),)
    assert sortal.state(model, np.ndarray).paths() == (("table",),)
    model.mask = np.zeros(2)
    assert sortal.state(model, jax.Array).paths() == ()
    assert sortal.state(model, np.ndarray).paths() == (("mask",), ("table",))
    assert sortal.state(model, sortal.Variable).paths() == (("w",),)
    assert not sortal.OfType(jax.Array).structural
    assert sortal.OfType(sortal.Param).structural


def test_a_mixin_that_is_no_kind_takes_the_variables_that_have_it():
    class Frozen:
        pass

    class FrozenParam(sortal.Param, Frozen):
        pass

    assert to_filter(Frozen)((), FrozenParam(1))
    assert not to_filter(Frozen)((), sortal.Param(1))


def test_a_tag_is_metadata_and_not_a_path():
    assert leaf_paths("params") == (("kernel",), ("layers", 2, "kernel"))
    assert leaf_paths("kernel") == ()


@given(st.sampled_from(["kernel", "layers.*.mean", "**.mean", "layers.**", "**", "*"]))
def test_at_takes_leaves_whose_whole_path_fits(pattern):
    every = sortal.state(OURS).paths()
    assert leaf_paths(sortal.At(pattern)) == tuple(
        p for p in every if matches(pattern, p)
    )


@pytest.mark.parametrize(
    ("prefix", "count"),
    [("layers", 9), ("layers.1", 3), ("layers.*", 9), ("kernel", 1), ("layer", 0)],
)
def test_under_takes_the_leaf_at_a_path_and_all_below(prefix, count):
    assert len(leaf_paths(sortal.Under(prefix))) == count


@pytest.mark.parametrize("text", ["", ".", "a..b", ".a", "a."])
@pytest.mark.parametrize("cls", [sortal.At, sortal.Under])
def test_a_malformed_path_is_refused_when_it_is_written(cls, text):
    with pytest.raises(FilterError, match=rf"^{cls.__name__}\('.*'\): .* single dots"):
        cls(text)


def test_a_path_that_is_no_tuple_is_refused():
    """``PathIn("kernel")`` would take nothing without a word."""
    with pytest.raises(FilterError, match=r"tuples, found 'kernel'\. Write PathIn\(\("):
        sortal.PathIn(("a",), "kernel")


def test_shapes_and_dtypes_of_variables_and_raw_arrays():
    shaped = sortal.Shaped((2, 3))
    assert shaped((), sortal.Param(jnp.ones((2, 3))))
    assert shaped((), np.ones((2, 3)))
    assert not shaped((), jnp.ones(3))
    assert not shaped((), sortal.Param("text"))
    assert sortal.Shaped([2, 3]) == shaped
    assert hash(sortal.Shaped([2, 3])) == hash(shaped)
    assert sortal.Shaped(ndim=1)((), jnp.ones(3))
    assert sortal.Dtyped(jnp.floating)((), jnp.ones(3, jnp.bfloat16))
    assert sortal.Dtyped("int32")((), np.ones(3, np.int32))
    assert not sortal.Dtyped(jnp.float32)((), jnp.ones(3, jnp.int32))
    assert not sortal.Dtyped(jnp.float32)((), sortal.Param("text"))


def test_a_shape_filter_without_a_shape_is_refused():
    with pytest.raises(FilterError, match=r"needs shape=\(\.\.\.\) or ndim=\.\.\."):
        sortal.Shaped()


def test_a_dtype_that_does_not_exist_is_refused_when_it_is_written():
    with pytest.raises(
        FilterError, match=r"Dtyped\('flaot32'\): no such dtype\. Write"
    ):
        sortal.Dtyped("flaot32")


def test_filters_of_values_are_asked_each_time():
    """What depends on values must not be remembered with the structure."""

    class Model(sortal.Module):
        def __init__(self):
            self.w = sortal.Param(jnp.ones(2))

    model, big = Model(), sortal.Shaped(ndim=2)
    assert sortal.state(model, big).paths() == ()
    model.w.value = jnp.ones((2, 2))
    assert sortal.state(model, big).paths() == (("w",),)
    positive = [lambda path, leaf: bool((leaf.value > 0).all())]
    assert sortal.state(model, *positive).paths() == (("w",),)
    model.w[...] = -1
    assert sortal.state(model, *positive).paths() == ()


@given(filters, located_leaves())
def test_structural_filters_do_not_look_at_the_leaf(a, leaf):
    path, x = leaf
    if a.structural and isinstance(x, sortal.Variable):
        assert a.test(path, type(x), x.get_metadata(), None) == a(path, x)


@given(filters, located_leaves())
def test_a_raw_array_has_no_kind_and_no_tag(a, leaf):
    path, x = leaf
    value = getattr(x, "value", x)
    assert a(path, value) == a.test(path, None, {}, value)


def test_the_base_class_decides_nothing():
    with pytest.raises(NotImplementedError):
        Filter().test((), None, {}, None)


def test_a_filter_of_ones_own_combines_with_the_others():
    class Deep(Filter):
        def test(self, path, kind, metadata, leaf):
            return len(path) > 2

    mine = sortal.Param & Deep()
    assert leaf_paths(mine) == tuple(("layers", i, "kernel") for i in range(3))
    assert leaf_paths(Deep) == leaf_paths(Deep())


# ------------------------------------------------- operators, print, equality
PRINTED = [
    (sortal.OfType(sortal.Param), "Param"),
    (Everything, "..."),
    (Nothing, "Nothing()"),
    (sortal.WithTag("a"), "'a'"),
    (sortal.PathContains("a"), "PathContains('a')"),
    (sortal.PathContains(0, exact=False), "PathContains(0, exact=False)"),
    (sortal.PathIn(("b",), ("a", 0)), "PathIn(('a', 0), ('b',))"),
    (sortal.At("a.**"), "At('a.**')"),
    (sortal.Under("a"), "Under('a')"),
    (sortal.Shaped((2, 3)), "Shaped((2, 3))"),
    (sortal.Shaped(ndim=2), "Shaped(ndim=2)"),
    (sortal.Shaped((2,), ndim=1), "Shaped((2,), ndim=1)"),
    (sortal.Dtyped(jnp.floating), "Dtyped(floating)"),
    (sortal.Dtyped("int32"), "Dtyped(int32)"),
    (sortal.Any(sortal.Param, "a", ...), "Any(Param, 'a', ...)"),
    (sortal.All(sortal.Param, sortal.Not("a")), "All(Param, Not('a'))"),
    (to_filter(_long), "_long"),
    (sortal.Param & ~sortal.At("a"), "All(Param, Not(At('a')))"),
    (sortal.Param | sortal.At("a"), "Any(Param, At('a'))"),
    ("a" | sortal.At("b"), "Any('a', At('b'))"),
    (... & sortal.At("b"), "All(..., At('b'))"),
    (sortal.At("b") | sortal.Param, "Any(At('b'), Param)"),
]


@pytest.mark.parametrize(("found", "text"), PRINTED)
def test_a_filter_prints_as_it_is_written(found, text):
    assert repr(found) == text


@given(filters, filters)
def test_equal_filters_have_equal_hashes_and_others_are_unequal(a, b):
    assert hash(a) == hash(a)
    if a == b:
        assert hash(a) == hash(b)
    assert (a == b) == (b == a)


@given(filters)
@example(sortal.PathIn(("a",)))
@example(sortal.Any("a"))
@example(Calls(_long))
def test_filters_survive_pickling_and_are_frozen(a):
    if "jaxlib" not in repr(a):  # `jax.Array` itself cannot be pickled
        assert pickle.loads(pickle.dumps(a)) == a
    for name in [f.name for f in dataclasses.fields(a)]:
        with pytest.raises(AttributeError):
            setattr(a, name, None)


def test_any_and_all_of_the_same_are_different_filters():
    assert sortal.Any("a", "b") != sortal.All("a", "b")
    assert sortal.Any("a", "b") != sortal.Any("b", "a")
    assert sortal.Any("a") != sortal.Not("a")


# --------------------------------------------------------------------------- globs
def fits_entry(entry, text):
    """An entry by the grammar: characters, escaped ones, and stars."""
    if not entry:
        return not text
    if entry[0] == "*":
        return any(fits_entry(entry[1:], text[i:]) for i in range(len(text) + 1))
    char, rest = (entry[1], entry[2:]) if entry[0] == "\\" else (entry[0], entry[1:])
    return text[:1] == char and fits_entry(rest, text[1:])


def fits(entries, keys):
    if not entries:
        return not keys
    if entries[0] == "**":
        return any(fits(entries[1:], keys[i:]) for i in range(len(keys) + 1))
    more = bool(keys) and fits_entry(entries[0], str(keys[0]))
    return more and fits(entries[1:], keys[1:])


pieces = st.sampled_from(["a", "b", "*", "?", "[ab]", "[", r"\.", r"\*", r"\\", "0"])
entry = st.lists(pieces, min_size=1, max_size=3).map("".join) | st.just("**")
entries = st.lists(entry, min_size=1, max_size=5)
texts = st.text("ab.*\\?[]0\0\1\n", max_size=3)
keys = st.lists(texts | st.integers(0, 1) | st.none(), max_size=5).map(tuple)


@settings(deadline=None, max_examples=400)
@given(entries, keys)
def test_a_glob_fits_what_a_plain_recursive_matcher_fits(entries, path):
    pattern = ".".join(entries)
    assert sortal.At(pattern)(path, 1.0) == fits(entries, path)
    below = any(fits(entries, path[:n]) for n in range(len(path) + 1))
    assert sortal.Under(pattern)(path, 1.0) == below


def test_only_stars_are_special_and_a_backslash_makes_them_ordinary():
    assert not sortal.At("l?")(("l1",), 1.0)
    assert sortal.At("l?")(("l?",), 1.0)
    assert not sortal.Under("[ab]")(("a", "w"), 1.0)
    assert sortal.At(r"table.a\.b")(("table", "a.b"), 1.0)
    assert not sortal.At(r"table.a\.b")(("table", "a", "b"), 1.0)
    assert sortal.Under(r"\*")(("*", "w"), 1.0)
    assert not sortal.Under(r"\*")(("x", "w"), 1.0)


@pytest.mark.parametrize("text", ["a\\", r"a\b", r"\d.w", "a..b", "", ".", r"a.\[b"])
def test_a_malformed_glob_is_refused_with_the_grammar(text):
    for kind in (sortal.At, sortal.Under):
        with pytest.raises(FilterError, match="entries joined by single dots"):
            kind(text)


def test_a_glob_with_many_stars_ends_soon():
    path = ("a" * 60,) * 60
    assert not sortal.At("**." + "*a*b*." * 8 + "**.**.**.z")(path, 1.0)
    assert not sortal.At("*a" * 30 + "b")(("a" * 200,), 1.0)
