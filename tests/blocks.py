"""Models whose second block is any function, for what searches for NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

import sortal as nnx
from sortal.inspect.nans import NonFinite

X = jnp.array([[1.0, 2.0, 3.0], [0.0, 4.0, 5.0]])
ZEROS = jnp.zeros((2, 3))
INF = float("inf")


class Op(nnx.Module):
    """A function as a module, with a Param before it."""

    def __init__(self, fn: Callable[[Any], Any]):
        self.fn = fn
        self.scale = nnx.Param(jnp.array(1.0))

    def __call__(self, x: Any) -> Any:
        return self.fn(x * self.scale.astype(x.dtype))


class Model(nnx.Module):
    """Two blocks; the second is the one that goes wrong."""

    def __init__(self, fn: Callable[[Any], Any]):
        self.blocks = [Op(lambda x: x), Op(fn)]

    def __call__(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


@nnx.jit
def call(model: Any, x: Any) -> Any:
    return model(x)


@nnx.jit
def differentiate(model: Any, x: Any) -> Any:
    return nnx.value_and_grad(lambda model: model(x).sum())(model)


@nnx.jit
def train(model: Any, optimizer: Any, x: Any) -> Any:
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
    optimizer.update(model, grads)
    return loss


def linear(**options: Any) -> Any:
    return nnx.Linear(3, 2, rngs=nnx.Rngs(0), **options)


def culprit(step: Any, *arguments: Any, **named: Any) -> NonFinite:
    """What find_nan finds, which must be something."""
    found = nnx.find_nan(step)(*arguments, **named)
    assert found is not None
    return found
