"""transform_metadata; whole programs against Flax are in test_nnx_names."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx as flax_nnx

import sortal
from sortal import PARTITION_NAME, Param

MANY = {PARTITION_NAME: "layers", "notes": "new"}


def variable(nnx: Any, names: Any, **more: Any) -> Any:
    value = jnp.ones((2, 3))
    return nnx.Param(value, out_sharding=names, eager_sharding=False, **more)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("names", [("a", "b"), ("a",), ()])
def test_the_name_is_put_where_flax_puts_it(axis: int, names: Any) -> None:
    def made(nnx: Any) -> Any:
        make = nnx.vmap(
            lambda _: variable(nnx, names, notes=("x", "y")),
            out_axes=axis,
            transform_metadata=MANY,
        )
        found = make(jnp.arange(4)).get_metadata()
        return found.get("out_sharding"), found["notes"]

    assert made(sortal) == made(flax_nnx)


def test_an_axis_counted_from_the_end_is_named_at_its_place() -> None:
    found = sortal.vmap(
        lambda _: variable(sortal, ("a", "b")), out_axes=-1, transform_metadata=MANY
    )(jnp.arange(4))
    assert found.value.shape == (2, 3, 4)
    assert found.get_metadata("out_sharding") == ("a", "b", "layers")


def test_shared_and_passed_in_variables_keep_their_names() -> None:
    old = variable(sortal, ("a", "b"))
    shared, same = sortal.vmap(
        lambda old, _: (variable(sortal, ("a", "b")), old),
        in_axes=(None, 0),
        out_axes=(None, None),
        axis_size=4,
        transform_metadata=MANY,
    )(old, jnp.arange(4))
    assert shared.get_metadata("out_sharding") == ("a", "b")
    assert same is old
    assert old.get_metadata("out_sharding") == ("a", "b")


def test_what_a_constructor_or_step_adds_is_named_too() -> None:
    class Layer(sortal.Module):
        def __init__(self, key: Any):
            self.w = Param(jnp.ones(3), out_sharding=("a",))
            del key

        def __call__(self, x: Any) -> Any:
            self.seen = sortal.Intermediate(x, out_sharding=("a",))
            return x + self.w

    make = sortal.vmap(Layer, transform_metadata=MANY)
    layers = sortal.jit(make)(jax.random.split(jax.random.key(0), 2))
    assert layers.w.get_metadata("out_sharding") == ("layers", "a")
    sortal.scan(
        lambda layer, x: layer(x),
        in_axes=(0, sortal.Carry),
        out_axes=sortal.Carry,
        transform_metadata=MANY,
    )(layers, jnp.ones(3))
    assert layers.seen.get_metadata("out_sharding") == ("layers", "a")
    assert layers.w.get_metadata("out_sharding") == ("layers", "a")
