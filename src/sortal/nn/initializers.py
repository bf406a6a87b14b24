"""Initialisers of JAX and two more, and Params made of them."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import constant as constant
from jax.nn.initializers import delta_orthogonal as delta_orthogonal
from jax.nn.initializers import glorot_normal as glorot_normal
from jax.nn.initializers import glorot_uniform as glorot_uniform
from jax.nn.initializers import he_normal as he_normal
from jax.nn.initializers import he_uniform as he_uniform
from jax.nn.initializers import kaiming_normal as kaiming_normal
from jax.nn.initializers import kaiming_uniform as kaiming_uniform
from jax.nn.initializers import lecun_normal as lecun_normal
from jax.nn.initializers import lecun_uniform as lecun_uniform
from jax.nn.initializers import normal as normal
from jax.nn.initializers import ones as ones
from jax.nn.initializers import orthogonal as orthogonal
from jax.nn.initializers import truncated_normal as truncated_normal
from jax.nn.initializers import uniform as uniform
from jax.nn.initializers import variance_scaling as variance_scaling
from jax.nn.initializers import xavier_normal as xavier_normal
from jax.nn.initializers import xavier_uniform as xavier_uniform
from jax.nn.initializers import zeros as zeros
from jax.typing import DTypeLike

from sortal._engine.annotations import VariableMetadata
from sortal._engine.variable import Param, Variable, describe
from sortal.errors import ArgumentError
from sortal.nn.dtypes import name_of
from sortal.random import Rngs, is_rngs

Initializer = jax.nn.initializers.Initializer | Callable[..., Any]
"""Takes a key, a shape and a dtype; returns an array."""

Metadata = Mapping[str, Any]
NO_METADATA: Metadata = MappingProxyType({})


def zeros_init() -> Initializer:
    """An initialiser that fills with zeros.

    Returns:
      The initialiser.

    Example:
      >>> import jax
      >>> zeros_init()(jax.random.key(0), (3,))
      Array([0., 0., 0.], dtype=float32)
    """
    return zeros


def ones_init() -> Initializer:
    """An initialiser that fills with ones.

    Returns:
      The initialiser.

    Example:
      >>> import jax
      >>> ones_init()(jax.random.key(0), (3,))
      Array([1., 1., 1.], dtype=float32)
    """
    return ones


default_kernel_init: Initializer = lecun_normal()
default_bias_init: Initializer = zeros
default_embed_init: Initializer = variance_scaling(1.0, "fan_in", "normal", out_axis=0)


def check_sizes(layer: Any, **sizes: Any) -> None:
    """Refuses sizes, or tuples of sizes, that are not integers of zero or more."""
    for name, size in sizes.items():
        for number in size if isinstance(size, tuple) else (size,):
            if not _is_size(number):
                raise ArgumentError(
                    f"{name_of(layer)}: {name} must be made of whole numbers, zero or "
                    f"more; found {name}={size!r}."
                )


def _is_size(number: Any) -> bool:
    try:
        return not isinstance(number, bool) and operator.index(number) >= 0
    except TypeError:
        return False


NO_RNGS: Any = None
"""The default of ``rngs=``: ``check_rngs`` says more than Python, and only if due."""


def check_rngs(layer: Any, name: str, rngs: Any) -> None:
    """Refuses anything but an Rngs for the initialisation of ``name``."""
    if not is_rngs(rngs):
        owner = name_of(layer)
        raise ArgumentError(
            f"{owner} needs an Rngs to initialise its {name}; found rngs="
            f"{describe(rngs)}. Write {owner}(..., rngs=nnx.Rngs(0))."
        )


def new_param(
    layer: Any,
    name: str,
    init: Initializer,
    rngs: Rngs,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    metadata: Metadata = NO_METADATA,
    *,
    init_shape: tuple[int, ...] | None = None,
    kind: type[Variable] = Param,
    argument: str | None = None,
) -> Any:
    """A parameter, initialised with the next key of the stream ``params``.

    Where ``init_shape`` is given, the initialiser sees that shape, whose fan-in and
    fan-out are the right ones. ``argument`` is the layer's name of the initialiser in
    messages.
    """
    owner, argument = name_of(layer), argument or f"{name}_init"
    check_rngs(layer, name, rngs)
    if not callable(init):
        raise ArgumentError(
            f"{owner}: {argument} must be a function of (key, shape, dtype); found "
            f"{describe(init)}. For a fixed value write "
            f"{argument}=nnx.initializers.constant(value)."
        )
    key = rngs.params()
    # For empty shapes, some versions of JAX divide by a fan-in of zero.
    value = (
        init(key, init_shape or shape, dtype) if all(shape) else jnp.zeros(shape, dtype)
    )
    if inspect.isfunction(value):
        raise ArgumentError(
            f"{owner}: {argument} returned a function instead of an array: it makes "
            f"initialisers and is not one itself. Call it first, as in "
            f"{argument}=nnx.initializers.lecun_normal()."
        )
    return kind(value if init_shape is None else _shaped(value, shape), **metadata)


def _shaped(value: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(value, VariableMetadata):
        inner = _shaped(value.raw_value, shape)
        return VariableMetadata(inner, metadata=value.metadata)
    return jnp.reshape(value, shape)
