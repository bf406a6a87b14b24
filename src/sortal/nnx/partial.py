"""Compiled functions with their first arguments bound."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sortal.nnx.transforms import jit
from sortal.transforms.compile import JittedPartial


def cached_partial(
    f: Callable[..., Any],
    *cached_args: Any,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Callable[..., Any]:
    """A function with its first arguments bound: ``functools.partial``.

    Sortal keeps the plans of models in any case, so this is not faster, and does not
    restrict what the function may do.

    Args:
      f: a function, such as ``jit`` returns.
      *cached_args: its first arguments, such as a model and an optimizer.
      graph: ignored; for NNX compatibility.
      graph_updates: ignored; for NNX compatibility.

    Returns:
      A function of the remaining arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> from sortal import nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> forward = nnx.cached_partial(nnx.jit(lambda m, x: m(x)), model)
      >>> forward(jnp.ones(2)).shape
      (3,)
    """
    return functools.partial(f, *cached_args)


def jit_partial(
    fun: Callable[..., Any], *partial_args: Any, **options: Any
) -> Callable[..., Any]:
    """``jit`` of a function with its first arguments bound.

    Args:
      fun: the function.
      *partial_args: its first arguments, such as a model and an optimizer.
      **options: those of ``jit``; positions count all arguments of ``fun``.

    Returns:
      A function of the remaining arguments.

    Raises:
      ArgumentError: ``fun`` cannot be called, or an option is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from sortal import nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> forward = nnx.jit_partial(lambda m, x: m(x), model)
      >>> forward(jnp.ones(2)).shape
      (3,)
    """
    return JittedPartial(jit(fun, **options), *partial_args)
