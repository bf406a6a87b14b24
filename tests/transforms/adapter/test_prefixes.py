"""StateAxes, StateSharding and Spread: what each leaf is told, and what is refused."""

from __future__ import annotations

import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import sortal
from models import Holder, untouched
from sortal import (
    At,
    BatchStat,
    Cache,
    Param,
    Policy,
    Rule,
    StateAxes,
    StateSharding,
    Variable,
    nnx,
)
from sortal.errors import ArgumentError, AxisError, FilterError, PolicyError
from sortal.transforms._adapter.binding import BoundArguments
from sortal.transforms._adapter.prefixes import (
    Carry,
    Spread,
    given_for_objects,
    is_answer,
)


class Column(Variable, axis=1):
    """A kind that declares its axis."""


def model(**metadata: Any) -> Holder:
    return Holder(
        w=Param(jnp.ones((2, 2)), **metadata),
        c=Cache(jnp.ones(2)),
        d=Column(jnp.ones((3, 2))),
        raw=jnp.zeros(2),
    )


def spread(*pairs: Any, name: str = "axis", **named: Any) -> Spread:
    """The answers for arguments, each given as (prefix, argument)."""
    bound = BoundArguments([x for _, x in pairs], {k: x for k, (_, x) in named.items()})
    prefixes = {k: given for k, (given, _) in named.items()}
    return Spread(bound, [given for given, _ in pairs], prefixes, name)


# ------------------------------------------------------------------------- the tables
def test_a_table_shows_its_rows_and_compares_by_them() -> None:
    axes = StateAxes({Param: None, At("a.**"): 1, ...: 0})
    assert axes.axes == (None, 1, 0)
    assert [f(("a", "w"), Cache(1)) for f in axes.tests] == [False, True, True]
    assert repr(StateAxes({Param: None, ...: Carry})) == (
        "StateAxes({Param: None, ...: Carry})"
    )
    assert axes == StateAxes([(Param, None), (At("a.**"), 1), (..., 0)])
    assert hash(axes) == hash(StateAxes(axes.items()))
    assert axes != StateAxes({Param: None, ...: 0})
    assert StateAxes({...: None}) != StateSharding({...: None})
    assert StateSharding({Param: P(), ...: P("x")}).shardings == (P(), P("x"))
    assert nnx.StateSpecs is StateSharding


def test_a_malformed_filter_is_refused_at_once() -> None:
    with pytest.raises(FilterError):
        StateAxes({3.5: 0})


def test_carry_is_one_object_everywhere() -> None:
    assert pickle.loads(pickle.dumps(Carry)) is Carry
    assert repr(Carry) == "Carry"


def test_answers_are_leaves_of_prefix_trees() -> None:
    ends = [None, StateAxes({}), Policy({}), Carry, P("x")]
    assert all(map(is_answer, ends))
    assert not any(map(is_answer, [0, (0, None), {"a": 0}]))


# ------------------------------------------------------------------ answers by the leaf
@pytest.mark.parametrize(
    ("given", "answers"),  # in the order of paths: c, d, raw, w
    [
        (2, [2, 2, 2, 2]),
        (None, [None] * 4),
        (StateAxes({...: 0}), [0, 0, 0, 0]),
        (StateAxes({Param: None, ...: 0}), [0, 0, 0, None]),
        (StateAxes({Variable: None, ...: 0}), [None, None, 0, None]),
        (StateAxes({Cache: 0, At("w"): 3, At("raw"): 4}), [0, 1, 4, 3]),
        (StateAxes({sortal.Shaped(ndim=2): 7, ...: 0}), [0, 7, 0, 7]),
        (Policy({Param: Rule(axis=2), ...: Rule(axis=0)}), [0, 0, 0, 2]),
        (Policy({(Param, Cache): Rule(axis=2), At("raw"): Rule(axis=0)}), [2, 1, 0, 2]),
        (
            Policy({sortal.Shaped(ndim=2): Rule(axis=5), ...: Rule(axis=0)}),
            [0, 5, 0, 5],
        ),
    ],
)
def test_each_leaf_has_the_answer_of_the_first_that_says(
    given: Any, answers: list[Any]
) -> None:
    assert spread((given, model())).roots == [answers]


def test_metadata_comes_before_a_policy_and_after_a_table() -> None:
    own = model(axis=9)
    assert spread((Policy({...: Rule(axis=0)}), own)).roots == [[0, 0, 0, 9]]
    assert spread((StateAxes({...: 0}), own)).roots == [[0, 0, 0, 0]]
    left = StateAxes({(Cache, At("raw")): 0})
    assert spread((left, own)).roots == [[0, 1, 0, 9]]


def test_the_answers_of_one_table_do_not_leak_into_another_model() -> None:
    axes = StateAxes({Param: None, ...: 0})
    first = spread((axes, model()))
    first.roots[0][0] = "spoilt"
    assert spread((axes, model())).roots == [[0, 0, 0, None]]


def test_leaves_without_an_answer_are_all_listed() -> None:
    with pytest.raises(PolicyError) as e:
        spread((StateAxes({Cache: 0}), model()))
    assert "raw (unlabelled array)" in str(e.value)
    assert "w (Param)" in str(e.value)
    assert "d (Column)" not in str(e.value)


def test_the_tree_for_jax_has_one_answer_for_each_value() -> None:
    one, two = model(), model()
    found = spread(((StateAxes({Param: 1, ...: 0}), 5), (one, {"x": 1, "m": two})))
    first, rest = found.args[0]
    assert first.values == [0, 0, 0, 1]
    assert rest["x"] == 5
    assert rest["m"].values == [5, 5, 5, 5]


def test_keyword_arguments_have_answers_too() -> None:
    found = spread(m=(StateAxes({Param: 1, ...: 0}), model()), x=(3, jnp.ones(2)))
    assert found.kwargs["m"].values == [0, 0, 0, 1]
    assert found.kwargs["x"] == 3


def test_what_arguments_share_is_sent_once() -> None:
    shared = Param(jnp.ones(2))
    a, b = Holder(v=shared), Holder(u=Cache(jnp.ones(2)), v=shared)
    found = spread((0, a), (StateAxes({Cache: None, ...: 0}), b))
    assert [c.values for c in found.args] == [[0], [None]]
    assert found.roots == [[0], [None, 0]]


def test_two_answers_for_what_arguments_share_are_refused() -> None:
    one, two = Param(jnp.ones(2)), Cache(jnp.ones(2))
    a, b = Holder(v=one, c=two), Holder(deep=Holder(v=one), c=two)
    with untouched(a, b), pytest.raises(AxisError) as e:
        spread((0, a), (None, b))
    assert str(e.value) == (
        "Variables that several arguments share have one answer each; found two for:\n"
        "  c (Cache): 0, and c (Cache): None\n"
        "  v (Param): 0, and deep.v (Param): None\n"
        "Give both arguments the same."
    )


def test_states_have_answers_by_kind() -> None:
    state = sortal.state(model())
    found = spread((StateAxes({Param: None, ...: 0}), state)).args[0]
    assert isinstance(found, sortal.State)
    assert found["w"].value is None
    assert found["c"].value == 0
    assert spread((3, state)).args == (3,)


def test_answers_by_kind_for_a_plain_array_are_refused() -> None:
    axes = StateAxes({Param: None, ...: 0})
    with pytest.raises(AxisError) as e:
        spread((axes, [model(), jnp.ones(2)]))
    assert str(e.value) == (
        f"{axes!r} says what to do by kind, but stands for float32[2], "
        "which is no Module, Variable or State. Give a plain value there."
    )
    assert spread((axes, [model(), None])).roots == [[0, 0, 0, None]]


def test_a_prefix_of_another_build_than_its_argument_is_refused() -> None:
    with pytest.raises(ArgumentError) as e:
        spread((0, 1), ({"w": 0}, model()))
    assert str(e.value) == (
        "{'w': 0} was given for argument 1, which is built differently. Give one value "
        "for all of it, a container like it with one for each part, or for leaves of a "
        "Module, as in StateAxes({At('w'): 0, ...: None})."
    )
    with pytest.raises(ArgumentError, match=re.escape("(0, 0, 0) was given for")):
        spread(((0, 0, 0), (1, 2)))


def test_a_table_of_the_other_sort_is_refused() -> None:
    with pytest.raises(AxisError) as e:
        spread((StateSharding({...: P()}), model()))
    assert str(e.value).endswith(
        "holds values for 'spec'; here 'axis' is asked for. Use StateAxes."
    )
    with pytest.raises(AxisError, match=r"Use StateSharding\."):
        spread((StateAxes({...: 0}), model()), name="spec")


@pytest.mark.parametrize("answer", [Carry, "0", 1.5, P("x")])
def test_vmap_refuses_what_is_no_axis(answer: Any) -> None:
    with pytest.raises(AxisError) as e:
        sortal.vmap(lambda m: m.w, in_axes=StateAxes({Param: answer, ...: 0}))(model())
    assert "w (Param)" in str(e.value)
    assert str(e.value).startswith("vmap: an axis is an int or None; found:\n")


def test_shard_map_refuses_what_is_no_spec() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    with pytest.raises(AxisError) as e:
        sortal.shard_map(
            lambda m: None,
            mesh=mesh,
            in_specs=StateSharding({Param: "x", ...: P()}),
            out_specs=P(),
        )(model())
    assert "w (Param)" in str(e.value)
    assert "a spec is a PartitionSpec, a Sharding or None; found" in str(e.value)


def test_a_value_for_an_array_that_is_no_axis_is_refused() -> None:
    with pytest.raises(AxisError, match="an array or State: '0'"):
        sortal.vmap(lambda m, x: m.w, in_axes=(None, "0"))(model(), jnp.ones(2))


def test_a_policy_may_have_rows_for_loops() -> None:
    policy = Policy({BatchStat: Rule(axis=Carry), Param: Rule(axis=0)})
    holder = Holder(w=Param(jnp.arange(2.0)))
    got = sortal.vmap(lambda m: m.w * 2, in_axes=policy)(holder)
    np.testing.assert_array_equal(got, [0, 2])

    def f(m: Any) -> None:
        m.new = BatchStat(m.w.value)

    with untouched(holder), pytest.raises(AxisError) as e:
        sortal.vmap(f, in_axes=policy)(holder)
    assert "new (BatchStat): Carry" in str(e.value)


# ----------------------------------------------------------------------------- outputs
def test_answers_by_kind_for_an_array_that_is_returned_are_refused() -> None:
    with pytest.raises(AxisError) as e:
        sortal.vmap(lambda x: x, out_axes=StateAxes({...: 0}))(jnp.ones(2))
    assert "StateAxes({...: 0}) says what to do by kind, but stands for" in str(e.value)
    assert "which is no Module or Variable. Give a plain value there." in str(e.value)


def test_answers_by_kind_for_a_state_that_is_returned_are_refused() -> None:
    state = sortal.state(Holder(w=Param(jnp.ones((4, 3))), b=BatchStat(jnp.ones(3))))
    axes = StateAxes({Param: 0, BatchStat: None})
    with pytest.raises(AxisError) as e:
        sortal.vmap(lambda x: x, in_axes=axes, out_axes=axes)(state)
    assert "a State that is returned, of which JAX sees no kinds:\n" in str(e.value)
    assert "  b (BatchStat)\n  w (Param)\nGive it a State" in str(e.value)
    answers = sortal.State({"w": 0, "b": None})
    same = sortal.vmap(lambda x: x, in_axes=axes, out_axes=answers)(state)
    assert sortal.graphdef(same) is sortal.graphdef(state)
    specs = sortal.StateSharding({...: P()})
    mesh = jax.make_mesh((1,), ("x",))
    with pytest.raises(AxisError) as e:
        sortal.shard_map(lambda x: x, mesh=mesh, in_specs=specs, out_specs=specs)(state)
    assert "for each leaf: State({'w': P('x'), 'b': None})." in str(e.value)


def test_an_output_of_another_build_than_its_prefix_is_refused() -> None:
    with pytest.raises(ArgumentError) as e:
        sortal.vmap(lambda x: (x, x), out_axes=(0, 0, None))(jnp.ones(2))
    assert str(e.value).startswith(
        "(0, 0, None) was given for what the function returns, which is built "
        "differently."
    )


def test_nothing_is_given_for_an_output_without_objects() -> None:
    assert given_for_objects((0, None), (jnp.ones(2), {"a": 1})) == {}


def test_a_new_leaf_without_an_answer_is_refused_by_path() -> None:
    holder = Holder(sub=Holder(), w=Param(jnp.ones(2)))

    def f(m: Any) -> None:
        m.sub.new = BatchStat(jnp.ones(3))

    with untouched(holder), pytest.raises(PolicyError, match=r"sub\.new \(BatchStat\)"):
        sortal.vmap(f, in_axes=StateAxes({Param: 0}))(holder)


def test_leaves_that_a_table_leaves_out_are_listed_with_what_to_add() -> None:
    norm = sortal.BatchNorm(2, rngs=sortal.Rngs(0))
    call = sortal.vmap(lambda m: None, in_axes=StateAxes({sortal.Param: None}))
    with pytest.raises(PolicyError) as error:
        call(norm)
    assert str(error.value) == (
        "StateAxes({Param: None}) takes no notice of leaves whose kind and Variable do "
        "not say their 'axis' either:\n  mean (BatchStat)\n  var (BatchStat)\n"
        "Add a row for them to the StateAxes, or ... as the last one."
    )
