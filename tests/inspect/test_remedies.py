"""What find_nan says to write instead."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

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


@jax.custom_vjp
def same(x):
    return x


same.defvjp(lambda x: (x, x), lambda x, g: (g / (x * 0),))


@pytest.mark.parametrize(
    ("gives_nan", "word"),
    [
        (lambda x: jnp.sqrt(x * 0).sum(), "a root"),
        (lambda x: jnp.std(x * 0), "a root"),
        (lambda x: jnp.linalg.norm(x * 0), "a root"),
        (lambda x: same(x).sum(), "division by zero"),
        (lambda x: jax.nn.logsumexp(x * 0 - jnp.inf), "division by zero"),
    ],
)
def test_a_backward_division_is_a_root_only_where_jax_derives_one(gives_nan, word):
    gradient = nnx.grad(lambda model, x: gives_nan(model(x)))
    assert culprit(gradient, linear(), X).remedy.startswith(word)
