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
    keyword arguments. ``rngs`` is passed to those that take it.

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

    def __call__(self, *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
        output: Any = args[0] if len(args) == 1 else args
        for i, layer in enumerate(self.layers):
            if i > 0:
                args, kwargs = _arguments(output)
            if rngs is not None and _takes(layer, "rngs"):
                kwargs = {**kwargs, "rngs": rngs}
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
            output = layer(*args, **kwargs)
        return output


def _arguments(output: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(output, tuple):
        return output, {}
    return ((), output) if isinstance(output, dict) else ((output,), {})


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(
        p.kind is p.VAR_KEYWORD for p in parameters.values()
    )
