"""with_metadata, with_partitioning, and what Variables make of them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

import sortal as nnx
from sortal._engine.annotations import HOOKS
from sortal.errors import VariableError


def ones(*args: Any) -> Any:
    return jnp.ones(2)


def test_annotated_values_may_be_nested_and_the_inner_one_is_the_value() -> None:
    init = nnx.with_metadata(nnx.with_partitioning(ones, ("a",)), unit="m")
    made = nnx.Param(init(), trainable=False)
    assert made.get_metadata() == {
        "trainable": False,
        "unit": "m",
        "out_sharding": ("a",),
    }
    assert made.value.tolist() == [1, 1]


def test_what_the_initialiser_says_comes_before_what_the_call_says() -> None:
    init = nnx.with_metadata(ones, unit="m")
    assert nnx.Param(init(), unit="s").get_metadata("unit") == "m"


def test_a_mesh_is_kept_only_if_one_is_given() -> None:
    assert "mesh" not in nnx.with_partitioning(ones, ("a",))().metadata


@pytest.mark.parametrize("name", ["sharding", "sharding_names"])
def test_old_names_of_the_sharding_are_stored_under_the_new_one(name: str) -> None:
    v = nnx.Param(jnp.ones(2), **{name: ["a"]})
    assert v.get_metadata() == {"out_sharding": ("a",)}
    v.set_metadata(name, ["b"])
    v.set_metadata(sharding_rules=[("b", None)])
    assert v.get_metadata() == {
        "out_sharding": ("b",),
        "sharding_rules": (("b", None),),
    }
    assert v.replace(**{name: ("c",)}).get_metadata() == {
        "out_sharding": ("c",),
        "sharding_rules": (("b", None),),
    }


def test_saying_that_a_variable_holds_its_value_itself_adds_no_metadata() -> None:
    v = nnx.Param(jnp.ones(2), hijax=False, ref=False)
    assert v.get_metadata() == {}
    assert nnx.graphdef({"v": v}) == nnx.graphdef({"v": nnx.Param(jnp.ones(2))})
    v.set_metadata({"hijax": False, "a": 1})
    assert v.get_metadata() == {"a": 1}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_refused_wherever_it_is_given(hook: str) -> None:
    told = f"{hook} would be hooks, which are never called here. Write a kind of your"
    with pytest.raises(VariableError, match=f"Param: {told} own that defines get_"):
        nnx.Param(1, **{hook: lambda *x: x})
    with pytest.raises(VariableError, match=f"with_metadata: {told}"):
        nnx.with_metadata(ones, **{hook: lambda *x: x})
    with pytest.raises(VariableError, match=f"class Hooked: {told}"):
        type("Hooked", (nnx.Variable,), {hook: lambda *x: x})
    v = nnx.Param(1)
    with pytest.raises(VariableError, match=told):
        v.set_metadata(hook, lambda *x: x)
    assert v.get_metadata() == {}
    assert nnx.Param(1, **{hook: ()}).get_metadata() == {}


def test_a_kind_with_a_get_value_of_its_own_is_read_through_it_everywhere() -> None:
    class Positive(nnx.Param):
        def get_value(self, **options: Any) -> Any:
            return jnp.exp(super().get_value(**options))

        def set_value(self, value: Any, **options: Any) -> None:
            super().set_value(jnp.log(value), **options)

    v = Positive(jnp.zeros(2))
    assert v.value.tolist() == v[...].tolist() == (v + 0).tolist() == [1, 1]
    assert v[0] == 1
    assert v._value.tolist() == [0, 0]
    v.value = jnp.ones(2)
    assert v._value.tolist() == [0, 0]
    v[1] = jnp.e
    assert v._value.tolist() == [0, 1]

    @nnx.jit
    def double(v: Any) -> Any:
        v[...] = 2 * v[...]
        return v[...]

    assert jnp.allclose(double(v), jnp.array([2, 2 * jnp.e]))
    assert jnp.allclose(v.value, jnp.array([2, 2 * jnp.e]))
