"""jit, remat and eval_shape over modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from sortal.errors import ArgumentError, StaleBufferError, listing
from sortal.surgery import merge, split
from sortal.transforms.lift import (
    Entered,
    leave,
    named_positions,
    stale_buffers,
    unbind,
)
from sortal.transforms.traced import replace_roots, run

_NO_FUNCTION: Any = object()


class Jitted:
    """A function compiled by ``jit``; call it as the function itself."""

    def __init__(self, fn: Callable[..., Any], options: dict[str, Any]):
        self._fn, self._first = unbind(fn)
        options = _shift(options, len(self._first))
        self._static, _ = named_positions(
            self._fn, options.get("static_argnums"), options.get("static_argnames")
        )
        self._donated, _ = named_positions(
            self._fn, options.get("donate_argnums"), options.get("donate_argnames")
        )
        inner, donated = self._fn, self._donated

        def traced(*args: Any, **kwargs: Any) -> Any:
            return run(inner, args, kwargs, donated)

        if hasattr(inner, "__name__"):
            functools.update_wrapper(traced, inner)
        self._jit: Any = jax.jit(traced, **options)
        functools.update_wrapper(self, fn, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        entered = self._enter(args, kwargs)
        try:
            result = self._jit(*entered.args, **entered.kwargs)
        except (RuntimeError, ValueError) as e:
            stale = stale_buffers(entered.carriers)
            if not stale:
                raise
            raise StaleBufferError(
                f"{len(stale)} leaves hold buffers that were donated to an earlier "
                f"call:\n{listing(stale)}\nUse the objects that call updated, or make "
                "the copy that must survive with clone(model, arrays=True)."
            ) from e
        return leave(entered, result)

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entered:
        return Entered(
            (*self._first, *args), kwargs, self._static, distinct=bool(self._donated)
        )

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Lowers for these arguments, as ``jax.jit(f).lower``; nothing is run."""
        entered = self._enter(args, kwargs)
        return self._jit.lower(*entered.args, **entered.kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """Traces for these arguments, as ``jax.jit(f).trace``; nothing is run."""
        entered = self._enter(args, kwargs)
        return self._jit.trace(*entered.args, **entered.kwargs)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """Shapes and dtypes of the output; nothing is run or changed."""
        call = functools.partial(self._fn, *self._first)
        return eval_shape(call, *args, **kwargs)

    def clear_cache(self) -> None:
        """Forgets all compiled programs."""
        self._jit.clear_cache()


def jit(fn: Any = _NO_FUNCTION, /, **options: Any) -> Any:
    """``jax.jit`` for functions of modules: what they change is changed afterwards.

    Modules and Variables may stand anywhere among the arguments and in what is
    returned. Only values that the function changed leave the compiled program. Objects
    that are returned are the very objects passed in; Variables shared by several
    arguments are one inside; new attributes and replaced modules are carried over. An
    exception leaves everything as it was.

    Args:
      fn: the function; without it a decorator is returned.
      **options: all of ``jax.jit``'s: ``static_argnums``, ``static_argnames``,
        ``donate_argnums``, ``donate_argnames``, ``in_shardings``, ``out_shardings``,
        and so on. All leaves of a donated module get new buffers.

    Returns:
      A Jitted, or the decorator.

    Raises:
      TraceError: at a call: the function writes to a live object that was not passed
        to it.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> class Counter(nnx.Module):
      ...     def __init__(self):
      ...         self.n = nnx.Variable(jnp.array(0))
      >>> @nnx.jit
      ... def count(counter):
      ...     counter.n[...] += 1
      >>> counter = Counter()
      >>> count(counter)
      >>> int(counter.n.value)
      1
    """
    options.pop("graph", None)
    options.pop("graph_updates", None)
    if fn is _NO_FUNCTION:
        return lambda f: Jitted(f, options)
    if not callable(fn):
        raise ArgumentError(
            f"jit takes a function or a callable Module; found {fn!r}. Options go by "
            "keyword: jit(f, static_argnums=...)."
        )
    return Jitted(fn, options)


def _shift(options: dict[str, Any], by: int) -> dict[str, Any]:
    """Moves positions in options past the arguments that ``unbind`` put first."""
    if not by:
        return options
    moved = dict(options)
    for name in ("static_argnums", "donate_argnums"):
        nums = moved.get(name)
        if nums is not None:
            several = (nums,) if isinstance(nums, int) else nums
            moved[name] = tuple(i + by if i >= 0 else i for i in several)
    if isinstance(moved.get("in_shardings"), (tuple, list)):
        moved["in_shardings"] = ((None,) * by) + tuple(moved["in_shardings"])
    return moved


def remat(
    f: Any = _NO_FUNCTION,
    /,
    *,
    prevent_cse: bool = True,
    policy: Callable[..., bool] | None = None,
    static_argnums: int | Sequence[int] = (),
    **ignored: Any,
) -> Any:
    """``jax.checkpoint`` for functions of modules: recomputes instead of storing.

    Args:
      f: the function; without it a decorator is returned.
      prevent_cse: see ``jax.checkpoint``.
      policy: what to store all the same; see ``jax.checkpoint_policies``.
      static_argnums: positions of arguments that are not traced.
      **ignored: ``graph`` and ``graph_updates`` are taken for NNX code, of no effect.

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
    unknown = set(ignored) - {"graph", "graph_updates"}
    if unknown:
        raise ArgumentError(f"remat has no option {', '.join(sorted(unknown))}.")
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

    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        entered = Entered((*first, *args), kwargs, static)
        rematted = jax.checkpoint(
            lambda *a, **k: run(fn, a, k),
            prevent_cse=prevent_cse,
            policy=policy,
            static_argnums=tuple(sorted(static)),
        )
        return leave(entered, rematted(*entered.args, **entered.kwargs))

    return wrapper


checkpoint = remat


def eval_shape(f: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """What a function would return, with shapes and dtypes for arrays.

    Live objects among the arguments are never touched; where the function returns
    one, it is an abstract copy.

    Args:
      f: the function, such as one that builds a model.
      *args: its arguments.
      **kwargs: its keyword arguments.

    Returns:
      The output with ``jax.ShapeDtypeStruct`` in the place of arrays.

    Example:
      >>> import sortal as nnx
      >>> model = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> model.kernel.value
      ShapeDtypeStruct(shape=(2, 3), dtype=float32)
    """
    kwargs.pop("graph", None)
    kwargs.pop("graph_updates", None)
    fn, first = unbind(f)
    live = Entered((*first, *args), kwargs)
    roots = tuple(live.roots)
    copies = iter(_abstract(roots) if roots else ())
    args, kwargs = replace_roots(((*first, *args), kwargs), lambda _: next(copies))
    entered = Entered(args, kwargs)
    result = jax.eval_shape(lambda a, k: run(fn, a, k), entered.args, entered.kwargs)
    return leave(entered, result)


def _abstract(roots: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of live objects with shapes and dtypes in the place of arrays."""
    graphdef, state = split(roots)
    return merge(graphdef, jax.eval_shape(lambda s: s, state))
