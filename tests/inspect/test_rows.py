"""Facts about a model are counted from the model, and say what filters would do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sortal as nnx
from sortal.inspect import differences, facts, kinds, leaves
from sortal.inspect.rows import show_value


class BatchStat(nnx.Variable):
    pass


class RunningMean(nnx.Param):
    pass


class Weight(nnx.Param):
    pass


def leaf(model, *path):
    return next(row for row in leaves(model) if row.path == path)


# ------------------------------------------------------------------------- leaves


@pytest.mark.parametrize(
    ("value", "text", "elements", "size"),
    [
        (jnp.ones((2, 3)), "float32[2,3]", 6, 24),
        (jnp.zeros((), jnp.bfloat16), "bfloat16[]", 1, 2),
        (jnp.zeros((0, 4)), "float32[0,4]", 0, 0),
        (np.zeros(3, np.int8), "int8[3]", 3, 3),
        (jax.ShapeDtypeStruct((2, 2), "int32"), "int32[2,2], abstract", 4, 16),
        (3, "int", 1, 4),
        (None, "None", 0, 0),
        ((), "tuple of nothing", 0, 0),
        ({"a": jnp.ones(2), "b": 1}, "dict of float32[2], int", 3, 12),
        ([1, 2, 3, 4, 5], "list of int, int, int, and 2 more", 5, 20),
        (b"x", "bytes", 1, 0),
    ],
)
def test_any_value_a_variable_may_hold_is_shown_and_measured(
    value, text, elements, size
):
    row = leaf([nnx.Variable(value)], 0)
    assert (row.value, row.elements, row.bytes) == (text, elements, size)
    assert show_value(value) == text


def test_random_keys_are_measured_by_the_bits_they_hold():
    row = leaf(nnx.Rngs(0), "default", "key")
    assert (row.value, row.elements, row.bytes) == ("key<fry>[]", 1, 8)
    split = leaf([nnx.RngKey(jax.random.split(jax.random.key(0), 3))], 0)
    assert (split.elements, split.bytes) == (3, 24)


def test_an_array_in_no_variable_is_an_unlabelled_array():
    row = leaf({"raw": np.zeros(2, np.float32)}, "raw")
    assert (row.kind, row.label) == (None, "unlabelled array")


def test_a_shared_variable_is_one_leaf_with_all_its_paths():
    shared = nnx.Param(jnp.ones(4))
    (row,) = leaves({"a": shared, "b": [shared], "c": shared})
    assert row.path == ("a",)
    assert row.aliases == (("b", 0), ("c",))


def test_the_variables_of_a_shared_module_have_the_paths_through_both_holders():
    block = {"w": nnx.Param(jnp.ones(4))}
    (row,) = leaves({"first": block, "second": block})
    assert row.aliases == (("second", "w"),)


def test_a_way_back_to_a_holder_is_no_second_path():
    block = {"w": nnx.Param(jnp.ones(4))}
    block["self"] = block
    (row,) = leaves(block)
    assert row.aliases == ()


def test_a_state_is_shown_as_the_model_it_was_taken_from():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert leaves(nnx.state(model)) == leaves(model)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=6))
def test_kinds_add_up_to_the_leaves(choices):
    classes = (nnx.Param, nnx.BatchStat, BatchStat, nnx.Variable)
    model = [classes[k](np.zeros(n, np.float32)) for k, n in choices]
    rows = kinds(model)
    assert sum(row.leaves for row in rows) == len(choices)
    assert sum(row.elements for row in rows) == sum(n for _, n in choices)
    assert sum(row.bytes for row in rows) == 4 * sum(n for _, n in choices)
    assert len({row.label for row in rows}) == len(rows) == len({k for k, _ in choices})
    assert kinds(leaves(model)) == rows


def test_parameters_come_first_and_unlabelled_arrays_last():
    model = {
        "raw": np.zeros(1),
        "count": nnx.Cache(jnp.zeros(1)),
        "w": nnx.Param(jnp.zeros(5)),
        "v": nnx.Param(jnp.zeros((), jnp.int32)),
    }
    first, *_, last = kinds(model)
    assert (first.label, first.largest) == ("Param", ("w",))
    assert first.dtypes == ("float32", "int32")
    assert last.label == "unlabelled array"


# ------------------------------------------------------------------------- labels


# ------------------------------------------------------------------------ filters


def model_with_all():
    return {
        "bn": {"mean": nnx.BatchStat(jnp.zeros(3))},
        "w": nnx.Param(jnp.ones((2, 3))),
        "mean": BatchStat(jnp.zeros(3)),
        "step": nnx.Variable(jnp.array(0)),
    }


def test_the_first_filter_that_matches_takes_a_leaf_and_later_ones_are_named():
    found = facts(model_with_all(), BatchStat, nnx.Variable, nnx.Param, ...)
    by = {row.leaf.path: (row.by, row.also) for row in found.taken}
    assert by == {
        ("bn", "mean"): (2, (4,)),
        ("mean",): (1, (2, 4)),
        ("step",): (2, (4,)),
        ("w",): (2, (3, 4)),
    }
    assert [(f.takes, f.matches) for f in found.filters] == [
        (1, 1),
        (3, 4),
        (0, 1),
        (0, 4),
    ]
    assert [f.elements for f in found.filters] == [3, 10, 0, 0]


@given(st.permutations([nnx.Param, BatchStat, nnx.BatchStat, nnx.At("step")]))
def test_explain_agrees_with_state(filters):
    model = model_with_all()
    found = facts(model, *filters)
    for number, state in enumerate(nnx.state(model, *filters), 1):
        mine = tuple(r.leaf.path for r in found.taken if r.by == number)
        assert mine == state.paths()


def test_leaves_that_no_filter_takes_are_left_over():
    found = facts(model_with_all(), nnx.Param)
    assert [r.leaf.path for r in found.taken if r.by is None] == [
        ("bn", "mean"),
        ("mean",),
        ("step",),
    ]


def test_a_filter_may_look_at_values():
    found = facts({"a": nnx.Param(jnp.ones(2)), "r": np.ones(3)}, nnx.Shaped((3,)))
    assert [r.by for r in found.taken] == [None, 1]


def test_what_is_no_filter_is_refused():
    with pytest.raises(nnx.errors.FilterError, match="is not a filter"):
        facts(model_with_all(), 3)


def notes(model, *filters):
    return "\n".join(facts(model, *filters).notes)


def test_nothing_is_noted_where_nothing_is_odd():
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    assert not notes(model, nnx.Param, nnx.BatchStat, ...).replace(
        "Filter 3, ..., takes nothing: all 4 of its leaves go to filter 1, Param, and "
        "filter 2, BatchStat, which comes first. Write the narrower filter first.",
        "",
    )
    assert not notes(model, nnx.Param, nnx.BatchStat)


def test_a_filter_that_matches_no_leaf_is_noted():
    assert notes(model_with_all(), nnx.Cache).startswith(
        "Filter 1, Cache, matches no leaf."
    )


def test_a_part_of_a_filter_that_matches_no_leaf_is_noted():
    model = model_with_all()
    assert notes(model, (nnx.Param, nnx.At("bn.var"))).startswith(
        "Filter 1, Any(Param, At('bn.var')): its part At('bn.var') matches no leaf."
    )
    inner = nnx.Param & ~nnx.Under("head")
    assert "its part Under('head') matches no leaf." in notes(model, inner)
    assert "part" not in notes(model, (nnx.Param, nnx.At("bn.mean")), ~nnx.At("w"))
    assert "part" not in notes(model, nnx.Not(None), ())


def test_a_class_that_holds_leaves_is_noted_as_one_that_state_refuses():
    text = notes(model_with_all(), nnx.Linear)
    assert "Filter 1, Linear, matches no leaf." in text
    assert "Linear: a filter takes leaves, and an object of such a class" in text
    assert "Filter 1, float, matches no leaf." in notes(model_with_all(), float)


def test_a_filter_swallowed_by_an_earlier_one_is_noted_with_the_better_order():
    text = notes(model_with_all(), nnx.Variable, nnx.Param)
    assert "Filter 2, Param, takes nothing: all 1 of its leaves go to" in text
    assert "filter 1, Variable, which comes first" in text


def test_variable_as_a_filter_is_noted_as_the_base_of_every_kind():
    text = notes(model_with_all(), nnx.Variable)
    assert "base of every kind, so that it also takes Param, sortal.BatchStat" in text
    assert "base" not in notes([nnx.Variable(jnp.ones(1))], nnx.Variable)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("bn", "For the 1 leaves below write At('bn.**')."),
        ("bn.mean", "For the path write At('bn.mean')."),
        ("w", "For the path write At('w')."),
        ("Param", "For the kind write the class Param, without quotes."),
        ("no", "The string 'no' is read as a tag, and no leaf has it."),
    ],
)
def test_a_string_that_is_no_tag_earns_a_hint_of_what_was_meant(text, hint):
    assert hint in notes(model_with_all(), text)
    assert hint in notes(model_with_all(), (text, BatchStat))


def test_a_string_that_is_a_tag_earns_no_hint_and_one_that_is_not_sees_the_tags():
    rngs = nnx.Rngs(0, dropout=1)
    assert "read as a tag" not in notes(rngs, "dropout", "default")
    assert "The tags here are 'default' and 'dropout'." in notes(rngs, "params")


def test_two_classes_of_one_name_are_noted_with_their_leaves():
    text = notes(model_with_all(), nnx.Param)
    assert "2 different kinds are called BatchStat" in text
    assert "sortal.BatchStat (bn.mean) and" in text
    assert "test_rows.BatchStat (mean)" in text
    assert "A filter by one does not take the other." in text


def test_a_namesake_of_a_built_in_kind_is_noted_where_only_the_filter_has_that():
    model = [BatchStat(jnp.zeros(1)) for _ in range(6)]
    text = notes(model, nnx.BatchStat)
    assert "sortal.BatchStat (none here)" in text
    assert "(0, 1, 2 and 3 more)" in text
    assert "are called BatchStat" in notes(model)


def test_a_namesake_that_is_a_subclass_is_noted_as_taken_by_its_parent():
    parent = nnx.BatchStat

    class BatchStat(parent):
        pass

    text = notes([BatchStat(jnp.zeros(1))])
    assert "is a subclass of sortal.BatchStat, so that a filter by" in text
    assert "does not take" not in text


def test_a_statistic_derived_from_param_is_noted_as_trained():
    model = [RunningMean(jnp.zeros(1)), Weight(jnp.ones(1)), nnx.Param(jnp.ones(1))]
    text = notes(model, nnx.Param)
    assert "RunningMean is a subclass of Param, so that wrt=Param trains it: 0." in text
    assert "Weight" not in text


def test_a_namesake_of_a_built_in_kind_derived_from_param_is_noted_as_trained():
    class BatchStat(nnx.Param):
        pass

    text = notes([BatchStat(jnp.zeros(1))], nnx.Param)
    assert "BatchStat is a subclass of Param, so that wrt=Param trains it: 0." in text
    assert nnx.state([BatchStat(jnp.zeros(1))], nnx.Param).paths() == ((0,),)


# ------------------------------------------------------------------------ changes


def changed(before, after):
    return differences([nnx.Variable(before)], [nnx.Variable(after)])[0].changed


@pytest.mark.parametrize(
    ("before", "after", "is_change"),
    [
        (jnp.array([jnp.nan]), jnp.array([jnp.nan]), False),
        (jnp.array(0.0), jnp.array(-0.0), True),
        (jnp.array(1), jnp.array(1.0), True),
        (jnp.zeros(2), jnp.zeros((2, 1)), True),
        (jnp.ones(2), np.ones(2, np.float32), False),
        (jax.random.key(0), jax.random.key(0), False),
        (jax.random.key(0), jax.random.key(1), True),
        (3, 3, False),
        (3, 4, True),
        (3, 3.0, True),
        (jnp.array(3), 3, True),
        ((jnp.ones(1), 2), (jnp.ones(1), 2), False),
        ((jnp.ones(1), 2), (jnp.ones(1), 3), True),
        ((jnp.ones(1),), (jnp.ones(1), 2), True),
        (jax.ShapeDtypeStruct((1,), "int8"), jax.ShapeDtypeStruct((1,), "int8"), False),
        (jax.ShapeDtypeStruct((1,), "int8"), jnp.zeros(1, jnp.int8), True),
    ],
)
def test_a_change_is_one_of_bits_and_no_other(before, after, is_change):
    assert changed(before, after) == is_change
    assert changed(before, before) == 0


def test_leaves_that_appear_go_or_change_kind_are_counted():
    model = {"a": nnx.Param(jnp.ones(1)), "b": nnx.Param(jnp.ones(1))}
    before = nnx.state(model)
    del model["a"]
    model["c"] = nnx.Param(jnp.ones(1))
    model["b"] = nnx.Cache(jnp.ones(1))
    param, cache = differences(before, model)
    assert (param.leaves, param.added, param.removed, param.changed) == (2, 1, 1, 0)
    assert param.paths == (("a",), ("c",))
    assert (cache.label, cache.changed, cache.paths) == ("Cache", 1, (("b",),))


def test_a_forward_pass_changes_statistics_and_counts_and_no_parameter():
    rngs = nnx.Rngs(0)
    model = {
        "norm": nnx.BatchNorm(3, rngs=rngs),
        "dropout": nnx.Dropout(0.5, rngs=rngs),
    }
    before = nnx.state(model)
    model["dropout"](model["norm"](jnp.ones((4, 3)) * jnp.arange(4.0)[:, None]))
    found = {row.label: row.changed for row in differences(before, model)}
    assert found == {"Param": 0, "BatchStat": 2, "RngCount": 1, "RngKey": 0}
