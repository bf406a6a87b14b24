"""Sequential: functions and modules called one after another."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from sortal.errors import ArgumentError
from sortal.module import Module


class Sequential(Module):
    """Calls functions and modules one after another.

    A tuple that one returns becomes the positional arguments of the next, a dict its
    keyword arguments. Keyword arguments of the call, such as ``rngs``, go to all layers
    that take them. With no layers it returns what it is given.

    Args:
      *fns: modules or functions.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(2, 4, rngs=rngs), nnx.relu)
      >>> model(jnp.ones((1, 2))).shape
      (1, 4)
    """

    def __init__(self, *fns: Callable[..., Any]):
        self.layers = list(fns)

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter(self.layers)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.layers:
            return args[0] if len(args) == 1 else args or kwargs or None
        output: Any = None
        own: dict[str, Any] = {}
        left = kwargs.keys() - {"rngs"}
        for i, layer in enumerate(self.layers):
            if i > 0:
                args, own = _arguments(output)
            given = _taken(layer, len(args), kwargs)
            left -= given.keys()
            if twice := own.keys() & given.keys():
                raise ArgumentError(
                    f"Sequential: layers.{i} is given {', '.join(sorted(twice))} by "
                    "the layer before it and by the call."
                )
            if isinstance(layer, type):
                raise ArgumentError(
                    f"Sequential: layers.{i} is the class {layer.__name__}. Pass an "
                    f"object: {layer.__name__}(...)."
                )
            if not callable(layer):
                raise ArgumentError(
                    f"Sequential: layers.{i} is a {type(layer).__name__}, which cannot "
                    "be called. Pass modules and functions: Sequential(*layers)."
                )
            output = layer(*args, **own, **given)
        if left:
            raise ArgumentError(
                f"Sequential: no layer takes {', '.join(sorted(left))}."
            )
        return output


def _arguments(output: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(output, tuple):
        return output, {}
    return ((), output) if isinstance(output, dict) else ((output,), {})


def _taken(
    function: Callable[..., Any], n: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Those of some keywords that a function takes after ``n`` positional arguments."""
    if not options:
        return {}
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return {}
    by_place = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    only = sum(p.kind is p.POSITIONAL_ONLY for p in parameters)
    filled = {p.name for p in by_place[: max(n - only, 0)]}
    free = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    free |= {p.name for p in by_place} - filled
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        free = options.keys() - filled
    return {k: x for k, x in options.items() if k in free}
