"""Transforms called eagerly: compiled once for each function object, as JAX does.

JAX knows the function of a loop or branch again by its identity. A transform here gives
JAX another function at each call, so it keeps the compiled transform itself, by the
identity of the user's functions and by the options. The structure, shapes and dtypes of
the arguments are told apart by ``jax.jit``. What else a function reads, such as a
global, is read when it is traced, as under ``jax.jit``; but a program that closed over
an array, for example that of a live Variable, is never used for another call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.tree_util as jtu

from sortal._engine.bounded import Bounded
from sortal._engine.jax_compat import only_differentiated
from sortal._engine.statics import static_key
from sortal.sharding.mesh_axes import in_force
from sortal.transforms._adapter.binding import BoundArguments, write_back
from sortal.transforms._adapter.effects import Result
from sortal.transforms._adapter.tracing import run
from sortal.transforms.refusals import explain_failure

_programs: Bounded[Program | None] = Bounded(64)


def kept(
    make: Callable[..., Callable[..., Any]],
    functions: Sequence[Any],
    options: Any,
    static: tuple[int, ...] = (),
    chosen: Sequence[Any] = (),
) -> Callable[..., Any]:
    """``make(functions, options)``, compiled and kept where that is safe.

    Args:
      make: builds the transform; it refers to nothing but its arguments.
      functions: the user's functions. They are known by identity and not kept alive.
      options: a pytree of what else tells one transform from another.
      static: positions of arguments that are not traced.
      chosen: the values of these.

    Returns:
      A function of arguments that may be traced, the static ones apart. It is not kept
      inside of other transforms than derivatives; under ``jax.disable_jit``; where an
      option cannot be hashed; and where a trace closed over an array.
    """
    if not only_differentiated() or jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        return make(functions, options)
    try:
        leaves, treedef = jtu.tree_flatten(options)
        rest = (treedef, *map(static_key, (*leaves, *chosen)), in_force())
        key = (make, rest, *map(weakref.ref, functions))
        found = _programs.get(key, _UNKNOWN)
    except TypeError:
        return make(functions, options)
    if found is _UNKNOWN:
        found = Program(make, functions, options, static, rest)
    return make(functions, options) if found is None else found


_UNKNOWN: Any = object()


class Program:
    """One transform of functions that it does not keep alive, under ``jax.jit``."""

    def __init__(
        self,
        make: Callable[..., Callable[..., Any]],
        functions: Sequence[Any],
        options: Any,
        static: tuple[int, ...],
        rest: Hashable,
    ):
        programs, kept_at = _programs, []

        def forget(_: Any) -> None:
            # No reference to this object: it is freed at once with the functions.
            while kept_at:
                programs.drop(kept_at.pop())

        refs = [weakref.ref(f, forget) for f in functions]

        def made() -> Callable[..., Any]:
            return make([ref() for ref in refs], options)

        def traced(*args: Any, **kwargs: Any) -> Result:
            return run(made(), args, kwargs)

        self._static, self._made = static, made
        self._jit = jax.jit(traced, static_argnums=static)
        self._key = (make, rest, *refs)
        kept_at.append(self._key)
        programs.put(self._key, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = BoundArguments(args, kwargs, self._static)
        try:
            result = self._jit(*bound.args, **bound.kwargs)
        except (RuntimeError, TypeError, ValueError) as e:
            explain_failure(self._made(), bound, self._static, e, option=None)
            raise
        if result.effects.closes_over is None:  # traced just now
            traced = self._jit.trace(*bound.args, **bound.kwargs)
            result.effects.closes_over = closes_over(traced)
        if result.effects.closes_over:
            _programs.put(self._key, None)
        return write_back(bound, result)


def closes_over(traced: Any) -> bool:
    """Whether a trace uses arrays that are no arguments of it.

    Args:
      traced: what ``jax.jit(f).trace`` returned.

    Returns:
      The answer.
    """
    # JAX makes inputs of the values of an outer trace, and constants of other arrays.
    n = len(jtu.tree_leaves(traced.args_info))
    return len(traced.jaxpr.jaxpr.invars) != n or _has_constants(traced.jaxpr)


def _has_constants(x: Any) -> bool:
    if isinstance(x, (tuple, list)):
        return any(map(_has_constants, x))
    # By attributes: `jax.extend.core`, which has the classes, takes long to import.
    inner = [list(e.params.values()) for e in getattr(x, "eqns", ())]
    return bool(getattr(x, "consts", ())) or _has_constants(inner)
