"""remat over modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Never

import jax

from sortal._nnx_names import refuse_unknown
from sortal.transforms._adapter.binding import BoundArguments, write_back
from sortal.transforms._adapter.decorator import NO_FUNCTION, as_decorator
from sortal.transforms._adapter.functions import named_positions, unbind
from sortal.transforms._adapter.tracing import run
from sortal.transforms.eager import kept
from sortal.transforms.refusals import refuse_arguments
from sortal.transforms.shardings import as_declared


@as_decorator
def remat(
    f: Any = NO_FUNCTION,
    *,
    prevent_cse: bool = True,
    policy: Callable[..., bool] | None = None,
    static_argnums: int | Sequence[int] = (),
    **_unknown: Never,
) -> Any:
    """``jax.checkpoint`` for functions of modules: recomputes instead of storing.

    Called eagerly, it stays compiled for the same function object, as in JAX: what
    is read besides the arguments, such as a global number, is read when it is traced.
    What closes over arrays, also those of live Variables, is traced at each call. A
    setting of an object that is closed over, and a Python or NumPy number in a Variable
    of it, are read as a global number is: pass the object as an argument.

    Args:
      f: the function; without it a decorator is returned.
      prevent_cse: see ``jax.checkpoint``.
      policy: what to store all the same; see ``jax.checkpoint_policies``.
      static_argnums: positions of arguments that are not traced.

    Returns:
      The function, or the decorator.

    Raises:
      ArgumentError: an unknown keyword; at a call, an argument that is neither a
        model, an array nor a number.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> loss = lambda layer, x: nnx.remat(nnx.Linear.__call__)(layer, x).sum()
      >>> nnx.grad(loss)(layer, jnp.ones((1, 2))).paths()
      (('bias',), ('kernel',))
    """
    refuse_unknown("remat", _unknown)
    fn, first = unbind(f)
    positions = named_positions(fn, static_argnums, None)
    static = tuple(sorted(i + len(first) for i in positions if isinstance(i, int)))

    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        args = (*first, *args)
        chosen = [args[i] for i in static if i < len(args)]
        options = (prevent_cse, policy, static)
        try:
            return kept(_rematted, (f,), options, static, chosen)(*args, **kwargs)
        except TypeError as e:
            if not kwargs:  # which no option makes static
                bound, n = BoundArguments(args, kwargs, static), len(first)
                refuse_arguments(fn, bound, static, e, option="static_argnums", first=n)
            raise

    return wrapper


def _rematted(functions: Sequence[Any], options: Any) -> Callable[..., Any]:
    fn, _ = unbind(functions[0])
    prevent_cse, policy, static = options

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = BoundArguments(args, kwargs, static)
        rematted = jax.checkpoint(
            lambda *a, **k: run(fn, a, k),
            prevent_cse=prevent_cse,
            policy=policy,
            static_argnums=static,
        )
        given = bound.args, bound.kwargs
        result = rematted(*bound.args, **bound.kwargs)
        return write_back(bound, as_declared(result, given))

    return call
