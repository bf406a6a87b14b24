"""capture: returns what a call sows, instead of leaving it in the model."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from sortal._engine.nodes import Node
from sortal._engine.paths import Path
from sortal._engine.state import as_state
from sortal._engine.variable import Variable
from sortal.errors import ArgumentError
from sortal.filters import Any_
from sortal.functional import pop, variables
from sortal.module import Module


def capture(
    fn: Any, *var_types: Any, init: Any = None, method_outputs: Any = None
) -> Callable[..., Any]:
    """A function that also returns what its module sows or perturbs in a call.

    Args:
      fn: a Module, a method of one, or a function whose first argument is one. A kind
        gives a decorator.
      *var_types: the kinds to return.
      init: a State that is put into the module before the call, such as perturbations.
      method_outputs: would sow what each method returns, which Sortal does not do.

    Returns:
      The function; it returns ``(output, state, ...)`` with a State for each kind, or
      the output alone if there are none. The module is left without them; what earlier
      calls have sown is there again afterwards.

    Raises:
      ArgumentError: ``method_outputs`` is given; or, at a call, the first argument is
        no Module.

    Example:
      >>> import jax.numpy as jnp
      >>> from sortal import nnx
      >>> class Net(nnx.Module):
      ...     def __call__(self, x):
      ...         self.sow(nnx.Intermediate, "h", x)
      ...         return 2 * x
      >>> y, seen = nnx.capture(Net(), nnx.Intermediate)(jnp.array(3.0))
      >>> float(seen["h"].value[0]), float(y)
      (3.0, 6.0)
    """
    if isinstance(fn, type) and issubclass(fn, Variable):
        return lambda f: capture(
            f, fn, *var_types, init=init, method_outputs=method_outputs
        )
    if method_outputs is not None:
        raise ArgumentError(
            "capture does not sow the outputs of methods. Write in the method "
            f"self.sow({getattr(method_outputs, '__name__', method_outputs)}, 'name', "
            "output)."
        )
    owner = fn.__self__ if isinstance(fn, types.MethodType) else fn
    owner = owner if isinstance(owner, Module) else None

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        module = owner if owner is not None or not args else args[0]
        if not isinstance(module, Module):
            raise ArgumentError(
                "capture needs to know which module sows: a Module, a method of one, "
                f"or a function whose first argument is one; found a "
                f"{type(module).__name__}."
            )
        given = [] if init is None else list(as_state(init).flat_state())
        kinds = tuple(dict.fromkeys([*var_types, *(type(x) for _, x in given)]))
        if not kinds:
            return fn(*args, **kwargs)
        before = _take_out(module, kinds)
        try:
            _put_in(module, [(path, x.replace()) for path, x in given])
            out = fn(*args, **kwargs)
        finally:
            found = pop(module, *kinds) if len(kinds) > 1 else (pop(module, *kinds),)
            _put_in(module, before)
        return (out, *found[: len(var_types)]) if var_types else out

    return wrapper


def _take_out(module: Module, kinds: tuple[Any, ...]) -> list[tuple[Path, Any]]:
    old = list(variables(module, Any_(*kinds)).flat_state())
    pop(module, Any_(*kinds))
    return old


def _put_in(module: Module, leaves: list[tuple[Path, Any]]) -> None:
    for path, leaf in leaves:
        holder: Any = module
        for key in path[:-1]:
            attribute = isinstance(holder, Node)
            holder = getattr(holder, str(key)) if attribute else holder[key]
        if isinstance(holder, Node):
            setattr(holder, str(path[-1]), leaf)
        else:
            holder[path[-1]] = leaf
