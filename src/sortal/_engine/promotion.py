"""Dtypes that Sortal itself mixes, such as bfloat16 and sums of it in float32.

With ``jax_numpy_dtype_promotion="strict"`` JAX refuses to mix dtypes, so that mixtures
are found that a program does not mean. These are meant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

P = ParamSpec("P")
R = TypeVar("R")


def mixing(f: Callable[P, R]) -> Callable[P, R]:
    """A function that may mix dtypes; it calls none that users have written."""

    @functools.wraps(f)
    def mixed(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_dtype_promotion("standard"):
            return f(*args, **kwargs)

    return mixed


@mixing
def wide(dtype: Any) -> Any:
    """That to which a dtype and float32 promote, in which sums are exact enough."""
    return jnp.promote_types(dtype, jnp.float32)
