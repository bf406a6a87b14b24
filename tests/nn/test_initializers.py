"""Initialisers, and how layers make their parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.nnx import initializers as flax_initializers

import sortal as nnx
from sortal.errors import ArgumentError
from sortal.nn import initializers

NAMES = [
    name
    for name in dir(flax_initializers)
    if callable(getattr(flax_initializers, name)) and name.islower()
]


@pytest.mark.parametrize("name", NAMES)
def test_every_initialiser_of_flax_is_there(name: str) -> None:
    ours, theirs = getattr(initializers, name), getattr(flax_initializers, name)
    if name in {"zeros_init", "ones_init"}:
        ours, theirs = ours(), theirs()
    assert ours is theirs


@pytest.mark.parametrize("size", [-1, 2.0, True, "2", None, jnp.ones(2)])
def test_a_size_that_is_no_whole_number_is_refused(size: Any) -> None:
    with pytest.raises(ArgumentError, match=r"Linear: in_features must be made of"):
        nnx.Linear(size, 3, rngs=nnx.Rngs(0))


def test_a_size_may_be_zero_or_of_numpy() -> None:
    layer = nnx.Linear(np.int64(2), 0, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((3, 2))).shape == (3, 0)


@pytest.mark.parametrize("rngs", [0, None, jax.random.key(0)], ids=["0", "none", "key"])
def test_rngs_of_another_type_are_refused(rngs: Any) -> None:
    with pytest.raises(ArgumentError, match=r"Linear needs an Rngs .*rngs=nnx\.Rngs"):
        nnx.Linear(2, 3, rngs=rngs)


def test_rngs_are_not_looked_at_where_nothing_is_initialised() -> None:
    layer = nnx.LayerNorm(2, use_bias=False, use_scale=False, rngs=None)  # type: ignore[arg-type]
    assert layer(jnp.ones((3, 2))).shape == (3, 2)


def test_an_initialiser_that_is_a_value_is_refused() -> None:
    message = r"Linear: bias_init must be a function .* found 0\.0.*constant\(value\)"
    with pytest.raises(ArgumentError, match=message):
        nnx.Linear(2, 3, bias_init=0.0, rngs=nnx.Rngs(0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "factory", [nnx.initializers.lecun_normal, nnx.initializers.zeros_init]
)
def test_a_factory_in_place_of_an_initialiser_is_refused(factory: Any) -> None:
    """``kernel_init=lecun_normal``, without its brackets, is a common slip."""
    if factory is nnx.initializers.zeros_init:
        factory = lambda *_: nnx.initializers.zeros_init()  # noqa: E731
    with pytest.raises(ArgumentError, match=r"kernel_init returned a function"):
        nnx.Linear(2, 3, kernel_init=factory, rngs=nnx.Rngs(0))


def test_metadata_is_kept_on_the_parameter_it_is_for() -> None:
    layer = nnx.Linear(
        2,
        3,
        kernel_metadata={"sharding": ("data", None)},
        bias_metadata={"note": "b"},
        rngs=nnx.Rngs(0),
    )
    assert layer.kernel.get_metadata() == {"out_sharding": ("data", None)}
    assert layer.bias is not None
    assert layer.bias.get_metadata() == {"note": "b"}


def test_parameters_take_the_stream_params_and_no_other() -> None:
    rngs = nnx.Rngs(0, params=1, dropout=2)
    nnx.Linear(2, 3, rngs=rngs)
    counts = {name: int(stream.count[...]) for name, stream in rngs.items()}
    assert counts == {"default": 0, "params": 2, "dropout": 0}
