"""TrainState; a whole program against Flax is in test_nnx_names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

import sortal as nnx
from sortal.errors import ArgumentError


class Net(nnx.Module):
    def __init__(self) -> None:
        self.w = nnx.Param(jnp.array(2.0))
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        return self.w * x

    def half(self, x: jax.Array) -> jax.Array:
        return self.w * x / 2


class WithRest(nnx.TrainState):
    rest: nnx.State


def test_apply_calls_the_model_and_keeps_nothing() -> None:
    graphdef, params, rest = nnx.split(Net(), nnx.Param, ...)
    state = WithRest.create(graphdef, params=params, tx=optax.sgd(1.0), rest=rest)
    y, (_, after) = state.apply("params", "rest")(jnp.array(3.0))
    assert (float(y), int(after["calls"].value)) == (6, 1)
    assert int(state.rest["calls"].value) == 0
    assert float(state.apply("params", state.rest).half(jnp.array(3.0))[0]) == 3
    with pytest.raises(
        ArgumentError, match="names of fields that are States; 'step' is"
    ):
        state.apply("step")


def test_the_transformation_is_static_and_everything_else_a_leaf() -> None:
    graphdef, params = nnx.split(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    state = nnx.TrainState.create(graphdef, params=params, tx=optax.sgd(1.0), step=4)
    assert [x.shape for x in jax.tree.leaves(state)] == [(1,), (1, 1), ()]
    assert jax.jit(lambda s: s)(state).tx is state.tx
