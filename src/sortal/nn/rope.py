"""Rotary embeddings: a query's or key's position as an angle of its features."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sortal._engine.variable import describe
from sortal.errors import ArgumentError


def rotary(x: Any, positions: Any, *, base: float = 10_000.0) -> jax.Array:
    """Turns pairs of features by angles that grow with the position.

    Feature ``i`` of the first half and feature ``i`` of the second are a pair, and are
    turned by ``position * base ** (-2 * i / features)``. The inner product of a query
    and a key so turned depends on their distance only. Angles are computed in float32.

    Args:
      x: queries or keys, floating point, (batch, length, heads, features); an even
        number of features.
      positions: integers, (length,) or (batch, length), counted from 0.
      base: the greater, the slower the last pairs turn; 10,000 in the paper.

    Returns:
      Array of the shape and dtype of ``x``.

    Raises:
      ArgumentError: ``x`` has another rank or dtype or an odd number of features, or
        the positions do not fit it.

    References:
      Su et al., "RoFormer: enhanced transformer with rotary position embedding",
      arXiv:2104.09864, section 3.2.2; the pairing by halves is that of GPT-NeoX.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> x = jnp.ones((1, 2, 1, 2))
      >>> print(nnx.rotary(x, jnp.arange(2))[0, :, 0].round(1))
      [[ 1.   1. ]
       [-0.3  1.4]]
    """
    x, positions = jnp.asarray(x), jnp.asarray(positions)
    real = jnp.issubdtype(x.dtype, jnp.floating)
    if x.ndim != 4 or x.shape[-1] % 2 or not real:
        raise ArgumentError(
            "rotary takes (batch, length, heads, features) with an even number of "
            f"features, in floating point; found {describe(x)}."
        )
    if positions.shape not in {x.shape[1:2], x.shape[:2]}:
        raise ArgumentError(
            f"rotary takes one position for each of {x.shape[1]} tokens, or for each "
            f"of {x.shape[0]} sequences and their tokens; found {describe(positions)}."
        )
    half = x.shape[-1] // 2
    speeds = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    positions = positions if positions.ndim == 2 else positions[None]
    angles = positions[..., None, None].astype(jnp.float32) * speeds[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
