"""Dtype promotion, and checks that many layers share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike

from sortal._engine.variable import describe, is_variable, value_of
from sortal.errors import ArgumentError

PromoteDtype = Callable[..., Any]
"""Takes a tuple of arrays or None and ``dtype=``; returns the tuple, promoted."""


def canonicalize_dtype(
    *args: Any, dtype: DTypeLike | None = None, inexact: bool = True
) -> Any:
    """The dtype that a computation on ``args`` has.

    Args:
      *args: arrays or numbers; None is ignored.
      dtype: the result if given; else it follows from ``args``.
      inexact: whether it must be real or complex floating point; integers are then
        promoted to it, with float32.

    Returns:
      The dtype.

    Raises:
      ArgumentError: ``dtype`` is an integer or boolean one though ``inexact``.

    Example:
      >>> import jax.numpy as jnp
      >>> canonicalize_dtype(jnp.zeros(2, jnp.bfloat16), None, 1.0)
      dtype(bfloat16)
      >>> canonicalize_dtype(jnp.arange(3))
      dtype('float32')
    """
    if dtype is None:
        arrays = [x if _is_array(x) else jnp.asarray(x) for x in args if x is not None]
        dtype = jnp.result_type(*arrays)
        if inexact and not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(jnp.float32, dtype)
    if inexact and not jnp.issubdtype(dtype, jnp.inexact):
        raise ArgumentError(
            f"the dtype of the computation must be a floating-point one; found "
            f"{jnp.dtype(dtype).name}. Write dtype=jnp.float32, or leave it out."
        )
    return dtype


def promote_dtype(
    args: Any, /, *, dtype: DTypeLike | None = None, inexact: bool = True
) -> Any:
    """Casts arrays to one dtype: the given one, or the one that they promote to.

    Args:
      args: a tuple of arrays, numbers or None; None stays None.
      dtype: the dtype; follows from ``args`` if absent.
      inexact: whether the dtype must be a floating-point one.

    Returns:
      The tuple of arrays.

    Raises:
      ArgumentError: ``dtype`` is an integer or boolean one though ``inexact``.

    Example:
      >>> import jax.numpy as jnp
      >>> x, w, bias = promote_dtype((jnp.arange(3), jnp.ones(3), None))
      >>> x.dtype, bias
      (dtype('float32'), None)
    """
    dtype = canonicalize_dtype(*args, dtype=dtype, inexact=inexact)
    return tuple(None if x is None else cast(x, dtype) for x in args)


def cast(x: Any, dtype: Any) -> Any:
    """``jnp.asarray(x, dtype)``, not weakly typed; free for arrays of that dtype."""
    if _is_array(x) and x.dtype == dtype and not x.weak_type:
        return x
    return jnp.asarray(x, dtype)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array)


# JAX caches the tracing and differentiation of jitted functions, by shapes. Most of jnp
# is jitted; these two are not, and without jit they take more than half of the time to
# trace a training step of many layers.


@functools.partial(jax.jit, static_argnums=1, inline=True)
def reshape(x: Any, shape: tuple[int, ...]) -> Any:
    """``jnp.reshape``, traced once for all layers of one size."""
    return jnp.reshape(x, shape)


def lifted(x: Any, like: Any) -> Any:
    """``x`` with leading axes of one up to the rank of ``like``.

    JAX would add them by itself, but not under ``jax_numpy_rank_promotion="raise"``.
    """
    return x.reshape(*[1] * (like.ndim - x.ndim), *x.shape)


_OF_JAX = lax.dot_general
_CODE = getattr(_OF_JAX, "__code__", None)
_dot_general = jax.jit(
    _OF_JAX,
    static_argnames=(
        "dimension_numbers",
        "precision",
        "preferred_element_type",
        "out_sharding",
    ),
    inline=True,
)


def dot_general(x: Any, kernel: Any, dimension_numbers: Any, **options: Any) -> Any:
    """``jax.lax.dot_general``, traced once for all layers of one size.

    Where a library has put another function in its place, or other code into it, as
    those do that quantize products, that is called each time.
    """
    # A plain function, so that a layer that holds it can be copied and pickled.
    now = lax.dot_general
    if now is _OF_JAX and getattr(now, "__code__", None) is _CODE:
        return _dot_general(x, kernel, dimension_numbers, **options)
    return now(x, kernel, dimension_numbers, **options)


def promote(layer: Any, inputs: Any, *parameters: Any) -> Any:
    """A layer's inputs and parameters, cast by its ``promote_dtype``."""
    values = (p[...] if is_variable(p) else p for p in parameters)
    return layer.promote_dtype((as_array(layer, inputs), *values), dtype=layer.dtype)


def as_array(owner: Any, inputs: Any) -> Any:
    """Arrays as they are; numbers and nested lists as a JAX array."""
    if hasattr(inputs, "shape") and hasattr(inputs, "dtype"):
        return inputs
    try:
        if inputs is not None:
            return jnp.asarray(inputs)
    except (TypeError, ValueError):
        pass
    raise ArgumentError(
        f"{name_of(owner)} was called with {describe(inputs)}, which is not an array."
    )


def check_axis(owner: Any, inputs: Any, size: int, axis: int = -1) -> None:
    """Refuses inputs that do not have ``size`` features along ``axis``."""
    if not -inputs.ndim <= axis < inputs.ndim or inputs.shape[axis] != size:
        raise ArgumentError(
            f"{name_of(owner)} has parameters for {size} features on axis {axis} of "
            f"its input; found an input {describe(inputs)}. Build the layer for the "
            "size of that axis, or bring the features there."
        )


def check_single(owner: Any, name: str, ndim: int) -> None:
    """Refuses a parameter of more axes than one layer has: that of a stack of them."""
    value = value_of(getattr(owner, name, None))
    # What is no array, the layer's own promotion makes one.
    if len(getattr(value, "shape", ())) > ndim:
        raise ArgumentError(
            f"{name_of(owner)}.{name} is {describe(value)}, and has {ndim} "
            f"{'axis' if ndim == 1 else 'axes'} in one layer. Give a stack to vmap or "
            "scan, as in vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, x)."
        )


def checked_lengths(name: str, lengths: Any, batch: tuple[int, ...], most: int) -> Any:
    """How much of each sequence is not padding: int32 of the batch's shape.

    From 0 to ``most``: others are refused, or in a trace, where they are not known,
    moved to the nearest of these.
    """
    lengths = jnp.asarray(lengths)
    found = describe(lengths)
    fits = lengths.shape == batch and jnp.issubdtype(lengths.dtype, jnp.integer)
    if fits and not isinstance(lengths, Tracer):
        held = np.asarray(lengths)
        bad = [(i, n) for i, n in np.ndenumerate(held) if not 0 <= n <= most]
        found = ", ".join(f"sequence {', '.join(map(str, i))} has {n}" for i, n in bad)
        fits = not bad
    if not fits:
        raise ArgumentError(
            f"{name} are integers from 0 to {most} of the batch's shape {batch}, for "
            f"each sequence how much of it is not padding; found {found}."
        )
    if lengths.dtype.itemsize < 4:  # ``most`` may be more than they can hold
        lengths = lengths.astype(jnp.int32)
    return jnp.clip(lengths, 0, most).astype(jnp.int32)


_SET_BY_TRAIN = ("deterministic", "use_running_average")


def resolve_flag(layer: Any, name: str, given: bool | None) -> bool:
    """A flag of a call; if None, the layer's attribute of that name."""
    found = getattr(layer, name) if given is None else given
    if found is None:
        hint = "Write model.train() or model.eval(). " if name in _SET_BY_TRAIN else ""
        raise ArgumentError(
            f"{name_of(layer)} does not know its {name}: it is None in the layer and "
            f"was not passed to the call. {hint}Pass {name}=True or False to the "
            "constructor or the call."
        )
    return bool(found)


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None; replaced functions may not take the others."""
    return {name: value for name, value in options.items() if value is not None}


def product_options(layer: Any, out_sharding: Any) -> dict[str, Any]:
    """The keyword arguments of a layer's product, as for ``jax.lax.dot_general``."""
    return {
        "precision": layer.precision,
        **given(
            out_sharding=None if is_automatic(out_sharding) else out_sharding,
            preferred_element_type=layer.preferred_element_type,
        ),
    }


def is_automatic(out_sharding: Any) -> bool:
    """Whether a sharding is of automatic axes, of which JAX's products take none."""
    if out_sharding is None:
        return False
    mesh = getattr(out_sharding, "mesh", None) or jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.are_all_axes_auto


def constrain(y: Any, out_sharding: Any) -> Any:
    """An output, constrained to a sharding of automatic mesh axes."""
    if not is_automatic(out_sharding):
        return y  # None, or the product had it
    return lax.with_sharding_constraint(y, out_sharding)


def name_of(owner: Any) -> str:
    """The name of a layer, or the name itself, for messages."""
    return owner if isinstance(owner, str) else type(owner).__name__
