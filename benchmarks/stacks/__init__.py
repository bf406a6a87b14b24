"""One large model per contender, for measurements of memory: a stack of matrices.

``prepare(task, depth, width, donate)`` returns a call that blocks until all is done,
and the lowered program.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

RATE = 1e-6


def matrices(depth: int, width: int) -> list[jax.Array]:
    """The Params, one at a time, so that making them leaves no garbage behind."""
    return [jnp.full((width, width), 1e-3 / (i + 1), jnp.float32) for i in range(depth)]


def apply(kernels: list[Any], x: Any) -> Any:
    """The arithmetic of the model; returns one number."""
    for kernel in kernels:
        x = jnp.tanh(x @ kernel)
    return (x**2).mean()


def example(width: int) -> jax.Array:
    """A small batch, so that activations do not count."""
    return jnp.ones((8, width), jnp.float32)
