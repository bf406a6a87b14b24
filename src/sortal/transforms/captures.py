"""Transforms called outside of any trace: what is compiled for them, and kept.

JAX knows a loop or branch again by its function, which is another one at each call of
a transform here. The transform is kept under ``jit`` instead. But a compiled function
goes on with the values that it saw when it was traced; so all that could change unseen
must be known first.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np

from sortal._jax import outside_traces
from sortal.statics import static_key
from sortal.transforms.compile import jit

_KEPT = 256
_programs: dict[Hashable, Callable[..., Any]] = {}
_PLAIN = (
    *(str, bytes, int, float, complex, np.generic, np.dtype),
    *(type(None), type(Ellipsis)),
)
_LIBRARIES = frozenset(
    "builtins chex einops flax functools jax jaxlib math numpy optax sortal".split()
)


class _Unknown(Exception):  # noqa: N818 - no error: ends a search
    """Something that may change without anybody noticing."""


def kept(
    call: Callable[..., Any], fixed: Any, also: Any = (), **options: Any
) -> Callable[..., Any]:
    """``call`` under ``jit``, the same one while nothing changes that it refers to.

    Args:
      call: a transform as a function of all that may be traced; besides, it refers to
        ``fixed`` and ``also`` only, and its code says which transform it is.
      fixed: the user's functions, and options, in tuples.
      also: what is compared as a static value is.
      **options: those of ``jit``.

    Returns:
      The compiled function; or ``call`` as it is inside of another trace, whose tracers
      must not be kept, and where ``captures`` knows no key.
    """
    known = captures(fixed) if outside_traces() else None
    if known is None:
        return call
    try:
        key = (call.__code__, known, static_key(also))
    except TypeError:
        return call
    found = _programs.get(key)
    if found is None:
        if len(_programs) >= _KEPT:
            _programs.pop(next(iter(_programs)), None)
        found = _programs[key] = jit(call, **options)
    return found


def captures(fn: Any) -> Hashable | None:
    """A key that changes whenever something changes that a function refers to.

    Looked at are the names that a function and those it calls by name use: numbers and
    text by value, functions, classes and parts of well-known libraries by identity.

    Args:
      fn: a function, or several in a tuple.

    Returns:
      The key, or None where the function refers to arrays, to objects, or to anything
      else that may change.

    Example:
      >>> import jax.numpy as jnp
      >>> def scaled(by):
      ...     return lambda x: x * by
      >>> captures(scaled(0.5)) == captures(scaled(0.25))
      False
      >>> captures(scaled(jnp.ones(3))) is None
      True
    """
    found: list[Any] = []
    try:
        _visit(fn, found, set(), ())
        key = tuple(found)
        hash(key)
    except (_Unknown, TypeError):
        return None
    return key


def _visit(x: Any, found: list[Any], seen: set[int], names: tuple[str, ...]) -> None:
    if isinstance(x, _PLAIN):
        found.append(static_key(x))
    elif isinstance(x, type):
        found.append(x)
    elif isinstance(x, types.ModuleType):
        if not _is_library(x.__name__):
            for name in names:
                if name in vars(x):
                    _visit(vars(x)[name], found, seen, names)
    elif isinstance(x, (tuple, list, set, frozenset)):
        found.append((type(x), len(x)))
        for child in x:
            _visit(child, found, seen, names)
    elif isinstance(x, dict):
        _visit(tuple(x.items()), found, seen, names)
    elif isinstance(x, types.FunctionType):
        _visit_function(x, found, seen)
    elif isinstance(x, functools.partial):
        _visit((x.func, x.args, x.keywords), found, seen, names)
    elif isinstance(x, (types.BuiltinFunctionType, np.ufunc)):
        found.append(x)
    elif callable(x) and type(x).__module__.partition(".")[0] in ("jax", "jaxlib"):
        # A compiled function is what it wraps; jnp's ufuncs wrap nothing.
        found.append(x)
        _visit(getattr(x, "__wrapped__", None), found, seen, names)
    else:
        raise _Unknown


def _visit_function(fn: types.FunctionType, found: list[Any], seen: set[int]) -> None:
    found.append(fn.__code__)
    # A function's code may lie in a library while what it wraps is the user's.
    plain = _is_library(fn.__globals__.get("__name__", "")) and not fn.__closure__
    if plain or id(fn) in seen:
        return
    seen.add(id(fn))
    names = tuple(dict.fromkeys(_names(fn.__code__)))
    if not _is_library(fn.__globals__.get("__name__", "")):
        for name in names:
            if name in fn.__globals__:
                _visit(fn.__globals__[name], found, seen, names)
    for cell in fn.__closure__ or ():
        try:
            inside = cell.cell_contents
        except ValueError:
            raise _Unknown from None
        _visit(inside, found, seen, names)
    _visit((fn.__defaults__, fn.__kwdefaults__), found, seen, names)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_library(name: Any) -> bool:
    return isinstance(name, str) and name.partition(".")[0] in _LIBRARIES
