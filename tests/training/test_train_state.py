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
    with pytest.raises(ArgumentError, match="'rests' is a str"):
        state.apply("rests")


def test_the_transformation_is_static_and_everything_else_a_leaf() -> None:
    graphdef, params = nnx.split(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    state = nnx.TrainState.create(graphdef, params=params, tx=optax.sgd(1.0), step=4)
    assert [x.shape for x in jax.tree.leaves(state)] == [(1,), (1, 1), ()]
    assert jax.jit(lambda s: s)(state).tx is state.tx


def test_gradients_that_are_not_those_of_the_parameters_are_refused() -> None:
    graphdef, params = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    state = nnx.TrainState.create(graphdef, params=params, tx=optax.sgd(1.0))
    with pytest.raises(ArgumentError) as caught:
        state.apply_gradients(params.filter(nnx.PathContains("bias")))
    assert "missing: ['kernel']" in str(caught.value)
    with pytest.raises(ArgumentError, match=r"found a NoneType:\n  missing: \['bias'"):
        state.apply_gradients(None)  # type: ignore[arg-type]
    # These would broadcast, and so change the parameters' shapes.
    other = jax.tree.map(lambda x: x[None], params)
    with pytest.raises(ArgumentError) as caught:
        state.apply_gradients(other)
    assert "['bias'].value is float32[3], its gradient float32[1,3]" in str(
        caught.value
    )
    with pytest.raises(
        ArgumentError, match=r"optax.adam\(1e-3\); found <function adam"
    ):
        nnx.TrainState.create(graphdef, params=params, tx=optax.adam)
