"""Pooling: reductions over a sliding window."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sortal._engine.promotion import wide
from sortal._engine.variable import describe
from sortal.errors import ArgumentError
from sortal.nn import dtypes

Padding = str | Sequence[Any]

_PADDINGS = ("SAME", "SAME_LOWER", "VALID")


def pool(
    inputs: Any,
    init: Any,
    reduce_fn: Callable[[Any, Any], Any],
    window_shape: Sequence[int],
    strides: Sequence[int] | None,
    padding: Padding,
) -> jax.Array:
    """Reduces each window of the spatial axes to one element.

    Args:
      inputs: array (*batch, *spatial, features), with any number of batch axes.
      init: the initial value of ``reduce_fn``.
      reduce_fn: joins two elements; associative.
      window_shape: size of the window along each spatial axis.
      strides: steps of the window along each spatial axis; 1 if absent.
      padding: ``"SAME"``, ``"VALID"`` or a pair (low, high) for each spatial axis.

    Returns:
      Array (*batch, *fewer spatial, features).

    Raises:
      ArgumentError: the arguments do not fit the input's axes or one another.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> x = jnp.arange(6.0).reshape(1, 6, 1)
      >>> nnx.pool(x, 1.0, jax.lax.mul, (2,), (2,), "VALID").ravel()
      Array([ 0.,  6., 20.], dtype=float32)
    """
    x = dtypes.as_array("pooling", inputs)
    window = _per_axis("window_shape", window_shape)
    steps = (1,) * len(window) if strides is None else strides
    steps = _per_axis("strides", steps, len(window))
    n_batch = x.ndim - len(window) - 1
    if n_batch < 0:
        raise ArgumentError(
            f"pooling with window_shape={window} needs an input of at least "
            f"{len(window) + 1} axes, the last being features; found {describe(x)}."
        )
    if isinstance(init, (int, float)) and jnp.issubdtype(x.dtype, jnp.inexact):
        # Under jax_enable_x64 a number is float64 to JAX, whatever the input is.
        init = np.asarray(init, x.dtype)
    # Without a batch axis `reduce_window` has no derivative.
    lead = (1,) * max(n_batch, 1)
    if not isinstance(padding, str) or padding not in _PADDINGS:
        pairs = _pairs(padding, len(window))
        padding = (*((0, 0) for _ in lead), *pairs, (0, 0))
    y = lax.reduce_window(
        x if n_batch else x[None],
        init,
        reduce_fn,
        (*lead, *window, 1),
        (*lead, *steps, 1),
        padding,
    )
    return y if n_batch else jnp.squeeze(y, axis=0)


def _per_axis(name: str, sizes: Any, n: int | None = None) -> tuple[int, ...]:
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise ArgumentError(
            f"pooling: {name} has one entry for each spatial axis, such as (2, 2); "
            f"found {sizes!r}."
        )
    if n not in (None, len(sizes)):
        raise ArgumentError(
            f"pooling: {name} must have {n} entries, as window_shape has; found "
            f"{tuple(sizes)}."
        )
    if min(sizes, default=1) < 1:
        raise ArgumentError(f"pooling: {name} must be 1 or more; found {tuple(sizes)}.")
    return tuple(sizes)


def _pairs(padding: Any, n: int) -> list[tuple[int, int]]:
    try:
        pairs = [(operator.index(low), operator.index(high)) for low, high in padding]
    except (TypeError, ValueError):
        pairs = []
    if len(pairs) != n:
        raise ArgumentError(
            f"pooling: padding must be 'SAME', 'VALID' or {n} pairs (low, high), one "
            f"for each spatial axis; found {padding!r}."
        )
    return pairs


def avg_pool(
    inputs: Any,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
) -> jax.Array:
    """The mean of each window, summed in float32 at least.

    Args:
      inputs: array (*batch, *spatial, features).
      window_shape: size of the window along each spatial axis.
      strides: steps of the window along each spatial axis; 1 if absent.
      padding: ``"SAME"``, ``"VALID"`` or a pair (low, high) for each spatial axis.
      count_include_pad: whether padding counts as zeros; else each mean is over the
        other elements, and is at least float32.

    Returns:
      Array (*batch, *fewer spatial, features), floating-point.

    Raises:
      ArgumentError: the arguments do not fit the input's axes or one another.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> nnx.avg_pool(jnp.arange(4.0).reshape(1, 4, 1), (2,), (2,)).ravel()
      Array([0.5, 2.5], dtype=float32)
    """
    x = dtypes.as_array("pooling", inputs)
    # Half precision and small integers cannot hold the sum of a large window.
    summed = x.astype(wide(x.dtype))
    total = pool(summed, 0.0, lax.add, window_shape, strides, padding)
    if count_include_pad:
        mean = total / math.prod(window_shape)
        return mean.astype(dtypes.canonicalize_dtype(x))
    spatial = x.shape[x.ndim - len(window_shape) - 1 : -1]
    ones = jnp.ones((*[1] * (x.ndim - len(spatial) - 1), *spatial, 1), total.dtype)
    return total / pool(ones, 0.0, lax.add, window_shape, strides, padding)


def max_pool(
    inputs: Any,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
) -> jax.Array:
    """The greatest element of each window.

    Args:
      inputs: array (*batch, *spatial, features).
      window_shape: size of the window along each spatial axis.
      strides: steps of the window along each spatial axis; 1 if absent.
      padding: ``"SAME"``, ``"VALID"`` or a pair (low, high) for each spatial axis.

    Returns:
      Array (*batch, *fewer spatial, features).

    Raises:
      ArgumentError: the arguments do not fit the input's axes or one another.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> nnx.max_pool(jnp.arange(4.0).reshape(1, 4, 1), (2,), (2,)).ravel()
      Array([1., 3.], dtype=float32)
    """
    return pool(inputs, -jnp.inf, lax.max, window_shape, strides, padding)


def min_pool(
    inputs: Any,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
) -> jax.Array:
    """The least element of each window.

    Args:
      inputs: array (*batch, *spatial, features).
      window_shape: size of the window along each spatial axis.
      strides: steps of the window along each spatial axis; 1 if absent.
      padding: ``"SAME"``, ``"VALID"`` or a pair (low, high) for each spatial axis.

    Returns:
      Array (*batch, *fewer spatial, features).

    Raises:
      ArgumentError: the arguments do not fit the input's axes or one another.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> nnx.min_pool(jnp.arange(4.0).reshape(1, 4, 1), (2,), (2,)).ravel()
      Array([0., 2.], dtype=float32)
    """
    return pool(inputs, jnp.inf, lax.min, window_shape, strides, padding)
