"""Activation functions."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from flax import nnx as flax_nnx
from flax.nnx.nn import activations as flax_activations

import sortal as nnx
from sortal.errors import ArgumentError


@pytest.mark.parametrize("name", sorted({*flax_activations.__all__} - {"PReLU"}))
def test_every_activation_is_the_one_that_flax_exports(name: str) -> None:
    assert getattr(nnx, name) is getattr(flax_nnx, name)
    assert getattr(nnx.nn.activations, name) is getattr(flax_nnx, name)


def test_a_slope_is_learned_and_kept_in_its_own_dtype() -> None:
    layer = nnx.PReLU(0.25, negative_slope_metadata={"of": "x"})
    x = jnp.array([-2.0, 0.0, 4.0], jnp.bfloat16)
    y = layer(x)
    assert (y.tolist(), y.dtype) == ([-0.5, 0.0, 4.0], jnp.bfloat16)
    grads = nnx.grad(lambda m: m(x).sum())(layer)
    assert grads["negative_slope"][...].tolist() == -2.0
    assert layer.negative_slope.dtype == jnp.float32
    assert layer.negative_slope.get_metadata() == {"of": "x"}


def test_integers_are_multiplied_by_the_slope_itself() -> None:
    """In their own dtype a slope of a half would be zero."""
    y = nnx.PReLU(0.5)(jnp.array([-4, 2]))
    assert (y.tolist(), y.dtype) == ([-2.0, 2.0], jnp.float32)


def test_a_slope_takes_part_in_the_dtype_asked_for() -> None:
    assert nnx.PReLU(dtype=jnp.float16)([-1.0, 1.0]).dtype == jnp.float16
    with pytest.raises(ArgumentError, match=r"PReLU was called with None"):
        nnx.PReLU()(None)
