"""One network of layers that each write a running mean, for timing transforms.

A layer has two Params and a mean. ``modules`` holds it in modules of Sortal or Flax,
``lists`` in lists of arrays, returned where they change, as is done in plain JAX.
``call(name, depth, jitted)`` in both returns a call of the transform ``name``, of the
same function of the network, or None where the library has none that does this.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

WIDTH = 8
STEPS = 4


def inputs() -> jax.Array:
    """A small batch."""
    return jnp.linspace(-1, 1, 4 * WIDTH, dtype=jnp.float32).reshape(4, WIDTH)


def layer(x: Any, weight: Any, bias: Any, mean: Any) -> tuple[Any, Any]:
    """One layer's output and its new running mean."""
    x = x + jnp.tanh(x @ weight + bias)
    return x, 0.9 * mean + 0.1 * x.mean(0)


def mesh() -> Any:
    """A mesh of one device, so that communication is none."""
    return jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
