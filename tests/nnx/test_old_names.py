"""Older names of NNX for a Variable's value, kind and axes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from sortal import nnx
from sortal.errors import TraceError, VariableError


def test_the_raw_value_is_the_value() -> None:
    v = nnx.Param(jnp.ones(2))
    assert v.raw_value is v.get_raw_value() is v.value
    v.raw_value = jnp.zeros(2)
    assert v.value.tolist() == [0, 0]
    v.set_raw_value(jnp.ones(2))
    assert v.value.tolist() == [1, 1]


def test_the_raw_value_cannot_be_written_from_another_trace() -> None:
    v = nnx.Param(jnp.ones(2))
    with pytest.raises(TraceError):
        jax.jit(v.set_raw_value)(jnp.zeros(2))
    assert v.value.tolist() == [1, 1]


def test_copy_from_takes_value_and_metadata_of_the_same_kind_only() -> None:
    v, other = nnx.Param(1, a=1), nnx.Param(2, b=2)
    v.copy_from(other)
    assert (v.value, v.get_metadata()) == (2, {"b": 2})
    with pytest.raises(
        VariableError,
        match=r"copy_from on a Param takes another Param; found a BatchStat. For the "
        r"value alone write variable.value = x.",
    ):
        v.copy_from(nnx.BatchStat(3))
    assert v.value == 2


def test_type_and_sharding_names() -> None:
    assert nnx.Cache(1).type is nnx.Cache
    assert nnx.Cache(1).sharding_names is None
    assert nnx.Cache(jnp.ones(1), out_sharding=("a",)).sharding_names == ("a",)
    assert nnx.Cache(1).to_state().value == 1


@pytest.mark.parametrize("name", ["add_axis", "remove_axis"])
def test_a_method_that_no_transform_would_call_is_refused_in_a_kind(name: str) -> None:
    with pytest.raises(VariableError, match=f"Kind: {name} would never be called"):
        type("Kind", (nnx.Param,), {name: lambda self, index, axis: None})
    assert issubclass(type("Kind", (nnx.Param,), {}), nnx.Param)
