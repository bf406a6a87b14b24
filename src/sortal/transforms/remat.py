"""remat over modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Never

import jax

from sortal._engine.statics import is_hashable
from sortal.transforms._adapter import tracing
from sortal.transforms._adapter.binding import (
    Entered,
    leave,
    named_positions,
    refuse_unknown,
    unbind,
)
from sortal.transforms.captures import kept

_NO_FUNCTION: Any = object()


def remat(
    f: Any = _NO_FUNCTION,
    *,
    prevent_cse: bool = True,
    policy: Callable[..., bool] | None = None,
    static_argnums: int | Sequence[int] = (),
    **_unknown: Never,
) -> Any:
    """``jax.checkpoint`` for functions of modules: recomputes instead of storing.

    Args:
      f: the function; without it a decorator is returned.
      prevent_cse: see ``jax.checkpoint``.
      policy: what to store all the same; see ``jax.checkpoint_policies``.
      static_argnums: positions of arguments that are not traced.

    Returns:
      The function, or the decorator.

    Raises:
      ArgumentError: an unknown keyword.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> loss = lambda layer, x: nnx.remat(nnx.Linear.__call__)(layer, x).sum()
      >>> nnx.grad(loss)(layer, jnp.ones((1, 2))).paths()
      (('bias',), ('kernel',))
    """
    refuse_unknown("remat", _unknown)
    if f is _NO_FUNCTION:
        return functools.partial(
            remat,
            prevent_cse=prevent_cse,
            policy=policy,
            static_argnums=static_argnums,
        )
    fn, first = unbind(f)
    static, _ = named_positions(fn, static_argnums, None)
    static = {i + len(first) for i in static if isinstance(i, int)}
    at = tuple(sorted(static))

    def call(*args: Any, **kwargs: Any) -> Any:
        entered = Entered(args, kwargs, static)
        rematted = jax.checkpoint(
            lambda *a, **k: tracing.run(fn, a, k),
            prevent_cse=prevent_cse,
            policy=policy,
            static_argnums=at,
        )
        return leave(entered, rematted(*entered.args, **entered.kwargs))

    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        args = (*first, *args)
        chosen = tuple(args[i] for i in at if i < len(args))
        fixed = (fn, prevent_cse, policy, at, chosen)
        run = call
        if is_hashable(chosen):
            run = kept(call, fixed, (args, kwargs), static_argnums=at)
        return run(*args, **kwargs)

    return wrapper
