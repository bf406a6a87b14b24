"""Dtype promotion, and what else every layer asks of its arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from sortal._engine.variable import Variable, describe
from sortal.errors import ArgumentError

PromoteDtype = Callable[..., Any]
"""Takes a tuple of arrays or None and ``dtype=``; returns the tuple, promoted."""


def canonicalize_dtype(
    *args: Any, dtype: DTypeLike | None = None, inexact: bool = True
) -> Any:
    """The dtype that a computation on ``args`` has.

    Args:
      *args: arrays or numbers; None is left out.
      dtype: the answer, where it is given; else it follows from ``args``.
      inexact: whether it must be real or complex floating point; integers then count
        as float32.

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
    """Casts arrays to one dtype: the given one, or that which they promote to.

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
    """``jnp.asarray(x, dtype)``, at no cost for an array that has the dtype.

    Args:
      x: an array or number.
      dtype: the dtype.

    Returns:
      The array, not weakly typed.
    """
    if _is_array(x) and x.dtype == dtype and not x.weak_type:
        return x
    return jnp.asarray(x, dtype)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array)


# JAX keeps how a function under jit is traced and differentiated, by its shapes. Most
# of jnp is under jit already; these two are not, and without it they would take more
# than half of the time to trace a training step of many layers.


@functools.partial(jax.jit, static_argnums=1, inline=True)
def reshape(x: Any, shape: tuple[int, ...]) -> Any:
    """``x.reshape(shape)``, traced once for all layers of a size.

    Args:
      x: an array.
      shape: the new shape.

    Returns:
      The array.
    """
    return jnp.reshape(x, shape)


_dot_general = jax.jit(
    lax.dot_general,
    static_argnames=(
        "dimension_numbers",
        "precision",
        "preferred_element_type",
        "out_sharding",
    ),
    inline=True,
)


def dot_general(x: Any, kernel: Any, dimension_numbers: Any, **options: Any) -> Any:
    """``jax.lax.dot_general``, traced once for all layers of a size.

    Args:
      x: the left array.
      kernel: the right array.
      dimension_numbers: axes summed over and axes of the batch; tuples.
      **options: as for ``jax.lax.dot_general``.

    Returns:
      The product.
    """
    # A plain function, for a layer that holds it can be copied and pickled.
    return _dot_general(x, kernel, dimension_numbers, **options)


def promote(layer: Any, inputs: Any, *parameters: Any) -> Any:
    """A layer's inputs and parameters, through the layer's own ``promote_dtype``.

    Args:
      layer: a module with ``promote_dtype`` and ``dtype``.
      inputs: what the layer was called with.
      *parameters: Variables, arrays or None.

    Returns:
      The tuple of arrays, in this order.

    Raises:
      ArgumentError: the inputs are no array.
    """
    values = (p[...] if isinstance(p, Variable) else p for p in parameters)
    return layer.promote_dtype((as_array(layer, inputs), *values), dtype=layer.dtype)


def as_array(owner: Any, inputs: Any) -> Any:
    """Takes arrays as they are, and makes one of numbers and nested lists.

    Args:
      owner: the layer, or the name of the function, for the message.
      inputs: what it was called with.

    Returns:
      Something with ``shape`` and ``dtype``.

    Raises:
      ArgumentError: it cannot be made into an array.
    """
    if hasattr(inputs, "shape") and hasattr(inputs, "dtype"):
        return inputs
    try:
        if inputs is not None:
            return jnp.asarray(inputs)
    except (TypeError, ValueError):
        pass
    raise ArgumentError(
        f"{name_of(owner)} was called with {describe(inputs)}, which is no array."
    )


def check_axis(owner: Any, inputs: Any, size: int, axis: int = -1) -> None:
    """Refuses inputs that do not have ``size`` features along ``axis``.

    Args:
      owner: the layer, for the message.
      inputs: an array.
      size: how many features the parameters are for.
      axis: where the features are.

    Raises:
      ArgumentError: there is no such axis, or it has another size.
    """
    if not -inputs.ndim <= axis < inputs.ndim or inputs.shape[axis] != size:
        raise ArgumentError(
            f"{name_of(owner)} has parameters for {size} features on axis {axis} of "
            f"its input; found an input {describe(inputs)}. Build the layer for the "
            "size of that axis, or bring the features there."
        )


_SETS: dict[str, str] = dict.fromkeys(
    ["deterministic", "use_running_average"],
    "Write model.train() or model.eval(). ",
)


def resolve_flag(layer: Any, name: str, given: bool | None) -> bool:
    """A flag of a call, or the layer's own where the call leaves it open.

    Args:
      layer: the layer.
      name: the flag, an attribute of the layer and an argument of the call.
      given: what was passed to the call.

    Returns:
      The flag.

    Raises:
      ArgumentError: neither says.
    """
    found = getattr(layer, name) if given is None else given
    if found is None:
        raise ArgumentError(
            f"{name_of(layer)} does not know its {name}: it is None in the layer and "
            f"was not passed to the call. {_SETS.get(name, '')}Pass {name}=True or "
            "False to the constructor or the call."
        )
    return bool(found)


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None: replaceable operations may not know the others.

    Args:
      **options: keyword arguments.

    Returns:
      Those to pass on.
    """
    return {name: value for name, value in options.items() if value is not None}


def name_of(owner: Any) -> str:
    """What a message calls a layer or function.

    Args:
      owner: a layer, or a name.

    Returns:
      The name.
    """
    return owner if isinstance(owner, str) else type(owner).__name__
