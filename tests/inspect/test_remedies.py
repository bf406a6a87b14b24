"""What find_nan says to write instead."""

from __future__ import annotations

import jax.numpy as jnp
import optax

import sortal as nnx
from blocks import Model, X, call, culprit, linear, train


def test_parameters_that_have_grown_point_to_the_learning_rate() -> None:
    model = linear()
    model.kernel.value = jnp.full((3, 2), 3e38)
    assert "learning rate" in culprit(call, model, X).remedy
    optimizer = nnx.Optimizer(linear(), optax.sgd(1e38), wrt=nnx.Param)
    assert "learning rate" in culprit(train, linear(), optimizer, X * 100).remedy


def test_the_remedy_of_low_precision_is_more() -> None:
    model = Model(lambda x: x @ x.T)
    assert culprit(call, model, (X * 100).astype(jnp.float16)).remedy == (
        "overflow: float16 ends at 6.55e+04. Compute this in float32."
    )
