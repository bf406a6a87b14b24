"""Specs and shardings of whole models; programs against Flax are in test_nnx_names."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sortal as nnx

MESH = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))


class Model(nnx.Module):
    def __init__(self) -> None:
        self.w = nnx.Param(jnp.ones((2, 3)), out_sharding=(None, "x"))
        self.raw = jnp.ones(2)
        self.note = nnx.Variable("text")


def test_specs_of_a_live_model_are_those_of_its_state() -> None:
    model = Model()
    of_model, of_state = nnx.get_partition_spec([model, nnx.state(model)])
    assert isinstance(of_model, Model)
    assert of_model.w.value == of_state["w"].value == P(None, "x")
    assert of_state["raw"] == P()
    assert of_state["note"].value is None
    assert isinstance(of_state["w"], nnx.Param)
    assert model.w.value.shape == (2, 3)


def test_shardings_lie_on_the_mesh() -> None:
    found = nnx.get_named_sharding(nnx.state(Model()), MESH)
    assert found["w"].value.spec == P(None, "x")
    assert found["raw"].spec == P()
    assert found["raw"].mesh is found["w"].value.mesh is MESH


def test_a_sharded_state_can_be_put_where_it_belongs() -> None:
    state = nnx.state(Model()).filter(nnx.Param)
    put = jax.device_put(state, nnx.get_named_sharding(state, MESH))
    assert put["w"].value.sharding.spec == P(None, "x")


def test_as_abstract_leaves_alone_what_is_known_or_not_named() -> None:
    abstract: Any = nnx.eval_shape(lambda: Model().w)
    with jax.set_mesh(MESH):
        known = nnx.as_abstract(abstract)
    assert known.value.sharding.spec == P(None, "x")
    assert nnx.as_abstract(known).value.sharding.spec == P(None, "x")
    assert nnx.as_abstract(nnx.Variable("text")).value == "text"
    assert nnx.as_abstract({"a": 1}) == {"a": 1}
