"""Transforms as decorators: with options alone, they wait for the function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

P = ParamSpec("P")

NO_FUNCTION: Any = object()
"""The default of a transform's function."""


def as_decorator(transform: Callable[P, Any]) -> Callable[P, Any]:
    """Lets a transform be called with its options alone, for use above a function.

    Args:
      transform: takes a function first.

    Returns:
      The transform; without the function it returns itself with the options given.

    Example:
      >>> @as_decorator
      ... def repeated(f=NO_FUNCTION, *, times):
      ...     return lambda: [f()] * times
      >>> @repeated(times=2)
      ... def one():
      ...     return 1
      >>> one(), repeated(lambda: 3, times=1)()
      ([1, 1], [3])
    """
    name = next(iter(inspect.signature(transform).parameters))

    @functools.wraps(transform)
    def wrapper(*args: P.args, **options: P.kwargs) -> Any:
        if args or name in options:
            return transform(*args, **options)
        return functools.partial(wrapper, **options)

    return wrapper
