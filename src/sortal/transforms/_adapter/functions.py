"""Functions that transforms are given: the objects in them, and their signatures."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

from sortal._engine.nodes import is_object
from sortal._engine.variable import describe
from sortal.errors import ArgumentError
from sortal.transforms._adapter.tracing import has_roots


def unbind(fn: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Takes the object out of a bound method or callable Module.

    Left inside, the object would be a closed-over constant whose changes are lost.

    Args:
      fn: any callable.

    Returns:
      A plain function, and the arguments to put before those of each call.

    Raises:
      ArgumentError: it cannot be called.
    """
    if isinstance(fn, types.MethodType) and is_object(fn.__self__):
        return fn.__func__, (fn.__self__,)
    if is_object(fn) and callable(fn):
        return type(fn).__call__, (fn,)
    if isinstance(fn, functools.partial):
        inner, first = unbind(fn.func)
        names = [k for k, x in fn.keywords.items() if has_roots(x)]
        if first or names or has_roots(fn.args):
            rest = {k: x for k, x in fn.keywords.items() if k not in names}
            inner = functools.partial(inner, **rest) if rest else inner
            inner = _with_first(inner, names) if names else inner
            return inner, (*[fn.keywords[k] for k in names], *first, *fn.args)
    if not callable(fn):
        raise ArgumentError(
            f"a function is expected; found {describe(fn)}. Pass the function itself, "
            "not what a call of it returned."
        )
    return fn, ()


def _with_first(fn: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """``fn`` with some keyword arguments before all others; a call may replace them."""
    n = len(names)

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args[n:], **{**dict(zip(names, args, strict=False)), **kwargs})

    lead_with(
        call,
        [f"_{name}" for name in names],
        functools.partial(fn, **dict.fromkeys(names)),
    )
    return call


def by_position(
    fn: Callable[..., Any],
    first: Sequence[Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments after ``first`` with those at their places that came by keyword."""
    signature = signature_of(fn)
    try:
        found = signature and signature.bind(*first, *args, **kwargs)
    except TypeError:  # which the call itself explains
        found = None
    return (found.args[len(first) :], found.kwargs) if found else (args, kwargs)


def named_positions(fn: Any, nums: Any, names: Any) -> set[Any]:
    """Positions and names that ``argnums`` and ``argnames`` together mean.

    Args:
      fn: the function they are about.
      nums: an int, or several, or None.
      names: a string, or several, or None.

    Returns:
      Non-negative positions, and names.
    """
    # As in JAX: where both are given, neither says anything about the other.
    one_spelling = nums is None or names is None
    nums = (nums,) if isinstance(nums, int) else tuple(nums or ())
    names = (names,) if isinstance(names, str) else tuple(names or ())
    positional = [p.name for p in parameters_of(fn) if p.kind in POSITIONAL]
    n = len(positional)
    found: set[Any] = {i + n if i < 0 else i for i in nums} | set(names)
    for i, name in enumerate(positional if one_spelling else ()):
        if i in found or name in found:
            found |= {i, name}
    return found


def signature_of(fn: Any) -> inspect.Signature | None:
    """The signature of a function; None for builtins that have none."""
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):
        return None


def parameters_of(fn: Any) -> list[inspect.Parameter]:
    """The parameters of a function, as far as it says which it has."""
    signature = signature_of(fn)
    return list(signature.parameters.values()) if signature else []


def lead_with(call: Any, names: Sequence[str], fn: Any) -> None:
    """Gives ``call`` the signature of ``fn``, if any, after further parameters."""
    signature, only = signature_of(fn), inspect.Parameter.POSITIONAL_ONLY
    if signature is not None:
        first = [inspect.Parameter(name, only) for name in names]
        parameters = [*first, *signature.parameters.values()]
        call.__signature__ = signature.replace(parameters=parameters)


POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)
