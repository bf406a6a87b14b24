"""A Rule takes what a pipeline can do, refuses the rest, and prints as written."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import sortal
from sortal._engine.variable import _OPTIONS, Variable
from sortal.errors import PolicyError, VariableError
from sortal.policy.rule import (
    COLUMNS,
    UNSET,
    Rule,
    fault,
    format_answer,
)


class Carry:
    """Stands for the sentinel of `scan`, which is defined further down."""


def median(stacked):
    return jnp.median(stacked, axis=0)


def test_rules_kinds_and_columns_have_the_same_names():
    names = {field.name for field in dataclasses.fields(Rule)}
    assert names == set(COLUMNS) == _OPTIONS


def test_every_column_is_read_by_a_pipeline():
    """A column that nothing reads would be a promise that nobody keeps."""
    package = Path(sortal.__file__).parent
    pipelines = (
        "".join(
            file.read_text()
            for folder in ("transforms", "training", "checkpoint")
            for file in (package / folder).rglob("*.py")
        )
        + (package / "policy" / "policy.py").read_text()
    )
    assert [name for name in COLUMNS if f'"{name}"' not in pipelines] == []


@pytest.mark.parametrize("name", ["role", "dtype"])
def test_what_no_pipeline_reads_is_no_column(name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        Rule(**{name: "float32"})
    with pytest.raises(VariableError, match=f"unknown kind option {name}"):
        type("Kind", (Variable,), {}, **{name: "float32"})


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
        *(("checkpoint", x) for x in ("keep", "drop", "keep-last")),
        ("donate", False),
        ("optimizer", optax.sgd(0.1)),
        ("optimizer", optax.MultiSteps(optax.sgd(0.1), 2)),
        ("optimizer", None),
        ("trainable", True),
    ],
)
def test_what_a_pipeline_can_do_is_taken_as_it_is(name, answer):
    assert getattr(Rule(**{name: answer}), name) is answer


@pytest.mark.parametrize(
    ("name", "answer", "due"),
    [
        ("axis", True, "an int, None or Carry is expected"),
        ("axis", 0.5, "an int, None or Carry is expected"),
        ("axis", "data", "an int, None or Carry is expected"),
        ("axis", [0], "cannot be hashed"),
        ("reduce", "avg", "'mean', 'sum', 'max', 'min', a function of the stacked"),
        (
            "spec",
            "data",
            "a Sharding, a function of (shape, mesh), or None is expected",
        ),
        (
            "spec",
            ("data", None),
            "a Sharding, a function of (shape, mesh), or None is expected",
        ),
        ("checkpoint", "no", "'keep', 'drop' or 'keep-last' is expected"),
        ("checkpoint", True, "'keep', 'drop' or 'keep-last' is expected"),
        ("checkpoint", ["keep"], "'keep', 'drop' or 'keep-last' is expected"),
        ("donate", 1, "True or False is expected"),
        ("optimizer", optax.adam, "an optax transformation such as optax.adam(1e-3)"),
        ("optimizer", 1e-3, "an optax transformation such as optax.adam(1e-3)"),
        ("optimizer", optax.MultiSteps, "an optax transformation such as"),
        ("trainable", "no", "True or False is expected"),
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
        "  axis=0.5, where an int, None or Carry is expected",
        "  donate=1, where True or False is expected",
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
        axis=None,
        reduce=median,
        spec=P(None, "model"),
        checkpoint="keep",
        donate=True,
        optimizer=optax.set_to_zero(),
    )
    assert repr(rule) == (
        "Rule(axis=None, reduce=median, spec=P(None, 'model'), checkpoint='keep', "
        "donate=True, optimizer=<GradientTransformation>)"
    )
    assert repr(Rule()) == "Rule()"
    assert repr(Rule(optimizer=None)) == "Rule(optimizer=None)"


def test_a_sharding_prints_by_its_spec():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, P("d"))
    assert format_answer("spec", sharding) == "NamedSharding(P('d'))"
