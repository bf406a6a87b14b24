"""A Rule takes what a pipeline can do, refuses the rest, and prints as written."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from sortal._engine.variable import _OPTIONS
from sortal.errors import PolicyError
from sortal.policy.rule import (
    COLUMNS,
    UNSET,
    Rule,
    fault,
    long_name,
    short_name,
    written,
)


class Carry:
    """Stands for the sentinel of `scan`, which is defined further down."""


def median(stacked):
    return jnp.median(stacked, axis=0)


def test_rules_kinds_and_columns_have_the_same_names():
    names = {field.name for field in dataclasses.fields(Rule)}
    assert names == set(COLUMNS) == _OPTIONS


def test_a_rule_answers_nothing_that_it_was_not_given():
    rule = Rule(axis=None)
    assert rule.axis is None
    assert rule.spec is UNSET
    assert list(rule.given()) == [("axis", None)]
    assert repr(UNSET) == "-"
    assert copy.deepcopy(UNSET) is UNSET
    assert pickle.loads(pickle.dumps(UNSET)) is UNSET
    with pytest.raises(TypeError):
        Rule(0)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("axis", -1),
        ("axis", None),
        ("axis", np.int64(1)),
        ("axis", Carry),
        *(("reduce", x) for x in ("mean", "sum", "max", "min", median, None)),
        ("spec", P("data")),
        ("spec", jax.sharding.SingleDeviceSharding(jax.devices()[0])),
        ("spec", None),
        ("role", "carry"),
        *(("checkpoint", x) for x in ("keep", "drop", "keep-last")),
        ("donate", False),
        ("optimizer", optax.sgd(0.1)),
        ("optimizer", optax.MultiSteps(optax.sgd(0.1), 2)),
        ("optimizer", None),
        ("trainable", True),
        ("dtype", jnp.bfloat16),
        ("dtype", "float32"),
        ("dtype", np.dtype(np.int8)),
        ("dtype", None),
    ],
)
def test_what_a_pipeline_can_do_is_taken_as_it_is(name, answer):
    assert getattr(Rule(**{name: answer}), name) is answer


@pytest.mark.parametrize(
    ("name", "answer", "due"),
    [
        ("axis", True, "an int, None or Carry is due"),
        ("axis", 0.5, "an int, None or Carry is due"),
        ("axis", "data", "an int, None or Carry is due"),
        ("axis", [0], "cannot be hashed"),
        ("reduce", "avg", "'mean', 'sum', 'max', 'min', a function of the stacked"),
        ("spec", "data", "a PartitionSpec, a Sharding or None is due"),
        ("spec", ("data", None), "a PartitionSpec, a Sharding or None is due"),
        ("role", 3, "a word is due"),
        ("role", "", "a word is due"),
        ("checkpoint", "no", "'keep', 'drop' or 'keep-last' is due"),
        ("checkpoint", True, "'keep', 'drop' or 'keep-last' is due"),
        ("checkpoint", ["keep"], "'keep', 'drop' or 'keep-last' is due"),
        ("donate", 1, "True or False is due"),
        ("optimizer", optax.adam, "an optax transformation such as optax.adam(1e-3)"),
        ("optimizer", 1e-3, "an optax transformation such as optax.adam(1e-3)"),
        ("optimizer", optax.MultiSteps, "an optax transformation such as"),
        ("trainable", "no", "True or False is due"),
        ("dtype", "float33", "a dtype such as jnp.bfloat16, or None is due"),
    ],
)
def test_anything_else_is_refused_when_the_rule_is_made(name, answer, due):
    with pytest.raises(PolicyError) as caught:
        Rule(**{name: answer})
    text = str(caught.value)
    assert text.startswith("a Rule says for each pipeline what it can do; found:\n")
    assert f"  {name}={answer!r:.80}, wh" in text
    assert due in text


def test_all_bad_values_are_listed_at_once():
    with pytest.raises(PolicyError) as caught:
        Rule(axis=0.5, donate=1, trainable=True)
    assert str(caught.value).splitlines()[1:] == [
        "  axis=0.5, where an int, None or Carry is due",
        "  donate=1, where True or False is due",
    ]
    assert fault("trainable", True) == ""


def test_rules_are_frozen_and_equal_by_what_they_say():
    rule = Rule(axis=0, spec=P("data"))
    assert rule == Rule(axis=0, spec=P("data"))
    assert hash(rule) == hash(Rule(axis=0, spec=P("data")))
    assert rule != Rule(axis=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.axis = 1  # type: ignore[misc]


def test_a_rule_prints_as_it_was_written():
    rule = Rule(
        dtype=jnp.bfloat16,
        axis=None,
        reduce=median,
        spec=P(None, "model"),
        checkpoint="keep",
        donate=True,
        optimizer=optax.set_to_zero(),
    )
    assert repr(rule) == (
        "Rule(axis=None, reduce=median, spec=P(None, 'model'), checkpoint='keep', "
        "donate=True, optimizer=set_to_zero, dtype=bfloat16)"
    )
    assert repr(Rule()) == "Rule()"
    assert repr(Rule(optimizer=None)) == "Rule(optimizer=None)"


def test_a_sharding_prints_by_its_spec():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, P("d"))
    assert written("spec", sharding) == "NamedSharding(P('d'))"


def schedule_free(rate):
    def update(updates, state, params=None):
        return updates, state

    return optax.GradientTransformation(lambda params: rate, update)


class Own:
    def __init__(self):
        self.init = self.update = Call()


class Call:
    def __call__(self, *args):
        raise AssertionError("nobody runs it")


@pytest.mark.parametrize(
    ("tx", "short", "long"),
    [
        (optax.set_to_zero(), "set_to_zero", "set_to_zero"),
        (
            optax.adamw(1e-3),
            "chain",
            "chain(scale_by_adam, add_decayed_weights, scale)",
        ),
        (
            optax.chain(optax.clip(1.0), optax.set_to_zero()),
            "chain",
            "chain(clip, set_to_zero)",
        ),
        (optax.MultiSteps(optax.sgd(0.1), 2), "MultiSteps", "MultiSteps"),
        (schedule_free(1.0), "schedule_free", "schedule_free"),
        (Own(), "Own", "Own"),
    ],
    ids=["simple", "adamw", "chain", "object", "own", "no names"],
)
def test_a_transformation_is_named_by_what_made_it(tx, short, long):
    assert short_name(tx) == short
    assert long_name(tx) == long


def test_a_transformation_inside_another_is_found_wherever_it_is_kept():
    def both(*inside):
        return optax.GradientTransformation(
            lambda params: (),
            lambda updates, state, params=None: inside[0].update(updates, state),
        )

    name = "test_a_transformation_inside_another_is_found_wherever_it_is_kept"
    tx = both(optax.set_to_zero(), optax.set_to_zero())
    assert long_name(tx) == f"{name}(set_to_zero, set_to_zero)"


def test_a_transformation_that_holds_itself_is_still_named():
    def update(updates, state, params=None):
        return tx.update(updates, state, params)

    tx = optax.GradientTransformation(lambda params: (), update)
    name = "test_a_transformation_that_holds_itself_is_still_named"
    assert long_name(tx) == "(".join([name] * 5) + "))))"


def test_a_transformation_under_construction_is_named_as_far_as_it_is():
    def update(updates, state, params=None):
        return later.update(updates, state, params)

    tx = optax.GradientTransformation(lambda params: (), update)
    name = "test_a_transformation_under_construction_is_named_as_far_as_it_is"
    assert long_name(tx) == name
    later = tx
